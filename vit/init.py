"""timm's weight initialisation by parameter name, for any model with timm's names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def init_weights(model: nn.Module, seed: int | None = None) -> None:
    """Initialises every parameter of a ViT in place, with the distributions of timm's ``weight_init`` modes.

    ``""``: linear weights and ``pos_embed`` normal, std 0.02; class and register tokens normal, std 1e-6; the patch
    projection as in PyTorch's convolution; LayerNorm weight 1; LayerScale γ ``init_values``; mask token and other
    biases 0.

    The query of attention pooling is normal, std 1/√D, in every mode.

    ``"zeros"``: as ``""``, but class token, register tokens and ``pos_embed`` 0.

    ``"jax"``: as ``""``, but the patch projection and ``pre_logits`` LeCun's truncated normal with bias 0, the head 0,
    other linear weights Xavier's uniform, and biases of the MLPs normal, std 1e-6.

    ``"jax_nlhb"``: as ``"jax"``, but the bias of the head −log(num_classes).

    Args:
        model: a model with timm's parameter names and a `ViTConfig` as ``config``.
        seed: draws the same fp32 numbers on the CPU for every device and dtype, and does not use the global
            generators. None draws on the model's device from the global generator.

    Raises:
        ValueError: no rule covers the name of a parameter.
    """
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    config = model.config
    jax = config.weight_init.startswith("jax")
    head_bias = -math.log(config.num_classes) if config.weight_init == "jax_nlhb" and config.num_classes else 0.0
    patch_bound = math.prod((config.in_chans, *config.patch_size)) ** -0.5

    for name, param in model.named_parameters():
        if param.is_meta:
            continue
        value = param if generator is None else torch.empty(param.shape, device="cpu", dtype=torch.float32)
        module, _, leaf = name.rpartition(".")
        if module == "patch_embed.proj" and not jax:
            nn.init.uniform_(value, -patch_bound, patch_bound, generator=generator)
        elif leaf == "mask_token" or (
            config.weight_init == "zeros" and leaf in ("cls_token", "reg_token", "pos_embed")
        ):
            nn.init.zeros_(value)
        elif leaf in ("cls_token", "reg_token"):
            nn.init.normal_(value, std=1e-6, generator=generator)
        elif leaf == "latent":
            nn.init.normal_(value, std=config.embed_dim**-0.5, generator=generator)
        elif leaf == "gamma":
            nn.init.constant_(value, config.init_values)
        elif leaf == "weight" and value.ndim == 1:
            nn.init.ones_(value)
        elif leaf == "weight" and jax:
            _jax_weight(module, value, generator)
        elif leaf == "pos_embed" or leaf == "weight":
            # timm truncates at ±2, which is 100 std away. But its float arithmetic returns -2 about once in 2^24 draws.
            # A normal distribution avoids that error.
            nn.init.normal_(value, std=0.02, generator=generator)
        elif leaf == "bias" and jax and ".mlp." in name:
            nn.init.normal_(value, std=1e-6, generator=generator)
        elif leaf == "bias":
            nn.init.constant_(value, head_bias if module == "head" else 0.0)
        else:
            raise ValueError(f"no initialisation is known for parameter {name!r} of shape {tuple(param.shape)}")
        if value is not param:
            if hasattr(param, "placements"):  # a DTensor: every rank draws the same numbers and keeps its shard
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
            param.copy_(value)


def _jax_weight(module: str, value: Tensor, generator: torch.Generator | None) -> None:
    if module == "head":
        nn.init.zeros_(value)
    elif module in ("patch_embed.proj", "pre_logits.fc"):
        std = value[0].numel() ** -0.5 / 0.8796256610342398  # the std of a standard normal truncated at ±2
        nn.init.trunc_normal_(value, std=std, a=-2 * std, b=2 * std, generator=generator)
    else:
        nn.init.xavier_uniform_(value, generator=generator)
