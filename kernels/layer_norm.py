"""LayerNorm, alone or fused with the residual add before it: one read and one write of the stream.

Forward, per row of D elements (r: row scale of the sample, g: LayerScale gamma, k: `tile.dropout_scale`, c: bias of
the branch):
    s = residual + r · g · k · (branch + c)        (layer_norm: s = x)
    x_hat = (s − mean(s)) · rstd,  rstd = 1 / sqrt(var(s) + eps)
    y = x_hat · w + b
s is rounded to the dtype of the stream first, so that y is a function of what is stored.
Saved: s (the output, or x itself), mean, rstd; branch and c if g requires grad. x_hat is recomputed, and y on request,
with the bits that it had in the forward.

Backward, from dy (of y) and ds_out (of s):
    ds = ds_out + rstd · (w·dy − mean(w·dy) − x_hat · mean(w·dy · x_hat))
    dresidual = ds,  dbranch = r · g · k · ds
    dw = Σ_rows dy · x_hat,  db = Σ_rows dy,  dg = Σ_rows r · k · ds · (branch + c),  dc = Σ_rows r · g · k · ds
For the four sums, every program adds its rows in order into registers and writes one partial row. The partials are then
summed in one fixed order. There are no atomics, so the result has the same bits every time.

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
from .partial_sums import sum_partials
from .recompute import note_source
from .reference import ResidualLayerNorm


@triton.jit
def _load_row(ptr, offs_d, mask_d, ACC: tl.constexpr):
    """A vector of D elements for all rows of a tile, [1, BLOCK_D]; None for None."""
    if ptr is not None:
        return tl.load(ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]


@triton.jit
def _load_rows(ptr, stride_m, offs_m, offs_d, mask):
    """A tile of a matrix, in the dtype that it is stored in; None for None."""
    if ptr is not None:
        return tl.load(ptr + offs_m[:, None] * stride_m + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def _load_scales(ptr, offs_m, mask_m, M, ROWS_PER_SCALE):
    """The scale of each row of a tile, [BLOCK_M, 1]; None for None. Divides in the type of M, mostly 32 bits."""
    if ptr is not None:
        return tl.load(ptr + offs_m.to(M.dtype) // ROWS_PER_SCALE, mask=mask_m, other=0.0)[:, None]


@triton.jit
def _store_partial(ptr, pid, row, D, offs_d, mask_d):
    """Row number pid of the partial sums; nothing for None."""
    if ptr is not None:
        tl.store(ptr + pid * D + offs_d, row, mask=mask_d)


@triton.jit
def _scale_and_shift(x_hat, w, b):
    """y. Forward and backward share it, because both must get the same bits."""
    if w is not None:
        x_hat *= w
    if b is not None:
        x_hat += b
    return x_hat


@triton.jit(do_not_specialize=["M", "ROWS_PER_SCALE", "OFFSET"])
def _layer_norm_fwd_kernel(
    x_ptr, branch_ptr, branch_bias_ptr, gamma_ptr, row_scale_ptr, w_ptr, b_ptr, seed_ptr,
    stream_ptr, y_ptr, mean_ptr, rstd_ptr,
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

    s = _load_rows(x_ptr, stride_xm, offs_m, offs_d, mask).to(ACC)
    if branch_ptr is not None:
        branch = _load_rows(branch_ptr, stride_branchm, offs_m, offs_d, mask).to(ACC)
        if branch_bias_ptr is not None:
            branch += _load_row(branch_bias_ptr, offs_d, mask_d, ACC)
        if seed_ptr is not None:
            branch *= tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m, 0, BLOCK_D, P).to(ACC)
        if gamma_ptr is not None:
            branch *= _load_row(gamma_ptr, offs_d, mask_d, ACC)
        if row_scale_ptr is not None:
            branch *= _load_scales(row_scale_ptr, offs_m, mask_m, M, ROWS_PER_SCALE).to(ACC)
        stream = (s + branch).to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + offs_out, stream, mask=mask)
        s = stream.to(ACC)

    mean, rstd = tile.row_stats(s, mask, D, EPS)
    w = _load_row(w_ptr, offs_d, mask_d, ACC)
    b = _load_row(b_ptr, offs_d, mask_d, ACC)
    y = _scale_and_shift((s - mean[:, None]) * rstd[:, None], w, b)
    tl.store(y_ptr + offs_out, y.to(y_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M", "ROWS_PER_SCALE", "OFFSET"])
def _layer_norm_bwd_kernel(
    dy_ptr, ds_out_ptr, s_ptr, mean_ptr, rstd_ptr, w_ptr, b_ptr,
    branch_ptr, branch_bias_ptr, gamma_ptr, row_scale_ptr, seed_ptr,
    ds_ptr, dbranch_ptr, y_ptr, dw_ptr, db_ptr, dgamma_ptr, dbranch_bias_ptr,
    M, D, ROWS_PER_SCALE, OFFSET,
    stride_dym, stride_ds_outm, stride_sm, stride_branchm,
    P: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    num_programs = tl.num_programs(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    w = _load_row(w_ptr, offs_d, mask_d, ACC)
    b = _load_row(b_ptr, offs_d, mask_d, ACC)
    gamma = _load_row(gamma_ptr, offs_d, mask_d, ACC)
    branch_bias = _load_row(branch_bias_ptr, offs_d, mask_d, ACC)
    dw = tl.zeros([BLOCK_D], dtype=ACC)
    db = tl.zeros([BLOCK_D], dtype=ACC)
    dgamma = tl.zeros([BLOCK_D], dtype=ACC)
    dbranch_bias = tl.zeros([BLOCK_D], dtype=ACC)

    for start_m in range(pid * BLOCK_M, M, num_programs * BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_d[None, :]
        offs_out = offs_m[:, None] * D + offs_d[None, :]

        # All loads first: a load after a reduction would wait for memory once more.
        s = _load_rows(s_ptr, stride_sm, offs_m, offs_d, mask).to(ACC)
        dy = _load_rows(dy_ptr, stride_dym, offs_m, offs_d, mask).to(ACC)
        ds_out = _load_rows(ds_out_ptr, stride_ds_outm, offs_m, offs_d, mask)
        branch = _load_rows(branch_ptr, stride_branchm, offs_m, offs_d, mask)
        row_scale = _load_scales(row_scale_ptr, offs_m, mask_m, M, ROWS_PER_SCALE)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]

        x_hat = (s - mean) * rstd  # not masked: it only meets dy, which is
        if y_ptr is not None:
            tl.store(y_ptr + offs_out, _scale_and_shift(x_hat, w, b).to(y_ptr.dtype.element_ty), mask=mask)
        dw += tl.sum(dy * x_hat, axis=0)
        db += tl.sum(dy, axis=0)

        if w_ptr is not None:
            dy *= w
        c1 = tl.sum(dy, axis=1)[:, None] / D
        c2 = tl.sum(dy * x_hat, axis=1)[:, None] / D
        ds = rstd * (dy - c1 - x_hat * c2)
        if ds_out_ptr is not None:
            ds += ds_out.to(ACC)
        tl.store(ds_ptr + offs_out, ds.to(ds_ptr.dtype.element_ty), mask=mask)

        if row_scale_ptr is not None:
            ds *= row_scale.to(ACC)
        if seed_ptr is not None:
            ds *= tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m, 0, BLOCK_D, P).to(ACC)
        if dgamma_ptr is not None:
            branch = branch.to(ACC)
            if branch_bias_ptr is not None:
                branch += branch_bias
            dgamma += tl.sum(ds * branch, axis=0)
        if gamma_ptr is not None:
            ds *= gamma
        dbranch_bias += tl.sum(ds, axis=0)
        if dbranch_ptr is not None:
            tl.store(dbranch_ptr + offs_out, ds.to(dbranch_ptr.dtype.element_ty), mask=mask)

    _store_partial(dw_ptr, pid, dw, D, offs_d, mask_d)
    _store_partial(db_ptr, pid, db, D, offs_d, mask_d)
    _store_partial(dgamma_ptr, pid, dgamma, D, offs_d, mask_d)
    _store_partial(dbranch_bias_ptr, pid, dbranch_bias, D, offs_d, mask_d)


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@torch.library.custom_op("vit::layer_norm_fwd", mutates_args=())
def layer_norm_fwd(
    x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, gamma: Tensor | None, row_scale: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, eps: float, dropout_p: float, offset: int,
    out_dtype: torch.dtype, save: bool, recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(stream, y, mean, rstd); stream is empty without a branch, the statistics are empty unless ``save``.

    ``recompute`` is for autograd: y may be computed again, see `vit.kernels.recompute`.
    """
    stream, y, mean, rstd = _layer_norm_fwd_fake(
        x, branch, branch_bias, gamma, row_scale, weight, bias, seed, eps, dropout_p, offset, out_dtype, save
    )
    rows = runtime.rows(x)
    branch_rows = None if branch is None else runtime.rows(branch)
    M, D = rows.shape
    config = configs.layer_norm(runtime.arch(x.device), D)
    runtime.launch(
        _layer_norm_fwd_kernel, triton.cdiv(M, config.block_m),
        x_ptr=rows, branch_ptr=branch_rows, branch_bias_ptr=branch_bias, gamma_ptr=gamma, row_scale_ptr=row_scale,
        w_ptr=weight, b_ptr=bias, seed_ptr=seed, stream_ptr=None if branch is None else stream, y_ptr=y,
        mean_ptr=mean if save else None, rstd_ptr=rstd if save else None,
        M=M, D=D, ROWS_PER_SCALE=_rows_per_scale(M, row_scale), OFFSET=offset,
        stride_xm=rows.stride(0), stride_branchm=0 if branch is None else branch_rows.stride(0),
        EPS=eps, P=dropout_p, ACC=runtime.acc_type(x.dtype), BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return stream, y, mean, rstd


@layer_norm_fwd.register_fake
def _layer_norm_fwd_fake(
    x, branch, branch_bias, gamma, row_scale, weight, bias, seed, eps, dropout_p, offset, out_dtype, save,
    recompute=False,
):  # fmt: skip
    rows = math.prod(x.shape[:-1]) if save else 0  # numel() of a shape would make its symbols constants
    stats = x.new_empty(rows, dtype=_stat_dtype(x)), x.new_empty(rows, dtype=_stat_dtype(x))
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=out_dtype), *stats


@torch.library.custom_op("vit::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    dy: Tensor, ds_out: Tensor | None, s: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None, branch: Tensor | None, branch_bias: Tensor | None,
    gamma: Tensor | None, row_scale: Tensor | None, seed: Tensor | None, dropout_p: float, offset: int,
    need_dbranch: bool, need_y: bool, dw_dtype: torch.dtype | None, db_dtype: torch.dtype | None,
    dgamma_dtype: torch.dtype | None, dbranch_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ds, dbranch, y, dw, db, dgamma, dbranch_bias), those not needed empty; a sum is needed if it has a dtype.

    y has the dtype of dy, and needs bias. dgamma needs branch and branch_bias, if there are any.
    """
    ds, dbranch, y, *sums = _layer_norm_bwd_fake(
        dy, ds_out, s, mean, rstd, weight, bias, branch, branch_bias, gamma, row_scale, seed, dropout_p, offset,
        need_dbranch, need_y, dw_dtype, db_dtype, dgamma_dtype, dbranch_bias_dtype,
    )  # fmt: skip
    dy_rows, s_rows = runtime.rows(dy), runtime.rows(s)
    ds_out_rows = None if ds_out is None else runtime.rows(ds_out)
    branch_rows = runtime.rows(branch) if dgamma_dtype is not None else None
    M, D = s_rows.shape
    # Registers are short where dropout draws again, gradients are fp32, or a branch is read beside fp32 or y.
    crowded = seed is not None or dy.element_size() > 2
    crowded = crowded or (dgamma_dtype is not None and (need_y or s.element_size() > 2))
    config = configs.layer_norm(runtime.arch(s.device), D, True, crowded)
    num_programs = min(triton.cdiv(M, config.block_m), 2 * runtime.num_sms(s.device))
    partials = [mean.new_empty(num_programs, D) if out.numel() else None for out in sums]
    dw, db, dgamma, dbranch_bias = partials
    runtime.launch(
        _layer_norm_bwd_kernel, num_programs,
        dy_ptr=dy_rows, ds_out_ptr=ds_out_rows, s_ptr=s_rows, mean_ptr=mean, rstd_ptr=rstd,
        w_ptr=weight, b_ptr=bias if need_y else None,
        branch_ptr=branch_rows, branch_bias_ptr=None if dgamma is None else branch_bias,
        gamma_ptr=gamma, row_scale_ptr=row_scale, seed_ptr=seed,
        ds_ptr=ds, dbranch_ptr=dbranch if need_dbranch else None, y_ptr=y if need_y else None,
        dw_ptr=dw, db_ptr=db, dgamma_ptr=dgamma, dbranch_bias_ptr=dbranch_bias,
        M=M, D=D, ROWS_PER_SCALE=_rows_per_scale(M, row_scale), OFFSET=offset,
        stride_dym=dy_rows.stride(0), stride_ds_outm=0 if ds_out is None else ds_out_rows.stride(0),
        stride_sm=s_rows.stride(0), stride_branchm=0 if branch_rows is None else branch_rows.stride(0),
        P=dropout_p, ACC=runtime.acc_type(s.dtype), BLOCK_M=config.block_m, BLOCK_D=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    sum_partials([(p, out) for p, out in zip(partials, sums, strict=True) if p is not None])
    return ds, dbranch, y, *sums


@layer_norm_bwd.register_fake
def _layer_norm_bwd_fake(
    dy, ds_out, s, mean, rstd, weight, bias, branch, branch_bias, gamma, row_scale, seed, dropout_p, offset,
    need_dbranch, need_y, dw_dtype, db_dtype, dgamma_dtype, dbranch_bias_dtype,
):  # fmt: skip
    dtypes = dw_dtype, db_dtype, dgamma_dtype, dbranch_bias_dtype
    sums = (mean.new_empty(0 if dtype is None else s.shape[-1], dtype=dtype) for dtype in dtypes)
    rows = (dy.new_empty(s.shape if needed else 0) for needed in (need_dbranch, need_y))
    return s.new_empty(s.shape), *rows, *sums


def _rows_per_scale(M: int, row_scale: Tensor | None) -> int:
    return 1 if row_scale is None or row_scale.numel() == 0 else M // row_scale.numel()


def _setup_context(ctx, inputs, output):
    x, branch, branch_bias, gamma, row_scale, weight, bias, seed, eps, *rest = inputs
    ctx.dropout_p, ctx.offset, ctx.y_dtype, _, recompute = rest
    stream, y, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd, *([stream] if branch is None else []))
    s = x if branch is None else stream
    # Only the gradient of gamma reads the branch itself.
    kept = (branch, branch_bias) if gamma is not None and ctx.needs_input_grad[3] else (None, None)
    ctx.save_for_backward(s, mean, rstd, weight, *kept, gamma, row_scale, seed)
    if recompute:
        note_source(y, s, weight, bias, eps)
    sums = ((5, weight), (6, bias), (3, gamma), (2, branch_bias))
    ctx.dtypes = [t.dtype if ctx.needs_input_grad[i] else None for i, t in sums]
    ctx.branch_dtype = None if branch is None else branch.dtype


def _backward(ctx, ds_out, dy, _dmean, _drstd):
    s, mean, rstd, weight, branch, branch_bias, gamma, row_scale, seed = ctx.saved_tensors
    need_dx, need_dbranch = ctx.needs_input_grad[:2]
    if dy is None:
        dy = s.new_zeros(s.shape, dtype=ctx.y_dtype)
    # Without factors, and in one dtype, branch and residual have the same gradient, so one tensor is enough.
    differ = s.dtype is not ctx.branch_dtype or any(t is not None for t in (gamma, row_scale, seed))
    separate = need_dbranch and differ
    dw_dtype, db_dtype, dgamma_dtype, dbranch_bias_dtype = ctx.dtypes
    ds, dbranch, _, *sums = layer_norm_bwd(
        dy=dy, ds_out=ds_out if ctx.branch_dtype else None, s=s, mean=mean, rstd=rstd, weight=weight, bias=None,
        branch=branch, branch_bias=branch_bias, gamma=gamma, row_scale=row_scale, seed=seed,
        dropout_p=ctx.dropout_p, offset=ctx.offset, need_dbranch=separate, need_y=False,
        dw_dtype=dw_dtype, db_dtype=db_dtype, dgamma_dtype=dgamma_dtype, dbranch_bias_dtype=dbranch_bias_dtype,
    )  # fmt: skip
    dw, db, dgamma, dbranch_bias = (None if dtype is None else t for dtype, t in zip(ctx.dtypes, sums, strict=True))
    dbranch = dbranch if separate else ds
    return ds if need_dx else None, dbranch if need_dbranch else None, dbranch_bias, dgamma, None, dw, db, *[None] * 7


layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("layer_norm or residual_layer_norm", layer_norm_bwd)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al., 2016), statistics in fp32.

    Args:
        x: [..., D], any strides; fp32, fp16 or bf16.
        weight: [D] or None (ones).
        bias: [D] or None (zeros).
        eps: added to the biased variance; timm's ViT uses 1e-6.
        recompute: `linear` and `mlp` of the result do not save it. They save what the LayerNorm saves, and compute the
            result again in their backward.
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
        x=x, branch=None, branch_bias=None, gamma=None, row_scale=None, weight=weight, bias=bias, seed=None,
        eps=eps, dropout_p=0.0, offset=0, out_dtype=out_dtype, save=save, recompute=recompute,
    )  # fmt: skip
    return y


@autocasts("residual", "weight", "bias", "branch_bias", "gamma", "row_scale")
def residual_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    branch_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    recompute: bool = False,
    impl: str = "auto",
) -> ResidualLayerNorm:
    """Residual add and the LayerNorm that follows it, in one pass over the stream.

    ``stream = residual + row_scale · gamma · dropout(branch + branch_bias)``, ``y = layer_norm(stream)``.

    Args:
        residual: [B, ..., D], the residual stream; in the dtype of ``branch``, or fp32 with fp16 or bf16 branches.
        branch: like ``residual``, output of attention or MLP. Under `torch.autocast` it is taken in autocast's dtype.
        weight: [D] of the LayerNorm, or None; in the dtype of ``branch``, or fp32 with fp16 or bf16.
        bias: like ``weight``.
        eps: added to the biased variance.
        branch_bias: [D], bias of the linear layer that made ``branch``, or None: its product then needs no epilogue,
            and its gradient no pass of its own. In a dtype that ``weight`` may have.
        gamma: [D], LayerScale (Touvron et al., 2021), or None; in a dtype that ``weight`` may have.
        row_scale: [B], a factor per sample (stochastic depth), or None. Carries no gradient.
        dropout_p: dropout of the branch, as in `vit.kernels.dropout`.
        seed: as in `vit.kernels.dropout`.
        offset: as in `vit.kernels.dropout`.
        recompute: as in `layer_norm`.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        `ResidualLayerNorm` (stream, y): stream in the dtype of ``residual``, y in the dtype of ``branch``.

    Raises:
        ValueError: shapes that do not fit, negative eps, dropout_p outside [0, 1). TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "residual_layer_norm"
    vectors = {"weight": weight, "bias": bias, "branch_bias": branch_bias, "gamma": gamma}
    check_tensors(op, residual=residual, branch=branch, **vectors, row_scale=row_scale)
    _check(op, residual, weight, bias, eps)
    if branch.shape != residual.shape:
        shapes = f"{tuple(residual.shape)}, got {tuple(branch.shape)}"
        raise ValueError(f"{op}: branch must have the shape of residual {shapes}")
    half = branch.dtype in runtime.HALF
    if residual.dtype is not torch.float32 or not half:
        check_floating(op, residual=residual, branch=branch)
    check_floating(op, weight=weight, bias=bias)
    for name, t in vectors.items():
        if t is not None and t.dtype is not branch.dtype and (t.dtype is not torch.float32 or not half):
            check_floating(op, branch=branch, **{name: t})
    for name, t in (("branch_bias", branch_bias), ("gamma", gamma)):
        if t is not None and t.shape != residual.shape[-1:]:
            raise ValueError(f"{op}: {name} must have shape ({residual.shape[-1]},), got {tuple(t.shape)}")
    if row_scale is not None and row_scale.shape != residual.shape[:1]:
        raise ValueError(f"{op}: row_scale must have shape ({residual.shape[0]},), got {tuple(row_scale.shape)}")
    if row_scale is not None and row_scale.requires_grad:
        raise ValueError(f"{op}: row_scale carries no gradient; pass row_scale.detach()")
    seed, offset = seed_and_offset(op, dropout_p, seed, offset, residual)
    if not runtime.use_triton(op, impl, [residual, branch, *vectors.values(), row_scale], _too_wide(residual)):
        drop = {"dropout_p": dropout_p, "seed": seed, "offset": offset}
        factors = {"branch_bias": branch_bias, "gamma": gamma, "row_scale": row_scale}
        return reference.residual_layer_norm(residual, branch, weight, bias, eps, **factors, **drop)
    save = runtime.needs_grad(residual, branch, *vectors.values())
    weight, bias, branch_bias, gamma, row_scale = (
        None if t is None else t.contiguous() for t in (*vectors.values(), row_scale)
    )
    stream, y, _, _ = layer_norm_fwd(
        x=residual, branch=branch, branch_bias=branch_bias, gamma=gamma, row_scale=row_scale, weight=weight, bias=bias,
        seed=seed, eps=eps, dropout_p=dropout_p, offset=offset, out_dtype=branch.dtype, save=save,
        recompute=recompute,
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
