"""`vit.accelerate`: runs an existing timm, Hugging Face or torchvision model on the fused ops.

The package does not import these libraries. It recognises a module by the name of its class. A module keeps its name,
parameters, buffers and hooks. Its class is replaced by a subclass with a fused ``forward`` (see `fused`), and `restore`
undoes that.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator

from torch import nn

from vit.adapters import generic, huggingface, parts, timm, torchvision
from vit.adapters.fused import Part, fused_class, library_class
from vit.kernels import runtime
from vit.plain import class_of, owner_of, patched, remember, replaced

_LIBRARIES = (timm, torchvision, huggingface)
_MODULES = generic.MODULES | {path: entry for library in _LIBRARIES for path, entry in library.MODULES.items()}
_PATCHES = {path: name for library in _LIBRARIES for path, name in library.PATCHES.items()}
# Further classes that a block may contain, besides those in its library's CHILDREN.
_HELPERS = {"torch.nn.modules.linear.Identity", "torch.nn.modules.dropout.Dropout", *parts.DROP_PATHS}
_HELPERS |= set(parts.LAYER_SCALES)


def accelerate(
    model: nn.Module,
    impl: str = "auto",
    *,
    attention: bool = True,
    mlp: bool = True,
    norm: bool = True,
    patch_embed: bool = True,
) -> nn.Module:
    """Makes a timm, Hugging Face or torchvision ViT run on the fused ops, in place.

    Parameters, ``state_dict`` keys, signatures and outputs do not change, so an existing optimizer still works. Each
    fused module gets a subclass of its class, as with PyTorch's parametrisations. Copies and saved modules stay
    accelerated. TorchScript, torch.fx and the legacy ONNX exporter see the library's model.

    Some modules are called without fusion: those with a replaced ``forward``, and linear layers, LayerNorms and other
    parts with hooks, wrappers (LoRA) or quantised weights. It does not matter whether that change comes before or after
    this call.

    Args:
        model: a module that contains blocks of timm's ``VisionTransformer``, of torchvision's, or of a model of
            transformers that is in `vit.adapters.huggingface.ROWS`. A text model in it does not change.
        impl: path of every op. "auto": fused if supported, else plain PyTorch. "fused": fused, or an error. "triton":
            as "fused", with our kernel also for plain matrix products. "reference": plain PyTorch.
        attention: use the attention op.
        mlp: use the MLP op.
        norm: use the ops for LayerNorm and for residual add with LayerNorm.
        patch_embed: use the op for the patch projection.

    Returns:
        ``model`` itself. Blocks of an unknown class do not change. Parts of a block that have no kernel (SwiGLU,
        RMSNorm) are called, and the rest of it is fused. One UserWarning names both, and `vit.explain` lists them.

    Raises:
        ValueError: the model has no block to accelerate (the message says what was found), the model is a
            `vit.VisionTransformer`, which needs no acceleration, or ``impl`` is unknown.
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    if impl not in runtime.IMPLS:
        raise ValueError(f"accelerate: impl must be one of {', '.join(map(repr, runtime.IMPLS))}, got {impl!r}")
    if parts.path_of(type(model)) == "vit.model.VisionTransformer":
        raise ValueError("accelerate: a vit.VisionTransformer runs on the fused ops as it is, see its config's impl")
    features = {"attention": attention, "mlp": mlp, "norm": norm, "patch_embed": patch_embed}
    wanted = {name for name, on in features.items() if on}

    chosen, left = _survey(model)
    if not any(part.kind == "block" for part in chosen.values()):
        raise ValueError(f"accelerate: {type(model).__name__} has no block that the fused ops can run: {_why(left)}")
    if left:
        warnings.warn(f"accelerate: these stay as they are: {_why(left)}", UserWarning, stacklevel=2)
    restore(model)
    remember(*map(type, model.modules()))
    for module, part in chosen.items():
        if {"norm" if part.kind in ("block", "row") else part.kind, *part.needs} <= wanted:
            module.__class__ = fused_class(type(module), part.make, impl)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate` in place: every module runs its library's ``forward`` again. Returns ``model``."""
    for module in model.modules():
        if type(module) is not library_class(type(module)):
            module.__class__ = library_class(type(module))
    return model


def left_alone(model: nn.Module) -> dict[str, tuple[str, str]]:
    """What `accelerate` leaves to the library in this model: the class and the reason, by the module's name."""
    return {name: (parts.path_of(class_of(module)), reason) for module, (name, reason) in _survey(model)[1].items()}


def _survey(model: nn.Module) -> tuple[dict[nn.Module, Part], dict[nn.Module, tuple[str, str]]]:
    """The modules to fuse, and the name of and the reason for each module that stays as it is."""
    chosen, left = {}, {}
    projections = set(_patch_projections(model))
    for name, module in _outside_of(model, left):
        part, reason = part_of(class_of(module)), None
        if module in left:
            continue
        if _is_text_model(module):
            reason = "a text model"
        elif part is None:
            reason = "an unknown class" if _looks_like_a_block(module) else None
        elif part.kind == "row" or (part.kind == "patch_embed" and module not in projections):
            continue
        elif replaced(module) or patched(type(module)):
            reason = "its forward was replaced"
        elif part.kind == "block":
            reason = part.refuse(module) or _unknown_part(module)
        if reason is not None:
            left[module] = (name, reason)
        elif part is not None and not part.refuse(module):
            chosen[module] = part
            left |= {getattr(module, child): (f"{name}.{child}", why) for child, why in _called_parts(module)}
    for module in model.modules():
        row = class_of(module) is nn.Sequential and not replaced(module)
        if row and any(block in chosen and chosen[block].kind == "block" for block in module):
            chosen[module] = part_of(nn.Sequential)
    return chosen, left


def _outside_of(model: nn.Module, left: dict[nn.Module, tuple[str, str]]) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module once, parents first, except modules inside those that the caller has put into ``left``."""
    skipped = set()
    for name, module in model.named_modules():
        if module in skipped:
            continue
        yield name, module
        if module in left:
            skipped.update(module.modules())


def part_of(cls: type) -> Part | None:
    """The `Part` of a class, or None for an unknown class."""
    return _MODULES.get(parts.path_of(library_class(cls))) or _MODULES.get(parts.path_of(owner_of(cls)))


def _patch_projections(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the patch projections of all modules whose class is in PATCHES."""
    for module in model.modules():
        for cls in type(module).__mro__:
            if name := _PATCHES.get(parts.path_of(cls)):
                yield getattr(module, name)


def _unknown_part(block: nn.Module) -> str | None:
    """The reason why the forward of this block is not that of its class, or why nothing of it is fused; or None."""
    known = _children(block)
    for name, child in block.named_children():
        if name not in known and parts.path_of(class_of(child)) not in _HELPERS:
            return f"its {name} is {parts.path_of(class_of(child))}"
    kernels, called = ("norm", "attention", "mlp"), dict(_called_parts(block))
    fused = any(known.get(name) in kernels and name not in called for name, _ in block.named_children())
    if not (fused or part_of(class_of(block)).needs):  # a block that needs the attention op has its own attention
        return "none of its parts has a kernel"
    changed = (name for name, part in block.named_modules() if patched(type(part)))
    return next((f"the class of its {name} had its forward replaced" for name in changed), None)


def _called_parts(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields the parts of a block, attention or MLP that are called as they are, and the reason."""
    for name, child in module.named_children():
        want = _children(module).get(name)
        if not want or parts.path_of(class_of(child)) in _HELPERS:
            continue
        inside = [part_of(class_of(part)) for part in child.modules()]  # a wrapper (PEFT) contains the known module
        if not any(part is not None and part.kind == want for part in inside):
            yield name, "no kernel computes it"
        elif inside[0] is not None and (refusal := inside[0].refuse(child)):
            yield name, refusal


def _children(module: nn.Module) -> dict[str, str]:
    """The names of a module's parts and the kind of `Part` that each may be, "" for one that is called."""
    path = parts.path_of(owner_of(type(module)))
    return next((library.CHILDREN for library in _LIBRARIES if path in library.MODULES), {})


def _is_text_model(module: nn.Module) -> bool:
    """Whether it is a model of transformers for text, whose calls are causal or have a mask.

    "text" is also the default of the library, so such a model must have no images as main input and no patches.
    """
    modalities, kind = getattr(module, "input_modalities", None), getattr(module, "config", None)
    if modalities is None or module.main_input_name == "pixel_values":
        return False
    text = {modalities} if isinstance(modalities, str) else {*modalities}
    named = str(getattr(kind, "model_type", "")).endswith("text_model")
    return (named or text == {"text"}) and next(_patch_projections(module), None) is None


def _looks_like_a_block(module: nn.Module) -> bool:
    """Whether a module of an unknown class has attention and a norm as direct children."""
    names = [(name.lower(), type(child).__name__.lower()) for name, child in module.named_children()]
    attends = any(("attn" in name or "attention" in name) and "pool" not in name for name, _ in names)
    return attends and any("norm" in kind for _, kind in names)


def _why(left: dict[nn.Module, tuple[str, str]]) -> str:
    """The unchanged modules as text: for each class and reason, the first name and a count."""
    if not left:
        return "no attention block was found in it"
    first, counts = {}, Counter()
    for module, (name, reason) in left.items():
        key = (parts.path_of(class_of(module)), reason)
        first.setdefault(key, name)
        counts[key] += 1
    return "; ".join(
        f"{path} ({first[path, reason]}{f' and {count - 1} more' if count > 1 else ''}): {reason}"
        for (path, reason), count in counts.items()
    )
