"""The tolerance policy of all tests.

Errors are measured against an fp64 reference of the same rounded inputs. The limit depends on the error of eager
PyTorch in the same dtype on the same device (TOL-A), or on that of the fused algorithm in PyTorch (TOL-B).
CONTRIBUTING.md explains the policy, and `tests/proof/test_tolerances.py` has the bug that each factor catches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

# (rms factor, max factor): the limits as multiples of eager's errors.
FACTORS = {
    ("op", torch.float16): (1.10, 1.5),
    ("op", torch.bfloat16): (1.10, 1.5),
    ("op", torch.float32): (2.0, 4.0),
    ("model", torch.float16): (1.25, 2.0),
    ("model", torch.bfloat16): (1.25, 2.0),
    ("model", torch.float32): (1.5, 2.0),
}
# The least signed bias that is allowed, as a multiple of eager's rms. Truncation instead of rounding gives a bias of
# about 1. Correct rounding errors of an op average out to at most 5/sqrt(n). The elements of a model's tensor have
# earlier rounding errors in common, which do not average out.
LEAST_BIAS = {"op": 0.0, "model": 0.25}
# The limit of an op's rms error, as a multiple of the error of the same algorithm in PyTorch.
MIRROR_FACTOR = 1.25


@dataclasses.dataclass(frozen=True)
class Report:
    """Errors of one tensor against fp64: ours, eager's, and the limits. See `Tally` for ``max``."""

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
        # Comparisons with NaN are false, so NaN fails.
        return self.rms <= self.rms_limit and self.max <= self.max_limit and self.bias <= self.bias_limit

    @property
    def share(self) -> float:
        """The largest ratio of an error to its limit; above 1 if the report is not ok."""
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
    """Accumulates the errors of one tensor over draws.

    The largest error varies by chance. Eager PyTorch with the batch reversed only changes the order of a sum, and yet
    it exceeds twice the error of eager PyTorch in some tensors of single draws. So the rms of the draws' largest errors
    is judged: it converges, and an error that every draw has stays (`test_chance_passes_where_draws_are_pooled`).
    """

    def __init__(self, name: str, scope: str = "op"):
        self.name, self.scope = name, scope
        self.n, self.draws, self.floor = 0, 0, 0.0
        self.dtype: torch.dtype | None = None
        self.errors = [(0.0, 0.0, 0.0)] * 2  # ours, eager: sums of squares, of squared maxima, of error · sign

    def add(self, ours: Tensor, eager: Tensor, exact: Tensor) -> Tally:
        """Adds one draw; ``exact`` must be fp64."""
        name = self.name
        assert exact.dtype is torch.float64, f"{name}: the reference must be fp64"
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, reference {tuple(exact.shape)}"
        assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, eager {eager.dtype}"
        self.dtype = ours.dtype
        if exact.numel() == 0:
            return self
        self.n += exact.numel()
        self.draws += 1
        self.floor = max(self.floor, rounding_floor(exact, ours.dtype))
        sign = exact.sign()
        for i, result in enumerate((ours, eager)):
            error = result.detach().double() - exact
            found = error.square().sum(), error.abs().max().square(), (error * sign).sum()
            self.errors[i] = tuple(total + new.item() for total, new in zip(self.errors[i], found, strict=True))
        return self

    def report(self) -> Report:
        """The errors, and the limits of the policy (TOL-A)."""
        n, floor = self.n, self.floor
        if n == 0:
            return Report(self.name, 0, 0, 0, 0, 0, 0, 0, 0)
        rms_factor, max_factor = FACTORS[self.scope, self.dtype]
        (rms, rms_eager) = (math.sqrt(squares / n) for squares, _, _ in self.errors)
        (peak, peak_eager) = (math.sqrt(peaks / self.draws) for _, peaks, _ in self.errors)
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
    return require([measure(ours, eager, exact, scope=scope, name=name)])[0]


def relative_error(result: Tensor, exact: Tensor) -> float:
    """The rms of result − exact as a fraction of the rms of exact; NaN, which passes no limit, if the shapes differ."""
    if result.shape != exact.shape:
        return math.nan
    exact = exact.double()
    return ((result.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def require(reports: list[Report]) -> list[Report]:
    """Returns ``reports``; raises AssertionError, with a line for each tensor that exceeds a limit, if any does."""
    failed = [str(report) for report in reports if not report.ok]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(reports)} tensors exceed a limit:\n" + "\n".join(failed))
    return reports


def check_draws(
    draws: Iterable[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]], *, scope: str = "model"
) -> list[Report]:
    """`Tally` of each tensor by its name over draws of (ours, eager, exact), and `require`."""
    tallies: dict[str, Tally] = {}
    for ours, eager, exact in draws:
        assert ours.keys() == eager.keys() == exact.keys(), f"{[*ours]}, eager {[*eager]}, exact {[*exact]}"
        for name in exact:
            tallies.setdefault(name, Tally(name, scope)).add(ours[name], eager[name], exact[name])
    return require([tally.report() for tally in tallies.values()])


def check_all(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], *, scope: str = "op"
) -> list[Report]:
    """`check_draws` of one draw."""
    return check_draws([(ours, eager, exact)], scope=scope)


def check_op(ours_fn, reference_fn, inputs: dict[str, Tensor | None], dtype: torch.dtype, *, seed: int = 0) -> None:
    """Checks the outputs of an op and the gradient of every input (TOL-A).

    Args:
        ours_fn: called with ``inputs`` as keywords; returns a tensor or a tuple of tensors.
        reference_fn: the same for the eager reference.
        inputs: fp32 or fp64 tensors. They are rounded to ``dtype``, so all three computations use the same numbers.
        dtype: fp16, bf16 or fp32.
        seed: seed of the random cotangents. Small inputs get eight, whose gradients are judged as one tensor.

    Raises:
        AssertionError: a tensor exceeds a limit.
    """
    ours, eager = _run(ours_fn, inputs, dtype, dtype, seed), _run(reference_fn, inputs, dtype, dtype, seed)
    check_all(ours, eager, _run(reference_fn, inputs, dtype, torch.float64, seed))


def as_good(ours: Tensor, mirror: Tensor, exact: Tensor, *, name: str = "output") -> None:
    """Checks that the rms error is at most 1.25 times that of ``mirror`` (TOL-B); fp32 may add the rounding floor."""
    assert exact.dtype is torch.float64, f"{name}: the reference must be fp64"
    assert ours.dtype == mirror.dtype and ours.shape == mirror.shape == exact.shape, f"{name}: dtype or shape"
    e_ours, e_mirror = ((t.detach().double() - exact).square().mean().sqrt().item() for t in (ours, mirror))
    limit = MIRROR_FACTOR * e_mirror + (rounding_floor(exact, ours.dtype) if ours.dtype is torch.float32 else 0.0)
    if not e_ours <= limit:  # not >, so NaN fails
        raise AssertionError(f"{name}: rms {e_ours:.3e}, mirror {e_mirror:.3e}, limit {limit:.3e}")


def check_mirror(ours_fn, mirror_fn, reference_fn, inputs: dict[str, Tensor | None], dtype, *, seed: int = 0) -> None:
    """Compares outputs and gradients of an op with ``mirror_fn``, the fused algorithm in PyTorch (TOL-B).

    Eager PyTorch often rounds more than a kernel. TOL-A then misses a kernel that is worse than its algorithm. The
    mirror rounds at the same places as the kernel. The other arguments are those of `check_op`.
    """
    ours, mirror = _run(ours_fn, inputs, dtype, dtype, seed), _run(mirror_fn, inputs, dtype, dtype, seed)
    exact = _run(reference_fn, inputs, dtype, torch.float64, seed)
    for name in exact:
        as_good(ours[name], mirror[name], exact[name], name=name)


def _run(
    fn, inputs: dict[str, Tensor | None], rounded_to: torch.dtype, dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    """Outputs and gradients of ``fn`` in ``dtype``. Inputs and cotangents are first ``rounded_to`` another dtype."""
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
    gradients = {name: torch.stack([draw[name] for draw in draws]) for name in present}
    return {f"output {i}": o for i, o in enumerate(outs)} | gradients
