"""What `make bench` measures, most wanted first, and how much of it where only some is asked for."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator

import torch

from benchmarks import largest_batch
from benchmarks.gpu_stages import cases
from benchmarks.gpu_stages.record import Log
from benchmarks.harness import COMPILED, Bench, Point, measure, measure_ceilings
from benchmarks.shapes import LATENCY, MODELS, SIDES, SMALL, Shape, parse
from benchmarks.stages import Stage

# File of results, without "bench_": seconds that a quick run and a whole one may want on an H100.
SECONDS = {
    "vit": (110, 330),
    "attention": (30, 75),
    "mlp": (20, 45),
    "layer_norm": (15, 40),
    "linear": (20, 50),
    "patch_embed": (15, 30),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
B16, *OTHERS = MODELS.values()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What the command line picks; empty means everything."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    quick: bool = False

    @property
    def some(self) -> bool:
        """Whether it is a part of what a run measures."""
        return bool(self.ops or self.shapes or self.providers or self.modes or self.dtype != "bfloat16")


def benches(name: str) -> list[Bench]:
    return importlib.import_module(f"benchmarks.bench_{name}").BENCHES


def stages(wanted: Wanted) -> dict[str, Stage]:
    """One for each file of results that has something to measure.

    Raises:
        ValueError: there is no such op, shape, provider or mode.
    """
    of_file = {name: benches(name) for name in SECONDS}
    everything = [bench for group in of_file.values() for bench in group]
    _known("op", wanted.ops, {b.op for b in everything} | set(of_file) | {"largest_batch"})
    _known("provider", wanted.providers, {name for b in everything for name in b.names})
    _known("mode", wanted.modes, {"fwd", "bwd", "full"})
    for shape in wanted.shapes:
        parse(shape)
    return {
        f"bench_{name}": Stage("benchmarks.plan:run", seconds[not wanted.quick], {"name": name, "wanted": wanted})
        for name, seconds in SECONDS.items()
        if not wanted.ops or set(wanted.ops) & {name, *(b.op for b in of_file[name])} or _sweep(name, wanted)
    }


def _known(what: str, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; there are {', '.join(sorted(known))}")


def _sweep(name: str, wanted: Wanted) -> bool:
    return name == "vit" and not wanted.quick and (not wanted.ops or "largest_batch" in wanted.ops)


def run(log: Log, rehearse: bool, name: str, wanted: Wanted) -> None:
    """A stage: the ceilings, then point after point, until the time is over."""
    device = cases.device(rehearse)
    if rehearse:  # 16-bit products are slow on a CPU
        wanted = dataclasses.replace(wanted, dtype="float32")
    dtype = DTYPES[wanted.dtype]
    ceilings = measure_ceilings(log, device, dtype)
    for point in points(name, wanted, rehearse):
        if log.seconds_left < 4:
            bench = point.bench
            log.add(ok=True, bench=name, op=bench.op, shape=str(point.shape), dtype=wanted.dtype, skipped="budget")
        else:
            measure(point, log, ceilings, device)
    if _sweep(name, wanted) and not wanted.shapes:
        for side in (SMALL.img_size,) if rehearse else SIDES:
            largest_batch.search(log, side, dtype, device)


def points(name: str, wanted: Wanted, rehearse: bool) -> Iterator[Point]:
    """What is asked for, in order; a point that would have no provider is left out."""
    plan = _vit if name == "vit" else _op
    for point in _picked(name, wanted, rehearse) if wanted.shapes or rehearse else plan(benches(name), wanted.quick):
        bench = point.bench
        if wanted.ops and not {name, bench.op} & set(wanted.ops):
            continue
        modes = tuple(m for m in point.modes if not wanted.modes or m in wanted.modes)
        providers = tuple(p for p in point.providers if not wanted.providers or p in wanted.providers)
        if modes and providers:
            yield dataclasses.replace(point, dtype=DTYPES[wanted.dtype], modes=modes, providers=providers)


def _picked(name: str, wanted: Wanted, rehearse: bool) -> Iterator[Point]:
    for shape in map(parse, wanted.shapes or (str(SMALL),)):
        for bench in benches(name):
            # In a rehearsal a compiler is only started where it is asked for.
            yield _point(bench, shape, lambda p: wanted.providers or not (rehearse and p.startswith("compile")))


def _point(bench: Bench, shape: Shape, take: Callable[[str], object]) -> Point:
    modes = {"vit": ("fwd", "full"), "latency": ("fwd",)}.get(bench.op, ("fwd", "bwd", "full"))
    return Point(bench, shape, modes=modes, providers=tuple(filter(take, bench.names)))


def _plain(provider: str) -> bool:
    return not provider.startswith("compile")


def _op(group: list[Bench], quick: bool) -> Iterator[Point]:
    """Everybody who need not be compiled at every model's shape, then the compiled ones beside ours."""
    for shape in (B16, MODELS["H/14"]) if quick else MODELS.values():
        for bench in group:
            yield _point(bench, shape, _plain)
    for shape in () if quick else (B16, MODELS["L/16"]):
        for bench in group:
            if bench.compiles:
                yield _point(bench, shape, lambda p: p == "ours" or p in COMPILED)


def _vit(group: list[Bench], quick: bool) -> Iterator[Point]:
    model, latency = group
    slow = ("compile-max", "compile-max-cudnn")
    yield _point(model, B16, _plain)
    yield _point(model, B16, lambda p: p == "ours" or (p.startswith("compile") and p not in slow))
    for shape in OTHERS:
        yield _point(model, shape, _plain)
    yield _point(latency, LATENCY, bool)
    if quick:
        return
    yield _point(model, B16, lambda p: p == "ours" or p in slow)
    for shape in OTHERS:
        yield _point(model, shape, lambda p: p == "ours" or (p.startswith("compile") and p not in slow))
    for side in SIDES:
        yield dataclasses.replace(
            _point(model, Shape(B16.model, 64, side), lambda p: p in ("ours", "reference")), modes=("fwd",)
        )
