"""The tolerance policy: one helper, one table.

Every error is taken against an fp64 reference of the same rounded inputs, and judged beside the error of eager PyTorch
in the same dtype on the same device. See CONTRIBUTING.md for the policy and `tests/test_tolerances.py` for the bug that
each factor catches.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

__all__ = [
    "FACTORS",
    "Report",
    "Tally",
    "as_good",
    "check",
    "check_mirror",
    "check_op",
    "measure",
    "pool",
    "rounding_floor",
]

# (rms factor, max factor): how much worse than eager a result may be.
FACTORS = {
    ("op", torch.float16): (1.10, 1.5),
    ("op", torch.bfloat16): (1.10, 1.5),
    ("op", torch.float32): (2.0, 4.0),
    ("model", torch.float16): (1.25, 2.0),
    ("model", torch.bfloat16): (1.25, 2.0),
    ("model", torch.float32): (1.5, 2.0),
}
# Truncation instead of rounding shifts every value towards zero by about the rms of a right rounding's error. Right
# errors of an op average out like 5/sqrt(n) at most; elements of a model's tensors share what was rounded before them.
LEAST_BIAS = {"op": 0.0, "model": 0.25}
# How much worse than its own algorithm, written in PyTorch, an op's rms error may be.
MIRROR_FACTOR = 1.25


@dataclasses.dataclass(frozen=True)
class Report:
    """Errors of one tensor against fp64, ours beside eager's, and what they may be."""

    name: str
    rms: float
    rms_eager: float
    rms_limit: float
    max: float
    max_eager: float
    max_limit: float
    bias: float
    bias_limit: float

    @property
    def ok(self) -> bool:
        # Written so that NaN fails.
        return self.rms <= self.rms_limit and self.max <= self.max_limit and self.bias <= self.bias_limit

    @property
    def share(self) -> float:
        """The largest part of a limit that is used up; above 1 where the report is not ok."""
        pairs = ((self.rms, self.rms_limit), (self.max, self.max_limit), (self.bias, self.bias_limit))
        return max(value / limit if limit else (float("inf") if value else 0.0) for value, limit in pairs)

    def __str__(self) -> str:
        return (
            f"{self.name}: rms {self.rms:.3e} (eager {self.rms_eager:.3e}, limit {self.rms_limit:.3e}), "
            f"max {self.max:.3e} (eager {self.max_eager:.3e}, limit {self.max_limit:.3e}), "
            f"signed bias {self.bias:.3e} (limit {self.bias_limit:.3e})"
        )


def rounding_floor(exact: Tensor, dtype: torch.dtype) -> float:
    """2·max|(r + 0.3 − 0.3) − r| in ``dtype``: two roundings of a value of this size."""
    r = exact.to(dtype)
    return 2.0 * (((r + 0.3) - 0.3).double() - r.double()).abs().max().item() if r.numel() else 0.0


class Tally:
    """Sums over the errors of one tensor, of one draw or of several: the report is that of all draws stacked."""

    def __init__(self, name: str, scope: str = "op"):
        self.name, self.scope = name, scope
        self.n, self.floor = 0, 0.0
        self.dtype: torch.dtype | None = None
        self.errors = [(0.0, 0.0, 0.0)] * 2  # of ours and of eager: sum of squares, largest, sum towards larger values

    def add(self, ours: Tensor, eager: Tensor, exact: Tensor) -> Tally:
        """One draw; ``exact`` is fp64."""
        name = self.name
        assert exact.dtype is torch.float64, f"{name}: the reference must be fp64"
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, reference {tuple(exact.shape)}"
        assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager {eager.dtype}"
        self.dtype = ours.dtype
        if exact.numel() == 0:
            return self
        self.n += exact.numel()
        self.floor = max(self.floor, rounding_floor(exact, ours.dtype))
        sign = exact.sign()
        for i, result in enumerate((ours, eager)):
            error, (squares, peak, signed) = result.detach().double() - exact, self.errors[i]
            largest = error.abs().max().item()
            # In this order, so that NaN stays.
            peak = peak if peak > largest or peak != peak else largest
            self.errors[i] = (squares + error.square().sum().item(), peak, signed + (error * sign).sum().item())
        return self

    def report(self) -> Report:
        """The errors, and the limits of the policy (TOL-A)."""
        n, floor = self.n, self.floor
        if n == 0:
            return Report(self.name, 0, 0, 0, 0, 0, 0, 0, 0)
        rms_factor, max_factor = FACTORS[self.scope, self.dtype]
        (rms, rms_eager) = (math.sqrt(squares / n) for squares, _, _ in self.errors)
        (peak, peak_eager) = (largest for _, largest, _ in self.errors)
        (bias, bias_eager) = (abs(signed / n) for _, _, signed in self.errors)
        narrow = self.dtype in (torch.float16, torch.bfloat16)
        return Report(
            self.name,
            rms, rms_eager, rms_factor * rms_eager + (0.0 if narrow else floor),
            peak, peak_eager, max_factor * peak_eager + floor,
            bias, 1.5 * bias_eager + max(LEAST_BIAS[self.scope], 5.0 * n**-0.5) * rms_eager + floor,
        )  # fmt: skip


def measure(ours: Tensor, eager: Tensor, exact: Tensor, *, scope: str = "op", name: str = "output") -> Report:
    """Errors of ``ours`` and of ``eager`` against ``exact`` (fp64), and the limits of the policy (TOL-A)."""
    return Tally(name, scope).add(ours, eager, exact).report()


def check(ours: Tensor, eager: Tensor, exact: Tensor, *, scope: str = "op", name: str = "output") -> Report:
    """`measure`, and raises AssertionError unless every limit holds."""
    report = measure(ours, eager, exact, scope=scope, name=name)
    if not report.ok:  # not an assert statement, which python -O would drop
        raise AssertionError(str(report))
    return report


def pool(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several draws as one each, so that they are judged together.

    The largest error of a few dozen numbers is chance: eager PyTorch with its batch reversed, which is the same sum in
    another order, exceeds twice eager PyTorch's own in some tensor of some draw, and in none of 32 draws pooled
    (`test_chance_passes_where_draws_are_pooled`).
    """
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def check_op(ours_fn, reference_fn, inputs: dict[str, Tensor | None], dtype: torch.dtype, *, seed: int = 0) -> None:
    """TOL-A for an op: its outputs and the gradient of every input, beside the eager reference and fp64.

    Args:
        ours_fn: called with ``inputs`` as keywords; returns a tensor or a tuple of tensors.
        reference_fn: likewise.
        inputs: fp32 or fp64 values; rounded to ``dtype`` here, so that all three computations see the same numbers.
        dtype: fp16, bf16 or fp32.
        seed: of the random cotangents, several where the inputs are few numbers, see `pool`.
    """
    ours, eager = _run(ours_fn, inputs, dtype, dtype, seed), _run(reference_fn, inputs, dtype, dtype, seed)
    exact = _run(reference_fn, inputs, dtype, torch.float64, seed)
    reports = [measure(ours[k], eager[k], exact[k], name=k) for k in exact]
    failed = [str(r) for r in reports if not r.ok]
    if failed:
        raise AssertionError("\n".join(failed))


def as_good(ours: Tensor, mirror: Tensor, exact: Tensor, *, name: str = "output") -> None:
    """TOL-B for one tensor: its rms error is at most 1.25 times that of ``mirror``; fp32 may add the rounding floor."""
    assert exact.dtype is torch.float64, f"{name}: the reference must be fp64"
    assert ours.dtype == mirror.dtype and ours.shape == mirror.shape == exact.shape, f"{name}: dtype or shape"
    e_ours, e_mirror = ((t.detach().double() - exact).square().mean().sqrt().item() for t in (ours, mirror))
    limit = MIRROR_FACTOR * e_mirror + (rounding_floor(exact, ours.dtype) if ours.dtype is torch.float32 else 0.0)
    if not e_ours <= limit:  # so that NaN fails
        raise AssertionError(f"{name}: rms {e_ours:.3e}, mirror {e_mirror:.3e}, limit {limit:.3e}")


def check_mirror(ours_fn, mirror_fn, reference_fn, inputs: dict[str, Tensor | None], dtype, *, seed: int = 0) -> None:
    """TOL-B for an op: its outputs and every gradient beside ``mirror_fn``, the fused algorithm written in PyTorch.

    Where eager PyTorch rounds more often than a kernel, TOL-A leaves room for a kernel worse than it should be. The
    mirror rounds where the kernel does. Arguments as in `check_op`.
    """
    ours, mirror = _run(ours_fn, inputs, dtype, dtype, seed), _run(mirror_fn, inputs, dtype, dtype, seed)
    exact = _run(reference_fn, inputs, dtype, torch.float64, seed)
    for name in exact:
        as_good(ours[name], mirror[name], exact[name], name=name)


def _run(
    fn, inputs: dict[str, Tensor | None], rounded_to: torch.dtype, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Outputs and gradients of ``fn`` computed in ``dtype``, from inputs and cotangents ``rounded_to`` another."""
    cotangents = 8 if sum(t.numel() for t in inputs.values() if t is not None) < 2048 else 1
    rounded = {k: None if t is None else t.detach().to(rounded_to) for k, t in inputs.items()}
    leaves = {k: None if t is None else t.to(dtype).requires_grad_() for k, t in rounded.items()}
    out = fn(**leaves)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    present = {f"grad {k}": t for k, t in leaves.items() if t is not None}
    draws = []
    for left in reversed(range(cotangents)):
        directions = [torch.randn(o.shape, generator=generator).to(o.device, rounded_to).to(dtype) for o in outs]
        grads = torch.autograd.grad(outs, list(present.values()), directions, retain_graph=left > 0)
        draws.append(dict(zip(present, grads, strict=True)))
    return {f"output {i}": o for i, o in enumerate(outs)} | pool(draws)
