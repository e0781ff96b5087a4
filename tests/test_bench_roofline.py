"""`make roofline` in a process of its own, because the tests' process may interpret."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import bench_vit, memory
from benchmarks.harness import Ceilings
from benchmarks.shapes import parse

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "tests" / "lock" / f"triton-{triton.__version__}.json"
FIGURES = ("registers", "spill", "shared")

SCRIPT = """
import json, sys
from benchmarks import roofline, trace
import torch
from benchmarks.devices import DEVICES
from vit import kernels
from vit.kernels.dry_run import dry_run

words = "--shape vit_tiny_patch16_224@64/b2 --arch 90 --no-compile --out".split()
assert roofline.main([*words, sys.argv[1]]) == 0
if sys.argv[2] == "compile":
    x, w = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((64, 197, 768), (768,)))
    (launch,) = trace.trace(kernels.layer_norm, x, w, w)
    with dry_run(90):
        print(json.dumps(roofline.line(launch, 1, 90, DEVICES[90].assumed, True)))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The process, the file that it wrote, and its last line."""
    out = tmp_path_factory.mktemp("roofline") / "out.json"
    try:
        triton.knobs.nvidia.ptxas  # noqa: B018 - looks for the binary
        compiles = "compile"
    except RuntimeError:
        compiles = "no ptxas"
    words = [sys.executable, "-c", SCRIPT, str(out), compiles]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return found, json.loads(out.read_text()), compiles


def test_counts_alone(done):
    process, content, _ = done
    label = "PREDICTION from counted bytes and FLOPs, not a measurement"
    assert process.stdout.count(label) == 1 and content["about"]["label"] == label
    (result,) = content["records"]
    assert result["card"] == "H100" and result["rates"].startswith("assumed")
    fwd = [x for x in result["kernels"] if x["mode"] == "fwd"]
    assert not any("registers" in x for x in fwd) and sum(x["count"] for x in fwd) == 87  # 7 a block and 3
    for x in fwd:
        assert x["floor_us"] == pytest.approx(max(x["flops"] / 798e6, x["bytes"] / 3000e3))
    attention = next(x for x in fwd if x["kernel"] == "attention_fwd")
    assert attention["bytes"] == 4 * 2 * 17 * 192 * 2 and attention["flops"] == 4 * 2 * 17 * 17 * 192


def test_predictions_of_the_whole(done):
    process, content, _ = done
    (result,) = content["records"]
    assert "prediction, not measured" in process.stdout
    found = {(x["mode"], x["provider"]): x for x in result["models"]}
    assert found.keys() == {(mode, provider) for mode in ("fwd", "full") for provider in ("ours", "reference")}
    shape = parse("vit_tiny_patch16_224@64/b2")
    for mode in ("fwd", "full"):
        ours, eager = found[mode, "ours"], found[mode, "reference"]
        ms = sum(x["count"] * x["floor_us"] for x in result["kernels"] if x["mode"] == mode) / 1e3
        assert ours["ms"] == pytest.approx(ms) and ours["ms"] < eager["ms"]
        for x in (ours, eager):
            assert x["predicted"] and x["img_s"] == pytest.approx(2e3 / x["ms"])
            floor = bench_vit.BENCHES[0].total(shape, torch.bfloat16)[mode].floor_ms(Ceilings(798.0, 3000.0))
            assert x["sol_fraction"] == pytest.approx(floor / x["ms"])
            peak = memory.count(*memory.factory(x["provider"], shape)(2), mode == "full").peak
            assert x["peak_mem_mb"] == peak / 2**20
            assert f"{x['img_s']:,.0f}" in process.stdout


def test_compiled_figures_are_those_of_the_lock(done):
    if done[2] != "compile" or not LOCK.exists():
        pytest.skip("no ptxas in this build of Triton, or no lock file of this version")
    found = json.loads(done[0].stdout.splitlines()[-1])
    locked = json.loads(LOCK.read_text())["sm_90 bf16 norm_b _layer_norm_fwd_kernel no_grad"]
    assert {k: found[k] for k in FIGURES} == {k: locked[k] for k in FIGURES} and found["tile"] == "4x1024 w4 s1"
    per_warp = -(-locked["registers"] // 8) * 8 * 32
    assert found["warps_per_sm"] == 65_536 // per_warp // 4 * 4
    assert found["programs"] == 64 * 197 / 4 and found["waves"] == pytest.approx(3152 / 132 / found["blocks_per_sm"])
