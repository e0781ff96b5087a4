"""The class of an accelerated module: a subclass of the library's class with the same name and a fused ``forward``.

PyTorch's parametrisations and FSDP2 also replace the class. The forward is a method, not a closure over one module, so
copies and replicas work.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from vit.plain import patched


class Part(NamedTuple):
    """How to accelerate one class of a library."""

    kind: str  # "block", "attention", "mlp", "norm", "patch_embed" or "row"
    make: Callable[[type, str], Callable]  # (library's class, impl) -> forward
    refuse: Callable[[nn.Module], str | None] = lambda module: None  # the reason why the ops cannot compute it
    needs: tuple[str, ...] = ()  # further features of `accelerate` that the forward uses


@functools.cache
def fused_class(base: type, make: Callable[[type, str], Callable], impl: str) -> type:
    """The subclass of ``base`` whose forward is ``make(base, impl)``."""
    fused = make(base, impl)
    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_fused_base": base,
        "_fused_impl": impl,
        "_fused_step": getattr(fused, "step", None),  # see `generic.link`
        "_fused_first_norm": getattr(fused, "first_norm", None),
    }
    cls = type(base.__name__, (base,), members)
    cls.forward = _forward(base, fused)  # not in members: transformers wraps the forward that a new subclass defines
    cls._fused_self = cls  # a subclass inherits it, so `cls._fused_self is cls` excludes subclasses
    return cls


def is_fused(module: nn.Module) -> bool:
    """Whether `fused_class` made the module's class, and nobody derived another class from that."""
    return getattr(type(module), "_fused_self", None) is type(module)


def _forward(base: type, fused: Callable) -> Callable:
    """A forward that calls ``fused``, or the library's if a tracer reads it or the class got a new forward."""
    library, is_traced = base.forward, traced

    def forward(self, *args, **kwargs):  # must not use global names: its globals are replaced below
        if base.forward is not library or is_traced(self, *args, *kwargs.values()):
            return base.forward(self, *args, **kwargs)
        return fused(self, *args, **kwargs)

    # TorchScript compiles the source of the wrapped function with these globals, so it sees the library's function.
    forward = types.FunctionType(forward.__code__, library.__globals__, library.__name__, None, forward.__closure__)
    return functools.wraps(library)(forward)


def traced(module: nn.Module, *args: Any) -> bool:
    """Whether torch.fx, the legacy ONNX exporter or Torch-Pruning traces the library's operators."""
    if torch.compiler.is_compiling():
        return False
    if torch.onnx.is_in_onnx_export() or any(isinstance(arg, torch.fx.Proxy) for arg in args):
        return True
    hooks = (hook for child in module.children() for hook in child._forward_hooks.values())
    return "torch_pruning" in sys.modules and any("torch_pruning" in hook.__module__ for hook in hooks)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """Pickle support: the loaded or copied module is accelerated again."""
    cls = type(self)
    if cls._fused_self is not cls:
        return super(cls._fused_self, self).__reduce_ex__(protocol)
    return rebuild, (cls._fused_base, cls._fused_impl), self.__getstate__()


def rebuild(base: type, impl: str) -> nn.Module:
    """Creates an accelerated module without its state. Pickles refer to this function by name."""
    from vit.adapters import part_of, parts  # here, because they import this file

    part = part_of(base)
    if part is None or patched(base):
        warnings.warn(f"{parts.path_of(base)} is not accelerated: call vit.accelerate(model)", stacklevel=2)
        return base.__new__(base)
    cls = fused_class(base, part.make, impl)
    return cls.__new__(cls)


@functools.cache
def library_class(cls: type) -> type:
    """``cls`` without the classes that `fused_class` made, also among its bases."""
    if "_fused_base" in vars(cls):
        return library_class(cls._fused_base)
    bases = tuple(map(library_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)
