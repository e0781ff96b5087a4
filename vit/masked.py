"""Masked-image modelling as in SimMIM (Xie et al., 2022): reconstructs the pixels of hidden patches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.model import VisionTransformer
from vit.plain import linear
from vit.tokens import pixel_mask


class MaskedImageModel(nn.Module):
    """A ViT with a decoder that reconstructs each patch.

    Shapes: B images, N patches of PH · PW pixels, C channels, D = embed_dim. On a square grid of the model's own size,
    reconstruction and loss are those of transformers' ``ViTForMaskedImageModeling``. Other grids and patches work, too.

    Args:
        config: configuration of the encoder. Its head and pooling are removed, and a mask token is added.
        seed: seed of the initial weights.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self, config: ViTConfig, seed: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        headless = {"num_classes": 0, "representation_size": None, "global_pool": "", "fc_norm": False}
        config = dataclasses.replace(config, use_mask_token=True, **headless)
        self.encoder = VisionTransformer(config, seed, device=device, dtype=dtype)
        pixels = config.patch_size[0] * config.patch_size[1] * config.in_chans
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        where = self.encoder.pos_embed.device if seed is None else torch.device("cpu")
        weight = torch.empty(pixels, config.embed_dim, device=where, dtype=torch.float32)
        nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        self.decoder = nn.Linear(config.embed_dim, pixels, device="meta").to_empty(device=self.encoder.pos_embed.device)
        with torch.no_grad():
            self.decoder.weight.copy_(weight)
            self.decoder.bias.zero_()
        self.decoder.to(self.encoder.pos_embed.dtype)

    def forward(
        self, image: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Hides patches and reconstructs the image.

        Args:
            image: [B, C, H, W], as for `vit.VisionTransformer`.
            bool_masked_pos: bool [B, N], True for hidden patches; None hides none.
            interpolate_pos_encoding: as for `vit.VisionTransformer`.

        Returns:
            (loss, reconstruction [B, C, H, W]). The loss is the mean absolute error of the hidden pixels, or None
            without a mask.

        Raises:
            ValueError: ``patch_drop_rate`` is not 0 in training, or as for `vit.VisionTransformer`.
            TypeError: as for `vit.VisionTransformer`.
        """
        config = self.encoder.config
        if self.training and config.patch_drop_rate:
            raise ValueError("a masked-image model needs a token of each patch; use patch_drop_rate=0")
        grid = config.check_image(image, interpolate_pos_encoding)
        x = self.encoder.forward_features(image, bool_masked_pos, interpolate_pos_encoding)  # [B, R + N, D]
        pixels = linear(self.decoder, x[:, config.num_prefix_tokens :], config.impl)  # [B, N, C·PH·PW]
        pixels = pixels.unflatten(2, (config.in_chans, *config.patch_size)).unflatten(1, grid)  # [B, gh, gw, C, PH, PW]
        drawn = pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # [B, C, H, W]
        if bool_masked_pos is None:
            return None, drawn
        mask = pixel_mask(bool_masked_pos, grid, config.patch_size)
        # If no patch of the batch is hidden, the loss is 0, not NaN, as in transformers.
        error = F.l1_loss(image.to(drawn.dtype), drawn, reduction="none").masked_fill(~mask, 0.0)
        error = error.sum(dtype=torch.promote_types(error.dtype, torch.float32))
        return error / (mask.sum() + 1e-5) / config.in_chans, drawn
