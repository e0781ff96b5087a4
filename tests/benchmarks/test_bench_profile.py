"""`python -m benchmarks.profile`: the kinds of kernels, and the command."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.profile import kind_of, main, shares


def test_kernels_of_a_gpu_have_a_kind():
    for name, kind in (
        ("_attention_fwd_kernel", "our kernels"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("cutlass::gemm::device_kernel<…>", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("pytorch_flash::flash_fwd_kernel<…>", "attention of PyTorch"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention of PyTorch"),
        ("void at::native::vectorized_elementwise_kernel<…>", "everything else"),
        ("aten::comm", "everything else"),
    ):
        assert kind_of(name) == kind, name


def test_shares():
    """Times are in microseconds, for 5 steps."""
    times = {"_gemm_kernel": 20_000, "_layer_norm_kernel": 10_000, "nvjet_tst": 15_000, "copy": 5_000}
    text = shares([SimpleNamespace(key=k, took=us) for k, us in times.items()], "took")
    assert [line.split()[-2:] for line in text.splitlines()[1:]] == [
        ["6.000", "60.0%"],
        ["3.000", "30.0%"],
        ["1.000", "10.0%"],
    ]
    assert [line.split("  ")[0] for line in text.splitlines()[1:]] == [
        "our kernels",
        "matrix products",
        "everything else",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_command(tmp_path, monkeypatch, capsys):
    command = ["profile", "--shape", "vit_tiny_patch16_224@32/b1", "--top", "3", "--mode", "fwd"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    assert main() == 0
    said = capsys.readouterr().out
    assert "on this CPU (no GPU here: operators of PyTorch)" in said
    assert "matrix products" in said and sum("::" in line for line in said.splitlines()) == 3  # the longest
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
