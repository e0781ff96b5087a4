"""`make roofline` in a separate process, because the process of the tests may interpret kernels."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

import benchmarks
from benchmarks import bench_vit, memory
from benchmarks.harness import Ceilings
from benchmarks.shapes import parse
from benchmarks.trace import Launch

ROOT = Path(__file__).parents[2]
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


pytestmark = pytest.mark.xdist_group("roofline")  # one worker makes what they share


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(the process, the content of its file, the mode)."""
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
    assert not any("registers" in x for x in fwd) and sum(x["count"] for x in fwd) == 89  # 7 per block, and 5
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


# ---- the parts, in this process, with a mock of the compiler ---------------------------------------------------------


@pytest.fixture
def roofline(monkeypatch):
    """The module, with a mock of `benchmarks.compiled`, which cannot be imported where kernels are interpreted."""
    stand_in = SimpleNamespace(compile_kernel=lambda *args: stand_in.result, figures=lambda result: result)
    monkeypatch.setitem(sys.modules, "benchmarks.compiled", stand_in)
    monkeypatch.setattr(benchmarks, "compiled", stand_in, raising=False)
    monkeypatch.delitem(sys.modules, "benchmarks.roofline", raising=False)
    monkeypatch.delattr(benchmarks, "roofline", raising=False)
    module = importlib.import_module("benchmarks.roofline")
    module.stand_in = stand_in
    yield module
    sys.modules.pop("benchmarks.roofline", None)
    vars(benchmarks).pop("roofline", None)


def launch(name="_gemm_kernel", phase="fwd", grid=(3, 44), flops=4, args=None, **options):
    args = {"BLOCK_M": 128, "x_ptr": 0, "BLOCK_N": 64} | (args or {})
    return Launch(
        name, phase, flops, 3000, ((2, 3), (4, 5), (6, 7)), grid, "kernel", args, {"num_warps": 4, "num_stages": 3}
    )


def test_labels_and_tiles(roofline):
    assert roofline.label(launch()) == "gemm" and roofline.tile(launch()) == "128x64 w4 s3"
    for args, name in (
        ({"ACTIVATION": "gelu", "preact_ptr": None}, "gemm gelu"),
        ({"ACTIVATION": "gelu", "preact_ptr": 1}, "gemm dgelu"),
        ({"ACTIVATION": None, "preact_ptr": 1}, "gemm"),
        ({"branch_ptr": 1}, "gemm + residual"),
        ({"branch_ptr": None}, "gemm"),
    ):
        assert roofline.label(launch(args=args)) == name
    theirs = Launch("addmm", "fwd", 1, 2, ((2, 3), (4, 5), (6, 7)))
    assert roofline.label(theirs) == "addmm 2x3 4x5" and roofline.tile(theirs) == ""
    assert roofline.label(Launch("sum", "fwd", 0, 2, ())) == "sum"


def test_launches_that_differ_in_anything_are_lines_of_their_own(roofline):
    """Kinds are in the order of their first launch, with their counts."""
    a, b, c, d, e = launch(), launch(phase="bwd"), launch(grid=(1,)), launch(flops=5), launch(args={"BLOCK_N": 32})
    assert roofline.alike([c, a, b, a, d, e, c, a]) == [(c, 2), (a, 3), (b, 1), (d, 1), (e, 1)]


def test_a_line_by_hand(roofline):
    """33 registers are rounded to 40 per thread. So 51 warps fit, in fours 48, or 12 programs of 4 warps."""
    rates = Ceilings(tflops=1.0, gbps=1000.0)
    roofline.stand_in.result = {"registers": 33, "spill": 8, "shared": 0, "warps": 4}
    found = roofline.line(launch(flops=7000, grid=(44, 3, 18)), 5, 90, rates, True)
    assert found["count"] == 5 and found["floor_us"] == pytest.approx(0.007) and found["kernel"] == "gemm"
    assert (found["bytes"], found["flops"], found["phase"], found["tile"]) == (3000, 7000, "fwd", "128x64 w4 s3")
    assert (found["registers"], found["spill"], found["shared"]) == (33, 8, 0)
    assert (found["blocks_per_sm"], found["warps_per_sm"], found["programs"]) == (12, 48, 44 * 3 * 18)
    assert found["waves"] == pytest.approx(2376 / (132 * 12)) and found["last_wave"] == pytest.approx(0.5)
    assert roofline.line(launch(), 1, 90, rates, True)["floor_us"] == pytest.approx(0.003)  # bound by bytes
    assert "registers" not in roofline.line(launch(), 1, 90, rates, False)
    assert "registers" not in roofline.line(Launch("addmm", "fwd", 1, 2, ()), 1, 90, rates, True)
    roofline.stand_in.result = {"registers": 32, "spill": 0, "shared": 233_000, "warps": 4}
    found = roofline.line(launch(), 1, 90, rates, True)
    assert found["error"] == "does not fit on a multiprocessor" and "waves" not in found and found["shared"] == 233_000
    roofline.stand_in.result = ValueError("why " * 200)
    found = roofline.line(launch(), 1, 90, rates, True)
    assert found["error"].startswith("does not compile: ") and len(found["error"]) == 300 + len("does not compile: ")


def entry(mode, kernel, us, count=1, tile="", **more):
    about = {"phase": "fwd", "bytes": 2e6, "flops": 3e9, "floor_us": us, "tile": tile}
    return {"mode": mode, "kernel": kernel, "count": count} | about | more


def result(**more):
    whole = {"img_s": 1234.5, "sol_fraction": 0.5, "peak_mem_mb": 2048.0, "predicted": True}
    models = [
        {"mode": m, "provider": p, "ms": ms} | whole
        for m, p, ms in (
            ("fwd", "ours", 2.0),
            ("fwd", "reference", 3.0),
            ("full", "ours", 8.0),
            ("full", "reference", 10.0),
        )
    ]
    about = {"shape": "s/b2", "arch": 90, "card": "H100", "rates": "assumed", "tflops": 798.0, "gbps": 3000.0}
    return about | {"kernels": [], "models": models} | more


def test_small_operations_share_a_line_and_ours_beside_eager(roofline):
    """An operation is small if all its launches take less than 0.5 % of the time. Our kernels always have a line."""
    fit = {"registers": 9, "spill": 8, "shared": 7, "blocks_per_sm": 6, "warps_per_sm": 5}
    fit |= {"waves": 1.25, "last_wave": 0.25}
    kernels = [
        entry("fwd", "big", 990.0), entry("fwd", "small", 1.0, 4), entry("fwd", "other", 1.0),
        entry("fwd", "six", 1.0, 6),
        entry("fwd", "ours", 1.0, tile="4x4", **fit),
        entry("full", "wrong", 1.0, error="does not compile: no"),
    ]  # fmt: skip
    said = roofline.show(result(kernels=kernels))
    forward, full = said.split("forward + backward\n", 1)
    assert "5 smaller operations, 5.0 us together" in forward and "smaller operations" not in full
    names = [line.split()[1] for line in forward.splitlines() if line.startswith("fwd ")]
    assert names == ["big", "six", "ours"] and "wrong: does not compile: no" in full
    (row,) = [line.split() for line in forward.splitlines() if line.startswith("fwd ours")]
    assert row[2:] == ["1", "2.0", "3.0", "1.0", "4x4", "9", "8", "7", "6", "5", "1.25", "(last", "25%)"]
    rows = [line.split()[-5:] for line in full.splitlines() if line.startswith(("ours, ", "eager, "))]
    assert rows == [
        ["1,234", "50%", f"{ratio:.2f}x", f"{ms:.2f}", "2.00"] for ratio, ms in ((1.5, 2), (1, 3), (1.25, 8), (1, 10))
    ]
    assert [line.split(",")[0] for line in full.splitlines()[-4:]] == ["ours", "eager"] * 2


@pytest.mark.parametrize("error", [None, 0, 1])
def test_the_command_asks_for_every_shape_on_every_card(error, roofline, monkeypatch, tmp_path, capsys):
    asked = []

    def analyses(tasks, compiles):
        asked.append(([(str(shape), arch) for shape, arch in tasks], compiles))
        for i in range(2):
            yield result(kernels=[entry("fwd", "x", 1.0, **({"error": "does not compile: no"} if error == i else {}))])

    monkeypatch.setattr(roofline, "analyses", analyses)
    a, b = "vit_base_patch16_224/b2", "vit_base_patch16_224/b3"
    out = tmp_path / "out.json"
    assert roofline.main(["--shape", a, "--shape", b, "--arch", "80,100", "--out", str(out)]) == int(error is not None)
    assert asked == [([(a, 80), (a, 100), (b, 80), (b, 100)], True)]
    assert [r["models"] for r in json.loads(out.read_text())["records"]] == [result()["models"]] * 2
    assert roofline.main(["--shape", a, "--no-compile"]) == int(error is not None)
    assert asked[1] == ([(a, 80), (a, 89), (a, 90), (a, 100)], False)
    said, progress = capsys.readouterr()
    assert said.count("PREDICTION from counted bytes") == 4 and progress.splitlines()[0].startswith("1 of 4, ")
    assert roofline._archs("90,80") == [90, 80]
