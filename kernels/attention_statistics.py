"""Statistics of attention probabilities, without their matrix: where each query looks, and how sharply.

For a query i and keys j, with s = scale · q_i · k_j and p = exp(s − max s) / Σ exp(s − max s):
    distance = Σ_patches p · |place_i − place_j|,  patch_mass = Σ_patches p,  prefix_mass = Σ_prefix p,
    entropy = −Σ p · log p,  max_logit = max s,  and of a key j: received = mean over i of p
The entropy is not computed as lse − Σ p · s: for large logits that loses the digits that it needs (3e-5 in fp32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .autocast import autocasts
from .checks import check_floating, check_heads, check_scale
from .reference import AttentionStatistics

TILE_BYTES = 2**22  # of one tile of logits in plain PyTorch


@torch.no_grad()
@autocasts()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    grid_size: tuple[int, int],
    num_prefix_tokens: int = 0,
    patch_size: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
    received: bool = False,
    saved: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> AttentionStatistics:
    """Statistics of softmax(scale · q kᵀ) per head; no gradient.

    The tokens are ``num_prefix_tokens`` prefix tokens (class token, registers) and then the patches of the grid, row by
    row.

    Args:
        q: [B, N, H, E], any strides.
        k: [B, N, H, E], likewise, in the dtype of ``q``.
        grid_size: (rows, columns) of patches.
        num_prefix_tokens: tokens before the patches. N is their number plus the patches.
        patch_size: (height, width) of a patch: the unit of the distances. (1, 1) counts patches.
        scale: of the logits, positive; 1/sqrt(E) if None, as in `attention`.
        received: also return what each key receives.
        saved: m and log l [B, H, N] of the same q and k, as `vit::attention_fwd` saves them; computed if None.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        `AttentionStatistics` of [B, H, N] tensors, fp32, or fp64 for fp64 inputs; ``received`` is None if not
        asked for.

    Raises:
        ValueError: shapes that do not fit, unknown impl. TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "attention_statistics"
    check_floating(op, q=q, k=k)
    check_heads(op, q, k=k)
    tokens = num_prefix_tokens + grid_size[0] * grid_size[1]
    if not q.shape[1] == k.shape[1] == tokens:
        raise ValueError(
            f"{op}: {num_prefix_tokens} prefix tokens and {grid_size[0]} x {grid_size[1]} patches are {tokens} tokens, "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    options = {
        "grid_size": grid_size,
        "num_prefix_tokens": num_prefix_tokens,
        "patch_size": patch_size,
        "scale": check_scale(op, scale, q.shape[-1]),
    }
    return _in_tiles(q, k, received, options)


def _in_tiles(q: Tensor, k: Tensor, received: bool, options: dict) -> AttentionStatistics:
    """The reference, for a few queries of one image at a time."""
    B, N, HEADS, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    step = max(1, TILE_BYTES // (HEADS * N * wide.itemsize)) if N and HEADS else 1
    found = [q.new_empty(B, HEADS, N, dtype=wide) for _ in range(5)]
    mass = q.new_zeros(B, HEADS, N, dtype=wide) if received else None
    for b in range(B):
        for start in range(0, N, step):
            tile = q[b : b + 1, start : start + step]
            part = reference.attention_statistics(tile, k[b : b + 1], received=received, first_query=start, **options)
            for whole, some in zip(found, part, strict=False):
                whole[b, :, start : start + step] = some[0]
            if mass is not None:
                mass[b] += part.received[0] * (tile.shape[1] / N)
    return AttentionStatistics(*found, mass)
