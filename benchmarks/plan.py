"""The points that `make bench` measures, the most important first, and the selection of some."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from collections.abc import Callable, Iterable, Iterator

import torch

from benchmarks import largest_batch
from benchmarks.harness import COMPILED, Bench, Point, measure, measure_ceilings
from benchmarks.log import Log
from benchmarks.shapes import LATENCY, MODELS, SIDES, SMALL, Shape, parse
from benchmarks.stages import Stage

# File of results, without "bench_": seconds of a quick run and of a whole one on an H100.
SECONDS = {
    "vit": (110, 335),
    "attention": (30, 75),
    "mlp": (20, 45),
    "layer_norm": (15, 40),
    "linear": (20, 50),
    "patch_embed": (15, 30),
}
# Seconds to compile the 12 blocks of a model, and an op. A point without enough time does not start.
COMPILING = {"compile": (55, 10), "compile-max": (140, 40), "compile-reduce": (15, 15)}
B16, *OTHERS = MODELS.values()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The selection of the command line. Empty means all."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    quick: bool = False

    @property
    def some(self) -> bool:
        """Whether it selects only a part of a run."""
        return bool(self.ops or self.shapes or self.providers or self.modes or self.dtype != "bfloat16")


def benches(name: str) -> list[Bench]:
    return importlib.import_module(f"benchmarks.bench_{name}").BENCHES


def stages(wanted: Wanted, rehearse: bool = False) -> dict[str, Stage]:
    """A stage for each file of results that has something to measure.

    Raises:
        ValueError: an op, shape, provider or mode does not exist, or nothing has all of them.
    """
    of_file = {name: benches(name) for name in SECONDS}
    everything = [bench for group in of_file.values() for bench in group]
    _known("op", wanted.ops, {b.op for b in everything} | set(of_file) | {"largest_batch"})
    _known("provider", wanted.providers, {name for b in everything for name in b.names})
    _known("mode", wanted.modes, {"fwd", "bwd", "full"})
    for shape in wanted.shapes:
        parse(shape)
    planned = {
        f"bench_{name}": Stage("benchmarks.plan:run", seconds[not wanted.quick], {"name": name, "wanted": wanted})
        for name, seconds in SECONDS.items()
        if _sweep(name, wanted) or any(points(name, wanted, rehearse))
    }
    if not planned:
        ops = wanted.ops or tuple(of_file)
        have = {p for name, group in of_file.items() for b in group if {name, b.op} & set(ops) for p in b.names}
        raise ValueError(
            f"nothing to measure; providers of {', '.join(ops)}: {', '.join(sorted(have)) or 'ours, reference'}"
            + "; --quick leaves some out" * wanted.quick
        )
    return planned


def _known(what: str, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; there are {', '.join(sorted(known))}")


def _sweep(name: str, wanted: Wanted) -> bool:
    """Whether to search the largest batches."""
    if name != "vit" or wanted.quick or wanted.shapes:
        return False
    return "largest_batch" in wanted.ops or not wanted.some


def device_of(rehearse: bool) -> torch.device:
    return torch.device("cpu" if rehearse else "cuda")


def run(log: Log, rehearse: bool, name: str, wanted: Wanted) -> None:
    """A stage: measures the ceilings, then the points in order, until the time is over."""
    device = device_of(rehearse)
    if rehearse:  # 16-bit products are slow on a CPU
        wanted = dataclasses.replace(wanted, dtype="float32")
    dtype = getattr(torch, wanted.dtype)
    ceilings = measure_ceilings(log, device, dtype)
    gc.collect()
    gc.freeze()  # makes hundreds of captures faster, because each runs the garbage collector
    for point in points(name, wanted, rehearse):
        if log.seconds_left < least(point):
            bench = point.bench
            about = {"bench": name, "op": bench.op, "shape": str(point.shape), "dtype": wanted.dtype}
            for provider in [p for p in point.providers if not _plain(p)] or [""]:
                log.add(ok=True, **about, provider=provider, skipped="budget")
        else:
            measure(point, log, ceilings, device)
    if _sweep(name, wanted):
        for side in (SMALL.img_size,) if rehearse else SIDES:
            largest_batch.search(log, side, dtype, device)


def least(point: Point) -> float:
    """The seconds that ``point`` needs to start."""
    whole = point.bench.name == "vit"
    times = [COMPILING[p.removesuffix("-cudnn")][not whole] for p in point.providers if not _plain(p)]
    return 4 + sum(times) * (point.shape.config.depth / 12 if whole else 1)


def points(name: str, wanted: Wanted, rehearse: bool) -> Iterator[Point]:
    """The selected points in order, without points that have no provider."""
    plan = _vit if name == "vit" else _op
    for point in _picked(name, wanted, rehearse) if wanted.shapes or rehearse else plan(benches(name), wanted.quick):
        bench = point.bench
        if wanted.ops and not {name, bench.op} & set(wanted.ops):
            continue
        modes = tuple(m for m in point.modes if not wanted.modes or m in wanted.modes)
        providers = tuple(p for p in point.providers if not wanted.providers or p in wanted.providers)
        if modes and providers:
            yield dataclasses.replace(point, dtype=getattr(torch, wanted.dtype), modes=modes, providers=providers)


def _picked(name: str, wanted: Wanted, rehearse: bool) -> Iterator[Point]:
    for shape in map(parse, wanted.shapes or (str(SMALL),)):
        for bench in benches(name):
            yield _point(bench, shape, _plain)
            for compiled in [p for p in bench.names if not _plain(p)]:
                # A rehearsal compiles only on request.
                if compiled in wanted.providers or not (wanted.providers or rehearse):
                    yield _beside_ours(bench, shape, compiled)


def _point(bench: Bench, shape: Shape, take: Callable[[str], object]) -> Point:
    modes = {"vit": ("fwd", "full"), "latency": ("fwd",)}.get(bench.op, ("fwd", "bwd", "full"))
    return Point(bench, shape, modes=modes, providers=tuple(filter(take, bench.names)))


def _plain(provider: str) -> bool:
    return not provider.startswith("compile")


def _op(group: list[Bench], quick: bool) -> Iterator[Point]:
    """All providers without a compiler at all shapes, then each compiled one with ours."""
    for shape in (B16, MODELS["H/14"]) if quick else MODELS.values():
        for bench in group:
            yield _point(bench, shape, _plain)
    for compiled in () if quick else COMPILED:  # the slower one last
        for shape in (B16, MODELS["L/16"]):
            for bench in group:
                if bench.compiles:
                    yield _beside_ours(bench, shape, compiled)


def _beside_ours(bench: Bench, shape: Shape, compiled: str) -> Point:
    return _point(bench, shape, lambda p: p in ("ours", compiled))


def _vit(group: list[Bench], quick: bool) -> Iterator[Point]:
    model, latency = group
    yield _point(model, B16, _plain)
    for shape in OTHERS:
        yield _point(model, shape, lambda p: p in ("ours", "reference", "timm"))
    yield _point(latency, LATENCY, _plain)
    yield _beside_ours(model, B16, "compile")
    yield _beside_ours(latency, LATENCY, "compile-reduce")
    if quick:
        return
    yield _beside_ours(model, B16, "compile-max")
    for side in SIDES:
        yield dataclasses.replace(
            _point(model, Shape(B16.model, 64, side), lambda p: p in ("ours", "reference")), modes=("fwd",)
        )
    for compiled in ("compile-cudnn", "compile-max-cudnn"):
        yield _beside_ours(model, B16, compiled)
    for shape in OTHERS:
        yield _point(model, shape, lambda p: p in ("ours", "reference-cudnn", "hf", "accelerated"))
    for shape in OTHERS:
        yield _beside_ours(model, shape, "compile")
