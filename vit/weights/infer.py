"""The architecture of a checkpoint, where nobody names it."""

from __future__ import annotations

from typing import Any

from vit.config import SIZES, ViTConfig, mlp_ratio
from vit.weights.dialects import DIALECTS, depth_of, detect, plain, read
from vit.weights.files import Checkpoint
from vit.weights.fit import described_grid, parts, pos_layout


def infer(checkpoint: Checkpoint, dialect: str | None) -> ViTConfig:
    """The configuration of the model that a checkpoint holds, by its shapes and, for Hugging Face's, its config.json.

    The number of heads is in no shape but google's and big_vision's; else it is that of the named models of this width.

    Raises:
        ValueError: the dialect, the heads or the grid cannot be told.
    """
    tensors = plain(checkpoint.tensors)
    name = dialect or detect(tensors)
    if name is None:
        raise ValueError("no ViT in a known dialect")
    table, described = DIALECTS[name], (checkpoint.config or {}) if name.startswith("hf") else {}
    queries = [t for key, t in tensors.items() if key.endswith("/query/bias")]
    ours, _left = read(table, tensors, queries[0].shape[0] if queries else 1)
    try:
        weight, fc1, pos = (ours[n] for n in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"))
        dim, in_chans, *patch = weight.shape
        hidden = fc1.shape[0]
    except (KeyError, ValueError):
        raise ValueError("it has no patch projection, MLP or position embedding; name the model") from None
    if "norm_pre.weight" in ours:
        raise ValueError(
            "its tokens are normalised before the blocks (CLIP), and nothing tells with which GELU; name it"
        )
    by_width = {width: heads for width, _depth, heads, _hidden in SIZES.values()}
    heads = queries[0].shape[0] if queries else described.get("num_attention_heads", by_width.get(dim))
    if heads is None:
        raise ValueError(f"nothing tells how many heads its width of {dim} has; name the model")
    fields: dict[str, Any] = dict(patch_size=tuple(patch), in_chans=in_chans, embed_dim=dim, num_heads=heads)
    fields |= dict(depth=depth_of(table, tensors), mlp_ratio=mlp_ratio(dim, hidden), img_size=tuple(patch))
    one_patch = ViTConfig(**fields)
    grid = described_grid(described, one_patch) if described else None
    own = ViTConfig(**fields | parts(table, ours, one_patch, grid))
    rows, grid = pos_layout(table, pos, own, grid)
    counts = {"all": own.num_prefix_tokens, "class": int(own.class_token), "none": 0}
    usual = counts[table.prefix_rows.split()[0]]
    if rows != usual and not own.reg_tokens and not described:
        raise ValueError(f"its position embedding has {pos.shape[1]} rows, which fit no square; name the model")
    return ViTConfig(**fields | {"img_size": tuple(n * p for n, p in zip(grid, patch, strict=True))})
