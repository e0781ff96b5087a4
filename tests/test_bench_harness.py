"""`make bench`, without a GPU: the counts against independent ones, the gate, and that what is wrong is said."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import peers  # noqa: E402

from benchmarks import bench_layer_norm, bench_vit, harness, plan  # noqa: E402
from benchmarks.gpu_stages.record import Log  # noqa: E402
from benchmarks.harness import Ceilings, Gate, Point, Work, measure, tensors_of  # noqa: E402
from benchmarks.largest_batch import largest  # noqa: E402
from benchmarks.shapes import MODELS, SMALL, Shape, parse  # noqa: E402
from vit import reference  # noqa: E402

CPU = torch.device("cpu")
OPS = {b.op: b for name in plan.SECONDS if name != "vit" for b in plan.benches(name)}
# What the backward of each op reads beside the gradients of its outputs.
READS = {
    "attention": ["qkv"],
    "mlp": ["x", "fc1_weight", "fc1_bias", "fc2_weight"],
    "layer_norm": ["x", "weight"],
    "residual_layer_norm": ["residual", "weight"],  # the stream, which is as large
    "qkv": ["x", "weight"],
    "proj": ["x", "weight"],
    "fc1": ["x", "weight", "bias"],  # for what the GELU saw
    "fc2": ["x", "weight"],
    "patch_embed": ["image", "weight"],
}

# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_flops_are_those_that_pytorch_counts(op):
    """Its counter sees the written-out attention, whose backward does not compute q·k again: one product of five."""
    work, tensors = OPS[op].work(SMALL, 4), tensors_of(OPS[op], SMALL, torch.float32, CPU)
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    with FlopCounterMode(display=False) as forward:
        outs = harness.as_tuple(OPS[op].reference(**leaves))
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(outs, list(leaves.values()), [torch.ones_like(o) for o in outs])
    assert work["fwd"].flops == forward.get_total_flops()
    assert work["bwd"].flops == backward.get_total_flops() * (5 / 4 if op == "attention" else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_bytes_are_those_of_the_tensors(op, dtype):
    """Inputs and outputs once; the backward also what it writes: a gradient for every input, one for a residual add."""
    bench, tensors = OPS[op], tensors_of(OPS[op], SMALL, dtype, CPU)
    outs = harness.as_tuple(bench.reference(**tensors))
    size = {name: t.nbytes for name, t in tensors.items()}
    work = bench.work(SMALL, dtype.itemsize)
    assert work["fwd"].bytes == sum(size.values()) + sum(o.nbytes for o in outs)
    statistics = {"attention": SMALL.heads, "layer_norm": 2, "residual_layer_norm": 2}.get(op, 0) * 4 * SMALL.rows
    output = outs[0].nbytes if op == "attention" else 0
    gradients = sum(size.values()) - (size["branch"] if op == "residual_layer_norm" else 0)
    read = sum(o.nbytes for o in outs) + sum(size[name] for name in READS[op]) + output + statistics
    assert work["bwd"].bytes == read + gradients


# GFLOP an image, and images a second at 798 TFLOP/s: worked out by hand from L(24Nd² + 4N²d) + patches + head.
FIGURES = {
    "S/16": (9.198, 86_760),
    "B/16": (35.13, 22_717),
    "L/16": (123.11, 6_482),
    "B/16@384": (110.97, 7_191),
    "H/14": (334.59, 2_385),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_flops_worked_out_by_hand(name):
    shape, (gflop, images) = MODELS[name], FIGURES[name]
    work = bench_vit.BENCHES[0].total(shape, torch.bfloat16)
    assert work["fwd"].flops / shape.batch / 1e9 == pytest.approx(gflop, rel=2e-4)
    floor_ms = work["fwd"].floor_ms(Ceilings(tflops=798, gbps=3000))
    assert 1e3 * shape.batch / floor_ms == pytest.approx(images, rel=2e-4)
    assert work["full"].flops == 3 * work["fwd"].flops


@pytest.mark.parametrize("name", ["B/16", "H/14"])
def test_models_have_the_flops_that_pytorch_counts(name):
    shape = Shape(MODELS[name].model, 1)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        reference.VisionTransformer(shape.config)(torch.empty(1, 3, *shape.config.img_size))
    assert bench_vit.BENCHES[0].work(shape, 2)["fwd"].flops == counter.get_total_flops()


def test_intensities():
    """FLOP per byte of the large matrices, by hand: qkv 0.75·d, proj d/3, fc2 0.667·d, attention N/2 and 0.625·N."""
    s = Shape("vit_base_patch16_224", 4096)  # many rows, so that the weights hardly count
    intensity = {
        (op, mode): w.flops / w.bytes
        for op in ("qkv", "proj", "fc2", "attention")
        for mode, w in OPS[op].work(s, 2).items()
    }
    assert intensity["qkv", "fwd"] == pytest.approx(0.75 * 768, rel=0.01)
    assert intensity["proj", "fwd"] == pytest.approx(768 / 2, rel=0.01)
    assert intensity["fc2", "fwd"] == pytest.approx(0.8 * 768, rel=0.01)
    assert intensity["attention", "fwd"] == pytest.approx(197 / 2, rel=0.01)
    assert intensity["attention", "bwd"] == pytest.approx(0.625 * 197, rel=0.01)


def test_the_floor_is_the_longer_of_the_two():
    ceilings = Ceilings(tflops=1.0, gbps=1000.0)
    assert Work(2e9, 1e9).floor_ms(ceilings) == 2.0 and Work(1e8, 3e9).floor_ms(ceilings) == 3.0


def test_shapes_are_read_as_they_are_written():
    for shape in (*MODELS.values(), SMALL):
        assert parse(str(shape)) == shape
    for wrong in ("vit_base_patch16_224", "vit_base_patch16_224/b0", "vit_bas_patch16_224/b1", "x/b1/b2"):
        with pytest.raises(ValueError, match=r"shape|unknown model"):
            parse(wrong)
    with pytest.raises(ValueError, match="not a multiple"):
        parse("vit_base_patch16_224@225/b1")


# ---- the gate --------------------------------------------------------------------------------------------------------


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 1.02 * dx


def _absent(x, weight, bias):
    import a_library_that_nobody_has  # noqa: F401


PROVIDERS = {
    "ours": bench_layer_norm.eager,
    "eager": bench_layer_norm.eager,
    "no bias": lambda x, weight, bias: bench_layer_norm.eager(x, weight, 0.99 * bias),
    "other eps": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, 1e-1),
    "wrong gradient": lambda x, weight, bias: bench_layer_norm.eager(_WrongGradient.apply(x), weight, bias),
    "nan": lambda x, weight, bias: bench_layer_norm.eager(x, weight, bias) * float("nan"),
    "other shape": lambda x, weight, bias: bench_layer_norm.eager(x, weight, bias)[:, 1:],
    "two results": lambda x, weight, bias: (bench_layer_norm.eager(x, weight, bias), x.sum()),
    "absent": _absent,
    "no memory": lambda x, weight, bias: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
}
BENCH = dataclasses.replace(bench_layer_norm.BENCHES[0], providers=PROVIDERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_is_wrong_is_not_timed_and_says_so(tmp_path, dtype):
    log = Log(tmp_path / "bench_layer_norm.json", {"gpu": "none"}, rehearse=True)
    measure(Point(BENCH, SMALL, dtype, ("fwd", "full"), tuple(PROVIDERS)), log, Ceilings(1, 10), CPU)
    timed = {(r["provider"], r["mode"]) for r in log.records if "ms_p50" in r}
    assert timed == {(p, m) for p in ("ours", "eager") for m in ("fwd", "full")}
    said = {r["provider"]: r["skipped"] for r in log.records if "skipped" in r}
    assert said.keys() == PROVIDERS.keys() - {"ours", "eager"}
    for name in ("no bias", "other eps", "wrong gradient", "nan"):
        assert said[name].startswith("parity: result") and said[name].endswith("not timed"), said
    assert "not installed" in said["absent"] and said["no memory"].startswith("memory: CUDA out of memory")
    assert all(r["ok"] for r in log.records)
    assert json.loads(log.path.read_text())["records"] == log.records


def test_ours_must_be_right(tmp_path):
    log = Log(tmp_path / "bench_layer_norm.json", {"gpu": "none"})
    bench = dataclasses.replace(BENCH, providers={"ours": PROVIDERS["wrong gradient"]})
    measure(Point(bench, SMALL, torch.float32, ("fwd",), ("ours",)), log, Ceilings(1, 10), CPU)
    assert [r["ok"] for r in log.records] == [False] and "parity" in log.records[0]["error"]
    bench = dataclasses.replace(BENCH, providers={"ours": _absent_op})
    measure(Point(bench, SMALL, torch.float32, ("fwd",), ("ours",)), log, Ceilings(1, 10), CPU)
    assert not log.records[1]["ok"] and "RuntimeError: no such kernel" in log.records[1]["error"]


def _absent_op(x, weight, bias):
    raise RuntimeError("no such kernel")


def test_a_model_with_one_wrong_parameter_is_seen():
    bench = bench_vit.BENCHES[0]
    tensors = tensors_of(bench, SMALL, torch.float32, CPU)
    gate = Gate(bench, SMALL, tensors)
    assert gate.error(bench.run("ours", SMALL, tensors))[1] is None
    wrong = tensors | {"blocks.5.attn.proj.bias": 1.01 * tensors["blocks.5.attn.proj.bias"]}
    assert "parity" in gate.error(bench.run("ours", SMALL, wrong))[1]


def test_the_gate_looks_at_samples_alone():
    """Of a batch of three it judges two images: the third may be anything, and its gradient is left out."""
    bench, shape = bench_vit.BENCHES[0], Shape(SMALL.model, 3, SMALL.img_size)
    tensors = tensors_of(bench, shape, torch.float32, CPU)
    gate = Gate(bench, shape, tensors)
    tensors["image"][2] *= 100
    assert gate.error(bench.run("reference", shape, tensors))[1] is None
    tensors["image"][1] *= 1.01
    assert gate.error(bench.run("reference", shape, tensors))[1] is not None


@pytest.mark.peers
@pytest.mark.parametrize("name", ["timm", "hf", "accelerated"])
def test_models_of_other_libraries_pass_the_gate(name):
    """They have our weights, under their own names and in their own layout."""
    peers.import_transformers() if name == "hf" else peers.import_timm()
    bench = bench_vit.BENCHES[0]
    tensors = tensors_of(bench, SMALL, torch.float32, CPU)
    error, wrong = Gate(bench, SMALL, tensors).error(bench.run(name, SMALL, tensors))
    assert wrong is None and 0 < error < 1e-5


def test_the_example_of_contributing_runs(tmp_path):
    source = (
        (ROOT / "CONTRIBUTING.md").read_text().split("## Add a benchmark")[1].split("```")[1].removeprefix("python")
    )
    assert len(source.splitlines()) < 40
    exec(source, found := {})
    (bench,) = found["BENCHES"]
    log = Log(tmp_path / "bench_q_norm.json", {"gpu": "none"}, rehearse=True)
    measure(Point(bench, SMALL, torch.float32, providers=("ours", "eager")), log, Ceilings(1, 10), CPU)
    assert {(r["provider"], r["mode"]) for r in log.records if "ms_p50" in r} == {
        (p, m) for p in ("ours", "eager") for m in harness.MODES
    }
    tensors = tensors_of(bench, SMALL, torch.float32, CPU)
    x, small = tensors["x"].nbytes, tensors["weight"].nbytes
    statistics = 2 * 4 * SMALL.rows * SMALL.heads
    assert bench.work(SMALL, 4) == {
        "fwd": Work(0, 2 * x + 2 * small), "bwd": Work(0, 3 * x + 3 * small + statistics),
    }  # fmt: skip


# ---- timing and the plan ---------------------------------------------------------------------------------------------


def test_providers_take_turns():
    order = []
    times = harness.milliseconds({name: lambda name=name: order.append(name) for name in "abc"}, CPU, rounds=3)
    assert "".join(order) == "abcabcabc" and [len(t) for t in times.values()] == [3, 3, 3]
    assert harness.percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"ms_p20": 2.0, "ms_p50": 3.5, "ms_p80": 5.0}


def test_modes_compute_what_they_say():
    calls = {"fwd": 0, "bwd": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls["fwd"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            calls["bwd"] += 1
            return dx

    x = torch.randn(3, requires_grad=True)
    run = harness.Run(lambda: Count.apply(x), [x], [x])
    for mode, expected in (("fwd", (1, 0)), ("bwd", (0, 1)), ("full", (1, 1))):
        fn = harness.mode_of(run, lambda outs: [torch.ones_like(o) for o in outs], mode)
        calls.update(fwd=0, bwd=0)
        fn()
        assert (calls["fwd"], calls["bwd"]) == expected
        fn()


def test_the_most_wanted_comes_first():
    first = next(plan.points("vit", plan.Wanted(), rehearse=False))
    assert str(first.shape) == "vit_base_patch16_224/b256" and {"ours", "reference", "timm", "hf"} <= {*first.providers}
    for name in plan.SECONDS:
        quick = list(plan.points(name, plan.Wanted(quick=True), rehearse=False))
        whole = list(plan.points(name, plan.Wanted(), rehearse=False))
        assert len(quick) < len(whole) and not any("compile-max" in p.providers for p in quick)
        assert {str(p.shape) for p in whole} >= {str(s) for s in MODELS.values()}
        assert all("ours" in p.providers for p in whole)  # whoever is compared is measured beside ours


def test_one_point_can_be_picked():
    wanted = plan.Wanted(ops=("qkv",), shapes=("vit_base_patch16_224/b8",), providers=("cublas",), modes=("bwd",))
    assert wanted.some and list(plan.stages(wanted)) == ["bench_linear"]
    (point,) = plan.points("linear", wanted, rehearse=False)
    assert (point.bench.op, str(point.shape), point.providers, point.modes) == (
        "qkv", "vit_base_patch16_224/b8", ("cublas",), ("bwd",),
    )  # fmt: skip
    for wrong in ({"ops": ("mpl",)}, {"shapes": ("b8",)}, {"providers": ("hers",)}, {"modes": ("forward",)}):
        with pytest.raises(ValueError, match=r"there are|not understood"):
            plan.stages(plan.Wanted(**wrong))


def test_without_time_the_rest_is_named(tmp_path):
    log = Log(tmp_path / "bench_mlp.json", {"gpu": "none"}, rehearse=True, deadline=0.0)
    plan.run(log, True, "mlp", plan.Wanted())
    assert [r.get("skipped") for r in log.records] == [None, None, "budget"]


@pytest.mark.parametrize("fit", [0, 1, 2, 3, 137, 1000, 65_536])
def test_the_largest_batch_is_found(fit):
    tried = []
    found = largest(lambda batch: tried.append(batch) or batch <= fit, 2**16)
    assert found <= fit <= 1.03 * found + 1 and len(tried) < 25
