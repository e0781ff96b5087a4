"""Pre-training on hidden patches: their pixels (SimMIM, Xie et al., 2022), or their mean colours (ViT paper, B.1.2).

Shapes: B images, N patches of PH · PW pixels, C channels, D = embed_dim.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.model import VisionTransformer
from vit.plain import linear
from vit.tokens import pixel_mask

LEVELS = 8  # of a channel: 3 bits


class MaskedImageModel(nn.Module):
    """A ViT with a decoder that reconstructs each patch.

    On a square grid of the model's own size, reconstruction and loss are those of transformers'
    ``ViTForMaskedImageModeling``. Other grids and patches work, too.

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
        pixels = config.patch_size[0] * config.patch_size[1] * config.in_chans
        self.encoder, self.decoder = _encoder_and_head(config, pixels, seed, device, dtype)

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
        _check_patch_drop(self)
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


class MaskedPatchModel(nn.Module):
    """A ViT that predicts the mean colour of corrupted patches, as in the self-supervision of the ViT paper (B.1.2).

    `corrupt` chooses the patches and `mean_colour` computes the targets:

        loss, logits = model(image, mean_colour(pixels, patch_size), *corrupt(B, N, key))

    The paper swaps embeddings of patches. Here the pixels are swapped before the projection. That is the same, because
    the position embedding is added later, and the fused op sees an ordinary image.

    Args:
        config: configuration of the encoder. Its head and pooling are removed, and a mask token is added.
        seed: seed of the initial weights.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: the images have more than 4 channels, so there are too many colours.
    """

    def __init__(
        self, config: ViTConfig, seed: int | None = None, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if config.in_chans > 4:
            raise ValueError(
                f"in_chans={config.in_chans} has {LEVELS}^{config.in_chans} colours; use at most 4 channels"
            )
        self.encoder, self.head = _encoder_and_head(config, LEVELS**config.in_chans, seed, device, dtype)

    def forward(
        self,
        image: Tensor,
        colours: Tensor,
        selected: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        swap: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Corrupts patches and predicts colours.

        Args:
            image: [B, C, H, W], as for `vit.VisionTransformer`.
            colours: int64 [B, N], the targets: indices from 0 to 8^C − 1.
            selected: bool [B, N], True for the patches in the loss; None means all.
            bool_masked_pos: bool [B, N], True for patches that the mask token replaces; None masks none.
            swap: int64 [B, N], the patch of the same image whose pixels each patch gets; None swaps none.
            interpolate_pos_encoding: as for `vit.VisionTransformer`.

        Returns:
            (loss, logits [B, N, 8^C]). The loss is the mean cross entropy of the selected patches of the whole batch,
            at least in fp32. It is 0 if none is selected.

        Raises:
            ValueError: a shape is wrong, ``patch_drop_rate`` is not 0 in training, or as for `vit.VisionTransformer`.
            TypeError: a dtype is wrong, or as for `vit.VisionTransformer`.
        """
        config = self.encoder.config
        _check_patch_drop(self)
        grid = config.check_image(image, interpolate_pos_encoding)
        shape = (image.shape[0], grid[0] * grid[1])
        _check("colours", colours, torch.int64, shape)
        if selected is not None:
            _check("selected", selected, torch.bool, shape)
        if swap is not None:
            _check("swap", swap, torch.int64, shape)
            image = _swapped(image, swap, grid)
        x = self.encoder.forward_features(image, bool_masked_pos, interpolate_pos_encoding)  # [B, R + N, D]
        logits = linear(self.head, x[:, config.num_prefix_tokens :], config.impl)  # [B, N, 8^C]
        targets = colours if selected is None else colours.masked_fill(~selected, -1)
        wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, targets.flatten(), ignore_index=-1, reduction="sum")
        return total / (targets >= 0).sum().clamp(min=1), logits


def corrupt(
    n_images: int, n_patches: int, key: tuple[int, ...], *, share: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the patches to corrupt, as in the ViT paper (B.1.2).

    Of each image, ``share`` of the patches are selected, rounded down, but at least one. A selected patch becomes the
    mask token with probability 80 %, another patch of the same image with 10 %, and stays as it is with 10 %.

    Args:
        n_images: number of images, B.
        n_patches: number of patches of an image, N.
        key: non-negative integers, such as (seed, epoch, step). The same key gives the same choice everywhere, and the
            first rows do not depend on ``n_images``. The generators of torch and numpy are not used.
        share: the part of the patches to select.

    Returns:
        On the CPU: (selected bool [B, N], masked bool [B, N], swap int64 [B, N]), the arguments of `MaskedPatchModel`.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(key, spawn_key=(1,))))
    order, fate, other = rng.random((n_images, 3, n_patches)).transpose(1, 0, 2)  # [B, N] each
    selected = order.argsort(1).argsort(1) < max(1, int(share * n_patches))
    own = np.arange(n_patches)
    away = (own + 1 + (other * (n_patches - 1)).astype(np.int64)) % n_patches  # uniform over the other patches
    swap = np.where(selected & (fate >= 0.9), away, own)
    return torch.from_numpy(selected), torch.from_numpy(selected & (fate < 0.8)), torch.from_numpy(swap)


def mean_colour(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The mean colour of each patch with 3 bits a channel: Σ_c 8^c · min(⌊8 · mean_c⌋, 7).

    Args:
        pixels: [B, C, H, W] from 0 to 1, before normalisation. Errors below 1e-6 do not change the colour of a mean
            that lies on a limit, such as 2/8.
        patch_size: (PH, PW); H and W are multiples of it.

    Returns:
        int64 [B, N], patches in row-major order.
    """
    means = F.avg_pool2d(pixels.to(torch.promote_types(pixels.dtype, torch.float32)), patch_size)  # [B, C, gh, gw]
    levels = (means * LEVELS + 1e-5).floor().clamp(0, LEVELS - 1).long().flatten(2)  # [B, C, N]
    return sum(level * LEVELS**c for c, level in enumerate(levels.unbind(1)))


def _encoder_and_head(
    config: ViTConfig, features: int, seed: int | None, device: Any, dtype: torch.dtype | None
) -> tuple[VisionTransformer, nn.Linear]:
    """An encoder with a mask token and without a head, and a linear layer from its tokens to ``features``."""
    headless = {"num_classes": 0, "representation_size": None, "global_pool": "", "fc_norm": False}
    config = dataclasses.replace(config, use_mask_token=True, **headless)
    encoder = VisionTransformer(config, seed, device=device, dtype=dtype)
    generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    where = encoder.pos_embed.device if seed is None else torch.device("cpu")
    weight = torch.empty(features, config.embed_dim, device=where, dtype=torch.float32)
    nn.init.trunc_normal_(weight, std=0.02, generator=generator)
    head = nn.Linear(config.embed_dim, features, device="meta").to_empty(device=encoder.pos_embed.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
    return encoder, head.to(encoder.pos_embed.dtype)


def _check_patch_drop(model: MaskedImageModel | MaskedPatchModel) -> None:
    if model.training and model.encoder.config.patch_drop_rate:
        raise ValueError("a masked-image model needs a token of each patch; use patch_drop_rate=0")


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, images and patches, got {tuple(tensor.shape)}")


def _swapped(image: Tensor, swap: Tensor, grid: tuple[int, int]) -> Tensor:
    """``image`` with the pixels of patch swap[b, i] at patch i."""
    cut = image.unflatten(3, (grid[1], -1)).unflatten(2, (grid[0], -1))  # [B, C, gh, PH, gw, PW]
    cut = cut.transpose(3, 4).flatten(2, 3)  # [B, C, N, PH, PW]
    cut = cut.gather(2, swap[:, None, :, None, None].expand(cut.shape))
    return cut.unflatten(2, grid).transpose(3, 4).flatten(4).flatten(2, 3)
