"""Helpers that several ops share. They work on tiles that are already in registers."""

import triton
import triton.language as tl

from . import runtime

_INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the accumulator's type. Every product in a kernel goes through here.

    The interpreter multiplies 16-bit operands by their bit patterns, so interpreted operands are widened first.
    Compiled code keeps its 16-bit tensor-core instruction.
    """
    if _INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def row_stats(x, mask, D, eps):
    """Mean and 1/sqrt(variance + eps) of each row of x, from registers.

    The mean is corrected by the mean of the centred row. Rows that are constant or far from zero then are as exact as
    with Welford's algorithm. Without the correction 1/sqrt(eps) could multiply an error in the mean's last bit.

    x: [BLOCK_M, BLOCK_D] with zeros where mask is false; D: number of valid columns.
    """
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    shift = tl.sum(centred, axis=1) / D
    variance = tl.sum(centred * centred, axis=1) / D - shift * shift
    return mean + shift, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def grouped_tile(pid, TILES_M, TILES_N, GROUP_M: tl.constexpr):
    """(tile row, tile column) of a program: GROUP_M tile rows go column by column, so that operands stay in L2."""
    first_m = pid // (GROUP_M * TILES_N) * GROUP_M
    rows = tl.minimum(TILES_M - first_m, GROUP_M)
    in_group = pid % (GROUP_M * TILES_N)
    return first_m + in_group % rows, in_group // rows


@triton.jit
def gelu_and_grad(x, ACTIVATION: tl.constexpr, CHEAP: tl.constexpr):
    """gelu(x) and gelu'(x). The compiler removes the one that is not used.

    ACTIVATION "gelu": x·Φ(x) and Φ(x) + x·φ(x). CHEAP replaces erf (more than 30 instructions) for results that will be
    rounded to 16 bits: Φ(−|x|) = ½ erfc(|x|/√2) by Abramowitz & Stegun 7.1.26, which shares its exponential with φ.
    The others: x·σ(v) and σ(v) + x·σ'(v)·v', with the logistic function σ.
    ACTIVATION "gelu_tanh": v = 2·√(2/π)·(x + 0.044715·x³), because ½(1 + tanh u) = σ(2u).
    ACTIVATION "quick_gelu": v = 1.702·x.
    """
    if ACTIVATION == "gelu":
        exp = tl.exp(-0.5 * x * x)
        if CHEAP:
            t = 1.0 / (1.0 + 0.2316418882663604 * tl.abs(x))
            tail = 0.5307027145 * t - 0.7265760135
            tail = tail * t + 0.7107068705
            tail = tail * t - 0.142248368
            tail = tail * t + 0.127414796
            tail *= t * exp
            cdf = tl.where(x < 0.0, tail, 1.0 - tail)
        else:
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * (exp * 0.3989422804014327)
    else:
        if ACTIVATION == "gelu_tanh":
            square = tl.minimum(x * x, 1e6)  # finite, so that 0 · v' below is 0; σ is 0 or 1 long before
            v = x * (1.5957691216057308 + 0.07135481627260025 * square)
            slope = 1.5957691216057308 + 0.21406444881780076 * square
        else:
            tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
            v = 1.702 * x
            slope = tl.full(x.shape, 1.702, x.dtype)
        # The exponential of −|v| cannot overflow. 1 − σ is computed from it, because a subtraction would cancel.
        exp = tl.exp(-tl.abs(v))
        small = 1.0 / (1.0 + exp)
        cdf = tl.where(v < 0.0, exp * small, small)
        return x * cdf, cdf + x * (exp * small * small * slope)


@triton.jit
def dropout_scale(seed, offset, row, column, P: tl.constexpr):
    """The factor of dropout for each element: 1/(1 − P) with probability 1 − P, else 0.

    Its random number is the first word of Philox-4x32-10 (Salmon et al., 2011) with the key ``seed`` and the counter
    (column, low and high half of row, offset). It depends on nothing else, so the backward, a recomputed forward and
    every tiling draw the same number.

    seed: int64 scalar. offset: which dropout of the network. row: int64, column: int32, broadcast against each other.
    """
    column = column + tl.zeros_like(row).to(tl.int32)
    word, _, _, _ = tl.philox(seed, column, row.to(tl.int32), (row >> 32).to(tl.int32), offset)
    THRESHOLD: tl.constexpr = int(P * 4294967296.0)  # compiled code has no round()
    return tl.where(word.to(tl.uint32, bitcast=True) >= THRESHOLD, 1.0 / (1.0 - P), 0.0)
