"""Compiles kernels for GPUs that need not be in this machine, and reads the output of ptxas.

Import it before anything that decorates kernels. It unsets TRITON_INTERPRET, which decorators read, and gives Triton a
separate cache, whose entries include the output of ptxas.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = str(Path(__file__).resolve().parent.parent / "build" / "lock")

import triton
from triton.backends.nvidia.compiler import CUDABackend

from vit.kernels import dry_run, runtime

if runtime.INTERPRETED:
    raise ImportError("vit was imported with TRITON_INTERPRET set, so nothing can be compiled in this process")

# Bytes of shared memory for a program. The compiler does not check them.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ASYNC_DOT = {90: "wgmma", 100: "tcgen05"}  # asynchronous products, for 64 rows and 4 warps or more


@functools.cache
def _prepare() -> None:
    """Makes kernels keep the output of ptxas in their metadata. Runs once per process."""
    triton.knobs.nvidia.dump_ptxas_log = True
    make_cubin = CUDABackend.make_cubin

    def make_cubin_and_log(self, src, metadata, *rest):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            cubin = make_cubin(self, src, metadata, *rest)
        metadata["ptxas_log"] = log.getvalue()  # Triton's cache stores the metadata
        return cubin

    CUDABackend.make_cubin = make_cubin_and_log


def compile_kernel(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any]) -> Any:
    """The compiled kernel of a launch, or the exception, so that later launches still compile."""
    _prepare()
    try:
        return dry_run.compile_kernel(kernel, grid, args, options)
    except Exception as error:
        return error


@contextlib.contextmanager
def compiling(arch: int, report: Callable[[str, dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside, a launch compiles for ``arch`` and calls ``report(kernel, arguments, compiled kernel or exception)``."""

    def on_launch(kernel, grid, args, options):
        report(kernel.__name__, args | options, compile_kernel(kernel, grid, args, options))

    with dry_run.dry_run(arch, on_launch):
        yield


def figures(compiled: Any) -> dict[str, Any]:
    """The entry of a compiled kernel in the lock file, from ptxas, PTX, TTGIR and metadata."""
    log, ptx, meta = compiled.metadata.ptxas_log, compiled.asm["ptx"], compiled.metadata
    arch = meta.target.arch

    def said(pattern: str) -> int:
        return sum(map(int, re.findall(pattern, log)))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    result = {
        "registers": said(r"Used (\d+) registers"),
        "spill": said(r"(\d+) bytes spill"),
        "stack": said(r"(\d+) bytes stack frame"),
        "shared": meta.shared + said(r"(\d+) bytes smem"),  # dynamic and static
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "wgmma": count(r"\bwgmma\.mma_async"),
        "mma": count(r"\bmma\.sync"),
        "cp_async": count(r"\bcp\.async\.c[ag]\."),
        "tma": count(r"\bcp\.async\.bulk\.tensor"),
        "atomics": count(r"\b(?:atom|red)\."),
    }
    if arch == 100:
        result |= {"tcgen05": count(r"\btcgen05\.mma\."), "tensor_memory": meta.tmem_size}
    # Dots without an asynchronous instruction, although type and rows (M of the result) allow one.
    slow = sum(
        int(rows) >= 64 and (operand in ("bf16", "f16") or "inputPrecision = tf32" in line)
        for line in re.findall(r"= tt\.dot .*", compiled.asm["ttgir"])
        for operand, rows in re.findall(r" : tensor<\d+x\d+x(\w+).* -> tensor<(\d+)x", line)
    )
    if slow and arch in ASYNC_DOT:
        result[f"dots_without_{ASYNC_DOT[arch]}"] = slow
    if warned := sorted(set(re.findall(r"C75\d\d", log))):
        result["ptxas_warnings"] = warned
    return result
