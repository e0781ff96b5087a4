"""Hugging Face's ViT, DeiT and DINOv2: layer, attention, MLP (read at transformers 5.23)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit import kernels
from vit.adapters import parts


def vit_layer(module: nn.Module, impl: str):
    original = parts.owner_of(module).forward

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attention_mask is not None:
            return original(self, hidden_states, attention_mask, **kwargs)
        x = hidden_states
        branch, _ = self.attention(parts.layer_norm(self.layernorm_before, x, impl), attention_mask, **kwargs)
        x, y = parts.add_norm(x, self.dropout(branch), self.layernorm_after, impl)
        return parts.add_norm(x, self.dropout(self.mlp(y)), None, impl)[0]

    return forward


def dinov2_layer(module: nn.Module, impl: str):
    original = parts.owner_of(module).forward

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attention_mask is not None:
            return original(self, hidden_states, attention_mask, **kwargs)
        x = hidden_states
        branch, _ = self.attention(parts.layer_norm(self.norm1, x, impl), attention_mask=attention_mask, **kwargs)
        x, y = parts.add_norm(x, branch, self.norm2, impl, self.layer_scale1, self.drop_path)
        return parts.add_norm(x, self.mlp(y), None, impl, self.layer_scale2, self.drop_path)[0]

    return forward


def attention(module: nn.Module, impl: str):
    original = parts.owner_of(module).forward

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None:
            return original(self, hidden_states, attention_mask, **kwargs)
        options = parts.draw(self.attention_dropout if self.training else 0.0, hidden_states)
        if options is None:
            return original(self, hidden_states, attention_mask, **kwargs)
        q, k, v = (
            parts.linear(projection, hidden_states, impl).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, N, HEADS, HEAD_DIM] each
        o = kernels.attention_qkv(q, k, v, scale=self.scaling, impl=impl, **options)  # [B, N, D]
        wanted = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        weights = kernels.attention_probs(q, k, scale=self.scaling).to(o.dtype) if wanted else None
        return parts.linear(self.o_proj, o, impl), weights

    return forward


def mlp(module: nn.Module, impl: str):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return parts.mlp(self.fc1, self.activation_fn, None, self.fc2, hidden_states, impl)

    return forward


MODULES = {}
_LAYERS = {"ViT": vit_layer, "DeiT": vit_layer, "Dinov2": dinov2_layer, "Dinov2WithRegisters": dinov2_layer}
for _name, _layer in _LAYERS.items():
    _folder = _name.lower().replace("2withregisters", "2_with_registers")
    _path = f"transformers.models.{_folder}.modeling_{_folder}.{_name}"
    MODULES |= {_path + "Layer": ("block", _layer), _path + "Attention": ("attention", attention)}
    MODULES[_path + "MLP"] = ("mlp", mlp)
CHILDREN = {
    "layernorm_before": "norm", "norm1": "norm", "attention": "attention", "layernorm_after": "norm", "norm2": "norm",
    "mlp": "mlp",
}  # fmt: skip
