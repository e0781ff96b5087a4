"""`python -m benchmarks.profile`: the table of kernels by time, and the floors beside it."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.harness import Ceilings  # noqa: E402
from benchmarks.profile import floors, group_of, main, table  # noqa: E402
from benchmarks.shapes import Shape  # noqa: E402


def test_kernels_of_a_gpu_fall_into_groups():
    for name, group in (
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
        assert group_of(name) == group, name


def test_table():
    rows = [("_gemm_kernel", 24, 6.0), ("nvjet_tst", 36, 3.0), ("copy", 1, 1.0)]
    lines = table(rows, {"our kernels": 3.0, "_gemm_kernel": 3.0, "matrix products": 2.4}, top=2).splitlines()
    assert lines[1].split() == ["our", "kernels", "24", "6.000", "60.0", "%", "3.000", "50", "%"]
    assert lines[2].split() == ["matrix", "products", "36", "3.000", "30.0", "%", "2.400", "80", "%"]
    assert lines[3].split() == ["everything", "else", "1", "1.000", "10.0", "%", "-", "-"]
    assert lines[4].split() == ["together", "61", "10.000", "100.0", "%", "-", "-"]
    assert [line.split()[0] for line in lines[6:8]] == ["_gemm_kernel", "nvjet_tst"]
    assert lines[8] == "and 1 more; --top shows them"


def test_floors_by_hand():
    """One block of width 192 in bf16: bytes alone, so every floor is bytes / bandwidth."""
    shape = Shape("vit_tiny_patch16_224", 64)
    found = floors("ours", shape, torch.bfloat16, "fwd", Ceilings(tflops=1e9, gbps=1000))
    n, d = 64 * 197, 192
    attention = 12 * (4 * n * d * 2)  # qkv read and o written, 12 blocks; inference keeps no statistics
    assert found["_attention_fwd_kernel"] == pytest.approx(attention / 1e9)
    norms = 2 * n * d * 2 + 24 * (4 * n * d * 2) + 25 * 2 * d * 2  # the first alone, 24 with the residual before them
    assert found["_layer_norm_fwd_kernel"] == pytest.approx(norms / 1e9, rel=1e-3)
    assert found["our kernels"] == pytest.approx(sum(ms for name, ms in found.items() if name.startswith("_")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what it says without a GPU")
def test_command(tmp_path, monkeypatch, capsys):
    command = ["profile", "--shape", "vit_tiny_patch16_224@32/b1", "--top", "3", "--mode", "fwd"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    assert main() == 0
    said = capsys.readouterr().out
    assert "on this CPU (no GPU here: operators of PyTorch, and no floors)" in said
    assert "matrix products" in said and "aten::addmm" in said
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (tmp_path / "table.txt").read_text() in said
