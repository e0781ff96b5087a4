"""The models of the experiments, and what one training image costs.

Shapes: B images, C channels, N = GH x GW patches, D = embed_dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from vit.config import ViTConfig
from vit.model import VisionTransformer
from vit.training.resnet import SmallResNet
from vit.training.start import small

POSITIONS = ("none", "1-D", "2-D", "sin-cos")
PATCHES = ("in place", "fixed permutation", "random per image")


@dataclasses.dataclass(frozen=True)
class Model:
    """What determines a model except its seed."""

    kind: str = "vit"  # or "resnet"
    positions: str = "1-D"  # of the ViT: one of POSITIONS
    pool: str = "token"  # of the ViT: "token", or "avg" without a class token
    patches: str = PATCHES[0]  # how each image's patches are shuffled before the model
    img_size: tuple[int, int] = (28, 28)
    patch_size: tuple[int, int] = (4, 4)


def build(model: Model, channels: int, classes: int, seed: int, impl: str = "auto") -> nn.Module:
    """Makes a model with new weights. They and the fixed permutation depend on ``seed`` alone."""
    if model.kind == "resnet":
        made: nn.Module = SmallResNet(classes, channels, seed=seed)
    else:
        pooling = {"class_token": model.pool == "token", "global_pool": model.pool}
        fields = {"in_chans": channels, "num_classes": classes, "weight_init": "jax", "impl": impl} | pooling
        config = small(None, fields | {"img_size": model.img_size, "patch_size": model.patch_size})
        made = VisionTransformer(config, seed)
        set_positions(made, model.positions)
    return made if model.patches == PATCHES[0] else Shuffled(made, model, seed)


def training_flops(model: Model, channels: int, classes: int) -> float:
    """FLOPs of forward and backward for one image, as PyTorch's counter counts them: products only."""
    made = build(model, channels, classes, 0, "reference").train()
    with FlopCounterMode(display=False) as counter:
        made(torch.zeros(2, channels, *model.img_size)).sum().backward()
    return counter.get_total_flops() / 2


@torch.no_grad()
def set_positions(model: VisionTransformer, positions: str) -> None:
    """Replaces the position embedding, in place.

    "none" is 0. "1-D" is what `VisionTransformer` has: one learned vector for each token. "2-D" is the paper's (D.4):
    D/2 learned numbers for the row of a patch beside D/2 for its column. "sin-cos" is fixed, see `sin_cos`.
    """
    config = model.config
    if positions == "2-D":
        parametrize.register_parametrization(model, "pos_embed", _Grid(config))
    elif positions != "1-D":
        table = torch.zeros_like(model.pos_embed)
        if positions == "sin-cos":
            table[0, -config.num_patches :] = sin_cos(*config.grid_size, config.embed_dim)
        model.pos_embed.copy_(table).requires_grad_(False)


def sin_cos(rows: int, columns: int, dim: int) -> Tensor:
    """Fixed embedding [rows · columns, dim]: sin and cos of the row, then of the column, at dim/4 frequencies each.

    The frequencies fall from 1 towards 1/10,000 per patch, as in MoCo v3 and MAE.
    """
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], 1).float()


class _Grid(nn.Module):
    """Parametrisation of ``pos_embed`` [1, R + N, D] by R vectors, GH rows and GW columns.

    They are stored with one dimension, because such parameters have no weight decay, as ``pos_embed`` has none.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.grid, self.dim = config.grid_size, config.embed_dim

    def forward(self, prefix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        (height, width), half = self.grid, self.dim // 2
        rows, columns = rows.view(height, 1, half), columns.view(1, width, half)
        patches = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], 2)
        return torch.cat([prefix.view(-1, self.dim), patches.flatten(0, 1)])[None]

    def right_inverse(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Initial values with the distribution of ``table``."""
        count, half = math.prod(self.grid), self.dim // 2
        prefix, patches = table[0, :-count], table[0, -count:].unflatten(0, self.grid)
        return tuple(part.clone().flatten() for part in (prefix, patches[:, 0, :half], patches[0, :, half:]))


class Shuffled(nn.Module):
    """A model that sees the patches of each image in another order, in training and in evaluation.

    Args:
        model: the model, from images to logits.
        how: ``patches``, ``img_size`` and ``patch_size``. A random order is drawn from PyTorch's global generator.
        seed: decides the fixed order.
    """

    order: Tensor

    def __init__(self, model: nn.Module, how: Model, seed: int) -> None:
        super().__init__()
        self.model, self.how = model, how
        count = math.prod(n // p for n, p in zip(how.img_size, how.patch_size, strict=True))
        self.register_buffer("order", torch.randperm(count, generator=torch.Generator().manual_seed(seed)))

    def forward(self, images: Tensor) -> Tensor:
        order = self.order.expand(len(images), -1)  # [B, N]
        if self.how.patches == PATCHES[2]:
            order = torch.rand(order.shape, device=images.device).argsort(1)
        return self.model(permute_patches(images, self.how.patch_size, order))


def permute_patches(images: Tensor, patch_size: tuple[int, int], order: Tensor) -> Tensor:
    """Puts patch ``order[b, n]`` of image b [B, C, H, W] at place n. ``order`` is int64 [B, N]."""
    grid = [n // p for n, p in zip(images.shape[2:], patch_size, strict=True)]
    split = images.unflatten(2, (grid[0], patch_size[0])).unflatten(4, (grid[1], patch_size[1]))
    patches = split.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, N, C, P, P]
    patches = patches[torch.arange(len(images), device=order.device)[:, None], order]
    return patches.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
