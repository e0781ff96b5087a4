"""Hugging Face's ViT, DeiT and DINOv2: layer, attention and MLP (as of transformers 5.23)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vit.adapters import parts
from vit.adapters.fused import Part
from vit.plain import linear, owner_of


def _vit(layer: nn.Module, impl: str, x: Tensor, **kwargs: Any) -> Tensor:
    branch, _ = layer.attention(parts.layer_norm(layer.layernorm_before, x, impl), None, **kwargs)
    x, y = parts.add_norm(x, layer.dropout(branch), layer.layernorm_after, impl)
    return parts.add_norm(x, layer.dropout(layer.mlp(y)), None, impl)[0]


def _dinov2(layer: nn.Module, impl: str, x: Tensor, **kwargs: Any) -> Tensor:
    branch, _ = layer.attention(parts.layer_norm(layer.norm1, x, impl), attention_mask=None, **kwargs)
    x, y = parts.add_norm(x, branch, layer.norm2, impl, layer.layer_scale1, layer.drop_path)
    return parts.add_norm(x, layer.mlp(y), None, impl, layer.layer_scale2, layer.drop_path)[0]


def refuse(module: nn.Module) -> str | None:
    """Refuses layers and attentions of other transformers versions, which have the same names but other code."""
    known = ["self", "hidden_states", "attention_mask", "kwargs"]
    same = list(inspect.signature(owner_of(type(module)).forward).parameters) == known
    return (
        None
        if same
        else "its forward is not that of transformers 5.17 to 5.23, the versions known; install one of them"
    )


def layer(run: Callable, base: type, impl: str):
    original = base.forward
    # Without its own __call__, the class applies gradient checkpointing in the forward that we replace.
    checkpoints = base.__call__ is nn.Module.__call__

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attention_mask is not None:
            return original(self, hidden_states, attention_mask, **kwargs)
        fused = functools.partial(run, self, impl, **kwargs)
        if checkpoints and self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(fused, hidden_states)
        return fused(hidden_states)

    return forward


def attention(base: type, impl: str):
    original = base.forward

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None:
            return original(self, hidden_states, attention_mask, **kwargs)
        options = parts.draw(self.attention_dropout if self.training else 0.0, hidden_states)
        if options is None:
            return original(self, hidden_states, attention_mask, **kwargs)
        q, k, v = (
            linear(projection, hidden_states, impl).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, N, HEADS, HEAD_DIM] each
        wanted = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        o, weights = parts.attention_and_maps(q, k, v, wanted, scale=self.scaling, impl=impl, **options)
        return linear(self.o_proj, o, impl), weights

    return forward


def mlp(base: type, impl: str):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return parts.mlp(self.fc1, self.activation_fn, None, self.fc2, hidden_states, impl)

    return forward


MODULES, PATCHES = {}, {}
for _name, _run in {"ViT": _vit, "DeiT": _vit, "Dinov2": _dinov2, "Dinov2WithRegisters": _dinov2}.items():
    _folder = _name.lower().replace("2withregisters", "2_with_registers")
    _path = f"transformers.models.{_folder}.modeling_{_folder}.{_name}"
    MODULES |= {
        _path + "Layer": Part("block", functools.partial(layer, _run), refuse),
        _path + "Attention": Part("attention", attention, refuse),
    }
    PATCHES[_path + "PatchEmbeddings"] = "projection"
    MODULES[_path + "MLP"] = Part("mlp", mlp)
CHILDREN = {
    "layernorm_before": "norm", "norm1": "norm", "attention": "attention", "layernorm_after": "norm", "norm2": "norm",
    "mlp": "mlp",
}  # fmt: skip
