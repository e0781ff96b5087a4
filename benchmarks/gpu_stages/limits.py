"""Tensors of more than 2³¹ elements, and batches of more than 65,535 heads.

The cotangent is zero except for a few samples of the batch: the first, the last, and those where a 32-bit offset
overflows. So only these determine the gradients, also those of weights, and the reference runs only these.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.gpu_stages import cases
from benchmarks.gpu_stages.exact import nan_outputs
from benchmarks.harness import as_tuple
from benchmarks.log import Log, name_of
from vit.testing import relative_error

# Largest rms error of bf16 results against fp32. One rounding is 0.002, and gradients have several. A sample at a wrong
# address has an error of 1 or more.
LIMIT = 0.02


def heads(log: Log, rehearse: bool) -> None:
    """70,000 heads in a batch exceed the second and third dimension of a grid."""
    rand = functools.partial(torch.randn, device=cases.device(rehearse), dtype=cases.half(rehearse))
    for batch, head_count in ((5, 2), (9, 1)) if rehearse else ((4375, 16), (70_000, 1)):
        tokens, head_dim = (5, 16) if rehearse else (65, 64)
        turn = 2 if rehearse else 65_536 // head_count  # the first sample with a head whose number needs 17 bits
        q, k, v = (rand(batch, tokens, head_count, head_dim) for _ in range(3))
        packed = torch.stack([q, k, v], dim=2)
        for case in (
            cases.Case("attention_qkvpacked", {"qkv": packed}),
            cases.Case("attention", {"q": q, "k": k, "v": v}),
        ):
            log.attempt(
                functools.partial(_check_samples, case, list(case.tensors), [turn - 1, turn]),
                op=case.op, batch=batch, heads=head_count, tokens=tokens, head_dim=head_dim,
            )  # fmt: skip


def large(log: Log, rehearse: bool) -> None:
    """Each op with tensors of more than 2³¹ elements: 2.2·10⁹ in [B, N, D], 6.5·10⁹ in packed qkv."""
    for op in ("layer_norm", "residual_layer_norm", "patch_embed", "attention_qkvpacked", "attention", "linear", "mlp"):
        log.attempt(functools.partial(_large, op, rehearse), op=op)


def _large(op: str, rehearse: bool) -> dict:
    """The shapes of a ViT-B and 14,400 images, for one op at a time, which takes 20 to 45 GB."""
    device = cases.device(rehearse)
    batch, grid, dim, patch = (4, 2, 32, 8) if rehearse else (14_400, 14, 768, 16)
    tokens, head_count = 1 + grid * grid, dim // (16 if rehearse else 64)
    rand = functools.partial(torch.randn, device=device, dtype=cases.half(rehearse))
    x = functools.partial(rand, batch, tokens, dim)
    head = functools.partial(rand, batch, tokens, head_count, dim // head_count)
    tensors = {
        "layer_norm": lambda: {"x": x(), "weight": rand(dim), "bias": rand(dim)},
        "residual_layer_norm": lambda: {
            "residual": x(), "branch": x(), "weight": rand(dim), "bias": rand(dim), "gamma": rand(dim)
        },
        "patch_embed": lambda: {
            "image": rand(batch, 3, grid * patch, grid * patch), "weight": rand(dim, 3, patch, patch) * 0.04,
            "bias": rand(dim), "pos_embed": rand(1, tokens, dim), "prefix": rand(1, 1, dim),
        },
        "attention_qkvpacked": lambda: {"qkv": rand(batch, tokens, 3, head_count, dim // head_count)},
        "attention": lambda: {"q": head(), "k": head(), "v": head()},
        "linear": lambda: {"x": x(), "weight": rand(dim, dim) * dim**-0.5, "bias": rand(dim)},
        "mlp": lambda: {
            "x": x(), "fc1_weight": rand(dim, dim) * dim**-0.5, "fc1_bias": rand(dim),
            "fc2_weight": rand(dim, dim) * dim**-0.5, "fc2_bias": rand(dim),
        },
    }[op]()  # fmt: skip
    case = cases.Case(op, tensors, {"activation": "gelu"} if op == "linear" else {})
    return _check_samples(case, [k for k, t in tensors.items() if t.shape[0] == batch], [])


def _check_samples(case: cases.Case, batched: list[str], also: list[int]) -> dict:
    """Runs the op on all samples, and compares a few with the reference of only these.

    Args:
        case: its ``batched`` tensors and its outputs have samples in their first dimension.
        also: samples to check besides the first, the last and those with element 2³¹ or 2³².
    """
    leaves = {k: t.requires_grad_() for k, t in case.tensors.items()}
    first = leaves[batched[0]]
    if first.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    with nan_outputs():
        outs = as_tuple(case.ours(**leaves))
        sizes = [t[0].numel() for t in (*(leaves[k] for k in batched), *outs)]
        edges = [edge // size for edge in (2**31, 2**32) for size in sizes]
        picks = sorted(i for i in {0, *edges, *also, len(first) - 1} if i < len(first))
        small = [torch.randn((len(picks), *o.shape[1:]), device=o.device, dtype=o.dtype) for o in outs]
        cotangents = [torch.zeros_like(o) for o in outs]
        for cotangent, values in zip(cotangents, small, strict=True):
            for i, value in zip(picks, values, strict=True):
                cotangent[i] = value
        grads = dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), cotangents), strict=True))

    def pick(t: Tensor) -> Tensor:
        return torch.stack([t[i].detach() for i in picks])

    alone = {k: (pick(t) if k in batched else t.detach()).float() for k, t in leaves.items()}
    exact = cases.outputs_and_grads(case.eager, alone, [c.float() for c in small])
    found = [*map(pick, outs), *(pick(g) if k in batched else g for k, g in grads.items())]
    names = [*(f"output {i}" for i in range(len(outs))), *(f"grad {k}" for k in grads)]
    errors = {n: relative_error(a, b) for n, a, b in zip(names, found, exact, strict=True)}
    whole = not any(o.isnan().any().item() for o in outs)
    for k in batched:
        for i in picks:
            grads[k][i] = 0
    zero = not any((grads[k] != 0).any().item() for k in batched)
    worst = max(errors, key=lambda n: errors[n])
    return {
        "ok": all(e < LIMIT for e in errors.values()) and whole and zero,
        "error_rms": errors[worst], "worst": worst, "samples": picks, "whole": whole, "zero_elsewhere": zero,
        "elements": max(t.numel() for t in (*leaves.values(), *outs)), "dtype": name_of(first.dtype),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if first.is_cuda else None,
    }  # fmt: skip
