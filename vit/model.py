"""The Vision Transformer: patches, blocks, head. Shapes: B images, R prefix tokens, N tokens in all, D = embed_dim."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vit.config import ViTConfig, get_config
from vit.init import init_weights
from vit.layers import Block, LayerNorm, Linear, NoNorm, PatchEmbed, PreLogits
from vit.tokens import drop_patches, resize_pos_embed


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
            self.norm_pre = LayerNorm(config) if config.pre_norm else nn.Identity()
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            before, after = (config.final_norm and config.use_fc_norm is pooled for pooled in (False, True))
            self.norm = LayerNorm(config) if before else NoNorm()
            self.fc_norm = LayerNorm(config) if after else nn.Identity()
            self.pre_logits = PreLogits(config) if config.representation_size else nn.Identity()
            width = config.representation_size or dim
            self.head = Linear(config, width, config.num_classes) if config.num_classes else nn.Identity()
        init_weights(self, seed)
        if dtype is not None:
            self.to(dtype)

    def forward(self, image: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
        """Classifies images.

        Args:
            image: [B, in_chans, H, W], floating point, in the dtype of the parameters; any strides.
            interpolate_pos_encoding: resize the position embedding, so that any H and W that are multiples of the patch
                are accepted. None: as ``config.dynamic_img_size`` says.

        Returns:
            [B, num_classes]; [B, N, num_classes] where ``global_pool=""``; D columns where there is no head.

        Raises:
            TypeError: the image is not floating point.
            ValueError: its rank, channels or size do not fit the model.
        """
        x = self.forward_features(image, interpolate_pos_encoding)  # [B, N, D]
        return self.forward_head(x)  # [B, num_classes]

    def forward_features(self, image: Tensor, interpolate_pos_encoding: bool | None = None) -> Tensor:
        """All tokens [B, N, D] after the last block, normalised unless the model has an ``fc_norm``."""
        x = self._embed(image, interpolate_pos_encoding)  # [B, N, D]
        for _stream, normalised in self._run(x, self.config.depth):
            y = normalised
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools tokens [B, N, D] and classifies them; ``pre_logits`` stops before the last projection."""
        if self.config.global_pool == "token":
            x = x[:, 0]  # [B, D]
        elif self.config.global_pool == "avg":
            x = x[:, self.config.num_prefix_tokens :].mean(dim=1)  # [B, D]
        x = self.pre_logits(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def _embed(self, image: Tensor, interpolate_pos_encoding: bool | None) -> Tensor:
        """The stream [B, N, D] that enters the first block."""
        config = self.config
        grid = config.check_image(image, interpolate_pos_encoding)
        pos_embed = resize_pos_embed(self.pos_embed, config, grid)  # [1, N or N - R, D]
        x = self.patch_embed(image, pos_embed, self._prefix())
        if self.training and config.patch_drop_rate:
            x = drop_patches(x, config.patch_drop_rate, config.num_prefix_tokens)
        return self.norm_pre(x)

    def _run(self, x: Tensor, depth: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Runs the first ``depth`` blocks. Yields the stream and its next normalisation, before and after each."""
        blocks = self.blocks[:depth]
        next_norms = [*(block.norm1 for block in blocks[1:]), self.norm]
        y = blocks[0].norm1(x)  # [B, N, D]
        yield x, y
        for block, next_norm in zip(blocks, next_norms, strict=True):
            x, y = block(x, y, next_norm)  # [B, N, D] each
            yield x, y

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.no_grad()
    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the head by a zero-initialised one for fine-tuning (paper, 3.2), or by none for 0 classes.

        The hidden layer of a pre-training head goes with it.
        """
        self.config = config = dataclasses.replace(self.config, num_classes=num_classes, representation_size=None)
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.pre_logits = nn.Identity()
        self.head = Linear(config, config.embed_dim, num_classes, **like) if num_classes else nn.Identity()
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
