"""The model that a run starts from."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from vit.config import ViTConfig, get_config
from vit.masked import MaskedPatchModel
from vit.model import VisionTransformer
from vit.training.data import Data
from vit.training.errors import TrainingError
from vit.training.options import Options
from vit.weights import load_pretrained

_MOST_PATCHES = 16  # along a side; the attention of the small model is fast up to there


def start(options: Options, data: Data, config: dict[str, Any] | None = None) -> nn.Module:
    """The model on the CPU: new weights drawn with ``seed``, or those of ``weights`` with a new head.

    New weights are those of vit_jax: Xavier's uniform in the blocks, 0 in the head.

    Args:
        options: the options.
        data: the data.
        config: the configuration of a run that continues, whose weights are loaded later.

    Raises:
        TrainingError: the options or the checkpoint do not fit each other or the data.
    """
    fields = options.config_fields()
    for name in ("num_classes", "in_chans"):
        if name in fields:
            raise TrainingError(f"--set {name}: the data decides it; leave it out")
    if options.objective == "labels" and fields.get("global_pool", "token") == "":
        raise TrainingError("--set global_pool: labels need token, avg or map")
    if options.objective == "masked" and fields.get("patch_drop_rate"):
        raise TrainingError("--set patch_drop_rate: --objective masked needs all patches; leave it out")
    fields |= {"in_chans": data.channels}
    if options.img_size is not None:
        fields["img_size"] = options.img_size
    kind = MaskedPatchModel if options.objective == "masked" else VisionTransformer
    with explained():
        if config is not None:
            return kind(ViTConfig(**config), options.seed)
        if options.weights:
            if options.objective == "masked":
                raise TrainingError("--objective masked starts from new weights; use vit train")
            return _fine_tuned(options, data, fields)
        fields = {"weight_init": "jax", "num_classes": len(data.classes)} | fields
        made = get_config(options.model, **fields) if options.model else small(data.image_size, fields)
        return kind(made, options.seed)


def small(image_size: tuple[int, int] | None, fields: dict[str, Any]) -> ViTConfig:
    """The configuration of the recipe ``small``: about 7 x 7 patches, width 64, 4 blocks with 2 heads.

    Args:
        image_size: (height, width) of the data, if all images have one size; else 224 x 224.
        fields: fields of `ViTConfig` in place of those.

    Raises:
        TrainingError: no patch size gives at most 16 patches along each side.
    """
    size = fields.get("img_size") or image_size or (224, 224)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    # The divisor nearest to a seventh: 4 for 28 pixels.
    patch = tuple(min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - n / 7)) for n in sides)
    if "patch_size" not in fields and any(n // p > _MOST_PATCHES for n, p in zip(sides, patch, strict=True)):
        near = "x".join(str(max(n // 7, 1) * 7) for n in sides)
        raise TrainingError(
            f"images of {sides[0]}x{sides[1]} pixels have no patches of a useful size; --img-size {near}"
        )
    shape = dict(img_size=sides, patch_size=patch, embed_dim=64, depth=4, num_heads=2, mlp_ratio=4.0)
    return get_config("vit_tiny_patch16_224", **(shape | fields))


def _fine_tuned(options: Options, data: Data, fields: dict[str, Any]) -> VisionTransformer:
    """The checkpoint's model without its whole head, and with one linear layer of zeros (paper, 3.2)."""
    undropped = dict.fromkeys(("drop_rate", "attn_drop_rate", "patch_drop_rate"), 0.0) | {"act_drop_rate": None}
    fields = undropped | {"use_mask_token": False, "num_classes": len(data.classes)} | fields
    model = load(options.weights, options.model, **fields)
    pool = None if model.config.global_pool else "token" if model.config.class_token else "avg"  # "": masked patches
    model.reset_classifier(len(data.classes), pool)
    return model


def load(path: str | os.PathLike[str], name: str = "", **fields: Any) -> VisionTransformer:
    """`vit.load_pretrained` on the CPU. Its notes are no warnings of Python."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        model = load_pretrained(*([name] if name else []), path, **fields)
    for note in notes:
        print(note.message, flush=True)
    return model


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns the errors of the package about values and files into TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise TrainingError(str(error)) from error
