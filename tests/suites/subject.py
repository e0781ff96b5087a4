"""The small models of the restated cases, and what a case is given."""

from __future__ import annotations

import dataclasses
import functools

import torch
import zoo
from peers import import_timm, randomise
from side_by_side import Touch
from torch import Tensor, nn


def _hf(name: str, attention: str) -> nn.Module:
    return zoo.hf_model(f"{name}ForImageClassification", f"{name}Config", attn_implementation=attention)


MODELS = {
    "timm ViT": zoo.timm_model,
    "timm registers": lambda: zoo.timm_model(init_values=0.5, reg_tokens=2, no_embed_class=True),
    "timm qk_norm": lambda: zoo.timm_model(qk_norm=True, global_pool="avg", fc_norm=True),
    "torchvision ViT": zoo.torchvision_model,
} | {
    f"hf {name} {attention}": functools.partial(_hf, name, attention)
    for name, attention in (
        ("ViT", "eager"), ("ViT", "sdpa"), ("DeiT", "eager"), ("Dinov2", "eager"), ("Dinov2WithRegisters", "eager"),
        ("Dinov2WithRegisters", "sdpa"),
    )
}  # fmt: skip
HEAVY = ("timm registers", "torchvision ViT", "hf Dinov2 eager")  # for cases that take long
SINGLE_SOFTMAX = ("hf ViT eager", "hf DeiT eager")  # compute a softmax in single precision in any dtype of the model


@dataclasses.dataclass
class Subject:
    """One model by name; ``touch`` leaves it as it is or accelerates it."""

    name: str
    touch: Touch
    dtype: torch.dtype = torch.float64

    def untouched(self, device: str = "cpu", seed: int = 0) -> nn.Module:
        """A fresh model of the library: the same weights at every call."""
        import_timm()
        torch.manual_seed(0)
        with torch.device(device):
            model = MODELS[self.name]()
        if device != "meta":
            randomise(model, seed)
        return model.to(self.dtype).eval()

    def model(self, **options) -> nn.Module:
        return self.touch(self.untouched(**options))

    def image(self, batch: int = 2, seed: int = 1) -> Tensor:
        return zoo.images("", batch=batch, seed=seed).to(self.dtype)

    def gradients(self, model: nn.Module, image: Tensor | None = None) -> dict[str, Tensor]:
        return zoo.results("", model, self.image() if image is None else image)


def logits(out) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def parts(model: nn.Module, cls: type) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, cls)]


def blocks(model: nn.Module) -> nn.Module:
    """The row of blocks: an ``nn.Sequential`` or ``nn.ModuleList``."""
    for name in ("blocks", "encoder.layers", "vit.layers", "deit.layers", "dinov2.encoder.layer",
                 "dinov2_with_registers.encoder.layer"):  # fmt: skip
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise LookupError(f"{type(model).__name__} has no row of blocks")
