"""Eager PyTorch formula of each op: the specification, the tests' oracle and, attention aside, the CPU path.

Differentiable to any order, any floating dtype, any device. Imports no kernel code: an oracle must be able to disagree.
Shapes and arguments are those of the op of the same name, without ``impl``; here a dropout needs its seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def philox(seed: Tensor, counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """The four words of Philox-4x32-10 (Salmon et al., SC 2011) in int64 arithmetic.

    seed: int64 of one element, the key. counter: four words of 32 bits as int64, broadcast against each other.
    """
    low, high = 0xFFFFFFFF, 32

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """(high, low) word of a · b, from products below 2⁶³."""
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        total = upper + (lower >> 16)
        return total >> 16, (total << 16 | lower & 0xFFFF) & low

    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=seed.device) for c in counter))
    k0, k1 = seed & low, (seed >> high) & low
    for _ in range(10):
        (h0, l0), (h1, l1) = multiply(0xD2511F53, c0), multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def dropout_words(seed: Tensor, offset: int, rows: Tensor, width: int) -> Tensor:
    """The random numbers of dropout below 2³² for some rows of a matrix of this width, [rows, width].

    A function of (seed, offset, row, column) alone: that of column c is word c % 2 + 2 · (c // 8 % 2) of `philox` with
    the counter (4 · (c // 16) + c // 2 % 4, low and high half of row, offset).
    """
    rows, fours = rows[:, None], torch.arange(4 * -(-width // 16), device=seed.device)[None, :]
    words = torch.stack(philox(seed.reshape(()), (fours, rows & 0xFFFFFFFF, rows >> 32, offset)))
    words = words.unflatten(0, (2, 2)).unflatten(3, (-1, 4))  # [c // 8 % 2, c % 2, row, c // 16, c // 2 % 4]
    return words.permute(2, 3, 0, 4, 1).flatten(1)[:, :width]


def dropout_scale(seed: Tensor, offset: int, shape: torch.Size, p: float) -> Tensor:
    """What dropout multiplies each element of a tensor by, 1/(1 − p) or 0 (fp64): rows are all dimensions but the last.

    It is 0 where the random number of `dropout_words` is below p · 2³².
    """
    rows = torch.arange(math.prod(shape[:-1]), device=seed.device)
    words = dropout_words(seed, offset, rows, shape[-1]).reshape(shape)
    return (words >= int(p * 2**32)).to(torch.float64) / (1.0 - p)


def dropout(x: Tensor, p: float, seed: Tensor | None = None, offset: int = 0) -> Tensor:
    """x times `dropout_scale`, rounded once; x itself for p = 0."""
    if p == 0.0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * dropout_scale(seed, offset, x.shape, p).to(wide)).to(x.dtype).contiguous()


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mask_token: Tensor | None = None,
    bool_masked_pos: Tensor | None = None,
) -> Tensor:
    """Non-overlapping patches times weight, plus bias; prefix tokens in front; plus position embedding.

    image [B, C, H, W], weight [D, C, PH, PW], bias [D], prefix [1, R, D], pos_embed [1, R + N, D] or [1, N, D] (then
    the prefix tokens get none), mask_token [1, 1, D] instead of the patches where bool_masked_pos [B, N] is true
    -> [B, R + N, D], patches in row-major order of the grid.
    """
    batch, channels, height, width = image.shape
    dim, _, ph, pw = weight.shape
    patches = image.reshape(batch, channels, height // ph, ph, width // pw, pw)
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N, C·PH·PW]
    if bool_masked_pos is not None:  # before the product, whose gradient would multiply the pixels by 0
        patches = patches.masked_fill(bool_masked_pos.unsqueeze(2), 0.0)
    tokens = F.linear(patches, weight.reshape(dim, -1), bias)
    return assemble_tokens(tokens, pos_embed, prefix, mask_token=mask_token, bool_masked_pos=bool_masked_pos)


def assemble_tokens(
    tokens: Tensor,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mask_token: Tensor | None = None,
    bool_masked_pos: Tensor | None = None,
) -> Tensor:
    """What `patch_embed` does with the projected patches [B, N, D]: mask token, prefix tokens, position embedding."""
    if bool_masked_pos is not None:
        tokens = torch.where(bool_masked_pos.unsqueeze(2), mask_token, tokens)
    of_patches = pos_embed is not None and pos_embed.shape[1] == tokens.shape[1]
    if of_patches:
        tokens = tokens + pos_embed
    if prefix is not None:
        tokens = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    return tokens if pos_embed is None or of_patches else tokens + pos_embed


class ResidualLayerNorm(NamedTuple):
    """The residual stream, and the LayerNorm of it. Both have one shape: use the names."""

    stream: Tensor
    y: Tensor


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias over the last dimension; var is the biased variance.

    In the widest dtype of the three.
    """
    for t in (weight, bias):
        x = x if t is None else x.to(torch.promote_types(x.dtype, t.dtype))
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def residual_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
) -> ResidualLayerNorm:
    """stream = residual + row_scale · gamma · dropout(branch + branch_bias), y = layer_norm(stream).

    y has the dtype of branch.
    """
    dtype = branch.dtype
    if branch_bias is not None:
        branch = branch + branch_bias
    branch = dropout(branch, dropout_p, seed, offset)
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype).reshape(-1, *[1] * (branch.dim() - 1))
    stream = residual + branch.to(residual.dtype)
    return ResidualLayerNorm(stream, layer_norm(stream, weight, bias, eps).to(dtype))


def gelu(x: Tensor, activation: str) -> Tensor:
    """x·Φ(x), exact for "gelu"; the approximations of Hendrycks & Gimpel (2016) by tanh and by σ(1.702·x)."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
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
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """fc2(dropout(gelu(fc1(x))))."""
    act = gelu(F.linear(x, fc1_weight, fc1_bias), activation)
    return F.linear(dropout(act, dropout_p, seed, offset), fc2_weight, fc2_bias)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """dropout(softmax(scale · q kᵀ)) v per head, bidirectional.

    q [B, NQ, H, E], k and v [B, NK, H, E] -> output [B, NQ, H·E] and, if asked for, the natural-log logsumexp
    [B, H, NQ] (fp32, or fp64 for fp64 inputs; no gradient). scale defaults to 1/sqrt(E).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bqhe,bkhe->bhqk", q, k) * scale
    wide = torch.promote_types(q.dtype, torch.float32)
    probs = logits.softmax(dim=-1, dtype=wide).to(q.dtype)  # in fp32 for its backward, as in Hugging Face's ViT
    out = torch.einsum("bhqk,bkhe->bqhe", dropout(probs, dropout_p, seed, offset), v).flatten(2)
    if not return_lse:
        return out
    return out, logits.detach().to(wide).logsumexp(dim=-1)


def attention_qkvpacked(
    qkv: Tensor,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of packed qkv [B, N, 3, H, E], or [B, N, 3·H·E] with ``num_heads``."""
    if num_heads is not None:
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    options = {"scale": scale, "return_lse": return_lse, "dropout_p": dropout_p, "seed": seed, "offset": offset}
    return attention(*qkv.unbind(dim=2), **options)


class AttentionStatistics(NamedTuple):
    """Of each query: where its attention goes, [B, H, NQ]; and of each key: how much it gets, [B, H, NK] or None."""

    distance: Tensor  # Σ over patches of p · |place of the query − place of the key|; 0 for prefix queries
    patch_mass: Tensor  # Σ over patches of p
    prefix_mass: Tensor  # Σ over prefix tokens of p
    entropy: Tensor  # −Σ p log p, in nats
    max_logit: Tensor  # max of scale · q · k
    received: Tensor | None = None  # mean over all queries of p


def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    grid_size: tuple[int, int],
    num_prefix_tokens: int = 0,
    patch_size: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
    received: bool = False,
    first_query: int = 0,
) -> AttentionStatistics:
    """Statistics of p = softmax(scale · q kᵀ) per head, in fp32, or fp64 for fp64 inputs.

    q [B, NQ, H, E], k [B, NK, H, E]. The tokens are the prefix tokens and then the patches of a grid, row by row; q
    has those from ``first_query`` on. A patch is patch_size pixels away from the next one.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = torch.einsum("bqhe,bkhe->bhqk", q.to(wide), k.to(wide)) * scale
    log_p = logits.log_softmax(dim=-1)
    p = log_p.exp()
    index = torch.arange(k.shape[1] - num_prefix_tokens, device=q.device)
    rows, columns = (index // grid_size[1]).to(wide) * patch_size[0], (index % grid_size[1]).to(wide) * patch_size[1]
    places = torch.stack([rows, columns], dim=1)  # [patches, 2]
    distance = logits.new_zeros(q.shape[1], k.shape[1])  # of each key from each query
    of_patches = slice(max(num_prefix_tokens - first_query, 0), None)
    first_patch = max(first_query - num_prefix_tokens, 0)
    some = places[first_patch : first_patch + distance[of_patches].shape[0]]
    distance[of_patches, num_prefix_tokens:] = (some[:, None] - places[None, :]).square().sum(-1).sqrt()
    return AttentionStatistics(
        distance=(p * distance).sum(-1),
        patch_mass=p[..., num_prefix_tokens:].sum(-1),
        prefix_mass=p[..., :num_prefix_tokens].sum(-1),
        entropy=-(p * log_p).sum(-1),
        max_logit=logits.amax(-1) if k.shape[1] else logits.sum(-1),
        received=p.mean(-2) if received else None,
    )
