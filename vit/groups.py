"""Which parameters an optimiser treats alike: layer-wise learning rates, and those that do not decay.

The words and the grouping are those of timm's ``param_groups_layer_decay``, which takes our models, too.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vit.config import ViTConfig

NO_WEIGHT_DECAY = frozenset({"cls_token", "reg_token", "mask_token", "pos_embed"})
#: In timm's format. Layers count in the order stem, blocks, the rest; 99999 joins what matches to the layer before it.
MATCHER = {
    "stem": r"^(?:cls_token|reg_token|mask_token|pos_embed|patch_embed|norm_pre)",
    "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
}


def param_groups_layer_decay(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.75
) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, with ``lr_scale`` = layer_decay ** (layers above) (Bao et al., BEiT, 2022).

    The stem is the first layer, each block one, the last together with the final norm, and the head (with ``fc_norm``)
    the last, whose scale is 1. What has one dimension, tokens and position embedding do not decay. Frozen parameters
    are left out.

    Args:
        model: a VisionTransformer of this package, fast or reference.
        weight_decay: of the others.
        layer_decay: in (0, 1]; 1 leaves the learning rate alike everywhere.

    Returns:
        Dictionaries with ``params``, ``lr_scale`` and ``weight_decay``. PyTorch's optimisers ignore ``lr_scale``: a
        schedule multiplies it in (timm's do), or ``group["lr"] = base_lr * group["lr_scale"]``.

    Raises:
        ValueError: layer_decay is outside (0, 1]. TypeError: another kind of model.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile puts that name before every parameter's
    if not isinstance(getattr(model, "config", None), ViTConfig):
        kind = type(model).__name__
        raise TypeError(
            f"param_groups_layer_decay needs a VisionTransformer of this package, got {kind}; unwrap it first"
        )
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1")
    layers = {name: _layer(name, model.config.depth) for name, _ in model.named_parameters()}
    last = max(layers.values())
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decays = param.ndim > 1 and name not in NO_WEIGHT_DECAY
        scale = layer_decay ** (last - layers[name])
        group = {"params": [], "lr_scale": scale, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((layers[name], decays), group)["params"].append(param)
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    """0 for the stem, 1 to depth for the blocks, depth + 1 for the head."""
    if re.match(MATCHER["stem"], name):
        return 0
    block = re.match(r"^blocks\.(\d+)", name)
    if block:
        return int(block[1]) + 1
    return depth if name.startswith("norm.") else depth + 1
