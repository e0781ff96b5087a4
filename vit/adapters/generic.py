"""Modules that all libraries take from PyTorch: LayerNorm, the patch projection, multi-head attention.

Each function makes the ``forward`` of one module, or says why it cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vit import kernels
from vit.adapters import parts
from vit.kernels import runtime
from vit.plain import fused_forward, hooked, is_linear, linear


def layer_norm(module: nn.LayerNorm, impl: str):
    """A LayerNorm between or after the blocks; its result has the dtype that PyTorch gives it."""
    if len(module.normalized_shape) != 1:
        return "it normalises over more than the last dimension"
    original = type(module).forward

    def forward(self, x: Tensor) -> Tensor:
        low = getattr(self, "_fast_norm", False)  # timm's switch for autocast's dtype
        weight, bias = self.weight, self.bias
        if any(t is not None and t.dtype is not x.dtype for t in (weight, bias)):
            return original(self, x)
        if low or runtime.autocast_dtype(x.device) is None:
            return kernels.layer_norm(x, weight, bias, self.eps, impl=impl)
        if x.is_cuda:  # where autocast asks for fp32
            x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
        with torch.autocast(x.device.type, enabled=False):
            return kernels.layer_norm(x, weight, bias, self.eps, impl=impl)

    return forward


def patch_projection(module: nn.Conv2d, impl: str):
    """A convolution whose kernel is its stride: patches times a matrix."""
    zero = module.padding in ((0, 0), "valid") and module.dilation == (1, 1) and module.groups == 1
    if module.kernel_size != module.stride or module.kernel_size == (1, 1) or not zero:
        return "its kernel is not its stride"
    if type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return "its class computes something else"

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() != 4:
            return nn.Conv2d.forward(self, image)
        grid = [size // patch for size, patch in zip(image.shape[2:], self.kernel_size, strict=True)]
        height, width = (n * patch for n, patch in zip(grid, self.kernel_size, strict=True))
        tokens = kernels.patch_embed(image[:, :, :height, :width], self.weight, self.bias, impl=impl)
        return tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, gh, gw]: a view, which the caller views back

    return forward


def multihead_attention(module: nn.MultiheadAttention, impl: str):
    """Self-attention without masks; everything else is computed as before."""
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return "its keys and values are not those of plain self-attention"

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
            return nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        qkv = kernels.linear(query, self.in_proj_weight, self.in_proj_bias, impl=impl)
        o = kernels.attention(qkv, num_heads=self.num_heads, impl=impl, **options)
        return linear(self.out_proj, o, impl), None

    return forward


def sequence(module: nn.Sequential, impl: str):
    """Blocks in a row: the add at the end of one and the LayerNorm at the start of the next are one op."""

    def forward(self, x: Tensor) -> Tensor:
        y = None
        blocks = list(self)
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            step = _step(block)
            if step is None:
                x, y = block(x), None
            else:
                x, y = step(block, impl, x, y, following if _step(following) is step else None)
        return x

    return forward


def _step(block: nn.Module | None):
    """The library's ``step(block, impl, x, y, following)``, y the normalised stream, if it does all a call would."""
    return None if block is None or hooked(block) else getattr(fused_forward(block), "step", None)


MODULES = {
    "torch.nn.modules.normalization.LayerNorm": ("norm", layer_norm),
    "timm.layers.norm.LayerNorm": ("norm", layer_norm),
    "torch.nn.modules.conv.Conv2d": ("patch_embed", patch_projection),
    "torch.nn.modules.activation.MultiheadAttention": ("attention", multihead_attention),
}
