"""`vit.explain`: the path of each op of a model, and the reason."""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch import Tensor, nn

from vit.adapters import left_alone
from vit.adapters.fused import is_fused
from vit.kernels import runtime
from vit.plain import global_hooks
from vit.unchanged import unchanged


@dataclasses.dataclass(frozen=True)
class OpPath:
    """The calls of one op with the same path, reason and dtype."""

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
    """Runs one forward of ``model`` without gradients and reports the path of each op, with the reason.

    The model, its buffers and the random states stay unchanged. Only one thread at a time may call it. With global
    module hooks, PyTorch must call each module, so fewer ops are fused. The last entry then names the hooks. In an
    accelerated model, a module that `vit.accelerate` left as it is has the path "called".

    Args:
        model: any module.
        *args: positional arguments of the forward.
        **kwargs: keyword arguments of the forward.

    Returns:
        One entry per op, path, reason and dtype, in the order of first use. ``print`` shows a table.
    """
    with unchanged(model, (args, kwargs)), runtime.record_choices() as choices:
        model(*args, **kwargs)
    counts: dict[tuple, int] = {}
    for c in choices:
        key = (c.op, c.path, c.reason, c.dtype)
        counts[key] = counts.get(key, 0) + 1
    rows = [OpPath(op, path, reason, calls, dtype) for (op, path, reason, dtype), calls in counts.items()]
    if rows and any(map(is_fused, model.modules())):
        left = Counter((_part(name), f"{cls}: {why}") for name, (cls, why) in left_alone(model).items())
        rows += [OpPath(part, "called", reason, n, rows[0].dtype) for (part, reason), n in left.items()]
    if rows and (hooks := global_hooks()):
        reason = f"a global module hook ({', '.join(hooks)}) makes every module be called by itself"
        rows.append(OpPath("modules", "called", reason, len(hooks), rows[0].dtype))
    return Explanation(rows)


def _part(name: str) -> str:
    """The last word of a module's name: "mlp" of "blocks.0.mlp", "blocks" of "blocks.0"."""
    return next((word for word in reversed(name.split(".")) if not word.isdigit()), name)
