"""What happens to the sequence of tokens before the first block: the position embedding's size, and lost patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import ViTConfig


def resize_pos_embed(pos: Tensor, config: ViTConfig, grid: tuple[int, int]) -> Tensor:
    """The position embedding for another grid: bicubic, as two fixed matrix products.

    The bicubic kernel is separable, and the backward of a matrix product is deterministic where that of CUDA's bicubic
    interpolation is not.
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
    """[new, old]: the weights that F.interpolate's bicubic mode gives each of ``old`` values."""
    # An image whose columns are the basis vectors; its width stays. (PyTorch 2.13 resizes the channels of an image one
    # pixel wide wrongly with antialias.)
    basis = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    # The 0.1 also moves the sampling points.
    offset = interpolation == "bicubic_offset"
    target = {"scale_factor": ((new + 0.1) / old, 1.0)} if offset else {"size": (new, old)}
    smooth = interpolation == "bicubic_antialias"
    return F.interpolate(basis, mode="bicubic", align_corners=False, antialias=smooth, **target)[0, 0]


def drop_patches(x: Tensor, rate: float, prefix: int) -> Tensor:
    """Keeps the ``prefix`` tokens of x [B, N, D] and, per image, a random 1 − rate of the patches (Li et al., 2023).

    As timm's PatchDropout does: at least one patch, in random order, drawn from PyTorch's generator of the device.
    """
    B, N, D = x.shape
    count = max(1, int((N - prefix) * (1.0 - rate)))
    patches = torch.randn(B, N - prefix, device=x.device).argsort(dim=1)[:, :count] + prefix
    kept = torch.cat([torch.arange(prefix, device=x.device).expand(B, -1), patches], dim=1)  # [B, prefix + count]
    # Each token is taken at most once, so the scattered gradients never meet and their order does not matter.
    return x.gather(1, kept[:, :, None].expand(-1, -1, D))
