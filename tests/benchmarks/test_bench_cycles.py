"""`make cycles`: samples, published times and tables. Then real kernels, and predictions beside published rates."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from test_bench_sm import steps_of

import benchmarks
from benchmarks import bench_vit
from benchmarks import walk as path
from benchmarks.harness import Ceilings
from benchmarks.shapes import parse
from benchmarks.trace import Launch

ROOT = Path(__file__).parents[2]


# ---- the command, with a mock of the compiler ------------------------------------------------------------------------


@pytest.fixture
def cycles(monkeypatch):
    """The module, with a mock of `benchmarks.compiled`, which cannot be imported where kernels are interpreted."""
    monkeypatch.setitem(sys.modules, "benchmarks.compiled", SimpleNamespace())
    monkeypatch.setattr(benchmarks, "compiled", SimpleNamespace(), raising=False)
    for name in ("roofline", "cycles"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
        monkeypatch.delattr(benchmarks, name, raising=False)
    yield importlib.import_module("benchmarks.cycles")
    for name in ("roofline", "cycles"):
        sys.modules.pop(f"benchmarks.{name}", None)
        vars(benchmarks).pop(name, None)


def test_samples_have_every_role(cycles):
    assert cycles.sample(1, 8) == [0] and sorted(cycles.sample(5, 8)) == [0, 1, 2, 3, 4]
    for programs, roles in ((12_288, 8), (24_576, 8), (6144, 2), (9456, 4)):
        chosen = cycles.sample(programs, 8)
        assert len(set(chosen)) == 8 and max(chosen) < programs
        assert max(b - a for a, b in itertools.pairwise([*sorted(chosen), programs])) < programs / 4
        assert {sum(x % roles == role for x in chosen) for role in range(roles)} == {8 // roles}


def test_what_memory_serves(cycles):
    """100 such programs load 6,000 and 200 bytes from tensors of 3,000 and 400 bytes."""
    launch = path.Constants({}, {1: 3000, 2: 400}, {})
    text = "LDG.E R1, [R2.64]\nSTG.E [R2.64], R1"
    one = [steps_of(text, LDG={"bytes": 80, "tensor": 1}, STG={"bytes": 9, "tensor": 1})]
    two = [steps_of(text, LDG={"bytes": 40, "tensor": 1}), steps_of(text, LDG={"bytes": 4, "tensor": 2})]
    assert cycles.from_memory([one, two], launch, 100) == {1: 0.5, 2: 1.0}


def test_published_times(cycles):
    rates = Ceilings(tflops=800.0, gbps=1000.0)

    def us(name, flops, bytes, *shapes, phase="fwd"):
        return cycles.published(Launch(name, phase, flops, bytes, shapes), rates)

    assert us("add", 0, 9e6) == pytest.approx(10) and us("sum", 0, 9e6) == pytest.approx(12) and us("sum", 0, 9) == 2.5
    assert us("addmm", 8e9, 10, (9000, 768), (768, 3072)) == pytest.approx(10 / 0.88)
    assert us("mm", 8e9, 10, (9000, 3072), (3072, 768)) == pytest.approx(10 / 0.95)
    assert us("mm", 8e9, 10, (768, 9000), (9000, 3072)) == pytest.approx(10 / 0.90)
    assert us("addmm", 8e9, 10, (256, 768), (768, 1000)) == pytest.approx(10 / 0.88)
    assert us("mm", 8e9, 90e6, (768, 9000), (9000, 3072)) == pytest.approx(100)  # bound by bytes
    heads = (2, 3, 64, 64)
    assert (
        us("_flash_attention", 271e6, 10, heads) == pytest.approx(4)
        and us("_flash_attention", 271e6, 10, (2, 3, 128, 64)) == 2.5
    )
    assert us("_flash_attention", 215e6, 10, heads, phase="bwd") == pytest.approx(4)


def line(kernel, us, count=1, provider="ours", **more):
    about = {"mode": "fwd", "provider": provider, "kernel": kernel, "phase": "fwd", "count": count}
    return about | {"tile": "", "floor_us": us / 2, "us": us} | more


def test_tables(cycles):
    ours = {
        "tile": "64x32",
        "registers": 99,
        "blocks_per_sm": 3,
        "executed": 700.0,
        "pipes": {"fma": 300.0, "mufu": 5.0},
    }
    ours |= {"loops": "390x7", "clocks": 1234.0, "range": [90.0, 110.0]}
    kernels = [
        line("mine", 100.0, 2, **ours, busy={"issue": 0.5, "alu": 0.59}),
        line("other", 50.0, **ours | {"range": [50.0, 50.0]}, busy={"issue": 0.5, "alu": 0.6}),
        line("addmm", 800.0), line("sum", 2.5, 2),
        line("wrong", 1.0, tile="4x4", error="does not compile: no"),
    ]  # fmt: skip
    models = [
        {
            "mode": "fwd",
            "provider": provider,
            "ms": ms,
            "range": [ms - 1, ms + 1],
            "img_s": 1e3 / ms,
            "sol_fraction": 0.5,
        }
        for provider, ms in (("ours", 2.0), ("reference", 3.0))
    ]
    about = {"shape": "s/b1", "arch": 90, "card": "H100", "rates": "assumed"}
    said = cycles.show(about | {"kernels": kernels, "models": models})
    assert said.count("MODEL of executed SASS and published rates, not a measurement") == 1
    rows = {text.split()[1]: text.split()[2:] for text in said.splitlines() if text.startswith("fwd ")}
    counts = ["64x32", "99", "3", "390x7", "700", "300", "0", "0", "5", "0", "1234"]
    assert rows["mine"] == ["2", *counts, "latency", "(alu", "59%)", "100.0", "90-110", "50.0", "50%"]
    assert rows["other"] == ["1", *counts, "alu", "60%", "50.0", "50-50", "25.0", "50%"]
    assert rows["addmm"] == ["1", "published", "800.0", "400.0", "50%"] and "sum" not in rows
    assert rows["wrong"][:3] == ["1", "4x4", "error"] and "wrong: does not compile: no" in said
    assert "2 smaller operations, 5 us together" in said
    totals = [text.split()[-5:] for text in said.splitlines() if text.startswith(("ours, ", "eager, "))]
    assert totals == [["500", "50%", "1.50x", "2.00", "1.00-3.00"], ["333", "50%", "1.00x", "3.00", "2.00-4.00"]]


def test_sums_of_a_model(cycles, monkeypatch):
    """A block is 4 kernels of ours and 3 products, or 10 operations of eager PyTorch. The rest is 4, or 5."""

    def timed(launch, count, arch, known):
        us = {"us": 10.0, "range": [8.0, 14.0]} if launch.kernel else {"us": 3.0}
        return {"kernel": launch.name, "phase": launch.phase, "count": count, "tile": "", "floor_us": 1.0} | us

    monkeypatch.setattr(cycles, "timed", timed)
    shape = parse("vit_tiny_patch16_224@64/b2")
    result = cycles.analyse(shape, 90, None)
    ours, eager = (
        next(x for x in result["models"] if (x["mode"], x["provider"]) == ("fwd", p)) for p in ("ours", "reference")
    )
    assert ours["ms"] == pytest.approx((50 * 10 + 39 * 3) / 1e3) and ours["img_s"] == pytest.approx(2e3 / ours["ms"])
    assert ours["range"] == pytest.approx([(50 * us + 39 * 3) / 1e3 for us in (8, 14)])
    assert eager["ms"] == eager["range"][0] == pytest.approx((12 * 10 + 5) * 3 / 1e3)
    floor = bench_vit.BENCHES[0].total(shape, torch.bfloat16)["fwd"].floor_ms(Ceilings(798.0, 3000.0))
    assert ours["sol_fraction"] == pytest.approx(floor / ours["ms"])
    one = cycles.analyse(shape, 90, "attention")
    assert not one["models"] and {x["kernel"] for x in one["kernels"]} == {
        "_attention_fwd_kernel",
        "_attention_delta_kernel",
        "_attention_bwd_kernel",
    }
    with pytest.raises(ValueError, match=r"no kernel of .* has 'nope' in its name"):
        cycles.analyse(shape, 90, "nope")


def test_a_kernel_without_a_time_is_an_error(cycles, monkeypatch, tmp_path, capsys):
    """Its line says why, and the command fails. The same kernel is simulated only once."""
    asked = []

    def predict(launch, blocks, machine):
        asked.append((launch.name, blocks))
        if launch.name == "bad":
            raise ValueError("the jump")
        return {"us": 2.0}

    fits = {"tile": "", "registers": 1, "shared": 2, "programs": 3, "blocks_per_sm": 4}
    about = {"kernel": "k", "phase": "fwd", "count": 1, "bytes": 1, "flops": 2, "floor_us": 1.0}
    found = {"bad": about | fits | {"kernel": "bad"}, "big": about | {"tile": "", "error": "does not fit"}}
    monkeypatch.setattr(cycles, "predict", predict)
    monkeypatch.setattr(cycles.roofline, "line", lambda launch, *_, **__: found.get(launch.name, about | fits))
    known = {}
    for name, want in (
        ("k", {"us": 2.0}),
        ("k", {"us": 2.0}),
        ("bad", {"error": "the jump"}),
        ("big", {"error": "does not fit"}),
    ):
        line = cycles.timed(Launch(name, "fwd", 2, 1, (), kernel="kernel"), 1, 90, known)
        assert {key: line[key] for key in want} == want
    assert asked == [("k", 4), ("bad", 4)]

    result = {"shape": "s/b1", "arch": 90, "card": "H100", "rates": "assumed", "models": []}
    monkeypatch.setattr(
        cycles, "analyse", lambda *asked: result | {"kernels": [{"mode": "fwd", "provider": "ours", **line}]}
    )
    out = tmp_path / "out.json"
    assert cycles.main(["--out", str(out)]) == 1 and "k: does not fit" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["records"][0]["kernels"][0]["error"] == "does not fit" and "MODEL" in content["about"]["label"]


# ---- real kernels, in a process that compiles ------------------------------------------------------------------------

SCRIPT = """
import dataclasses, json, math, sys
from benchmarks import cycles, roofline, sass, walk
import torch
from benchmarks import compiled
from benchmarks.sm import machine
from benchmarks.trace import recording, trace
from vit import kernels
from vit.kernels import configs
from vit.kernels.dry_run import dry_run
from vit.kernels.linear import gemm

def empty(*shape, grad=False):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=grad)

def launches(function, *inputs, train=False):
    return [x for x in trace(function, *inputs, train=train) if x.kernel is not None]

def product(a, b, bias, activation=None):
    with recording(90) as recorded:
        gemm(a, b, bias, activation, trans_b=True)
    return [x for x in recorded if x.kernel is not None]

def moved(launch):
    result = compiled.compile_kernel(launch.kernel, launch.grid, launch.args, launch.options)
    code, given = sass.disassemble(result.asm["cubin"]), walk.constants(launch, result)
    names = [n for n, x in launch.args.items() if hasattr(getattr(x, "base", x), "data_ptr")]
    found, trips = {}, set()
    for number in range(math.prod(launch.grid)):
        for warp in range(0, launch.options["num_warps"], 4):
            steps = walk.walk(code, given, number, warp)
            trips.add(max([n for _, n in walk.loops(steps).values()], default=1))
            for step in (x for x in steps if x.bytes):
                kind = "store" if step.instruction.base in ("STG", "UTMASTG") else "load"
                name = f"{kind} {names[step.tensor - 1]}"
                found[name] = found.get(name, 0) + step.bytes
    return {"moved": found, "trips": sorted(trips), "tiles": math.ceil(197 / launch.args.get("BLOCK_M", 1))}

def predicted(kind, size):
    target = machine(90)
    if kind == "attention":
        configs.attention_fwd = lambda *a, **k: configs.Config(128, 64, num_warps=4, num_stages=3)
        (launch,) = launches(kernels.attention_qkvpacked, empty(16_384 // size, size, 3, 32, 64))
    else:
        configs.gemm = lambda *a, **k: configs.Config(128, 256, 64, 8, 8, 3, split=2)
        (launch,) = product(empty(8192, size), empty(8192, size), empty(8192))
        target = dataclasses.replace(target, tflops=665.0)  # what cuBLAS reached on that card
    line = roofline.line(launch, 1, 90, roofline.ceilings(roofline.DEVICES[90])[0], True)
    return launch.flops / cycles.predict(launch, line["blocks_per_sm"], target)["us"] / 1e6

norm = launches(kernels.layer_norm, empty(10, 768), empty(768), empty(768))
attention = launches(kernels.attention_qkvpacked, empty(1, 197, 3, 1, 64, grad=True), train=True)
mlp = product(empty(300, 200), empty(144, 200), empty(144), "gelu")
with dry_run(90):
    exact = [{"kernel": x.kernel.__name__, **moved(x)} for x in norm + attention + mlp]
    print(json.dumps([exact, [[*point, predicted(*point)] for point in json.loads(sys.argv[1])]]))
"""
PUBLISHED = {  # TFLOP/s of an H100. Attention: Triton's bars in FlashAttention-3's paper; gemm: Triton's Gluon tutorial
    ("attention", 512): 340, ("attention", 1024): 382, ("attention", 2048): 396,
    ("gemm", 512): 492, ("gemm", 1024): 554, ("gemm", 2048): 574, ("gemm", 8192): 629,
}  # fmt: skip


pytestmark = pytest.mark.xdist_group("cycles")  # one worker makes what they share


@pytest.fixture(scope="module")
def real():
    try:
        triton.knobs.nvidia.ptxas, triton.knobs.nvidia.nvdisasm  # noqa: B018 - looks for the binaries
    except RuntimeError:
        pytest.skip("no ptxas or no nvdisasm in this build of Triton")
    points = [*PUBLISHED]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(points)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ci
def test_real_kernels_move_what_they_must(real):
    """All programs of a launch together store each output once, also for ragged sizes."""
    norm, attention, *backward, product = real[0]
    head = 197 * 64 * 2
    assert norm["kernel"] == "_layer_norm_fwd_kernel" and norm["trips"] == [1]
    assert norm["moved"]["store y_ptr"] == norm["moved"]["load x_ptr"] == 10 * 768 * 2
    assert attention["moved"]["store o_ptr"] == attention["moved"]["load q_ptr"] == head
    for name in ("k_ptr", "v_ptr"):  # once for each tile of queries
        assert attention["moved"][f"load {name}"] == attention["tiles"] * head
    stored = {
        name: n
        for x in backward
        for name, n in x["moved"].items()
        if name.startswith(("store dq", "store dk", "store dv"))
    }
    assert stored == dict.fromkeys(("store dq_ptr", "store dk_ptr", "store dv_ptr"), head)
    assert product["kernel"] == "_gemm_kernel" and product["moved"]["store out_ptr"] == 300 * 144 * 2
    assert product["trips"] == [4]  # 200 in steps of 64


@pytest.mark.ci
def test_the_model_is_near_what_is_published(real):
    for kind, size, tflops in real[1]:
        want = PUBLISHED[kind, size]
        assert 0.8 < tflops / want < 1.25, f"{kind} {size}: {tflops:.0f} TFLOP/s, published {want}"
