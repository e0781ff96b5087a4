"""Linear layer with an optional GELU, and the one GEMM kernel that `linear` and `mlp` run on.

The kernel computes out [M, N] = epilogue(op(A) [M, K] @ op(B) [K, N]) with op the identity or the transpose, so that
the forward (x·Wᵀ), the gradient of the input (dy·W) and that of the weight (dyᵀ·x) are the same code. Epilogues, in
the accumulator's type:
    acc + bias
    h = acc + bias, out = gelu(h), and h itself as a second output if the backward will need it
    out = acc · gelu'(h), gelu(h) as a second output, so that the forward need not save it, and for the gradient of the
        bias Σ_rows of out: a row of partial sums from each row of tiles, which one sum adds
With a seed, dropout follows the activation: gelu and gelu' are multiplied by the element's `tile.dropout_scale`.

Forward:  y = x·Wᵀ + b, or h = x·Wᵀ + b and y = gelu(h).
Backward: dh = dy (with an activation dy · gelu'(h): no product precedes it, so the epilogue is a pass of its own),
    dx = dh·W,  dW = dhᵀ·x,  db = Σ_rows dh
Saved: x, or its source (`vit.kernels.recompute`), if W requires grad, W if x does, h with an activation.

Every sum has one fixed order: a program walks all of K, from front to back, and db is one reduction over rows. Operands
are read through tensor descriptors, which read zeros beyond the edges.

No batch compiles a kernel again: its size is M or K, and Triton does not specialise on these two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, reference, runtime, tile
from .autocast import autocasts
from .checks import check_activation, check_floating, check_layer
from .recompute import again, has_source, source_of


@triton.jit
def _describe(
    x, stride, ROWS, COLS, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TRANS: tl.constexpr, ALIGN: tl.constexpr
):
    """The descriptor of an operand [ROWS, COLS], stored transposed if TRANS. Without a stride x is a descriptor.

    ALIGN divides the length of a stored row. The compiler has to know it: where it makes plain loads of a descriptor,
    they are wide only then.
    """
    if stride is None:
        return x
    elif TRANS:
        return tl.make_tensor_descriptor(x, [COLS, ROWS // ALIGN * ALIGN], [stride, 1], [BLOCK_COLS, BLOCK_ROWS])
    else:
        return tl.make_tensor_descriptor(x, [ROWS, COLS // ALIGN * ALIGN], [stride, 1], [BLOCK_ROWS, BLOCK_COLS])


@triton.jit
def _load(desc, row, col, TRANS: tl.constexpr):
    return desc.load([col, row]).T if TRANS else desc.load([row, col])


@triton.jit(do_not_specialize=["M", "K", "OFFSET"])  # one kernel for all batches and all blocks of a network
def _gemm_kernel(
    a_ptr, b_ptr, bias_ptr, preact_ptr, seed_ptr, out_ptr, aux_ptr, sum_ptr,
    M, N, K, OFFSET,
    stride_a, stride_b,
    TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, ALIGN_A: tl.constexpr, ALIGN_B: tl.constexpr,
    ACTIVATION: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr, CHEAP: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile.grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    start_m = (pid_m.to(tl.int64) * BLOCK_M).to(tl.int32)  # descriptors take 32-bit coordinates, and `gemm` checks them
    start_n = (pid_n.to(tl.int64) * BLOCK_N).to(tl.int32)

    a_desc = _describe(a_ptr, stride_a, M, K, BLOCK_M, BLOCK_K, TRANS_A, ALIGN_A)
    b_desc = _describe(b_ptr, stride_b, K, N, BLOCK_K, BLOCK_N, TRANS_B, ALIGN_B)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start_k in tl.range(0, K, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
        a = _load(a_desc, start_m, start_k, TRANS_A)
        b = _load(b_desc, start_k, start_n, TRANS_B)
        acc = tile.dot(a, b, acc, PRECISION)

    # Some of the columns at a time, because a whole tile and GELU's temporaries spill registers.
    pieces = (acc,)
    if SPLIT >= 2:
        pieces = _halves(acc)
    if SPLIT == 4:
        pieces = _halves(pieces[0]) + _halves(pieces[1])
    for i in tl.static_range(SPLIT):
        start_piece = start_n + i * (BLOCK_N // SPLIT)
        offs_n = start_piece + tl.arange(0, BLOCK_N // SPLIT)
        if sum_ptr is None:
            _epilogue(
                pieces[i], start_m, start_piece, tl.arange(0, BLOCK_M), offs_n,
                bias_ptr, preact_ptr, seed_ptr, out_ptr, aux_ptr, M, N, OFFSET, ACTIVATION, P, CHEAP,
            )  # fmt: skip
        else:
            # Half of the rows at a time. A thread has rows r and r + 8 of the product, so nothing moves, and it adds
            # its own rows first. Rows beyond M are zero, because their operands read zeros.
            halves = pieces[i].reshape(BLOCK_M // 16, 2, 8, BLOCK_N // SPLIT).permute(0, 2, 3, 1).split()
            offs_m = tl.arange(0, BLOCK_M // 2) // 8 * 16 + tl.arange(0, BLOCK_M // 2) % 8
            sums = ()
            for j in tl.static_range(2):
                half = _epilogue(
                    halves[j].reshape(BLOCK_M // 2, BLOCK_N // SPLIT), start_m, start_piece, offs_m + 8 * j, offs_n,
                    bias_ptr, preact_ptr, seed_ptr, out_ptr, aux_ptr, M, N, OFFSET, ACTIVATION, P, CHEAP,
                )  # fmt: skip
                sums += (tl.sum(half.reshape(2, BLOCK_M // 4, BLOCK_N // SPLIT), axis=0),)
            tl.store(sum_ptr + pid_m.to(tl.int64) * N + offs_n, tl.sum(sums[0] + sums[1], axis=0), mask=offs_n < N)


@triton.jit
def _halves(x):
    """The left and the right half of the columns."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _epilogue(
    acc, start_m, start_n, offs_m, offs_n,
    bias_ptr, preact_ptr, seed_ptr, out_ptr, aux_ptr,
    M, N, OFFSET,
    ACTIVATION: tl.constexpr, P: tl.constexpr, CHEAP: tl.constexpr,
):  # fmt: skip
    """Bias, activation and dropout for the rows start_m + offs_m and the columns offs_n from start_n, and the stores.

    CHEAP: GELU uses an approximation of erf, see `tile.gelu_and_grad`. None: only for results of 16 bits.
    """
    first = start_m.to(tl.int64) * N  # 64-bit; the offsets from there on are not, which halves their registers
    mask_n = offs_n < N
    mask = (start_m + offs_m < M)[:, None] & mask_n[None, :]
    offs_out = offs_m[:, None] * N + offs_n[None, :]

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
    if ACTIVATION is not None:
        NO_ERF: tl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 16 if CHEAP is None else CHEAP
        if preact_ptr is not None:
            preact = tl.load(preact_ptr + first + offs_out, mask=mask, other=0.0).to(acc.dtype)
            aux, factor = tile.gelu_and_grad(preact, ACTIVATION, NO_ERF)
            acc *= factor
        else:
            aux = acc
            acc, _ = tile.gelu_and_grad(acc, ACTIVATION, NO_ERF)
        if seed_ptr is not None:
            rows = (start_m + offs_m).to(tl.int64)
            drop_scale = tile.dropout_scale(tl.load(seed_ptr), OFFSET, rows, start_n, acc.shape[1], P).to(acc.dtype)
            acc *= drop_scale
            if preact_ptr is not None:
                aux *= drop_scale
        if aux_ptr is not None:
            tl.store(aux_ptr + first + offs_out, aux.to(aux_ptr.dtype.element_ty), mask=mask)

    tl.store(out_ptr + first + offs_out, acc.to(out_ptr.dtype.element_ty), mask=mask)
    return acc


@triton.jit(do_not_specialize=["M", "OFFSET"])
def _activation_kernel(
    x_ptr, preact_ptr, seed_ptr, out_ptr,
    M, N, OFFSET,
    ACTIVATION: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The epilogue alone, on a matrix in memory."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid_m, pid_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    start_m, start_n = (pid_m.to(tl.int64) * BLOCK_M).to(tl.int32), (pid_n.to(tl.int64) * BLOCK_N).to(tl.int32)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask = (start_m + offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]

    x = tl.load(x_ptr + start_m.to(tl.int64) * N + offs, mask=mask, other=0.0).to(ACC)
    _epilogue(
        x, start_m, start_n, offs_m, offs_n,
        None, preact_ptr, seed_ptr, out_ptr, None, M, N, OFFSET, ACTIVATION, P, None,
    )  # fmt: skip


def _operand(x: Tensor) -> Tensor:
    """The matrix x if a tensor descriptor can describe it, else a copy of x.

    A descriptor needs contiguous rows, and a base address and row stride that are multiples of 16 bytes. Other strides,
    an odd offset or an odd width (10 classes, 588 pixels a patch) need the copy. Its rows are padded, and nothing reads
    the padding.
    """
    per_16_bytes = 16 // x.element_size()
    height, width = x.shape
    if x.stride(1) == 1 and x.stride(0) >= width and x.stride(0) % per_16_bytes == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_empty(height, triton.cdiv(width, per_16_bytes) * per_16_bytes)[:, :width]
    return padded.copy_(x)


def gemm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    preact: Tensor | None = None,
    *,
    trans_a: bool = False,
    trans_b: bool = False,
    aux: bool = False,
    sums: bool = False,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel and returns (out, aux, sums). aux and sums are empty unless arguments ask for them.

    a is [M, K], or [K, M] with ``trans_a``; b is [K, N], or [N, K] with ``trans_b``; any strides. With ``activation``
    out is gelu(acc + bias) and aux is acc + bias. With ``preact`` [M, N] as well, out is acc · gelu'(preact), aux is
    gelu(preact), and sums [N] are Σ_rows of out before it is rounded. bias and preact are contiguous. With ``seed``
    dropout follows the gelu, see `vit.kernels.mlp`.
    """
    M, K = a.shape[::-1] if trans_a else a.shape
    N = b.shape[0] if trans_b else b.shape[1]
    arch, precision = runtime.arch(a.device), runtime.precision(a.dtype)
    config = configs.gemm(arch, a.dtype, precision, seed is not None and preact is None)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if max(M + block_m, K + block_k, N * block_m + block_n) >= 2**31:
        raise ValueError(f"a product of [{M}, {K}] and [{K}, {N}] has a side too long for 32-bit tile coordinates")
    out, aux_out = a.new_empty(M, N), a.new_empty((M, N) if aux else 0)
    tiles_m, partial = triton.cdiv(M, block_m), None
    if sums:  # of each row of tiles
        partial = a.new_empty(tiles_m, N, dtype=torch.promote_types(a.dtype, torch.float32))
    if M == 0 or N == 0:
        return out, aux_out, a.new_zeros(N if sums else 0)
    if K == 0:  # a descriptor has no empty dimension; a product over one zero is as good
        K, a, b = 1, a.new_zeros((1, M) if trans_a else (M, 1)), b.new_zeros((N, 1) if trans_b else (1, N))
    a, b = _operand(a), _operand(b)
    hopper = None
    if config.pingpong and not trans_a and seed is None and config.cheap is not False:
        from . import gemm_pingpong as hopper  # its language is experimental, so that only who asks for it imports it

    if hopper is not None and hopper.takes(arch, out, preact):
        hopper.launch(
            a, b, bias, activation, preact, out, aux_out if aux else None, partial, trans_b=trans_b, config=config
        )
    else:
        # The host makes the descriptors, except for warps that split a tile: the compiler narrows only a kernel's own.
        host = configs.has_tma(arch) and not config.warp_specialize
        align_a, align_b = (16 if not host and x.shape[1] % 16 == 0 else 1 for x in (a, b))
        if config.warp_specialize:
            runtime.allow_descriptors(a.device)
        runtime.launch(
            _gemm_kernel, tiles_m * triton.cdiv(N, block_n),
            a_ptr=TensorDescriptor.from_tensor(a, [block_k, block_m] if trans_a else [block_m, block_k]) if host else a,
            b_ptr=TensorDescriptor.from_tensor(b, [block_n, block_k] if trans_b else [block_k, block_n]) if host else b,
            bias_ptr=bias, preact_ptr=preact, seed_ptr=seed, out_ptr=out, aux_ptr=aux_out if aux else None,
            sum_ptr=partial,
            M=M, N=N, K=K, OFFSET=offset,
            stride_a=None if host else a.stride(0), stride_b=None if host else b.stride(0),
            TRANS_A=trans_a, TRANS_B=trans_b, ALIGN_A=align_a, ALIGN_B=align_b,
            ACTIVATION=activation, P=dropout_p, PRECISION=precision, ACC=runtime.acc_type(a.dtype),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=config.group_m,
            SPLIT=config.split, CHEAP=config.cheap, WARP_SPECIALIZE=config.warp_specialize,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, aux_out, partial.sum(dim=0).to(a.dtype) if sums else a.new_empty(0)


def activate(
    x: Tensor, activation: str, preact: Tensor | None = None,
    *, seed: Tensor | None = None, dropout_p: float = 0.0, offset: int = 0,
) -> Tensor:  # fmt: skip
    """gelu(x), or x · gelu'(preact), then dropout as in `gemm`, rounded once; contiguous matrices, long as `gemm`'s."""
    out, (M, N) = torch.empty_like(x), x.shape
    config = configs.elementwise(runtime.arch(x.device), N)
    runtime.launch(
        _activation_kernel, triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n),
        x_ptr=x, preact_ptr=preact, seed_ptr=seed, out_ptr=out, M=M, N=N, OFFSET=offset,
        ACTIVATION=activation, P=dropout_p, ACC=runtime.acc_type(x.dtype),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, trans_a: bool = False, trans_b: bool = False, impl: str
) -> Tensor:
    """A plain product, plus bias: by our kernel or by cuBLAS, as `configs.gemm_provider` says. Shapes as for `gemm`."""
    if configs.gemm_provider(impl) == "triton":
        return gemm(a, b, bias, trans_a=trans_a, trans_b=trans_b)[0]
    a, b = a.t() if trans_a else a, b.t() if trans_b else b
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def rows(x: Tensor) -> Tensor:
    """x [..., D] as a matrix [M, D], also where M or D is 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x with another shape, but not a view: autograd forbids in-place changes of a view that a custom op returned."""
    return torch.ops.aten._unsafe_view(x, shape)


def column_sum(dy: Tensor) -> Tensor:
    """Σ_rows of a contiguous matrix in one fixed order. PyTorch adds numbers of 16 bits in fp32 and rounds once."""
    return dy.sum(dim=0)


@torch.library.custom_op("vit::linear_fwd", mutates_args=())
def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, save: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """(y, h); h is empty unless there is an activation and ``save``."""
    shape = (*x.shape[:-1], weight.shape[0])
    if activation is None:
        return reshaped(matmul(rows(x), weight, bias, trans_b=True, impl=impl), shape), x.new_empty(0)
    y, preact, _ = gemm(rows(x), weight, bias, activation, trans_b=True, aux=save)
    return reshaped(y, shape), reshaped(preact, shape) if save else preact


@linear_fwd.register_fake
def _linear_fwd_fake(x, weight, bias, activation, save, impl):
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if activation is not None and save else 0)


@torch.library.custom_op("vit::linear_bwd", mutates_args=())
def linear_bwd(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, preact: Tensor | None,
    activation: str | None, need_db: bool, impl: str,
    norm_weight: Tensor | None = None, norm_bias: Tensor | None = None, norm_eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw, db). dx is empty without weight, dw without x, db without ``need_db``.

    With ``norm_eps`` the layer's input was the LayerNorm of x.
    """
    dh = rows(dy).contiguous()
    if activation is not None:
        dh = activate(dh, activation, rows(preact).contiguous())
    dx = dy.new_empty(0)
    if weight is not None:
        dx = reshaped(matmul(dh, weight, impl=impl), (*dy.shape[:-1], weight.shape[1]))
    dw = dy.new_empty(0)
    if x is not None:
        dw = matmul(dh, rows(again(x, norm_weight, norm_bias, norm_eps, dy.dtype)), trans_a=True, impl=impl)
    return dx, dw, column_sum(dh) if need_db else dy.new_empty(0)


@linear_bwd.register_fake
def _linear_bwd_fake(
    dy, x, weight, preact, activation, need_db, impl, norm_weight=None, norm_bias=None, norm_eps=None
):  # fmt: skip
    N = dy.shape[-1]
    return (
        dy.new_empty(0 if weight is None else (*dy.shape[:-1], weight.shape[1])),
        dy.new_empty(0 if x is None else (N, x.shape[-1])),
        dy.new_empty(N if need_db else 0),
    )


def _setup_context(ctx, inputs, output):
    x, weight, _, activation, _, impl = inputs
    _, preact = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(preact)
    need_dx, need_dw = ctx.needs_input_grad[:2]
    x, *norm, ctx.norm_eps = source_of(x) if need_dw else (None,) * 4
    ctx.save_for_backward(x, weight if need_dx else None, None if activation is None else preact, *norm)
    ctx.activation, ctx.impl = activation, impl


def _backward(ctx, dy, _dpreact):
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    if dy is None:
        return (None,) * 6
    x, weight, preact, norm_weight, norm_bias = ctx.saved_tensors
    dx, dw, db = linear_bwd(
        dy=dy, x=x, weight=weight, preact=preact, activation=ctx.activation, need_db=need_db, impl=ctx.impl,
        norm_weight=norm_weight, norm_bias=norm_bias, norm_eps=ctx.norm_eps,
    )  # fmt: skip
    return dx if need_dx else None, dw if need_dw else None, db if need_db else None, None, None, None


linear_fwd.register_autograd(_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("linear", linear_bwd)


@autocasts()
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, *, impl: str = "auto"
) -> Tensor:
    """x @ weightᵀ + bias, then an optional GELU in the product's epilogue.

    With ``impl="auto"`` and no activation this is `torch.nn.functional.linear`: cuBLAS. For the result of a LayerNorm
    with ``recompute`` it is the same product, but saves less (not in code that `torch.compile` traces).

    Args:
        x: [..., K], any strides; fp32, fp16 or bf16. fp32 products are IEEE unless PyTorch's matmuls may use tf32.
        weight: [N, K].
        bias: [N] or None.
        activation: None, "gelu" (exact, by erf), "gelu_tanh" or "quick_gelu" (x·σ(1.702·x), as in OpenAI's CLIP).
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        [..., N] in the dtype of ``x``, contiguous. `torch.autocast` casts the arguments first.

    Raises:
        ValueError: shapes that do not fit, unknown activation or impl. TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    check_floating("linear", x=x, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError("linear: x must have shape [..., K], got a scalar")
    check_layer("linear", "the last dimension of x", x.shape[-1], weight, bias)
    if activation is not None:
        check_activation("linear", activation)
    cublas = activation is None and configs.gemm_provider(impl) == "cublas"
    path = runtime.choose_path("linear", impl, [x, weight, bias], cublas=cublas)
    if path != "triton" and not (path == "cublas" and has_source(x)):
        return reference.linear(x, weight, bias, activation)
    bias = None if bias is None else bias.contiguous()
    save = runtime.needs_grad(x, weight, bias)
    return linear_fwd(x, weight, bias, activation, save, impl)[0]
