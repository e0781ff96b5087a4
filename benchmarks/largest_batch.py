"""The largest batch of a training step that fits the card, by the side of the image: right half of Fig. 12."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.bench_vit import BENCHES
from benchmarks.harness import failure, mode_of, release, tensors_of
from benchmarks.log import Log, name_of
from benchmarks.shapes import MODELS, Shape

MODEL = BENCHES[0]
AT_MOST = 2**16


def search(log: Log, side: int, dtype: torch.dtype, device: torch.device) -> None:
    """Adds a record each for ours and the reference: forward + backward of B/16. On a CPU the limit is a batch of 2."""
    for name in ("ours", "reference"):
        shape = Shape(MODELS["B/16"].model, 1, side)
        about = {"bench": "vit", "op": "largest_batch", "shape": str(shape), "dtype": name_of(dtype)}
        about |= {"mode": "full", "provider": name}
        if log.seconds_left < 20:
            log.add(ok=True, **about, skipped="budget")
            continue

        def fits(batch: int, shape: Shape = shape, name: str = name) -> bool:
            return step_fits(name, dataclasses.replace(shape, batch=batch), dtype, device)

        try:
            found = largest(fits, AT_MOST if device.type == "cuda" else 2)
            result = {"ok": True} | ({"largest_batch": found} if found else {"skipped": "memory: not one image"})
        except Exception as error:  # PyTorch may have no kernel for a batch that would fit
            result = failure(name, error, device)
        log.add(**about, **result)
        release(device)


def largest(fits: Callable[[int], bool], at_most: int, within: float = 0.03) -> int:
    """The largest batch that fits, within 3 %, or 0 if not even 1 fits. It doubles the batch, and then bisects.

    Batches are multiples of 16 if these are close enough.
    """
    good, bad = 0, min(16, at_most)
    while bad <= at_most and fits(bad):
        good, bad = bad, 2 * bad
    if bad > at_most:
        return good
    while bad - good > max(1, within * good):
        middle = (good + bad) // 2
        if middle // 16 * 16 > good:
            middle = middle // 16 * 16
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def step_fits(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        tensors = tensors_of(MODEL, shape, dtype, device)
        run = MODEL.run(name, shape, tensors)
        mode_of(run, lambda outs: [torch.ones_like(o) for o in outs], "full")()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        run = tensors = None
        release(device)
