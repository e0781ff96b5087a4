"""Statistics of attention probabilities, without their matrix: where each query looks, and how sharply.

For a query i and keys j, with s = q kᵀ, and m = max s and log l as the forward of `attention` saves them:
    u = scale · (s − m),  P = exp u,  T = Σ P,  p = P / T
    distance = Σ_patches p · |place_i − place_j|,  patch_mass = Σ_patches p,  prefix_mass = Σ_prefix p,
    entropy = −Σ p · log p = log T − Σ p · u,  max_logit = scale · m
and of a key j: received = mean over i of P / l.
Both terms of the entropy are positive, because u is negative, so nothing cancels. With logits instead of u, large ones
would cost the digits that matter (3e-5 in fp32). T is the l of the forward. It is summed again, because dividing by it
is more exact than subtracting log l, whose rounding is up to 2.4e-7 and would be in all p of a query: the error of fp32
is then that of dense PyTorch, else up to four times that. Only ``received`` has no T, and takes log l.

A program owns a tile of queries and walks the keys once. With ``received`` the launch has programs of a second role,
which own a tile of keys and walk the queries. Every sum has one fixed order, without atomics.

Tokens are prefix tokens and then the patches of a grid, row by row. A place is computed from the index of its token:
row = ⌊(index + ½) / GRID_W⌋, column = index − row · GRID_W, in fp32. The half keeps the quotient away from whole
numbers. Its errors (2⁻²² of the compiled division, 2⁻²⁴ of the product) cannot cross one below `MAX_PATCHES` patches.
Distances are summed in heights of a patch: √(Δrow² + (ASPECT · Δcolumn)²), with ASPECT = width / height.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference, runtime
from .attention import align, attention_fwd, head_parts, strides, unit_rows, unsupported_head_dim
from .attention_tile import (
    LOG2_E,
    dot_parts,
    exp_scaled,
    head_rows,
    load_parts,
    load_stats,
    loop_end,
    skip_rows,
)
from .autocast import autocasts
from .checks import check_floating, check_heads, check_scale, check_tensors
from .reference import AttentionStatistics

TILE_BYTES = 2**22  # of one tile of logits in plain PyTorch
MAX_PATCHES = 2**20


@triton.jit(do_not_specialize=["N", "PREFIX", "GRID_W"])
def _attention_statistics_kernel(
    q_ptr, k_ptr, m_ptr, log_l_ptr,
    distance_ptr, patch_mass_ptr, prefix_mass_ptr, entropy_ptr, max_logit_ptr, received_ptr,
    N, HEADS, PREFIX, GRID_W,
    stride_q, stride_k,  # each (batch, token, head)
    SCALE: tl.constexpr, PATCH_H: tl.constexpr, ASPECT: tl.constexpr,
    PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(N, BLOCK_M)
    roles = 1 if received_ptr is None else 2
    head, pid_m = pid // (roles * tiles), (pid % (roles * tiles)).to(tl.int32)
    b, h = head // HEADS, head % HEADS
    q_rows, k_rows = head_rows(q_ptr, stride_q, b, h, ALIGN), head_rows(k_ptr, stride_k, b, h, ALIGN)

    if pid_m < tiles:
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        rows, mask_m = head * N + offs_m, offs_m < N
        m = tl.load(m_ptr + rows, mask=mask_m, other=0.0)
        distance, patch_mass, prefix_mass, entropy = _of_queries(
            q_rows, k_rows, m, offs_m, N, PREFIX, GRID_W,
            SCALE, ASPECT, PARTS, ALIGN, PRECISION, ACC, BLOCK_M, BLOCK_N, WALK,
        )  # fmt: skip
        tl.store(distance_ptr + rows, distance * PATCH_H, mask=mask_m)
        tl.store(patch_mass_ptr + rows, patch_mass, mask=mask_m)
        tl.store(prefix_mass_ptr + rows, prefix_mass, mask=mask_m)
        tl.store(entropy_ptr + rows, entropy, mask=mask_m)
        tl.store(max_logit_ptr + rows, m * SCALE, mask=mask_m)
    else:
        if received_ptr is not None:
            offs_n = (pid_m - tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            stats = m_ptr + head * N, log_l_ptr + head * N
            received = _of_keys(
                k_rows, q_rows, stats, offs_n, N, SCALE, PARTS, ALIGN, PRECISION, ACC, BLOCK_M, BLOCK_N, WALK
            )
            tl.store(received_ptr + head * N + offs_n, received / N, mask=offs_n < N)


@triton.jit
def _of_queries(
    q_rows, k_rows, m, offs_m, N, PREFIX, GRID_W,
    SCALE: tl.constexpr, ASPECT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Distance in heights of a patch, patch mass, prefix mass and entropy of the queries offs_m, over all keys."""
    q = load_parts(q_rows, offs_m, N, PARTS, ALIGN)
    place = _places(offs_m - PREFIX, GRID_W, ASPECT, ACC)
    zero = tl.full([BLOCK_M], 0.0, dtype=ACC)
    state = zero, zero, zero, zero
    k_rows = (k_rows,)
    end = loop_end(N, BLOCK_N, WALK)
    for start_n in range(0, end, BLOCK_N):
        left = N - start_n if WALK[0] == "masked" else None
        state = _of_queries_step(
            state, q, m, place, k_rows[0], start_n, left, PREFIX, GRID_W,
            SCALE, ASPECT, PARTS, ALIGN, PRECISION, ACC, BLOCK_N,
        )  # fmt: skip
        k_rows = skip_rows(k_rows, BLOCK_N, ALIGN)
    if WALK[1]:
        state = _of_queries_step(
            state, q, m, place, k_rows[0], end, N - end, PREFIX, GRID_W,
            SCALE, ASPECT, PARTS, ALIGN, PRECISION, ACC, WALK[1],
        )  # fmt: skip

    distance, patch_mass, prefix_mass, log2_sum = state
    total = patch_mass + prefix_mass
    distance = tl.where(offs_m < PREFIX, 0.0, _ratio(distance, total, ACC))
    entropy = tl.log(total) - _ratio(log2_sum, total, ACC) * (1.0 / LOG2_E)
    entropy = tl.where(entropy < 0.0, 0.0, entropy)  # of one key: rounding errors of m
    return distance, _ratio(patch_mass, total, ACC), _ratio(prefix_mass, total, ACC), entropy


@triton.jit
def _of_queries_step(
    state, q, m, place, k_rows, start_n, left, PREFIX, GRID_W,
    SCALE: tl.constexpr, ASPECT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of P · distance, P of patches, P of prefix tokens and P · log₂ P, after WIDTH keys more.

    Of these the first ``left`` exist (None: all).
    """
    distance, patch_mass, prefix_mass, log2_sum = state
    offs_n = tl.arange(0, WIDTH)
    k = load_parts(k_rows, offs_n, left, PARTS, ALIGN)

    log2_p = (dot_parts(q, k, PRECISION, ACC) - m[:, None]) * (SCALE * LOG2_E)
    p = tl.exp2(log2_p)  # [BLOCK_M, WIDTH]
    if left is not None:
        p = tl.where((offs_n < left)[None, :], p, 0.0)
    index = start_n + offs_n - PREFIX
    row, column = _places(index, GRID_W, ASPECT, ACC)
    d_row, d_column = place[0][:, None] - row[None, :], place[1][:, None] - column[None, :]
    of_patches = tl.where((index >= 0)[None, :], p, 0.0)
    distance += tl.sum(of_patches * tl.sqrt(d_row * d_row + d_column * d_column), axis=1)
    patch_mass += tl.sum(of_patches, axis=1)
    prefix_mass += tl.sum(p - of_patches, axis=1)
    log2_sum += tl.sum(p * log2_p, axis=1)
    return distance, patch_mass, prefix_mass, log2_sum


@triton.jit
def _ratio(x, y, ACC: tl.constexpr):
    """x / y, rounded once; the compiled ``/`` of fp32 is wrong by up to two units in the last place."""
    if ACC.primitive_bitwidth > 32:
        return x / y
    return tl.div_rn(x, y)


@triton.jit
def _places(index, GRID_W, ASPECT: tl.constexpr, ACC: tl.constexpr):
    """Row and ASPECT · column of each patch."""
    x = index.to(ACC)
    row = tl.floor((x + 0.5) * (1.0 / GRID_W))
    return row, (x - row * GRID_W) * ASPECT


@triton.jit
def _of_keys(
    k_rows, q_rows, stat_ptrs, offs_n, N,
    SCALE: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """Σ P / l of the keys offs_n, over all queries."""
    k = load_parts(k_rows, offs_n, N, PARTS, ALIGN)
    total = tl.full([BLOCK_M], 0.0, dtype=ACC)
    q_rows = (q_rows,)
    end = loop_end(N, BLOCK_N, WALK)
    for start_m in range(0, end, BLOCK_N):
        left = N - start_m if WALK[0] == "masked" else None
        total += _of_keys_step(k, q_rows[0], stat_ptrs, start_m, left, SCALE, PARTS, ALIGN, PRECISION, ACC, BLOCK_N)
        q_rows = skip_rows(q_rows, BLOCK_N, ALIGN)
    if WALK[1]:
        total += _of_keys_step(k, q_rows[0], stat_ptrs, end, N - end, SCALE, PARTS, ALIGN, PRECISION, ACC, WALK[1])
    return total


@triton.jit
def _of_keys_step(
    k, q_rows, stat_ptrs, start_m, left,
    SCALE: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Σ P / l over WIDTH queries, of which the first ``left`` exist (None: all)."""
    offs_m = tl.arange(0, WIDTH)
    q = load_parts(q_rows, offs_m, left, PARTS, ALIGN)
    m, log_l = load_stats(stat_ptrs, start_m, offs_m, left, 0)

    logits = dot_parts(k, q, PRECISION, ACC)  # [BLOCK_M, WIDTH]
    p = exp_scaled(logits, m, SCALE, k[0].dtype.primitive_bitwidth > 16) * tl.exp(-log_l)
    if left is not None:
        p = tl.where((offs_m < left)[None, :], p, 0.0)
    return tl.sum(p, axis=1)


@torch.library.custom_op("vit::attention_statistics", mutates_args=())
def attention_statistics_fwd(
    q: Tensor, k: Tensor, m: Tensor, log_l: Tensor,
    grid_width: int, num_prefix_tokens: int, patch_height: float, patch_width: float, scale: float, received: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `AttentionStatistics`, [B, H, N]; the last one is empty unless ``received``."""
    (B, N, HEADS, HEAD_DIM) = q.shape
    *found, mass = _attention_statistics_fake(q, k, m, log_l, 0, 0, 0.0, 0.0, scale, received)
    distance, patch_mass, prefix_mass, entropy, max_logit = found
    q, k = unit_rows(q, k)
    config = configs.attention_statistics(runtime.arch(q.device), HEAD_DIM, q.dtype)
    runtime.launch(
        _attention_statistics_kernel, B * HEADS * triton.cdiv(N, config.block_m) * (2 if received else 1),
        q_ptr=q, k_ptr=k, m_ptr=m.contiguous(), log_l_ptr=log_l.contiguous(),
        distance_ptr=distance, patch_mass_ptr=patch_mass, prefix_mass_ptr=prefix_mass, entropy_ptr=entropy,
        max_logit_ptr=max_logit, received_ptr=mass if received else None,
        N=N, HEADS=HEADS, PREFIX=num_prefix_tokens, GRID_W=max(grid_width, 1),
        stride_q=strides(q), stride_k=strides(k),
        SCALE=scale, PATCH_H=patch_height, ASPECT=patch_width / patch_height,
        PARTS=head_parts(HEAD_DIM), ALIGN=align(q, k),
        PRECISION=runtime.precision(q.dtype), ACC=runtime.acc_type(q.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, WALK=configs.walk(N, config),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return distance, patch_mass, prefix_mass, entropy, max_logit, mass


@attention_statistics_fwd.register_fake
def _attention_statistics_fake(
    q, k, m, log_l, grid_width, num_prefix_tokens, patch_height, patch_width, scale, received
):  # fmt: skip
    B, N, HEADS, _ = q.shape
    return *(m.new_empty(B, HEADS, N) for _ in range(5)), m.new_empty((B, HEADS, N) if received else 0)


@torch.no_grad()
@autocasts()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    *,
    grid_size: tuple[int, int],
    num_prefix_tokens: int = 0,
    patch_size: tuple[float, float] = (1.0, 1.0),
    scale: float | None = None,
    received: bool = False,
    saved: tuple[Tensor, Tensor] | None = None,
    impl: str = "auto",
) -> AttentionStatistics:
    """Statistics of softmax(scale · q kᵀ) per head; no gradient.

    The tokens are ``num_prefix_tokens`` prefix tokens (class token, registers) and then the patches of the grid, row by
    row.

    Args:
        q: [B, N, H, E], any strides, read in place unless the last stride is not 1; fp32, fp16 or bf16. The kernel
            takes E from 16 to 128 in steps of 8.
        k: [B, N, H, E], likewise, in the dtype of ``q``.
        grid_size: (rows, columns) of patches.
        num_prefix_tokens: tokens before the patches. N is their number plus the patches.
        patch_size: (height, width) of a patch: the unit of the distances. (1, 1) counts patches.
        scale: of the logits, positive; 1/sqrt(E) if None, as in `attention`.
        received: also return what each key receives.
        saved: m and log l [B, H, N] of the same q and k, as `vit::attention_fwd` saves them; computed if None.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        `AttentionStatistics` of [B, H, N] tensors, fp32, or fp64 for fp64 inputs; ``received`` is None if not
        asked for.

    Raises:
        ValueError: shapes that do not fit, numbers out of range, unknown impl. TypeError: types that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "attention_statistics"
    check_floating(op, q=q, k=k)
    check_heads(op, q, k=k)
    tokens = _check_tokens(op, grid_size, num_prefix_tokens)
    if not q.shape[1] == k.shape[1] == tokens:
        raise ValueError(
            f"{op}: {num_prefix_tokens} prefix tokens and {grid_size[0]} x {grid_size[1]} patches are {tokens} tokens, "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    height, width = _check_patch_size(op, patch_size)
    scale = check_scale(op, scale, q.shape[-1])
    if saved is not None:
        _check_saved(op, saved, q)
    unsupported = unsupported_head_dim(q.shape[-1]) or _too_many(grid_size)
    if not runtime.use_triton(op, impl, [q, k, *(saved or ())], unsupported):
        options = {"grid_size": grid_size, "num_prefix_tokens": num_prefix_tokens, "patch_size": (height, width)}
        return _in_tiles(q, k, received, {**options, "scale": scale})
    m, log_l = attention_fwd(q, k, k, scale, True)[1:] if saved is None else saved
    *found, mass = attention_statistics_fwd(
        q, k, m, log_l, grid_size[1], num_prefix_tokens, height, width, scale, received
    )
    return AttentionStatistics(*found, mass if received else None)


def _in_tiles(q: Tensor, k: Tensor, received: bool, options: dict) -> AttentionStatistics:
    """The reference, for a few queries of one image at a time."""
    B, N, HEADS, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    step = max(1, TILE_BYTES // (HEADS * N * wide.itemsize)) if N and HEADS else 1
    found = [q.new_empty(B, HEADS, N, dtype=wide) for _ in range(5)]
    mass = q.new_zeros(B, HEADS, N, dtype=wide) if received else None
    for b in range(B):
        for start in range(0, N, step):
            tile = q[b : b + 1, start : start + step]
            part = reference.attention_statistics(tile, k[b : b + 1], received=received, first_query=start, **options)
            for whole, some in zip(found, part, strict=False):
                whole[b, :, start : start + step] = some[0]
            if mass is not None:
                mass[b] += part.received[0] * (tile.shape[1] / N)
    return AttentionStatistics(*found, mass)


def _is_count(n: object) -> bool:
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) and n >= 0


def _check_tokens(op: str, grid_size: tuple[int, int], num_prefix_tokens: int) -> int:
    """How many tokens there are. Raises ValueError unless the arguments are numbers of tokens."""
    if not (isinstance(grid_size, (tuple, list)) and len(grid_size) == 2 and all(map(_is_count, grid_size))):
        raise ValueError(f"{op}: grid_size must be (rows, columns), two non-negative integers, got {grid_size!r}")
    if not _is_count(num_prefix_tokens):
        raise ValueError(f"{op}: num_prefix_tokens must be a non-negative integer, got {num_prefix_tokens!r}")
    return num_prefix_tokens + grid_size[0] * grid_size[1]


def _check_patch_size(op: str, patch_size: tuple[float, float]) -> tuple[float, float]:
    """Both as floats. Raises ValueError unless they are positive and finite."""
    pair = isinstance(patch_size, (tuple, list)) and len(patch_size) == 2
    if not (pair and all(isinstance(n, (int, float)) and 0.0 < n < math.inf for n in patch_size)):
        raise ValueError(
            f"{op}: patch_size must be (height, width), two positive and finite numbers, got {patch_size!r}"
        )
    return float(patch_size[0]), float(patch_size[1])


def _check_saved(op: str, saved: tuple[Tensor, Tensor], q: Tensor) -> None:
    """Raises unless saved is a pair [B, H, N] of the accumulator's type."""
    if not (isinstance(saved, (tuple, list)) and len(saved) == 2):
        raise TypeError(f"{op}: saved must be the pair (m, log l), got {type(saved).__name__}")
    (B, N, HEADS, _), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    for name, t in zip(("m", "log l"), saved, strict=True):
        check_tensors(op, **{f"saved {name}": t})
        if t is None or t.dtype is not wide:
            raise TypeError(f"{op}: saved {name} must be {wide} for q of {q.dtype}, got {getattr(t, 'dtype', t)}")
        if t.shape != (B, HEADS, N):
            raise ValueError(
                f"{op}: saved {name} must have shape [B, H, N] = {(B, HEADS, N)} of q {tuple(q.shape)}, "
                f"got {tuple(t.shape)}"
            )


def _too_many(grid_size: tuple[int, int]) -> str | None:
    patches = grid_size[0] * grid_size[1]
    return None if patches < MAX_PATCHES else f"the kernel takes fewer than {MAX_PATCHES:,} patches, not {patches:,}"
