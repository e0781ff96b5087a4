"""timm's ViT: ``Block``, ``Attention`` and ``Mlp`` (as of timm 1.0.31)."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

import vit.kernels as kernels
from vit.adapters import parts
from vit.adapters.fused import Part
from vit.plain import absent, linear


def block(base: type, impl: str):
    original = base.forward
    # A block passes its own mask arguments on to its attention. They differ between timm's versions.
    no_mask = {"attn_mask": None, "is_causal": False}
    no_mask = {name: no_mask[name] for name in inspect.signature(original).parameters if name in no_mask}

    def step(self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None):
        """The ``run`` of `vit.chain.Link`."""
        y = parts.layer_norm(self.norm1, x, impl) if y is None else y
        x, y = parts.add_norm(x, self.attn(y, **no_mask), self.norm2, impl, self.ls1, self.drop_path1)
        return parts.add_norm(x, self.mlp(y), next_norm, impl, self.ls2, self.drop_path2)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            return original(self, x, attn_mask=attn_mask, is_causal=is_causal)
        return step(self, x, None, None)[0]

    forward.step = step
    return forward


def attention(base: type, impl: str):
    original = base.forward

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
            o = kernels.attention_qkvpacked(qkv, num_heads=self.num_heads, **options)  # [B, N, D]
        else:
            q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)  # [B, N, HEADS, HEAD_DIM] each
            q, k = parts.layer_norm(self.q_norm, q, impl), parts.layer_norm(self.k_norm, k, impl)
            o = kernels.attention(q, k, v, **options)
        o = parts.layer_norm(self.norm, o, impl) if hasattr(self, "norm") else o
        o = o if gate is None else o * gate
        return self.proj_drop(linear(self.proj, o, impl))

    return forward


def refuse_mlp(module: nn.Module) -> str | None:
    linear = isinstance(module.fc1, nn.Module) and not isinstance(module.fc1, nn.Conv2d)
    return None if linear else "it is made of convolutions"


def mlp(base: type, impl: str):
    def forward(self, x: Tensor) -> Tensor:
        if not absent(getattr(self, "norm", None)):
            hidden = self.drop1(self.act(linear(self.fc1, x, impl)))
            return self.drop2(linear(self.fc2, parts.layer_norm(self.norm, hidden, impl), impl))
        return self.drop2(parts.mlp(self.fc1, self.act, self.drop1, self.fc2, x, impl))

    return forward


MODULES = {
    "timm.models.vision_transformer.Block": Part("block", block),
    "timm.layers.attention.Attention": Part("attention", attention),
    "timm.models.vision_transformer.Attention": Part("attention", attention),  # older versions
    "timm.layers.mlp.Mlp": Part("mlp", mlp, refuse_mlp),
}
# The children of a block, and the kind of `Part` that each must have.
CHILDREN = {"norm1": "norm", "attn": "attention", "norm2": "norm", "mlp": "mlp"}
# Classes with a patch projection, and its attribute name.
PATCHES = {"timm.layers.patch_embed.PatchEmbed": "proj"}
