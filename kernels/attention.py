"""Multi-head attention, bidirectional: softmax(scale · q kᵀ) v per head, without ever storing the matrix of logits.

Forward, for a tile of queries, over the keys tile by tile (Milakov & Gimelshein, 2018; Dao, 2023), s = q kᵀ:
    m' = max(m, max s),  P = exp(scale · (s − m')),  α = exp(scale · (m − m')),  l = α · l + Σ P,  acc = α · acc + P v
    o = acc / l,  lse = scale · m + log l
Saved: q, k, v, o, m and log l [B, H, N]. P is recomputed. lse alone would be enough, but at logits around 100 its
rounding would put errors of 1e-5 into P, which eager PyTorch does not have in fp32.

Backward, from do:
    P = exp(scale · (s − m) − log l),  delta = Σ_e do · o,  dS = P · (do vᵀ − delta)
    dv = Pᵀ do,  dk = scale · dSᵀ q,  dq = scale · dS k
With dropout, K = `tile.dropout_scale` of row (b · H + h) · NQ + query and column key. K · P replaces P in P v and in
Pᵀ do, and K · (do vᵀ) replaces do vᵀ. l, lse and delta stay as they are: Σ P · K · (do vᵀ) = Σ do · o.
A small kernel computes delta [B, H, N]. Then one launch has programs of two roles. Some own a tile of keys (dk, dv) and
walk the queries. The others own a tile of queries (dq) and walk the keys. Each recomputes P and dS, which makes seven
products instead of five. But no program needs another's results: every sum has one fixed order, without atomics.

16-bit inputs are wrong by more than 1e-5 themselves. So for them exp2(c · s − lse₂) takes one multiply-add before the
exp2, with c = scale · log₂e and one number for each query: c · m forward, lse₂ = c · m + log₂ l backward.

A program walks whole tiles, which need no mask, and then one narrower tile for the rows that are left, which has one.
Sequence lengths are arguments, not compile-time constants: on sm_90 constants save nothing in the forward (1,852
instructions a program instead of 1,835) and 3 % in the backward, but every new length would compile anew. So it is only
a new kind of last tile that does (`configs.walk`).

q, k and v are read in place with any batch, token and head strides. So packed qkv [B, N, 3, H, E] needs no copy, and
its gradient is written straight into packed dqkv. A head dimension that is not a power of two is split into parts:
80 = 64 + 16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, pytorch, reference, runtime, tile
from .attention_tile import (
    LOG2_E,
    attn_logits,
    attn_probs,
    dot_into_parts,
    dot_parts,
    exp_scaled,
    head_rows,
    load_parts,
    load_stats,
    loop_end,
    row_dot_parts,
    scale_parts,
    skip_rows,
    store_column_sums,
    store_parts,
    zero_parts,
)
from .autocast import autocasts
from .checks import check_floating, check_heads, check_scale
from .dropout import seed_and_offset

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128


@triton.jit(do_not_specialize=["NQ", "NK", "OFFSET"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, seed_ptr, o_ptr, m_ptr, log_l_ptr,
    NQ, NK, HEADS, OFFSET,
    stride_q, stride_k, stride_v, stride_o,  # each (batch, token, head)
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(NQ, BLOCK_M)
    head, pid_m = pid // tiles, (pid % tiles).to(tl.int32)
    b, h = head // HEADS, head % HEADS
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = head * NQ + offs_m
    kv_rows = head_rows(k_ptr, stride_k, b, h, ALIGN), head_rows(v_ptr, stride_v, b, h, ALIGN)
    drop = (tl.load(seed_ptr), OFFSET, rows) if seed_ptr is not None else None

    q = load_parts(head_rows(q_ptr, stride_q, b, h, ALIGN), offs_m, NQ, PARTS, ALIGN)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    l_i = tl.full([BLOCK_M], 0.0, dtype=ACC)
    state = m_i, l_i, zero_parts(BLOCK_M, PARTS, ACC)
    end = loop_end(NK, BLOCK_N, WALK_K)
    for start_n in range(0, end, BLOCK_N):
        left = NK - start_n if WALK_K[0] == "masked" else None
        state = _fwd_step(state, q, kv_rows, start_n, left, drop, SCALE, P, PARTS, ALIGN, PRECISION, BLOCK_N)
        kv_rows = skip_rows(kv_rows, BLOCK_N, ALIGN)
    if WALK_K[1]:
        state = _fwd_step(state, q, kv_rows, end, NK - end, drop, SCALE, P, PARTS, ALIGN, PRECISION, WALK_K[1])

    m_i, l_i, acc = state
    o_rows = head_rows(o_ptr, stride_o, b, h, ALIGN)
    store_parts(o_rows, scale_parts(acc, (1.0 / l_i)[:, None]), offs_m, NQ, PARTS, ALIGN)
    if m_ptr is not None:
        tl.store(m_ptr + rows, m_i, mask=offs_m < NQ)
        tl.store(log_l_ptr + rows, tl.log(l_i), mask=offs_m < NQ)


@triton.jit
def _fwd_step(
    state, q, kv_rows, start_n, left, drop,
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """m, l and acc after WIDTH keys more, of which the first ``left`` exist (None: all)."""
    m_i, l_i, acc = state
    offs_n = tl.arange(0, WIDTH)
    k = load_parts(kv_rows[0], offs_n, left, PARTS, ALIGN)
    v = load_parts(kv_rows[1], offs_n, left, PARTS, ALIGN)

    logits = attn_logits(q, k, offs_n, left, PRECISION, m_i.dtype)  # [BLOCK_M, WIDTH]
    m_new = tl.maximum(m_i, tl.max(logits, axis=1))  # finite: every tile has a key
    EXACT: tl.constexpr = k[0].dtype.primitive_bitwidth > 16
    p = exp_scaled(logits, m_new[:, None], SCALE, EXACT)
    alpha = exp_scaled(m_i, m_new, SCALE, EXACT)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    if drop is not None:
        seed, OFFSET, rows = drop
        p *= tile.dropout_scale(seed, OFFSET, rows, start_n, WIDTH, P).to(p.dtype)
    return m_new, l_i, dot_into_parts(p, v, scale_parts(acc, alpha[:, None]), PRECISION)


@triton.jit(do_not_specialize=["NQ"])
def _attention_delta_kernel(
    o_ptr, do_ptr, m_ptr, log_l_ptr, lse_ptr, delta_ptr,
    NQ, HEADS,
    stride_o, stride_do,  # each (batch, token, head)
    SCALE: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta and lse₂ of BLOCK_M queries; without m_ptr log₂ l instead of lse₂."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(NQ, BLOCK_M)
    head, pid_m = pid // tiles, (pid % tiles).to(tl.int32)
    b, h = head // HEADS, head % HEADS
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m, rows = offs_m < NQ, head * NQ + offs_m

    o = load_parts(head_rows(o_ptr, stride_o, b, h, ALIGN), offs_m, NQ, PARTS, ALIGN)
    do = load_parts(head_rows(do_ptr, stride_do, b, h, ALIGN), offs_m, NQ, PARTS, ALIGN)
    tl.store(delta_ptr + rows, row_dot_parts(do, o, ACC), mask=mask_m)
    lse = tl.load(log_l_ptr + rows, mask=mask_m, other=0.0) * LOG2_E
    if m_ptr is not None:
        lse += tl.load(m_ptr + rows, mask=mask_m, other=0.0) * (SCALE * LOG2_E)
    tl.store(lse_ptr + rows, lse, mask=mask_m)


@triton.jit(do_not_specialize=["NQ", "NK", "OFFSET"])
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, seed_ptr, do_ptr, m_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, sums_ptr,
    NQ, NK, HEADS, OFFSET,
    stride_q, stride_k, stride_v, stride_do, stride_dq, stride_dk, stride_dv,  # each (batch, token, head)
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK_Q: tl.constexpr, WALK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles_k = tl.cdiv(NK, BLOCK_M) if dk_ptr is not None else 0
    tiles_q = tl.cdiv(NQ, BLOCK_M) if dq_ptr is not None else 0
    # The programs of one head are neighbours, so that they find its rows in L2.
    head, pid_m = pid // (tiles_k + tiles_q), (pid % (tiles_k + tiles_q)).to(tl.int32)
    b, h = head // HEADS, head % HEADS
    q_do_rows = head_rows(q_ptr, stride_q, b, h, ALIGN), head_rows(do_ptr, stride_do, b, h, ALIGN)
    kv_rows = head_rows(k_ptr, stride_k, b, h, ALIGN), head_rows(v_ptr, stride_v, b, h, ALIGN)
    stats = lse_ptr + head * NQ, delta_ptr + head * NQ
    if m_ptr is not None:
        stats += (m_ptr + head * NQ,)

    if pid_m < tiles_k:
        if dk_ptr is not None:
            start_n = pid_m * BLOCK_M
            offs_n = start_n + tl.arange(0, BLOCK_M)
            dk, dv = _dk_dv(
                q_do_rows, kv_rows, stats, seed_ptr, start_n, offs_n, head * NQ, OFFSET, NQ, NK,
                SCALE, P, PARTS, ALIGN, PRECISION, ACC, BLOCK_M, BLOCK_N, WALK_Q,
            )  # fmt: skip
            store_parts(head_rows(dk_ptr, stride_dk, b, h, ALIGN), dk, offs_n, NK, PARTS, ALIGN)
            store_parts(head_rows(dv_ptr, stride_dv, b, h, ALIGN), dv, offs_n, NK, PARTS, ALIGN)
            if sums_ptr is not None:
                row = (b * tiles_k + pid_m) * 3 * HEADS + h  # of [B, tiles, 3, HEADS] rows
                store_column_sums(sums_ptr, row + HEADS, dk, offs_n, NK, PARTS)
                store_column_sums(sums_ptr, row + 2 * HEADS, dv, offs_n, NK, PARTS)
    else:
        if dq_ptr is not None:
            pid_m -= tiles_k
            offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            dq = _dq(
                q_do_rows, kv_rows, stats, seed_ptr, offs_m, head * NQ, OFFSET, NQ, NK,
                SCALE, P, PARTS, ALIGN, PRECISION, ACC, BLOCK_M, BLOCK_N, WALK_K,
            )  # fmt: skip
            store_parts(head_rows(dq_ptr, stride_dq, b, h, ALIGN), dq, offs_m, NQ, PARTS, ALIGN)
            if sums_ptr is not None:
                store_column_sums(sums_ptr, (b * tiles_q + pid_m) * 3 * HEADS + h, dq, offs_m, NQ, PARTS)


@triton.jit
def _dk_dv(
    q_do_rows, kv_rows, stat_ptrs, seed_ptr, start_n, offs_n, first_row, OFFSET, NQ, NK,
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys offs_n, over all queries. Rows beyond the last key may hold inf."""
    k = load_parts(kv_rows[0], offs_n, NK, PARTS, ALIGN)
    v = load_parts(kv_rows[1], offs_n, NK, PARTS, ALIGN)
    drop = (tl.load(seed_ptr), OFFSET, first_row, start_n) if seed_ptr is not None else None
    state = zero_parts(BLOCK_M, PARTS, ACC), zero_parts(BLOCK_M, PARTS, ACC)
    end = loop_end(NQ, BLOCK_N, WALK)
    for start_m in range(0, end, BLOCK_N):
        left = NQ - start_m if WALK[0] == "masked" else None
        state = _dk_dv_step(
            state, k, v, q_do_rows, stat_ptrs, start_m, left, drop, SCALE, P, PARTS, ALIGN, PRECISION, BLOCK_N
        )
        q_do_rows = skip_rows(q_do_rows, BLOCK_N, ALIGN)
    if WALK[1]:
        state = _dk_dv_step(
            state, k, v, q_do_rows, stat_ptrs, end, NQ - end, drop, SCALE, P, PARTS, ALIGN, PRECISION, WALK[1]
        )
    return scale_parts(state[0], SCALE), state[1]


@triton.jit
def _dk_dv_step(
    state, k, v, q_do_rows, stat_ptrs, start_m, left, drop,
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """dk and dv after WIDTH queries more. P and dS are [keys, queries], the layout of the last two products.

    Columns beyond the last query have P = 0.
    """
    dk, dv = state
    offs_m = tl.arange(0, WIDTH)
    q = load_parts(q_do_rows[0], offs_m, left, PARTS, ALIGN)
    do = load_parts(q_do_rows[1], offs_m, left, PARTS, ALIGN)
    stats = load_stats(stat_ptrs, start_m, offs_m, left, 0)

    ACC: tl.constexpr = dk[0].dtype
    p = attn_probs(attn_logits(k, q, offs_m, left, PRECISION, ACC), stats, SCALE)
    dp = dot_parts(v, do, PRECISION, ACC)
    kept = p
    if drop is not None:
        seed, OFFSET, first_row, start_n = drop
        rows = first_row + start_m + offs_m
        drop_scale = tile.dropout_scale(seed, OFFSET, rows, start_n, k[0].shape[0], P).to(ACC).T
        kept *= drop_scale
        dp *= drop_scale
    ds = p * (dp - stats[1])  # delta
    dv = dot_into_parts(kept, do, dv, PRECISION)
    return dot_into_parts(ds, q, dk, PRECISION), dv


@triton.jit
def _dq(
    q_do_rows, kv_rows, stat_ptrs, seed_ptr, offs_m, first_row, OFFSET, NQ, NK,
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """dq of the queries offs_m, over all keys."""
    q = load_parts(q_do_rows[0], offs_m, NQ, PARTS, ALIGN)
    do = load_parts(q_do_rows[1], offs_m, NQ, PARTS, ALIGN)
    stats = load_stats(stat_ptrs, 0, offs_m, NQ, 1)
    drop = (tl.load(seed_ptr), OFFSET, first_row + offs_m) if seed_ptr is not None else None
    dq = zero_parts(BLOCK_M, PARTS, ACC)
    end = loop_end(NK, BLOCK_N, WALK)
    for start_n in range(0, end, BLOCK_N):
        left = NK - start_n if WALK[0] == "masked" else None
        dq = _dq_step(dq, q, do, stats, kv_rows, start_n, left, drop, SCALE, P, PARTS, ALIGN, PRECISION, BLOCK_N)
        kv_rows = skip_rows(kv_rows, BLOCK_N, ALIGN)
    if WALK[1]:
        dq = _dq_step(dq, q, do, stats, kv_rows, end, NK - end, drop, SCALE, P, PARTS, ALIGN, PRECISION, WALK[1])
    return scale_parts(dq, SCALE)


@triton.jit
def _dq_step(
    dq, q, do, stats, kv_rows, start_n, left, drop,
    SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """dq after WIDTH keys more."""
    offs_n = tl.arange(0, WIDTH)
    k = load_parts(kv_rows[0], offs_n, left, PARTS, ALIGN)
    v = load_parts(kv_rows[1], offs_n, left, PARTS, ALIGN)

    ACC: tl.constexpr = dq[0].dtype
    p = attn_probs(attn_logits(q, k, offs_n, left, PRECISION, ACC), stats, SCALE)
    dp = dot_parts(do, v, PRECISION, ACC)
    if drop is not None:
        seed, OFFSET, rows = drop
        dp *= tile.dropout_scale(seed, OFFSET, rows, start_n, WIDTH, P).to(ACC)
    ds = p * (dp - stats[1])  # delta
    return dot_into_parts(ds, k, dq, PRECISION)


def head_parts(head_dim: int) -> tuple[tuple[int, int, int], ...]:
    """The parts of a head dimension, each (first column, width, valid columns): 72 gives (0, 64, 64) and (64, 16, 8).

    Widths are powers of two of at least 16. Together they are the head dimension, rounded up to a multiple of 16.
    """
    parts, start = [], 0
    padded = triton.cdiv(head_dim, 16) * 16
    for width in (128, 64, 32, 16):
        if padded & width:
            parts.append((start, width, min(width, head_dim - start)))
            start += width
    return tuple(parts)


def align(*tensors: Tensor | None) -> int:
    """8 if every row starts at a multiple of 8 elements, so that a load can take 16 bytes; else 1."""
    return 8 if all(s % 8 == 0 for t in tensors if t is not None for s in t.stride()[:3]) else 1


def strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()[:3]


def unit_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, m: Tensor, log_l: Tensor,
    scale: float, seed: Tensor | None, dropout_p: float, offset: int,
) -> None:  # fmt: skip
    """Fills o, and m and log_l unless empty. q, o [B, NQ, H, E] and k, v [B, NK, H, E] with unit last stride."""
    (B, NQ, HEADS, HEAD_DIM), NK = q.shape, k.shape[1]
    config = configs.attention_fwd(runtime.arch(q.device), NK, HEAD_DIM, q.dtype, seed is not None)
    runtime.launch(
        _attention_fwd_kernel, B * HEADS * triton.cdiv(NQ, config.block_m),
        q_ptr=q, k_ptr=k, v_ptr=v, seed_ptr=seed, o_ptr=o,
        m_ptr=m if m.numel() else None, log_l_ptr=log_l if m.numel() else None,
        NQ=NQ, NK=NK, HEADS=HEADS, OFFSET=offset,
        stride_q=strides(q), stride_k=strides(k), stride_v=strides(v), stride_o=strides(o),
        SCALE=scale, P=dropout_p, PARTS=head_parts(HEAD_DIM), ALIGN=align(q, k, v, o),
        PRECISION=runtime.precision(q.dtype), ACC=runtime.acc_type(q.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, WALK_K=configs.walk(NK, config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_bwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, m: Tensor, log_l: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, sums: Tensor | None, scratch: Sequence[Tensor],
    scale: float, seed: Tensor | None, dropout_p: float, offset: int,
) -> None:  # fmt: skip
    """Fills dq unless None, and dk and dv unless None. All are [B, N, H, E] with unit last stride.

    Fills sums unless None: [B · tiles, 3 · H · E], contiguous, for q, k and v of one length and block_m tokens a tile.
    Row i is the sum of dq, dk and dv over the tokens of tile i. scratch, two tensors like m, is overwritten.
    """
    B, NQ, HEADS, HEAD_DIM = q.shape
    NK = k.shape[1]
    config = configs.attention_bwd(runtime.arch(q.device), max(NQ, NK), HEAD_DIM, q.dtype, seed is not None)
    exact = q.dtype not in runtime.HALF
    lse, delta = scratch
    tiles_q, tiles_k = (0 if t is None else triton.cdiv(t.shape[1], config.block_m) for t in (dq, dk))
    runtime.launch(
        _attention_delta_kernel, B * HEADS * triton.cdiv(NQ, config.block_m),
        o_ptr=o, do_ptr=do, m_ptr=None if exact else m, log_l_ptr=log_l, lse_ptr=lse, delta_ptr=delta,
        NQ=NQ, HEADS=HEADS, stride_o=strides(o), stride_do=strides(do),
        SCALE=scale, PARTS=head_parts(HEAD_DIM), ALIGN=align(o, do), ACC=runtime.acc_type(q.dtype),
        BLOCK_M=config.block_m, num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    runtime.launch(
        _attention_bwd_kernel, B * HEADS * (tiles_q + tiles_k),
        q_ptr=q, k_ptr=k, v_ptr=v, seed_ptr=seed, do_ptr=do, m_ptr=m if exact else None, lse_ptr=lse, delta_ptr=delta,
        dq_ptr=dq, dk_ptr=dk, dv_ptr=dv, sums_ptr=sums,
        NQ=NQ, NK=NK, HEADS=HEADS, OFFSET=offset,
        stride_q=strides(q), stride_k=strides(k), stride_v=strides(v), stride_do=strides(do),
        stride_dq=strides(dq), stride_dk=strides(dk), stride_dv=strides(dv),
        SCALE=scale, P=dropout_p, PARTS=head_parts(HEAD_DIM), ALIGN=align(q, k, v, do, dq, dk, dv),
        PRECISION=runtime.precision(q.dtype), ACC=runtime.acc_type(q.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        WALK_Q=configs.walk(NQ, config), WALK_K=configs.walk(NK, config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@torch.library.custom_op("vit::attention_fwd", mutates_args=())
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, save: bool,
    seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o [B, NQ, H·E], m [B, H, NQ], log_l [B, H, NQ]); m and log_l are empty unless ``save``."""
    o, m, log_l = _attention_fwd_fake(q, k, v, scale, save)
    q, k, v = unit_rows(q, k, v)
    _launch_fwd(
        q=q, k=k, v=v, o=o.view(q.shape), m=m, log_l=log_l, scale=scale, seed=seed, dropout_p=dropout_p, offset=offset
    )
    return o, m, log_l


@attention_fwd.register_fake
def _attention_fwd_fake(q, k, v, scale, save, seed=None, dropout_p=0.0, offset=0):
    B, NQ, HEADS, HEAD_DIM = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    stats = (q.new_empty((B, HEADS, NQ) if save else 0, dtype=dtype) for _ in range(2))
    return q.new_empty(B, NQ, HEADS * HEAD_DIM), *stats


@torch.library.custom_op("vit::attention_bwd", mutates_args=())
def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, m: Tensor, log_l: Tensor,
    scale: float, need_dq: bool, need_dkv: bool,
    seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv), contiguous. Gradients that are not needed are empty."""
    dq, dk, dv = _attention_bwd_fake(do, q, k, v, o, m, log_l, scale, need_dq, need_dkv)
    q, k, v, do = unit_rows(q, k, v, do.unflatten(-1, q.shape[2:]))
    _launch_bwd(
        q=q, k=k, v=v, o=o.view(q.shape), do=do, m=m, log_l=log_l,
        dq=dq if need_dq else None, dk=dk if need_dkv else None, dv=dv if need_dkv else None,
        sums=None, scratch=(torch.empty_like(m), torch.empty_like(m)),
        scale=scale, seed=seed, dropout_p=dropout_p, offset=offset,
    )  # fmt: skip
    return dq, dk, dv


@attention_bwd.register_fake
def _attention_bwd_fake(
    do, q, k, v, o, m, log_l, scale, need_dq, need_dkv, seed=None, dropout_p=0.0, offset=0
):  # fmt: skip
    kv_shape = k.shape if need_dkv else (0,)
    return q.new_empty(q.shape if need_dq else 0), k.new_empty(kv_shape), v.new_empty(kv_shape)


@torch.library.custom_op("vit::attention_qkvpacked_fwd", mutates_args=())
def attention_qkvpacked_fwd(
    qkv: Tensor, scale: float, save: bool, seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_fwd` of packed qkv [B, N, 3, H, E]."""
    o, m, log_l = _attention_qkvpacked_fwd_fake(qkv, scale, save)
    q, k, v = unit_rows(qkv)[0].unbind(dim=2)
    _launch_fwd(
        q=q, k=k, v=v, o=o.view(q.shape), m=m, log_l=log_l, scale=scale, seed=seed, dropout_p=dropout_p, offset=offset
    )
    return o, m, log_l


@attention_qkvpacked_fwd.register_fake
def _attention_qkvpacked_fwd_fake(qkv, scale, save, seed=None, dropout_p=0.0, offset=0):
    return _attention_fwd_fake(*qkv.unbind(dim=2), scale, save)


@torch.library.custom_op("vit::attention_qkvpacked_bwd", mutates_args=())
def attention_qkvpacked_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, m: Tensor, log_l: Tensor, scale: float,
    seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0, need_dbias: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Packed dqkv [B, N, 3, H, E], contiguous: the kernel writes into it; and with ``need_dbias`` parts of its sum.

    The parts are [B · tiles, 3 · H · E], fp32, before dqkv is rounded. Their sum over dimension 0 is the gradient of a
    bias that was added to qkv. Without ``need_dbias`` they are empty.
    """
    dqkv, sums = _attention_qkvpacked_bwd_fake(do, qkv, o, m, log_l, scale, seed, need_dbias=need_dbias)
    qkv, do = unit_rows(qkv, do.unflatten(-1, qkv.shape[3:]))
    (q, k, v), (dq, dk, dv) = qkv.unbind(dim=2), dqkv.unbind(dim=2)
    _launch_bwd(
        q=q, k=k, v=v, o=o.view(q.shape), do=do, m=m, log_l=log_l, dq=dq, dk=dk, dv=dv,
        sums=sums if need_dbias else None, scratch=(torch.empty_like(m), torch.empty_like(m)),
        scale=scale, seed=seed, dropout_p=dropout_p, offset=offset,
    )  # fmt: skip
    return dqkv, sums


@attention_qkvpacked_bwd.register_fake
def _attention_qkvpacked_bwd_fake(
    do, qkv, o, m, log_l, scale, seed=None, dropout_p=0.0, offset=0, need_dbias=False
):  # fmt: skip
    B, N, _, HEADS, HEAD_DIM = qkv.shape
    parts = 0
    if need_dbias:
        config = configs.attention_bwd(runtime.arch(qkv.device), N, HEAD_DIM, qkv.dtype, seed is not None)
        parts = B * triton.cdiv(N, config.block_m), 3 * HEADS * HEAD_DIM
    return qkv.new_empty(qkv.shape), m.new_empty(parts)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _, seed, ctx.dropout_p, ctx.offset = inputs
    o, m, log_l = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(m, log_l)
    ctx.save_for_backward(*tensors, o, m, log_l, seed)


def _attention_qkvpacked_backward(ctx, do, _dm, _dlog_l):
    if do is None:
        return (None,) * 6
    qkv, o, m, log_l, seed = ctx.saved_tensors
    dqkv, _ = attention_qkvpacked_bwd(
        do=do, qkv=qkv, o=o, m=m, log_l=log_l, scale=ctx.scale, seed=seed, dropout_p=ctx.dropout_p, offset=ctx.offset
    )
    return dqkv, *[None] * 5


def _attention_backward(ctx, do, _dm, _dlog_l):
    if do is None:
        return (None,) * 8
    need_dq, need_dk, need_dv = ctx.needs_input_grad[:3]
    q, k, v, o, m, log_l, seed = ctx.saved_tensors
    dq, dk, dv = attention_bwd(
        do=do, q=q, k=k, v=v, o=o, m=m, log_l=log_l, scale=ctx.scale, need_dq=need_dq, need_dkv=need_dk or need_dv,
        seed=seed, dropout_p=ctx.dropout_p, offset=ctx.offset,
    )  # fmt: skip
    return dq if need_dq else None, dk if need_dk else None, dv if need_dv else None, *[None] * 5


attention_qkvpacked_fwd.register_autograd(_attention_qkvpacked_backward, setup_context=_setup_context)
attention_fwd.register_autograd(_attention_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("attention_qkvpacked", attention_qkvpacked_bwd)
runtime.refuse_second_derivative("attention", attention_bwd)


@autocasts()
def attention_qkvpacked(
    qkv: Tensor,
    *,
    num_heads: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head self-attention on packed queries, keys and values, as the qkv projection of a ViT writes them.

    Args:
        qkv: [B, N, 3, H, E], or [B, N, 3·H·E] together with ``num_heads``; any strides, read in place unless the last
            stride is not 1; fp32, fp16 or bf16. The kernels take E from 16 to 128 in steps of 8.
        num_heads: H, exactly when qkv has three dimensions.
        scale: of the logits, positive; 1/sqrt(E) if None.
        return_lse: also return the logsumexp of each query's logits.
        dropout_p: dropout of the normalised probabilities, as `vit.kernels.dropout` of [B, H, N, N]. The logsumexp
            does not depend on it.
        seed: as in `vit.kernels.dropout`.
        offset: as in `vit.kernels.dropout`.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        [B, N, H·E] in the dtype of ``qkv`` (of autocast, where that is on), contiguous; with ``return_lse`` also the
        natural-log logsumexp, fp32 [B, H, N], through which no gradient flows.

    Raises:
        ValueError: shapes that do not fit, dropout_p outside [0, 1), unknown impl.
        TypeError: not a floating-point tensor, not a seed.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "attention_qkvpacked"
    check_floating(op, qkv=qkv)
    if num_heads is not None:
        if qkv.dim() != 3 or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
            raise ValueError(
                f"{op}: with num_heads={num_heads} qkv must have shape [B, N, 3·{num_heads}·E], got {tuple(qkv.shape)}"
            )
        qkv = qkv.unflatten(-1, (3, num_heads, qkv.shape[-1] // (3 * num_heads)))
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"{op}: qkv must have shape [B, N, 3, H, E], or [B, N, 3·H·E] with num_heads given, got {tuple(qkv.shape)}"
        )
    scale = check_scale(op, scale, qkv.shape[-1])
    seed, offset = seed_and_offset(op, dropout_p, seed, offset, qkv)
    listener = runtime.attention_listener()
    if not runtime.use_triton(op, impl, [qkv], unsupported_head_dim(qkv.shape[-1])):
        _tell(listener, *qkv.unbind(2)[:2], scale)
        options = {"scale": scale, "return_lse": return_lse, "dropout_p": dropout_p, "seed": seed, "offset": offset}
        return (reference if impl == "reference" else pytorch).attention_qkvpacked(qkv, **options)
    save = return_lse or runtime.needs_grad(qkv) or listener is not None
    out, m, log_l = attention_qkvpacked_fwd(qkv, scale, save, seed, dropout_p, offset)
    _tell(listener, *qkv.unbind(2)[:2], scale, m, log_l)
    return (out, scale * m + log_l) if return_lse else out


@autocasts()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_qkvpacked` of separate queries, keys and values, whose lengths may differ.

    Args:
        q: [B, NQ, H, E], any strides (a transposed view of [B, H, N, E] too), read in place unless the last stride is
            not 1; fp32, fp16 or bf16.
        k: [B, NK, H, E], likewise, in the dtype of ``q``.
        v: like ``k``.
        scale: of the logits, positive; 1/sqrt(E) if None.
        return_lse: also return the logsumexp of each query's logits.
        dropout_p: dropout of the probabilities [B, H, NQ, NK], as in `attention_qkvpacked`.
        seed: as in `vit.kernels.dropout`.
        offset: as in `vit.kernels.dropout`.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        [B, NQ, H·E], contiguous; with ``return_lse`` also the logsumexp [B, H, NQ].

    Raises:
        ValueError: shapes that do not fit, dropout_p outside [0, 1), unknown impl.
        TypeError: dtypes that do not fit, not a seed.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "attention"
    check_floating(op, q=q, k=k, v=v)
    check_heads(op, q, k=k, v=v)
    if k.shape != v.shape:
        raise ValueError(f"{op}: k and v must have the same shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    scale = check_scale(op, scale, q.shape[-1])
    seed, offset = seed_and_offset(op, dropout_p, seed, offset, q)
    listener = runtime.attention_listener()
    if not runtime.use_triton(op, impl, [q, k, v], unsupported_head_dim(q.shape[-1])):
        _tell(listener, q, k, scale)
        options = {"scale": scale, "return_lse": return_lse, "dropout_p": dropout_p, "seed": seed, "offset": offset}
        return (reference if impl == "reference" else pytorch).attention(q, k, v, **options)
    save = return_lse or runtime.needs_grad(q, k, v) or listener is not None
    out, m, log_l = attention_fwd(q, k, v, scale, save, seed, dropout_p, offset)
    _tell(listener, q, k, scale, m, log_l)
    return (out, scale * m + log_l) if return_lse else out


def _tell(listener: runtime.AttentionListener | None, q: Tensor, k: Tensor, scale: float, *saved: Tensor) -> None:
    if listener is not None:
        with torch.no_grad():
            listener(q.detach(), k.detach(), scale, tuple(s.detach() for s in saved) or None)


def unsupported_head_dim(head_dim: int) -> str | None:
    if head_dim % 8 == 0 and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return None
    return f"the kernels take head dimensions from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} in steps of 8, not {head_dim}"
