"""Parameter groups for an optimiser: layer-wise learning rates and weight decay.

Names and groups are those of timm's ``param_groups_layer_decay``, which also accepts the models of this package.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vit.config import ViTConfig

NO_WEIGHT_DECAY = frozenset({"cls_token", "reg_token", "mask_token", "pos_embed"})
#: In timm's format. The order of the layers is stem, blocks, the rest. 99999 puts a match into the previous layer.
MATCHER = {
    "stem": r"^(?:cls_token|reg_token|mask_token|pos_embed|patch_embed|norm_pre)",
    "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))],
}


def param_groups_layer_decay(
    model: nn.Module, weight_decay: float = 0.05, layer_decay: float = 0.75
) -> list[dict[str, Any]]:
    """Parameter groups with ``lr_scale`` = layer_decay ** (number of later layers) (Bao et al., BEiT, 2022).

    The first layer is the stem. Each block is a layer, and the final norm belongs to the last block. The last layer is
    the head with ``fc_norm``; its scale is 1. Tokens, position embedding and parameters with one dimension have no
    weight decay. Frozen parameters are in no group.

    Args:
        model: a VisionTransformer of this package, fast or reference.
        weight_decay: weight decay of the other parameters.
        layer_decay: in (0, 1]; 1 means the same learning rate everywhere.

    Returns:
        Dictionaries with ``params``, ``lr_scale`` and ``weight_decay``. PyTorch's optimisers ignore ``lr_scale``, but
        timm's schedulers apply it. Otherwise set ``group["lr"] = base_lr * group["lr_scale"]``.

    Raises:
        ValueError: layer_decay is outside (0, 1].
        TypeError: the model is not a VisionTransformer of this package.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile prefixes the names of parameters
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
