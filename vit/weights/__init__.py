"""Checkpoints of a ViT in every dialect that people have: `load_pretrained` and `save_pretrained`.

`files` reads and writes, `dialects` has the tables of names, `fit` makes a checkpoint that of a model.
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
    """Loads a checkpoint of timm, Hugging Face, torchvision, DINOv2, google's vit_jax or big_vision.

        model = load_pretrained(path)  # makes the model that the checkpoint tells
        model = load_pretrained("vit_base_patch16_224", path)  # makes the model that the name tells
        load_pretrained(model, path)  # into a live model

    A live model is changed in place: its parameters stay the same objects, with their dtype, device and requires_grad,
    so an optimiser goes on. Whatever does not fit raises before anything has changed.

    A file that `save_pretrained` wrote says the whole configuration: alone it comes back, a named model takes from it
    all but its sizes, and a live one takes the numerics below; another ``num_heads``, or another pooling before the
    same head, raises. Of a file of others the model takes what the shapes and a config.json tell; alone, what they do
    not tell is asked for, and the number of heads is assumed with a warning where named models have that width.

    With the weights come the numbers that their source computes with: ``norm_eps`` (1e-6; Hugging Face what config.json
    says, else 1e-12), ``act_layer`` (tanh GELU for google and big_vision, what config.json says for Hugging Face, else
    erf) and ``interpolation``. timm's are those of its architecture: a named variant keeps its own, and so does a live
    model with ``pre_norm`` (CLIP); another live model gets 1e-6 and erf. Hugging Face's models have no dropout after
    the activation, so their weights set ``act_drop_rate`` to 0, the others' to None; a live model keeps the rates
    themselves.

    A position embedding of another grid is resized as its source resizes one on load: timm bicubic with antialias,
    Hugging Face bicubic, DINOv2 bicubic with its offset of 0.1, torchvision bicubic and google and big_vision bilinear
    with aligned corners. ``forward`` has no aligned corners; there these three get ``"bicubic"``, the nearest. Where
    nothing says of which grid it is, it is read as timm does: as the grid that the model's name stands for, else as a
    square, else as the model's own grid. Where two readings are as good, that raises and asks for ``grid_size``.

    Args:
        model_or_path: a `vit.VisionTransformer` or a name for `vit.create_model`; without ``path``, the checkpoint.
            Unless live, the model has the class token, registers, LayerScale, biases, head and channels of the
            checkpoint.
        path: the checkpoint: a .safetensors, .pt, .pth, .bin or .npz file, an index of shards, a folder with either, or
            "owner/name" on the Hugging Face hub. Pickled objects are never executed. Wrappers such as {"model": ...} or
            {"teacher": ...} are opened; of a larger model, such as Lightning's, the ViT is taken, and a warning says
            what is left out.
        num_classes: None: that of the live model, or of the checkpoint. Where it is not the checkpoint's, the head is
            zero (paper, 3.2), which a warning says unless it was asked for here. Another one than the live model's
            replaces its head, as ``reset_classifier`` does.
        in_chans: channels of a named model; a checkpoint with others is adapted as timm does.
        dialect: "timm", "hf", "hf_memory" (the names of transformers 5 in memory), "torchvision", "torchvision_old",
            "google", "big_vision" or "dinov2"; None finds it from the names.
        grid_size: (rows, columns) of the patches in the checkpoint's position embedding, where nothing else tells.
        **overrides: fields of `ViTConfig`; for a live model norm_eps, act_layer, interpolation and act_drop_rate. They
            win over the source. Unless the model is live, also device and dtype.

    Returns:
        The model; ``model.pretrained_cfg`` has the ``source`` (a dialect) and, where they are known, ``mean`` and
        ``std`` of its images and ``label_names``. A pooler of Hugging Face's goes to the hidden layer of the head
        where the model has one, and else is left out, as are mask tokens and decoders that the model does not have.

    Raises:
        CheckpointError: the file is damaged, in no known dialect or does not fit; a ValueError with path and reason.
        FileNotFoundError, ImportError: nothing is there; a library that the file needs is not installed.
        ValueError, TypeError: an argument is wrong.
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
    """The model or its name, None where the checkpoint alone tells; and the checkpoint.

    Raises:
        TypeError: an argument is missing or None. FileNotFoundError: a model's name stands alone.
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
    """The configuration that ``overrides`` make of that of a live model.

    Raises:
        ValueError: they ask for another architecture.
    """
    config = model.config
    for field, value in overrides.items():
        if field not in (*fit.NUMERICS, "num_classes") and getattr(config, field, None) != value:
            raise ValueError(f"{field}={value!r} cannot be changed in a live model; make it with that, or load by name")
    if any(param.is_meta for param in model.parameters()):
        raise ValueError("the model has parameters on the meta device; call model.to_empty(device=...) first")
    return _changed(config, overrides)


def _changed(config: ViTConfig, overrides: dict[str, Any]) -> ViTConfig:
    """With ``overrides``; the hidden layer of the head goes with the head, as in ``reset_classifier``."""
    changed = dataclasses.replace(config, **overrides)
    if changed.num_classes != config.num_classes and "representation_size" not in overrides:
        changed = dataclasses.replace(changed, representation_size=None)
    return changed


def _check_same(live: VisionTransformer, template: VisionTransformer) -> None:
    """Raises unless the live model has the parameters of the template, but for a head that will be replaced."""
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
            module.activation, module.drop_rate = config.act_layer, config.hidden_drop_rate
