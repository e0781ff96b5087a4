"""Pinned launch configurations: pure functions of architecture, shape class and dtype. Nothing tunes at run time.

``arch`` is 0 when the kernels are interpreted. Tiles are small then, so that small test shapes have several tiles and
ragged edges. The other values compile without spills on every architecture of the lock file (``tests/lock``). A
measurement under ``benchmarks/results/`` may replace them.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes (0 if unused), warps per program and pipeline depth. The fields after these are for one op alone.

    split, of `gemm`: into how many pieces the epilogue splits the columns of a tile: 1, 2 or 4.
    warp_specialize, of `gemm`: some warps load and the others multiply, where the compiler can do so.
    pingpong, of `gemm`: `gemm_pingpong` has the products that it can have, with this tile.
    tail, of attention: what is left after the whole tiles is a narrower tile with code of its own. Whole tiles then
        need no mask, but the program needs the registers of both.
    cheap, of `gemm`: GELU uses an approximation of erf. None: only for results of 16 bits.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0
    num_warps: int = 4
    num_stages: int = 1
    split: int = 2
    warp_specialize: bool = False
    pingpong: bool = False
    tail: bool = True
    cheap: bool | None = None


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def layer_norm(arch: int, width: int, backward: bool = False, crowded: bool = False) -> Config:
    """Rows of ``width`` elements held whole in registers, about 4,096 elements a program.

    A thread of the backward has at most 8 columns up to a width of 4,096, because it keeps parameters and sums of each.
    ``crowded`` halves the rows, for a backward that needs more registers an element.
    """
    block_d = max(next_power_of_2(width), 16)
    num_warps = min(max(block_d // (256 if backward else 512), 4), 16)
    return Config(
        block_m=2 if arch == 0 else max(1, (2048 if crowded else 4096) // block_d), block_n=block_d, num_warps=num_warps
    )


def partial_sums(arch: int) -> Config:
    """Tiles of the sum of partial sums: few columns a program, because there are few columns and many rows."""
    return Config(block_m=4, block_n=256) if arch == 0 else Config(block_m=128, block_n=32)


def elementwise(arch: int, width: int) -> Config:
    """Tiles of a pass that only reads and writes."""
    if arch == 0:
        return Config(block_m=4, block_n=32)
    block_n = min(max(next_power_of_2(width), 16), 1024)
    return Config(block_m=max(1, 2048 // block_n), block_n=block_n)


def gemm_provider(impl: str) -> str:
    """Which library runs a plain product, with or without bias, of an op called with ``impl``: "triton" or "cublas".

    Products with GELU or its derivative always run in our kernel, which saves a pass over the widest activation.
    """
    return "triton" if impl == "triton" else "cublas"


def has_tma(arch: int) -> bool:
    """Whether the hardware reads through tensor descriptors, so that the host makes them.

    On older GPUs the compiler turns a descriptor into plain loads.
    """
    return arch == 0 or arch >= 90


def gemm(arch: int, dtype: torch.dtype, precision: str, drops: bool = False) -> Config:
    """Tile of the GEMM, whatever its epilogue.

    With ``drops``, dropout follows GELU: smaller pieces leave registers for a second program.
    """
    if arch == 0:
        return Config(block_m=32, block_n=64, block_k=32, group_m=2)
    if dtype is torch.float32 and precision == "ieee":  # no tensor cores: each thread multiplies for its own elements
        return Config(block_m=128, block_n=64, block_k=16, group_m=8, num_warps=8, num_stages=3)
    if dtype is torch.float32:
        return Config(block_m=128, block_n=128, block_k=32, group_m=8, num_warps=8, num_stages=3)
    split = 4 if drops else 2
    if arch < 90:
        return Config(block_m=128, block_n=128, block_k=32, group_m=8, num_warps=8, num_stages=4, split=split)
    pingpong = False  # True only after `make gpu STAGE=pingpong` has passed and `make tune OP=gemm` prefers it
    return Config(
        block_m=128, block_n=128, block_k=64, group_m=8, num_warps=8, num_stages=3, split=split, pingpong=pingpong
    )


def gemm_pingpong(aux: bool, preact: bool) -> Config:
    """Depth of the ring and pieces of the epilogue of `gemm_pingpong`: what fits beside a tile of 128 x 128."""
    if not aux:
        return Config(num_stages=4, split=2)
    return Config(num_stages=3, split=4 if preact else 2)


def walk(n: int, config: Config) -> tuple[str, int]:
    """How a program walks n rows, block_n at a time: what its loop does, and the width of the last tile after it.

    "whole": the loop walks whole tiles. "none": no tile is whole, there is no loop. "masked": it walks all tiles.
    """
    if not config.tail:
        return "masked" if n else "none", 0
    left = n % config.block_n
    return "whole" if n >= config.block_n else "none", max(next_power_of_2(left), 16) if left else 0


def attention_fwd(arch: int, n: int, head_dim: int, dtype: torch.dtype, dropout: bool = False) -> Config:
    """Tile of block_m queries against block_n keys at a time; n is the number of keys."""
    if arch == 0:
        return Config(block_m=32, block_n=32)
    if dtype is torch.float32:
        return Config(block_m=32, block_n=16, num_warps=4 if dropout else 8, num_stages=2, tail=False)
    if arch < 90 and head_dim > (96 if dropout else 112):  # accumulators in registers, and none to spare for a tail
        return Config(block_m=64, block_n=32, num_stages=2, tail=False)
    if arch >= 100 and head_dim > 48:  # with 32 columns ptxas aims at 80 registers here, and spills
        return Config(block_m=64, block_n=64, num_stages=2)
    return Config(block_m=64, block_n=32, num_stages=3)  # few registers: four or five programs an SM of sm_90


def attention_bwd(arch: int, n: int, head_dim: int, dtype: torch.dtype, dropout: bool = False) -> Config:
    """A program owns block_m keys (or queries) and walks the queries (or keys) block_n at a time; n is the longer.

    ``dropout`` draws random numbers for the whole tile, which takes registers.
    """
    if arch == 0:
        return Config(block_m=32, block_n=32)
    if dtype is torch.float32:
        blocks = (32, 32) if head_dim > 112 else (64, 16) if arch >= 90 and not dropout else (32, 16)
        return Config(*blocks, num_warps=8, num_stages=2, tail=False)
    if dropout or (arch < 90 and head_dim > 80):
        few = dropout and arch < 90 and head_dim > 96  # else it spills
        return Config(block_m=32 if few else 64, block_n=16, num_stages=2, tail=False)
    if arch >= 100:
        return Config(block_m=64, block_n=32, num_stages=3 if head_dim <= 80 else 2)
    return Config(block_m=64, block_n=32, num_stages=3, tail=head_dim <= 112)


def attention_statistics(arch: int, head_dim: int, dtype: torch.dtype) -> Config:
    """A program owns block_m queries (or keys) and walks the keys (or queries) block_n at a time."""
    if arch == 0:
        return Config(block_m=32, block_n=32)
    if dtype is torch.float32:
        tall = arch >= 100 and 80 < head_dim <= 96  # with 32 rows ptxas aims at 64 registers here, and spills
        return Config(block_m=64 if tall else 32, block_n=16, num_warps=8, num_stages=2, tail=False)
    if arch >= 100 and head_dim > 48:  # with three stages ptxas aims at 96 registers for 56 of head_dim, and spills
        return Config(block_m=64, block_n=32, num_stages=2)
    return Config(block_m=64, block_n=32, num_stages=3, tail=arch >= 90)  # else the queries take registers, too


def patch_embed(arch: int, role: str, dtype: torch.dtype, precision: str) -> Config:
    """Tile of an implicit GEMM: block_m patches, block_n channels, block_k pixels of a patch.

    ``role`` says which of the three is summed over: "fwd" pixels, "dw" patches, "dimage" channels. block_k stays small:
    without wide loads each pixel has an address of its own in registers.
    """
    if arch == 0:
        tiles = {"fwd": (32, 64, 32, 8), "dw": (32, 64, 32, 8), "dimage": (32, 32, 32, 8)}
    elif dtype is torch.float32 and precision == "ieee":
        tiles = {"fwd": (64, 64, 32, 8, 4, 3), "dw": (32, 64, 32, 8, 8, 3), "dimage": (64, 32, 32, 8, 4, 3)}
    elif dtype is torch.float32:
        rows = 64 if arch >= 90 else 32
        tiles = {"fwd": (128, 64, 32, 8, 8, 3), "dw": (rows, 128, 64, 8, 8, 3), "dimage": (128, 32, 64, 8, 8, 3)}
    elif arch >= 90:
        rows = 64 if arch >= 100 else 128  # 128 rows spill with fp32 tokens and position embeddings
        tiles = {"fwd": (rows, 128, 64, 8, 8, 3), "dw": (64, 128, 64, 8, 8, 3), "dimage": (64, 64, 64, 8, 4, 3)}
    else:
        tiles = {"fwd": (128, 128, 32, 8, 8, 4), "dw": (64, 128, 64, 8, 8, 3), "dimage": (128, 64, 64, 8, 8, 3)}
    return Config(*tiles[role])
