"""The cases of the compile-only lock: calls of the public functions at shapes of real ViTs.

A new kernel needs a case here, which the lock checks. A new shape or dtype needs one if it compiles to other code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from vit import kernels
from vit.kernels import configs, runtime
from vit.kernels.attention import attention_qkvpacked_bwd
from vit.kernels.layer_norm import layer_norm_bwd
from vit.kernels.linear import gemm

Make = Callable[..., Tensor]  # make(*shape, dtype=None): an empty tensor that requires grad


class Case(NamedTuple):
    """One call of an op at a shape of a real ViT. The batch of 64 is divisible by 16, as a training batch is."""

    why: str
    call: Callable[[Make], Any]
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32", "tf32")


def _norm(make: Make, batch: int, tokens: int, width: int) -> Tensor:
    return kernels.layer_norm(make(batch, tokens, width), make(width), make(width), impl="triton")


def _norm_backward(make: Make, width: int, scaled: bool, stream: torch.dtype | None = None) -> Tensor:
    """The backward with its optional results: y, and the column sums of the branch's gradient."""
    rows, residual, stats = make(64, 197, width), make(64, 197, width, dtype=stream), torch.empty(64 * 197)
    weight, bias, branch_bias, gamma = (make(width) for _ in range(4))
    factors = (rows, branch_bias, gamma, torch.empty(64)) if scaled else (None,) * 4
    sums = [rows.dtype if name != "gamma" or scaled else None for name in ("weight", "bias", "gamma", "branch_bias")]
    with torch.no_grad():
        norm = rows, residual, residual, stats, stats, weight, bias
        layer_norm_bwd(*norm, *factors, None, 0.0, 0, scaled, True, *sums)
    return rows  # the lock takes its gradient


def _residual(
    make: Make, width: int, scaled: bool, stream: torch.dtype | None = None, drop: bool = False, pending: bool = False
) -> Any:
    residual, branch, weight, bias = make(64, 197, width, dtype=stream), make(64, 197, width), make(width), make(width)
    options = {"gamma": make(width), "row_scale": make(64).detach()} if scaled else {}
    if pending:
        options |= {"branch_bias": make(width)}
    if drop:
        options |= {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64), "offset": 2}
    return kernels.residual_layer_norm(residual, branch, weight, bias, **options, impl="triton")


def _dropout(make: Make, width: int) -> Tensor:
    return kernels.dropout(make(64, 197, width), 0.1, torch.zeros(1, dtype=torch.int64), 2, impl="triton")


def _linear(make: Make, inputs: int, outputs: int, activation: str | None = None) -> Tensor:
    return kernels.linear(make(64, 197, inputs), make(outputs, inputs), make(outputs), activation, impl="triton")


def _mlp(make: Make, width: int, hidden: int, activation: str = "gelu", dropout_p: float = 0.0) -> Tensor:
    fc1, fc2 = (make(hidden, width), make(hidden)), (make(width, hidden), make(width))
    drop = {"dropout_p": dropout_p, "seed": torch.empty(1, dtype=torch.int64)}
    return kernels.mlp(make(64, 197, width), *fc1, *fc2, activation, **drop, impl="triton")


def _pingpong(make: Make, width: int, hidden: int) -> Tensor:
    """What it does of an MLP and of its backward, on the one architecture that has it."""
    pinned = configs.gemm
    with mock.patch.object(configs, "gemm", lambda *a: dataclasses.replace(pinned(*a), pingpong=True)):
        x, fc1, bias, fc2 = (
            make(*s).detach() for s in [(64 * 197, width), (hidden, width), (hidden,), (width, hidden)]
        )
        preact = make(64 * 197, hidden).detach()
        for activation in ("gelu", "gelu_tanh", "quick_gelu") if runtime.current_dry_run.arch == 90 else ():
            for aux in (False, True) if activation == "gelu" else (True,):
                gemm(x, fc1, bias, activation, trans_b=True, aux=aux)
                for sums in (False, True):
                    gemm(x, fc2, None, activation, preact, aux=aux, sums=sums)
    return make(1)


def _patch_embed(make: Make, patch: int, width: int, channels_last: bool = False) -> Tensor:
    image = make(64, 224, 224, 3).permute(0, 3, 1, 2) if channels_last else make(64, 3, 224, 224)
    weight, bias, tokens = make(width, 3, patch, patch), make(width), (224 // patch) ** 2 + 1
    return kernels.patch_embed(image, weight, bias, make(1, tokens, width), make(1, 1, width), impl="triton")


def _patch_embed_tokens(make: Make, dtype: torch.dtype | None, masked: bool) -> Tensor:
    image, weight, bias = make(64, 3, 224, 224), make(768, 3, 16, 16), make(768)
    pos_embed, prefix, mask_token = (make(1, n, 768, dtype=dtype) for n in (197, 1, 1))
    mask = torch.zeros(64, 196, dtype=torch.bool) if masked else None
    tokens = {"pos_embed": pos_embed, "prefix": prefix, "mask_token": mask_token, "bool_masked_pos": mask}
    return kernels.patch_embed(image, weight, bias, **tokens, impl="triton")


def _packed(make: Make, tokens: int, heads: int, head_dim: int, dropout_p: float = 0.0) -> Tensor:
    qkv = make(64, tokens, 3, heads, head_dim)
    seed = torch.zeros(1, dtype=torch.int64) if dropout_p else None
    return kernels.attention_qkvpacked(qkv, dropout_p=dropout_p, seed=seed, offset=3, impl="triton")


def _dbias(make: Make, tokens: int, heads: int, head_dim: int) -> Tensor:
    """The backward alone, with the sums of dqkv for the gradient of a bias."""
    qkv, stats = make(64, tokens, 3, heads, head_dim), torch.empty(64, heads, tokens)
    o = torch.empty(64, tokens, heads * head_dim, dtype=qkv.dtype)
    attention_qkvpacked_bwd(o, qkv.detach(), o, stats, stats, head_dim**-0.5, need_dbias=True)
    return qkv.view_as(qkv)


def _attention(make: Make, queries: int, keys: int, heads: int, head_dim: int) -> Tensor:
    q, k, v = (make(64, n, heads, head_dim) for n in (queries, keys, keys))
    return kernels.attention(q, k, v, impl="triton")


def _statistics(make: Make, rows: int, columns: int, prefix: int, heads: int, head_dim: int) -> Tensor:
    """Two launches: the second one, #2 in the lock file, has no programs for what keys receive."""
    q, k, _ = make(64, prefix + rows * columns, 3, heads, head_dim).unbind(2)
    saved = torch.empty(64, heads, q.shape[1]), torch.empty(64, heads, q.shape[1])
    options = {"grid_size": (rows, columns), "num_prefix_tokens": prefix, "patch_size": (16, 16), "saved": saved}
    for received in (True, False):
        kernels.attention_statistics(q, k, **options, received=received, impl="triton")
    return q  # of which the lock takes the gradient


# Without a dot tf32 changes nothing. fp16 compiles as bf16, so one shape per op is enough.
NO_DOTS, HALF, NO_FP16 = ("bf16", "fp32"), ("bf16", "fp16"), ("bf16", "fp32", "tf32")
CASES: dict[str, Case] = {
    "patch_embed_b": Case("ViT-B/16", lambda m: _patch_embed(m, 16, 768)),
    "patch_embed_h": Case(
        "ViT-H/14: 588 pixels a patch, no multiple of 16", lambda m: _patch_embed(m, 14, 1280), NO_FP16
    ),
    "patch_embed_b_nhwc": Case("channels last", lambda m: _patch_embed(m, 16, 768, True), ("bf16",)),
    "patch_embed_b_masked": Case("mask token", lambda m: _patch_embed_tokens(m, None, True), ("bf16",)),
    "patch_embed_b_autocast": Case("fp32 tokens", lambda m: _patch_embed_tokens(m, torch.float32, False), ("bf16",)),
    "attention_b": Case("ViT-B, 224: 197 tokens", lambda m: _packed(m, 197, 12, 64)),
    "attention_h": Case("ViT-H/14: head dimension 64 + 16", lambda m: _packed(m, 257, 16, 80), NO_FP16),
    "attention_b_dropout": Case("ViT-B with dropout", lambda m: _packed(m, 197, 12, 64, 0.1), ("bf16",)),
    "attention_h_dropout": Case("ViT-H with dropout", lambda m: _packed(m, 257, 16, 80, 0.1), NO_FP16),
    "attention_big_g_dropout": Case("ViT-G with dropout", lambda m: _packed(m, 257, 16, 104, 0.1), ("bf16",)),
    "attention_so400m": Case("64 + 8 of 16, 729 tokens", lambda m: _packed(m, 729, 16, 72), ("bf16",)),
    "attention_big_g": Case("ViT-G: 64 + 32 + 8 of 16", lambda m: _packed(m, 257, 16, 104), ("bf16",)),
    "attention_128": Case("widest head", lambda m: _packed(m, 257, 8, 128), ("bf16", "fp32")),
    "attention_b32": Case("ViT-B/32, 50 tokens: the last tile is wide", lambda m: _packed(m, 50, 12, 64), ("bf16",)),
    "attention_256": Case("256 tokens: whole tiles alone", lambda m: _packed(m, 256, 12, 64), ("bf16",)),
    "attention_few": Case("7 tokens: no whole tile", lambda m: _packed(m, 7, 12, 64), ("bf16",)),
    "attention_b_dbias": Case("ViT-B with the gradient of a bias", lambda m: _dbias(m, 197, 12, 64), NO_FP16),
    "attention_h_dbias": Case("ViT-H with the gradient of a bias", lambda m: _dbias(m, 257, 16, 80), ("bf16",)),
    "attention_cls": Case("one query an image", lambda m: _attention(m, 1, 197, 12, 64), ("bf16",)),
    "statistics_b": Case("ViT-B, 224", lambda m: _statistics(m, 14, 14, 1, 12, 64)),
    "statistics_h": Case("ViT-H/14: 64 + 16", lambda m: _statistics(m, 16, 16, 1, 16, 80), NO_FP16),
    "statistics_16": Case("narrowest head", lambda m: _statistics(m, 14, 14, 1, 3, 16), NO_DOTS),
    "statistics_32": Case("half a head of ViT-B", lambda m: _statistics(m, 14, 14, 1, 6, 32), NO_DOTS),
    "statistics_40": Case("32 + 8 of 16", lambda m: _statistics(m, 14, 14, 1, 4, 40), NO_DOTS),
    "statistics_56": Case("32 + 16 + 8 of 16", lambda m: _statistics(m, 16, 16, 1, 4, 56), NO_DOTS),
    "statistics_so400m": Case("64 + 8 of 16, no prefix", lambda m: _statistics(m, 27, 27, 0, 16, 72), NO_DOTS),
    "statistics_96": Case("64 + 32", lambda m: _statistics(m, 14, 14, 1, 8, 96), NO_DOTS),
    "statistics_big_g": Case("64 + 32 + 8 of 16", lambda m: _statistics(m, 16, 16, 5, 16, 104), NO_DOTS),
    "statistics_112": Case("64 + 32 + 16", lambda m: _statistics(m, 14, 14, 1, 8, 112), NO_DOTS),
    "statistics_128": Case("widest head", lambda m: _statistics(m, 16, 16, 1, 8, 128), NO_DOTS),
    "statistics_24": Case("16 + 8 of 16", lambda m: _statistics(m, 14, 14, 1, 4, 24), NO_DOTS),
    "statistics_48": Case("32 + 16", lambda m: _statistics(m, 14, 14, 1, 4, 48), NO_DOTS),
    "statistics_88": Case("64 + 16 + 8 of 16", lambda m: _statistics(m, 16, 16, 1, 16, 88), NO_DOTS),
    "statistics_120": Case("64 + 32 + 16 + 8 of 16", lambda m: _statistics(m, 14, 14, 1, 8, 120), NO_DOTS),
    "statistics_b32": Case("ViT-B/32: the last tile is wide", lambda m: _statistics(m, 7, 7, 1, 12, 64), ("bf16",)),
    "statistics_256": Case("256 tokens: whole tiles alone", lambda m: _statistics(m, 16, 16, 0, 12, 64), ("bf16",)),
    "statistics_few": Case("7 tokens: no whole tile", lambda m: _statistics(m, 2, 3, 1, 12, 64), ("bf16",)),
    "norm_ti": Case("ViT-Ti, 192 wide: many rows a program", lambda m: _norm(m, 64, 197, 192), NO_DOTS),
    "norm_b": Case("ViT-B, 768 wide", lambda m: _norm(m, 64, 197, 768), ("bf16", "fp16", "fp32")),
    "norm_b1": Case("one image: sizes not divisible by 16", lambda m: _norm(m, 1, 197, 768), ("bf16",)),
    "norm_h": Case("ViT-H, 1280 wide", lambda m: _norm(m, 64, 257, 1280), NO_DOTS),
    "residual_b": Case("residual alone", lambda m: _residual(m, 768, False), NO_DOTS),
    "residual_h": Case("ViT-H with LayerScale and stochastic depth", lambda m: _residual(m, 1280, True), NO_DOTS),
    "residual_b_autocast": Case("fp32 stream", lambda m: _residual(m, 768, True, torch.float32), HALF),
    "residual_b_dropout": Case("ViT-B with dropout", lambda m: _residual(m, 768, False, drop=True), ("bf16",)),
    "residual_h_dropout": Case("all at once", lambda m: _residual(m, 1280, True, drop=True), ("bf16",)),
    "residual_b_bias": Case("bias of the branch", lambda m: _residual(m, 768, False, pending=True), NO_DOTS),
    "residual_b_bias_autocast": Case(
        "beside an fp32 stream", lambda m: _residual(m, 768, False, torch.float32, pending=True), ("bf16",)
    ),
    "residual_s_bias": Case("DINOv2-S with it", lambda m: _residual(m, 384, True, pending=True), ("bf16",)),
    "residual_h_bias": Case("all of it", lambda m: _residual(m, 1280, True, drop=True, pending=True), ("bf16",)),
    "residual_b_again": Case("backward writes y again", lambda m: _norm_backward(m, 768, False), NO_DOTS),
    "residual_s_again": Case("with LayerScale", lambda m: _norm_backward(m, 384, True), NO_DOTS),
    "residual_h_again": Case("ViT-H with LayerScale", lambda m: _norm_backward(m, 1280, True), ("bf16",)),
    "residual_b_again_autocast": Case("fp32 stream", lambda m: _norm_backward(m, 768, True, torch.float32), ("bf16",)),
    "dropout_b": Case("ViT-B, after the embedding", lambda m: _dropout(m, 768), NO_DOTS),
    "linear_b_qkv": Case("ViT-B qkv; proj differs in nothing", lambda m: _linear(m, 768, 2304)),
    "linear_b_head": Case("1000 classes: not divisible by 16", lambda m: _linear(m, 768, 1000), ("bf16",)),
    "mlp_b": Case("ViT-B: 3072 hidden", lambda m: _mlp(m, 768, 3072)),
    "linear_b_gelu": Case("an activation without a second layer", lambda m: _linear(m, 768, 768, "gelu"), ("bf16",)),
    "mlp_b_quick": Case("ViT-B of OpenAI's CLIP", lambda m: _mlp(m, 768, 3072, "quick_gelu"), ("bf16",)),
    "mlp_b_dropout": Case("dropout behind the GELU", lambda m: _mlp(m, 768, 3072, dropout_p=0.1)),
    "mlp_b_pingpong": Case("off by default", lambda m: _pingpong(m, 768, 3072), ("bf16",)),
    "mlp_so400m": Case("SO400M: 4304 hidden, tanh GELU", lambda m: _mlp(m, 1152, 4304, "gelu_tanh"), ("bf16",)),
}

# Key in the lock file -> the reason why this one may spill, be serialised or not use wgmma.
EXCUSED = {
    "sm_90 fp32 attention_h _attention_fwd_kernel": "Triton 3.6.0 alone: 8 bytes, with IEEE fp32 and head_dim 80",
    "sm_100 bf16 attention_big_g _attention_bwd_kernel": "Triton 3.6.0 alone: 12 bytes",
    "sm_100 bf16 attention_128 _attention_delta_kernel": "Triton 3.6.0 alone: 32 bytes",
    "sm_100 bf16 residual_b_autocast _layer_norm_fwd_kernel no_grad": "Triton 3.6.0 alone: 8 bytes",
}
