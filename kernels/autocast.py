"""What `torch.autocast` does to the public ops."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Op = TypeVar("Op", bound=Callable)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of matrix products under `torch.autocast` on this device; None if it is off."""
    if device.type == "meta":  # PyTorch has no autocast there, and its query raises
        return None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def autocasts(*kept: str) -> Callable[[Op], Op]:
    """Decorates a public op: under `torch.autocast` it casts its tensors to that dtype, and runs with autocast off.

    As in PyTorch's own ops, tensors of fp64 and of integers are not cast. The arguments named in ``kept`` are not cast
    either. The device is that of the first argument.
    """

    def decorate(op: Op) -> Op:
        names = tuple(inspect.signature(op).parameters)

        @functools.wraps(op)
        def under_autocast(*args, **kwargs):
            x = args[0] if args else kwargs.get(names[0])
            dtype = autocast_dtype(x.device) if isinstance(x, torch.Tensor) else None
            if dtype is None:
                return op(*args, **kwargs)

            def cast(name: str, value: Any) -> Any:
                tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
                return value.to(dtype) if tensor and value.dtype is not torch.float64 and name not in kept else value

            positional = [cast(name, value) for name, value in zip(names, args, strict=False)]
            named = {name: cast(name, value) for name, value in kwargs.items()}
            with torch.autocast(x.device.type, enabled=False):
                return op(*positional, *args[len(names) :], **named)

        return under_autocast

    return decorate
