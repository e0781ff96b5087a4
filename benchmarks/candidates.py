"""What `benchmarks.tune` tries for each function of `vit.kernels.configs`: pure functions, the nearest to the pinned
one first. Only what cannot fit is left out here; what spills, the compiler says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product

import torch

from benchmarks.shapes import Shape
from vit.kernels import configs, runtime
from vit.kernels.configs import Config, next_power_of_2

SHARED = 227 * 1024  # bytes that a program of sm_90 can have; others have less, and the compiled kernel is checked


def gemm(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    block_k = 128 // dtype.itemsize  # one swizzled row of a descriptor's block
    tiles = ((128, 128), (128, 256), (256, 128), (64, 256), (128, 64), (64, 128))
    specialised = (False, True) if arch in (0, 90) else (False,)
    for (m, n), k, warps, stages, split, ws in product(
        tiles, (block_k, block_k // 2), (4, 8), (3, 4), (1, 2, 4), specialised
    ):
        accumulators = m * n // (32 * warps * (2 if ws else 1))  # a thread; specialised warps are two groups of them
        if accumulators <= 128 and stages * (m + n) * k * dtype.itemsize <= SHARED and not (ws and warps == 8):
            for group in (8, 16):
                yield Config(m, n, k, group, warps, stages, split, ws)


def attention_fwd(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    for m, n, warps, stages in product((64, 128, 32), (32, 64, 128, 16), (4, 8), (2, 3, 4, 1)):
        yield Config(m, n, num_warps=warps, num_stages=stages)


def attention_bwd(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    for m, n, warps, stages in product((64, 128, 32), (16, 32, 64), (4, 8), (1, 2, 3)):
        yield Config(m, n, num_warps=warps, num_stages=stages)


def layer_norm(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    block_d = next_power_of_2(shape.width)
    for m, warps in product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        if 4 <= m * block_d // (32 * warps) <= 64:  # elements a thread
            yield Config(m, block_d, num_warps=warps)


def elementwise(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    for n, per_program, warps in product((128, 256, 512, 1024, 2048), (1024, 2048, 4096, 8192), (2, 4, 8)):
        if n <= min(next_power_of_2(shape.width), per_program) and 4 <= per_program // (32 * warps) <= 64:
            yield Config(per_program // n, n, num_warps=warps)


def patch_embed(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    for m, n, k, warps, stages in product((64, 128, 32), (64, 128, 256, 32), (32, 64), (4, 8), (2, 3, 4)):
        rows, cols = {"fwd": (m, n), "dw": (n, k), "dimage": (m, k)}[role]  # of the accumulators
        inner = {"fwd": k, "dw": m, "dimage": n}[role]
        if rows * cols // (32 * warps) <= 128 and stages * (rows + cols) * inner * dtype.itemsize <= SHARED:
            yield Config(m, n, k, 8, warps, stages)


def pinned(function: str, arch: int, shape: Shape, dtype: torch.dtype, role: str | None = None) -> Config:
    """What the ops get today."""
    if function in ("attention_fwd", "attention_bwd"):
        return getattr(configs, function)(arch, shape.tokens, shape.head_dim, dtype)
    if function in ("layer_norm", "elementwise"):
        return getattr(configs, function)(arch, shape.width)
    extra = (dtype, runtime.precision(dtype))
    return configs.gemm(arch, *extra) if function == "gemm" else configs.patch_embed(arch, role, *extra)


def candidates(function: str, arch: int, shape: Shape, dtype: torch.dtype, role: str | None = None) -> list[Config]:
    """The pinned configuration, then the others, the fewer fields differ the earlier."""
    first = pinned(function, arch, shape, dtype, role)

    def differs(config: Config) -> int:
        return sum(a != b for a, b in zip(dataclasses.astuple(config), dataclasses.astuple(first), strict=True))

    others = set(globals()[function](arch, shape, dtype, role)) - {first}
    return [first, *sorted(others, key=lambda c: (differs(c), dataclasses.astuple(c)[:-1]))]
