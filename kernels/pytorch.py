"""Attention by PyTorch's fused operator of a CPU: what ``impl="auto"`` runs on a CPU instead of the formula.

Shapes and arguments are those of `reference`, and so are the derivatives to any order. Saved: q, k, v, o and the
logsumexp. PyTorch's operator has no second derivative, so a backward that is differentiated itself is the formula's.
The formula also computes what the operator does not: dropout by seed, the logsumexp, torch.func and forward-mode AD;
and gradients in 16 bits, where the operator's exceed the limits of `vit.testing.policy`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from . import reference, runtime

_aten = torch.ops.aten
_MATH = 0  # torch.nn.attention.SDPBackend.MATH: it stores the probabilities, as the formula does


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), scale=scale)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.scale = scale
        return o.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = functools.partial(reference.attention, scale=ctx.scale)
            return *torch.func.vjp(formula, q, k, v)[1](do), None
        do, q, k, v = _heads_first(do.unflatten(2, q.shape[2:]), q, k, v)
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, False, scale=ctx.scale
        )
        return *_heads_first(*grads), None


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    heads = _heads_first(q, k, v)
    more = options["return_lse"] or options["dropout_p"] > 0.0 or forward_ad._current_level >= 0
    needs_grad = runtime.needs_grad(q, k, v)
    fits = q.device.type == "cpu" and not more and not (needs_grad and q.dtype in runtime.HALF)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if fits and not traced:
        fits = not _observed(q, k, v) and torch._fused_sdp_choice(*heads, scale=scale) != _MATH
    if not fits:
        return reference.attention(q, k, v, scale=scale, **options)
    if traced or not needs_grad:
        return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(2)
    return _Attention.apply(q, k, v, scale)


def attention_qkvpacked(qkv: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    return attention(*qkv.unbind(dim=2), **options)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, N, HEADS, HEAD_DIM] each -> [B, HEADS, N, HEAD_DIM], or back."""
    return [t.transpose(1, 2) for t in tensors]


def _observed(*tensors: Tensor) -> bool:
    """Whether more than autograd follows the operators: a tensor's class, a mode such as a counter, or torch.func."""
    return (
        any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.get_dynamic_layer_stack_depth() > 0
    )
