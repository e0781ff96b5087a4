"""Attention probabilities: the dense matrix that the fused kernels never store.

Plain PyTorch computes it from the queries and keys of the fused forward, which stays as it is. The map of a layer takes
B · H · NQ · NK numbers. ``queries`` selects rows of it, for example the class token's. Slices of q and k along the
third dimension select heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .autocast import autocasts
from .checks import check_floating, check_heads, check_scale


@autocasts()
def attention_probs(
    q: Tensor, k: Tensor, *, scale: float | None = None, queries: Sequence[int] | Tensor | None = None
) -> Tensor:
    """softmax(scale · q kᵀ) per head: which keys each query attends to, in fp32 whatever the dtype of q and k.

    Args:
        q: [B, NQ, H, E], any strides. Of packed qkv [B, N, 3, H, E], q and k are ``qkv.unbind(2)[:2]``.
        k: [B, NK, H, E], likewise, in the dtype of ``q``.
        scale: of the logits, positive; 1/sqrt(E) if None, as in `attention`.
        queries: indices of queries, in any order, negative ones from the end; all if None.

    Returns:
        [B, H, NQ, NK], with ``queries`` only their rows; fp32, or fp64 for fp64 inputs. Every row sums to 1: this is
        before the dropout of `attention`. Differentiable to any order.

    Raises:
        ValueError: shapes that do not fit. TypeError: dtypes that do not fit. IndexError: no such query.
    """
    op = "attention_probs"
    check_floating(op, q=q, k=k)
    check_heads(op, q, k=k)
    scale = check_scale(op, scale, q.shape[-1])
    if queries is not None:
        q = q[:, _indices(op, queries, q.shape[1])]
    wide = torch.promote_types(q.dtype, torch.float32)
    return (torch.einsum("bqhe,bkhe->bhqk", q.to(wide), k.to(wide)) * scale).softmax(dim=-1)


def _indices(op: str, queries: Sequence[int] | Tensor, count: int) -> Sequence[int] | Tensor:
    if isinstance(queries, Tensor):
        if queries.dim() != 1 or queries.is_floating_point() or queries.dtype is torch.bool:
            raise TypeError(f"{op}: queries must be a list of indices, got {queries.dtype} {tuple(queries.shape)}")
        return queries
    queries = list(queries)
    for i in queries:
        if not -count <= i < count:  # on a GPU PyTorch's message is an assertion that failed
            raise IndexError(f"{op}: queries has {i}, but there are {count} queries")
    return queries
