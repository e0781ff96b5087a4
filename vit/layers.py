"""The modules of a ViT: timm's parameter names around the ops of `vit.kernels`.

Each takes ``impl`` and hands it to every op. The residual stream x and its normalised copy y travel together, because
the add and the LayerNorm that follows it are one op.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit import kernels
from vit.config import ViTConfig


class PatchEmbed(nn.Module):
    """Image to tokens; ``proj`` holds the 4-D weight of the equivalent convolution."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl = config.impl
        patch = config.patch_size
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, kernel_size=patch, stride=patch, bias=not config.pre_norm
        )

    def forward(self, image: Tensor, pos_embed: Tensor, prefix: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, R + N, D] with the R prefix tokens in front and the position embedding added."""
        return kernels.patch_embed(image, self.proj.weight, self.proj.bias, pos_embed, prefix, impl=self.impl)


class LayerNorm(nn.LayerNorm):
    """LayerNorm, alone (`forward`) or together with the residual add before it (`add`)."""

    def __init__(self, config: ViTConfig, width: int | None = None) -> None:
        super().__init__(width or config.embed_dim, eps=config.norm_eps)
        self.impl = config.impl

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, impl=self.impl)

    def add(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + gamma · branch, its LayerNorm)."""
        return kernels.residual_layer_norm(x, branch, self.weight, self.bias, self.eps, gamma=gamma, impl=self.impl)


class NoNorm(nn.Identity):
    """Stands where a model does not normalise after its blocks (``fc_norm``, ``final_norm=False``)."""

    def add(self, x: Tensor, branch: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x + (branch if gamma is None else branch * gamma)
        return x, x


class LayerScale(nn.Module):
    """Holds γ; the op that adds the branch multiplies by it."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim))


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]; q, k and v stay packed as qkv's projection wrote them."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl = config.impl
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim, bias=config.qkv_bias)
        self.q_norm = LayerNorm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = LayerNorm(config, config.head_dim) if config.qk_norm else None
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = kernels.linear(x, self.qkv.weight, self.qkv.bias, impl=self.impl)  # [B, N, 3·D]
        if self.q_norm is None:
            o = kernels.attention(qkv, num_heads=self.num_heads, impl=self.impl)  # [B, N, D]
        else:
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # [B, N, HEADS, HEAD_DIM] each
            o = kernels.attention_qkv(self.q_norm(q), self.k_norm(k), v, impl=self.impl)
        return kernels.linear(o, self.proj.weight, self.proj.bias, impl=self.impl)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) on [B, N, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl = config.impl
        self.activation = config.act_layer
        self.fc1 = nn.Linear(config.embed_dim, config.mlp_hidden_dim)
        self.fc2 = nn.Linear(config.mlp_hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        return kernels.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.activation, impl=self.impl)


class Block(nn.Module):
    """One pre-LN encoder block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        scaled = config.init_values is not None
        self.norm1 = LayerNorm(config)
        self.attn = Attention(config)
        self.ls1 = LayerScale(config) if scaled else None
        self.norm2 = LayerNorm(config)
        self.mlp = Mlp(config)
        self.ls2 = LayerScale(config) if scaled else None

    def forward(self, x: Tensor, y: Tensor, next_norm: LayerNorm | NoNorm) -> tuple[Tensor, Tensor]:
        """The stream x [B, N, D] and y = norm1(x) in; the stream and next_norm of it out."""
        x, y = self.norm2.add(x, self.attn(y), self.ls1 and self.ls1.gamma)
        return next_norm.add(x, self.mlp(y), self.ls2 and self.ls2.gamma)


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
