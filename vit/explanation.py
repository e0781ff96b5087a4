"""Which path each op of a model took, and why."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from vit.kernels import runtime
from vit.plain import global_hooks
from vit.unchanged import unchanged


@dataclasses.dataclass(frozen=True)
class OpPath:
    """Calls of one op that took one path for one reason."""

    op: str
    path: str
    reason: str
    calls: int
    dtype: torch.dtype


class Explanation(list[OpPath]):
    """A list of `OpPath`; prints as a table."""

    def __str__(self) -> str:
        rows = [f"{row.op:<20} {row.path:<10} x{row.calls:<4} {row.dtype!s:<15} {row.reason}" for row in self]
        return "\n".join(rows)


@torch.no_grad()
def explain(model: nn.Module, *args: Tensor, **kwargs) -> Explanation:
    """Runs one forward of ``model`` without gradients and tells which path each op took and why.

    A global module hook makes PyTorch call every module by itself. Then fewer ops are fused, and an entry names the
    hooks.

    The model stays as it is, its buffers too, and random numbers that it draws are given back. One thread at a time.

    Returns:
        One entry per op, path and reason, in the order of first use; ``print`` it for a table.
    """
    with unchanged(model, (args, kwargs)), runtime.record_choices() as choices:
        model(*args, **kwargs)
    counts: dict[tuple, int] = {}
    for c in choices:
        key = (c.op, c.path, c.reason, c.dtype)
        counts[key] = counts.get(key, 0) + 1
    rows = [OpPath(op, path, reason, calls, dtype) for (op, path, reason, dtype), calls in counts.items()]
    if rows and (hooks := global_hooks()):
        reason = f"a global module hook ({', '.join(hooks)}) makes every module be called by itself"
        rows.append(OpPath("modules", "called", reason, len(hooks), rows[0].dtype))
    return Explanation(rows)
