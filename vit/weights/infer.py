"""Infers the architecture of a checkpoint that does not contain its configuration."""

from __future__ import annotations

from typing import Any

from vit.config import SIZES, ViTConfig, mlp_ratio
from vit.weights.dialects import DIALECTS, depth_of, read
from vit.weights.files import Checkpoint
from vit.weights.fit import described, described_grid, parts, pos_layout, recognise


def infer(
    checkpoint: Checkpoint, dialect: str | None, asked: dict[str, Any], grid: tuple[int, int] | None
) -> tuple[ViTConfig, list[str]]:
    """Infers the configuration from the shapes and from config.json.

    Args:
        checkpoint: the checkpoint.
        dialect: see `load_pretrained`.
        asked: fields of `ViTConfig` from the user.
        grid: grid of the position embedding from the user, or None.

    Returns:
        The configuration, and notes on assumptions. The number of heads is often one, because only the shapes of google
        and big_vision contain it.

    Raises:
        ValueError: the dialect, the number of heads, the activation of a CLIP or the grid is unknown.
    """
    name, tensors, _outside = recognise(checkpoint, dialect)
    table, notes = DIALECTS[name], []
    said = described(name, checkpoint)
    timm = (checkpoint.config or {}) if name == "timm" else {}
    queries = [t for key, t in tensors.items() if key.endswith("/query/bias")]
    ours, _left = read(table, tensors, queries[0].shape[0] if queries else 1)
    try:
        weight, fc1, pos = (ours[n] for n in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"))
        dim, in_chans, *patch = weight.shape
        hidden = fc1.shape[0]
    except (KeyError, ValueError):
        raise ValueError(f"in dialect {name!r} it has no patch projection, MLP or position embedding") from None
    if "norm_pre.weight" in ours and "act_layer" not in asked and not said:
        raise ValueError(
            "its tokens are normalised before the blocks (CLIP), and nothing tells with which GELU; name it or pass "
            "act_layer="
        )
    told = asked.get("num_heads") or timm.get("model_args", {}).get("num_heads")
    heads = queries[0].shape[0] if queries else said.get("num_attention_heads", told)
    if heads is None:
        size, heads = next(((s, h) for s, (width, _, h, _) in SIZES.items() if width == dim), (None, None))
        if heads is None:
            raise ValueError(f"nothing tells how many heads its width of {dim} has; name the model or pass num_heads=")
        notes.append(f"it does not say how many heads it has: {heads} are assumed, as vit_{size} has; pass num_heads=")
    fields: dict[str, Any] = dict(patch_size=tuple(patch), in_chans=in_chans, embed_dim=dim, num_heads=heads)
    fields |= dict(depth=depth_of(table, tensors), mlp_ratio=mlp_ratio(dim, hidden), img_size=tuple(patch))
    if timm.get("global_pool") in ("token", "avg"):
        fields["global_pool"] = timm["global_pool"]
    if "norm_pre.weight" in ours:
        fields["norm_eps"] = 1e-5  # as in all CLIP models
    one_patch = ViTConfig(**fields)
    if said and grid is None:
        grid = described_grid(said, one_patch)
    own = ViTConfig(**fields | parts(ours, one_patch) | {"no_embed_class": asked.get("no_embed_class", False)})
    size = (timm.get("pretrained_cfg") or {}).get("input_size") or (0, 0, 0)
    native = (size[1] // patch[0], size[2] // patch[1])
    prefix, found, more = pos_layout(table, pos, own, grid, native, stated="no_embed_class" in asked)
    if name == "timm" and prefix == 0 < own.num_prefix_tokens == 1 and not (grid or more or "no_embed_class" in asked):
        raise ValueError(
            f"its position embedding has {pos.shape[1]} rows, which fit no square with one for the class token; name "
            f"the model, or pass grid_size={found} or another"
        )
    return ViTConfig(**fields | {"img_size": tuple(n * p for n, p in zip(found, patch, strict=True))}), notes + more
