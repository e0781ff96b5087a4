"""The Vision Transformer in plain PyTorch: the specification for tests of the fast model.

It shares no code with `vit.kernels`, `vit.layers` or `vit.model`, so their bugs are not in it. Its state-dict keys are
timm's. Shapes: B images, N = prefix + patch tokens, D = embed_dim.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.init import init_weights


def interpolate_pos_embed(
    pos: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], interpolation: str = "bicubic_offset"
) -> Tensor:
    """Resizes the position embedding of the patches. The rows of prefix tokens do not change.

    Args:
        pos: ``[1, prefix + gh·gw, D]``; the prefix length follows from the shapes. 16-bit values are resized in fp32.
        grid: ``(gh, gw)`` of ``pos``.
        new_grid: ``(new_gh, new_gw)``, at least ``(1, 1)``.
        interpolation: ``"bicubic_offset"``, ``"bicubic"`` or ``"bicubic_antialias"``, see `ViTConfig`.

    Returns:
        ``[1, prefix + new_gh·new_gw, D]``, or ``pos`` itself if the grid does not change.

    Raises:
        ValueError: ``pos`` has fewer rows than the grid, or the interpolation is unknown.
    """
    prefix = pos.shape[1] - grid[0] * grid[1]
    if prefix < 0:
        raise ValueError(f"pos has {pos.shape[1]} rows, fewer than its grid {grid[0]}*{grid[1]}")
    if tuple(grid) == tuple(new_grid):
        return pos
    if interpolation == "bicubic_offset":
        # Without the 0.1, a rounded scale factor can lose a row. The 0.1 also moves the sampling points.
        target = {"scale_factor": tuple((new + 0.1) / old for new, old in zip(new_grid, grid, strict=True))}
    elif interpolation in ("bicubic", "bicubic_antialias"):
        target = {"size": tuple(new_grid), "antialias": interpolation == "bicubic_antialias"}
    else:
        raise ValueError(f"interpolation={interpolation!r} is unknown; see ViTConfig")
    image = pos[:, prefix:].reshape(1, *grid, -1).permute(0, 3, 1, 2)  # [1, D, gh, gw]
    wide = image if pos.dtype in (torch.float32, torch.float64) else image.float()
    resized = F.interpolate(wide, mode="bicubic", align_corners=False, **target).to(pos.dtype)
    assert resized.shape[-2:] == tuple(new_grid), f"interpolated to {tuple(resized.shape[-2:])}, wanted {new_grid}"
    return torch.cat([pos[:, :prefix], resized.flatten(2).transpose(1, 2)], dim=1)


def torch_dropout(x: Tensor, p: float, offset: int) -> Tensor:
    return F.dropout(x, p)


class Drop(nn.Module):
    """Dropout number ``offset``. Replace ``function(x, p, offset)`` to choose the mask.

    In block i: 8·i for the attention probabilities, + 1 after the projection, + 2 after the MLP's activation, + 3 after
    the MLP's second layer, + 4 and + 5 for stochastic depth. 6 is after the position embedding, 7 before the head.
    """

    def __init__(self, rate: float, offset: int) -> None:
        super().__init__()
        self.rate, self.offset = rate, offset
        self.function = torch_dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.rate, self.offset) if self.training and self.rate > 0 else x


class DropSamples(Drop):
    """Stochastic depth: drops whole samples of a branch ``[B, N, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * super().forward(x.new_ones(x.shape[0], 1)).unsqueeze(2)


class PatchEmbed(nn.Module):
    """Splits ``[B, C, H, W]`` into patches and projects them: ``[B, num_patches, D]``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, kernel_size=patch, stride=patch, bias=not config.pre_norm
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.attn_drop, self.proj_drop = (
            Drop(config.attn_drop_rate, 8 * index),
            Drop(config.proj_drop_rate, 8 * index + 1),
        )
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        norm = functools.partial(nn.LayerNorm if config.qk_norm else nn.Identity, config.head_dim, eps=config.norm_eps)
        self.q_norm, self.k_norm = norm(), norm()
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, N, 3, HEADS, HEAD_DIM]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, HEADS, N, HEAD_DIM] each
        q, k = self.q_norm(q), self.k_norm(k)
        if self.attn_drop.rate > 0:
            o = self.attn_drop(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(o.transpose(1, 2).flatten(2)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


class Mlp(nn.Module):
    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.act = ACTIVATIONS[config.act_layer]
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim)
        self.drop1 = Drop(config.hidden_drop_rate, 8 * index + 2)
        self.fc2 = nn.Linear(config.mlp_hidden_dim, config.embed_dim)
        self.drop2 = Drop(config.proj_drop_rate, 8 * index + 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-LN encoder block on ``[B, N, D]``."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        scaled = config.init_values is not None
        rate = config.drop_path_rate * index / (config.depth - 1) if index else 0.0
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config, index)
        self.ls1 = LayerScale(config) if scaled else nn.Identity()
        self.drop_path1 = DropSamples(rate, 8 * index + 4)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = Mlp(config, index)
        self.ls2 = LayerScale(config) if scaled else nn.Identity()
        self.drop_path2 = DropSamples(rate, 8 * index + 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PatchDrop(nn.Module):
    """In training, drops a fraction of each image's patches and shuffles the others."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.rate, self.num_prefix_tokens = config.patch_drop_rate, config.num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        batch, count, _ = patches.shape
        order = torch.argsort(torch.randn(batch, count, device=x.device), dim=1)
        kept = order[:, : max(int(count * (1 - self.rate)), 1)]
        return torch.cat([prefix, patches[torch.arange(batch, device=x.device)[:, None], kept]], dim=1)


class AttentionPool(nn.Module):
    """A learned query attends to the patches, and an MLP with a residual follows: ``[B, N, D]`` -> ``[B, D]``."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dataclasses.replace(config, proj_drop_rate=0.0, act_drop_rate=0.0), 0)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.latent[0, 0]).unflatten(0, (self.num_heads, -1))  # [HEADS, HEAD_DIM]
        k, v = (t.unflatten(2, (self.num_heads, -1)) for t in self.kv(x).chunk(2, dim=2))  # [B, N, HEADS, HEAD_DIM]
        probabilities = torch.softmax(torch.einsum("he,bnhe->bhn", q, k) / q.shape[-1] ** 0.5, dim=-1)
        x = self.proj(torch.einsum("bhn,bnhe->bhe", probabilities, v).flatten(1))
        return x + self.mlp(self.norm(x))


class PreLogits(nn.Module):
    """The tanh hidden layer of a pre-training head."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()


class VisionTransformer(nn.Module):
    """The reference model; ``config.impl`` has no effect.

    Args:
        config: the architecture.
        seed: seed of the initial weights, see `vit.init.init_weights`.
    """

    def __init__(self, config: ViTConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim)) if config.use_mask_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.pos_embed_len, dim))
        self.patch_embed = PatchEmbed(config)
        self.pos_drop = Drop(config.pos_drop_rate, 6)
        self.patch_drop = PatchDrop(config)
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*[Block(config, index) for index in range(config.depth)])
        pooled_norm, final_norm = config.use_fc_norm, config.final_norm
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if final_norm and not pooled_norm else nn.Identity()
        self.attn_pool = AttentionPool(config) if config.global_pool == "map" else None
        self.fc_norm = nn.LayerNorm(dim, eps=config.norm_eps) if final_norm and pooled_norm else nn.Identity()
        hidden = config.representation_size
        self.pre_logits = PreLogits(dim, hidden) if hidden else nn.Identity()
        self.head_drop = Drop(config.drop_rate, 7)
        self.head = nn.Linear(hidden or dim, config.num_classes) if config.num_classes else nn.Identity()
        init_weights(self, seed)

    def forward(
        self, image: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool | None = None
    ) -> Tensor:
        """Classifies images.

        Args:
            image: ``[B, in_chans, H, W]``, floating point, in the dtype of the parameters.
            bool_masked_pos: bool ``[B, number of patches]``; the mask token replaces the patches that are True. The
                pixels of these patches have no effect on results or gradients, even if they are NaN.
            interpolate_pos_encoding: allow any H and W that are multiples of the patch. None means
                ``config.dynamic_img_size``.

        Returns:
            ``[B, num_classes]``, or ``[B, N, num_classes]`` if ``global_pool=""``; D columns without a head.

        Raises:
            TypeError: the image is not floating point, or the mask is not boolean.
            ValueError: the image or the mask does not fit the model, or the model has no mask token.
        """
        return self.forward_head(self.forward_features(image, bool_masked_pos, interpolate_pos_encoding))

    def forward_features(
        self, image: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool | None = None
    ) -> Tensor:
        """All tokens ``[B, N, D]`` after the last block and ``norm``, an identity if the model has ``fc_norm``."""
        config, mask = self.config, bool_masked_pos
        grid = config.check_image(image, interpolate_pos_encoding)
        config.check_mask(mask, image.shape[0], grid)
        pos = interpolate_pos_embed(self.pos_embed, config.grid_size, grid, config.interpolation)
        if mask is not None:  # hidden pixels may be NaN, and 0 · NaN would reach the weight's gradient
            rows, columns = config.patch_size
            pixels = mask.unflatten(1, grid).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
            image = image.masked_fill(pixels.unsqueeze(1), 0)
        x = self.patch_embed(image)  # [B, num_patches, D]
        if mask is not None:
            x = torch.where(mask.unsqueeze(2), self.mask_token, x)
        prefix = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat([*prefix, x + pos], dim=1) if config.no_embed_class else torch.cat([*prefix, x], dim=1) + pos
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        return self.norm(self.blocks(x))  # [B, N, D]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools tokens ``[B, N, D]`` and classifies them; ``pre_logits`` stops before the last projection."""
        if self.config.global_pool == "token":
            x = x[:, 0]
        elif self.config.global_pool == "avg":
            x = x[:, self.config.num_prefix_tokens :].mean(dim=1)
        elif self.config.global_pool == "map":
            x = self.attn_pool(x[:, self.config.num_prefix_tokens :])
        x = self.head_drop(self.pre_logits(self.fc_norm(x)))
        return x if pre_logits else self.head(x)

    @torch.no_grad()
    def reset_classifier(self, num_classes: int) -> None:
        """Replaces the whole head by a zero-initialised linear layer for fine-tuning. 0 classes: no head."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes, representation_size=None)
        self.pre_logits = nn.Identity()
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.head = nn.Linear(self.config.embed_dim, num_classes, **like) if num_classes else nn.Identity()
        self.head.train(self.training)
        for param in self.head.parameters():
            param.zero_()
