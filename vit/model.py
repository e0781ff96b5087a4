"""The Vision Transformer: patches, blocks, head. Shapes: B images, R prefix tokens, N tokens in all, D = embed_dim."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.config import ViTConfig, get_config
from vit.init import init_weights
from vit.layers import Block, Head, LayerNorm, NoNorm, PatchEmbed


class VisionTransformer(nn.Module):
    """A ViT (Dosovitskiy et al., ICLR 2021) on the ops of `vit.kernels`, with timm's state-dict keys.

    Args:
        config: the architecture, and ``impl``, which reaches every op.
        seed: of the initial weights, see `vit.init.init_weights`.
        device, dtype: of the parameters, as for any torch module.
    """

    def __init__(
        self,
        config: ViTConfig,
        seed: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
            self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
            self.pos_embed = nn.Parameter(torch.empty(1, config.pos_embed_len, dim))
            self.patch_embed = PatchEmbed(config)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = NoNorm() if config.use_fc_norm else LayerNorm(config)
            self.fc_norm = LayerNorm(config) if config.use_fc_norm else nn.Identity()
            self.head = Head(config) if config.num_classes else nn.Identity()
        init_weights(self, seed)
        if dtype is not None:
            self.to(dtype)

    def forward(self, image: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """Classifies images.

        Args:
            image: [B, in_chans, H, W], floating point, in the dtype of the parameters; any strides.
            interpolate_pos_encoding: resize the position embedding, so that any H and W that are multiples of the patch
                are accepted.

        Returns:
            [B, num_classes]; [B, N, num_classes] where ``global_pool=""``; D columns where there is no head.

        Raises:
            TypeError: the image is not floating point.
            ValueError: its rank, channels or size do not fit the model.
        """
        x = self.forward_features(image, interpolate_pos_encoding=interpolate_pos_encoding)  # [B, N, D]
        return self.forward_head(x)  # [B, num_classes]

    def forward_features(self, image: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """All tokens [B, N, D] after the last block, normalised unless the model has an ``fc_norm``."""
        grid = self.config.check_image(image, interpolate_pos_encoding)
        pos_embed = _resize_pos_embed(self.pos_embed, self.config, grid)  # [1, N or N - R, D]
        x = self.patch_embed(image, pos_embed, self._prefix())  # [B, N, D]
        y = self.blocks[0].norm1(x)  # [B, N, D]
        next_norms = [*(block.norm1 for block in self.blocks[1:]), self.norm]
        for block, next_norm in zip(self.blocks, next_norms, strict=True):
            x, y = block(x, y, next_norm)  # [B, N, D] each
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools tokens [B, N, D] and classifies them; ``pre_logits`` stops before the last projection."""
        if self.config.global_pool == "token":
            x = x[:, 0]  # [B, D]
        elif self.config.global_pool == "avg":
            x = x[:, self.config.num_prefix_tokens :].mean(dim=1)  # [B, D]
        x = self.fc_norm(x)
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.no_grad()
    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a zero-initialised one for fine-tuning (paper, 3.2), or by none for 0 classes."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = Head(self.config, **like) if num_classes else nn.Identity()
        self.head.train(self.training)
        for param in self.head.parameters():
            param.zero_()

    def _prefix(self) -> Tensor | None:
        present = [t for t in (self.cls_token, self.reg_token) if t is not None]
        return torch.cat(present, dim=1) if len(present) > 1 else present[0] if present else None  # [1, R, D]


def create_model(
    name: str, *, seed: int | None = None, device: Any = None, dtype: torch.dtype | None = None, **overrides: Any
) -> VisionTransformer:
    """A named variant, e.g. ``create_model("vit_base_patch16_224", num_classes=10)``; weights are random.

    Args:
        name: timm's name, one of `vit.list_models`.
        seed: of the initial weights; None draws from torch's global generator.
        device, dtype: of the parameters.
        **overrides: any field of `ViTConfig`, e.g. ``img_size=(96, 80)``, ``depth=1``, ``impl="triton"``.

    Raises:
        ValueError: unknown name (the nearest is suggested) or invalid value. TypeError: no such field.
    """
    return VisionTransformer(get_config(name, **overrides), seed, device=device, dtype=dtype)


def _resize_pos_embed(pos: Tensor, config: ViTConfig, grid: tuple[int, int]) -> Tensor:
    """The position embedding for another grid: bicubic, as two fixed matrix products.

    The bicubic kernel is separable, and the backward of a matrix product is deterministic where that of CUDA's bicubic
    interpolation is not.
    """
    if grid == config.grid_size:
        return pos
    prefix = pos.shape[1] - config.num_patches
    wide = pos.to(torch.promote_types(pos.dtype, torch.float32))
    rows, columns = (
        _bicubic_matrix(old, new, config.interpolation, wide) for old, new in zip(config.grid_size, grid, strict=True)
    )
    table = wide[0, prefix:].unflatten(0, config.grid_size)  # [gh, gw, D]
    resized = torch.einsum("ha,wb,abd->hwd", rows, columns, table).flatten(0, 1)  # [new_gh·new_gw, D]
    return torch.cat([pos[:, :prefix], resized[None].to(pos.dtype)], dim=1)


def _bicubic_matrix(old: int, new: int, interpolation: str, like: Tensor) -> Tensor:
    """[new, old]: the weights that F.interpolate's bicubic mode gives each of ``old`` values."""
    basis = torch.eye(old, dtype=like.dtype, device=like.device).reshape(1, old, old, 1)
    if interpolation == "bicubic_offset":  # the 0.1 also moves the sampling points
        resized = F.interpolate(basis, scale_factor=((new + 0.1) / old, 1.0), mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(basis, size=(new, 1), mode="bicubic", align_corners=False)
    return resized[0, :, :, 0].T
