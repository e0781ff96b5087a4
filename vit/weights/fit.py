"""Adapts a checkpoint to a model: head, input channels, position embedding, numerics."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.config import HF_ACTIVATIONS, ViTConfig
from vit.tokens import resize_pos_embed
from vit.weights.dialects import DIALECTS, NUMERICS, Dialect, Tensors, depth_of, detect, family, has, plain, read, some
from vit.weights.files import Checkpoint


def recognise(checkpoint: Checkpoint, dialect: str | None) -> tuple[str, Tensors, list[str]]:
    """(dialect, tensors without prefixes, names of tensors outside the ViT).

    Raises:
        ValueError: no dialect covers the checkpoint. The message names the model if it is recognised.
    """
    tensors, outside = plain(checkpoint.tensors)
    name = dialect or detect(tensors)
    kind = checkpoint.config if name is None else described(name, checkpoint)
    if what := family(tensors, kind or {}):
        raise ValueError(f"no ViT in a known dialect; {what}" if name is None else what)
    if name is None:
        raise ValueError(f"no ViT in a known dialect; it has {some(list(tensors))}")
    return name, tensors, outside


def described(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """transformers' config.json, of CLIP the part about images; empty if there is none or for another dialect."""
    config = (checkpoint.config or {}) if name.startswith("hf") else {}
    return part if isinstance(part := config.get("vision_config"), dict) else config


@dataclasses.dataclass
class Plan:
    """The configuration and the tensors of the model after loading."""

    config: ViTConfig
    dialect: Dialect
    ours: Tensors
    left: list[str]  # names of tensors that were not used
    layout: Callable[[], tuple[int, tuple[int, int], list[str]]]  # of the position embedding, see `pos_layout`
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
        rows, grid, notes = self.layout()
        self.notes += notes
        fitted = fit_tokens(self.ours, self.config, rows, grid, self.resize)
        return self.ours | fitted | {name: torch.zeros(shapes[name], device="cpu") for name in zeros}


# A named model takes these fields from its name, and all others from the checkpoint.
NAMED = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


def plan(
    checkpoint: Checkpoint,
    dialect: str | None,
    start: ViTConfig,
    overrides: dict[str, Any],
    own: ViTConfig | None,
    grid: tuple[int, int] | None,
    native: tuple[int, int] | None,
    kind: str,
) -> Plan:
    """Plans how a model with the configuration ``start`` takes a checkpoint.

    Args:
        checkpoint: the checkpoint.
        dialect: see `load_pretrained`.
        start: configuration of the model, with the overrides.
        overrides: see `load_pretrained`.
        own: the configuration in a file from `save_pretrained`, else None.
        grid: grid of the checkpoint's position embedding, if known.
        native: the usual grid for the name of the model.
        kind: "live", "named" (the checkpoint decides about optional parts) or "told" (the file has the configuration).

    Raises:
        ValueError: the checkpoint is in no known dialect, or does not fit.
    """
    name, tensors, outside = recognise(checkpoint, dialect)
    table = DIALECTS[name]
    ours, left = read(table, tensors, start.num_heads)
    if not {"patch_embed.proj.weight", "pos_embed"} <= ours.keys():
        raise ValueError(f"it lacks what dialect {name!r} calls the patch projection or the position embedding")
    for own_name, tensor in ours.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{own_name} is {tensor.dtype}, not floating point")
    if not table.head_bias and "head.weight" in ours:
        ours["head.bias"] = ours["head.weight"].new_zeros(len(ours["head.weight"]))
    depth = depth_of(table, tensors)
    if depth != start.depth:
        raise ValueError(f"it has {depth} blocks, the model depth={start.depth}")
    if name.startswith("hf") and "head.weight" in ours:  # Hugging Face's classifier does not use the pooler
        ours = {own: tensor for own, tensor in ours.items() if not own.startswith("pre_logits.")}
    source = numerics(name, table, checkpoint, kind == "named" or "norm_pre.weight" in ours)
    if said := described(name, checkpoint):
        stated_grid = described_grid(said, start)
        grid = grid or stated_grid
    if own is not None:
        check_own(own, start, ours, overrides, kind)
    found: dict[str, Any] = {}
    if kind == "named" and own is not None:
        found = {field: value for field, value in vars(own).items() if field not in NAMED}
        found |= {"use_mask_token": "mask_token" in ours, "num_classes": classes(ours)}
    elif kind == "named":
        found = parts(ours, start) | dropout(name, checkpoint)
    if found and overrides.get("num_classes", found["num_classes"]) != found["num_classes"]:
        found["representation_size"] = None  # a new head has no hidden layer (paper, 3.2)
    stated = kind != "named" or own is not None or "no_embed_class" in overrides
    asked = dataclasses.replace(start, **found | overrides)
    layout = functools.partial(pos_layout, table, ours["pos_embed"], asked, grid, native, stated)
    if kind == "named" and own is None:
        found["no_embed_class"] = bool(asked.num_prefix_tokens) and layout()[0] != asked.num_prefix_tokens
    config = dataclasses.replace(start, **found | source | overrides)
    notes = list(fit_head(ours, config, asked="num_classes" in overrides))
    if table.classifier and has(tensors, "classifier."):
        notes.append(f"its classifier reads {table.classifier}, which our head does not: it is left out")
    if outside:
        notes.append(f"it holds more than a ViT: {some(outside)} are left out")
    if name == "timm" and kind == "live":
        silent = [f for f in ("norm_eps", "act_layer") if f not in checkpoint.note]
        changed = [f for f in silent if getattr(config, f) != getattr(start, f)]
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
    return Plan(config, table, ours, left, layout, resize, notes, cfg)


def described_grid(said: dict[str, Any], config: ViTConfig) -> tuple[int, int]:
    """The patch grid from Hugging Face's config.json.

    Raises:
        ValueError: config.json has another number of heads than the model.
    """
    heads = said.get("num_attention_heads", 12)
    if heads != config.num_heads:
        raise ValueError(
            f"its config.json says num_attention_heads={heads}, the model has num_heads={config.num_heads}"
        )
    image, patch = (
        tuple(size) if isinstance(size := said.get(word, default), (list, tuple)) else (size, size)
        for word, default in (("image_size", 224), ("patch_size", config.patch_size))
    )
    return image[0] // patch[0], image[1] // patch[1]


def preprocessing(name: str, dialect: Dialect, checkpoint: Checkpoint) -> dict[str, Any]:
    """``pretrained_cfg``: the source, and if known mean and std of the images and the names of the classes."""
    described = checkpoint.config or {}
    timm = described.get("pretrained_cfg", {})
    cfg: dict[str, Any] = {"source": name} | ({"mean": dialect.mean, "std": dialect.std} if dialect.mean else {})
    for key in ("mean", "std"):
        if own := timm.get(key) or checkpoint.preprocessor.get(f"image_{key}"):
            cfg[key] = own
    if labels := described.get("label_names") or timm.get("label_names"):
        cfg["label_names"] = list(labels)
    elif labels := described.get("id2label"):
        cfg["label_names"] = [labels[key] for key in sorted(labels, key=int)]
    cfg |= checkpoint.note.get("pretrained_cfg", {})
    return cfg | {key: tuple(map(float, cfg[key])) for key in ("mean", "std") if key in cfg}


def numerics(name: str, dialect: Dialect, checkpoint: Checkpoint, architecture_known: bool) -> dict[str, Any]:
    """The `NUMERICS` of the checkpoint's source. Omits those that timm's architecture determines.

    Raises:
        ValueError: our model does not have the activation.
    """
    found = {field: getattr(dialect, field) for field in NUMERICS}
    if name == "timm" and architecture_known:
        found = {"interpolation": dialect.interpolation}
    said = described(name, checkpoint)
    if "clip" in name and not said:
        del found["act_layer"]  # OpenAI's have another than OpenCLIP's
    if said:
        act = said.get("hidden_act")
        if act not in (None, *HF_ACTIVATIONS):
            raise ValueError(f"hidden_act={act!r} is not one of {', '.join(HF_ACTIVATIONS)}")
        found |= {"norm_eps": said.get("layer_norm_eps", dialect.norm_eps)}
        found |= {} if act is None else {"act_layer": HF_ACTIVATIONS[act]}
    return found | {field: checkpoint.note[field] for field in NUMERICS if field in checkpoint.note}


def dropout(name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """The dropout rates from Hugging Face's config.json. Its Dinov2 has the same stochastic depth in every block."""
    said = described(name, checkpoint)
    return {field: said[word] for field, word in DIALECTS[name].dropout if word in said}


def parts(ours: Tensors, variant: ViTConfig) -> dict[str, Any]:
    """The fields of the configuration that follow from the existing tensors."""
    cls, reg, hidden = (ours.get(name) for name in ("cls_token", "reg_token", "pre_logits.fc.weight"))
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
        "num_classes": classes(ours),
        "in_chans": ours["patch_embed.proj.weight"].shape[1],
    }
    if has(ours, "attn_pool."):
        fields["global_pool"] = "map"
    elif "fc_norm.weight" in ours or (cls is None and variant.global_pool == "token"):
        fields["global_pool"] = "avg"
    if fields["num_classes"] and hidden is not None:
        fields["representation_size"] = hidden.shape[0]
    return fields


def classes(ours: Tensors) -> int:
    """The number of classes of the head; 0 without a head."""
    return ours["head.weight"].shape[0] if "head.weight" in ours else 0


def check_own(own: ViTConfig, start: ViTConfig, ours: Tensors, overrides: dict[str, Any], kind: str) -> None:
    """Compares the configuration in a file from `save_pretrained` with the model: fields that no shape shows.

    Raises:
        ValueError: the number of heads, the number of classes or the pooling differs.
    """
    if own.num_heads != start.num_heads and "num_heads" not in overrides:
        raise ValueError(f"it was saved with num_heads={own.num_heads}, the model has num_heads={start.num_heads}")
    if kind == "told" and own.num_classes != classes(ours):
        raise ValueError(f"it says num_classes={own.num_classes}, but has a head of {classes(ours)} classes")
    pools = {own.global_pool, start.global_pool}
    if kind == "live" and len(pools - {""}) == 2 and classes(ours) == start.num_classes > 0:
        fix = f"make the model with global_pool={own.global_pool!r}, or ask for a new head with another num_classes"
        raise ValueError(
            f"its head reads global_pool={own.global_pool!r}, not the model's {start.global_pool!r}; {fix}"
        )


def pos_layout(
    dialect: Dialect,
    pos: Tensor,
    config: ViTConfig,
    told: tuple[int, int] | None = None,
    native: tuple[int, int] | None = None,
    stated: bool = True,
) -> tuple[int, tuple[int, int], list[str]]:
    """The number of prefix tokens with a row in ``pos`` [1, rows, D], the grid of the other rows, and notes.

    The number of rows can be ambiguous: with or without rows for prefix tokens, a square or the model's grid. The order
    of preference is ``told``, then ``native`` (as in timm), then a square (first in the model's own layout), then the
    model's grid.

    Args:
        dialect: dialect of the checkpoint.
        pos: position embedding of the checkpoint.
        config: configuration of the model. If ``stated``, its ``no_embed_class`` is the model's own layout.
        told: the grid, if known.
        native: the usual grid for the name of the model.
        stated: whether ``config.no_embed_class`` is known.

    Raises:
        ValueError: no grid fits, or the choice is ambiguous.
    """
    if pos.ndim != 3 or pos.shape[0] != 1 or pos.shape[2] != config.embed_dim:
        raise ValueError(f"the position embedding has shape {tuple(pos.shape)}, not (1, tokens, {config.embed_dim})")
    counts = {"all": config.num_prefix_tokens, "class": int(config.class_token), "none": 0}
    prefixes = list(dict.fromkeys(counts[word] for word in dialect.prefix_rows.split()))
    if dialect.prefix_rows == "all none" and config.no_embed_class:
        prefixes.reverse()  # prefers the model's own layout
    rows, ask = pos.shape[1], "pass grid_size=, (rows, columns) of the checkpoint"
    squares = {prefix: (math.isqrt(max(rows - prefix, 0)),) * 2 for prefix in prefixes}

    def fitting(grid: tuple[int, int] | None) -> list[tuple[int, tuple[int, int]]]:
        """(prefix tokens, grid) for each possible layout with this grid, or with a square for None."""
        grids = ((prefix, grid or squares[prefix]) for prefix in prefixes)
        return [(prefix, grid) for prefix, grid in grids if math.prod(grid) == rows - prefix > 0]

    if told:
        found = fitting(told)
        usual = found
    else:
        usual = native and fitting(native)
        square, same = fitting(None), fitting(config.grid_size)
        found = list(dict.fromkeys([*(usual or []), *square, *same]))
    if not found:
        known = f"not {told[0]}*{told[1]}" if told else "neither a square nor the model's grid"
        raise ValueError(f"the position embedding has {rows} rows; that is {known}; {ask}")
    if len(found) == 1 or told:
        return *found[0], []
    words = [f"{grid[0]}*{grid[1]} patches {f'and {n} prefix tokens' if n else 'alone'}" for n, grid in found]
    said = f"its position embedding of {rows} rows is {' or '.join(words)}"
    if usual:
        return *found[0], [f"{said}: the first is taken, as the model's name says; pass grid_size= of the checkpoint"]
    if (len(square) > 1 and not stated) or (square and same[:1] not in ([], square[:1]) and same[0][0] == prefixes[0]):
        raise ValueError(f"{said}; {ask}")
    return *found[0], []


def fit_tokens(ours: Tensors, config: ViTConfig, rows: int, grid: tuple[int, int], resize: dict[str, Any]) -> Tensors:
    """Class and register tokens and the position embedding, resized to the model's grid and in its layout.

    Only the sum of a token and its row matters. If the model has no row for a token, the row is added to the token. If
    the checkpoint has no row, it is zero.
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
    """[1, gh·gw, D] -> [1, N, D]. ``resize`` has F.interpolate's arguments, or our ``interpolation``."""
    if grid == config.grid_size:
        return pos
    if "interpolation" in resize:
        size = tuple(n * p for n, p in zip(grid, config.patch_size, strict=True))
        return resize_pos_embed(pos, dataclasses.replace(config, img_size=size, **resize), config.grid_size)
    wide = pos.to(torch.promote_types(pos.dtype, torch.float32))
    image = wide.unflatten(1, grid).permute(0, 3, 1, 2)  # [1, D, gh, gw]
    return F.interpolate(image, size=config.grid_size, **resize).flatten(2).mT.to(pos.dtype)


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """Adapts the patch projection [D, C, P, P] to another number of channels, as timm's ``adapt_input_conv``.

    For one channel, it sums the weights. From three channels to another number, it repeats and scales the weights.

    Raises:
        ValueError: another change of channels.
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
    """Removes a head or attention pooling that does not fit, and yields notes.

    There is none on the head if ``asked``, that is, if the user chose ``num_classes``.

    Raises:
        ValueError: the head needs a hidden layer or attention pooling that the model does not have.
    """
    if (own := classes(ours)) != config.num_classes:
        for name in ("head.weight", "head.bias"):
            ours.pop(name, None)
        if config.num_classes and not asked:
            has = f"a head of {own} classes" if own else "no head"
            yield f"it has {has}, the model num_classes={config.num_classes}: the model's head is zero now"
    hidden = [name for name in ours if name.startswith("pre_logits.")]
    if hidden and not config.representation_size:
        if config.num_classes and "head.weight" in ours:
            width = ours["pre_logits.fc.weight"].shape[0]
            fix = f"make the model with representation_size={width}, or ask for a new head with another num_classes"
            raise ValueError(f"its head reads a hidden layer that the model does not have; {fix}")
        for name in hidden:
            del ours[name]
    pool = [name for name in ours if name.startswith("attn_pool.")]
    if pool and config.global_pool != "map":
        if config.num_classes and "head.weight" in ours:
            fix = "make the model with global_pool='map', or ask for a new head with another num_classes"
            raise ValueError(f"its head reads attention pooling, which the model does not have; {fix}")
        yield f"it pools by attention, the model with global_pool={config.global_pool!r}: that part is left out"
        for name in pool:
            del ours[name]


def to_zero(ours: Tensors, shapes: dict[str, torch.Size]) -> list[str]:
    """Names of parameters that are set to zero, because the checkpoint does not have them."""
    no_head = "head.weight" not in ours and "head.bias" not in ours
    return [n for n in shapes if (n == "mask_token" and n not in ours) or (n.startswith("head.") and no_head)]


def check(ours: Tensors, shapes: dict[str, torch.Size], left: list[str]) -> None:
    """Checks that ``ours`` and ``shapes`` have the same names and shapes.

    Raises:
        ValueError: tensors are missing, unused or of another shape. The message names them.
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
