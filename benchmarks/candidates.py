"""The candidates of `benchmarks.tune` for each function of `vit.kernels.configs`, and the bench that times them.

Those that are similar to the pinned one come first. Candidates that cannot fit are left out. The compiler reports
spills. ``gemm_…`` are the single products of a block, forward, compared with cuBLAS.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from benchmarks import bench_attention, bench_layer_norm, bench_linear, bench_mlp, bench_patch_embed
from benchmarks.harness import Bench, Work
from benchmarks.shapes import Shape
from vit import kernels
from vit.kernels import configs, reference, runtime
from vit.kernels.configs import Config, next_power_of_2

#: Forms of the GEMM that are tried first: the ping-pong kernel, an epilogue in pieces, two programs per SM, and
#: specialised warps. The last are at the end, because after a compiler bug they might wait forever.
FORMS = (
    Config(128, 128, 64, 8, 8, 3, pingpong=True),
    Config(128, 256, 64, 8, 8, 3, 2),
    Config(128, 256, 64, 8, 8, 3, 4),
    Config(128, 128, 64, 8, 4, 3, 4),
    Config(128, 256, 64, 8, 4, 3, 1, True),
    Config(128, 256, 64, 8, 4, 3, 2, True),
)
SHARED = 227 * 1024  # bytes for a program on sm_90; on others the check of the compiled kernel is stricter


def gemm(arch: int, shape: Shape, dtype: torch.dtype, role: str | None) -> Iterator[Config]:
    block_k = 128 // dtype.itemsize  # one swizzled row of a descriptor's block
    tiles = ((128, 128), (128, 256), (256, 128), (64, 256), (128, 64), (64, 128))
    specialised = (False, True) if arch in (0, 90) else (False,)
    if arch == 90 and dtype in runtime.HALF:
        yield FORMS[0]
    for (m, n), k, warps, stages, split, ws in product(
        tiles, (block_k, block_k // 2), (4, 8), (3, 4), (1, 2, 4), specialised
    ):
        accumulators = m * n // (32 * warps * (2 if ws else 1))  # per thread; there are two groups of specialised warps
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
        if 4 <= m * block_d // (32 * warps) <= 64:  # elements per thread
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
    """The configuration that the ops get now."""
    if function in ("attention_fwd", "attention_bwd"):
        return getattr(configs, function)(arch, shape.tokens, shape.head_dim, dtype)
    if function in ("layer_norm", "elementwise"):
        return getattr(configs, function)(arch, shape.width)
    extra = (dtype, runtime.precision(dtype))
    return configs.gemm(arch, *extra) if function == "gemm" else configs.patch_embed(arch, role, *extra)


def candidates(function: str, arch: int, shape: Shape, dtype: torch.dtype, role: str | None = None) -> list[Config]:
    """The pinned configuration, `FORMS`, then the others, sorted by the number of fields that differ."""
    first = pinned(function, arch, shape, dtype, role)

    def differs(config: Config) -> int:
        return config not in FORMS and sum(
            a != b for a, b in zip(dataclasses.astuple(config), dataclasses.astuple(first), strict=True)
        )

    others = set(globals()[function](arch, shape, dtype, role)) - {first}
    return [first, *sorted(others, key=lambda c: (differs(c), not c.pingpong, dataclasses.astuple(c)[:-1]))]


# ---- targets ---------------------------------------------------------------------------------------------------------


def _dropout(op: Callable[..., Any], x: torch.Tensor, **options: Any) -> torch.Tensor:
    return op(x, 0.1, torch.zeros(1, dtype=torch.int64, device=x.device), 2, **options)


DROPOUT = Bench(
    "dropout", "dropout", lambda s, rand: {"x": rand(s.batch, s.tokens, s.width)},
    lambda s, e: dict.fromkeys(("fwd", "bwd"), Work(0, 2 * s.rows * s.width * e)),
    functools.partial(_dropout, reference.dropout), {"ours": functools.partial(_dropout, kernels.dropout)},
    compiles=None,
)  # fmt: skip


class Target(NamedTuple):
    """A function of `vit.kernels.configs` (and a role of patch_embed), and the bench and mode that time it."""

    function: str
    kernel: str  # prefix of the names of its kernels
    bench: Bench
    mode: str
    role: str | None = None
    impl: str = "triton"


_BENCHES = {
    bench.op: bench
    for module in (bench_attention, bench_layer_norm, bench_linear, bench_mlp, bench_patch_embed)
    for bench in module.BENCHES
}
TARGETS = {
    "mlp": Target("gemm", "_gemm", _BENCHES["mlp"], "full", impl="auto"),  # cuBLAS runs products without GELU
    "linear": Target("gemm", "_gemm", _BENCHES["qkv"], "full"),
    **{f"gemm_{op}": Target("gemm", "_gemm", _BENCHES[op], "fwd") for op in ("fc1", "fc2", "qkv", "proj")},
    "attention_fwd": Target("attention_fwd", "_attention_fwd", _BENCHES["attention"], "fwd"),
    "attention_bwd": Target("attention_bwd", "_attention_bwd", _BENCHES["attention"], "bwd"),
    "layer_norm": Target("layer_norm", "_layer_norm", _BENCHES["residual_layer_norm"], "full"),
    "patch_embed_fwd": Target("patch_embed", "_patch_embed_fwd", _BENCHES["patch_embed"], "fwd", "fwd"),
    "patch_embed_dw": Target("patch_embed", "_patch_embed_dw", _BENCHES["patch_embed"], "bwd", "dw"),
    "patch_embed_dimage": Target("patch_embed", "_patch_embed_dimage", _BENCHES["patch_embed"], "bwd", "dimage"),
    "elementwise": Target("elementwise", "_dropout", DROPOUT, "full"),
}
OPS = (*TARGETS, "attention", "gemm", "patch_embed")


def of_target(target: Target, arch: int, shape: Shape, dtype: torch.dtype) -> list[Config]:
    """The `candidates` of a target. Those of fc1 are tried with the cheap GELU and with erf."""
    found = candidates(target.function, arch, shape, dtype, target.role)
    if target is not TARGETS["gemm_fc1"]:
        return found
    return [c for config in found for c in (config, dataclasses.replace(config, cheap=False))]
