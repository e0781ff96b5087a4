"""The model configuration, with timm's names, and the table of named variants."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

_CHOICES = {
    "global_pool": ("token", "avg", "map", ""),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu"),
    "interpolation": ("bicubic_offset", "bicubic", "bicubic_antialias"),
    "weight_init": ("", "zeros", "jax", "jax_nlhb"),
    "impl": ("auto", "fused", "triton", "reference"),
}
_MOST = 10**11  # limit of parameters and of every size; the largest ViT has 2e10 parameters
_DROPOUT = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "act_drop_rate", "attn_drop_rate", "drop_path_rate")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that determines a Vision Transformer except its weights. The names are timm's.

    Raises:
        ValueError: a value is out of range or conflicts with another one; the message suggests a fix.
        TypeError: a value has the wrong type.
    """

    img_size: int | tuple[int, int] = 224  # pixels, one integer or (height, width); stored as a pair
    patch_size: int | tuple[int, int] = 16  # pixels, likewise; must divide img_size
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head
    # "token" (class token), "avg" (mean of the patches), "map" (a learned query attends to the patches, and an MLP
    # follows: SigLIP) or "" (all tokens)
    global_pool: str = "token"
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False  # LayerNorm over head_dim of queries and keys
    init_values: float | None = None  # initial LayerScale γ; None or 0: no LayerScale
    class_token: bool = True
    no_embed_class: bool = False  # position embedding for the patches only, not for class and register tokens
    reg_tokens: int = 0  # register tokens, between the class token and the patches
    pre_norm: bool = False  # LayerNorm before the first block, as in CLIP; the patch projection then has no bias
    final_norm: bool = True  # False: no LayerNorm after the blocks, neither before nor after pooling
    fc_norm: bool | None = None  # final norm after pooling instead of before; None: if global_pool is "avg"
    act_layer: str = "gelu"  # "gelu" (erf), "gelu_tanh" or "quick_gelu", x · sigmoid(1.702 · x)
    norm_eps: float = 1e-6
    use_mask_token: bool = False  # the token that replaces the patches in forward's bool_masked_pos
    representation_size: int | None = None  # width of the tanh layer of a pre-training head; None: no such layer
    dynamic_img_size: bool = False  # default of forward's interpolate_pos_encoding: take images of any size
    # How the position embedding is resized, always bicubic. "bicubic_offset" passes the scale factor (new + 0.1) / old
    # (DINO, transformers 4), "bicubic" the size (transformers 5), "bicubic_antialias" the size with antialias (timm).
    # The results differ by a few percent.
    interpolation: str = "bicubic_offset"
    drop_rate: float = 0.0  # dropout before the head
    pos_drop_rate: float = 0.0  # dropout after the position embedding
    proj_drop_rate: float = 0.0  # dropout after attention's projection, the MLP's activation and its second layer
    act_drop_rate: float | None = None  # dropout after the MLP's activation; None: proj_drop_rate
    attn_drop_rate: float = 0.0  # dropout of the attention probabilities
    drop_path_rate: float = 0.0  # stochastic depth of the last block; the rate grows linearly from 0 in the first
    patch_drop_rate: float = 0.0  # fraction of the patches that each image loses in training (FLIP)
    weight_init: str = ""  # timm's modes "", "zeros", "jax" and "jax_nlhb", see vit.init.init_weights
    impl: str = "auto"  # "auto", "fused", "triton" or "reference" for every op, see README

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name))
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name}={_short(value)} is unknown; use one of {known}")
        for name in ("img_size", "patch_size"):
            object.__setattr__(self, name, pair(name, getattr(self, name)))
        object.__setattr__(self, "init_values", self.init_values or None)  # 0 means none, as in timm

        for side, size, patch in zip(("height", "width"), self.img_size, self.patch_size, strict=True):
            if size % patch:
                fix = f"use {max(size // patch, 1) * patch} or {(max(size // patch, 1) + 1) * patch}"
                raise ValueError(f"img_size: {side} {size} is not a multiple of patch_size {patch}; {fix}")
        if self.embed_dim % self.num_heads:
            fix = f"use num_heads={math.gcd(self.embed_dim, self.num_heads)} or another divisor"
            raise ValueError(f"num_heads={self.num_heads} does not divide embed_dim={self.embed_dim}; {fix}")
        if self.impl in ("fused", "triton") and (self.head_dim % 8 or not 16 <= self.head_dim <= 128):
            fix = 'the kernels take 16 to 128 in steps of 8; change num_heads or use impl="auto"'
            raise ValueError(f"num_heads={self.num_heads} makes head_dim={self.head_dim}; {fix}")
        if self.mlp_hidden_dim < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} of embed_dim={self.embed_dim} is no hidden unit; raise it")
        self._check_size()
        if self.global_pool == "token" and not self.class_token:
            raise ValueError('global_pool="token" needs class_token=True; use global_pool="avg" or "map" without one')

    def _check_size(self) -> None:
        """Raises ValueError if the parameters would exceed any memory."""
        dim, wide = self.embed_dim, self.representation_size or 0
        parameters = {
            ("embed_dim", "depth", "mlp_ratio"): self.depth * dim * (4 * dim + 2 * self.mlp_hidden_dim),
            ("embed_dim", "img_size", "patch_size"): dim * self.num_patches,
            ("embed_dim", "patch_size", "in_chans"): dim * self.in_chans * math.prod(self.patch_size),
            ("embed_dim", "reg_tokens"): dim * self.reg_tokens,
            ("embed_dim", "representation_size", "num_classes"): dim * wide + (wide or dim) * self.num_classes,
        }
        names, most = max(parameters.items(), key=lambda item: item[1])
        if most > _MOST:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in names)
            raise ValueError(f"{values} make {most:.0e} parameters, more than {_MOST:.0e}; make one of them smaller")

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_prefix_tokens(self) -> int:
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
        return self.global_pool == "avg" if self.fc_norm is None else self.fc_norm

    @property
    def drops(self) -> bool:
        """Whether a training step needs a seed for dropout or stochastic depth."""
        return any(getattr(self, name) for name in _DROPOUT)

    @property
    def hidden_drop_rate(self) -> float:
        """Dropout after the MLP's activation."""
        return self.proj_drop_rate if self.act_drop_rate is None else self.act_drop_rate

    def block_drop_path_rate(self, index: int) -> float:
        return self.drop_path_rate * index / max(self.depth - 1, 1)

    def check_image(self, image: Tensor, interpolate_pos_encoding: bool | None = None) -> tuple[int, int]:
        """Checks ``image`` [B, in_chans, H, W] and returns its patch grid (rows, columns).

        With interpolation H and W may be any multiples of the patch, else they must be ``img_size``.
        ``interpolate_pos_encoding=None`` means ``dynamic_img_size``.

        Raises:
            TypeError: the image is not a floating-point tensor.
            ValueError: its rank, channels or size do not fit the model.
        """
        if not isinstance(image, torch.Tensor):
            raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}")
        if image.ndim != 4:
            raise ValueError(f"image must be [B, {self.in_chans}, H, W], got shape {tuple(image.shape)}")
        if not image.is_floating_point():
            raise TypeError(f"image must be floating point, got {image.dtype}; convert it and scale it first")
        _, channels, height, width = image.shape
        if channels != self.in_chans:
            raise ValueError(f"image has {channels} channels, the model takes in_chans={self.in_chans}")
        interpolate = self.dynamic_img_size if interpolate_pos_encoding is None else interpolate_pos_encoding
        if not interpolate and (height, width) != self.img_size:
            model = f"{self.img_size[0]}*{self.img_size[1]}"
            fix = "Pass interpolate_pos_encoding=True, or make the model with dynamic_img_size=True."
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model ({model}). {fix}")
        if min(height, width) < 1 or height % self.patch_size[0] or width % self.patch_size[1]:
            patch = f"{self.patch_size[0]}*{self.patch_size[1]}"
            raise ValueError(f"image size {height}*{width} is not a multiple of the patch {patch}; pad or crop it")
        return height // self.patch_size[0], width // self.patch_size[1]

    def check_mask(self, mask: Tensor | None, batch: int, grid: tuple[int, int]) -> None:
        """Checks a mask of patches; None is valid.

        Raises:
            TypeError: the mask is not a bool tensor.
            ValueError: its shape is not [B, number of patches], or the model has no mask token.
        """
        if mask is None:
            return
        if not self.use_mask_token:
            raise ValueError("bool_masked_pos needs a mask token; make the model with use_mask_token=True")
        kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
        if kind is not torch.bool:
            raise TypeError(f"bool_masked_pos must be a bool tensor, got {kind}; pass bool_masked_pos.bool()")
        if mask.shape != (batch, grid[0] * grid[1]):
            want = f"[{batch}, {grid[0] * grid[1]}] for the {grid[0]}*{grid[1]} patches of each image"
            raise ValueError(f"bool_masked_pos must have shape {want}, got {tuple(mask.shape)}")

    @classmethod
    def from_hf(cls, config: Any, **overrides: Any) -> ViTConfig:
        """Converts a Hugging Face ``ViTConfig``.

        A missing key has Hugging Face's default. ``interpolation`` is ``"bicubic"``, as in transformers 5.

        Args:
            config: the object, or its ``config.json`` as a mapping.
            **overrides: fields of `ViTConfig`, e.g. ``num_classes=0`` for a model without a head.

        Raises:
            ValueError: the configuration has a feature that this model does not have.
            TypeError: an override is not a field of `ViTConfig`.
        """
        get = config.get if isinstance(config, Mapping) else lambda name, default: getattr(config, name, default)
        act, dim, hidden = get("hidden_act", "gelu"), get("hidden_size", 768), get("intermediate_size", 3072)
        if get("model_type", "vit") not in ("vit", ""):
            raise ValueError(f"model_type={get('model_type', '')!r} is not a plain ViT; from_hf reads model_type='vit'")
        if act not in HF_ACTIVATIONS:
            raise ValueError(f"hidden_act={act!r} is not supported; use one of {tuple(HF_ACTIVATIONS)}")
        fields = {ours: get(theirs, default) for ours, (theirs, default) in HF_WORDS.items()}
        fields["num_classes"] = get("num_labels", len(get("id2label", None) or (0, 1)))
        fields["act_layer"], fields["interpolation"] = HF_ACTIVATIONS[act], "bicubic"
        fields["mlp_ratio"] = mlp_ratio(dim, hidden)
        if rate := get("hidden_dropout_prob", 0.0):
            fields |= {"pos_drop_rate": rate, "proj_drop_rate": rate, "act_drop_rate": 0.0}
        return cls(**(fields | known_fields(overrides)))


def check_field(name: str, value: Any, called: str | None = None) -> None:
    """Checks the type and range of one field on its own. It does not check fields with a fixed set of strings.

    Args:
        name: the field.
        value: its value.
        called: the name in the error message; None means ``name``.

    Raises:
        TypeError: the value is not a bool or not a number.
        ValueError: the value is not an integer, or it is out of range.
    """
    annotation = ViTConfig.__dataclass_fields__[name].type
    called = called or name
    kind, said = annotation.removesuffix(" | None"), f"{called}={_short(value)}"
    if value is None and annotation.endswith("None"):
        return
    if kind == "bool" and not isinstance(value, bool):
        raise TypeError(f"{said} must be True or False")
    if kind == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{said} must be a number")
    if name.endswith("_rate"):
        if not 0 <= value < 1:
            raise ValueError(f"{said} must be at least 0 and below 1")
    elif name == "init_values":
        if not 0 <= value < _MOST:
            raise ValueError(f"{said} must be above 0 and below {_MOST:.0e}, or None for no LayerScale")
    elif kind == "float" and not 0 < value < _MOST:
        raise ValueError(f"{said} must be a number above 0 and below {_MOST:.0e}")
    elif kind == "int":
        at_least = 0 if name in ("num_classes", "reg_tokens") else 1
        _check_int(called, value, at_least, 10_000 if name == "depth" else _MOST)
    elif kind.startswith("int | tuple"):
        pair(called, value)


def mlp_ratio(dim: int, hidden: int) -> float:
    """The ratio from which `ViTConfig.mlp_hidden_dim` computes exactly ``hidden``."""
    rounded_down = int(dim * (hidden / dim)) < hidden
    return math.nextafter(hidden / dim, math.inf) if rounded_down else hidden / dim


HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
HF_WORDS = {
    "img_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
    "in_chans": ("num_channels", 3),
    "embed_dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "qkv_bias": ("qkv_bias", True),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "attn_drop_rate": ("attention_probs_dropout_prob", 0.0),
}

SIZES = {  # embed_dim, depth, num_heads, MLP width
    "tiny": (192, 12, 3, 768),
    "small": (384, 12, 6, 1536),
    "medium": (512, 12, 8, 2048),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
    "gigantic": (1664, 48, 16, 8192),
    "enormous": (1792, 56, 16, 15360),
}


def _variant(size: str, patch: int, img: int, **fields: Any) -> dict[str, Any]:
    dim, depth, heads, hidden = SIZES[size]
    shape = dict(embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=mlp_ratio(dim, hidden))
    return dict(img_size=img, patch_size=patch) | shape | fields


_CLIP = dict(pre_norm=True, norm_eps=1e-5)
_MAP = dict(class_token=False, global_pool="map")
_GAP = dict(class_token=False, global_pool="avg", fc_norm=False)
VARIANTS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}_{img}": _variant(size, patch, img)
    for size in SIZES
    for patch in (8, 14, 16, 32)
    for img in (224, 384)
    if img % patch == 0
} | {
    "vit_base_patch16_siglip_224": _variant("base", 16, 224, **_MAP),
    "vit_base_patch16_siglip_384": _variant("base", 16, 384, **_MAP),
    "vit_large_patch16_siglip_384": _variant("large", 16, 384, **_MAP),
    "vit_so400m_patch14_siglip_224": _variant("so400m", 14, 224, **_MAP),
    "vit_so400m_patch16_siglip_384": _variant("so400m", 16, 384, **_MAP, act_layer="gelu_tanh"),
    "vit_so400m_patch14_siglip_gap_224": _variant("so400m", 14, 224, **_GAP),
    "vit_so400m_patch16_siglip_gap_384": _variant("so400m", 16, 384, **_GAP),
    "vit_base_patch16_clip_224": _variant("base", 16, 224, **_CLIP),
    "vit_large_patch14_clip_224": _variant("large", 14, 224, **_CLIP),
    "vit_large_patch14_clip_quickgelu_224": _variant("large", 14, 224, **_CLIP, act_layer="quick_gelu"),
}


def list_models() -> list[str]:
    """The names that `get_config` knows: plain ViTs by width, then SigLIP and CLIP variants."""
    return list(VARIANTS)


def get_config(name: str, **overrides: Any) -> ViTConfig:
    """The configuration of a named variant, e.g. ``"vit_base_patch16_224"``.

    Args:
        name: one of `list_models`.
        **overrides: fields of `ViTConfig`.

    Raises:
        ValueError: the name is unknown, or the resulting configuration is not valid.
        TypeError: an override is not a field of `ViTConfig`.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}{_nearest(str(name), VARIANTS)}; vit.list_models() has all names")
    return ViTConfig(**(VARIANTS[name] | known_fields(overrides)))


def known_fields(overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns ``overrides``. Raises TypeError unless each is a field of `ViTConfig`."""
    fields = ViTConfig.__dataclass_fields__
    for name in overrides.keys() - fields:
        raise TypeError(f"ViTConfig has no field {name!r}{_nearest(name, fields)}")
    return overrides


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _check_int(name: str, value: Any, at_least: int, at_most: int = _MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name}={_short(value)} must be an integer of at least {at_least}")
    if value > at_most:
        raise ValueError(f"{name}={_short(value)} must be at most {at_most}")


def _short(value: Any) -> str:
    """The value as text. Python refuses to print very long integers."""
    return f"2**{value.bit_length() - 1} or more" if isinstance(value, int) and abs(value) > 2**64 else repr(value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """Turns one integer or (height, width) into (height, width).

    Raises:
        ValueError: it is neither.
    """
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{name}={_short(value)} must be one integer or (height, width)")
    for side in both:
        _check_int(name, side, at_least=1)
    return both
