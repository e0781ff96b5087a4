"""`make bench`, without a GPU: the counts against independent ones, the gate, and that what is wrong is said."""

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import peers
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_layer_norm, bench_vit, harness, plan
from benchmarks.harness import Ceilings, Gate, Point, Work, measure, tensors_of
from benchmarks.log import Log
from benchmarks.shapes import MODELS, SMALL, Shape, parse
from vit.commands.parity import library

ROOT = Path(__file__).resolve().parent.parent
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


def _no_library(x, weight, bias):
    library("a_library_that_nobody_has")


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
    "no library": _no_library,
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
    assert said["no library"] == "a_library_that_nobody_has is missing; pip install a_library_that_nobody_has"
    assert "not installed" in said["absent"] and said["no memory"].startswith("memory: CUDA out of memory")
    assert all(r["ok"] for r in log.records)
    assert json.loads(log.path.read_text())["records"] == [r | log.about for r in log.records]


def test_ours_must_be_right(tmp_path):
    log = Log(tmp_path / "bench_layer_norm.json", {"gpu": "none"})
    bench = dataclasses.replace(BENCH, providers={"ours": PROVIDERS["wrong gradient"]})
    measure(Point(bench, SMALL, torch.float32, ("fwd",), ("ours",)), log, Ceilings(1, 10), CPU)
    assert [r["ok"] for r in log.records] == [False] and "parity" in log.records[0]["error"]
    bench = dataclasses.replace(BENCH, providers={"ours": lambda **_: 1 / 0})
    measure(Point(bench, SMALL, torch.float32, ("fwd",), ("ours",)), log, Ceilings(1, 10), CPU)
    assert not log.records[1]["ok"] and "ZeroDivisionError" in log.records[1]["error"]


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


# ---- on a GPU, with stand-ins ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for what `harness.ready` asks of CUDA; tensors are on the CPU. Its calls are in ``cuda.mock_calls``."""
    stand_in = MagicMock()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "synchronize", "graph", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    stand_in.graph.return_value.__exit__.return_value = stand_in.stream.return_value.__exit__.return_value = False
    return stand_in


@pytest.mark.parametrize("mode", harness.MODES)
def test_what_a_graph_reads_lives_as_long_as_its_replay(cuda, mode):
    """A replay reads addresses: nobody else may get the memory of what a forward saved, or of a cotangent."""
    alive = []

    class Saves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            saved = x.clone()
            alive.append(weakref.ref(saved))
            ctx.saved = saved
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            return dx * ctx.saved

    def cotangents(outs):
        found = [torch.ones_like(o) for o in outs]
        alive.extend(map(weakref.ref, found))
        return found

    x = torch.randn(3, requires_grad=True)
    replay = harness.ready(harness.Run(lambda: Saves.apply(x), [x], [x]), cotangents, mode, CPU, True)
    gc.collect()
    held = [ref() is not None for ref in alive]
    assert held == {"fwd": [False] * 4, "bwd": [True, True], "full": [False, True] + [False] * 4}[mode]
    order = [name for name, *_ in cuda.mock_calls if name in ("stream", "synchronize", "graph", "set_stream")]
    assert order == ["stream", "synchronize", "graph", "set_stream"]
    assert cuda.graph.call_args.kwargs["stream"] is cuda.Stream()  # on which the forward of "bwd" was, too
    replay()
    cuda.CUDAGraph.return_value.replay.assert_called_once()


def test_a_compiled_model_has_the_attention_of_its_name(monkeypatch):
    """Beside another of the same class: one that was traced for the other would be used for both."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs
    from torch.nn.attention import SDPBackend

    monkeypatch.setattr(bench_vit.SDPBackend, "CUDNN_ATTENTION", SDPBackend.MATH)  # which a CPU has
    backend, compiler = AotEagerAndRecordGraphs(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiler(model, backend=backend))
    bench, shape = bench_vit.BENCHES[0], Shape(SMALL.model, 1, 32)
    vars(shape)["config"] = dataclasses.replace(shape.config, depth=1)
    tensors = tensors_of(bench, shape, torch.float32, CPU)
    for mode in ("fwd", "full"):
        for name in ("compile", "compile-cudnn", "compile"):
            run = bench.run(name, shape, tensors)
            harness.mode_of(run, lambda outs: [torch.ones_like(o) for o in outs], mode)()
    torch._dynamo.reset()
    assert ["flash" in graph.code for graph in backend.fw_graphs] == [True, False] * 2


def test_an_error_ends_its_point_alone(tmp_path):
    """Triton's own errors are no RuntimeErrors, and some show only without gradients, behind the gate."""

    def ours(x, weight, bias):
        if not torch.is_grad_enabled():
            raise Exception("out of resource: shared memory")
        return bench_layer_norm.eager(x, weight, bias)

    def no_inputs(shape, rand):
        raise Exception("no such input")

    log = Log(tmp_path / "bench_layer_norm.json", {"gpu": "none"})
    bench = dataclasses.replace(BENCH, providers={"ours": ours, "eager": bench_layer_norm.eager})
    measure(Point(bench, SMALL, torch.float32, ("fwd", "bwd"), ("ours", "eager")), log, Ceilings(1, 10), CPU)
    found = {(r["provider"], r["mode"]): r.get("error") for r in log.records}
    assert found.keys() == {(p, m) for p in ("ours", "eager") for m in ("fwd", "bwd")}
    assert "shared memory" in found["ours", "fwd"] and not any(v for k, v in found.items() if k != ("ours", "fwd"))
    measure(Point(dataclasses.replace(bench, inputs=no_inputs), SMALL), log, Ceilings(1, 10), CPU)
    assert not log.records[-1]["ok"] and "no such input" in log.records[-1]["error"]


def test_without_gradients_to_check_none_are_asked_for():
    """A compiled model would be compiled once more, for gradients that nobody wants."""
    bench = bench_vit.BENCHES[1]
    tensors = tensors_of(bench, SMALL, torch.float32, CPU)
    asked = []
    run = harness.Run(lambda: asked.append(torch.is_grad_enabled()) or torch.ones(1, 1000), [], [])
    Gate(bench, SMALL, tensors).error(run)
    assert asked == [False]


def test_what_was_compiled_is_forgotten_behind_its_point(tmp_path, monkeypatch):
    """Its CUDA graphs keep their memory, and the points behind it would count as recompilations."""
    told = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: told.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda fn, **_: told.append("compile") or fn)
    log = Log(tmp_path / "bench_layer_norm.json", {"gpu": "none"})
    for providers in (("ours",), ("compile", "compile-max")):
        measure(Point(BENCH, SMALL, torch.float32, ("fwd",), providers), log, Ceilings(1, 10), CPU)
    assert told == ["compile", "compile", "reset"]  # and not between them: the first would be compiled twice


def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda):
    """PyTorch's own context does not, where its end raises; the launches are timed on the stream of the events."""

    def fails():
        if cuda.graph.called:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        harness.ready(harness.Run(fails, [], []), lambda outs: [], "fwd", CPU, True)
    cuda.set_stream.assert_called_once_with(cuda.current_stream())
