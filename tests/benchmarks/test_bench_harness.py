"""`make bench` without a GPU: counts, the gate, and messages for what is wrong."""

import dataclasses
import gc
import json
import time
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import peers
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_layer_norm, bench_vit, harness, plan
from benchmarks import log as record
from benchmarks.harness import Ceilings, Gate, Point, Work, measure, tensors_of
from benchmarks.log import Log
from benchmarks.shapes import MODELS, SMALL, Shape, parse
from vit.commands.parity import CannotStart, library

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
OPS = {b.op: b for name in plan.SECONDS if name != "vit" for b in plan.benches(name)}
# Tensors that the backward of each op reads besides the gradients of its outputs.
READS = {
    "attention": ["qkv"],
    "mlp": ["x", "fc1_weight", "fc1_bias", "fc2_weight"],
    "layer_norm": ["x", "weight"],
    "residual_layer_norm": ["residual", "weight"],  # for the stream, of the same size
    "qkv": ["x", "weight"],
    "proj": ["x", "weight"],
    "fc1": ["x", "weight", "bias"],  # for the pre-activation
    "fc2": ["x", "weight"],
    "patch_embed": ["image", "weight"],
}

# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_flops_are_those_that_pytorch_counts(op):
    """Eager attention does not recompute q·k in the backward, so it has four products instead of five."""
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
    """The forward moves inputs and outputs. The backward writes one gradient per input, but one for a residual add."""
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


# GFLOP per image, and images/s at 798 TFLOP/s, by hand: L(24Nd² + 4N²d) + patches + head, less (N − 1)(20d² + 4Nd) for
# the last block, which computes the class token alone.
FIGURES = {
    "S/16": (8.560, 93_219),
    "B/16": (32.697, 24_406),
    "L/16": (118.84, 6_715),
    "B/16@384": (103.153, 7_736),
    "H/14": (325.86, 2_449),
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
    """The gate judges two images of a batch of three, and ignores the third and its gradient."""
    bench, shape = bench_vit.BENCHES[0], Shape(SMALL.model, 3, SMALL.img_size)
    tensors = tensors_of(bench, shape, torch.float32, CPU)
    gate = Gate(bench, shape, tensors)
    tensors["image"][2] *= 100
    assert gate.error(bench.run("reference", shape, tensors))[1] is None
    tensors["image"][1] *= 1.01
    assert gate.error(bench.run("reference", shape, tensors))[1] is not None


@pytest.mark.peers
@pytest.mark.parametrize("name", ["timm", "hf", "accelerated", "accelerated-hf"])
def test_models_of_other_libraries_pass_the_gate(name):
    """They have our weights, in their names and layout."""
    peers.import_transformers() if "hf" in name else peers.import_timm()
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


# ---- on a GPU, with mocks --------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """Mocks the CUDA functions of `harness.ready`. Tensors are on the CPU. ``cuda.mock_calls`` has the calls."""
    stand_in = MagicMock()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "synchronize", "graph", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(stand_in, name))
    stand_in.graph.return_value.__exit__.return_value = stand_in.stream.return_value.__exit__.return_value = False
    return stand_in


@pytest.mark.parametrize("mode", harness.MODES)
def test_what_a_graph_reads_lives_as_long_as_its_replay(cuda, mode):
    """A replay reads addresses, so the memory of saved tensors and cotangents must not be reused."""
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
    assert cuda.graph.call_args.kwargs["stream"] is cuda.Stream()  # also the stream of the forward of "bwd"
    replay()
    cuda.CUDAGraph.return_value.replay.assert_called_once()


def test_a_compiled_model_has_the_attention_of_its_name(monkeypatch):
    """torch.compile must not use the graph of one model for another model of the same class."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs
    from torch.nn.attention import SDPBackend

    monkeypatch.setattr(bench_vit.SDPBackend, "CUDNN_ATTENTION", SDPBackend.MATH)  # exists on a CPU
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
    """Triton's own errors are no RuntimeErrors. Some occur only without gradients, after the gate."""

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
    """Otherwise a compiled model is compiled once more, for unused gradients."""
    bench = bench_vit.BENCHES[1]
    tensors = tensors_of(bench, SMALL, torch.float32, CPU)
    asked = []
    run = harness.Run(lambda: asked.append(torch.is_grad_enabled()) or torch.ones(1, 1000), [], [])
    Gate(bench, SMALL, tensors).error(run)
    assert asked == [False]


def test_what_was_compiled_is_forgotten_behind_its_point(tmp_path, monkeypatch):
    """Otherwise its CUDA graphs keep their memory, and later points count as recompilations."""
    told = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: told.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda fn, **_: told.append("compile") or fn)
    log = Log(tmp_path / "bench_layer_norm.json", {"gpu": "none"})
    for providers in (("ours",), ("compile", "compile-max")):
        measure(Point(BENCH, SMALL, torch.float32, ("fwd",), providers), log, Ceilings(1, 10), CPU)
    assert told == ["compile", "compile", "reset"]  # a reset between them would compile the first twice


def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda):
    """PyTorch's context does not restore the stream if its exit raises. Later launches would be on the wrong one."""

    def fails():
        if cuda.graph.called:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        harness.ready(harness.Run(fails, [], []), lambda outs: [], "fwd", CPU, True)
    cuda.set_stream.assert_called_once_with(cuda.current_stream())


# ---- figures of a record ---------------------------------------------------------------------------------------------


def test_rates_are_those_of_the_time():
    ceilings, work = Ceilings(tflops=100.0, gbps=2000.0), Work(3e12, 8e9)
    assert work.rates(60.0, ceilings) == pytest.approx({"tflops": 50.0, "gbps": 8e9 / 0.06 / 1e9, "sol_fraction": 0.5})
    assert Work(0, 8e9).rates(8.0, ceilings) == pytest.approx({"gbps": 1000.0, "sol_fraction": 0.5})
    assert Work(1, 2) + Work(30, 40) == Work(31, 42)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_the_whole_is_forward_and_backward(op, dtype):
    work, whole = OPS[op].work(SMALL, dtype.itemsize), OPS[op].total(SMALL, dtype)
    assert whole.keys() == {"fwd", "bwd", "full"} and whole["fwd"] == work["fwd"] and whole["bwd"] == work["bwd"]
    assert whole["full"].flops == work["fwd"].flops + work["bwd"].flops
    assert whole["full"].bytes == work["fwd"].bytes + work["bwd"].bytes


def test_percentiles_of_one_time_and_of_unsorted_ones():
    assert harness.percentiles([7.0]) == {"ms_p20": 7.0, "ms_p50": 7.0, "ms_p80": 7.0}
    times = [float(t) for t in (10, 0, 30, 20, 50, 40)]
    assert harness.percentiles(times) == pytest.approx({"ms_p20": 10.0, "ms_p50": 25.0, "ms_p80": 40.0})


def test_times_are_milliseconds():
    (times,) = harness.milliseconds({"a": lambda: time.sleep(0.02)}, CPU, rounds=2).values()
    assert len(times) == 2 and all(20 <= t < 2000 for t in times)


def test_the_cards_own_rates_by_hand(tmp_path, monkeypatch):
    """The product has 256^3 multiply-adds of two FLOPs. The copy reads and writes 2^20 numbers of four bytes."""
    ms, asked = {"matmul": 0.5, "copy": 2.0}, []

    def milliseconds(fns, device, **how):
        results = {name: fn() for name, fn in fns.items()}
        asked.append((results["matmul"].shape, results["matmul"].dtype, results["copy"].nbytes))
        return {name: [ms[name]] for name in fns}

    monkeypatch.setattr(harness, "milliseconds", milliseconds)
    log = Log(tmp_path / "x.json", {"gpu": "none"})
    found = harness.measure_ceilings(log, CPU, torch.bfloat16)
    assert asked == [((256, 256), torch.bfloat16, 2**22)]
    assert found == Ceilings(pytest.approx(2 * 256**3 / 0.5e-3 / 1e12), pytest.approx(2 * 2**22 / 2e-3 / 1e9))
    matmul, copy = log.records
    assert (matmul["op"], matmul["tflops"], matmul["dtype"], matmul["ms_p50"]) == (
        "matmul",
        found.tflops,
        "bfloat16",
        0.5,
    )
    assert (copy["op"], copy["gbps"], copy["ms_p50"]) == ("copy", found.gbps, 2.0)
    assert {r["bench"] for r in log.records} == {"ceiling"} and log.ok and "gbps" not in matmul and "tflops" not in copy


def test_records_of_a_point_by_hand(tmp_path, monkeypatch):
    """Records are in order of mode, then provider. Each provider has its own error. Only models have img_s."""
    monkeypatch.setattr(
        harness, "milliseconds", lambda fns, device, **_: {name: [2.0 + i] for i, name in enumerate(fns)}
    )
    log = Log(tmp_path / "x.json", {"gpu": "none"})
    exact = lambda x, weight, bias: bench_layer_norm.eager(x.double(), weight.double(), bias.double()).float()  # noqa: E731
    bench = dataclasses.replace(BENCH, providers={"ours": exact, "eager": bench_layer_norm.eager}, compiles=None)
    measure(Point(bench, SMALL, torch.float32, ("bwd", "fwd")), log, Ceilings(1.0, 10.0), CPU)
    measure(Point(bench_vit.BENCHES[0], SMALL, torch.float32, ("fwd",), ("reference",)), log, Ceilings(1.0, 10.0), CPU)
    *ops, model = log.records
    assert [(r["mode"], r["provider"], r["ms_p50"]) for r in ops] == [
        ("bwd", "ours", 2.0), ("bwd", "eager", 3.0), ("fwd", "ours", 2.0), ("fwd", "eager", 3.0),
    ]  # fmt: skip
    for r in ops:
        work = bench_layer_norm.work(SMALL, 4)[r["mode"]]
        assert r["gbps"] == pytest.approx(work.bytes / r["ms_p50"] / 1e6) and "tflops" not in r and "img_s" not in r
        assert r["sol_fraction"] == pytest.approx(work.bytes / 10e6 / r["ms_p50"]) and r["timed"] == "launches"
        assert (r["bench"], r["op"], r["shape"], r["dtype"]) == ("layer_norm", "layer_norm", str(SMALL), "float32")
    assert ops[0]["error_rms"] == ops[2]["error_rms"] < ops[1]["error_rms"] == ops[3]["error_rms"] < 1e-5
    assert model["img_s"] == pytest.approx(2 / 2e-3) and model["op"] == "vit"
    assert model["tflops"] == pytest.approx(bench_vit.work(SMALL, 4)["fwd"].flops / 2e9)


def test_how_long_is_timed(tmp_path, monkeypatch):
    """Ops are timed three times for 60 ms. Whole models, which are not replayed, are timed twice for 400 ms."""
    asked = []
    monkeypatch.setattr(
        harness, "milliseconds", lambda fns, device, **how: asked.append(how) or {n: [1.0] for n in fns}
    )
    log = Log(tmp_path / "x.json", {"gpu": "none"})
    for replay in (True, False):
        bench = dataclasses.replace(BENCH, replay=replay)
        measure(Point(bench, SMALL, torch.float32, ("fwd",), ("eager",)), log, Ceilings(1, 10), CPU)
    assert asked == [{"rounds": 3, "rep_ms": 60}, {"rounds": 2, "rep_ms": 400}]


# ---- more of the gate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_is_twice_eagers_error_and_a_rounding(dtype):
    """Each result is judged alone, relative to its own size."""
    tensors = tensors_of(BENCH, SMALL, dtype, CPU)
    gate = Gate(BENCH, SMALL, tensors)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-9, torch.float16: 2**-12}[dtype]
    right = gate.right
    assert len(right) == 4 and all(t.dtype is torch.float64 for t in right)  # the output and three gradients
    gate.eager = [0.25 * rounding * (i + 1) for i in range(4)]
    for i in range(4):
        for factor, passes in ((0.98, True), (1.02, False)):
            found = list(right)
            found[i] = right[i] * (1 + factor * (2 * gate.eager[i] + rounding))
            gate.results = lambda run, found=found: found
            error, wrong = gate.error(None)
            assert (wrong is None) is passes and error == pytest.approx(factor * (2 * gate.eager[i] + rounding))
            assert passes or wrong.startswith(f"parity: result {i} has rms error {error:.2e}, eager PyTorch ")


def test_every_sample_has_the_same_cotangent_and_every_output_its_own():
    gate = Gate(BENCH, SMALL, tensors_of(BENCH, SMALL, torch.float32, CPU))
    gate.per_sample.clear()
    few, other = gate.cotangents([torch.empty(2, 3, 4), torch.empty(2, 3, 4, dtype=torch.bfloat16)])
    assert torch.equal(few[0], few[1]) and not torch.allclose(few, other.float(), atol=0.1)
    assert other.dtype is torch.bfloat16 and few.std() > 0.3
    many, _ = gate.cotangents([torch.empty(5, 3, 4), torch.empty(5, 3, 4)])
    assert many.shape == (5, 3, 4) and all(torch.equal(row, few[0]) for row in many)
    many.zero_()  # `Gate.results` does so with the samples that it leaves out
    assert torch.equal(gate.cotangents([torch.empty(1, 3, 4)] * 2)[0][0], few[0])


def test_inputs_are_the_same_every_time_and_rounded_from_fp32():
    bench = OPS["mlp"]
    wide, again, narrow = (tensors_of(bench, SMALL, d, CPU) for d in (torch.float32, torch.float32, torch.bfloat16))
    assert all(torch.equal(t, again[name]) and torch.equal(t.bfloat16(), narrow[name]) for name, t in wide.items())
    assert wide["fc1_weight"].std().item() == pytest.approx(SMALL.width**-0.5, rel=0.05)
    assert not torch.equal(wide["fc1_bias"][: SMALL.width], wide["fc2_bias"])


@pytest.mark.parametrize(
    ("name", "error", "device", "ok", "said"),
    [
        ("ours", RuntimeError("no"), "cpu", False, "RuntimeError: no"),
        ("triton", RuntimeError("no"), "cuda", False, "RuntimeError: no"),
        ("triton", RuntimeError("no"), "cpu", True, "does not run: RuntimeError: no"),
        ("eager", RuntimeError("no"), "cuda", True, "does not run: RuntimeError: no"),
        ("ours", torch.OutOfMemoryError("5 GiB"), "cuda", True, "memory: 5 GiB"),
        ("ours", ImportError("no x"), "cuda", True, "not installed: no x"),
        ("ours", CannotStart("x is missing; pip install x"), "cuda", True, "x is missing; pip install x"),
        ("eager", ValueError("x" * 900), "cpu", True, "does not run: " + ("ValueError: " + "x" * 900)[:600]),
    ],
)
def test_which_failures_are_ours(name, error, device, ok, said):
    found = harness.failure(name, error, torch.device(device))
    assert found == {"ok": ok, ("skipped" if ok else "error"): said}


@pytest.mark.parametrize("name", ["ours", "triton", "eager"])
def test_only_our_own_wrong_results_are_failures(name):
    tensors = tensors_of(BENCH, SMALL, torch.float32, CPU)
    bench = dataclasses.replace(BENCH, providers={name: PROVIDERS["nan"]})
    said, run = harness.admit(bench, name, SMALL, tensors, Gate(bench, SMALL, tensors))
    assert run is None and said["error_rms"] is None and said["ok"] is (name == "eager")
    assert said["skipped" if name == "eager" else "error"].startswith("parity: result 0 has rms error nan")


def test_providers_that_compile_come_last_and_only_where_there_is_one_to_compile(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda fn, **how: asked.append((fn, how)) or fn)
    assert BENCH.names == [*PROVIDERS, "compile", "compile-max"]
    assert dataclasses.replace(BENCH, compiles=None).names == [*PROVIDERS]
    for name in ("eager", "compile", "compile-max"):
        assert BENCH.provider(name) is PROVIDERS["eager"]
    assert asked == [
        (PROVIDERS["eager"], {"mode": mode, "dynamic": False}) for mode in ("default", "max-autotune-no-cudagraphs")
    ]


def test_outputs_without_a_gradient_are_left_out():
    """The logsumexp of attention is fp32 beside a 16-bit output."""
    out, lse = torch.ones(2, dtype=torch.bfloat16), torch.ones(3)
    assert harness.as_tuple(out) == (out,) and harness.as_tuple((out, lse)) == (out,)
    assert len(harness.as_tuple((out, out.clone()))) == 2


def test_memory_of_a_call_by_hand(monkeypatch):
    """The peak is what a call adds, and the inputs, each storage once. A forward keeps what remains allocated."""
    now, peak = iter([1000 * 2**20, 1030 * 2**20]), 1100 * 2**20
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(now))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak)
    told = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: told.append(name))
    x, y = torch.zeros(2**18), torch.zeros(2**19)  # 1 and 2 MiB
    run = harness.Run(lambda: told.append("forward"), [x], [])
    found = harness.memory(run, lambda: told.append("call"), {"x": x, "again": x[:5], "y": y}, CPU)
    assert found == {"peak_mem_mb": 103.0, "saved_mem_mb": 30.0}
    assert told == ["synchronize", "reset_peak_memory_stats", "call", "forward"]


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_a_log_is_ok_if_it_has_records_and_all_are(tmp_path, capsys):
    log = Log(tmp_path / "x.json", {"gpu": "none"}, deadline=time.monotonic() + 50)
    assert not log.ok and json.loads(log.path.read_text())["records"] == [] and 40 < log.seconds_left <= 50
    log.add(ok=True, bench="x", ms=1.23456789, tensors=["not shown"])
    assert log.ok and "rehearsal" not in log.records[0]
    log.add(ok=True, bench="x", skipped="budget")
    assert log.ok
    log.add(ok=False, bench="x", error="no")
    log.add(ok=True, bench="x")
    assert not log.ok
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "ok     bench=x ms=1.235",
        "skip   bench=x skipped=budget",
        "FAILED bench=x error=no",
        "ok     bench=x",
    ]
    assert Log(tmp_path / "y.json", {}).seconds_left == float("inf")


def test_an_attempt_is_a_record_whatever_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(record.gc, "collect", lambda: 0)  # slow
    log = Log(tmp_path / "x.json", {"gpu": "none"})

    def fails(error):
        raise error

    log.attempt(lambda: time.sleep(0.01) or {"ok": True, "ms": 3.0}, bench="a")
    log.attempt(lambda: {"ok": False, "ms": 3.0}, bench="b")
    log.attempt(lambda: fails(torch.OutOfMemoryError("5 GiB")), bench="c")
    log.attempt(lambda: fails(KeyError("k" * 3000)), bench="d")
    a, b, c, d = log.records
    assert a.pop("seconds") >= 0.01 and a == {"ok": True, "bench": "a", "ms": 3.0}
    assert not b["ok"] and c["ok"] and c["skipped"] == "memory: 5 GiB" and "error" not in c
    assert not d["ok"] and d["error"].startswith("KeyError: 'kkk") and len(d["error"]) == 2000 and "seconds" in d
    assert len(json.loads(log.path.read_text())["records"]) == 4


def test_a_record_is_added_to_a_file_that_nobody_writes_any_more(tmp_path):
    log = Log(tmp_path / "x.json", {"gpu": "none"})
    log.add(ok=True, bench="x")
    before = json.loads(log.path.read_text())
    record.amend(log.path, {"ok": False, "error": "stopped"})
    found = json.loads(log.path.read_text())
    assert found == {"about": before["about"], "records": [*before["records"], {"ok": False, "error": "stopped"}]}
    record.amend(tmp_path / "new.json", {"ok": False})
    found = json.loads((tmp_path / "new.json").read_text())
    assert found["records"] == [{"ok": False}] and found["about"].keys() == {"utc"}


def test_tables_are_aligned_and_folders_named():
    rows = [["a", 1.23456, None], ["long", 10, "x"], ["b", 123456.0, 0]]
    assert record.table(["name", "n", ""], rows) == (
        "name          n\na         1.235\nlong         10  x\nb     1.235e+05  0"
    )
    assert record.table(["name", "n", ""], rows[:1], markdown=True).splitlines() == [
        "| name | n |  |", "| --- | ---: | ---: |", "| a | 1.235 |  |",
    ]  # fmt: skip
    assert record.folder_of("NVIDIA H100 80GB  HBM3") == ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3"
    assert record.folder_of("A B", "build/bench") == ROOT / "build/bench/a-b"
    assert record.folder_of("rehearsal") == record.folder_of("rehearsal", "build/bench") == ROOT / "build/rehearsal"
    assert [record.name_of(d) for d in (torch.bfloat16, torch.float32)] == ["bfloat16", "float32"]
