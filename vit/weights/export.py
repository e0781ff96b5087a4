"""`save_pretrained`: writes a model in the dialect of a library."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vit.config import ViTConfig
from vit.model import VisionTransformer
from vit.weights import files, note
from vit.weights.dialects import DIALECTS, Dialect, Tensors, write


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], dialect: str = "timm") -> None:
    """Writes the weights of a model. `load_pretrained` and the library of the dialect read back the same bits.

    All checks come before the first write, and no incomplete file remains. Weights do not contain ``norm_eps`` and
    ``act_layer``, so a warning tells if the library uses other values. Every file also contains the whole configuration
    for `load_pretrained`, in a place that other libraries ignore: in the metadata of a .safetensors or .pt file, in the
    comment of a .npz archive, or in a folder's config.json under "fused_vit".

    Args:
        model: a `vit.VisionTransformer`.
        path: a file with the suffix .safetensors, .pt, .pth, .bin, .tar or .npz. For dialect "hf" also a folder, which
            is created if necessary. It gets model.safetensors, config.json and, if ``model.pretrained_cfg`` has
            ``mean``, preprocessor_config.json.
        dialect: as for `load_pretrained`. "timm" has the names of ``model.state_dict()``.

    Raises:
        ValueError: the dialect has no name for a part of the model, or the suffix is unknown.
        TypeError: ``model`` is not a `vit.VisionTransformer`.
        ImportError: safetensors is not installed.
    """
    model, path = unwrapped(model), Path(path).expanduser()
    if dialect not in DIALECTS:
        raise ValueError(f"dialect={dialect!r} is unknown; use one of {tuple(DIALECTS)}")
    folder = path.is_dir() or (dialect == "hf" and path.suffix not in (*files.SUFFIXES, ".json"))
    if folder and dialect != "hf":
        raise ValueError(f"{path} is a folder, which only dialect 'hf' has; name a file, with {files.SUFFIXES}")
    if not folder and path.suffix not in files.SUFFIXES:
        raise ValueError(f"{path} has no suffix that says which kind of file it is; use one of {files.SUFFIXES}")
    file = path / "model.safetensors" if folder else path
    if file.suffix == ".safetensors":
        files.safetensors()
    tensors = _translate(model, dialect)

    config, source = model.config, DIALECTS[dialect]
    differ = [f for f in ("norm_eps", "act_layer") if getattr(config, f) != getattr(source, f)]
    if differ and dialect != "timm" and not folder:
        words = " and ".join(f"{f}={getattr(source, f)!r} (the model: {getattr(config, f)!r})" for f in differ)
        warnings.warn(f"{path}: models of dialect {dialect!r} compute with {words}", stacklevel=2)
    cfg = getattr(model, "_source", None)
    said = note.write(config, cfg)
    json.dumps(said)  # raises here, before the first write, if the note is not JSON
    if folder:
        path.mkdir(parents=True, exist_ok=True)
    files.write(file, tensors, said)
    if folder:
        words = note.hf_config(config, (cfg or {}).get("label_names"))
        _write_json(path / "config.json", words | {files.NOTE: dataclasses.asdict(config)})
        if cfg and "mean" in cfg:
            _write_json(path / "preprocessor_config.json", _hf_preprocessor(config, cfg))


def unwrapped(model: nn.Module) -> VisionTransformer:
    """The model without the wrapper of torch.compile.

    Raises:
        TypeError: it is not a `vit.VisionTransformer`.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, VisionTransformer):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(f"expected a vit.VisionTransformer, got {kind}; unwrap it first")
    return model


def _translate(model: VisionTransformer, name: str) -> Tensors:
    """The model's tensors in a dialect.

    Raises:
        ValueError: the dialect has no name for a tensor, or its models compute something else.
    """
    config, dialect, ours = model.config, DIALECTS[name], dict(model.state_dict())
    for own, tensor in ours.items():
        if tensor.is_meta:
            raise ValueError(f"{own} is on the meta device; there is nothing to save")
    if name == "timm":
        return write(name, ours, config.depth, config.num_heads)
    pool = "token" if config.class_token else "avg"
    if name in ("big_vision", "hf_siglip") and config.global_pool == "map":
        pool = "map"
    if config.num_classes and config.global_pool != pool:
        raise ValueError(f"dialect {name!r} pools {pool!r}, the model global_pool={config.global_pool!r}; use 'timm'")
    if name.startswith("hf") and config.num_classes and config.representation_size:
        raise ValueError(f"dialect {name!r} has no head with a hidden layer (representation_size); use 'timm'")
    ours["pos_embed"] = _pos_embed(ours["pos_embed"], config, name, dialect)
    if "dinov2" in name:
        ours.setdefault("mask_token", torch.zeros_like(ours["pos_embed"][:, :1]))  # DINOv2's models always have one
    return write(name, ours, config.depth, config.num_heads)


def _pos_embed(pos: torch.Tensor, config: ViTConfig, name: str, dialect: Dialect) -> torch.Tensor:
    """The position embedding with the dialect's rows for prefix tokens.

    Raises:
        ValueError: a row that the dialect does not have is not zero.
    """
    have = config.pos_embed_len - config.num_patches
    rows = {"all": config.num_prefix_tokens, "class": int(config.class_token), "none": 0}
    want = rows[dialect.prefix_rows.split()[0]]
    prefix, patches = pos[:, :have], pos[:, have:]
    if prefix[:, want:].count_nonzero():
        fix = "make the model with no_embed_class=True"
        raise ValueError(f"dialect {name!r} has no position embedding for class or register tokens; {fix}")
    zeros = pos.new_zeros(1, max(want - have, 0), pos.shape[2])
    return torch.cat([prefix[:, :want], zeros, patches], dim=1)


def _hf_preprocessor(config: ViTConfig, cfg: dict[str, Any]) -> dict[str, Any]:
    height, width = config.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),
        "rescale_factor": 1 / 255,
        "size": {"height": height, "width": width},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
