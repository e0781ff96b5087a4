"""Makes the tensors of a checkpoint those of a model: head, input channels, position embedding, numerics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import HF_ACTIVATIONS, ViTConfig
from vit.tokens import resize_pos_embed
from vit.weights.dialects import DIALECTS, NUMERICS, Dialect, Tensors, depth_of, detect, has, plain, read, some
from vit.weights.files import Checkpoint


@dataclasses.dataclass
class Plan:
    """What a checkpoint makes of a model."""

    config: ViTConfig
    dialect: Dialect
    ours: Tensors
    left: list[str]  # names of tensors that have no place
    grid: tuple[int, int] | None  # of the position embedding, where the checkpoint says
    resize: dict[str, Any]
    notes: list[str]
    pretrained_cfg: dict[str, Any]

    def values(self, shapes: dict[str, torch.Size]) -> Tensors:
        """The value of every parameter.

        Raises:
            ValueError: the checkpoint does not fit the model.
        """
        zeros = to_zero(self.ours, shapes)
        others = shapes.keys() - zeros - {"pos_embed"}
        ours = {name: tensor for name, tensor in self.ours.items() if name != "pos_embed"}
        check(ours, {name: shape for name, shape in shapes.items() if name in others}, self.left)
        rows, grid = pos_layout(self.dialect, self.ours["pos_embed"], self.config, self.grid)
        fitted = fit_tokens(self.ours, self.config, rows, grid, self.resize)
        return self.ours | fitted | {name: torch.zeros(shapes[name]) for name in zeros}


def plan(checkpoint: Checkpoint, dialect: str | None, start: ViTConfig, overrides: dict[str, Any], named: bool) -> Plan:
    """Decides what a checkpoint makes of the model ``start``, whose parts it decides if that is a ``named`` variant.

    Raises:
        ValueError: the checkpoint is in no known dialect, or cannot become such a model.
    """
    tensors = plain(checkpoint.tensors)
    name = dialect or detect(tensors)
    if name is None:
        raise ValueError(f"no ViT in a known dialect; it has {some(list(tensors))}")
    if has(tensors, "MAPHead_0/"):
        raise ValueError("it pools by attention (MAPHead_0), which the model does not have")
    table = DIALECTS[name]
    ours, left = read(table, tensors, start.num_heads)
    if not {"patch_embed.proj.weight", "pos_embed"} <= ours.keys():
        raise ValueError(f"it lacks what dialect {name!r} calls the patch projection or the position embedding")
    for own, tensor in ours.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{own} is {tensor.dtype}, not floating point")
    depth = depth_of(table, tensors)
    if depth != start.depth:
        raise ValueError(f"it has {depth} blocks, the model depth={start.depth}")
    if name.startswith("hf") and "head.weight" in ours:  # a classifier of Hugging Face's does not read the pooler
        ours = {own: tensor for own, tensor in ours.items() if not own.startswith("pre_logits.")}

    source = numerics(name, table, checkpoint, named or "norm_pre.weight" in ours)
    grid = described_grid(checkpoint.config, start) if name.startswith("hf") and checkpoint.config else None
    found = parts(table, ours, start, grid) | dropout(name, checkpoint) if named else {}
    if found and overrides.get("num_classes", found["num_classes"]) != found["num_classes"]:
        found["representation_size"] = None  # the hidden layer goes with the head (paper, 3.2)
    config = dataclasses.replace(start, **found | source | overrides)
    notes = list(fit_head(ours, config, asked="num_classes" in overrides))
    if name == "timm" and not named:
        changed = [f for f in ("norm_eps", "act_layer") if getattr(config, f) != getattr(start, f)]
        notes += [f"{f} is {getattr(config, f)!r} now, as is usual in timm; pass {f}= for another" for f in changed]
    if config.use_mask_token and "mask_token" not in ours:
        notes.append("it has no mask token: the model's is zero now")
    elif not config.use_mask_token:
        ours.pop("mask_token", None)
    if ours["patch_embed.proj.weight"].ndim == 4:
        ours["patch_embed.proj.weight"] = adapt_input(ours["patch_embed.proj.weight"], config.in_chans)
    resize = table.resize or {"interpolation": source["interpolation"]}
    if "interpolation" in overrides:
        resize = {"interpolation": config.interpolation}
    cfg = preprocessing(name, table, checkpoint)
    return Plan(config, table, ours, left, grid, resize, notes, cfg)


def described_grid(described: dict[str, Any], config: ViTConfig) -> tuple[int, int]:
    """The patch grid by a config.json of Hugging Face's.

    Raises:
        ValueError: it describes another architecture.
    """
    heads = described.get("num_attention_heads", 12)
    if heads != config.num_heads:
        raise ValueError(
            f"its config.json says num_attention_heads={heads}, the model has num_heads={config.num_heads}"
        )
    image, patch = (
        tuple(size) if isinstance(size := described.get(word, default), list) else (size, size)
        for word, default in (("image_size", 224), ("patch_size", 16))
    )
    return image[0] // patch[0], image[1] // patch[1]


def preprocessing(name: str, dialect: Dialect, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source, what its images are normalised with, and the names of its classes where it has them."""
    described = checkpoint.config or {}
    timm = described.get("pretrained_cfg", {})
    cfg: dict[str, Any] = {"source": name} | ({"mean": dialect.mean, "std": dialect.std} if dialect.mean else {})
    for key in ("mean", "std"):
        if own := timm.get(key) or checkpoint.preprocessor.get(f"image_{key}"):
            cfg[key] = tuple(map(float, own))
    if labels := described.get("label_names") or timm.get("label_names"):
        cfg["label_names"] = list(labels)
    elif labels := described.get("id2label"):
        cfg["label_names"] = [labels[key] for key in sorted(labels, key=int)]
    return cfg | checkpoint.numerics.get("pretrained_cfg", {})


def numerics(name: str, dialect: Dialect, checkpoint: Checkpoint, architecture_known: bool) -> dict[str, Any]:
    """What the source computes beside its weights: `NUMERICS`, as far as it does not follow from timm's architecture.

    Raises:
        ValueError: something that no model of ours computes.
    """
    found = {field: getattr(dialect, field) for field in NUMERICS}
    if name == "timm" and architecture_known:
        found = {"interpolation": dialect.interpolation}
    config = checkpoint.config or {}
    if name.startswith("hf") and config:
        act = config.get("hidden_act", "gelu")
        if act not in HF_ACTIVATIONS:
            raise ValueError(f"hidden_act={act!r} is not one of {', '.join(HF_ACTIVATIONS)}")
        found |= {"norm_eps": config.get("layer_norm_eps", 1e-12), "act_layer": HF_ACTIVATIONS[act]}
    return found | {field: checkpoint.numerics[field] for field in NUMERICS if field in checkpoint.numerics}


def dropout(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The rates that a config.json of Hugging Face's gives."""
    said = (checkpoint.config or {}) if name.startswith("hf") else {}
    words = {"pos_drop_rate": "hidden", "proj_drop_rate": "hidden", "attn_drop_rate": "attention_probs"}
    return {field: said[f"{word}_dropout_prob"] for field, word in words.items() if f"{word}_dropout_prob" in said}


def parts(dialect: Dialect, ours: Tensors, variant: ViTConfig, grid: tuple[int, int] | None) -> dict[str, Any]:
    """The fields of a configuration that follow from which tensors there are; sizes are the variant's.

    Raises:
        ValueError: see `pos_layout`.
    """
    cls, reg, head = (ours.get(name) for name in ("cls_token", "reg_token", "head.weight"))
    fields = {
        "class_token": cls is not None,
        "reg_tokens": 0 if reg is None else reg.shape[1],
        "init_values": (variant.init_values or 1e-5) if "blocks.0.ls1.gamma" in ours else None,
        "use_mask_token": "mask_token" in ours,
        "pre_norm": "norm_pre.weight" in ours,
        "qkv_bias": "blocks.0.attn.qkv.bias" in ours,
        "qk_norm": "blocks.0.attn.q_norm.weight" in ours,
        "fc_norm": "fc_norm.weight" in ours,
        "final_norm": "norm.weight" in ours or "fc_norm.weight" in ours,
        "num_classes": 0 if head is None else head.shape[0],
        "in_chans": ours["patch_embed.proj.weight"].shape[1],
    }
    if "fc_norm.weight" in ours or (cls is None and variant.global_pool == "token"):
        fields["global_pool"] = "avg"
    if head is not None and "pre_logits.fc.weight" in ours:
        fields["representation_size"] = ours["pre_logits.fc.weight"].shape[0]
    with_parts = dataclasses.replace(variant, **{"global_pool": "avg"} | fields | {"no_embed_class": False})
    rows, _grid = pos_layout(dialect, ours["pos_embed"], with_parts, grid)
    prefix = with_parts.num_prefix_tokens
    fields["no_embed_class"] = bool(prefix) and rows != prefix
    return fields


def pos_layout(
    dialect: Dialect, pos: Tensor, config: ViTConfig, grid: tuple[int, int] | None = None
) -> tuple[int, tuple[int, int]]:
    """How many prefix tokens have a row in ``pos`` [1, rows, D], and the grid of the others.

    That is the grid of the model where the number of rows fits, else a square. ``grid`` says which it must be.

    Raises:
        ValueError: no number of prefix rows leaves either.
    """
    counts = {"all": config.num_prefix_tokens, "class": int(config.class_token), "none": 0}
    if dialect.prefix_rows == "all none" and config.no_embed_class:
        counts = {"all": 0, "none": config.num_prefix_tokens}  # the model's own layout first
    prefixes = [counts[word] for word in dialect.prefix_rows.split()]
    if pos.ndim != 3 or pos.shape[0] != 1 or pos.shape[2] != config.embed_dim:
        raise ValueError(f"the position embedding has shape {tuple(pos.shape)}, not (1, tokens, {config.embed_dim})")
    rows = pos.shape[1]
    for prefix in prefixes:
        if rows - prefix == math.prod(grid or config.grid_size):
            return prefix, grid or config.grid_size
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix and grid is None:
            return prefix, (side, side)
    known = f"{grid[0]}*{grid[1]}" if grid else "a square"
    raise ValueError(f"the position embedding has {rows} rows; that is neither {known} nor the model's grid")


def fit_tokens(ours: Tensors, config: ViTConfig, rows: int, grid: tuple[int, int], resize: dict[str, Any]) -> Tensors:
    """Class and register tokens and position embedding, resized to the model's grid, in the model's layout.

    Only the sum of a token and its row counts. So a row that the model lacks is added to the token, and a row that it
    has more is zero.
    """
    pos = ours["pos_embed"]
    patches = resize_patches(pos[:, rows:], grid, config, resize)
    names = [name for name in ("cls_token", "reg_token") if name in ours]
    if not config.no_embed_class:
        zeros = pos.new_zeros(1, config.num_prefix_tokens - rows, pos.shape[2])
        return {"pos_embed": torch.cat([pos[:, :rows], zeros, patches], dim=1)}
    tokens, start = {"pos_embed": patches}, 0
    for name in names:
        token = ours[name]
        row = pos[:, start : min(start + token.shape[1], rows)]
        start += token.shape[1]
        head = token[:, : row.shape[1]]
        tokens[name] = torch.cat([torch.where(row == 0, head, head + row), token[:, row.shape[1] :]], dim=1)
    return tokens


def resize_patches(pos: Tensor, grid: tuple[int, int], config: ViTConfig, resize: dict[str, Any]) -> Tensor:
    """[1, gh·gw, D] -> [1, N, D] with F.interpolate's arguments, or as a model with that ``interpolation`` does."""
    if grid == config.grid_size:
        return pos
    if "interpolation" in resize:
        size = tuple(n * p for n, p in zip(grid, config.patch_size, strict=True))
        return resize_pos_embed(pos, dataclasses.replace(config, img_size=size, **resize), config.grid_size)
    wide = pos.to(torch.promote_types(pos.dtype, torch.float32))
    image = wide.unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, gh, gw]
    return F.interpolate(image, size=config.grid_size, **resize).flatten(2).mT.to(pos.dtype)


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """The patch projection [D, C, P, P] for another number of channels, as timm's ``adapt_input_conv``.

    One channel: the sum. From three to more: repeated and scaled, so that equal channels give the same result.

    Raises:
        ValueError: neither.
    """
    channels = weight.shape[1]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if channels == in_chans:
        return weight
    if in_chans == 1:
        return wide.sum(dim=1, keepdim=True).to(weight.dtype)
    if channels == 3:
        repeated = wide.repeat(1, -(-in_chans // 3), 1, 1)[:, :in_chans]
        return (repeated * (3 / in_chans)).to(weight.dtype)
    raise ValueError(f"{channels} input channels cannot become in_chans={in_chans}; only three can, or any become one")


def fit_head(ours: Tensors, config: ViTConfig, asked: bool) -> Iterator[str]:
    """Removes a head that the model does not take, and says so unless it was asked for.

    Raises:
        ValueError: the head reads a hidden layer that the model does not have.
    """
    head = ours.get("head.weight")
    classes = 0 if head is None else head.shape[0]
    if classes != config.num_classes:
        for name in ("head.weight", "head.bias"):
            ours.pop(name, None)
        if config.num_classes and not asked:
            has = f"a head of {classes} classes" if classes else "no head"
            yield f"it has {has}, the model num_classes={config.num_classes}: the model's head is zero now"
    hidden = [name for name in ours if name.startswith("pre_logits.")]
    if hidden and not config.representation_size:
        if config.num_classes and "head.weight" in ours:
            width = ours["pre_logits.fc.weight"].shape[0]
            fix = f"make the model with representation_size={width}, or ask for a new head with another num_classes"
            raise ValueError(f"its head reads a hidden layer that the model does not have; {fix}")
        for name in hidden:
            del ours[name]


def to_zero(ours: Tensors, shapes: dict[str, torch.Size]) -> list[str]:
    """Parameters of the model that start at zero where a checkpoint has none."""
    no_head = "head.weight" not in ours and "head.bias" not in ours
    return [n for n in shapes if (n == "mask_token" and n not in ours) or (n.startswith("head.") and no_head)]


def check(ours: Tensors, shapes: dict[str, torch.Size], left: list[str]) -> None:
    """Raises unless ``ours`` are the parameters of ``shapes``, all of them, and nothing is left over.

    Raises:
        ValueError: says what is missing, left over, of another shape.
    """
    missing = [name for name in shapes if name not in ours]
    extra = left + [name for name in ours if name not in shapes]
    wrong = [
        f"{name} of shape {tuple(ours[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in ours and ours[name].shape != shape
    ]
    problems = [f"it {word} {some(names)}" for word, names in (("lacks", missing), ("has", extra + wrong)) if names]
    if problems:
        raise ValueError(f"does not fit the model: {', and '.join(problems)}")
