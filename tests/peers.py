"""Comparison with other libraries. A test skips if its library is not installed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType

import pytest
import torch

marked = True  # whether the running test has the mark `peers`, by which `make test-peers` selects
_declared = []  # garbage collection of a Library would remove its operators


def import_timm() -> ModuleType:
    """timm, or skips."""
    return _import("timm")


def import_transformers() -> ModuleType:
    """transformers, or skips."""
    return _import("transformers")


def import_torchvision() -> ModuleType:
    """torchvision, or skips."""
    return _import("torchvision")


def _import(name: str) -> ModuleType:
    assert marked, "a test that compares with another library is marked: @pytest.mark.peers"
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    _make_torchvision_importable()
    return importlib.import_module(name)


@functools.cache
def _make_torchvision_importable() -> None:
    """Declares the operators that the import of torchvision needs, if its own library cannot be loaded.

    This happens with a GPU build of torchvision and a CPU build of torch. A working torchvision does not change.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or "torchvision" in sys.modules:
        return
    libraries = [p for folder in spec.submodule_search_locations for p in pathlib.Path(folder).glob("_C*.so")]
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
        loaded = bool(libraries)
    except OSError:
        loaded = False
    if not loaded:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Sets weights so large that every part of the model matters. For example, the initial cls_token is about 1e-6."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.ndim > 1 and name.endswith("weight"):
                noise *= param[0].numel() ** -0.5
            scale = 1 + 0.3 * noise if name.endswith("weight") and param.ndim == 1 else noise
            param.copy_(scale)


def outputs_and_gradients(model, run, image, names=lambda name: name) -> dict[str, torch.Tensor]:
    """``run(image)`` and the gradients of the image and of every parameter, for one random cotangent."""
    image = image.clone().requires_grad_()
    out = run(image)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    params = {name: p for name, p in model.named_parameters()}
    grads = torch.autograd.grad(out, [image, *params.values()], cotangent)
    return {"output": out, "image": grads[0]} | {names(k): g for k, g in zip(params, grads[1:], strict=True)}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert ours[name].shape == want.shape, name
        # A key bias shifts all logits of a query equally, so its gradient is only rounding error.
        scale = theirs[name.replace("k_norm.bias", "q_norm.bias")]
        error = (ours[name] - want).abs().max().item() / scale.abs().max().item()
        assert error <= limit, f"{name}: {error:.2e} of its largest element"  # NaN fails, too


def timm_twin(config) -> torch.nn.Module:
    """timm's model of the same architecture, without PyTorch's fused attention."""
    timm = import_timm()
    fields = vars(config) | {"norm_layer": lambda dim, **kw: torch.nn.LayerNorm(dim, eps=config.norm_eps, **kw)}
    for ours_only in ("norm_eps", "interpolation", "impl", "representation_size", "use_mask_token", "act_drop_rate"):
        fields.pop(ours_only)
    model = timm.models.VisionTransformer(**fields)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model
