"""Kernels that the compile-only lock must refuse, and some that it must accept. Prints the findings as JSON.

test_lock.py runs it in a separate process, because the process of the tests may interpret kernels.
"""

import json

import lock
import torch
import triton
import triton.language as tl

from vit.kernels import runtime


@triton.jit
def _spilling_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)  # needed until its sum is known: 512 registers per thread
    tl.store(out_ptr + offs, x - tl.sum(x))


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))


@triton.jit
def _dot_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(8):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + offs)
        acc = tl.dot(x, x, acc)
    tl.store(out_ptr + offs, acc.to(tl.bfloat16))


@triton.jit
def _wide_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.zeros([BLOCK, BLOCK], tl.float32)
    b = tl.zeros([BLOCK, BLOCK], tl.float32)
    for i in range(8):
        x = tl.load(x_ptr + i * BLOCK * BLOCK + offs)
        a = tl.dot(x, x.T, a)
        b = tl.dot(x.T, x, b)
    tl.store(out_ptr + offs, (a + b).to(tl.bfloat16))


@triton.jit
def _broken_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK + 1), tl.load(x_ptr))  # the length of a range must be a power of two


def _what_lock_says(
    kernel, dtype: torch.dtype, block: int, num_warps: int, num_stages: int, logged: str = "", arch: int = 90
) -> list[str]:
    said: list[str] = []

    def report(name, arguments, compiled):
        if isinstance(compiled, Exception):
            said.append("does not compile")
        else:
            log = compiled.metadata.ptxas_log + logged
            compiled.metadata = compiled.metadata._replace(ptxas_log=log)
            said.extend(lock.problems(arch, lock.figures(compiled)))

    x = torch.empty(block, block, dtype=dtype)
    with lock.compiling(arch, report):
        runtime.launch(kernel, 1, x_ptr=x, out_ptr=x, BLOCK=block, num_warps=num_warps, num_stages=num_stages)
    return said


if __name__ == "__main__":
    half, single = torch.bfloat16, torch.float32
    # Which kernels ptxas serialises depends on its version, so its warning is faked here.
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    said = {
        "good": _what_lock_says(_dot_kernel, half, 64, num_warps=4, num_stages=3),
        "spills": _what_lock_says(_spilling_kernel, single, 16_384, num_warps=1, num_stages=1),
        "adds atomically": _what_lock_says(_atomic_kernel, single, 128, num_warps=4, num_stages=1),
        "half a warp group": _what_lock_says(_dot_kernel, half, 64, num_warps=2, num_stages=3),
        "nine stages": _what_lock_says(_dot_kernel, half, 128, num_warps=8, num_stages=9),
        "broken": _what_lock_says(_broken_kernel, single, 64, num_warps=4, num_stages=1),
        "good on sm_100": _what_lock_says(_dot_kernel, half, 64, num_warps=4, num_stages=3, arch=100),
        "half a warp group on sm_100": _what_lock_says(_dot_kernel, half, 64, num_warps=2, num_stages=3, arch=100),
        "accumulators beyond tensor memory": _what_lock_says(
            _wide_kernel, half, 256, num_warps=8, num_stages=1, arch=100
        ),
        "serialised": _what_lock_says(_dot_kernel, half, 64, 4, 3, warning),
    }
    print(json.dumps(said))
