"""Helpers of the attention kernels: the rows of one head, and the softmax.

A tile of rows, [BLOCK, head_dim], is a tuple of parts: tiles whose widths are powers of two. PARTS gives (first column,
width, valid columns) of each. Rows in memory are a pair: the pointer to the head's first row, and the stride between
rows.
"""

import triton
import triton.language as tl

from . import tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_rows(ptr, stride, b, h, ALIGN: tl.constexpr):
    """Rows of head h of sample b. stride: (batch, token, head), all multiples of ALIGN."""
    offset = b * stride[0] + h * stride[2]
    if ALIGN > 1:
        offset = tl.multiple_of(offset, ALIGN)
    return ptr + offset, stride[1]


@triton.jit
def skip_rows(tensors, count: tl.constexpr, ALIGN: tl.constexpr):
    """Of each of several tensors, the rows after the first ``count``.

    A loop that skips needs no 64-bit product for each row of a tile.
    """
    y = ()
    for i in tl.static_range(len(tensors)):
        offset = tl.cast(tensors[i][1], tl.int64) * count
        if ALIGN > 1:
            offset = tl.multiple_of(offset, ALIGN)
        y += ((tensors[i][0] + offset, tensors[i][1]),)
    return y


@triton.jit
def loop_end(n, BLOCK: tl.constexpr, WALK: tl.constexpr):
    """Where the loop over n rows ends and the last tile begins, if it has code of its own."""
    if WALK[0] == "none":
        return 0
    end = n if WALK[0] == "masked" else n // BLOCK * BLOCK
    tl.assume(end > 0)  # without it ptxas serialises wgmma
    return end


@triton.jit
def _row_ptrs(rows, offs, ALIGN: tl.constexpr):
    offsets = offs.to(tl.int64) * rows[1]
    if ALIGN > 1:
        offsets = tl.multiple_of(offsets, ALIGN)
    return rows[0] + offsets[:, None]


@triton.jit
def load_parts(rows, offs, stop, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Loads rows offs; zeros in rows from ``stop`` on (None: there are none) and in invalid columns."""
    ptrs = _row_ptrs(rows, offs, ALIGN)
    x = ()
    for i in tl.static_range(len(PARTS)):
        offs_d = tl.arange(0, PARTS[i][1])
        mask = (offs_d < PARTS[i][2])[None, :]
        if stop is not None:
            mask = mask & (offs < stop)[:, None]
        x += (tl.load(ptrs + (PARTS[i][0] + offs_d)[None, :], mask=mask, other=0.0),)
    return x


@triton.jit
def store_parts(rows, x, offs, stop, PARTS: tl.constexpr, ALIGN: tl.constexpr):
    """Writes x to rows offs before ``stop``, rounded to their type."""
    ptrs = _row_ptrs(rows, offs, ALIGN)
    for i in tl.static_range(len(PARTS)):
        offs_d = tl.arange(0, PARTS[i][1])
        mask = (offs < stop)[:, None] & (offs_d < PARTS[i][2])[None, :]
        tl.store(ptrs + (PARTS[i][0] + offs_d)[None, :], x[i].to(rows[0].dtype.element_ty), mask=mask)


@triton.jit
def load_stats(ptrs, start, offs, stop, AXIS: tl.constexpr):
    """Loads numbers ``start`` + offs of each tensor; zeros where offs is ``stop`` or more (None: nowhere).

    AXIS 0: as rows [1, columns]. AXIS 1: as columns [rows, 1].
    """
    x = ()
    for i in tl.static_range(len(ptrs)):
        if stop is None:
            x += (tl.expand_dims(tl.load(ptrs[i] + start + offs), AXIS),)
        else:
            x += (tl.expand_dims(tl.load(ptrs[i] + start + offs, mask=offs < stop, other=0.0), AXIS),)
    return x


@triton.jit
def store_column_sums(ptr, row, x, offs, stop, PARTS: tl.constexpr):
    """Writes the sum of each column of x over the rows offs before ``stop``, to a row of a contiguous matrix."""
    HEAD_DIM: tl.constexpr = PARTS[len(PARTS) - 1][0] + PARTS[len(PARTS) - 1][2]
    for i in tl.static_range(len(PARTS)):
        offs_d = tl.arange(0, PARTS[i][1])
        total = tl.sum(tl.where((offs < stop)[:, None], x[i], 0.0), axis=0)
        tl.store(ptr + row * HEAD_DIM + PARTS[i][0] + offs_d, total, mask=offs_d < PARTS[i][2])


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
        acc = tile.dot(a[i], b[i].T, acc, PRECISION)
    return acc


@triton.jit
def dot_into_parts(p, x, acc, PRECISION: tl.constexpr):
    """acc + p @ x; p is rounded to the type of x."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (tile.dot(p.to(x[i].dtype), x[i], acc[i], PRECISION),)
    return y


@triton.jit
def attn_logits(a, b, offs, stop, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ bᵀ, not yet scaled; −inf in columns whose offs is ``stop`` or more (None: there are none)."""
    logits = dot_parts(a, b, PRECISION, ACC)
    if stop is not None:
        logits = tl.where((offs < stop)[None, :], logits, float("-inf"))
    return logits


@triton.jit
def exp_scaled(x, m, SCALE: tl.constexpr, EXACT: tl.constexpr):
    """exp(SCALE · (x − m)). EXACT subtracts first: differences are smaller than logits, so their scaling rounds less.

    Otherwise one multiply-add scales x and subtracts.
    """
    if EXACT:
        return tl.exp2((x - m) * (SCALE * LOG2_E))
    return tl.exp2(x * (SCALE * LOG2_E) - m * (SCALE * LOG2_E))


@triton.jit
def attn_probs(logits, stats, SCALE: tl.constexpr):
    """P, as the forward computed it. stats: (lse₂, delta) of each query, or (log₂ l, delta, m), which is more exact."""
    if len(stats) == 3:
        logits -= stats[2]
    return tl.exp2(logits * (SCALE * LOG2_E) - stats[0])
