"""Position embedding of another grid, patch dropout, and indices of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.config import ViTConfig


def take_indices(depth: int, indices: int | Iterable[int] | None) -> set[int]:
    """The indices of blocks as a set. None means all blocks, an integer n the last n; negative ones count from the end.

    Raises:
        ValueError: an index is out of range, or there is none.
        TypeError: an index is not an integer.
    """
    if indices is None:
        return set(range(depth))
    if isinstance(indices, Tensor):
        indices = indices.tolist()
    last = isinstance(indices, str) or not isinstance(indices, Iterable)
    chosen = [index.item() if isinstance(index, Tensor) else index for index in ([indices] if last else indices)]
    for index in chosen:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(f"block indices must be integers, got {index!r}")
    if last:
        if not 1 <= chosen[0] <= depth:
            raise ValueError(f"the last {indices} blocks of {depth} cannot be taken; use 1 to {depth}")
        return set(range(depth - chosen[0], depth))
    for index in chosen:
        if not -depth <= index < depth:
            raise ValueError(f"block index {index} is out of range; use {-depth} to {depth - 1}")
    if not chosen:
        raise ValueError("no block index given; use None for all")
    return {int(index) % depth for index in chosen}


def resize_pos_embed(pos: Tensor, config: ViTConfig, grid: tuple[int, int]) -> Tensor:
    """Resizes the position embedding to another grid: bicubic interpolation as two matrix products.

    The bicubic kernel is separable. Matrix products have a deterministic backward; CUDA's bicubic interpolation does
    not.
    """
    if grid == config.grid_size:
        return pos
    prefix = pos.shape[1] - config.num_patches
    wide = pos.to(torch.promote_types(pos.dtype, torch.float32))
    rows, columns = (
        _bicubic_matrix(old, new, config.interpolation, wide) for old, new in zip(config.grid_size, grid, strict=True)
    )
    table = wide[0, prefix:].unflatten(0, config.grid_size)  # [gh, gw, D]
    resized = torch.einsum("ha,wb,abd->hwd", rows, columns, table).flatten(0, 1)  # [new_gh·new_gw, D]
    return torch.cat([pos[:, :prefix], resized[None].to(pos.dtype)], dim=1)


def _bicubic_matrix(old: int, new: int, interpolation: str, like: Tensor) -> Tensor:
    """[new, old]: the weights of F.interpolate's bicubic mode along one axis."""
    # The columns of this image are the basis vectors, so only its height is resized. An image one pixel wide with
    # ``old`` channels would be simpler, but PyTorch 2.13 resizes its channels wrongly with antialias.
    basis = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    # As a scale factor, because the 0.1 must also move the sampling points.
    offset = interpolation == "bicubic_offset"
    target = {"scale_factor": ((new + 0.1) / old, 1.0)} if offset else {"size": (new, old)}
    smooth = interpolation == "bicubic_antialias"
    return F.interpolate(basis, mode="bicubic", align_corners=False, antialias=smooth, **target)[0, 0]


def pixel_mask(mask: Tensor, grid: Sequence[int], patch_size: tuple[int, int]) -> Tensor:
    """A mask of patches [B, N] as one of pixels [B, 1, H, W]."""
    rows = mask.unflatten(1, grid).repeat_interleave(patch_size[0], 1)
    return rows.repeat_interleave(patch_size[1], 2).unsqueeze(1)


class PatchDrop(nn.Module):
    """In training, keeps the prefix tokens and a random subset of each image's patches (Li et al., 2023).

    Like timm's PatchDropout, it keeps at least one patch, in random order, and uses PyTorch's generator of the device.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.prefix = config.num_prefix_tokens
        # A string: torch.compile may turn a float attribute into a symbol, and no shape can depend on that symbol.
        self.share = repr(1.0 - config.patch_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, prefix + N, D] -> [B, prefix + kept, D]."""
        if not self.training or self.share == "1.0":
            return x
        B, N, D = x.shape[0], x.shape[1] - self.prefix, x.shape[2]
        count = max(1, int(N * float(self.share)))
        patches = torch.randn(B, N, device=x.device).argsort(dim=1)[:, :count] + self.prefix
        kept = torch.cat([torch.arange(self.prefix, device=x.device).expand(B, -1), patches], dim=1)
        # Each token is taken at most once, so the backward adds no two gradients and is deterministic.
        return x.gather(1, kept[:, :, None].expand(-1, -1, D))
