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
    """(tile row, tile column) of a program: GROUP_M tile rows go column by column, so that operands stay in L2.

    pid may have 32 bits, and so have the results then. Dividing 64-bit numbers takes a hundred instructions.
    """
    first_m = pid // (GROUP_M * TILES_N) * GROUP_M
    rows = tl.minimum(TILES_M - first_m, GROUP_M)
    in_group = pid % (GROUP_M * TILES_N)
    return first_m + in_group % rows, in_group // rows


@triton.jit
def gelu_and_grad(x, ACTIVATION: tl.constexpr, CHEAP: tl.constexpr):
    """gelu(x) and gelu'(x). The compiler removes the one that is not used.

    ACTIVATION "gelu": x·Φ(x) and Φ(x) + x·φ(x), with the normal distribution Φ and its density φ.
    The others: x·σ(v) and σ(v) + x·σ'(v)·v', with the logistic function σ.
    ACTIVATION "gelu_tanh": v = 2·√(2/π)·(x + 0.044715·x³), because ½(1 + tanh u) = σ(2u).
    ACTIVATION "quick_gelu": v = 1.702·x.
    CHEAP is for results that will be rounded to 16 bits: a polynomial instead of erf, and 1/√(d²) instead of 1/d, which
    takes seven instructions more.
    """
    if ACTIVATION == "gelu":
        pdf = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361595)  # log₂ φ(x) = −½ log₂e · x² − ½ log₂(2π)
        if CHEAP:
            # Φ(−|x|)/φ(x) as a polynomial in t, a minimax fit. The error of Φ times max(1, |x|) is below 6e-8. That of
            # Φ(−|x|), relative to it, is below 2e-4 for |x| < 6.5, and below 6e-3 until φ underflows.
            d = tl.abs(x) + 2.99
            t = tl.rsqrt(d * d + 1.0)
            ratio = 60.979835 * t - 4.3995163
            ratio = ratio * t + 5.0244771
            ratio = ratio * t + 0.83858463
            ratio = ratio * t + 0.0050716971
            cdf = tl.abs(tl.where(x < 0.0, 0.0, 1.0) - pdf * ratio)
        else:
            cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * pdf
    else:
        if ACTIVATION == "gelu_tanh":
            square = x * x
            w = x * (-2.302208198144325 - 0.1029432395800235 * square)  # −v · log₂e
            # Finite, so that 0 · v' below is 0. σ is 0 or 1 long before.
            slope = 1.5957691216057308 + 0.21406444881780076 * tl.minimum(square, 1e6)
        else:
            tl.static_assert(ACTIVATION == "quick_gelu", "unknown activation")
            w = -2.4554669595930156 * x
            slope: tl.constexpr = 1.702
        if CHEAP:
            exp = 1.0 + tl.exp2(w)
            cdf = tl.rsqrt(exp * exp)
            y = x * cdf
            return y, cdf + y * (1.0 - cdf) * slope
        else:
            # The exponential of −|v| cannot overflow. 1 − σ is computed from it, because a subtraction would cancel.
            exp = tl.exp2(-tl.abs(w))
            small = 1.0 / (1.0 + exp)
            cdf = tl.where(w > 0.0, exp * small, small)
            return x * cdf, cdf + x * (exp * small * small * slope)


@triton.jit
def dropout_scale(seed, offset, row, first_column, COLUMNS: tl.constexpr, P: tl.constexpr):
    """The factor of dropout for each element of a tile: 1/(1 − P) with probability 1 − P, else 0. [rows, COLUMNS]

    Philox-4x32-10 (Salmon et al., 2011) with the key ``seed`` and the counter (g, low and high half of row, offset)
    gives the random numbers of four columns c, c + 1, c + 8 and c + 9: the g-th such four from the left, with four of
    them in 16 columns. A thread has these four where a product leaves its result, so nothing moves there. A number
    depends on nothing else, so the backward, a recomputed forward and every tiling draw the same.

    seed: int64 scalar. offset: which dropout of the network. row: int64 [rows]. first_column: int32, and, like COLUMNS,
    a multiple of 16.
    """
    g = first_column // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    row = row[:, None]
    w0, w1, w2, w3 = tl.philox(seed, g + 0 * row.to(tl.int32), row.to(tl.int32), (row >> 32).to(tl.int32), offset)
    left, right = tl.join(_scale(w0, P), _scale(w2, P)), tl.join(_scale(w1, P), _scale(w3, P))
    fours = tl.join(left, right).reshape(row.shape[0], COLUMNS // 16, 4, 2, 2)
    return fours.permute(0, 1, 3, 2, 4).reshape(row.shape[0], COLUMNS)


@triton.jit
def _scale(word, P: tl.constexpr):
    THRESHOLD: tl.constexpr = int(P * 4294967296.0)  # compiled code has no round()
    return tl.where(word.to(tl.uint32, bitcast=True) >= THRESHOLD, 1.0 / (1.0 - P), 0.0)
