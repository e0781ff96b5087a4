"""`vit.accelerate`: the fused ops in a live model of timm, Hugging Face or torchvision.

Nothing of those libraries is imported: modules are known by the class whose ``forward`` they run. A module keeps its
class, parameters, buffers and hooks; it gets a ``forward`` of its own, which `restore` takes away again.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections import Counter
from collections.abc import Iterator

from torch import nn

from vit.adapters import generic, huggingface, parts, timm, torchvision
from vit.kernels import runtime
from vit.plain import fused_forward, replaced

_LIBRARIES = (timm, torchvision, huggingface)
_MODULES = generic.MODULES | {path: entry for library in _LIBRARIES for path, entry in library.MODULES.items()}
_FEATURES = ("attention", "mlp", "norm", "patch_embed")
# Modules that a block may hold beside those that its library's CHILDREN name; they are called, or read where plain.
_HELPERS = {"torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout", *parts.DROP_PATHS}
_HELPERS |= set(parts.LAYER_SCALES)


def accelerate(model: nn.Module, impl: str = "auto", **features: bool) -> nn.Module:
    """Makes a timm, Hugging Face or torchvision ViT run on the fused ops, in place.

    The object, its parameters, ``state_dict`` keys, signatures and outputs stay what they are, so an optimizer made
    before still works. A linear layer, LayerNorm or other part that somebody hooks, wraps (LoRA) or quantises, before
    or after, is called as it is.

    Args:
        model: with blocks of timm's ``VisionTransformer``, transformers' ViT, DeiT, Dinov2 or Dinov2WithRegisters, or
            torchvision's ``VisionTransformer``, anywhere in it.
        impl: of every op: "auto" (Triton where supported, else plain PyTorch), "triton" or "reference".
        **features: ``attention``, ``mlp``, ``norm`` (LayerNorms and the residual adds before them) and ``patch_embed``,
            each True unless switched off.

    Returns:
        ``model`` itself. Blocks that are not known, or have unknown parts (SwiGLU, RoPE), are left as they are, with
        one UserWarning that names them.

    Raises:
        ValueError: there is no block to accelerate (the message says what was found), unknown impl or feature.
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    if impl not in runtime.IMPLS:
        raise ValueError(f"accelerate: impl must be one of {', '.join(map(repr, runtime.IMPLS))}, got {impl!r}")
    for name in features.keys() - set(_FEATURES):
        raise ValueError(f"accelerate: unknown feature {name!r}; the features are {', '.join(_FEATURES)}")
    if parts.path_of(type(model)) == "vit.model.VisionTransformer":
        raise ValueError("accelerate: a vit.VisionTransformer runs on the fused ops as it is, see its config's impl")
    wanted = {name for name in _FEATURES if features.get(name, True)}

    forwards, left, found = {}, {}, False
    for name, module in _outside_of(model, left):
        kind, make = _entry(module)
        if kind is None:
            reason = "an unknown class" if _looks_like_a_block(module) else None
        elif replaced(module) or parts.patched(parts.owner_of(module)):
            reason = "its forward was replaced"
        elif kind == "block":
            reason = _unknown_part(module)
        else:
            reason = None
        if reason is None and kind is not None:
            forward = make(module, impl)
            if not isinstance(forward, str) and ("norm" if kind == "block" else kind) in wanted:
                forwards[module] = forward
            found |= kind == "block"
        if reason is not None:
            left[module] = (name, reason)
    if not found:
        raise ValueError(f"accelerate: {type(model).__name__} has no block that the fused ops can run: {_why(left)}")
    if "norm" in wanted:
        for module in model.modules():
            row = type(module) is nn.Sequential and any(hasattr(forwards.get(block), "step") for block in module)
            if row and not replaced(module):
                forwards[module] = generic.sequence(module, impl)
    if left:
        warnings.warn(f"accelerate: these stay as they are: {_why(left)}", UserWarning, stacklevel=2)
    restore(model)
    for module, forward in forwards.items():
        forward = functools.wraps(type(module).forward)(forward)
        forward.fused_vit = True
        module.forward = types.MethodType(forward, module)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every module runs its class's ``forward`` again, to the same bits. Returns ``model``."""
    for module in model.modules():
        if fused_forward(module) is not None:
            del module.forward
    return model


def _outside_of(model: nn.Module, left: dict[nn.Module, tuple[str, str]]) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, parents first, without what is inside those that meanwhile are in ``left``."""
    skipped = set()
    for name, module in model.named_modules():
        if module in skipped:
            continue
        yield name, module
        if module in left:
            skipped.update(module.modules())


def _entry(module: nn.Module):
    """What kind of part a module is and what makes its forward; (None, None) for an unknown one."""
    own, owner = parts.path_of(type(module)), parts.path_of(parts.owner_of(module))
    return _MODULES.get(own) or _MODULES.get(owner) or (None, None)


def _unknown_part(block: nn.Module) -> str | None:
    """Why a known block cannot be computed by the fused ops; None if it can."""
    path = parts.path_of(parts.owner_of(block))
    library = next(library for library in _LIBRARIES if path in library.MODULES)
    for name, child in block.named_children():
        kind, make = _entry(child)
        want = library.CHILDREN.get(name)
        if want is None and parts.path_of(type(child)) not in _HELPERS:
            return f"its {name} is {parts.path_of(type(child))}"
        if want is not None and kind != want:
            return f"its {name} is {parts.path_of(type(child))}"
        if want is not None and isinstance(refusal := make(child, "auto"), str):
            return f"its {name} cannot run: {refusal}"
    patched = (name for name, part in block.named_modules() if parts.patched(parts.owner_of(part)))
    return next((f"the class of its {name} had its forward replaced" for name in patched), None)


def _looks_like_a_block(module: nn.Module) -> bool:
    """Whether a module of an unknown class holds, as its own children, attention and a normalisation."""
    names = [(name.lower(), type(child).__name__.lower()) for name, child in module.named_children()]
    attends = any(("attn" in name or "attention" in name) and "pool" not in name for name, _ in names)
    return attends and any("norm" in kind for _, kind in names)


def _why(left: dict[nn.Module, tuple[str, str]]) -> str:
    """What was left and why, a line for each class and reason, with the first of their names."""
    if not left:
        return "no attention block was found in it"
    first, counts = {}, Counter()
    for module, (name, reason) in left.items():
        key = (parts.path_of(type(module)), reason)
        first.setdefault(key, name)
        counts[key] += 1
    return "; ".join(
        f"{path} ({first[path, reason]}{f' and {count - 1} more' if count > 1 else ''}): {reason}"
        for (path, reason), count in counts.items()
    )
