"""timm's ViT: ``Block``, ``Attention``, ``Mlp`` (read at 1.0.31)."""

from __future__ import annotations

from torch import Tensor, nn

from vit import kernels
from vit.adapters import parts
from vit.plain import absent, linear


def step(block: nn.Module, impl: str, x: Tensor, y: Tensor | None, following: nn.Module | None):
    """One block from the stream x and its norm1 y (None: not known yet) to the stream and the norm1 of the next."""
    y = parts.layer_norm(block.norm1, x, impl) if y is None else y
    branch = block.attn(y, attn_mask=None, is_causal=False)
    x, y = parts.add_norm(x, branch, block.norm2, impl, block.ls1, block.drop_path1)
    next_norm = None if following is None else following.norm1
    return parts.add_norm(x, block.mlp(y), next_norm, impl, block.ls2, block.drop_path2)


def block(module: nn.Module, impl: str):
    original = type(module).forward

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return original(self, x, attn_mask=attn_mask, is_causal=is_causal)
        return step(self, impl, x, None, None)[0]

    forward.step = step
    return forward


def attention(module: nn.Module, impl: str):
    original = type(module).forward

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return original(self, x, attn_mask=attn_mask, is_causal=is_causal)
        norms = self.q_norm, self.k_norm
        packed, normed = all(map(absent, norms)), all(map(parts.is_layer_norm, norms))
        drop = parts.dropping(self.attn_drop, x) if packed or normed else None
        if drop is None:
            return original(self, x)
        gate = None if getattr(self, "gate", None) is None else linear(self.gate, x, impl).sigmoid()
        qkv = linear(self.qkv, x, impl)
        options = {"scale": self.scale, "impl": impl} | drop
        if packed:
            o = kernels.attention(qkv, num_heads=self.num_heads, **options)  # [B, N, D]
        else:
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # [B, N, HEADS, HEAD_DIM] each
            q, k = parts.layer_norm(self.q_norm, q, impl), parts.layer_norm(self.k_norm, k, impl)
            o = kernels.attention_qkv(q, k, v, **options)
        o = parts.layer_norm(self.norm, o, impl) if hasattr(self, "norm") else o
        o = o if gate is None else o * gate
        return self.proj_drop(linear(self.proj, o, impl))

    return forward


def mlp(module: nn.Module, impl: str):
    if not isinstance(module.fc1, nn.Module) or isinstance(module.fc1, nn.Conv2d):
        return "it is made of convolutions"

    def forward(self, x: Tensor) -> Tensor:
        if not absent(getattr(self, "norm", None)):
            hidden = self.drop1(self.act(linear(self.fc1, x, impl)))
            return self.drop2(linear(self.fc2, parts.layer_norm(self.norm, hidden, impl), impl))
        return self.drop2(parts.mlp(self.fc1, self.act, self.drop1, self.fc2, x, impl))

    return forward


MODULES = {
    "timm.models.vision_transformer.Block": ("block", block),
    "timm.layers.attention.Attention": ("attention", attention),
    "timm.models.vision_transformer.Attention": ("attention", attention),  # older versions
    "timm.layers.mlp.Mlp": ("mlp", mlp),
}
# Children that a block may have, and what computes them; others are reported.
CHILDREN = {"norm1": "norm", "attn": "attention", "norm2": "norm", "mlp": "mlp"}
