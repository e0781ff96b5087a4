"""Model configuration in timm's words, and the one table of named variants."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

POOLS = ("token", "avg", "")
ACTIVATIONS = ("gelu", "gelu_tanh")
INTERPOLATIONS = ("bicubic_offset", "bicubic")
IMPLS = ("auto", "triton", "reference")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that determines a Vision Transformer except its weights.

    Attributes:
        img_size: image height and width in pixels; an int means square. Stored as a pair, like ``patch_size``.
        patch_size: patch height and width in pixels; divides ``img_size``.
        in_chans: image channels.
        num_classes: outputs of the head; 0 leaves the head out.
        global_pool: ``"token"`` (class token), ``"avg"`` (mean of the patch tokens) or ``""`` (all tokens).
        embed_dim: width D of a token.
        depth: number of blocks.
        num_heads: attention heads; divides ``embed_dim``.
        mlp_ratio: the MLP's hidden width is ``int(embed_dim * mlp_ratio)``.
        qkv_bias: bias in the qkv projection.
        init_values: initial LayerScale γ; None or 0 for no LayerScale.
        class_token: whether there is a class token.
        no_embed_class: the position embedding covers the patches only, not the class and register tokens.
        reg_tokens: number of register tokens, between the class token and the patches.
        fc_norm: normalise after pooling instead of before; None means only where ``global_pool="avg"``.
        act_layer: ``"gelu"`` (erf) or ``"gelu_tanh"``.
        norm_eps: epsilon of every LayerNorm.
        interpolation: how position embeddings are resized. ``"bicubic_offset"`` passes the scale factor
            ``(new + 0.1) / old`` (DINO's formula, the one of Hugging Face 4.x); ``"bicubic"`` passes the size (5.x).
        impl: which implementation of the ops runs: ``"auto"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: a value is out of range or does not fit another one; the message names both and a fix.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    in_chans: int = 3
    num_classes: int = 1000
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    init_values: float | None = None
    class_token: bool = True
    no_embed_class: bool = False
    reg_tokens: int = 0
    fc_norm: bool | None = None
    act_layer: str = "gelu"
    norm_eps: float = 1e-6
    interpolation: str = "bicubic_offset"
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        for name in ("in_chans", "embed_dim", "depth", "num_heads"):
            _check_int(name, getattr(self, name), at_least=1)
        for name in ("num_classes", "reg_tokens"):
            _check_int(name, getattr(self, name), at_least=0)
        choices = {"global_pool": POOLS, "act_layer": ACTIVATIONS, "interpolation": INTERPOLATIONS, "impl": IMPLS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(map(repr, known))}")
        for name in ("mlp_ratio", "norm_eps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a finite number above 0")
        if self.init_values is not None and not (math.isfinite(self.init_values) and self.init_values >= 0):
            raise ValueError(f"init_values={self.init_values} must be above 0, or None for no LayerScale")
        if self.init_values == 0:  # timm's meaning of 0
            object.__setattr__(self, "init_values", None)

        for side, size, patch in zip(("height", "width"), self.img_size, self.patch_size, strict=True):
            if size % patch:
                near = max(size // patch, 1) * patch
                raise ValueError(
                    f"img_size {side} {size} is not a multiple of patch_size {side} {patch}; use {near} or {near + patch}"
                )
        if self.embed_dim % self.num_heads:
            fits = [h for h in range(1, self.embed_dim + 1) if self.embed_dim % h == 0]
            near = min(fits, key=lambda h: abs(h - self.num_heads))
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; use {near}")
        if self.impl == "triton" and not 16 <= self.head_dim <= 128:
            raise ValueError(
                f"head_dim = embed_dim / num_heads = {self.head_dim} is outside the kernels' 16 to 128; "
                'change num_heads or use impl="auto"'
            )
        if self.mlp_hidden_dim < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no hidden units at embed_dim={self.embed_dim}; raise it")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError('global_pool="token" needs class_token=True; with class_token=False use global_pool="avg"')

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, which come before the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def num_tokens(self) -> int:
        return self.num_prefix_tokens + self.num_patches

    @property
    def pos_embed_len(self) -> int:
        return self.num_patches if self.no_embed_class else self.num_tokens

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_hidden_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def use_fc_norm(self) -> bool:
        """Whether the final norm is ``fc_norm``, after pooling, instead of ``norm``."""
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

    @classmethod
    def from_hf(cls, config: Any, **overrides: Any) -> ViTConfig:
        """The same model from a Hugging Face ``ViTConfig``: the object, or its ``config.json`` as a mapping.

        A missing word takes Hugging Face's default, and ``interpolation`` is ``"bicubic"``, as transformers 5 computes.

        Args:
            config: has ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``intermediate_size``,
                ``image_size``, ``num_channels``, ``layer_norm_eps``, ``hidden_act`` …, as attributes or keys.
            **overrides: fields of `ViTConfig` to set instead, e.g. ``num_classes=0`` for a model without a head.

        Raises:
            ValueError: the configuration asks for something that this model does not have.
            TypeError: an override is not a field of `ViTConfig`.
        """
        words = config if isinstance(config, Mapping) else _Attributes(config)
        if words.get("model_type", "vit") not in ("vit", ""):
            raise ValueError(f"model_type={words.get('model_type')!r} is not a plain ViT; from_hf reads model_type='vit'")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if words.get(name, 0.0):
                raise ValueError(f"{name}={words.get(name)} is not supported; set it to 0.0 in the configuration")
        act = words.get("hidden_act", "gelu")
        if act not in _HF_ACTIVATIONS:
            raise ValueError(f"hidden_act={act!r} is not supported; use one of {', '.join(map(repr, _HF_ACTIVATIONS))}")
        dim, hidden = words.get("hidden_size", 768), words.get("intermediate_size", 3072)
        ratio = hidden / dim
        while int(dim * ratio) < hidden:  # the quotient may round down
            ratio = math.nextafter(ratio, math.inf)
        fields = {
            "img_size": words.get("image_size", 224),
            "patch_size": words.get("patch_size", 16),
            "in_chans": words.get("num_channels", 3),
            "num_classes": words.get("num_labels", len(words.get("id2label") or (0, 1))),
            "embed_dim": dim,
            "depth": words.get("num_hidden_layers", 12),
            "num_heads": words.get("num_attention_heads", 12),
            "mlp_ratio": ratio,
            "qkv_bias": words.get("qkv_bias", True),
            "act_layer": _HF_ACTIVATIONS[act],
            "norm_eps": words.get("layer_norm_eps", 1e-12),
            "interpolation": "bicubic",
        }
        return cls(**(fields | _known(overrides)))


_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# Width, depth and heads of each size; a variant exists where the patch divides the image.
_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
VARIANTS: dict[str, dict[str, int]] = {
    f"vit_{size}_patch{patch}_{img}": dict(
        img_size=img, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads
    )
    for size, (width, depth, heads) in _SIZES.items()
    for patch in (8, 14, 16, 32)
    for img in (224, 384)
    if img % patch == 0
}


def list_models() -> list[str]:
    """Names that `get_config` knows, smallest first."""
    return list(VARIANTS)


def get_config(name: str, **overrides: Any) -> ViTConfig:
    """The configuration of a named variant.

    Args:
        name: one of `list_models`, e.g. ``"vit_base_patch16_224"``.
        **overrides: any field of `ViTConfig`, set instead of the variant's value.

    Raises:
        ValueError: the name is unknown, or the resulting configuration is not valid.
        TypeError: an override is not a field of `ViTConfig`.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}{_nearest(str(name), VARIANTS)}; vit.list_models() has all names")
    return ViTConfig(**(VARIANTS[name] | _known(overrides)))


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    fields = [f.name for f in dataclasses.fields(ViTConfig)]
    for name in overrides:
        if name not in fields:
            raise TypeError(f"ViTConfig has no field {name!r}{_nearest(name, fields)}")
    return overrides


def _nearest(name: str, known: Any) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check_int(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {at_least}")


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name}={value!r} must be one integer or (height, width)")
    for side in pair:
        _check_int(name, side, at_least=1)
    return pair


class _Attributes:
    """``get`` over the attributes of an object."""

    def __init__(self, obj: Any) -> None:
        self.get = lambda name, default=None: getattr(obj, name, default)
