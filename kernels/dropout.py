"""Dropout whose mask is a function of (seed, offset, element), and the seed itself.

    y = x · k(seed, offset, row, column),  k ∈ {0, 1/(1 − p)}

Backward: dx = dy · k, by the same kernel.

No mask is stored: `tile.dropout_scale` computes k wherever it is needed. So the backward, a recomputed forward,
compiled code and a replayed graph all have the same mask. `residual_layer_norm`, `mlp` and `attention` use the same
function for their own dropout. This op is for embeddings and the head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference, runtime, tile
from .checks import check_dropout, check_floating


@triton.jit(do_not_specialize=["M", "OFFSET"])
def _dropout_kernel(
    x_ptr, seed_ptr, y_ptr,
    M, D, OFFSET, stride_xm,
    P: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    tiles_d = tl.cdiv(D, BLOCK_D)
    offs_m = pid // tiles_d * BLOCK_M + tl.arange(0, BLOCK_M)
    start_d = (pid % tiles_d).to(tl.int32) * BLOCK_D
    offs_d = start_d + tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]

    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :], mask=mask, other=0.0).to(ACC)
    y = x * tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m, start_d, BLOCK_D, P).to(ACC)
    tl.store(y_ptr + offs_m[:, None] * D + offs_d[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("vit::dropout_seed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _dropout_seed(like: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


@_dropout_seed.register_fake
def _dropout_seed_fake(like):
    return like.new_empty(1, dtype=torch.int64)


def dropout_seed(like: Tensor) -> Tensor:
    """One int64 number [1] on the device of ``like``, from PyTorch's generator there (`torch.manual_seed`).

    A custom op, so that compiled code and a captured graph draw a new number at every run, as eager code does.
    """
    return _dropout_seed(like.detach())


@torch.library.custom_op("vit::dropout", mutates_args=())
def dropout_fwd(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    """x [..., D] -> contiguous [..., D]."""
    y = x.new_empty(x.shape)
    x_rows = runtime.rows(x)
    M, D = x_rows.shape
    config = configs.elementwise(runtime.arch(x.device), D)
    runtime.launch(
        _dropout_kernel, triton.cdiv(M, config.block_m) * triton.cdiv(D, config.block_n),
        x_ptr=x_rows, seed_ptr=seed, y_ptr=y, M=M, D=D, OFFSET=offset, stride_xm=x_rows.stride(0),
        P=p, ACC=runtime.acc_type(x.dtype), BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y


@dropout_fwd.register_fake
def _dropout_fake(x, p, seed, offset):
    return x.new_empty(x.shape)


@torch.library.custom_op("vit::dropout_bwd", mutates_args=())
def dropout_bwd(dy: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    """dx, contiguous. It is a separate op so that its own gradient, a second derivative, can raise."""
    return torch.ops.vit.dropout(dy, p, seed, offset)


@dropout_bwd.register_fake
def _dropout_bwd_fake(dy, p, seed, offset):
    return dy.new_empty(dy.shape)


def _setup_context(ctx, inputs, output):
    _, ctx.p, seed, ctx.offset = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(seed)


def _backward(ctx, dy):
    return None if dy is None else dropout_bwd(dy, ctx.p, *ctx.saved_tensors, ctx.offset), None, None, None


dropout_fwd.register_autograd(_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("dropout", dropout_bwd)


def seed_and_offset(op: str, p: float, seed: Tensor | None, offset: int, x: Tensor) -> tuple[Tensor | None, int]:
    """What an op of x drops out with: the seed (a new one for None) and the offset; (None, 0) for p = 0."""
    check_dropout(op, p, seed, x)
    if p == 0.0:
        return None, 0
    return dropout_seed(x) if seed is None else seed, offset


def dropout(x: Tensor, p: float, seed: Tensor | None = None, offset: int = 0, *, impl: str = "auto") -> Tensor:
    """Sets each element to 0 with probability p and divides the others by 1 − p (Srivastava et al., 2014).

    Args:
        x: [..., D], any strides; fp32, fp16 or bf16.
        p: in [0, 1); 0 returns ``x`` itself.
        seed: int64 tensor of one element on the device of ``x``, see `dropout_seed`. None draws one.
        offset: which dropout of the network this is, from 0 to 2³¹ − 1. Two with the same seed and offset drop alike.
        impl: "auto", "fused", "triton" or "reference". All draw the same mask. PyTorch's own dropout draws another.

    Returns:
        Like ``x``, contiguous.

    Raises:
        ValueError: p outside [0, 1), unknown impl. TypeError: not a floating-point tensor, not a seed.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernel cannot run.
    """
    check_floating("dropout", x=x)
    seed, offset = seed_and_offset("dropout", p, seed, offset, x)
    if p == 0.0:
        return x
    if x.dim() == 0:
        raise ValueError("dropout: x must have at least one dimension, got a scalar")
    if not runtime.use_triton("dropout", impl, [x]):
        return reference.dropout(x, p, seed, offset)
    return dropout_fwd(x, p, seed, offset)
