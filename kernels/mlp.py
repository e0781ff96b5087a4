"""MLP block fc2(dropout(gelu(fc1(x)))) as one autograd op, on the GEMM of `linear`.

Forward:  h = x·W1ᵀ + b1 and a = k · gelu(h) from one epilogue,  y = a·W2ᵀ + b2
Backward: dh = (dy·W2) · k · gelu'(h), a = k · gelu(h) again and db1 from one epilogue,
    dx = dh·W1,  dW1 = dhᵀ·x,  db1 = Σ_rows dh,  dW2 = dyᵀ·a,  db2 = Σ_rows dy
Saved: x or its source (`vit.kernels.recompute`), h, W1, W2 and the seed, each only if a gradient needs it. a, which is
as wide as h, and k, the dropout scale, are computed again. Without gradients h is not written at all.

Our kernel fuses bias, GELU and dropout after fc1 into its product, and their derivative into the gradient of fc2's
input. The other products are plain: cuBLAS, or our kernel with ``impl="triton"`` (`configs.gemm_provider`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, runtime
from .autocast import autocasts
from .checks import check_activation, check_floating, check_layer
from .dropout import seed_and_offset
from .linear import activate, column_sum, gemm, matmul, reshaped, rows
from .recompute import again, source_of


@torch.library.custom_op("vit::mlp_fwd", mutates_args=())
def mlp_fwd(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None,
    seed: Tensor | None, activation: str, dropout_p: float, offset: int, save: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, h); h is empty unless ``save``."""
    drop = {"seed": seed, "dropout_p": dropout_p, "offset": offset}
    postact, preact, _ = gemm(rows(x), fc1_weight, fc1_bias, activation, trans_b=True, aux=save, **drop)
    y = matmul(postact, fc2_weight, fc2_bias, trans_b=True, impl=impl)
    batch = x.shape[:-1]
    y = reshaped(y, (*batch, fc2_weight.shape[0]))
    return y, reshaped(preact, (*batch, fc1_weight.shape[0])) if save else preact


@mlp_fwd.register_fake
def _mlp_fwd_fake(
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, seed, activation, dropout_p, offset, save, impl
):  # fmt: skip
    batch = x.shape[:-1]
    return x.new_empty(*batch, fc2_weight.shape[0]), x.new_empty((*batch, fc1_weight.shape[0]) if save else 0)


@torch.library.custom_op("vit::mlp_bwd", mutates_args=())
def mlp_bwd(
    dy: Tensor, x: Tensor | None, preact: Tensor | None, fc1_weight: Tensor | None, fc2_weight: Tensor | None,
    seed: Tensor | None, activation: str, dropout_p: float, offset: int,
    need_db1: bool, need_dw2: bool, need_db2: bool, impl: str,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw1, db1, dw2, db2), those not needed empty.

    dx is computed if fc1_weight is given, dw1 if x is given. These two and db1 need fc2_weight. With ``norm_eps`` the
    MLP's input was the LayerNorm of x.
    """
    dx, dw1, db1, dw2, db2 = (dy.new_empty(0) for _ in range(5))
    dy_rows = rows(dy).contiguous()
    postact = dpreact = None
    drop = {"seed": seed, "dropout_p": dropout_p, "offset": offset}
    if fc2_weight is not None:
        h, outputs = rows(preact).contiguous(), {"aux": need_dw2, "sums": need_db1}
        dpreact, postact, db1 = gemm(dy_rows, fc2_weight, None, activation, h, **outputs, **drop)
    elif need_dw2:  # nothing before fc2 requires grad
        postact = activate(rows(preact).contiguous(), activation, **drop)
    if fc1_weight is not None:
        dx = reshaped(matmul(dpreact, fc1_weight, impl=impl), (*dy.shape[:-1], fc1_weight.shape[1]))
    if x is not None:
        x = again(x, norm_weight, norm_bias, norm_eps, dy.dtype)
        dw1 = matmul(dpreact, rows(x), trans_a=True, impl=impl)
    if need_dw2:
        dw2 = matmul(dy_rows, postact, trans_a=True, impl=impl)
    if need_db2:
        db2 = column_sum(dy_rows)
    return dx, dw1, db1, dw2, db2


@mlp_bwd.register_fake
def _mlp_bwd_fake(
    dy, x, preact, fc1_weight, fc2_weight, seed, activation, dropout_p, offset, need_db1, need_dw2, need_db2, impl,
    norm_weight=None, norm_bias=None, norm_eps=None,
):  # fmt: skip
    out_width, hidden = dy.shape[-1], 0 if preact is None else preact.shape[-1]
    return (
        dy.new_empty(0 if fc1_weight is None else (*dy.shape[:-1], fc1_weight.shape[1])),
        dy.new_empty(0 if x is None else (hidden, x.shape[-1])),
        dy.new_empty(hidden if need_db1 else 0),
        dy.new_empty((out_width, hidden) if need_dw2 else 0),
        dy.new_empty(out_width if need_db2 else 0),
    )


def _setup_context(ctx, inputs, output):
    x, fc1_weight, _, fc2_weight, _, seed, ctx.activation, ctx.dropout_p, ctx.offset, _, ctx.impl = inputs
    _, preact = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(preact)
    need_dx, need_dw1, need_db1, need_dw2 = ctx.needs_input_grad[:4]
    need_dpreact = need_dx or need_dw1 or need_db1
    x, *norm, ctx.norm_eps = source_of(x) if need_dw1 else (None,) * 4
    ctx.save_for_backward(
        x,
        preact if need_dpreact or need_dw2 else None,
        fc1_weight if need_dx else None,
        fc2_weight if need_dpreact else None,
        seed if need_dpreact or need_dw2 else None,
        *norm,
    )


def _backward(ctx, dy, _dpreact):
    if dy is None:
        return (None,) * 11
    x, preact, fc1_weight, fc2_weight, seed, norm_weight, norm_bias = ctx.saved_tensors
    needs = ctx.needs_input_grad[:5]
    _, _, need_db1, need_dw2, need_db2 = needs
    grads = mlp_bwd(
        dy=dy, x=x, preact=preact, fc1_weight=fc1_weight, fc2_weight=fc2_weight, seed=seed,
        activation=ctx.activation, dropout_p=ctx.dropout_p, offset=ctx.offset,
        need_db1=need_db1, need_dw2=need_dw2, need_db2=need_db2, impl=ctx.impl,
        norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=ctx.norm_eps,
    )  # fmt: skip
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *[None] * 6


mlp_fwd.register_autograd(_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("mlp", mlp_bwd)


@autocasts()
def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str = "gelu",
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """The MLP of a ViT block: dropout(gelu(x @ fc1_weightᵀ + fc1_bias)) @ fc2_weightᵀ + fc2_bias.

    Args:
        x: [..., D], any strides; fp32, fp16 or bf16.
        fc1_weight: [HIDDEN, D].
        fc1_bias: [HIDDEN] or None.
        fc2_weight: [OUT, HIDDEN].
        fc2_bias: [OUT] or None.
        activation: "gelu" (exact, by erf), "gelu_tanh" or "quick_gelu" (x·σ(1.702·x), as in OpenAI's CLIP).
        dropout_p: dropout of the hidden units, as in `vit.kernels.dropout`.
        seed: as in `vit.kernels.dropout`.
        offset: as in `vit.kernels.dropout`.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        [..., OUT] in the dtype of ``x``, contiguous. `torch.autocast` casts the arguments first.

    Raises:
        ValueError: shapes that do not fit, unknown activation or impl, dropout_p outside [0, 1).
        TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    params = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    check_floating("mlp", x=x, **params)
    if x.dim() == 0:
        raise ValueError("mlp: x must have shape [..., D], got a scalar")
    check_layer("mlp", "the last dimension of x", x.shape[-1], fc1_weight, fc1_bias, "fc1_")
    check_layer("mlp", "the rows of fc1_weight", fc1_weight.shape[0], fc2_weight, fc2_bias, "fc2_")
    check_activation("mlp", activation)
    seed, offset = seed_and_offset("mlp", dropout_p, seed, offset, x)
    if not runtime.use_triton("mlp", impl, [x, *params.values()]):
        return reference.mlp(x, *params.values(), activation, dropout_p=dropout_p, seed=seed, offset=offset)
    fc1_bias, fc2_bias = (None if b is None else b.contiguous() for b in (fc1_bias, fc2_bias))
    # The gradient of fc2_bias alone needs no pre-activation.
    save = runtime.needs_grad(x, fc1_weight, fc1_bias, fc2_weight)
    y, _ = mlp_fwd(
        x=x, fc1_weight=fc1_weight, fc1_bias=fc1_bias, fc2_weight=fc2_weight, fc2_bias=fc2_bias, seed=seed,
        activation=activation, dropout_p=dropout_p, offset=offset, save=save, impl=impl,
    )  # fmt: skip
    return y
