"""The GEMM of `linear` once more, for Hopper: one tile is multiplied while another is in its epilogue.

The maths and the arguments are those of `linear.gemm`, which calls this kernel if `configs.Config.pingpong` says so. It
is off by default. The kernel is written in Gluon, the lower level of Triton, and Gluon has no interpreter: no test on a
CPU computes with what is compiled. The lock compiles the kernel. `tests/gluon_model.py` runs its source with a model of
asynchronous copies and barriers. The stage ``pingpong`` of `make gpu` compares it with the kernel of `linear`, and has
to pass before the kernel is turned on.

A program stays on its multiprocessor and takes every n-th tile of the result. Its warps have three roles. One warp
loads blocks of A and B into a ring of buffers. Two consumers of four warps each take turns with the tiles: each
multiplies what is in the ring, and then applies the epilogue while the other multiplies. One consumer walks all of K
for its tile, front to back, so every sum has one order.

The ring is first in, first out over the tiles. A consumer waits for its turn before it reads the ring: a barrier knows
only whether it is in an odd or an even phase, so who waits for one must not be two phases ahead of it.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import configs, runtime, tile

_grouped_tile, _gelu_and_grad = gluon.jit(tile.grouped_tile.fn), gluon.jit(tile.gelu_and_grad.fn)


@gluon.jit
def _load_tiles(
    a_desc, b_desc, a_ring, b_ring, full, empty,
    M, N, K, TRANS_B: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The warp that loads, for every step of every tile of this program, once a buffer of the ring is empty."""
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_M: gl.constexpr = a_ring.shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    BLOCK_N: gl.constexpr = b_ring.shape[1] if TRANS_B else b_ring.shape[2]
    tiles_m, tiles_n = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N)
    step = 0
    for t in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        pid_m, pid_n = _grouped_tile(t, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        for start_k in range(0, K, BLOCK_K):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(slot), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(a_desc, [start_m, start_k], full.index(slot), a_ring.index(slot))
            b_start = [start_n, start_k] if TRANS_B else [start_k, start_n]
            tma.async_copy_global_to_shared(b_desc, b_start, full.index(slot), b_ring.index(slot))
            step += 1


@gluon.jit
def _multiply_tiles(
    WHO: gl.constexpr,
    bias_ptr, preact_desc, out_desc, aux_desc, sum_ptr,
    a_ring, b_ring, full, empty, turn, pieces_smem, preact_bar,
    M, N, K, TRANS_B: gl.constexpr, ACTIVATION: gl.constexpr, GROUP_M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Consumer WHO, 0 or 1: the products of every other tile of this program, and their epilogue.

    The epilogue takes SPLIT pieces of columns one after another. Each piece has a buffer: h arrives in it, and out
    leaves from it. aux leaves from a second one.
    """
    STAGES: gl.constexpr = a_ring.shape[0]
    BLOCK_M: gl.constexpr = a_ring.shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    BLOCK_N: gl.constexpr = b_ring.shape[1] if TRANS_B else b_ring.shape[2]
    WIDTH: gl.constexpr = BLOCK_N // SPLIT
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PIECE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tiles_m, tiles_n, steps = gl.cdiv(M, BLOCK_M), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K)
    step = WHO * steps
    phase = 0  # changes with every tile
    for t in range(gl.program_id(0) + WHO * gl.num_programs(0), tiles_m * tiles_n, 2 * gl.num_programs(0)):
        pid_m, pid_n = _grouped_tile(t, tiles_m, tiles_n, GROUP_M)
        start_m, start_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        if preact_desc is not None:
            tma.store_wait(0)  # what leaves from the buffers of the tile before
            mbarrier.expect(preact_bar.index(WHO), SPLIT * preact_desc.block_type.nbytes)
            for i in gl.static_range(SPLIT):
                piece = pieces_smem.index(WHO * SPLIT + i)
                tma.async_copy_global_to_shared(
                    preact_desc, [start_m, start_n + i * WIDTH], preact_bar.index(WHO), piece
                )

        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, TILE)
        # Consumer 0 begins: who waits for the odd phase of a new barrier goes on at once.
        mbarrier.wait(turn.index(WHO), phase if WHO == 1 else phase ^ 1)
        for k in range(steps):
            slot = step % STAGES
            mbarrier.wait(full.index(slot), step // STAGES & 1)
            b = b_ring.index(slot).permute((1, 0)) if TRANS_B else b_ring.index(slot)
            acc = warpgroup_mma(a_ring.index(slot), b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the product before this one is done: its buffers are empty
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        mbarrier.arrive(turn.index(1 - WHO))
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES))
        step += steps  # of the other consumer's tile

        pieces = _halves(acc)
        if SPLIT == 4:
            pieces = _halves(pieces[0]) + _halves(pieces[1])
        if preact_desc is None:
            tma.store_wait(0)
        else:
            mbarrier.wait(preact_bar.index(WHO), phase)
        phase ^= 1
        for i in gl.static_range(SPLIT):
            x = gl.convert_layout(pieces[i], PIECE)
            piece = pieces_smem.index(WHO * SPLIT + i)
            start = start_n + i * WIDTH
            offs_n = start + gl.arange(0, WIDTH, gl.SliceLayout(0, PIECE))
            if bias_ptr is not None:
                x += gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)[None, :]
            aux = x
            if preact_desc is not None:
                aux, factor = _gelu_and_grad(piece.load(PIECE).to(gl.float32), ACTIVATION, True)
                x *= factor
            elif ACTIVATION is not None:
                x, _ = _gelu_and_grad(x, ACTIVATION, True)
            if sum_ptr is not None:  # rows beyond M are zero, because their operands read zeros
                gl.store(sum_ptr + pid_m.to(gl.int64) * N + offs_n, gl.sum(x, axis=0), mask=offs_n < N)
            if aux_desc is not None:
                second = pieces_smem.index((2 + WHO) * SPLIT + i)
                second.store(aux.to(aux_desc.dtype))
            piece.store(x.to(out_desc.dtype))
            fence_async_shared()
            if aux_desc is not None:
                tma.async_copy_shared_to_global(aux_desc, [start_m, start], second)
            tma.async_copy_shared_to_global(out_desc, [start_m, start], piece)
    tma.store_wait(0)


@gluon.jit
def _halves(x):
    """The left and the right half of the columns."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit(do_not_specialize=["M", "K"])
def _gemm_pingpong_kernel(
    a_desc, b_desc, bias_ptr, preact_desc, out_desc, aux_desc, sum_ptr,
    M, N, K,
    TRANS_B: gl.constexpr, ACTIVATION: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    # Triton unpacks with a star in calls alone, and not in [STAGES, *shape].
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_shape, a_desc.layout)  # noqa: RUF005
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)  # noqa: RUF005
    BUFFERS: gl.constexpr = (2 if aux_desc is None else 4) * SPLIT
    pieces_smem = gl.allocate_shared_memory(out_desc.dtype, [BUFFERS] + out_desc.block_shape, out_desc.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    preact_bar = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
        mbarrier.init(preact_bar.index(i), count=1)
    gl.warp_specialize(
        [
            (_multiply_tiles, (
                0, bias_ptr, preact_desc, out_desc, aux_desc, sum_ptr,
                a_ring, b_ring, full, empty, turn, pieces_smem, preact_bar,
                M, N, K, TRANS_B, ACTIVATION, GROUP_M, SPLIT,
            )),
            (_multiply_tiles, (
                1, bias_ptr, preact_desc, out_desc, aux_desc, sum_ptr,
                a_ring, b_ring, full, empty, turn, pieces_smem, preact_bar,
                M, N, K, TRANS_B, ACTIVATION, GROUP_M, SPLIT,
            )),
            (_load_tiles, (a_desc, b_desc, a_ring, b_ring, full, empty, M, N, K, TRANS_B, GROUP_M)),
        ],
        [4, 1],  # warps of the second and third
        [232, 40],  # and their registers
    )  # fmt: skip


def takes(arch: int, out: Tensor, preact: Tensor | None) -> bool:
    """Whether the kernel can write out: on Hopper, in 16 bits, where a descriptor can describe out and preact."""
    aligned = out.shape[1] % 8 == 0 and (preact is None or preact.data_ptr() % 16 == 0)
    return arch == 90 and out.dtype in runtime.HALF and aligned


def launch(
    a: Tensor, b: Tensor, bias: Tensor | None, activation: str | None, preact: Tensor | None,
    out: Tensor, aux: Tensor | None, partial: Tensor | None,
    *, trans_b: bool, config: configs.Config,
) -> None:  # fmt: skip
    """Writes out [M, N], aux [M, N] and the partial sums [rows of tiles, N] of `linear.gemm`.

    a is [M, K], b [K, N] or with ``trans_b`` [N, K], as a descriptor takes them.
    """
    ring = configs.gemm_pingpong(aux is not None, preact is not None)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    (M, K), N = a.shape, out.shape[1]
    element = gl.bfloat16 if out.dtype is torch.bfloat16 else gl.float16

    def describe(x: Tensor | None, *block: int) -> TensorDescriptor | None:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), element)
        return None if x is None else TensorDescriptor.from_tensor(x, list(block), layout)

    tiles, piece = triton.cdiv(M, block_m) * triton.cdiv(N, block_n), (block_m, block_n // ring.split)
    runtime.launch(
        _gemm_pingpong_kernel, min(runtime.num_sms(out.device), tiles),
        a_desc=describe(a, block_m, block_k),
        b_desc=describe(b, block_n, block_k) if trans_b else describe(b, block_k, block_n),
        bias_ptr=bias, preact_desc=describe(preact, *piece),
        out_desc=describe(out, *piece), aux_desc=describe(aux, *piece), sum_ptr=partial,
        M=M, N=N, K=K,
        TRANS_B=trans_b, ACTIVATION=activation, STAGES=ring.num_stages, GROUP_M=config.group_m, SPLIT=ring.split,
        num_warps=4, num_stages=1,
    )  # fmt: skip
