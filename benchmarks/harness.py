"""Measures one op at one shape: checks each provider against the gate, and then times all of them in turn.

The gate compares outputs and gradients with fp64. A provider is not timed if its rms error is larger than `GATE` times
that of eager PyTorch in the same dtype, plus a rounding. The floor of a point is the longer of two times: its FLOPs at
the card's matrix rate, and its bytes at the card's copy bandwidth. Both rates are measured in the same process.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.log import Log, name_of
from benchmarks.shapes import Shape
from vit.commands.parity import CannotStart
from vit.testing import relative_error

MODES = ("fwd", "bwd", "full")
GATE = 2.0
COMPILED = {"compile": "default", "compile-max": "max-autotune-no-cudagraphs"}  # provider: mode of torch.compile
OURS = ("ours", "triton")
Cotangents = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of the card: TFLOP/s of a large product, GB/s of a copy (read + write)."""

    tflops: float
    gbps: float


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of any implementation: FLOPs (2 per multiply-add of a product), and bytes moved once."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_ms(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.tflops / 1e9, self.bytes / ceilings.gbps / 1e6)

    def rates(self, ms: float, ceilings: Ceilings) -> dict[str, float]:
        """The fields of a record for work that took ``ms``."""
        found = {"tflops": self.flops / ms / 1e9} if self.flops else {}
        return found | {"gbps": self.bytes / ms / 1e6, "sol_fraction": self.floor_ms(ceilings) / ms}


@dataclasses.dataclass
class Run:
    """A call. The gate checks the gradients of ``checked``. The timed backward computes those of ``wanted``."""

    call: Callable[[], Any]
    wanted: Sequence[Tensor]
    checked: Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Bench:
    """One op.

    Args:
        name: "layer_norm" for the file of results ``bench_layer_norm.json``.
        op: the op of its records, "residual_layer_norm".
        inputs: (shape, rand) -> tensors, which all require grad. ``rand(*sizes, scale=1.0)`` makes one.
        work: (shape, bytes of an element) -> the `Work` of modes "fwd" and "bwd"; "full" is their sum.
        reference: eager PyTorch for the gate, called with the tensors as keywords in any dtype.
        providers: timed functions, called likewise. One that cannot be imported, or raises, is skipped.
        compiles: the provider that "compile" and "compile-max" compile; None for no such providers.
        replay: time CUDA graphs, because the launches take longer than the op.
        samples: how many samples of the batch the gate checks, or None for all. The others get zero cotangents.
    """

    name: str
    op: str
    inputs: Callable[[Shape, Callable[..., Tensor]], dict[str, Tensor]]
    work: Callable[[Shape, int], dict[str, Work]]
    reference: Callable[..., Any]
    providers: dict[str, Callable[..., Any]]
    compiles: str | None = "eager"
    replay: bool = True
    samples: int | None = None

    @property
    def names(self) -> list[str]:
        return [*self.providers, *(COMPILED if self.compiles else ())]

    def provider(self, name: str) -> Callable[..., Any]:
        if name in self.providers:
            return self.providers[name]
        from torch._functorch import config

        config.donated_buffer = False  # otherwise the backward runs only once
        return torch.compile(self.providers[self.compiles], mode=COMPILED[name], dynamic=False)

    def run(self, name: str, shape: Shape, tensors: dict[str, Tensor]) -> Run:
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        call = functools.partial(self.provider(name), **leaves)
        return Run(call, list(leaves.values()), list(leaves.values()))

    def exact(self, shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype) -> Run:
        """The reference in any dtype, for the samples that the gate checks."""
        leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}
        return Run(functools.partial(self.reference, **leaves), list(leaves.values()), list(leaves.values()))

    def total(self, shape: Shape, dtype: torch.dtype) -> dict[str, Work]:
        """The work of every mode."""
        work = self.work(shape, dtype.itemsize)
        return work | {"full": work["fwd"] + work["bwd"]}


def tensors_of(bench: Bench, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The inputs of ``bench``: random, but always the same on one kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def rand(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    return bench.inputs(shape, rand)


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    """The outputs with a gradient, that is, without the logsumexp of attention's reference."""
    outs = out if isinstance(out, tuple) else (out,)
    return tuple(o for o in outs if o.dtype == outs[0].dtype)


# ---- the gate --------------------------------------------------------------------------------------------------------


class Gate:
    """The exact results of one point, and the errors of eager PyTorch in its dtype."""

    def __init__(self, bench: Bench, shape: Shape, tensors: dict[str, Tensor]) -> None:
        dtype = next(iter(tensors.values())).dtype
        self.samples = bench.samples
        self.per_sample: list[Tensor] = []
        self.right = self.results(bench.exact(shape, tensors, torch.float64))
        eager = self.results(bench.exact(shape, tensors, dtype))
        self.eager = [relative_error(a, b) for a, b in zip(eager, self.right, strict=True)]
        self.floor = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps / 4  # about one rounding in 16 bits

    def cotangents(self, outs: Sequence[Tensor]) -> list[Tensor]:
        """Random and the same for each sample, so they do not depend on the number of samples."""
        if not self.per_sample:
            generator = torch.Generator(outs[0].device).manual_seed(1)
            self.per_sample = [torch.randn(o.shape[1:], generator=generator, device=o.device) for o in outs]
        return [c.to(o.dtype).expand(o.shape).clone() for c, o in zip(self.per_sample, outs, strict=True)]

    def results(self, run: Run) -> list[Tensor]:
        if not run.checked:  # otherwise only the gate would compile a forward with gradients
            return [o[: self.samples].detach() for o in as_tuple(_without_grad(run.call))]
        outs = as_tuple(run.call())
        cotangents = self.cotangents(outs)
        for c in cotangents:
            c[self.samples or len(c) :] = 0
        grads = torch.autograd.grad(outs, list(run.checked), cotangents)
        return [t.detach() for t in (*(o[: self.samples] for o in outs), *grads)]

    def error(self, run: Run) -> tuple[float, str | None]:
        """(the largest rms error of a tensor relative to its rms, a message if that is too large)."""
        found = self.results(run)
        if len(found) != len(self.right):
            return float("nan"), f"{len(found)} results instead of {len(self.right)}"
        errors = [relative_error(a, b) for a, b in zip(found, self.right, strict=True)]
        for i, (error, eager) in enumerate(zip(errors, self.eager, strict=True)):
            if not error <= GATE * eager + self.floor:  # so that NaN fails
                return max(errors), f"parity: result {i} has rms error {error:.2e}, eager PyTorch {eager:.2e}"
        return max(errors), None


# ---- timing ----------------------------------------------------------------------------------------------------------


def milliseconds(
    fns: dict[str, Callable[[], Any]], device: torch.device, *, rounds: int = 3, rep_ms: float = 60.0
) -> dict[str, list[float]]:
    """Times of the functions, taken in turn, so that a change of the card's temperature affects all of them.

    On a GPU it uses `triton.testing.do_bench`, which clears the L2 cache before every call, on a CPU a clock.
    """
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            if device.type == "cuda":
                from triton.testing import do_bench

                times[name] += do_bench(fn, warmup=rep_ms / 3, rep=rep_ms, return_mode="all")
            else:
                start = time.perf_counter()
                fn()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def percentiles(times: list[float]) -> dict[str, float]:
    cuts = quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"ms_p20": cuts[1], "ms_p50": cuts[4], "ms_p80": cuts[7]}


def ready(run: Run, cotangents: Cotangents, mode: str, device: torch.device, replay: bool) -> Callable[[], Any]:
    """The function to time, after one call. With ``replay`` it is a CUDA graph, which takes no time of the CPU.

    Raises:
        RuntimeError: usually, it cannot be captured. torch.OutOfMemoryError: too little memory.
    """
    if not replay:
        fn = mode_of(run, cotangents, mode)
        fn()
        return fn
    stream, graph, current = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # "bwd", too: a backward runs on the stream of its forward
        fn = mode_of(run, cotangents, mode)
        for _ in range(3):  # compiles, and lets cuBLAS allocate, which cannot be captured
            fn()
    torch.cuda.synchronize(device)
    gc.collect()
    try:
        with torch.cuda.graph(graph, stream=stream):
            results = fn()
    finally:
        torch.cuda.set_stream(current)  # PyTorch does not do so after a failed capture

    def replayed(kept: Any = (fn, results)) -> None:  # a replay reads tensors that fn holds
        graph.replay()

    return replayed


def mode_of(run: Run, cotangents: Cotangents, mode: str) -> Callable[[], Any]:
    """The call of a mode. The function of "bwd" keeps the graph alive."""
    wanted = list(run.wanted)
    if mode == "fwd":
        return lambda: _without_grad(run.call)
    if mode == "bwd":
        outs = as_tuple(run.call())
        return functools.partial(torch.autograd.grad, outs, wanted, cotangents(outs), retain_graph=True)
    directions = cotangents(as_tuple(_without_grad(run.call)))
    return lambda: torch.autograd.grad(as_tuple(run.call()), wanted, directions)


def _without_grad(call: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return call()


def measure_ceilings(log: Log, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures the rates of this card. On a CPU the product and the copy are small."""
    size, count = (8192, 2**30) if device.type == "cuda" else (256, 2**20)
    x = torch.randn(size, size, device=device).to(dtype)
    source = torch.empty(count, device=device, dtype=torch.int32).random_()
    target = torch.empty_like(source)
    fns = {"matmul": functools.partial(torch.mm, x, x), "copy": functools.partial(target.copy_, source)}
    found = {name: percentiles(t) for name, t in milliseconds(fns, device, rep_ms=150).items()}
    tflops = 2 * size**3 / found["matmul"]["ms_p50"] / 1e9
    gbps = 8 * count / found["copy"]["ms_p50"] / 1e6
    about = {"ok": True, "bench": "ceiling", "provider": "card"}
    log.add(**about, op="matmul", shape=f"{size}^3", dtype=name_of(dtype), tflops=tflops, **found["matmul"])
    log.add(**about, op="copy", shape=f"{8 * count} bytes", dtype="int32", gbps=gbps, **found["copy"])
    return Ceilings(tflops, gbps)


# ---- a point: one op, shape and dtype, every provider ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """An op, shape and dtype, and the providers to measure together."""

    bench: Bench
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = ()  # empty: all


def measure(point: Point, log: Log, ceilings: Ceilings, device: torch.device) -> None:
    """Adds a record for every provider and mode as soon as it is known, also for errors."""
    bench, shape = point.bench, point.shape
    about = {"bench": bench.name, "op": bench.op, "shape": str(shape), "dtype": name_of(point.dtype)}
    try:
        _measure(point, log, ceilings, device, about)
    except Exception as error:  # the next points still run
        log.add(**about, **failure("ours", error, device))
    if any(name.startswith("compile") for name in point.providers or bench.names):
        # Otherwise the next shapes count as recompilations, and the CUDA graphs of compiled code keep their memory.
        torch._dynamo.reset()
    release(device)


def _measure(point: Point, log: Log, ceilings: Ceilings, device: torch.device, about: dict[str, str]) -> None:
    bench, shape, dtype = point.bench, point.shape, point.dtype
    tensors = tensors_of(bench, shape, dtype, device)
    gate = Gate(bench, shape, tensors)
    runs: dict[str, Run] = {}
    errors: dict[str, float] = {}
    for name in point.providers or bench.names:
        verdict, run = admit(bench, name, shape, tensors, gate)
        if run is None:
            log.add(**about, provider=name, **verdict)
        else:
            runs[name], errors[name] = run, verdict["error_rms"]
    work = bench.total(shape, dtype)
    for mode in point.modes:
        fns, how = {}, {}
        for name, run in runs.items():
            for replay in (True, False) if device.type == "cuda" and bench.replay else (False,):
                try:
                    fns[name] = ready(run, gate.cotangents, mode, device, replay)
                    how[name] = "graph" if replay else "launches"
                    break
                except Exception as error:  # after a failed capture, launches are timed
                    if not replay or isinstance(error, torch.OutOfMemoryError):
                        log.add(**about, mode=mode, provider=name, **failure(name, error, device))
                        break
        how_long = {"rounds": 3, "rep_ms": 60} if bench.replay else {"rounds": 2, "rep_ms": 400}
        for name, times in milliseconds(fns, device, **how_long).items():
            found = percentiles(times)
            ms = found["ms_p50"]
            record = work[mode].rates(ms, ceilings) | {"error_rms": errors[name], "timed": how[name]}
            if bench.name == "vit":
                record["img_s"] = 1e3 * shape.batch / ms
            # The replay of a CUDA graph does not show its memory, also in compiled code.
            plain = how[name] == "launches" and not name.startswith("compile-max")
            if mode == "full" and plain and device.type == "cuda":
                record |= memory(runs[name], fns[name], tensors, device)
            log.add(ok=True, **about, mode=mode, provider=name, **found, **record)
        del fns


def admit(
    bench: Bench, name: str, shape: Shape, tensors: dict[str, Tensor], gate: Gate
) -> tuple[dict[str, Any], Run | None]:
    """(fields of a record, the run, or None if the provider must not be timed)."""
    try:
        run = bench.run(name, shape, tensors)
        error, wrong = gate.error(run)
    except Exception as error:
        return failure(name, error, next(iter(tensors.values())).device), None
    if wrong:
        said = {"error": f"{wrong}: not timed"} if name in OURS else {"skipped": f"{wrong}: not timed"}
        return {"ok": name not in OURS, "error_rms": error if math.isfinite(error) else None} | said, None
    return {"error_rms": error}, run


def failure(name: str, error: Exception, device: torch.device) -> dict[str, Any]:
    """The fields of a record. An error of ours, or of "triton" on a GPU, is a failure, but not too little memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"ok": True, "skipped": f"memory: {error}"[:300]}
    if isinstance(error, ImportError | CannotStart):  # CannotStart names the missing library
        return {"ok": True, "skipped": f"{'not installed: ' * isinstance(error, ImportError)}{error}"[:200]}
    said = f"{type(error).__name__}: {error}"[:600]
    must = name == "ours" or (name == "triton" and device.type == "cuda")
    return {"ok": False, "error": said} if must else {"ok": True, "skipped": f"does not run: {said}"}


def memory(run: Run, fn: Callable[[], Any], tensors: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """MiB of the GPU at the peak of a call, with inputs and parameters, and MiB that a forward saves."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    peak = torch.cuda.max_memory_allocated(device) - before
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*run.wanted, *tensors.values())}
    kept = run.call()
    saved = torch.cuda.memory_allocated(device) - before
    del kept
    return {"peak_mem_mb": (peak + sum(own.values())) / 2**20, "saved_mem_mb": saved / 2**20}


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
