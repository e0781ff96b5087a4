"""Pinned launch configurations: pure functions of architecture, shape class and dtype. Nothing tunes at run time.

``arch`` is 0 when the kernels are interpreted: tiles are then small, so that small test shapes have several tiles and
ragged edges. Until a measurement under ``benchmarks/results/`` says otherwise the values are those that compile without
spills on every architecture of the lock file (``tests/lock``).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes (unused ones stay 0), warps per program and pipeline depth."""

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def layer_norm(arch: int, width: int) -> Config:
    """Rows of ``width`` elements held whole in registers, about 4,096 elements a program."""
    block_d = next_power_of_2(width)
    num_warps = min(max(block_d // 512, 4), 16)
    return Config(block_m=2 if arch == 0 else max(1, 4096 // block_d), block_n=block_d, num_warps=num_warps)
