"""Whole models: forward without gradients, and forward + backward, in images/s. All have the same weights.

"reference" is `vit.reference`, the plain torch.nn model, with the same kernels as timm in eager mode. "compile" and
"compile-max" compile it. "…-cudnn" uses cuDNN's attention, which PyTorch may not choose. "accelerated" is timm's model
after `vit.accelerate`, and "accelerated-hf" transformers'. The gate checks the logits of two images and gradients of
the first and last parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vit
from benchmarks.harness import Bench, Run, Work
from benchmarks.shapes import Shape
from vit.commands.parity import library
from vit.weights import dialects

CHECKED = ("patch_embed.proj.weight", "pos_embed", "norm.weight", "head.weight")


def inputs(s, rand):
    """The image, and the parameters by timm's names."""
    with torch.device("meta"):
        params = vit.reference.VisionTransformer(s.config).named_parameters()
    tensors = {"image": rand(s.batch, s.config.in_chans, *s.config.img_size)}
    for name, p in params:
        tensors[name] = rand(*p.shape, scale=(p.numel() / len(p)) ** -0.5 if p.dim() in (2, 4) else 0.1)
        if "norm" in name and name.endswith("weight"):
            tensors[name] += 1
    return tensors


def work(s, e):
    """Products only: 24·N·D² (at mlp_ratio 4) + 4·N²·D per block and image, patches and head. Backward: twice that.

    The head needs only the class token, so in the last block the other tokens need only keys and values.
    """
    c, n, d = s.config, s.tokens, s.width
    pixels = c.in_chans * c.patch_size[0] * c.patch_size[1]

    def block(rows: int) -> int:
        return 4 * n * d * d + rows * (4 * d * d + 4 * d * s.hidden + 4 * n * d)

    blocks = (c.depth - 1) * block(n) + block(1 if c.global_pool == "token" else n)
    flops = s.batch * (blocks + 2 * c.num_patches * pixels * d + 2 * d * c.num_classes)
    image = s.batch * c.in_chans * c.img_size[0] * c.img_size[1] * e
    return {"fwd": Work(flops, image), "bwd": Work(2 * flops, image)}


# ---- functions (shape, parameters by timm's names) -> model ----------------------------------------------------------


def _assign(model: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    """``model`` from the meta device, with these tensors as its parameters."""
    model.load_state_dict(params, assign=True)
    return model.requires_grad_().eval()


def _ours(s: Shape, params: dict[str, Tensor]) -> nn.Module:
    return _assign(vit.VisionTransformer(s.config, device="meta"), params)


def _reference(s: Shape, params: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model = vit.reference.VisionTransformer(s.config)
    return _assign(model, params)


def _timm(s: Shape, params: dict[str, Tensor]) -> nn.Module:
    with torch.device("meta"):
        model = library("timm").create_model(s.model, img_size=s.config.img_size)
    return _assign(model, params)


def _accelerated(s: Shape, params: dict[str, Tensor]) -> nn.Module:
    return vit.accelerate(_timm(s, params))


class _HuggingFace(nn.Module):
    def __init__(self, s: Shape, params: dict[str, Tensor]) -> None:
        super().__init__()
        transformers, c = library("transformers"), s.config
        config = transformers.ViTConfig(
            image_size=c.img_size[0], patch_size=c.patch_size[0], hidden_size=c.embed_dim, num_labels=c.num_classes,
            num_hidden_layers=c.depth, num_attention_heads=c.num_heads, intermediate_size=c.mlp_hidden_dim,
            layer_norm_eps=c.norm_eps, attn_implementation="sdpa",
        )  # fmt: skip
        with torch.device("meta"):
            self.model = transformers.ViTForImageClassification(config)
        _assign(self.model, dialects.write("hf_memory", params, c.depth, c.num_heads))

    def forward(self, image: Tensor) -> Tensor:
        return self.model(pixel_values=image).logits


class WithAttention(nn.Module):
    """A model with one backend of PyTorch's attention.

    A compiled model keeps the backend that was active during tracing. So the context must be inside the module, which
    also distinguishes two models that are otherwise equal.
    """

    def __init__(self, backend: SDPBackend, model: nn.Module) -> None:
        super().__init__()
        self.backend, self.model = backend, model

    def forward(self, image: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return self.model(image)


def _cudnn(s: Shape, params: dict[str, Tensor]) -> nn.Module:
    return WithAttention(SDPBackend.CUDNN_ATTENTION, _reference(s, params))


def _compiled(make: Callable[..., nn.Module], mode: str, s: Shape, params: dict[str, Tensor]) -> Any:
    return torch.compile(make(s, params), mode=mode, dynamic=False)


def _graph(s: Shape, params: dict[str, Tensor]) -> Any:
    return vit.graph(_ours(s, params), torch.zeros(s.batch, 3, *s.config.img_size).to(params["pos_embed"]))


MODELS = {
    "ours": _ours,
    "reference": _reference,
    "reference-cudnn": _cudnn,
    "timm": _timm,
    "hf": _HuggingFace,
    "accelerated": _accelerated,
    "accelerated-hf": lambda s, params: vit.accelerate(_HuggingFace(s, params)),
    "compile": functools.partial(_compiled, _reference, "default"),
    "compile-cudnn": functools.partial(_compiled, _cudnn, "default"),
    "compile-max": functools.partial(_compiled, _reference, "max-autotune"),
    "compile-max-cudnn": functools.partial(_compiled, _cudnn, "max-autotune"),
}
AT_ONCE = {"ours": _ours, "graph": _graph, "reference": _reference, "timm": _timm} | {
    "compile-reduce": functools.partial(_compiled, _reference, "reduce-overhead")
}


@dataclasses.dataclass(frozen=True)
class ModelBench(Bench):
    """Models are made from the tensors. The reference gets only the images that the gate checks."""

    def run(self, name: str, shape: Shape, tensors: dict[str, Tensor]) -> Run:
        params = {k: t for k, t in tensors.items() if k != "image"}
        model = self.providers[name](shape, params)
        inner = getattr(model, "_orig_mod", model)
        wanted = list(inner.parameters()) if isinstance(inner, nn.Module) else []
        mine = {p.data_ptr(): p for p in wanted}
        checked = [mine[params[k].data_ptr()] for k in CHECKED] if wanted and self.op != "latency" else []
        return Run(functools.partial(_call, model, tensors["image"], name), wanted, checked)

    def exact(self, shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype) -> Run:
        params = {k: t.detach().to(dtype) for k, t in tensors.items() if k != "image"}
        model = _reference(shape, params)
        image = tensors["image"][: self.samples].to(dtype)
        found = dict(model.named_parameters())
        return Run(lambda: model(image), (), [found[k] for k in CHECKED] if self.op != "latency" else [])


def _call(model: Any, image: Tensor, name: str) -> Tensor:
    if name.startswith("compile-"):  # its graphs overwrite the results of the step before
        torch.compiler.cudagraph_mark_step_begin()
    return model(image)


BENCHES = [
    ModelBench(
        "vit", "vit", inputs, work, vit.reference.VisionTransformer, MODELS, None, replay=False, samples=2
    ),
    ModelBench(
        "vit", "latency", inputs, work, vit.reference.VisionTransformer, AT_ONCE, None, replay=False, samples=1
    ),
]  # fmt: skip
