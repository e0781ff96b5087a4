"""The modules of a ViT: timm's parameter names around the ops of `vit.kernels`.

Each takes ``impl`` and hands it to every op. The residual stream x and its normalised copy y travel together, because
the add and the LayerNorm that follows it are one op. ``seed`` is None where nothing drops out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vit import kernels
from vit.config import ViTConfig
from vit.kernels import reference
from vit.plain import hooked, is_linear, linear, plain

# What a dropout mask belongs to: its offset is 8 · block + one of these. The last two belong to no block.
ATTN, PROJ, ACT, FC2, PATH1, PATH2, POS, HEAD = range(8)


def dropping(module: nn.Module, seed: Tensor | None, offset: int) -> dict[str, Any]:
    """The keywords that let an op drop out at the module's ``drop_rate``; none in evaluation."""
    drops = module.training and seed is not None and module.drop_rate > 0.0
    return {"dropout_p": module.drop_rate, "seed": seed, "offset": offset} if drops else {}


class Dropout(nn.Module):
    """Dropout that is part of no other op."""

    def __init__(self, config: ViTConfig, p: float, offset: int) -> None:
        super().__init__()
        self.p, self.offset, self.impl = p, offset, config.impl

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        return (
            kernels.dropout(x, self.p, seed, self.offset, impl=self.impl) if self.training and seed is not None else x
        )


class DropPath(Dropout):
    """Stochastic depth (Huang et al., 2016): what the branch of each sample is multiplied by, 0 or 1 / (1 − p)."""

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor | None:
        """x [B, ...] -> [B]; None where every branch stays."""
        if seed is None or self.p == 0.0 or not self.training:
            return None
        ones = torch.ones(x.shape[0], 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return super().forward(ones, seed)[:, 0]


class PatchEmbed(nn.Module):
    """Image to tokens; ``proj`` holds the 4-D weight of the equivalent convolution."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl = config.impl
        patch = config.patch_size
        bias = not config.pre_norm
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, image: Tensor, pos_embed: Tensor, prefix: Tensor | None, **mask: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, R + N, D] with the R prefix tokens in front and the position embedding added."""
        if type(self.proj) is not nn.Conv2d or hooked(self.proj):
            raise RuntimeError(
                "patch_embed.proj is not called: its weight is read by an op that also adds the position embedding. "
                "Remove its hooks, parametrisation or wrapper, or put them on patch_embed"
            )
        return kernels.patch_embed(image, self.proj.weight, self.proj.bias, pos_embed, prefix, **mask, impl=self.impl)


class LayerNorm(nn.LayerNorm):
    """LayerNorm on the op."""

    def __init__(self, config: ViTConfig, width: int | None = None) -> None:
        super().__init__(width or config.embed_dim, eps=config.norm_eps)
        self.impl = config.impl

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, impl=self.impl)


def add_norm(
    norm: nn.Module | None,
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    impl: str,
    **dropout: Any,
) -> tuple[Tensor, Tensor | None]:
    """(x + row_scale · gamma · dropout(branch), ``norm`` of it); one op where the norm is a plain LayerNorm."""
    if type(norm) is LayerNorm and plain(norm):
        options = {"gamma": gamma, "row_scale": row_scale, "impl": impl} | dropout
        return kernels.residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, **options)
    if dropout:
        branch = kernels.dropout(branch, *dropout.values(), impl=impl)
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.to(branch.dtype)[:, None, None]
    x = x + branch
    return x, None if norm is None else norm(x)


def lent_norm(owner: nn.Module) -> nn.Module | None:
    """The norm that ``owner``, a block or the final norm, applies first, for the block before it to apply instead.

    None where calling ``owner`` or its norm may do more, as hooks do, or where it is not our own class: FSDP, say,
    makes a subclass of what it shards, and has the parameters together only while that is called.
    """
    norm = owner.norm1 if type(owner) is Block else owner
    return norm if type(norm) is LayerNorm and plain(norm) and not hooked(owner) else None


class LayerScale(nn.Module):
    """Holds γ; the op that adds the branch multiplies by it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim))


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]; q, k and v stay packed as qkv's projection wrote them."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.impl = config.impl
        self.drop_rate, self.offset = config.attn_drop_rate, 8 * index + ATTN
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.q_norm = LayerNorm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = LayerNorm(config, config.head_dim) if config.qk_norm else None
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        options = {"impl": self.impl} | dropping(self, seed, self.offset)
        if self.q_norm is None:
            o = kernels.attention_qkvpacked(self.project(x), num_heads=self.num_heads, **options)  # [B, N, D]
        else:
            o = kernels.attention(*self.heads(x), **options)
        return linear(self.proj, o, self.impl)

    def project(self, x: Tensor) -> Tensor:
        """[B, N, D] -> packed queries, keys and values [B, N, 3·D]."""
        return linear(self.qkv, x, self.impl)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as attention sees them, [B, N, HEADS, HEAD_DIM] each."""
        q, k, v = self.project(x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)


class Mlp(nn.Module):
    """fc2(activation(fc1(x))) on [B, N, D]."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        self.drop_rate, self.offset = config.hidden_drop_rate, 8 * index + ACT
        self.impl = config.impl
        self.activation = config.act_layer
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim)
        self.fc2 = nn.Linear(config.mlp_hidden_dim, config.embed_dim)

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        options = {"impl": self.impl} | dropping(self, seed, self.offset)
        if is_linear(self.fc1) and is_linear(self.fc2):
            params = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return kernels.mlp(x, *params, self.activation, **options)
        hidden = reference.gelu(linear(self.fc1, x, self.impl), self.activation)
        if "seed" in options:
            hidden = kernels.dropout(hidden, options["dropout_p"], seed, self.offset, impl=self.impl)
        return linear(self.fc2, hidden, self.impl)


class Block(nn.Module):
    """One pre-LN encoder block; ``index`` is its place in the model."""

    def __init__(self, config: ViTConfig, index: int) -> None:
        super().__init__()
        scaled, path_rate, offset = config.init_values is not None, config.block_drop_path_rate(index), 8 * index
        self.impl = config.impl
        self.drop_rate, self.offset = config.proj_drop_rate, offset
        self.norm1 = LayerNorm(config)
        self.attn = Attention(config, index)
        self.ls1 = LayerScale(config) if scaled else None
        self.drop_path1 = DropPath(config, path_rate, offset + PATH1)
        self.norm2 = LayerNorm(config)
        self.mlp = Mlp(config, index)
        self.ls2 = LayerScale(config) if scaled else None
        self.drop_path2 = DropPath(config, path_rate, offset + PATH2)

    def forward(
        self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream x [B, N, D] and y = norm1(x) in; the stream and next_norm of it out.

        Without y the block makes it; without next_norm there is no second result.
        """
        y = self.norm1(x) if y is None else y
        drop = dropping(self, seed, self.offset + PROJ)
        gamma, path = self.ls1 and self.ls1.gamma, self.drop_path1(x, seed)
        x, y = add_norm(self.norm2, x, self.attn(y, seed), gamma, path, self.impl, **drop)
        drop = dropping(self, seed, self.offset + FC2)
        gamma, path = self.ls2 and self.ls2.gamma, self.drop_path2(x, seed)
        return add_norm(next_norm, x, self.mlp(y, seed), gamma, path, self.impl, **drop)


class Linear(nn.Linear):
    """A linear layer on the op."""

    def __init__(self, config: ViTConfig, in_features: int, out_features: int, **factory) -> None:
        super().__init__(in_features, out_features, **factory)
        self.impl = config.impl

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, impl=self.impl)


class PreLogits(nn.Module):
    """The hidden layer of a pre-training head (paper, 3.1): a linear layer and tanh."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc = Linear(config, config.embed_dim, config.representation_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))
