"""torchvision's ViT: ``EncoderBlock`` and ``MLPBlock`` (as of torchvision 0.28). Its attention is PyTorch's."""

from __future__ import annotations

from torch import Tensor, nn

from vit.adapters import parts
from vit.adapters.fused import Part


def block(base: type, impl: str):
    def step(self, x: Tensor, y: Tensor | None, next_norm: nn.Module | None):
        """The ``run`` of `vit.chain.Link`."""
        y = parts.layer_norm(self.ln_1, x, impl) if y is None else y
        branch, _ = self.self_attention(y, y, y, need_weights=False)
        x, y = parts.add_norm(x, self.dropout(branch), self.ln_2, impl)
        return parts.add_norm(x, self.mlp(y), next_norm, impl)

    def forward(self, input: Tensor) -> Tensor:
        return step(self, input, None, None)[0]

    forward.step, forward.first_norm = step, lambda self: self.ln_1
    return forward


def refuse_mlp(module: nn.Module) -> str | None:
    return None if len(module) == 5 else f"it has {len(module)} layers, not fc1, GELU, dropout, fc2, dropout"


def mlp(base: type, impl: str):
    def forward(self, input: Tensor) -> Tensor:
        fc1, act, drop1, fc2, drop2 = self
        return drop2(parts.mlp(fc1, act, drop1, fc2, input, impl))

    return forward


MODULES = {
    "torchvision.models.vision_transformer.EncoderBlock": Part("block", block),
    "torchvision.models.vision_transformer.MLPBlock": Part("mlp", mlp, refuse_mlp),
}
CHILDREN = {"ln_1": "norm", "self_attention": "attention", "ln_2": "norm", "mlp": "mlp"}
PATCHES = {"torchvision.models.vision_transformer.VisionTransformer": "conv_proj"}
