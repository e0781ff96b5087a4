"""PyTorch's modules that several libraries use: LayerNorm, Conv2d as patch projection, MultiheadAttention, Sequential.

Each function returns the ``forward`` of one class. ``refuse_…`` returns the reason why the ops cannot compute a module.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import vit.kernels as kernels
from vit.adapters import parts
from vit.adapters.fused import Part, is_fused
from vit.chain import Link, called, chain
from vit.kernels import runtime
from vit.kernels.autocast import autocast_dtype
from vit.plain import class_of, hooked, is_linear, linear, plain, replaced


def refuse_layer_norm(module: nn.LayerNorm) -> str | None:
    return None if len(module.normalized_shape) == 1 else "it normalises over more than the last dimension"


def layer_norm(base: type, impl: str):
    """A LayerNorm outside of the fused blocks. The result has PyTorch's dtype."""
    original = base.forward

    def forward(self, x: Tensor) -> Tensor:
        low = getattr(self, "_fast_norm", False)  # timm's flag: return autocast's dtype
        weight, bias = self.weight, self.bias
        cast = autocast_dtype(x.device) is not None
        if any(t is not None and t.dtype is not x.dtype for t in (weight, bias)) or (cast and x.dtype is torch.float64):
            return original(self, x)
        if low or not cast:
            return kernels.layer_norm(x, weight, bias, self.eps, impl=impl)
        if x.is_cuda:  # CUDA's autocast computes LayerNorm in fp32
            x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
        with torch.autocast(x.device.type, enabled=False):
            return kernels.layer_norm(x, weight, bias, self.eps, impl=impl)

    return forward


def refuse_projection(module: nn.Conv2d) -> str | None:
    zero = module.padding in ((0, 0), "valid") and module.dilation == (1, 1) and module.groups == 1
    if module.kernel_size != module.stride or module.kernel_size == (1, 1) or not zero:
        return "its kernel is not its stride"
    return None if type(module)._conv_forward is nn.Conv2d._conv_forward else "its class computes something else"


def patch_projection(base: type, impl: str):
    """A convolution with kernel size = stride, as a matrix product. The strides of the result are a convolution's."""
    original = base.forward

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() != 4:
            return original(self, image)
        grid = [size // patch for size, patch in zip(image.shape[2:], self.kernel_size, strict=True)]
        height, width = (n * patch for n, patch in zip(grid, self.kernel_size, strict=True))
        tokens = kernels.patch_embed(image[:, :, :height, :width], self.weight, self.bias, impl=impl)
        shape = (image.shape[0], *grid, tokens.shape[2])
        if any(parts.is_channels_last(t) for t in (image, self.weight)):
            return tokens.reshape(-1).view(shape).permute(0, 3, 1, 2)
        return tokens.mT.reshape(-1).view(shape[0], shape[3], *grid)

    return forward


def refuse_multihead(module: nn.MultiheadAttention) -> str | None:
    plain = module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn
    return None if plain else "its keys and values are not those of plain self-attention"


def multihead_attention(base: type, impl: str):
    """Fuses self-attention without masks and weights; other calls run the original forward."""
    original = base.forward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        simple = key_padding_mask is None and attn_mask is None and not (need_weights or is_causal)
        simple = simple and query is key and key is value and query.dim() == 3 and self.batch_first
        simple = simple and is_linear(self.out_proj)
        options = parts.draw(self.dropout if self.training else 0.0, query) if simple else None
        if options is None:
            return original(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        qkv = kernels.linear(query, self.in_proj_weight, self.in_proj_bias, impl=impl)
        o = kernels.attention_qkvpacked(qkv, num_heads=self.num_heads, impl=impl, **options)
        return linear(self.out_proj, o, impl), None

    return forward


def cross_attention(module: nn.MultiheadAttention, query: Tensor, x: Tensor, impl: str) -> Tensor | None:
    """The output of PyTorch's attention of query [B, M, D] to x [B, N, D], without the weights.

    Returns None if the module must be called.
    """
    usable = class_of(module) is nn.MultiheadAttention and module.batch_first and plain(module)
    usable = usable and refuse_multihead(module) is None
    drop = parts.draw(module.dropout if module.training else 0.0, x) if usable and is_linear(module.out_proj) else None
    if drop is None:
        return None
    width, bias = query.shape[-1], module.in_proj_bias
    (q_weight, kv_weight), (q_bias, kv_bias) = (
        (None, None) if p is None else (p[:width], p[width:]) for p in (module.in_proj_weight, bias)
    )
    q = kernels.linear(query, q_weight, q_bias, impl=impl).unflatten(2, (module.num_heads, -1))
    k, v = kernels.linear(x, kv_weight, kv_bias, impl=impl).unflatten(2, (2, module.num_heads, -1)).unbind(2)
    with runtime.unheard():
        o = kernels.attention(q, k, v, impl=impl, **drop)
    return linear(module.out_proj, o, impl)


def row(base: type, impl: str):
    """A Sequential of blocks, run as a chain."""

    def forward(self, x: Tensor) -> Tensor:
        for stream, _ in chain(x, [link(block) for block in self]):
            x = stream
        return x

    return forward


def link(block: nn.Module) -> Link:
    """The block as a link: its adapter's ``step``, or a call if it is not accelerated, has hooks or another forward."""
    step = type(block)._fused_step if is_fused(block) else None
    if step is None or hooked(block) or replaced(block):
        return called(block)
    return Link(functools.partial(step, block), type(block)._fused_first_norm(block))


MODULES = {
    "torch.nn.modules.normalization.LayerNorm": Part("norm", layer_norm, refuse_layer_norm),
    "timm.layers.norm.LayerNorm": Part("norm", layer_norm, refuse_layer_norm),
    "torch.nn.modules.conv.Conv2d": Part("patch_embed", patch_projection, refuse_projection),
    "torch.nn.modules.activation.MultiheadAttention": Part("attention", multihead_attention, refuse_multihead),
    "torch.nn.modules.container.Sequential": Part("row", row),
}
