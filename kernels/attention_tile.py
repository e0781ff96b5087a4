"""Helpers of the attention kernels: the rows of one head, and the softmax.

A tile of rows, [BLOCK, head_dim], is a tuple of parts: tiles whose widths are powers of two. PARTS gives (first column,
width, valid columns) of each. Rows in memory are a pair: the pointer to the head's first row, and the stride between
rows.
"""

import triton
import triton.language as tl

from . import tile


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
    """Loads rows offs, with zeros where mask is false and in invalid columns."""
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
def attn_logits(a, b, mask, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """a @ bᵀ, not yet scaled; −inf where mask is false."""
    return tl.where(mask, dot_parts(a, b, PRECISION, ACC), float("-inf"))


@triton.jit
def exp_scaled(x, SCALE: tl.constexpr):
    """exp(SCALE · x), for differences of logits. They are smaller than logits, so their scaling rounds less."""
    return tl.exp2(x * (SCALE * 1.4426950408889634))


@triton.jit
def attn_probs(logits, m, log_l, SCALE: tl.constexpr):
    """exp(SCALE · (logits − m)) / l, as the forward computed it."""
    return tl.exp2((logits - m) * (SCALE * 1.4426950408889634) - log_l * 1.4426950408889634)
