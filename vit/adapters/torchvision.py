"""torchvision's ViT: ``EncoderBlock`` and ``MLPBlock``; its attention is PyTorch's (read at 0.28)."""

from __future__ import annotations

from torch import Tensor, nn

from vit.adapters import parts


def step(block: nn.Module, impl: str, x: Tensor, y: Tensor | None, following: nn.Module | None):
    """One block from the stream x and its ln_1 y (None: not known yet) to the stream and the ln_1 of the next."""
    y = parts.layer_norm(block.ln_1, x, impl) if y is None else y
    branch, _ = block.self_attention(y, y, y, need_weights=False)
    x, y = parts.add_norm(x, block.dropout(branch), block.ln_2, impl)
    return parts.add_norm(x, block.mlp(y), None if following is None else following.ln_1, impl)


def block(module: nn.Module, impl: str):
    def forward(self, input: Tensor) -> Tensor:
        return step(self, impl, input, None, None)[0]

    forward.step = step
    return forward


def mlp(module: nn.Module, impl: str):
    if len(module) != 5:
        return f"it has {len(module)} layers, not fc1, GELU, dropout, fc2, dropout"

    def forward(self, input: Tensor) -> Tensor:
        fc1, act, drop1, fc2, drop2 = self
        return drop2(parts.mlp(fc1, act, drop1, fc2, input, impl))

    return forward


MODULES = {
    "torchvision.models.vision_transformer.EncoderBlock": ("block", block),
    "torchvision.models.vision_transformer.MLPBlock": ("mlp", mlp),
}
CHILDREN = {"ln_1": "norm", "self_attention": "attention", "ln_2": "norm", "mlp": "mlp"}
