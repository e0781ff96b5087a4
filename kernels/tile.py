"""Helpers shared by the kernels: everything here works on tiles that are already in registers."""

import triton
import triton.language as tl

from . import runtime

_INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the accumulator's type; the only way to a matrix unit here.

    The interpreter multiplies 16-bit operands by their bit patterns, so interpreted operands are widened first; compiled
    code keeps its 16-bit tensor-core instruction.
    """
    if _INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def row_stats(x, mask, D, eps):
    """Mean and 1/sqrt(variance + eps) of each row of x; two passes over registers, so no cancellation.

    x: [BLOCK_M, BLOCK_D] with zeros where mask is false; D: number of valid columns.
    """
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / D
    return mean, 1.0 / tl.sqrt(variance + eps)
