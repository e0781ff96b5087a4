"""Views with the same values in other memory, and launches of only a few programs."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime import interpreter

from vit.kernels import runtime


def nan_padded(t: Tensor) -> Tensor:
    """The values of t as a view into a larger buffer whose other elements are NaN."""
    buffer = torch.full([n + 2 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[tuple(slice(1, n + 1) for n in t.shape)]
    view.copy_(t)
    return view


def wide_rows(t: Tensor) -> Tensor:
    """The values of t as columns of a wider buffer of NaN. The rows still have one stride, but a longer one."""
    buffer = torch.full([*t.shape[:-1], t.shape[-1] + 8], float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[..., : t.shape[-1]]
    view.copy_(t)
    return view


@contextlib.contextmanager
def last_programs_only(count: int) -> Iterator[None]:
    """Interpreted launches inside run only their last ``count`` programs. Their grid must be on x."""
    launch, builder = runtime.launch, interpreter.interpreter_builder

    def few(kernel, grid, **args):
        def set_grid_idx(x, y, z):
            builder.grid_idx = (grid - count + x, y, z)

        with patch.object(builder, "set_grid_idx", set_grid_idx):
            launch(kernel, count, **args)

    with patch.object(runtime, "launch", few):
        yield
