"""Look inside the embeddings of a ViT: the filters of the patch projection, and the position embedding.

The pictures of the paper's Fig. 7 (https://arxiv.org/abs/2010.11929). Shapes: D = embed_dim, C channels, PH x PW pixels
of a patch, GH x GW patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.analysis import image_size, patch_projection_of, patch_size_of

POSITIONS = ("pos_embed", "position_embeddings", "pos_embedding")  # ours and timm's, transformers', torchvision's


@torch.no_grad()
def embedding_filters(model: nn.Module, count: int = 28) -> Tensor:
    """The first principal components of the D filters of the patch projection: [count, C, PH, PW], in fp64.

    They are orthonormal, the one with the largest variance first. The sign of a component means nothing: the element
    with the largest magnitude is made positive.

    Raises:
        ValueError: there is no patch projection, or ``count`` is not 1 to the smaller of D and C·PH·PW.
    """
    weight = patch_projection_of(model).weight.detach().double()  # [D, C, PH, PW]
    filters = weight.flatten(1)
    if not 1 <= count <= min(filters.shape):
        raise ValueError(f"count must be 1 to {min(filters.shape)}, the number of components, got {count}")
    components = torch.linalg.svd(filters - filters.mean(0), full_matrices=False).Vh[:count]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return (components * largest.sign()).unflatten(1, weight.shape[1:])


@torch.no_grad()
def position_similarity(model: nn.Module) -> Tensor:
    """Cosine similarity of the position embeddings of each two patches: [GH, GW, GH, GW], in fp64.

    Without the embeddings of prefix tokens. A position embedding that is 0 has similarity 0 with all.

    Raises:
        ValueError: the model has no position embedding, or its grid is unknown.
    """
    table = _position_embedding(model)  # [positions, D]
    grid = _grid_size(model, len(table))
    patches = F.normalize(table[len(table) - math.prod(grid) :].double(), dim=1)
    return (patches @ patches.T).reshape(*grid, *grid)


def _position_embedding(model: nn.Module) -> Tensor:
    for name, param in model.named_parameters():
        if name.rpartition(".")[2] in POSITIONS:
            return param.detach().flatten(0, -2)
    raise ValueError(f"{type(model).__name__} has no position embedding, a parameter named {' or '.join(POSITIONS)}")


def _grid_size(model: nn.Module, positions: int) -> tuple[int, int]:
    """(rows, columns) of the patches among ``positions``; the other positions are those of prefix tokens."""
    size = image_size(model)
    if size is not None:
        grid = tuple(n // side for n, side in zip(size, patch_size_of(model), strict=True))
    else:
        grid = (math.isqrt(positions),) * 2
    if not 0 <= positions - math.prod(grid) < 16:  # more registers than any model has
        raise ValueError(f"{positions} positions are not prefix tokens and {grid[0]} x {grid[1]} patches")
    return grid
