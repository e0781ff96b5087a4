"""Checks of arguments that several ops share. Each raises an error that names the op, the argument and what it got."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def check_floating(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless every given tensor is a floating-point tensor of the first one's dtype."""
    check_tensors(op, **tensors)
    first: tuple[str, torch.dtype] | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating-point tensor, got {t.dtype}; convert it first")
        if first is None:
            first = (name, t.dtype)
        elif t.dtype != first[1]:
            raise TypeError(f"{op}: {name} is {t.dtype} but {first[0]} is {first[1]}; give both the same dtype")


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Raises TypeError unless each is a tensor or None."""
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")


def check_layer(op: str, source: str, width: int, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raises ValueError unless weight is [N, width], as ``source`` has it, and bias is [N] or None."""
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"{op}: {prefix}weight must have shape [N, {width}] ({source}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {prefix}bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_activation(op: str, activation: str) -> None:
    """Raises ValueError unless the activation is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def check_heads(op: str, q: Tensor, **keys: Tensor) -> None:
    """Raises ValueError unless q is [B, NQ, H, E] and each of ``keys`` is [B, NK, H, E], with NK > 0 if NQ > 0."""
    if q.dim() != 4:
        raise ValueError(f"{op}: q must have shape [B, NQ, H, E], got {tuple(q.shape)}")
    for name, t in keys.items():
        if t.dim() != 4 or t.shape[0] != q.shape[0] or t.shape[2:] != q.shape[2:]:
            raise ValueError(
                f"{op}: {name} must have shape [B, NK, H, E] with B, H, E of q {tuple(q.shape)}, got {tuple(t.shape)}"
            )
        if t.shape[1] == 0 and q.shape[1] > 0:
            raise ValueError(f"{op}: {name} must have at least one token, got {tuple(t.shape)}")


def check_scale(op: str, scale: float | None, head_dim: int) -> float:
    """The scale of the logits, 1/sqrt(head_dim) for None. Raises ValueError unless it is positive and finite."""
    if head_dim == 0:
        raise ValueError(f"{op}: the last dimension must not be empty")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    return scale


def check_dropout(op: str, p: float, seed: Tensor | None, x: Tensor) -> None:
    """Raises unless p is a probability below 1 and the seed None or one int64 number on the device of x.

    With p = 0 the seed is not read and not checked.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {p}")
    if p == 0.0 or seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype is not torch.int64 or seed.numel() != 1:
        got = f"{seed.dtype} {tuple(seed.shape)}" if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"{op}: seed must be an int64 tensor of one element, as dropout_seed(x) returns it, got {got}")
    if seed.device != x.device:
        raise ValueError(f"{op}: all tensors must be on one device, got {x.device} and {seed.device} (seed)")
