"""LayerNorm, alone or fused with the residual add before it: one read and one write of the stream.

Forward, per row of D elements (r: row scale of the sample, g: LayerScale gamma, k: `tile.dropout_scale`):
    s = residual + r · g · k · branch        (layer_norm: s = x)
    x_hat = (s − mean(s)) · rstd,  rstd = 1 / sqrt(var(s) + eps)
    y = x_hat · w + b
Saved: s (the output, or x itself), mean, rstd; branch if g requires grad. x_hat is recomputed.

Backward, from dy (of y) and ds_out (of s):
    ds = ds_out + rstd · (w·dy − mean(w·dy) − x_hat · mean(w·dy · x_hat))
    dresidual = ds,  dbranch = r · g · k · ds
    dw = Σ_rows dy · x_hat,  db = Σ_rows dy,  dg = Σ_rows r · k · ds · branch
For the three sums, every program adds its rows in order into registers and writes one partial row. The partials are
then summed in one fixed order. There are no atomics, so the result has the same bits every time.

x [M, D] has any row stride; statistics are fp32 (fp64 for fp64 tensors, interpreted only).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference, runtime, tile
from .autocast import autocast_dtype, autocasts
from .checks import check_floating, check_tensors
from .dropout import seed_and_offset
from .reference import ResidualLayerNorm


@triton.jit(do_not_specialize=["OFFSET"])
def _layer_norm_fwd_kernel(
    x_ptr, branch_ptr, gamma_ptr, row_scale_ptr, w_ptr, b_ptr, seed_ptr, stream_ptr, y_ptr, mean_ptr, rstd_ptr,
    M, D, ROWS_PER_SCALE, OFFSET,
    stride_xm, stride_branchm,
    EPS: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    offs_m = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    offs_out = offs_m[:, None] * D + offs_d[None, :]

    s = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :], mask=mask, other=0.0).to(ACC)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + offs_m[:, None] * stride_branchm + offs_d[None, :], mask=mask, other=0.0).to(ACC)
        if seed_ptr is not None:
            branch *= tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m[:, None], offs_d[None, :], P).to(ACC)
        if gamma_ptr is not None:
            branch *= tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
        if row_scale_ptr is not None:
            branch *= tl.load(row_scale_ptr + offs_m // ROWS_PER_SCALE, mask=mask_m, other=0.0).to(ACC)[:, None]
        s += branch
        tl.store(stream_ptr + offs_out, s.to(stream_ptr.dtype.element_ty), mask=mask)

    mean, rstd = tile.row_stats(s, mask, D, EPS)
    y = (s - mean[:, None]) * rstd[:, None]
    if w_ptr is not None:
        y *= tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]

    tl.store(y_ptr + offs_out, y.to(y_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["OFFSET"])
def _layer_norm_bwd_kernel(
    dy_ptr, ds_out_ptr, s_ptr, mean_ptr, rstd_ptr, w_ptr, branch_ptr, gamma_ptr, row_scale_ptr, seed_ptr,
    ds_ptr, dbranch_ptr, dw_ptr, db_ptr, dgamma_ptr,
    M, D, ROWS_PER_SCALE, OFFSET,
    stride_dym, stride_ds_outm, stride_sm, stride_branchm,
    P: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    if w_ptr is not None:
        w = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    dw = tl.zeros([BLOCK_D], dtype=ACC)
    db = tl.zeros([BLOCK_D], dtype=ACC)
    dgamma = tl.zeros([BLOCK_D], dtype=ACC)

    for start_m in range(pid * BLOCK_M, M, num_programs * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_d[None, :]
        offs_out = offs_m[:, None] * D + offs_d[None, :]

        s = tl.load(s_ptr + offs_m[:, None] * stride_sm + offs_d[None, :], mask=mask, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_d[None, :], mask=mask, other=0.0).to(ACC)
        x_hat = tl.where(mask, (s - mean) * rstd, 0.0)
        dw += tl.sum(dy * x_hat, axis=0)
        db += tl.sum(dy, axis=0)

        if w_ptr is not None:
            dy *= w
        c1 = tl.sum(dy, axis=1)[:, None] / D
        c2 = tl.sum(dy * x_hat, axis=1)[:, None] / D
        ds = rstd * (dy - c1 - x_hat * c2)
        if ds_out_ptr is not None:
            ds += tl.load(ds_out_ptr + offs_m[:, None] * stride_ds_outm + offs_d[None, :], mask=mask, other=0.0).to(ACC)
        tl.store(ds_ptr + offs_out, ds.to(ds_ptr.dtype.element_ty), mask=mask)

        if row_scale_ptr is not None:
            ds *= tl.load(row_scale_ptr + offs_m // ROWS_PER_SCALE, mask=mask_m, other=0.0).to(ACC)[:, None]
        if seed_ptr is not None:
            ds *= tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m[:, None], offs_d[None, :], P).to(ACC)
        if dgamma_ptr is not None:
            offs_branch = offs_m[:, None] * stride_branchm + offs_d[None, :]
            dgamma += tl.sum(ds * tl.load(branch_ptr + offs_branch, mask=mask, other=0.0).to(ACC), axis=0)
        if gamma_ptr is not None:
            ds *= gamma
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offs_out, ds.to(dbranch_ptr.dtype.element_ty), mask=mask)

    if dw_ptr is not None:
        tl.store(dw_ptr + pid * D + offs_d, dw, mask=mask_d)
    if db_ptr is not None:
        tl.store(db_ptr + pid * D + offs_d, db, mask=mask_d)
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + pid * D + offs_d, dgamma, mask=mask_d)


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@torch.library.custom_op("vit::layer_norm_fwd", mutates_args=())
def layer_norm_fwd(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, row_scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, eps: float, dropout_p: float, offset: int,
    out_dtype: torch.dtype, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(stream, y, mean, rstd); stream is empty without a branch, the statistics are empty unless ``save``."""
    stream, y, mean, rstd = _layer_norm_fwd_fake(
        x, branch, gamma, row_scale, weight, bias, seed, eps, dropout_p, offset, out_dtype, save
    )
    rows = runtime.rows(x)
    branch_rows = None if branch is None else runtime.rows(branch)
    M, D = rows.shape
    config = configs.layer_norm(runtime.arch(x.device), D)
    runtime.launch(
        _layer_norm_fwd_kernel, triton.cdiv(M, config.block_m),
        x_ptr=rows, branch_ptr=branch_rows, gamma_ptr=gamma, row_scale_ptr=row_scale, w_ptr=weight, b_ptr=bias,
        seed_ptr=seed, stream_ptr=None if branch is None else stream, y_ptr=y,
        mean_ptr=mean if save else None, rstd_ptr=rstd if save else None,
        M=M, D=D, ROWS_PER_SCALE=_rows_per_scale(M, row_scale), OFFSET=offset,
        stride_xm=rows.stride(0), stride_branchm=0 if branch is None else branch_rows.stride(0),
        EPS=eps, P=dropout_p, ACC=runtime.acc_type(x.dtype), BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return stream, y, mean, rstd


@layer_norm_fwd.register_fake
def _layer_norm_fwd_fake(x, branch, gamma, row_scale, weight, bias, seed, eps, dropout_p, offset, out_dtype, save):
    rows = math.prod(x.shape[:-1]) if save else 0  # numel() of a shape would make its symbols constants
    stats = x.new_empty(rows, dtype=_stat_dtype(x)), x.new_empty(rows, dtype=_stat_dtype(x))
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=out_dtype), *stats


@torch.library.custom_op("vit::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    dy: Tensor, ds_out: Tensor | None, s: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    branch: Tensor | None, gamma: Tensor | None, row_scale: Tensor | None, seed: Tensor | None,
    dropout_p: float, offset: int, need_dbranch: bool, need_dw: bool, need_db: bool, need_dgamma: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ds, dbranch, dw, db, dgamma), those not needed empty. dw, db and dgamma are in the accumulator's type."""
    ds = s.new_empty(s.shape)
    dbranch = dy.new_empty(s.shape if need_dbranch else 0)
    dy_rows, s_rows = runtime.rows(dy), runtime.rows(s)
    ds_out_rows = None if ds_out is None else runtime.rows(ds_out)
    branch_rows = None if branch is None else runtime.rows(branch)
    M, D = s_rows.shape
    config = configs.layer_norm(runtime.arch(s.device), D, seed is not None)
    num_programs = min(triton.cdiv(M, config.block_m), 2 * runtime.num_sms(s.device))

    def partials(needed: bool) -> Tensor | None:
        return mean.new_empty(num_programs, D) if needed else None

    dw, db, dgamma = partials(need_dw), partials(need_db), partials(need_dgamma)
    runtime.launch(
        _layer_norm_bwd_kernel, num_programs,
        dy_ptr=dy_rows, ds_out_ptr=ds_out_rows, s_ptr=s_rows, mean_ptr=mean, rstd_ptr=rstd, w_ptr=weight,
        branch_ptr=branch_rows if need_dgamma else None, gamma_ptr=gamma, row_scale_ptr=row_scale,
        seed_ptr=seed,
        ds_ptr=ds, dbranch_ptr=dbranch if need_dbranch else None, dw_ptr=dw, db_ptr=db, dgamma_ptr=dgamma,
        M=M, D=D, ROWS_PER_SCALE=_rows_per_scale(M, row_scale), OFFSET=offset,
        stride_dym=dy_rows.stride(0), stride_ds_outm=0 if ds_out is None else ds_out_rows.stride(0),
        stride_sm=s_rows.stride(0), stride_branchm=branch_rows.stride(0) if need_dgamma else 0,
        P=dropout_p, ACC=runtime.acc_type(s.dtype), BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return ds, dbranch, *(mean.new_empty(0) if p is None else p.sum(dim=0) for p in (dw, db, dgamma))


@layer_norm_bwd.register_fake
def _layer_norm_bwd_fake(
    dy, ds_out, s, mean, rstd, weight, branch, gamma, row_scale, seed, dropout_p, offset,
    need_dbranch, need_dw, need_db, need_dgamma,
):  # fmt: skip
    sums = (mean.new_empty(s.shape[-1] if needed else 0) for needed in (need_dw, need_db, need_dgamma))
    return s.new_empty(s.shape), dy.new_empty(s.shape if need_dbranch else 0), *sums


def _rows_per_scale(M: int, row_scale: Tensor | None) -> int:
    return 1 if row_scale is None or row_scale.numel() == 0 else M // row_scale.numel()


def _setup_context(ctx, inputs, output):
    x, branch, gamma, row_scale, weight, bias, seed, _eps, ctx.dropout_p, ctx.offset, ctx.y_dtype, _save = inputs
    stream, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *([stream] if branch is None else []))
    s = x if branch is None else stream
    # Only the gradient of gamma reads the branch itself.
    kept = branch if gamma is not None and ctx.needs_input_grad[2] else None
    ctx.save_for_backward(s, mean, rstd, weight, kept, gamma, row_scale, seed)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.branch_dtype = None if branch is None else branch.dtype


def _backward(ctx, ds_out, dy, _dmean, _drstd):
    s, mean, rstd, weight, branch, gamma, row_scale, seed = ctx.saved_tensors
    need_dx, need_dbranch, need_dgamma, _, need_dw, need_db = ctx.needs_input_grad[:6]
    if dy is None:
        dy = s.new_zeros(s.shape, dtype=ctx.y_dtype)
    # Without factors branch and residual have the same gradient, so one tensor is enough.
    separate = need_dbranch and any(t is not None for t in (gamma, row_scale, seed))
    ds, dbranch, dw, db, dgamma = layer_norm_bwd(
        dy=dy, ds_out=ds_out if ctx.branch_dtype else None, s=s, mean=mean, rstd=rstd, weight=weight,
        branch=branch, gamma=gamma, row_scale=row_scale, seed=seed, dropout_p=ctx.dropout_p, offset=ctx.offset,
        need_dbranch=separate, need_dw=need_dw, need_db=need_db, need_dgamma=need_dgamma,
    )  # fmt: skip
    return (
        ds if need_dx else None,
        None if not need_dbranch else dbranch if separate else ds.to(ctx.branch_dtype),
        dgamma.to(gamma.dtype) if need_dgamma else None,
        None,
        dw.to(weight.dtype) if need_dw else None,
        db.to(ctx.bias_dtype) if need_db else None,
        *[None] * 6,
    )


layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("layer_norm or residual_layer_norm", layer_norm_bwd)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, *, impl: str = "auto"
) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., 2016), statistics in fp32.

    Args:
        x: [..., D], any strides; fp32, fp16 or bf16.
        weight: [D] or None (ones).
        bias: [D] or None (zeros).
        eps: added to the biased variance; timm's ViT uses 1e-6.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        [..., D], contiguous, in the dtype of ``x``. Under `torch.autocast` in autocast's dtype, from x, weight and bias
        as they are (PyTorch's own LayerNorm returns fp32 there, which the next matrix product rounds).

    Raises:
        ValueError: shapes that do not fit, negative eps, unknown impl. TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    _check("layer_norm", x, weight, bias, eps)
    autocast = autocast_dtype(x.device) if x.dtype is not torch.float64 else None
    if autocast is None:
        check_floating("layer_norm", x=x, weight=weight, bias=bias)
    else:
        check_floating("layer_norm", x=x)
        check_floating("layer_norm", weight=weight, bias=bias)
    out_dtype = autocast or x.dtype
    if not runtime.use_triton("layer_norm", impl, [x, weight, bias], _too_wide(x)):
        return reference.layer_norm(x, weight, bias, eps).to(out_dtype)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    save = runtime.needs_grad(x, weight, bias)
    _, y, _, _ = layer_norm_fwd(
        x=x, branch=None, gamma=None, row_scale=None, weight=weight, bias=bias, seed=None,
        eps=eps, dropout_p=0.0, offset=0, out_dtype=out_dtype, save=save,
    )  # fmt: skip
    return y


@autocasts("residual", "weight", "bias", "gamma", "row_scale")
def residual_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> ResidualLayerNorm:
    """Residual add and the LayerNorm that follows it, in one pass over the stream.

    ``stream = residual + row_scale · gamma · dropout(branch)``, ``y = layer_norm(stream)``.

    Args:
        residual: [B, ..., D], the residual stream; in the dtype of ``branch``, or fp32 with fp16 or bf16 branches.
        branch: like ``residual``, output of attention or MLP. Under `torch.autocast` it is taken in autocast's dtype.
        weight: [D] of the LayerNorm, or None; in the dtype of ``branch``, or fp32 with fp16 or bf16.
        bias: like ``weight``.
        eps: added to the biased variance.
        gamma: [D], LayerScale (Touvron et al., 2021), or None; in a dtype that ``weight`` may have.
        row_scale: [B], a factor per sample (stochastic depth), or None. Carries no gradient.
        dropout_p: dropout of the branch, as in `vit.kernels.dropout`.
        seed: as in `vit.kernels.dropout`.
        offset: as in `vit.kernels.dropout`.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        `ResidualLayerNorm` (stream, y): stream in the dtype of ``residual``, y in the dtype of ``branch``.

    Raises:
        ValueError: shapes that do not fit, negative eps, dropout_p outside [0, 1). TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "residual_layer_norm"
    tensors = {"residual": residual, "branch": branch, "weight": weight, "bias": bias, "gamma": gamma}
    check_tensors(op, **tensors, row_scale=row_scale)
    _check(op, residual, weight, bias, eps)
    if branch.shape != residual.shape:
        shapes = f"{tuple(residual.shape)}, got {tuple(branch.shape)}"
        raise ValueError(f"{op}: branch must have the shape of residual {shapes}")
    if residual.dtype is not torch.float32 or branch.dtype not in runtime.HALF:
        check_floating(op, residual=residual, branch=branch)
    check_floating(op, weight=weight, bias=bias)
    for name, t in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        if t is not None and (t.dtype is not torch.float32 or branch.dtype not in runtime.HALF):
            check_floating(op, branch=branch, **{name: t})
    if gamma is not None and gamma.shape != residual.shape[-1:]:
        raise ValueError(f"{op}: gamma must have shape ({residual.shape[-1]},), got {tuple(gamma.shape)}")
    if row_scale is not None and row_scale.shape != residual.shape[:1]:
        raise ValueError(f"{op}: row_scale must have shape ({residual.shape[0]},), got {tuple(row_scale.shape)}")
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError(f"{op}: row_scale carries no gradient; pass row_scale.detach()")
    seed, offset = seed_and_offset(op, dropout_p, seed, offset, residual)
    tensors = [residual, branch, weight, bias, gamma, row_scale]
    if not runtime.use_triton(op, impl, tensors, _too_wide(residual)):
        drop = {"dropout_p": dropout_p, "seed": seed, "offset": offset}
        factors = {"gamma": gamma, "row_scale": row_scale}
        return reference.residual_layer_norm(residual, branch, weight, bias, eps, **factors, **drop)
    weight, bias, gamma, row_scale = (None if t is None else t.contiguous() for t in (weight, bias, gamma, row_scale))
    save = runtime.needs_grad(residual, branch, weight, bias, gamma)
    stream, y, _, _ = layer_norm_fwd(
        x=residual, branch=branch, gamma=gamma, row_scale=row_scale, weight=weight, bias=bias, seed=seed,
        eps=eps, dropout_p=dropout_p, offset=offset, out_dtype=branch.dtype, save=save,
    )  # fmt: skip
    return ResidualLayerNorm(stream, y)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    if x.dim() < 1 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must have shape ({x.shape[-1]},), got {tuple(t.shape)}")
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")


def _too_wide(x: Tensor) -> str | None:
    return f"rows of {x.shape[-1]} elements exceed the 65,536 that fit one program" if x.shape[-1] > 65_536 else None
