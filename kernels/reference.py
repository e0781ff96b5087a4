"""Eager PyTorch formula of each op: the specification, the CPU path and the tests' oracle.

Differentiable to any order, any floating dtype, any device. Imports no kernel code: an oracle must be able to disagree.
Shapes are those of the public functions of the same name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    image: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None = None, prefix: Tensor | None = None
) -> Tensor:
    """Non-overlapping patches times weight, plus bias; prefix tokens in front; plus position embedding.

    image [B, C, H, W], weight [D, C, PH, PW], bias [D], prefix [1, R, D], pos_embed [1, R + N, D] or [1, N, D] (then
    the prefix tokens get none) -> [B, R + N, D], patches in row-major order of the grid.
    """
    batch, channels, height, width = image.shape
    dim, _, ph, pw = weight.shape
    patches = image.reshape(batch, channels, height // ph, ph, width // pw, pw)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C·PH·PW]
    tokens = F.linear(patches, weight.reshape(dim, -1), bias)
    if pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(batch, -1, -1), tokens], dim=1)
    if pos_embed is not None and prefix is not None and pos_embed.shape[1] == tokens.shape[1]:
        tokens = tokens + pos_embed
    return tokens


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias over the last dimension; var is the biased variance."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def residual_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """stream = residual + row_scale · gamma · branch, y = layer_norm(stream); y has the dtype of branch."""
    if gamma is not None:
        branch = branch * gamma.to(branch.dtype)
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype).reshape(-1, *[1] * (branch.dim() - 1))
    stream = residual + branch
    if stream.dtype == weight.dtype:
        return stream, layer_norm(stream, weight, bias, eps).to(branch.dtype)
    # A wide residual stream with narrow branches and parameters: normalise in the wide type, then narrow.
    wide_bias = None if bias is None else bias.to(stream.dtype)
    return stream, layer_norm(stream, weight.to(stream.dtype), wide_bias, eps).to(branch.dtype)


def gelu(x: Tensor, activation: str) -> Tensor:
    """x·Φ(x), exact for "gelu"; the tanh approximation of Hendrycks & Gimpel (2016) for "gelu_tanh"."""
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """x [..., K] @ weight [N, K]ᵀ + bias [N], then the activation."""
    y = F.linear(x, weight, bias)
    return y if activation is None else gelu(y, activation)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    """fc2(gelu(fc1(x)))."""
    return F.linear(gelu(F.linear(x, fc1_weight, fc1_bias), activation), fc2_weight, fc2_bias)


def attention_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v per head, bidirectional.

    q [B, NQ, H, E], k and v [B, NK, H, E] -> output [B, NQ, H·E] and the natural-log logsumexp [B, H, NQ] (fp32, or
    fp64 for fp64 inputs). scale defaults to 1/sqrt(E).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    out = torch.einsum("bhqk,bkhe->bqhe", logits.softmax(dim=-1), v)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return out.flatten(2), logits.to(wide).logsumexp(dim=-1)


def attention(qkv: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`attention_qkv` of packed qkv [B, N, 3, H, E]."""
    return attention_qkv(*qkv.unbind(dim=2), scale)
