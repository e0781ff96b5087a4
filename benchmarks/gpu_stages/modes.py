"""The same bits on another stream, from a CUDA graph, with checkpointing, and compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from benchmarks.gpu_stages import cases
from benchmarks.log import Log
from vit.cuda_graph import Graph, capture, graph
from vit.testing import relative_error

IMPLS = ("triton", "auto")  # our kernel runs every product; cuBLAS runs plain ones


def streams(log: Log, rehearse: bool) -> None:
    """Every op runs on a side stream that writes its inputs late. A kernel on another stream would read NaN."""
    device = cases.device(rehearse)
    for case in cases.op_cases(device, rehearse):
        log.attempt(functools.partial(_on_side_stream, case, device), op=case.op)


def _on_side_stream(case: cases.Case, device: torch.device) -> dict:
    expected = case.results()
    late = {k: torch.full_like(t, float("nan")) for k, t in case.tensors.items()}
    if device.type == "cpu":
        for k, t in late.items():
            t.copy_(case.tensors[k])
        return cases.same_bits(expected, [case.results(tensors=late)])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles, about 50 ms, longer than all launches
        for k, t in late.items():
            t.copy_(case.tensors[k])
        found = case.results(tensors=late)
    torch.cuda.current_stream().wait_stream(side)
    return cases.same_bits(expected, [found])


def graphs(log: Log, rehearse: bool) -> None:
    """A small ViT is captured once and replayed with other images: forward, forward + backward, and `vit.graph`."""
    device = cases.device(rehearse)
    for impl in IMPLS:
        for mode in ("fwd", "full"):
            log.attempt(functools.partial(_replayed, device, rehearse, impl, mode), op="vit", impl=impl, mode=mode)
        log.attempt(functools.partial(_through_vit_graph, device, rehearse, impl), op="vit.graph", impl=impl)


def _replayed(device: torch.device, rehearse: bool, impl: str, mode: str) -> dict:
    model, image, cotangent = cases.small_model(device, rehearse, impl)
    others = [torch.randn_like(image) for _ in range(1 if rehearse else 3)]

    def run(x: Tensor) -> list[Tensor]:
        if mode == "fwd":
            with torch.no_grad():
                return [model(x)]
        return cases.model_results(model, x, cotangent)

    static = image.clone()
    run_static = functools.partial(run, static)
    replay = run_static if rehearse else capture(run_static, device)
    records = []
    for other in others:
        static.copy_(other)
        found = [t.clone() for t in replay()]
        records.append(cases.same_bits(run(other), [found]))
    return next((r for r in records if not r["ok"]), records[0]) | {"times": len(records)}


def _through_vit_graph(device: torch.device, rehearse: bool, impl: str) -> dict:
    """The next replay does not change the result of a call."""
    model, image, _ = cases.small_model(device, rehearse, impl)
    others = [torch.randn_like(image) for _ in range(2)]
    with torch.no_grad():
        expected = [model.eval()(x) for x in others]
    run = Graph(model, (image,), {}, lambda run, device: run) if rehearse else graph(model, image)
    return cases.same_bits(expected, [[run(x) for x in others]])


def checkpoint(log: Log, rehearse: bool) -> None:
    """The backward recomputes every block, with both kinds of `torch.utils.checkpoint`."""
    device = cases.device(rehearse)
    for impl in IMPLS:
        for reentrant in (True, False):
            run = functools.partial(_checkpointed, device, rehearse, impl, reentrant)
            log.attempt(run, op="vit", impl=impl, use_reentrant=reentrant)


def _checkpointed(device: torch.device, rehearse: bool, impl: str, reentrant: bool) -> dict:
    model, image, cotangent = cases.small_model(device, rehearse, impl)
    calls: list[object] = []  # of the forwards of blocks, also recomputed ones
    for block in model.blocks:
        block.forward = functools.partial(_counted, block.forward, calls)  # makes the last block compute all tokens
    expected = cases.model_results(model, image, cotangent)
    calls.clear()
    for block in model.blocks:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=reentrant)
    image = image.clone().requires_grad_()
    out = model(image)
    out.backward(cotangent)  # the reentrant kind does not support autograd.grad
    found = [out.detach(), image.grad, *(p.grad for p in model.parameters())]
    record = cases.same_bits(expected, [found])
    again = len(calls) - len(model.blocks)
    return record | {"ok": record["ok"] and again == len(model.blocks), "recomputed_blocks": again}


def _counted(forward: Callable, calls: list[object], *args: object) -> object:
    calls.append(None)
    return forward(*args)


def compiled(log: Log, rehearse: bool) -> None:
    """torch.compile without a graph break. With ``impl="triton"`` the bits do not change.

    With ``impl="auto"`` Inductor chooses the plain products, so there the error is compared, not the bits.
    """
    device = cases.device(rehearse)
    runs = [("aot_eager", "triton"), ("inductor", "triton"), ("inductor", "auto")]
    for backend, impl in runs[:1] if rehearse else runs:
        log.attempt(functools.partial(_compiled, device, rehearse, backend, impl), op="vit", backend=backend, impl=impl)


def _compiled(device: torch.device, rehearse: bool, backend: str, impl: str) -> dict:
    torch._dynamo.reset()
    model, image, cotangent = cases.small_model(device, rehearse, impl)
    expected = cases.model_results(model, image, cotangent)
    model.compile(fullgraph=True, backend=backend)
    found = cases.model_results(model, image, cotangent)
    record = cases.same_bits(expected, [found])
    error = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
    if (backend, impl) == ("inductor", "auto"):
        record["ok"] = record["finite"] and error < 0.03
    return record | {"error_rms": error}
