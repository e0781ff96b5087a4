"""timm's ViT and Eva, and blocks like theirs; ``Attention`` without and with RoPE; ``Mlp`` (as of timm 1.0.31)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vit.kernels as kernels
from vit.adapters import parts
from vit.adapters.fused import Part
from vit.kernels import runtime
from vit.plain import absent, class_of, is_linear, linear, owner_of, plain

_NO_MASK = {"attn_mask": None, "is_causal": False}  # the arguments of a call without a mask


def block(base: type, impl: str):
    """A pre-LN block. In Eva and BEiT, LayerScale is a parameter, and the attention gets RoPE or a bias."""
    original = base.forward
    no_mask = _no_mask(original)

    def step(self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None, **positions: Tensor | None):
        """The ``run`` of `vit.chain.Link`."""
        names = ("ls1", "ls2") if hasattr(self, "ls1") else ("gamma_1", "gamma_2")
        scales = [getattr(self, name, None) for name in names]
        y = parts.layer_norm(self.norm1, x, impl) if y is None else y
        x, y = parts.add_norm(x, self.attn(y, **positions, **no_mask), self.norm2, impl, scales[0], self.drop_path1)
        return parts.add_norm(x, self.mlp(y), next_norm, impl, scales[1], self.drop_path2)

    return _block(original, step, lambda self: self.norm1)


def post_norm_block(base: type, impl: str):
    """A block with the norms at the ends of the branches."""
    original = base.forward
    no_mask = _no_mask(original)

    def step(self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None, **positions: Tensor | None):
        attended = self.norm1(self.attn(x, **positions, **no_mask))
        x, _ = parts.add_norm(x, attended, None, impl, None, self.drop_path1)
        return parts.add_norm(x, self.norm2(self.mlp(x)), next_norm, impl, None, self.drop_path2)

    return _block(original, step, lambda self: None)


def parallel_things_block(base: type, impl: str):
    """Several attentions beside each other, then several MLPs. Each is a Sequential that begins with its own norm."""

    def first_norm(branches: nn.ModuleList) -> nn.Module | None:
        return branches[0].norm if class_of(branches[0]) is nn.Sequential and plain(branches[0]) else None

    def total(branches: nn.ModuleList, x: Tensor, y: Tensor | None) -> Tensor:
        """The sum of the branches; y is x after the norm of the first one, or None."""
        first, *others = branches
        if y is None:
            y = first(x)
        else:
            for part in first[1:]:
                y = part(y)
        outs = [y, *(branch(x) for branch in others)]
        return torch.stack(outs).sum(dim=0)

    def step(self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None):
        x, y = parts.add_norm(x, total(self.attns, x, y), first_norm(self.ffns), impl)
        return parts.add_norm(x, total(self.ffns, x, y), next_norm, impl)

    return _block(base.forward, step, lambda self: first_norm(self.attns))


def parallel_scaling_block(base: type, impl: str):
    """Attention and MLP beside each other, with one projection to the queries, keys, values and hidden units."""

    original = base.forward

    def first_norm(self) -> nn.Module | None:
        return self.in_norm if parts.drops_in_ops(self.attn_drop) else None

    def step(self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None):
        if first_norm(self) is None:
            x = original(self, x)
            return x, None if next_norm is None else parts.layer_norm(next_norm, x, impl)
        y = parts.layer_norm(self.in_norm, x, impl) if y is None else y
        hidden, *qkv = linear(self.in_proj, y, impl).split(self.in_split, dim=-1)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in qkv)  # [B, N, HEADS, HEAD_DIM] each
        q, k = parts.layer_norm(self.q_norm, q, impl), parts.layer_norm(self.k_norm, k, impl)  # timm's layout, too
        o = kernels.attention(q, k, v, scale=self.scale, impl=impl, **parts.dropping(self.attn_drop, x))
        hidden = self.mlp_drop(self.mlp_act(hidden if self.mlp_bias is None else hidden + self.mlp_bias))
        if self.out_proj is None:
            branch = linear(self.attn_out_proj, o, impl) + linear(self.mlp_out_proj, hidden, impl)
        else:
            branch = linear(self.out_proj, torch.cat((o, hidden), dim=-1), impl)
        return parts.add_norm(x, branch, next_norm, impl, self.ls, self.drop_path)

    return _block(original, step, first_norm)


def _no_mask(original: Callable) -> dict[str, Any]:
    """The mask arguments that a block passes on to its attention. They differ between timm's versions."""
    return {name: _NO_MASK[name] for name in inspect.signature(original).parameters if name in _NO_MASK}


def _block(original: Callable, step: Callable, first_norm: Callable[[nn.Module], nn.Module | None]) -> Callable:
    """The forward of a block. Calls with a mask and causal calls run the library's."""
    names = list(inspect.signature(original).parameters)[2:]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        positions, special = _positions(names, args, kwargs)
        return original(self, x, *args, **kwargs) if special else step(self, x, None, None, **positions)[0]

    forward.step, forward.first_norm = step, first_norm
    return forward


def _positions(names: list[str], args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor | None], bool]:
    """The arguments of a call that are no masks (RoPE's table), and whether the call has a mask or is causal."""
    given = dict(zip(names, args, strict=False)) | kwargs
    positions = {name: given.pop(name, None) for name in names if name not in _NO_MASK}
    known = len(args) <= len(names) and given.keys() <= {*names}
    return positions, not known or any(value is not None and value is not False for value in given.values())


def attention(base: type, impl: str):
    """``Attention``, and with RoPE ``EvaAttention`` and ``AttentionRope``. The library's function rotates."""
    original = base.forward
    names = list(inspect.signature(original).parameters)[2:]
    rotate = getattr(sys.modules[owner_of(base).__module__], "apply_rot_embed_cat", None)

    def rotated(self, t: Tensor, rope: Tensor, v: Tensor) -> Tensor:
        """The tokens after the prefix, [B, HEADS, N, HEAD_DIM], rotated."""
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        return torch.cat([t[:, :, :prefix], rotate(t[:, :, prefix:], rope, half=half)], dim=2).type_as(v)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, N, HEADS, HEAD_DIM]. There may be fewer heads of keys and values."""
        if self.qkv is not None:
            return packed(self, x).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        x, counts = parts.kept(x), (self.num_heads, *[getattr(self, "num_kv_heads", self.num_heads)] * 2)
        projections = self.q_proj, self.k_proj, self.v_proj
        return tuple(linear(p, x, impl).unflatten(2, (n, -1)) for p, n in zip(projections, counts, strict=True))

    def packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values [B, N, 3·D]."""
        if getattr(self, "q_bias", None) is None:
            return linear(self.qkv, x, impl)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            return self.qkv(x) + bias
        # As timm, which does not call the layer.
        if is_linear(self.qkv):
            return kernels.linear(x, self.qkv.weight, bias, impl=impl)
        return nn.functional.linear(x, self.qkv.weight, bias)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        positions, special = _positions(names, args, kwargs)
        rope = positions.get("rope")
        drop = None if special else parts.dropping(self.attn_drop, x)
        if drop is None:
            return original(self, x, *args, **kwargs)
        gate = None if getattr(self, "gate", None) is None else linear(self.gate, x, impl).sigmoid()
        options = {"scale": self.scale, "impl": impl} | drop
        if rope is None and all(map(absent, (self.q_norm, self.k_norm))) and self.qkv is not None:
            o = kernels.attention_qkvpacked(packed(self, x), num_heads=self.num_heads, **options)  # [B, N, D]
        else:
            q, k, v = heads(self, x)
            q, k = (_head_norm(norm, t, impl) for norm, t in ((self.q_norm, q), (self.k_norm, k)))
            if rope is not None:
                q, k = (rotated(self, t.transpose(1, 2), rope, v).transpose(1, 2) for t in (q, k))
            groups = q.shape[2] // k.shape[2]
            k, v = (t if groups == 1 else t.repeat_interleave(groups, dim=2) for t in (k, v))
            o = kernels.attention(q, k, v, **options)
        o = parts.layer_norm(self.norm, o, impl) if hasattr(self, "norm") else o
        o = o if gate is None else o * gate
        return self.proj_drop(linear(self.proj, o, impl))

    return forward


def _head_norm(norm: nn.Module, t: Tensor, impl: str) -> Tensor:
    """The norm of queries or keys [B, N, HEADS, HEAD_DIM]. Other norms than LayerNorm get timm's layout."""
    return parts.layer_norm(norm, t, impl) if parts.is_layer_norm(norm) else norm(t.transpose(1, 2)).transpose(1, 2)


def pooling(base: type, impl: str):
    """``AttentionPoolLatent`` (MAP): learned queries, then an MLP with a residual."""
    original = base.forward

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:
            return original(self, x, attn_mask)
        x = x if self.pos_embed is None else x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = linear(self.q, self.latent.expand(len(x), -1, -1), impl).unflatten(2, (self.num_heads, -1))
        k, v = linear(self.kv, x, impl).unflatten(2, (2, self.num_heads, -1)).unbind(2)
        q, k = _head_norm(self.q_norm, q, impl), _head_norm(self.k_norm, k, impl)
        with runtime.unheard():
            o = kernels.attention(q, k, v, scale=self.scale, impl=impl)
        x = self.proj_drop(linear(self.proj, o, impl))
        x = x if self.mlp is None else x + self.mlp(parts.layer_norm(self.norm, x, impl))
        return x[:, 0] if self.pool == "token" else x.mean(1) if self.pool == "avg" else x

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
    "timm.models.vision_transformer.ResPostBlock": Part("block", post_norm_block),
    "timm.models.vision_transformer.ParallelThingsBlock": Part("block", parallel_things_block),
    "timm.models.vision_transformer.ParallelScalingBlock": Part("block", parallel_scaling_block, needs=("attention",)),
    "timm.models.eva.EvaBlock": Part("block", block),
    "timm.models.eva.EvaBlockPostNorm": Part("block", post_norm_block),
    "timm.models.beit.Block": Part("block", block),
    "timm.models.deepseek_vit.DeepseekVitBlock": Part("block", block),
    "timm.models.vision_transformer_relpos.RelPosBlock": Part("block", block),
    "timm.models.vision_transformer_relpos.ResPostRelPosBlock": Part("block", post_norm_block),
    "timm.layers.attention.Attention": Part("attention", attention),
    "timm.layers.attention.AttentionRope": Part("attention", attention),
    "timm.models.eva.EvaAttention": Part("attention", attention),
    "timm.models.vision_transformer.Attention": Part("attention", attention),  # older versions
    "timm.layers.attention_pool.AttentionPoolLatent": Part("attention", pooling),
    "timm.layers.mlp.Mlp": Part("mlp", mlp, refuse_mlp),
}
# The parts of blocks, attentions and MLPs, and the kind of `Part` that each may be. "": it is called or read if plain.
CHILDREN = {
    "norm1": "norm", "attn": "attention", "norm2": "norm", "mlp": "mlp", "attns": "attention", "ffns": "mlp",
    "in_norm": "norm", "q_norm": "norm", "k_norm": "norm", "norm": "norm", "in_proj": "", "mlp_act": "", "out_proj": "",
    "attn_out_proj": "", "mlp_out_proj": "", "ls": "scale", "ls1": "scale", "ls2": "scale", "drop_path": "scale",
    "drop_path1": "scale", "drop_path2": "scale",
}  # fmt: skip
# Classes with a patch projection, and its attribute name.
PATCHES = {"timm.layers.patch_embed.PatchEmbed": "proj"}
