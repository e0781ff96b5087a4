"""``make prediction``: what counted bytes and FLOPs allow at most, as the records that ``make report`` draws.

Each launch takes at least its floor, the longer of its FLOPs at the card's matrix rate and its bytes at its copy
bandwidth; a prediction is the sum of these. Nothing real is that fast. It stands where no GPU has measured yet, and
everything in the file says that it is predicted. Memory is counted on meta tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import plan
from benchmarks.bench_vit import BENCHES
from benchmarks.devices import DEVICES
from benchmarks.gpu_stages.record import ROOT, git_commit, utc, write
from benchmarks.harness import Bench, Ceilings, Work
from benchmarks.memory import count, factory, largest_batch
from benchmarks.shapes import MODELS, SIDES, Shape
from benchmarks.trace import trace

FILE = ROOT / "benchmarks/prediction/prediction.json"
CARD = DEVICES[90]
MEMORY_GIB = 78  # what an H100 of 80 GB leaves to a process
WHO = {"ours": "ours (predicted)", "reference": "eager (predicted)", "eager": "eager (predicted)"}


def records(shapes: list[Shape], sides: tuple[int, ...], ops: bool = True) -> Iterator[dict[str, Any]]:
    """Whole models of ``shapes``; B/16 at ``sides``, with its largest batch; every op at ``shapes``."""
    rates = CARD.assumed
    yield _record("ceiling", "matmul", "", provider="card", tflops=rates.tflops)
    yield _record("ceiling", "copy", "", provider="card", gbps=rates.gbps)
    for shape in shapes:
        for mode in ("fwd", "full"):
            for provider in ("ours", "reference"):
                yield of_model(provider, shape, mode, rates)
    for bench in [b for name in plan.SECONDS if name != "vit" for b in plan.benches(name)] if ops else ():
        for shape in shapes:
            yield from of_op(bench, shape, rates)
    for side in sides:
        shape = Shape(MODELS["B/16"].model, 64, side)
        for provider in ("ours", "reference"):
            yield of_model(provider, shape, "fwd", rates)
            batch = largest_batch(factory(provider, shape), MEMORY_GIB * 2**30, train=True)
            where = str(Shape(shape.model, 1, side))
            yield _record("vit", "largest_batch", where, mode="full", provider=WHO[provider], largest_batch=batch)


def of_model(provider: str, shape: Shape, mode: str, rates: Ceilings) -> dict[str, Any]:
    make = factory(provider, shape)
    model, image = make(shape.batch)
    ms = floor_ms(model, [image], mode == "full", rates)
    found = {"img_s": 1e3 * shape.batch / ms}
    if mode == "full":
        found["peak_mem_mb"] = count(*make(shape.batch), train=True).peak / 2**20
    work = BENCHES[0].total(shape, torch.bfloat16)[mode]
    return _timed("vit", "vit", shape, mode, provider, work, ms, rates) | found


def of_op(bench: Bench, shape: Shape, rates: Ceilings) -> Iterator[dict[str, Any]]:
    """Forward without gradients, and forward + backward; nobody calls a backward alone."""
    tensors = bench.inputs(shape, lambda *sizes, scale=1.0: torch.empty(sizes, dtype=torch.bfloat16, device="meta"))
    names = list(tensors)
    peers = [bench.providers[name] for name in ("eager", "cublas") if name in bench.providers]
    for provider, function in [("ours", bench.providers["ours"]), *(("eager", peer) for peer in peers[:1])]:

        def call(*values: torch.Tensor, function: Callable[..., Any] = function) -> Any:
            return function(**dict(zip(names, values, strict=True)))

        for mode in ("fwd", "full"):
            leaves = [t.detach().requires_grad_(mode == "full") for t in tensors.values()]
            ms = floor_ms(call, leaves, mode == "full", rates)
            work = bench.total(shape, torch.bfloat16)[mode]
            yield _timed(bench.name, bench.op, shape, mode, provider, work, ms, rates)


def floor_ms(function: Callable[..., Any], inputs: list[torch.Tensor], train: bool, rates: Ceilings) -> float:
    launches = trace(function, *inputs, train=train, arch=90, num_sms=CARD.num_sms)
    return sum(Work(launch.flops, launch.bytes).floor_ms(rates) for launch in launches)


def _timed(
    bench: str, op: str, shape: Shape, mode: str, provider: str, work: Work, ms: float, rates: Ceilings
) -> dict[str, Any]:
    found = {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms} | work.rates(ms, rates)
    return _record(bench, op, str(shape), mode=mode, provider=WHO[provider], **found)


def _record(bench: str, op: str, shape: str, **found: Any) -> dict[str, Any]:
    return {"ok": True, "predicted": True, "bench": bench, "op": op, "shape": shape, "dtype": "bfloat16"} | found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prediction", description=__doc__.splitlines()[0])
    parser.parse_args()
    found = list(records(list(MODELS.values()), SIDES))
    about = {
        "gpu": f"{CARD.name} (assumed, {CARD.basis})", "driver": None, "torch": torch.__version__, "triton": None,
        "commit": git_commit(), "command": "python -m benchmarks.prediction", "utc": utc(),
    }  # fmt: skip
    FILE.parent.mkdir(exist_ok=True)
    old = FILE.read_text() if FILE.exists() else ""
    write(FILE, about, [{k: _short(v) for k, v in r.items()} for r in found])
    what = f"{len(found)} predictions, counted and not measured, in {FILE}"
    if FILE.read_text().partition("\n")[2] == old.partition("\n")[2]:  # behind the first line, which tells the date
        FILE.write_text(old)
        print(f"{what}: unchanged")
    else:
        print(f"{what}; `make report` puts them into README.md")
    return 0


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    raise SystemExit(main())
