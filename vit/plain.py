"""Whether a module may be computed from its parameters, without calling it.

The fused ops read the weights of several modules at once. That is right only where calling the module would do nothing
else: not with hooks, a forward of its own, a parametrisation, pruning, a wrapper (LoRA), or a weight that is quantised
or distributed. Such a module is called as it is: never wrong, only not fused.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vit import kernels


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, hooks)) or _has_any_global_hook() or module._compiled_call_impl is not None


def fused_forward(module: nn.Module) -> Callable | None:
    """The function that `vit.accelerate` made the ``forward`` of this one module."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return function if hasattr(function, "fused_vit") else None


def replaced(module: nn.Module) -> bool:
    """Whether somebody else gave this one module a ``forward``."""
    own = module.__dict__.get("forward")
    if own is None or fused_forward(module) is not None:
        return False
    # A pickled module comes back with its class's forward in place of ours.
    return getattr(own, "__func__", None) is not type(module).forward


def plain(module: nn.Module) -> bool:
    """Whether calling the module computes what its class computes from ordinary tensors, and nothing more."""
    wrapped = any(p is not None and is_traceable_wrapper_subclass(p) for p in module._parameters.values())
    return not (hooked(module) or replaced(module) or wrapped)


def absent(module: nn.Module | None) -> bool:
    """Whether there is nothing to compute."""
    return module is None or (type(module) is nn.Identity and plain(module))


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, and nothing more."""
    return type(module) in (nn.Linear, NonDynamicallyQuantizableLinear) and plain(module)


def linear(module: nn.Module, x: Tensor, impl: str) -> Tensor:
    """``module(x)`` of a linear layer, on the op where it is nothing more."""
    return kernels.linear(x, module.weight, module.bias, impl=impl) if is_linear(module) else module(x)
