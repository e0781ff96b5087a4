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
One launch has programs of two roles. Some own a tile of keys (dk, dv) and walk the queries. The others own a tile of
queries (dq) and walk the keys. Each recomputes P, dS and delta, which makes seven products instead of five. But no
program needs another's results: every sum has one fixed order, without atomics and without scratch memory.

q, k and v are read in place with any batch, token and head strides. So packed qkv [B, N, 3, H, E] needs no copy, and
its gradient is written straight into packed dqkv. Sequence lengths are compile-time constants. A head dimension that is
not a power of two is split into parts: 80 = 64 + 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference, runtime, tile
from .attention_tile import (
    attn_logits,
    attn_probs,
    dot_into_parts,
    dot_parts,
    exp_scaled,
    head_rows,
    load_parts,
    row_dot_parts,
    scale_parts,
    store_parts,
    zero_parts,
)
from .autocast import autocasts
from .checks import check_floating, check_heads, check_scale
from .dropout import seed_and_offset

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128


@triton.jit(do_not_specialize=["OFFSET"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, seed_ptr, o_ptr, m_ptr, log_l_ptr,
    HEADS, OFFSET,
    stride_q, stride_k, stride_v, stride_o,  # each (batch, token, head)
    NQ: tl.constexpr, NK: tl.constexpr, SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    TILES: tl.constexpr = (NQ + BLOCK_M - 1) // BLOCK_M
    head = pid // TILES
    b, h = head // HEADS, head % HEADS
    offs_m = pid % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < NQ
    q_rows = head_rows(q_ptr, stride_q, b, h, ALIGN)
    k_rows = head_rows(k_ptr, stride_k, b, h, ALIGN)
    v_rows = head_rows(v_ptr, stride_v, b, h, ALIGN)

    q = load_parts(q_rows, offs_m, mask_m, PARTS, ALIGN)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    l_i = tl.full([BLOCK_M], 0.0, dtype=ACC)
    acc = zero_parts(BLOCK_M, PARTS, ACC)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start_n in range(0, NK, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < NK
        k = load_parts(k_rows, offs_n, mask_n, PARTS, ALIGN)
        v = load_parts(v_rows, offs_n, mask_n, PARTS, ALIGN)

        logits = attn_logits(q, k, mask_n[None, :], PRECISION, ACC)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(logits, axis=1))  # finite: every tile has a key
        p = exp_scaled(logits - m_new[:, None], SCALE)
        alpha = exp_scaled(m_i - m_new, SCALE)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        if seed_ptr is not None:
            p *= tile.dropout_scale(seed, OFFSET, (head * NQ + offs_m)[:, None], offs_n[None, :], P).to(ACC)
        acc = dot_into_parts(p, v, scale_parts(acc, alpha[:, None]), PRECISION)
        m_i = m_new

    o_rows = head_rows(o_ptr, stride_o, b, h, ALIGN)
    store_parts(o_rows, scale_parts(acc, (1.0 / l_i)[:, None]), offs_m, mask_m, PARTS, ALIGN)
    if m_ptr is not None:
        tl.store(m_ptr + head * NQ + offs_m, m_i, mask=mask_m)
        tl.store(log_l_ptr + head * NQ + offs_m, tl.log(l_i), mask=mask_m)


@triton.jit(do_not_specialize=["OFFSET"])
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, seed_ptr, o_ptr, do_ptr, m_ptr, log_l_ptr, dq_ptr, dk_ptr, dv_ptr,
    HEADS, OFFSET,
    stride_q, stride_k, stride_v, stride_o, stride_do, stride_dq, stride_dk, stride_dv,  # each (batch, token, head)
    NQ: tl.constexpr, NK: tl.constexpr, SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    TILES_K: tl.constexpr = (NK + BLOCK_M - 1) // BLOCK_M if dk_ptr is not None else 0
    TILES_Q: tl.constexpr = (NQ + BLOCK_M - 1) // BLOCK_M if dq_ptr is not None else 0
    # The programs of one head are neighbours, so that they find its rows in L2.
    head, pid_m = pid // (TILES_K + TILES_Q), pid % (TILES_K + TILES_Q)
    b, h = head // HEADS, head % HEADS
    m_ptr += head * NQ
    log_l_ptr += head * NQ
    q = head_rows(q_ptr, stride_q, b, h, ALIGN)
    k = head_rows(k_ptr, stride_k, b, h, ALIGN)
    v = head_rows(v_ptr, stride_v, b, h, ALIGN)
    o = head_rows(o_ptr, stride_o, b, h, ALIGN)
    do = head_rows(do_ptr, stride_do, b, h, ALIGN)

    if pid_m < TILES_K:
        if dk_ptr is not None:
            dk = head_rows(dk_ptr, stride_dk, b, h, ALIGN)
            dv = head_rows(dv_ptr, stride_dv, b, h, ALIGN)
            offs_n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            _dk_dv(
                q, k, v, seed_ptr, o, do, m_ptr, log_l_ptr, dk, dv, offs_n, head * NQ, OFFSET,
                NQ, NK, SCALE, P, PARTS, ALIGN, PRECISION, ACC, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        if dq_ptr is not None:
            dq = head_rows(dq_ptr, stride_dq, b, h, ALIGN)
            offs_m = (pid_m - TILES_K) * BLOCK_M + tl.arange(0, BLOCK_M)
            _dq(
                q, k, v, seed_ptr, o, do, m_ptr, log_l_ptr, dq, offs_m, head * NQ, OFFSET,
                NQ, NK, SCALE, P, PARTS, ALIGN, PRECISION, ACC, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _dk_dv(
    q_rows, k_rows, v_rows, seed_ptr, o_rows, do_rows, m_ptr, log_l_ptr, dk_rows, dv_rows, offs_n, first_row, OFFSET,
    NQ: tl.constexpr, NK: tl.constexpr, SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_M keys, over all queries. P and dS are [keys, queries], the layout of the last two products.

    Rows beyond the last key may hold inf; they are not stored. Columns beyond the last query have P = 0.
    """
    mask_n = offs_n < NK
    k = load_parts(k_rows, offs_n, mask_n, PARTS, ALIGN)
    v = load_parts(v_rows, offs_n, mask_n, PARTS, ALIGN)

    dk = zero_parts(BLOCK_M, PARTS, ACC)
    dv = zero_parts(BLOCK_M, PARTS, ACC)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start_m in range(0, NQ, BLOCK_N):
        offs_m = start_m + tl.arange(0, BLOCK_N)
        mask_m = offs_m < NQ
        q = load_parts(q_rows, offs_m, mask_m, PARTS, ALIGN)
        do = load_parts(do_rows, offs_m, mask_m, PARTS, ALIGN)
        o = load_parts(o_rows, offs_m, mask_m, PARTS, ALIGN)
        m = tl.load(m_ptr + offs_m, mask=mask_m, other=0.0)
        log_l = tl.load(log_l_ptr + offs_m, mask=mask_m, other=0.0)
        delta = row_dot_parts(do, o, ACC)

        logits = attn_logits(k, q, mask_m[None, :], PRECISION, ACC)
        p = attn_probs(logits, m[None, :], log_l[None, :], SCALE)
        dp = dot_parts(v, do, PRECISION, ACC)
        kept = p
        if seed_ptr is not None:
            drop_scale = tile.dropout_scale(
                seed, OFFSET, (first_row + offs_m)[None, :], offs_n.to(tl.int32)[:, None], P
            ).to(ACC)
            kept *= drop_scale
            dp *= drop_scale
        ds = p * (dp - delta[None, :])
        dv = dot_into_parts(kept, do, dv, PRECISION)
        dk = dot_into_parts(ds, q, dk, PRECISION)

    store_parts(dk_rows, scale_parts(dk, SCALE), offs_n, mask_n, PARTS, ALIGN)
    store_parts(dv_rows, dv, offs_n, mask_n, PARTS, ALIGN)


@triton.jit
def _dq(
    q_rows, k_rows, v_rows, seed_ptr, o_rows, do_rows, m_ptr, log_l_ptr, dq_rows, offs_m, first_row, OFFSET,
    NQ: tl.constexpr, NK: tl.constexpr, SCALE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, over all keys."""
    mask_m = offs_m < NQ
    q = load_parts(q_rows, offs_m, mask_m, PARTS, ALIGN)
    do = load_parts(do_rows, offs_m, mask_m, PARTS, ALIGN)
    o = load_parts(o_rows, offs_m, mask_m, PARTS, ALIGN)
    m = tl.load(m_ptr + offs_m, mask=mask_m, other=0.0)
    log_l = tl.load(log_l_ptr + offs_m, mask=mask_m, other=0.0)
    delta = row_dot_parts(do, o, ACC)

    dq = zero_parts(BLOCK_M, PARTS, ACC)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start_n in range(0, NK, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < NK
        k = load_parts(k_rows, offs_n, mask_n, PARTS, ALIGN)
        v = load_parts(v_rows, offs_n, mask_n, PARTS, ALIGN)

        logits = attn_logits(q, k, mask_n[None, :], PRECISION, ACC)
        p = attn_probs(logits, m[:, None], log_l[:, None], SCALE)
        dp = dot_parts(do, v, PRECISION, ACC)
        if seed_ptr is not None:
            dp *= tile.dropout_scale(seed, OFFSET, (first_row + offs_m)[:, None], offs_n[None, :], P).to(ACC)
        ds = p * (dp - delta[:, None])
        dq = dot_into_parts(ds, k, dq, PRECISION)

    store_parts(dq_rows, scale_parts(dq, SCALE), offs_m, mask_m, PARTS, ALIGN)


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


def _align(*tensors: Tensor | None) -> int:
    """8 if every row starts at a multiple of 8 elements, so that a load can take 16 bytes; else 1."""
    return 8 if all(s % 8 == 0 for t in tensors if t is not None for s in t.stride()[:3]) else 1


def _strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()[:3]


def _unit_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, m: Tensor, log_l: Tensor,
    scale: float, seed: Tensor | None, dropout_p: float, offset: int,
) -> None:  # fmt: skip
    """Fills o, and m and log_l unless empty. q, o [B, NQ, H, E] and k, v [B, NK, H, E] with unit last stride."""
    B, NQ, HEADS, HEAD_DIM = q.shape
    config = configs.attention_fwd(runtime.arch(q.device), k.shape[1], HEAD_DIM, q.dtype, seed is not None)
    runtime.launch(
        _attention_fwd_kernel, B * HEADS * triton.cdiv(NQ, config.block_m),
        q_ptr=q, k_ptr=k, v_ptr=v, seed_ptr=seed, o_ptr=o,
        m_ptr=m if m.numel() else None, log_l_ptr=log_l if m.numel() else None,
        HEADS=HEADS, OFFSET=offset,
        stride_q=_strides(q), stride_k=_strides(k), stride_v=_strides(v), stride_o=_strides(o),
        NQ=NQ, NK=k.shape[1], SCALE=scale, P=dropout_p, PARTS=head_parts(HEAD_DIM), ALIGN=_align(q, k, v, o),
        PRECISION=runtime.precision(q.dtype), ACC=runtime.acc_type(q.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_bwd(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, m: Tensor, log_l: Tensor,
    dq: Tensor | None, dk: Tensor | None, dv: Tensor | None,
    scale: float, seed: Tensor | None, dropout_p: float, offset: int,
) -> None:  # fmt: skip
    """Fills dq unless None, and dk and dv unless None. All are [B, N, H, E] with unit last stride."""
    B, NQ, HEADS, HEAD_DIM = q.shape
    NK = k.shape[1]
    config = configs.attention_bwd(runtime.arch(q.device), max(NQ, NK), HEAD_DIM, q.dtype, seed is not None)
    tiles = sum(triton.cdiv(t.shape[1], config.block_m) for t in (dk, dq) if t is not None)
    runtime.launch(
        _attention_bwd_kernel, B * HEADS * tiles,
        q_ptr=q, k_ptr=k, v_ptr=v, seed_ptr=seed, o_ptr=o, do_ptr=do, m_ptr=m, log_l_ptr=log_l,
        dq_ptr=dq, dk_ptr=dk, dv_ptr=dv,
        HEADS=HEADS, OFFSET=offset,
        stride_q=_strides(q), stride_k=_strides(k), stride_v=_strides(v), stride_o=_strides(o), stride_do=_strides(do),
        stride_dq=_strides(dq), stride_dk=_strides(dk), stride_dv=_strides(dv),
        NQ=NQ, NK=NK, SCALE=scale, P=dropout_p, PARTS=head_parts(HEAD_DIM), ALIGN=_align(q, k, v, o, do, dq, dk, dv),
        PRECISION=runtime.precision(q.dtype), ACC=runtime.acc_type(q.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@torch.library.custom_op("vit::attention_fwd", mutates_args=())
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, save: bool,
    seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(o [B, NQ, H·E], m [B, H, NQ], log_l [B, H, NQ]); m and log_l are empty unless ``save``."""
    o, m, log_l = _attention_fwd_fake(q, k, v, scale, save)
    q, k, v = _unit_rows(q, k, v)
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
    q, k, v, do = _unit_rows(q, k, v, do.unflatten(-1, q.shape[2:]))
    _launch_bwd(
        q=q, k=k, v=v, o=o.view(q.shape), do=do, m=m, log_l=log_l,
        dq=dq if need_dq else None, dk=dk if need_dkv else None, dv=dv if need_dkv else None,
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
    q, k, v = _unit_rows(qkv)[0].unbind(dim=2)
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
    seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0,
) -> Tensor:  # fmt: skip
    """Packed dqkv [B, N, 3, H, E], contiguous: the kernel writes into it."""
    dqkv = qkv.new_empty(qkv.shape)
    qkv, do = _unit_rows(qkv, do.unflatten(-1, qkv.shape[3:]))
    (q, k, v), (dq, dk, dv) = qkv.unbind(dim=2), dqkv.unbind(dim=2)
    _launch_bwd(
        q=q, k=k, v=v, o=o.view(q.shape), do=do, m=m, log_l=log_l, dq=dq, dk=dk, dv=dv,
        scale=scale, seed=seed, dropout_p=dropout_p, offset=offset,
    )  # fmt: skip
    return dqkv


@attention_qkvpacked_bwd.register_fake
def _attention_qkvpacked_bwd_fake(do, qkv, o, m, log_l, scale, seed=None, dropout_p=0.0, offset=0):
    return qkv.new_empty(qkv.shape)


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
    dqkv = attention_qkvpacked_bwd(
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
    if not runtime.use_triton(op, impl, [qkv], _unsupported(qkv.shape[-1])):
        options = {"scale": scale, "return_lse": return_lse, "dropout_p": dropout_p, "seed": seed, "offset": offset}
        return reference.attention_qkvpacked(qkv, **options)
    save = return_lse or runtime.needs_grad(qkv)
    out, m, log_l = attention_qkvpacked_fwd(qkv, scale, save, seed, dropout_p, offset)
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
    if not runtime.use_triton(op, impl, [q, k, v], _unsupported(q.shape[-1])):
        options = {"scale": scale, "return_lse": return_lse, "dropout_p": dropout_p, "seed": seed, "offset": offset}
        return reference.attention(q, k, v, **options)
    save = return_lse or runtime.needs_grad(q, k, v)
    out, m, log_l = attention_fwd(q, k, v, scale, save, seed, dropout_p, offset)
    return (out, scale * m + log_l) if return_lse else out


def _unsupported(head_dim: int) -> str | None:
    if head_dim % 8 == 0 and MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return None
    return f"the kernels take head dimensions from {MIN_HEAD_DIM} to {MAX_HEAD_DIM} in steps of 8, not {head_dim}"
