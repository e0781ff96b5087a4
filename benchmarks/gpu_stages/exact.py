"""The same bits in every run, in memory filled with NaN, beside other work, and as views into buffers of NaN.

Every op runs only our kernels (``impl="triton"``), so a difference comes from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_stages import cases
from benchmarks.log import Log


def determinism(log: Log, rehearse: bool) -> None:
    """Every op and a small ViT, forward and backward, 100 times."""
    device, times = cases.device(rehearse), 1 if rehearse else 100
    for case in cases.op_cases(device, rehearse):
        log.attempt(lambda case=case: _again(case.results, times), op=case.op)
    for impl in ("triton", "auto"):
        model, *inputs = cases.small_model(device, rehearse, impl)
        log.attempt(lambda m=model, i=inputs: _again(lambda: cases.model_results(m, *i), times), op="vit", impl=impl)


def _again(run: Callable[[], list[Tensor]], times: int) -> dict:
    return cases.same_bits(run(), (run() for _ in range(times)))


def race(log: Log, rehearse: bool) -> None:
    """250 runs in new memory filled with NaN, each at another offset, while a second stream keeps the GPU busy.

    There is no synchronisation between the runs, so kernels of consecutive runs can overlap.
    """
    device, times = cases.device(rehearse), 2 if rehearse else 250
    for case in cases.op_cases(device, rehearse):
        log.attempt(lambda case=case: _raced(case, times), op=case.op)


def _raced(case: cases.Case, times: int) -> dict:
    busy = _Busy(case.cotangents[0].device)

    def runs() -> Iterator[list[Tensor]]:
        for i in range(times):
            busy.more()
            yield case.results(tensors={k: _at_offset(t, 16 * (i % 31)) for k, t in case.tensors.items()})

    with nan_outputs():
        return cases.same_bits(case.results(), runs())


def _at_offset(t: Tensor, offset: int) -> Tensor:
    """A copy from element ``offset`` of a new buffer of NaN. A multiple of 16 keeps an alignment of 16 bytes."""
    buffer = torch.full((t.numel() + 2 * offset,), float("nan"), dtype=t.dtype, device=t.device)
    return buffer[offset : offset + t.numel()].view(t.shape).copy_(t)


class _Busy:
    """Matrix products on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        if self.stream is not None:
            self.x = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
            self.out = torch.empty_like(self.x)
            self.stream.wait_stream(torch.cuda.current_stream())

    def more(self) -> None:
        if self.stream is not None:
            with torch.cuda.stream(self.stream):
                for _ in range(4):
                    torch.mm(self.x, self.x, out=self.out)


def nan_bands(log: Log, rehearse: bool) -> None:
    """Inputs and cotangents are views into buffers of NaN, and outputs are filled with NaN. So a read beyond an edge
    or an element that is not written shows."""
    for case in cases.op_cases(cases.device(rehearse), rehearse):
        log.attempt(lambda case=case: _banded(case), op=case.op)


def _banded(case: cases.Case) -> dict:
    expected = case.results()
    with nan_outputs():
        tensors = {k: _in_nans(t) for k, t in case.tensors.items()}
        cotangents = [_in_nans(t) for t in case.cotangents]
        return cases.same_bits(expected, [cases.outputs_and_grads(case.ours, tensors, cotangents)])


def _in_nans(t: Tensor) -> Tensor:
    """A copy inside a buffer of NaN, with a row before and after it and 16 elements left and right of every row.

    Rows have one stride, so no op copies the view. They are aligned, so the kernel is the same.
    """
    width = t.shape[-1]
    buffer = torch.full((t.numel() // width + 2, width + 32), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[1:-1, 16:-16]
    if t.dim() > 1:
        return view.unflatten(0, t.shape[:-1]).copy_(t)
    return view[0].copy_(t)


@contextlib.contextmanager
def nan_outputs() -> Iterator[None]:
    """Makes torch.empty fill its result with NaN, so that an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
