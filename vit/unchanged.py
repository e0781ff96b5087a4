"""A forward without side effects on the model, for `vit.explain`, `vit warmup` and `vit.graph`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves


def swaps_parameters(model: nn.Module) -> bool:
    """Whether FSDP2 replaces parameters in a forward. It also puts them back, some of them only in the backward."""
    return any("torch.distributed.fsdp" in cls.__module__ for m in model.modules() for cls in type(m).__mro__)


@contextlib.contextmanager
def unchanged(model: nn.Module, inputs: Any, *, train: bool = False) -> Iterator[None]:
    """Restores what forwards inside the ``with`` block change: buffers, training modes and random states.

    Also restores parameters, because some models change them in training (momentum encoders). That needs ``train`` or
    a module in training mode. Tensors that did not change are not written to.
    """
    modes = {m: m.training for m in model.modules()}
    tables = ("_buffers",) if swaps_parameters(model) else ("_buffers", "_parameters")
    held = [(held, dict(held)) for m in modes for held in (vars(m)[table] for table in tables)]
    state = [*model.buffers(), *(model.parameters() if train or any(modes.values()) else ())]
    values = [(t, t.detach().clone()) for t in state if not t.is_meta and not is_lazy(t)]
    tensors = [t for t in (*tree_leaves(inputs), *model.parameters()) if isinstance(t, Tensor)]
    with torch.random.fork_rng({t.device.index for t in tensors if t.is_cuda}):
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for now, before in held:
                for name in before:
                    if now[name] is not before[name]:  # a scripted module does not allow assignment
                        now[name] = before[name]
            with torch.no_grad():
                for t, value in values:
                    if not torch.equal(t, value):
                        t.copy_(value)
