"""Helpers shared by the kernels: everything here works on tiles that are already in registers."""

import triton
import triton.language as tl

from . import runtime

_INTERPRETED = tl.constexpr(runtime.INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in the accumulator's type; the only way to a matrix unit here.

    The interpreter multiplies 16-bit operands by their bit patterns, so interpreted operands are widened first;
    compiled code keeps its 16-bit tensor-core instruction.
    """
    if _INTERPRETED:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def row_stats(x, mask, D, eps):
    """Mean and 1/sqrt(variance + eps) of each row of x, from registers.

    The mean is corrected by the mean of what it leaves: rows that are constant or far from zero then come out as
    exactly as with Welford's algorithm, where the plain mean's last bit would be multiplied by up to 1/sqrt(eps).

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
    """gelu(x) and gelu'(x); whichever is not used costs nothing.

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
        # From the exponential that cannot overflow; 1 − σ would cancel.
        exp = tl.exp(-tl.abs(v))
        small = 1.0 / (1.0 + exp)
        cdf = tl.where(v < 0.0, exp * small, small)
        return x * cdf, cdf + x * (exp * small * small * slope)


@triton.jit
def dropout_scale(seed, offset, row, column, P: tl.constexpr):
    """1/(1 − P) with probability 1 − P, else 0, for each element: what dropout multiplies it by.

    The first word of Philox-4x32-10 (Salmon et al., 2011) under the key ``seed`` at the counter (column, low and high
    half of row, offset). It depends on nothing else, so backward, a recomputed forward and any tiling draw the same.

    seed: int64 scalar. offset: which dropout of the network. row: int64, column: int32, broadcast against each other.
    """
    column = column + tl.zeros_like(row).to(tl.int32)
    word, _, _, _ = tl.philox(seed, column, row.to(tl.int32), (row >> 32).to(tl.int32), offset)
    THRESHOLD: tl.constexpr = int(P * 4294967296.0)  # compiled code has no round()
    return tl.where(word.to(tl.uint32, bitcast=True) >= THRESHOLD, 1.0 / (1.0 - P), 0.0)


# Attention works on the rows of one head, [BLOCK, head_dim], as a tuple of tiles with power-of-two widths. PARTS gives
# (first column, width, valid columns) of each. Rows are (pointer to the head's first, stride between them).


@triton.jit
def head_rows(ptr, stride, b, h, ALIGN: tl.constexpr):
    """Rows of head h of sample b. stride: (batch, token, head), all multiples of ALIGN."""
    offset = b * stride[0] + h * stride[2]
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return ptr + offset, stride[1]


@triton.jit
def _row_ptrs(rows, offs, ALIGN: tl.constexpr):
    offsets = offs.to(tl.int64) * rows[1]
    if ALIGN > 1:
        offsets = tl.multiple_of(offsets, ALIGN)
    return rows[0] + offsets[:, None]


@triton.jit
def load_parts(rows, offs, mask, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Rows offs, zeros where mask is false and in invalid columns."""
    ptrs = _row_ptrs(rows, offs, ALIGN)
    x = ()
    for i in tl.static_range(len(PARTS)):
        offs_d = tl.arange(0, PARTS[i][1])
        valid = mask[:, None]
        if PARTS[i][2] < PARTS[i][1]:
            valid = valid & (offs_d < PARTS[i][2])[None, :]
        x += (tl.load(ptrs + (PARTS[i][0] + offs_d)[None, :], mask=valid, other=0.0),)
    return x


@triton.jit
def store_parts(rows, x, offs, mask, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Writes x to rows offs where mask is true, rounded to their type."""
    ptrs = _row_ptrs(rows, offs, ALIGN)
    for i in tl.static_range(len(PARTS)):
        offs_d = tl.arange(0, PARTS[i][1])
        valid = mask[:, None]
        if PARTS[i][2] < PARTS[i][1]:
            valid = valid & (offs_d < PARTS[i][2])[None, :]
        tl.store(ptrs + (PARTS[i][0] + offs_d)[None, :], x[i].to(rows[0].dtype.element_ty), mask=valid)


@triton.jit
def zero_parts(BLOCK: tl.constexpr, PARTS: tl.constexpr, ACC: tl.constexpr):
    x = ()
    for i in tl.static_range(len(PARTS)):
        x += (tl.full([BLOCK, PARTS[i][1]], 0.0, dtype=ACC),)
    return x


@triton.jit
def scale_parts(x, factor):
    y = ()
    for i in tl.static_range(len(x)):
        y += (x[i] * factor,)
    return y


@triton.jit
def row_dot_parts(a, b, ACC: tl.constexpr):
    """Σ_columns a · b of each row."""
    total = tl.sum(a[0].to(ACC) * b[0].to(ACC), axis=1)
    for i in tl.static_range(1, len(a)):
        total += tl.sum(a[i].to(ACC) * b[i].to(ACC), axis=1)
    return total


@triton.jit
def dot_parts(a, b, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ bᵀ, [rows of a, rows of b]."""
    acc = tl.full([a[0].shape[0], b[0].shape[0]], 0.0, dtype=ACC)
    for i in tl.static_range(len(a)):
        acc = dot(a[i], b[i].T, acc, PRECISION)
    return acc


@triton.jit
def dot_into_parts(p, x, acc, PRECISION: tl.constexpr):
    """acc + p @ x; p is rounded to the type of x."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (dot(p.to(x[i].dtype), x[i], acc[i], PRECISION),)
    return y


@triton.jit
def attn_logits(a, b, mask, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ bᵀ, not yet scaled; −inf where mask is false."""
    return tl.where(mask, dot_parts(a, b, PRECISION, ACC), float("-inf"))


@triton.jit
def exp_scaled(x, SCALE: tl.constexpr):
    """exp(SCALE · x). Differences of logits come here, not logits: what multiplies them then rounds little."""
    return tl.exp2(x * (SCALE * 1.4426950408889634))


@triton.jit
def attn_probs(logits, m, log_l, SCALE: tl.constexpr):
    """exp(SCALE · (logits − m)) / l, as the forward computed it."""
    return tl.exp2((logits - m) * (SCALE * 1.4426950408889634) - log_l * 1.4426950408889634)
