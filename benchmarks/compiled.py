"""Compiling kernels for GPUs that this machine need not have, and what ptxas says of them.

Imported before anything that decorates kernels: it unsets TRITON_INTERPRET, which is read then, and gives Triton a
cache of its own, whose entries hold the words of ptxas.
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

# Bytes of shared memory that a program may have: the compiler does not check.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
ASYNC_DOT = {90: "wgmma", 100: "tcgen05"}  # how tensor cores work beside the warps, from 64 rows and 4 warps on


@functools.cache
def _prepare() -> None:
    """Once a process: kernels keep what ptxas said in their metadata."""
    triton.knobs.nvidia.dump_ptxas_log = True
    make_cubin = CUDABackend.make_cubin

    def make_cubin_and_log(self, src, metadata, *rest):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            cubin = make_cubin(self, src, metadata, *rest)
        metadata["ptxas_log"] = log.getvalue()  # goes through Triton's cache with the rest
        return cubin

    CUDABackend.make_cubin = make_cubin_and_log


def compile_kernel(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any]) -> Any:
    """The compiled kernel of a launch, or the exception: the launches after it are still wanted."""
    _prepare()
    try:
        return dry_run.compile_kernel(kernel, grid, args, options)
    except Exception as error:
        return error


@contextlib.contextmanager
def compiling(arch: int, report: Callable[[str, dict[str, Any], Any], None]) -> Iterator[None]:
    """Inside, launches compile for ``arch``: ``report(kernel, arguments, compiled kernel or exception)`` for each."""

    def on_launch(kernel, grid, args, options):
        report(kernel.__name__, args | options, compile_kernel(kernel, grid, args, options))

    with dry_run.dry_run(arch, on_launch):
        yield


def figures(compiled: Any) -> dict[str, Any]:
    """What the lock file keeps of a compiled kernel, read from ptxas, PTX, TTGIR and metadata."""
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
    # Dots that became no instruction of the asynchronous tensor core though type and rows (the result's M) allow it.
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
