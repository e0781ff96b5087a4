"""One case on an untouched and on an accelerated model; what passes untouched must pass accelerated."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from torch import nn

import vit

SOURCES = Path(__file__).resolve().parents[2] / "build" / "suites"  # `make test-suites` unpacks the libraries there
Touch = Callable[[nn.Module], nn.Module]


def side_by_side(
    run: Callable[[Touch], object], limit: float = 0.0, reason: str | None = None, impl: str = "auto"
) -> None:
    """``run(touch)`` with a ``touch`` that does nothing, then with `vit.accelerate`: both return the same.

    Skips where the library itself fails. With a ``reason`` why the second run fails, it must fail.
    """
    made, accelerated = [], []

    def leave(model: nn.Module) -> nn.Module:
        made.append(type(model))
        return model

    def accelerate(model: nn.Module) -> nn.Module:
        accelerated.append(type(model))
        return vit.accelerate(model, impl=impl)

    try:
        theirs = _alone(run, leave)
    except (Exception, pytest.skip.Exception) as error:
        pytest.skip(f"untouched: {first_line(error)}")
    if not made:
        pytest.skip("makes no model")
    try:
        assert_equal(_alone(run, accelerate), theirs, limit)
    except Exception:
        if reason is None:
            raise
        pytest.skip(f"exception: {reason}")
    assert reason is None, f"passes, although an exception says: {reason}"
    assert accelerated, "accelerates no model"


def _alone(run: Callable[[Touch], object], touch: Touch) -> object:
    """``run(touch)`` with the same random numbers, and without what TorchScript and Dynamo remember of earlier runs."""
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings(), _ordinary_torch():
        warnings.simplefilter("ignore")
        return run(touch)


@contextlib.contextmanager
def _ordinary_torch():
    """Without the deterministic mode of this project's tests, which some functions refuse."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:140]}"


def source_of(library: str) -> Path | None:
    """The unpacked source package of the installed version; None if it is not there."""
    try:
        folder = SOURCES / f"{library}-{version(library)}"
    except PackageNotFoundError:
        return None
    return folder if folder.is_dir() else None


def assert_equal(ours: object, theirs: object, limit: float, where: str = "result") -> None:
    """Tensors are close, everything else is equal."""
    assert type(ours) is type(theirs), f"{where}: {type(ours).__name__} for {type(theirs).__name__}"
    if isinstance(theirs, torch.Tensor):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), where
        if theirs.numel():
            scale = max(1.0, theirs.detach().abs().max().item())
            error = (ours.detach().double() - theirs.detach().double()).abs().max().item() / scale
            assert error <= limit, f"{where}: off by {error:.1e}, {limit:.0e} allowed"  # fails for NaN, too
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], limit, f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, limit, f"{where}.{index}")
    else:
        assert ours == theirs, where
