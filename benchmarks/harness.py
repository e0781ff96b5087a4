"""One op at one shape: what it cannot avoid doing, what can run it; each of them checked, then timed in turn.

The gate: a provider whose outputs and gradients are, in rms and against fp64, more than `GATE` times as wrong as eager
PyTorch's in the same dtype, and a rounding more, is not timed. The floor of a point is the longer of its FLOPs at the
card's matrix rate and its bytes at the card's copy bandwidth, both measured in the same process.
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
    """What the card itself reaches: TFLOP/s of a large product, GB/s of a copy (read + write)."""

    tflops: float
    gbps: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What every implementation has to do: FLOPs (2 per multiply-add of a product) and bytes read and written once."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def floor_ms(self, ceilings: Ceilings) -> float:
        return max(self.flops / ceilings.tflops / 1e9, self.bytes / ceilings.gbps / 1e6)

    def rates(self, ms: float, ceilings: Ceilings) -> dict[str, float]:
        """What a record says of work that took ``ms``."""
        found = {"tflops": self.flops / ms / 1e9} if self.flops else {}
        return found | {"gbps": self.bytes / ms / 1e6, "sol_fraction": self.floor_ms(ceilings) / ms}


@dataclasses.dataclass
class Run:
    """A call that is ready: ``checked`` are the tensors whose gradients the gate looks at, ``wanted`` those timed."""

    call: Callable[[], Any]
    wanted: Sequence[Tensor]
    checked: Sequence[Tensor]


@dataclasses.dataclass(frozen=True)
class Bench:
    """One op.

    Args:
        name: of the file of results, "layer_norm" for ``bench_layer_norm.json``.
        op: of the line in it, "residual_layer_norm".
        inputs: (shape, rand) -> tensors; ``rand(*sizes, scale=1.0)`` makes one. Every one of them wants a gradient.
        work: (shape, bytes of an element) -> the `Work` of modes "fwd" and "bwd"; "full" is their sum.
        reference: eager PyTorch, called with the tensors as keywords in any dtype; what the gate compares with.
        providers: what is timed, called likewise. One that imports what is not there, or raises, is skipped.
        compiles: the provider that "compile" and "compile-max" compile; None for no such providers.
        replay: time CUDA graphs, because launching takes longer than the op.
        samples: how many of the batch the gate looks at; all, if None. The others then have a gradient of zero.
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

        config.donated_buffer = False  # else the backward cannot be walked twice
        return torch.compile(self.providers[self.compiles], mode=COMPILED[name], dynamic=False)

    def run(self, name: str, shape: Shape, tensors: dict[str, Tensor]) -> Run:
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
        call = functools.partial(self.provider(name), **leaves)
        return Run(call, list(leaves.values()), list(leaves.values()))

    def exact(self, shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype) -> Run:
        """The reference in any dtype, of the samples that the gate looks at."""
        leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in tensors.items()}
        return Run(functools.partial(self.reference, **leaves), list(leaves.values()), list(leaves.values()))

    def total(self, shape: Shape, dtype: torch.dtype) -> dict[str, Work]:
        """The work of every mode."""
        work = self.work(shape, dtype.itemsize)
        return work | {"full": work["fwd"] + work["bwd"]}


def tensors_of(bench: Bench, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The inputs of ``bench``: random, the same every time on one kind of device."""
    generator = torch.Generator(device).manual_seed(0)

    def rand(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    return bench.inputs(shape, rand)


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    """Outputs that have a gradient: without the logsumexp that the reference of attention returns."""
    outs = out if isinstance(out, tuple) else (out,)
    return tuple(o for o in outs if o.dtype == outs[0].dtype)


# ---- the gate --------------------------------------------------------------------------------------------------------


class Gate:
    """What is right for one point, and how wrong eager PyTorch is in its dtype."""

    def __init__(self, bench: Bench, shape: Shape, tensors: dict[str, Tensor]) -> None:
        dtype = next(iter(tensors.values())).dtype
        self.samples = bench.samples
        self.per_sample: list[Tensor] = []
        self.right = self.results(bench.exact(shape, tensors, torch.float64))
        eager = self.results(bench.exact(shape, tensors, dtype))
        self.eager = [relative_error(a, b) for a, b in zip(eager, self.right, strict=True)]
        self.floor = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps / 4  # about one rounding in 16 bits

    def cotangents(self, outs: Sequence[Tensor]) -> list[Tensor]:
        """Random, and for each sample the same, so that they do not depend on how many there are."""
        if not self.per_sample:
            generator = torch.Generator(outs[0].device).manual_seed(1)
            self.per_sample = [torch.randn(o.shape[1:], generator=generator, device=o.device) for o in outs]
        return [c.to(o.dtype).expand(o.shape).clone() for c, o in zip(self.per_sample, outs, strict=True)]

    def results(self, run: Run) -> list[Tensor]:
        if not run.checked:  # nor is anything timed with gradients, which would be compiled for them alone
            return [o[: self.samples].detach() for o in as_tuple(_without_grad(run.call))]
        outs = as_tuple(run.call())
        cotangents = self.cotangents(outs)
        for c in cotangents:
            c[self.samples or len(c) :] = 0
        grads = torch.autograd.grad(outs, list(run.checked), cotangents)
        return [t.detach() for t in (*(o[: self.samples] for o in outs), *grads)]

    def error(self, run: Run) -> tuple[float, str | None]:
        """The largest rms error of a tensor, relative to its rms, and what is wrong, if anything is."""
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
    """Times of every function, taken in turn, so that a card that warms up warms up for all of them.

    On a GPU `triton.testing.do_bench`, which empties the L2 cache before every call; on a CPU a clock.
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
    """What is timed, called once: with ``replay`` as a CUDA graph, whose replay takes no time of the CPU.

    Raises:
        RuntimeError: it cannot be captured, usually. torch.OutOfMemoryError: too little memory.
    """
    if not replay:
        fn = mode_of(run, cotangents, mode)
        fn()
        return fn
    stream, graph, current = torch.cuda.Stream(device), torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):  # the forward of "bwd", too: autograd walks back on the stream that it came on
        fn = mode_of(run, cotangents, mode)
        for _ in range(3):  # compiles and makes cuBLAS allocate, neither of which can be captured
            fn()
    torch.cuda.synchronize(device)
    gc.collect()
    try:
        with torch.cuda.graph(graph, stream=stream):
            results = fn()
    finally:
        torch.cuda.set_stream(current)  # after a capture that failed PyTorch does not return to it

    def replayed(kept: Any = (fn, results)) -> None:  # a replay reads what fn holds, too: what a forward saved, say
        graph.replay()

    return replayed


def mode_of(run: Run, cotangents: Cotangents, mode: str) -> Callable[[], Any]:
    """The call of a mode; the graph that "bwd" walks stays alive as long as its function does."""
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
    """Of this card, in this process; a small product and copy on a CPU."""
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
    """What to measure together."""

    bench: Bench
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    modes: tuple[str, ...] = MODES
    providers: tuple[str, ...] = ()  # all of the bench's, if empty


def measure(point: Point, log: Log, ceilings: Ceilings, device: torch.device) -> None:
    """One record for every provider and mode, as soon as it is known; what goes wrong is one, too."""
    bench, shape = point.bench, point.shape
    about = {"bench": bench.name, "op": bench.op, "shape": str(shape), "dtype": name_of(point.dtype)}
    try:
        _measure(point, log, ceilings, device, about)
    except Exception as error:  # the points after this one are wanted all the same
        log.add(**about, **failure("ours", error, device))
    if any(name.startswith("compile") for name in point.providers or bench.names):
        # Else these shapes make the next ones recompilations, and the CUDA graphs of compiled code keep their memory.
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
                except Exception as error:  # a capture that failed is no verdict: it is timed as it is
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
            # The memory of compiled code's own CUDA graphs does not show in a replay.
            plain = how[name] == "launches" and not name.startswith("compile-max")
            if mode == "full" and plain and device.type == "cuda":
                record |= memory(runs[name], fns[name], tensors, device)
            log.add(ok=True, **about, mode=mode, provider=name, **found, **record)
        del fns


def admit(
    bench: Bench, name: str, shape: Shape, tensors: dict[str, Tensor], gate: Gate
) -> tuple[dict[str, Any], Run | None]:
    """(what a record says, the run); no run where the provider is not to be timed."""
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
    """What a record says of it: ours must run, our kernels on a GPU; too little memory, and others, are skipped."""
    if isinstance(error, torch.OutOfMemoryError):
        return {"ok": True, "skipped": f"memory: {error}"[:300]}
    if isinstance(error, ImportError | CannotStart):  # CannotStart says itself which library is missing
        return {"ok": True, "skipped": f"{'not installed: ' * isinstance(error, ImportError)}{error}"[:200]}
    said = f"{type(error).__name__}: {error}"[:600]
    must = name == "ours" or (name == "triton" and device.type == "cuda")
    return {"ok": False, "error": said} if must else {"ok": True, "skipped": f"does not run: {said}"}


def memory(run: Run, fn: Callable[[], Any], tensors: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """MiB of the GPU: at the peak of a call, with inputs and parameters; and what a forward keeps for its backward."""
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
