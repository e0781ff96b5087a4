"""The dry run: ops go through all their host code, but no kernel is launched.

Caution: inside `dry_run` nothing computes. It replaces PyTorch's aten::mm and aten::addmm on the CPU, for the whole
process, and Triton's driver. Compiling ahead of time and counting bytes use it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import runtime


def compile_kernel(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any]) -> Any:
    """Compiles one launch for the target, through the real JIT path; returns Triton's compiled kernel."""
    return kernel.warmup(grid=grid, **args, **options)


class _NoGpu:
    """Triton's driver for a GPU that is not there. One device index per architecture: Triton caches by index."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def dry_run(arch: int, on_launch: runtime.OnLaunch = compile_kernel, num_sms: int = 132) -> Iterator[None]:
    """Inside, `runtime.launch` calls ``on_launch(kernel, grid, arguments, options)`` and runs nothing.

    Ops decide as on a GPU of compute capability ``arch`` / 10 with ``num_sms`` multiprocessors. Their tensors are on
    the CPU or of device "meta", and ``impl="auto"`` treats them as tensors on that GPU. What the kernels and the matrix
    products would compute stays unwritten. One thread at a time.
    """
    previous, runtime.current_dry_run = runtime.current_dry_run, runtime.DryRun(arch, on_launch, num_sms)
    active = driver._active
    driver.set_active(_NoGpu(arch))
    with warnings.catch_warnings(action="ignore"):  # of PyTorch: the ops have an implementation already
        products = torch.library.Library("aten", "IMPL")
        products.impl("mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), "CPU")
        products.impl("addmm", lambda c, a, b, **_: a.new_empty(a.shape[0], b.shape[1]), "CPU")
    try:
        yield
    finally:
        products._destroy()
        driver.set_active(active)
        runtime.current_dry_run = previous
