"""Whether a module may be computed from its parameters, without calling it.

The fused ops read the weights of several modules at once. That is right only where calling the module would do nothing
else: not with hooks, a parametrisation, pruning, a wrapper (LoRA), or a weight that is quantised or distributed. Such a
module is called as it is: never wrong, only not fused.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vit import kernels

LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its ``forward``."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, hooks)) or _has_any_global_hook() or module._compiled_call_impl is not None


def plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether calling the module computes what its kind computes from ordinary tensors, and nothing more."""
    return (
        type(module) in kinds
        and not hooked(module)
        and not any(p is not None and is_traceable_wrapper_subclass(p) for p in module._parameters.values())
    )


def linear(module: nn.Module, x: Tensor, impl: str) -> Tensor:
    """``module(x)`` of a linear layer, on the op where it is plain."""
    return kernels.linear(x, module.weight, module.bias, impl=impl) if plain(module, LINEAR) else module(x)
