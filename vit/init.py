"""timm's default weight initialisation, by parameter name, so that any model with timm's names can use it."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def init_weights(model: nn.Module, seed: int | None = None) -> None:
    """Initialises every parameter of a ViT in place, with the distributions of timm's default mode.

    Linear weights and ``pos_embed``: normal, std 0.02. Class and register tokens: normal, std 1e-6. Patch
    projection: PyTorch's default for a convolution. Norms: 1 and 0. LayerScale γ: ``init_values``. Other biases: 0.

    Args:
        model: has timm's parameter names and a ``config`` with ``init_values``.
        seed: draws the same fp32 numbers on the CPU whatever the model's device and dtype, and leaves the global
            generators alone. None draws on the model's device from the global generator.

    Raises:
        ValueError: a parameter has a name that no rule covers.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    params = dict(model.named_parameters())
    patch_bound = params["patch_embed.proj.weight"][0].numel() ** -0.5

    for name, param in params.items():
        if param.is_meta:
            continue
        value = param if generator is None else torch.empty(param.shape)
        leaf = name.rpartition(".")[2]
        if name.startswith("patch_embed.proj."):
            nn.init.uniform_(value, -patch_bound, patch_bound, generator=generator)
        elif leaf == "pos_embed" or (leaf == "weight" and param.ndim == 2):
            # timm truncates at ±2, which is 100 std away and never reached, except that its float arithmetic returns
            # -2 itself about once in 2^24 draws: a normal distribution is what it means.
            nn.init.normal_(value, std=0.02, generator=generator)
        elif leaf in ("cls_token", "reg_token"):
            nn.init.normal_(value, std=1e-6, generator=generator)
        elif leaf == "gamma":
            nn.init.constant_(value, model.config.init_values)
        elif leaf == "weight":
            nn.init.ones_(value)
        elif leaf in ("bias", "mask_token"):
            nn.init.zeros_(value)
        else:
            raise ValueError(f"no initialisation is known for parameter {name!r} of shape {tuple(param.shape)}")
        if value is not param:
            param.copy_(value)
