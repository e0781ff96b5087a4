"""The ops and small models that the stages run, their gradients, and the comparison of bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vit
from benchmarks.harness import as_tuple
from vit import kernels
from vit.kernels import reference


def device(rehearse: bool) -> torch.device:
    return torch.device("cpu" if rehearse else "cuda")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def half(rehearse: bool) -> torch.dtype:
    """bf16, but fp32 in a rehearsal, because Triton's own interpreter computes bf16 wrongly."""
    return torch.float32 if rehearse else torch.bfloat16


@dataclasses.dataclass
class Case:
    """One op and its arguments. Every tensor requires grad."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> Callable[..., Any]:
        return functools.partial(getattr(kernels, self.op), impl="triton", **self.options)

    @property
    def eager(self) -> Callable[..., Any]:
        return functools.partial(getattr(reference, self.op), **self.options)

    @functools.cached_property
    def cotangents(self) -> list[Tensor]:
        """One for each output with a gradient, the same for every call."""
        with torch.no_grad():
            outs = as_tuple(self.ours(**self.tensors))
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(o.shape, generator=generator).to(o) for o in outs]

    def results(self, fn: Callable[..., Any] | None = None, tensors: dict[str, Tensor] | None = None) -> list[Tensor]:
        """Outputs and the gradient of every tensor."""
        return outputs_and_grads(fn or self.ours, tensors or self.tensors, self.cotangents)


def op_cases(device: torch.device, rehearse: bool, head_dim: int = 0, heads: int = 12, batch: int = 8) -> list[Case]:
    """Every op at the shapes of a ViT in bf16, by default ViT-B. A rehearsal uses tiny shapes and fp32."""
    batch, grid, patch = (1, 2, 4) if rehearse else (batch, 14, 16)
    head_dim, heads = (head_dim or 16, 1) if rehearse else (head_dim or 64, heads)
    tokens, dim = 1 + grid * grid, head_dim * heads
    hidden = (2 if rehearse else 4) * dim

    rand = functools.partial(torch.randn, device=device, dtype=half(rehearse))
    x = rand(batch, tokens, dim)
    qkv = rand(batch, tokens, 3, heads, head_dim)
    q, k, v = (t.contiguous() for t in qkv.unbind(2))
    fc1, fc2 = rand(hidden, dim) * dim**-0.5, rand(dim, hidden) * hidden**-0.5
    norm = {"weight": rand(dim), "bias": rand(dim)}
    stem = {"image": rand(batch, 3, grid * patch, grid * patch), "weight": rand(dim, 3, patch, patch) * 0.04}
    tables = {"bias": rand(dim), "pos_embed": rand(1, tokens, dim), "prefix": rand(1, 1, dim)}
    return [
        Case("patch_embed", stem | tables),
        Case("layer_norm", {"x": x} | norm),
        Case("residual_layer_norm", {"residual": x, "branch": rand(batch, tokens, dim), "gamma": rand(dim)} | norm),
        Case("linear", {"x": x, "weight": rand(dim, dim) * dim**-0.5, "bias": rand(dim)}),
        Case("mlp", {"x": x, "fc1_weight": fc1, "fc1_bias": rand(hidden), "fc2_weight": fc2, "fc2_bias": rand(dim)}),
        Case("attention_qkvpacked", {"qkv": qkv}),
        Case("attention", {"q": q, "k": k, "v": v}),
    ]


def outputs_and_grads(fn: Callable[..., Any], tensors: dict[str, Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    outs = as_tuple(fn(**leaves))[: len(cotangents)]
    grads = torch.autograd.grad(outs, list(leaves.values()), cotangents)
    return [*(o.detach() for o in outs), *grads]


def small_model(device: torch.device, rehearse: bool, impl: str = "triton") -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A small ViT in bf16 with every kind of parameter, images, and a cotangent of its logits."""
    dtype, (size, patch, width, heads, depth, batch) = (
        half(rehearse),
        (16, 8, 32, 2, 1, 1) if rehearse else (96, 16, 192, 3, 3, 4),
    )
    config = vit.ViTConfig(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=16,
        reg_tokens=1, init_values=0.5, mlp_ratio=2.0, impl=impl,
    )  # fmt: skip
    model = vit.VisionTransformer(config, seed=0, device=device, dtype=dtype)
    image = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    return model, image, torch.randn(batch, 16, device=device, dtype=dtype)


def model_results(model: torch.nn.Module, image: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Logits, and gradients of the image and of every parameter, detached from the graph."""
    image = image.detach().clone().requires_grad_()
    out = model(image)
    return [out.detach(), *torch.autograd.grad(out, [image, *model.parameters()], cotangent)]


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether any bit differs, as a tensor on the device, without synchronisation."""
    kind = _BITS[a.element_size()]
    return (a.contiguous().view(kind) != b.contiguous().view(kind)).any()


def same_bits(expected: Sequence[Tensor], repeats: Sequence[Sequence[Tensor]] | Any) -> dict[str, Any]:
    """A record, which is ok if every repeat has the bits of ``expected`` and these are finite."""
    differing, times = torch.zeros(len(expected), dtype=torch.int64, device=expected[0].device), 0
    for times, again in enumerate(repeats, start=1):  # noqa: B007 (the number of repeats is wanted)
        differing += torch.stack([bits_differ(a, b) for a, b in zip(expected, again, strict=True)])
    finite = bool(torch.stack([t.isfinite().all() for t in expected]).all())
    counts = differing.tolist()  # synchronises
    return {
        "ok": finite and not any(counts), "times": times, "count": len(expected), "finite": finite,
        "differing": {i: n for i, n in enumerate(counts) if n},
    }  # fmt: skip
