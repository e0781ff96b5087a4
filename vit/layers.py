"""The modules of a ViT, on the ops of `vit.kernels` and with timm's parameter names.

Every module passes ``config.impl`` to its ops. Calls are as in timm: ``block(x)``, ``patch_embed(image)``. In training,
``seed`` determines all dropout masks; without one, each dropout draws its own seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vit.kernels as kernels
from vit.chain import Link, called, chain
from vit.config import ViTConfig
from vit.kernels import reference, runtime
from vit.plain import hooked, is_linear, linear, plain, remember, replaced
from vit.tokens import pixel_mask

# The dropouts of a model. The offset of a mask is 8 · block + one of these; POS and HEAD belong to no block.
ATTN, PROJ, ACT, FC2, PATH1, PATH2, POS, HEAD = range(8)


def dropping(module: nn.Module, seed: Tensor | None, offset: int) -> dict[str, Any]:
    """The dropout arguments of an op, with the module's ``drop_rate``; empty in evaluation."""
    drops = module.training and module.drop_rate > 0.0
    return {"dropout_p": module.drop_rate, "seed": seed, "offset": offset} if drops else {}


def seeded(seed: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments after x in a call of a submodule. Without a seed, a replacement that takes only x also works."""
    return () if seed is None else (seed,)


class Dropout(nn.Module):
    """Dropout as a separate op."""

    def __init__(self, config: ViTConfig, p: float, offset: int) -> None:
        super().__init__()
        self.p, self.offset, self.impl = p, offset, config.impl

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        return kernels.dropout(x, self.p, seed, self.offset, impl=self.impl) if self.training else x


class DropPath(Dropout):
    """Stochastic depth (Huang et al., 2016)."""

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """Multiplies x [B, ...] by the scale of each sample."""
        scale = self.scale(x, seed)
        return x if scale is None else x * scale.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))

    def scale(self, x: Tensor, seed: Tensor | None) -> Tensor | None:
        """The factor of each sample's branch, 0 or 1 / (1 − p): [B]. None in evaluation or if p is 0."""
        if self.p == 0.0 or not self.training:
            return None
        ones = torch.ones(x.shape[0], 1, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return super().forward(ones, seed)[:, 0]


class PatchEmbed(nn.Module):
    """Projects patches of an image to tokens. ``proj`` is the equivalent convolution.

    ``img_size``, ``patch_size`` and ``grid_size`` are (height, width). ``num_patches`` is the number of patches, as in
    timm.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl = config.impl
        self.img_size, self.patch_size = config.img_size, config.patch_size
        self.grid_size, self.num_patches = config.grid_size, config.num_patches
        patch, bias = config.patch_size, not config.pre_norm
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(
        self,
        image: Tensor,
        pos_embed: Tensor | None = None,
        prefix: Tensor | None = None,
        *,
        mask_token: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> Tensor:
        """[B, C, H, W] -> [B, R + N, D]: R prefix tokens and N patches, with the position embedding added."""
        mask = {"mask_token": mask_token, "bool_masked_pos": bool_masked_pos}
        if type(self.proj) is nn.Conv2d and not (hooked(self.proj) or replaced(self.proj)):
            params = self.proj.weight, self.proj.bias
            return kernels.patch_embed(image, *params, pos_embed, prefix, **mask, impl=self.impl)
        if bool_masked_pos is not None:  # hidden pixels may be NaN, and 0 · NaN would reach the weight's gradient
            grid = [size // patch for size, patch in zip(image.shape[2:], self.patch_size, strict=True)]
            image = image.masked_fill(pixel_mask(bool_masked_pos, grid, self.patch_size), 0.0)
        tokens = self.proj(image).flatten(2).transpose(1, 2)  # [B, N, D]
        return reference.assemble_tokens(tokens, pos_embed, prefix, **mask)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with `vit.kernels.layer_norm`."""

    def __init__(self, config: ViTConfig, width: int | None = None) -> None:
        super().__init__(width or config.embed_dim, eps=config.norm_eps)
        self.impl = config.impl

    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, recompute=lendable(self), impl=self.impl)


def add_norm(
    norm: nn.Module | None,
    x: Tensor,
    branch: Tensor,
    layer_scale: nn.Module | None,
    drop_path: nn.Module,
    seed: Tensor | None,
    impl: str,
    dropout: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """x + drop_path(layer_scale(dropout(branch))), and ``norm`` of that. One op if `vit.plain` allows it."""
    factors = [part for part in (layer_scale, drop_path) if part is not None]
    if lendable(norm) and all(map(plain, factors)):
        gamma = None if layer_scale is None else layer_scale.gamma
        options = {"gamma": gamma, "row_scale": drop_path.scale(x, seed), "recompute": True, "impl": impl}
        return kernels.residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, **options | dropout)
    if dropout:
        branch = kernels.dropout(branch, *dropout.values(), impl=impl)
    branch = branch if layer_scale is None else layer_scale(branch)
    x = x + drop_path(branch, *seeded(seed))
    return x, None if norm is None else norm(x)


def lendable(norm: nn.Module | None) -> bool:
    """Whether an op may read the norm's parameters instead of calling the norm.

    Not for a subclass: FSDP makes one of each module that it shards, and gathers its parameters only during the call.
    """
    return type(norm) is LayerNorm and plain(norm)


class LayerScale(nn.Module):
    """Multiplies a branch by γ. `add_norm` usually fuses this."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(config.embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    """Multi-head self-attention on [B, N, D]. The op reads the packed output of the qkv projection."""

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

    def first(self, x: Tensor) -> Tensor:
        """`forward` of the first token alone, without dropout: [B, N, D] -> [B, 1, D]."""
        width, bias = x.shape[-1], self.qkv.bias
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            (None, None) if p is None else (p[:width], p[width:]) for p in (self.qkv.weight, bias)
        )
        row = x[:, 0].contiguous()  # a view would keep all of x for the backward
        q = kernels.linear(row, q_weight, q_bias, impl=self.impl).unflatten(1, (1, self.num_heads, -1))
        kv = kernels.linear(x, kv_weight, kv_bias, impl=self.impl).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.unbind(2)
        q, k = (q, k) if self.q_norm is None else (self.q_norm(q), self.k_norm(k))
        if (listener := runtime.attention_listener()) is not None:  # it wants the queries of all tokens
            with torch.no_grad():
                listener(*self.heads(x.detach())[:2], q.shape[-1] ** -0.5, None)
        with runtime.unheard():
            o = kernels.attention(q, k, v, impl=self.impl)
        return linear(self.proj, o, self.impl)

    def project(self, x: Tensor) -> Tensor:
        """[B, N, D] -> packed queries, keys and values [B, N, 3·D]."""
        return linear(self.qkv, x, self.impl)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values after q_norm and k_norm, [B, N, HEADS, HEAD_DIM] each."""
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
        if "dropout_p" in options:
            hidden = kernels.dropout(hidden, self.drop_rate, seed, self.offset, impl=self.impl)
        return linear(self.fc2, hidden, self.impl)


class AttentionPool(nn.Module):
    """One learned query attends to the patches, and an MLP with a residual follows (Zhai et al., 2022): "map" pooling.

    As in timm, the projections have biases whatever ``qkv_bias`` is, and there is no dropout.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.impl, dim = config.impl, config.embed_dim
        self.num_heads = config.num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = LayerNorm(config)
        self.mlp = Mlp(dataclasses.replace(config, proj_drop_rate=0.0, act_drop_rate=0.0), 0)

    def forward(self, x: Tensor) -> Tensor:
        """Patches [B, N, D] -> [B, D]."""
        q = linear(self.q, self.latent, self.impl).expand(len(x), -1, -1).unflatten(2, (self.num_heads, -1))
        k, v = linear(self.kv, x, self.impl).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        with runtime.unheard():
            o = kernels.attention(q, k, v, impl=self.impl)
        x = linear(self.proj, o, self.impl)  # [B, 1, D]
        return (x + self.mlp(self.norm(x)))[:, 0]


class Block(nn.Module):
    """One pre-LN encoder block; ``index`` is its index in the model."""

    takes_seed = True  # also visible through wrappers that forward attributes, so `run_blocks` gives them a seed

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

    def forward(self, x: Tensor, seed: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.step(x, None, None, seed)[0]

    def step(
        self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None, seed: Tensor | None = None, first: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The ``run`` of `vit.chain.Link`: x and y = norm1(x) or None -> the new x and ``next_norm(x)``.

        With ``first``, both are those of the first token alone, [B, 1, D].
        """
        y = self.norm1(x) if y is None else y
        drop = dropping(self, seed, self.offset + PROJ)
        attended = self.attn.first(y) if first else self.attn(y, *seeded(seed))
        x = x[:, :1] if first else x
        x, y = add_norm(self.norm2, x, attended, self.ls1, self.drop_path1, seed, self.impl, drop)
        drop = dropping(self, seed, self.offset + FC2)
        hidden = self.mlp(y, *seeded(seed))
        return add_norm(next_norm, x, hidden, self.ls2, self.drop_path2, seed, self.impl, drop)

    def separates(self) -> bool:
        """Whether the first token can be computed without the others, apart from keys and values, to the same result.

        Not if a part is called that could mix tokens or observe them, nor with dropout, whose masks follow the rows.
        """
        parts = [*self.modules()]
        own = all(type(part) in _OWN and plain(part) for part in parts)
        return own and not any(part.training and getattr(part, "drop_rate", 0.0) for part in parts)

    def link(self, seed: Tensor | None, recompute: bool, first: bool = False) -> Link:
        """The block as a link of a chain. With ``recompute``, backward recomputes its activations."""
        if type(self) is not Block or hooked(self) or replaced(self):
            return _called(self, seed if type(self).forward is Block.forward else None, recompute)
        step = self.step
        if recompute:  # reading the RNG state costs time, and a CUDA graph does not allow it
            step = functools.partial(checkpoint, step, use_reentrant=False, preserve_rng_state=self._draws(seed))
        return Link(lambda x, y, norm: step(x, y, norm, seed, first), self.norm1 if lendable(self.norm1) else None)

    def _draws(self, seed: Tensor | None) -> bool:
        """Whether a call may draw random numbers: for a dropout without a seed, or in a part that is not ours."""
        for part in self.modules():
            if type(part) not in _OWN or hooked(part):
                return True
            if seed is None and part.training and (getattr(part, "drop_rate", 0.0) or getattr(part, "p", 0.0)):
                return True
        return False


class Blocks(nn.Sequential):
    """The blocks, run as a chain. Modules of other classes in it are called one by one."""

    def forward(self, x: Tensor, seed: Tensor | None = None, recompute: bool = False) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        for stream, _ in run_blocks(self, x, seed=seed, recompute=recompute):
            x = stream
        return x


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    last_norm: nn.Module | None = None,
    seed: Tensor | None = None,
    recompute: bool = False,
    first: bool = False,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Runs blocks as a `vit.chain.chain`. The last block applies ``last_norm`` if `lendable` allows it.

    With ``first``, the last block, which `Block.separates` must allow, computes the first token alone.
    """
    links, blocks = [], [*blocks]
    for left, block in zip(reversed(range(len(blocks))), blocks, strict=True):
        own = seed if getattr(block, "takes_seed", False) else None
        ours = isinstance(block, Block)
        links.append(block.link(seed, recompute, first and not left) if ours else _called(block, own, recompute))
    return chain(x, links, last_norm if lendable(last_norm) else None)


def _called(block: nn.Module, seed: Tensor | None, recompute: bool) -> Link:
    if not recompute:
        return called(lambda x: block(x, *seeded(seed)))
    return called(lambda x: checkpoint(block, x, *seeded(seed), use_reentrant=False))


class Linear(nn.Linear):
    """A linear layer with `vit.kernels.linear`."""

    def __init__(self, config: ViTConfig, in_features: int, out_features: int, **factory) -> None:
        super().__init__(in_features, out_features, **factory)
        self.impl = config.impl

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias, impl=self.impl)


class PreLogits(nn.Module):
    """The hidden layer of a pre-training head (paper, 3.1): linear, then tanh."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc = Linear(config, config.embed_dim, config.representation_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


_OWN = (Block, Attention, Mlp, LayerNorm, LayerScale, DropPath, nn.Linear)
remember(*_OWN)
