"""From a name to a model."""

from __future__ import annotations

import os
from typing import Any

import torch

from vit.config import get_config
from vit.model import VisionTransformer
from vit.weights import load_pretrained


def create_model(
    name: str,
    *,
    pretrained: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Creates a named variant, e.g. ``create_model("vit_base_patch16_224", num_classes=10)``.

    Args:
        name: timm's name, one of `vit.list_models`.
        pretrained: path or hub name of a checkpoint, as for `vit.load_pretrained`; None means random weights.
        seed: seed of random weights; None draws from torch's global generator.
        device: device of the parameters.
        dtype: dtype of the parameters.
        **overrides: any field of `ViTConfig`, e.g. ``img_size=(96, 80)``, ``depth=1``, ``impl="triton"``.

    Raises:
        ValueError: the name is unknown (the message suggests the nearest), or a value is invalid.
        TypeError: an override is not a field of `ViTConfig`, or ``pretrained`` is True or False.
        CheckpointError: as for `vit.load_pretrained`.
        FileNotFoundError: as for `vit.load_pretrained`.
    """
    if isinstance(pretrained, bool):
        raise TypeError(
            f"pretrained={pretrained} names no weights; write pretrained=PATH or pretrained='owner/name' (on the "
            "Hugging Face hub), or leave it out for random weights"
        )
    if pretrained is not None:
        return load_pretrained(name, pretrained, device=device, dtype=dtype, **overrides)
    return VisionTransformer(get_config(name, **overrides), seed, device=device, dtype=dtype)
