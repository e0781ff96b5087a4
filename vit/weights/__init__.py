"""Checkpoints in the formats of several libraries (dialects): `load_pretrained` and `save_pretrained`.

`files` reads and writes files, `dialects` has the tables of names, and `fit` adapts a checkpoint to a model.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit.config import VARIANTS, ViTConfig, get_config, known_fields, pair
from vit.layers import LayerNorm, Mlp
from vit.model import VisionTransformer
from vit.weights import dialects, files, fit, note
from vit.weights.export import save_pretrained, unwrapped
from vit.weights.files import CheckpointError
from vit.weights.infer import infer

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]


def load_pretrained(
    model_or_path: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    dialect: str | None = None,
    grid_size: tuple[int, int] | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Loads a checkpoint of timm, Hugging Face, torchvision, DINOv2, OpenCLIP, google's vit_jax or big_vision.

        model = load_pretrained(path)  # creates the model from the checkpoint alone
        model = load_pretrained("vit_base_patch16_224", path)  # creates a named model
        load_pretrained(model, path)  # changes an existing model

    An existing model is changed in place. Its parameters stay the same objects with the same dtype, device and
    requires_grad, so an optimiser remains valid. If the checkpoint does not fit, this raises before any change.

    Architecture. A file from `save_pretrained` contains the whole configuration. Alone, it restores the same model. A
    named model takes everything but its sizes from it, and an existing model only the numerics below. It raises if
    ``num_heads`` differs, or if an existing model has another pooling for the same head. For other files, shapes and
    config.json determine the architecture. If a file alone does not contain the number of heads, this takes that of
    the named models with the same width, with a warning. Other missing values raise and must be passed.

    Numerics. The model takes over the numerics of the checkpoint's source:

    - ``norm_eps``: for Hugging Face the value in config.json, else 1e-12 for its ViT. For CLIP 1e-5. Else 1e-6.
    - ``act_layer``: for Hugging Face the value in config.json. For google, big_vision and SigLIP tanh GELU. A CLIP
      without config.json keeps that of the model; without a model, it must be passed. Else erf GELU.
    - ``act_drop_rate``: 0 for Hugging Face, whose models have no dropout after the activation. Else None. The other
      dropout rates of an existing model do not change.
    - ``interpolation``: see below.

    Hugging Face's DeiT, Dinov2, CLIP and SigLIP. DeiT's distillation token is a register. ``forward`` returns the
    pooled features: of CLIP with ``visual_projection`` the image embedding, whose projection is the head with a bias of
    zero. ``forward_features`` returns ``last_hidden_state``, but CLIP's after ``post_layernorm``;
    `forward_intermediates` returns the tokens before it. A classifier that reads other features is left out, with a
    warning.

    For timm, ``norm_eps`` and ``act_layer`` depend on the architecture. So named models, and existing models with
    ``pre_norm`` (CLIP), keep theirs. Other existing models get 1e-6 and erf GELU.

    Position embedding. If the grids differ, it is resized as its source does on load: bicubic with antialias for timm
    and Hugging Face's Dinov2 with registers, bicubic for Hugging Face and OpenCLIP, bicubic with the offset of 0.1 for
    DINOv2, bicubic with aligned corners for torchvision, bilinear with aligned corners for google and big_vision.
    ``forward`` has no aligned corners, so torchvision, google and big_vision set ``interpolation`` to ``"bicubic"``. If
    the checkpoint's grid is unknown, it is taken as in timm: the usual grid of the model's name, else a square, else
    the model's own grid. If this is ambiguous, it raises and asks for ``grid_size``.

    Args:
        model_or_path: a `vit.VisionTransformer` or a name for `vit.create_model`; without ``path``, the checkpoint.
            A new model has the class token, registers, LayerScale, biases, head and channels of the checkpoint.
        path: the checkpoint: a .safetensors, .pt, .pth, .bin or .npz file, an index of shards, a folder with one of
            these, or "owner/name" on the Hugging Face hub. Pickled objects are never executed. Wrappers such as
            {"model": ...} or {"teacher": ...} are opened. From a larger model, such as Lightning's, this takes the ViT,
            and a warning names the other tensors.
        num_classes: None means that of the existing model, or of the checkpoint. If it differs from the checkpoint's,
            the head is zero (paper, 3.2), with a warning if ``num_classes`` is None. If it differs from the existing
            model's, the head is replaced as in ``reset_classifier``.
        in_chans: channels of a named model. A checkpoint with other channels is adapted as in timm.
        dialect: "timm", "hf", "hf_memory" (the names of transformers 5 in memory), "torchvision", "torchvision_old",
            "google", "big_vision", "dinov2", "hf_deit", "hf_dinov2", "hf_dinov2_reg" (with registers), "hf_clip",
            "hf_siglip" or "open_clip". None detects it from the names of the tensors.
        grid_size: (rows, columns) of the patches in the checkpoint's position embedding, if nothing else gives it.
        **overrides: fields of `ViTConfig`, which override the source. For an existing model only norm_eps, act_layer,
            interpolation and act_drop_rate can change. For a new model also device and dtype.

    Returns:
        The model. ``model.pretrained_cfg`` has the ``source`` (a dialect) and, if known, ``mean`` and ``std`` of the
        images and ``label_names``. A pooler of Hugging Face's becomes the hidden layer of the head if the model has
        one. Otherwise it is ignored, as are mask tokens and decoders that the model does not have.

    Raises:
        CheckpointError: a ValueError with path and reason: the file is damaged, in no known dialect, or does not fit.
        FileNotFoundError: the file does not exist.
        ImportError: a library that the file needs is not installed.
        ValueError: an argument is wrong.
        TypeError: an argument is wrong.
    """
    target, path = _target(model_or_path, path)
    name = target if isinstance(target, str) else None
    live = None if target is None or name is not None else unwrapped(target)
    if dialect is not None and dialect not in dialects.DIALECTS:
        raise ValueError(f"dialect={dialect!r} is unknown; use one of {tuple(dialects.DIALECTS)}")
    where = {key: overrides.pop(key) for key in ("device", "dtype") if live is None and key in overrides}
    asked = {"num_classes": num_classes, "in_chans": in_chans}
    overrides |= {field: value for field, value in asked.items() if value is not None}
    grid, native = None if grid_size is None else pair("grid_size", grid_size), None
    if name is not None:
        start = get_config(name, **overrides)
        native = tuple(VARIANTS[name]["img_size"] // side for side in start.patch_size)
    elif live is not None:
        start = _check_live(live, overrides)
    else:
        known_fields(overrides)

    checkpoint = files.read(path)
    with files.blame(checkpoint.path, "says of itself what is no configuration"):
        own, notes = note.read(checkpoint)
    kind = "named" if live is None else "live"
    if target is None and own is not None:
        start, kind = _changed(own, overrides), "told"
    elif target is None:
        with files.blame(checkpoint.path, "does not tell its architecture"):
            start, assumed = infer(checkpoint, dialect, overrides, grid)
            grid, start = start.grid_size, dataclasses.replace(start, **overrides)
        notes += assumed
    with files.blame(checkpoint.path, "does not fit the model"):
        plan = fit.plan(checkpoint, dialect, start, overrides, own, grid or (own and own.grid_size), native, kind)
        template = VisionTransformer(plan.config, device="meta")
        values = plan.values({name: param.shape for name, param in template.named_parameters()})
        if live is not None:
            _check_same(live, template)

    if notes := notes + plan.notes:
        warnings.warn(f"{checkpoint.path}: {'; '.join(notes)}", stacklevel=2)
    if live is None:
        device = where.get("device") or torch.get_default_device()
        live = VisionTransformer(plan.config, device="meta", dtype=where.get("dtype")).to_empty(device=device)
    elif plan.config.num_classes != live.config.num_classes:
        live.reset_classifier(plan.config.num_classes)
    _set_numerics(live, plan.config)
    with torch.no_grad():
        for name, param in live.named_parameters(remove_duplicate=False):
            param.copy_(values[name])
    live.pretrained_cfg = plan.pretrained_cfg
    return live


def _target(
    model_or_path: nn.Module | str | os.PathLike[str], path: str | os.PathLike[str] | None
) -> tuple[nn.Module | str | None, str | os.PathLike[str]]:
    """(target, checkpoint). The target is a model, the name of a model, or None if the checkpoint decides.

    Raises:
        TypeError: an argument is missing or None.
        FileNotFoundError: the only argument is the name of a model.
    """
    if model_or_path is None:
        raise TypeError("the first argument is None; leave it out: load_pretrained(path)")
    if path is None and isinstance(model_or_path, nn.Module):
        raise TypeError("the checkpoint is missing; write load_pretrained(model, path)")
    target, path = (None, model_or_path) if path is None else (model_or_path, path)
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"a checkpoint is a file, a folder or a name on the Hugging Face hub, got {path!r}")
    if target is None and path in VARIANTS and not Path(path).exists():
        raise FileNotFoundError(
            f"{path} names a model, and there is no such file or folder; write load_pretrained({path!r}, path), or "
            f"create_model({path!r}) for random weights"
        )
    return target, path


def _check_live(model: VisionTransformer, overrides: dict[str, Any]) -> ViTConfig:
    """The configuration of a live model with ``overrides``.

    Raises:
        ValueError: an override changes the architecture, or a parameter is on the meta device.
    """
    config = model.config
    for field, value in overrides.items():
        if field not in (*fit.NUMERICS, "num_classes") and getattr(config, field, None) != value:
            raise ValueError(f"{field}={value!r} cannot be changed in a live model; make it with that, or load by name")
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("the model has parameters on the meta device; call model.to_empty(device=...) first")
    return _changed(config, overrides)


def _changed(config: ViTConfig, overrides: dict[str, Any]) -> ViTConfig:
    """``config`` with ``overrides``. A new head has no hidden layer, as in ``reset_classifier``."""
    changed = dataclasses.replace(config, **overrides)
    if changed.num_classes != config.num_classes and "representation_size" not in overrides:
        changed = dataclasses.replace(changed, representation_size=None)
    return changed


def _check_same(live: VisionTransformer, template: VisionTransformer) -> None:
    """Raises unless the live model has the parameters of the template. Ignores a head that will be replaced."""
    replaced = ("head.", "pre_logits.") if live.config.num_classes != template.config.num_classes else ()
    have, want = (
        {n: p.shape for n, p in model.named_parameters(remove_duplicate=False) if not n.startswith(replaced)}
        for model in (live, template)
    )
    for name in have.keys() ^ want.keys() or [n for n in want if have[n] != want[n]]:
        raise ValueError(f"the live model was changed after it was made: {name} is not as its config says")


def _set_numerics(model: VisionTransformer, config: ViTConfig) -> None:
    model.config = config
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.eps = config.norm_eps
        elif isinstance(module, Mlp):
            module.activation = config.act_layer
    for module in model.blocks.modules():
        if isinstance(module, Mlp):  # attention pooling has no dropout
            module.drop_rate = config.hidden_drop_rate
