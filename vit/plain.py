"""Tests whether an op may read a module's parameters instead of calling the module.

A fused op reads the weights of several modules. That is correct only if a call would do nothing else. It is not correct
with hooks, a replaced forward, a parametrisation, pruning, a wrapper (LoRA), or a quantised or distributed weight. Such
modules are called, without fusion.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules import module as module_
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import vit.kernels as kernels

_forwards: dict[type, Callable | None] = {}  # the forward of each class when `remember` first saw it


def class_of(module: nn.Module) -> type:
    """The module's class, or the library's class if `vit.adapters.fused` replaced it."""
    cls = type(module)
    return cls._fused_base if getattr(cls, "_fused_self", None) is cls else cls


def owner_of(cls: type) -> type:
    """The class that defines the library's ``forward``. Skips classes that FSDP or `vit.adapters.fused` derived."""
    classes = (c for c in cls.__mro__ if "_fused_base" not in vars(c) and "torch.distributed.fsdp" not in c.__module__)
    return next(c for c in classes if "forward" in vars(c))


def patched(cls: type) -> bool:
    """Whether the ``forward`` of the class comes from outside its library, even if `functools.wraps` hides that."""
    cls = owner_of(cls)
    module = getattr(cls.forward, "__globals__", {}).get("__name__", "")
    return module.partition(".")[0] != cls.__module__.partition(".")[0]


def remember(*classes: type) -> None:
    """Stores the forward of classes, so that `replaced` detects a later replacement."""
    for cls in classes:
        _forwards.setdefault(cls, None if patched(cls) else cls.forward)


def global_hooks() -> list[str]:
    """Names of the global hooks, which PyTorch runs for every module."""
    kinds = (
        module_._global_forward_hooks,
        module_._global_forward_pre_hooks,
        module_._global_backward_hooks,
        module_._global_backward_pre_hooks,
    )
    return [getattr(hook, "__qualname__", repr(hook)) for hooks in kinds for hook in hooks.values()]


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its ``forward``."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _has_any_global_hook() or module._compiled_call_impl is not None


def replaced(module: nn.Module) -> bool:
    """Whether the ``forward`` of this module or of its class was replaced."""
    cls = class_of(module)
    own = module.__dict__.get("forward")
    if own is not None and (getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module):
        return True
    return cls in _forwards and _forwards[cls] is not cls.forward


def plain(module: nn.Module) -> bool:
    """Whether a call of the module runs only the ``forward`` of its class, on ordinary tensors."""
    others = [p for p in module._parameters.values() if type(p) is not nn.Parameter and p is not None]
    return not (hooked(module) or replaced(module) or any(map(is_traceable_wrapper_subclass, others)))


def absent(module: nn.Module | None) -> bool:
    """Whether the module is None or an identity."""
    return module is None or (type(module) is nn.Identity and plain(module))


def is_linear(module: nn.Module) -> bool:
    """Whether it is a `plain` linear layer."""
    return type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) and plain(module)


def linear(module: nn.Module, x: Tensor, impl: str) -> Tensor:
    """``module(x)`` of a linear layer, with `vit.kernels.linear` if the module is `plain`."""
    return kernels.linear(x, module.weight, module.bias, impl=impl) if is_linear(module) else module(x)


remember(nn.Linear, NonDynamicallyQuantizableLinear, nn.Identity, nn.LayerNorm, nn.Dropout, nn.GELU, nn.Conv2d)
