"""The last step of every sum over rows: adds the partial sums that the programs of a backward wrote.

    out_i [D_i] = Σ_m partials_i [m, D_i]  for up to five sums in one launch, each rounded once to the dtype of its out

A program owns BLOCK_D columns of one sum. It adds their rows BLOCK_M at a time in order, and then the rows of its tile.
There are no atomics, so the result has the same bits every time. The sums accumulate in fp32 (fp64 for fp64 partials,
interpreted only). How many partials there are depends on the batch, and is not specialised.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import configs, runtime

_MAX_SUMS = 5


@triton.jit(do_not_specialize=["M0", "M1", "M2", "M3", "M4"])
def _partial_sums_kernel(
    p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr,
    M0, M1, M2, M3, M4, D0, D1, D2, D3, D4,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_d = tl.program_id(0).to(tl.int64)
    tile_d = _sum_columns(p0_ptr, out0_ptr, M0, D0, tile_d, ACC, BLOCK_M, BLOCK_D)
    tile_d = _sum_columns(p1_ptr, out1_ptr, M1, D1, tile_d, ACC, BLOCK_M, BLOCK_D)
    tile_d = _sum_columns(p2_ptr, out2_ptr, M2, D2, tile_d, ACC, BLOCK_M, BLOCK_D)
    tile_d = _sum_columns(p3_ptr, out3_ptr, M3, D3, tile_d, ACC, BLOCK_M, BLOCK_D)
    _sum_columns(p4_ptr, out4_ptr, M4, D4, tile_d, ACC, BLOCK_M, BLOCK_D)


@triton.jit
def _sum_columns(p_ptr, out_ptr, M, D, tile_d, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds the rows of column tile tile_d if this sum has it. Returns the tile's number from the next sum on."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    if p_ptr is not None:  # noqa: SIM102 (known to the compiler, which has no code for absent sums)
        if (tile_d >= 0) & (tile_d < tiles_d):
            offs_d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
            for start_m in range(0, M, BLOCK_M):
                offs_m = start_m + tl.arange(0, BLOCK_M)
                offs = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
                acc += tl.load(p_ptr + offs, mask=(offs_m < M)[:, None] & mask_d[None, :], other=0.0).to(ACC)
            tl.store(out_ptr + offs_d, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask_d)
    return tile_d - tiles_d


def sum_partials(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes the sum over the first dimension of each ``partials`` to its ``out``, for pairs (partials, out).

    All are contiguous. Partials of one call share their dtype. Without rows the sum is zero.
    """
    for start in range(0, len(sums), _MAX_SUMS):
        _launch(sums[start : start + _MAX_SUMS])


def _launch(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    config = configs.partial_sums(runtime.arch(sums[0][0].device))
    absent = [(None, None)] * (_MAX_SUMS - len(sums))
    rows = [p.shape[0] for p, _ in sums] + [0] * len(absent)
    widths = [out.numel() for _, out in sums] + [0] * len(absent)
    tensors = [*sums, *absent]
    runtime.launch(
        _partial_sums_kernel, sum(triton.cdiv(width, config.block_n) for width in widths),
        **{f"p{i}_ptr": p for i, (p, _) in enumerate(tensors)},
        **{f"out{i}_ptr": out for i, (_, out) in enumerate(tensors)},
        **{f"M{i}": m for i, m in enumerate(rows)}, **{f"D{i}": d for i, d in enumerate(widths)},
        ACC=runtime.acc_type(sums[0][0].dtype), BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
