"""Patch embedding in one pass: gather patches, project, add bias and position embedding, put prefix tokens in front.

N = GRID_H · GRID_W patches of C × PH × PW pixels an image, K = C · PH · PW, R prefix tokens, T = R + N tokens.
    P[b·N + n, k] = image[b, c, row(n)·PH + i, col(n)·PW + j]   with k = (c·PH + i)·PW + j,  n = row·GRID_W + col
Forward:
    tokens[b, t] = prefix[t]          + pos[t]   for t < R
    tokens[b, t] = mask_token         + pos[t]   for masked patches
    tokens[b, t] = P[b·N + t − R]·Wᵀ + bias + pos[t]   otherwise
pos has T rows, or only the last N of them. P never exists in memory: the kernels turn (patch, k) into the address of a
pixel with the image's own four strides, so that any layout is read as it is. The pixels of masked patches are never
read. Saved: image if W requires grad, W if the image does, the mask.

Backward, from dy [B, T, D], with G the rows of dy that belong to patches, zero for masked ones:
    sums = Σ_b dy,  dpos = sums (its last N rows),  dprefix = sums[:R],  dbias = Σ G
    dmask_token = Σ of the rows of masked patches
    dW = Gᵀ·P: a program owns one tile of dW and one range of patches, walks it in order and writes a partial tile; the
        partials are then summed in one fixed order, together with what is left of the sums above
    dP = G·W, stored straight to the pixels: each belongs to exactly one patch, so these are plain stores
There are no atomics, so the result has the same bits every time. Products and sums accumulate in fp32 (fp64 for fp64
tensors, interpreted only). If tokens are fp32 and pixels have 16 bits, G is rounded to 16 bits for the products.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, reference, runtime, tile
from .autocast import autocasts
from .checks import check_floating
from .partial_sums import sum_partials


@triton.jit
def _split_rows(start, PER_IMAGE, BLOCK_M: tl.constexpr):
    """(image as int64, row inside it) of BLOCK_M rows. Only one division a tile is 64-bit; 32-bit ones are cheap."""
    image = start // PER_IMAGE
    row = (start - image * PER_IMAGE).to(tl.int32) + tl.arange(0, BLOCK_M)
    return (image + row // PER_IMAGE).to(tl.int64), row % PER_IMAGE


@triton.jit
def _patch_offsets(b, n, GRID_W, stride_b, stride_h, stride_w, PH: tl.constexpr, PW: tl.constexpr, ALIGN: tl.constexpr):
    """Where patch n of image b starts; b is int64."""
    row = (n // GRID_W).to(tl.int64)
    col = (n % GRID_W).to(tl.int64)
    return tl.multiple_of(b * stride_b + row * PH * stride_h + col * PW * stride_w, ALIGN)


@triton.jit
def _pixel_offsets(k, stride_c, stride_h, stride_w, PH: tl.constexpr, PW: tl.constexpr, ALIGN: tl.constexpr):
    """Where pixel k lies from the start of its patch."""
    k = k.to(tl.int32)  # divided as 32-bit, which is cheap
    c = (k // (PH * PW)).to(tl.int64)
    i = (k // PW % PH).to(tl.int64)
    j = (k % PW).to(tl.int64)
    return tl.multiple_of(c * stride_c + i * stride_h, ALIGN) + j * stride_w


@triton.jit(do_not_specialize=["M", "T", "NO_POS", "GRID_W"])
def _patch_embed_fwd_kernel(
    image_ptr, w_ptr, bias_ptr, pos_ptr, prefix_ptr, mask_token_ptr, masked_ptr, out_ptr,
    M, D, C, T, R, NO_POS, GRID_W,
    stride_b, stride_c, stride_h, stride_w,
    PH: tl.constexpr, PW: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    pid_m, pid_d = tile.grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP_M)
    K = C * PH * PW
    tl.assume(K > 0)  # else ptxas serialises the wgmma of fp32 tokens, which leave from the accumulator
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_m = offs_m < M
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    b, t = _split_rows(pid_m * BLOCK_M, T, BLOCK_M)
    is_patch = mask_m & (t >= R)
    if masked_ptr is not None:
        is_masked = tl.load(masked_ptr + b * (T - R) + (t - R), mask=is_patch, other=0)
        is_patch = is_patch & (is_masked == 0)
    offs_patch = _patch_offsets(b, t - R, GRID_W, stride_b, stride_h, stride_w, PH, PW, ALIGN)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        offs_pixel = _pixel_offsets(offs_k, stride_c, stride_h, stride_w, PH, PW, ALIGN)
        offs_image = offs_patch[:, None] + offs_pixel[None, :]
        patches = tl.load(image_ptr + offs_image, mask=is_patch[:, None] & mask_k[None, :], other=0.0)
        offs_w = offs_d[None, :] * K + offs_k[:, None]
        w = tl.load(w_ptr + offs_w, mask=mask_k[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_K, BLOCK_D]
        acc = tile.dot(patches, w, acc, PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)[None, :]
    if masked_ptr is not None:  # selects, so that NaN in the weight does not reach a masked patch
        mask_token = tl.load(mask_token_ptr + offs_d, mask=mask_d, other=0.0).to(ACC)
        acc = tl.where(is_masked[:, None] != 0, mask_token[None, :], acc)
    if prefix_ptr is not None:
        is_prefix = t[:, None] < R
        offs_prefix = t.to(tl.int64)[:, None] * D + offs_d[None, :]
        acc = tl.where(is_prefix, tl.load(prefix_ptr + offs_prefix, mask=mask & is_prefix, other=0.0).to(ACC), acc)
    if pos_ptr is not None:
        offs_pos = (t - NO_POS).to(tl.int64)[:, None] * D + offs_d[None, :]
        acc += tl.load(pos_ptr + offs_pos, mask=mask & (t >= NO_POS)[:, None], other=0.0).to(ACC)

    offs_out = offs_m[:, None] * D + offs_d[None, :]
    tl.store(out_ptr + offs_out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "N", "GRID_W", "ROWS_PER_SPLIT"])
def _patch_embed_dw_kernel(
    dy_ptr, image_ptr, masked_ptr, dw_ptr,
    M, D, C, N, R, GRID_W, ROWS_PER_SPLIT,
    stride_dyb, stride_dyt, stride_b, stride_c, stride_h, stride_w,
    PH: tl.constexpr, PW: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    K = C * PH * PW
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(D, BLOCK_D) * tiles_k
    split = pid // tiles
    offs_d = pid % tiles // tiles_k * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_d = offs_d < D
    mask_k = offs_k < K
    offs_pixel = _pixel_offsets(offs_k, stride_c, stride_h, stride_w, PH, PW, ALIGN)

    acc = tl.zeros([BLOCK_D, BLOCK_K], dtype=ACC)
    end_m = tl.minimum((split + 1) * ROWS_PER_SPLIT, M)
    for start_m in range(split * ROWS_PER_SPLIT, end_m, BLOCK_M):
        mask_m = tl.arange(0, BLOCK_M) < (end_m - start_m).to(tl.int32)
        b, n = _split_rows(start_m, N, BLOCK_M)
        if masked_ptr is not None:  # both factors become 0, because 0 times NaN is NaN
            mask_m = mask_m & (tl.load(masked_ptr + b * N + n, mask=mask_m, other=0) == 0)
        offs_dy = (b * stride_dyb + (R + n).to(tl.int64) * stride_dyt)[None, :] + offs_d[:, None]
        dy = tl.load(dy_ptr + offs_dy, mask=mask_m[None, :] & mask_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_M]
        offs_patch = _patch_offsets(b, n, GRID_W, stride_b, stride_h, stride_w, PH, PW, ALIGN)
        offs_image = offs_patch[:, None] + offs_pixel[None, :]
        patches = tl.load(image_ptr + offs_image, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        acc = tile.dot(dy, patches, acc, PRECISION)

    offs_dw = (split * D + offs_d)[:, None] * K + offs_k[None, :]
    tl.store(dw_ptr + offs_dw, acc, mask=mask_d[:, None] & mask_k[None, :])


@triton.jit(do_not_specialize=["M", "N", "GRID_W"])
def _patch_embed_dimage_kernel(
    dy_ptr, w_ptr, dimage_ptr,
    M, D, C, N, R, GRID_W,
    stride_dyb, stride_dyt, stride_b, stride_c, stride_h, stride_w,
    PH: tl.constexpr, PW: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    K = C * PH * PW
    pid_m, pid_k = tile.grouped_tile(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M) < M
    mask_k = offs_k < K
    b, n = _split_rows(pid_m * BLOCK_M, N, BLOCK_M)
    offs_row = b * stride_dyb + (R + n).to(tl.int64) * stride_dyt

    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=ACC)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        offs_dy = offs_row[:, None] + offs_d[None, :]
        dy = tl.load(dy_ptr + offs_dy, mask=mask_m[:, None] & mask_d[None, :], other=0.0)
        offs_w = offs_d.to(tl.int64)[:, None] * K + offs_k[None, :]
        w = tl.load(w_ptr + offs_w, mask=mask_d[:, None] & mask_k[None, :], other=0.0)
        acc = tile.dot(dy, w, acc, PRECISION)

    offs_patch = _patch_offsets(b, n, GRID_W, stride_b, stride_h, stride_w, PH, PW, ALIGN)
    offs_pixel = _pixel_offsets(offs_k, stride_c, stride_h, stride_w, PH, PW, ALIGN)
    offs_image = offs_patch[:, None] + offs_pixel[None, :]
    tl.store(dimage_ptr + offs_image, acc.to(dimage_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_k[None, :])


def _layout(image: Tensor, PH: int, PW: int) -> dict[str, int]:
    """Strides, patch size, and ALIGN: every row of a patch starts at a multiple of so many elements."""
    b, c, h, w = image.stride()
    align = math.gcd(8, b, c, h, PW * w)
    return {"stride_b": b, "stride_c": c, "stride_h": h, "stride_w": w, "PH": PH, "PW": PW, "ALIGN": align}


@torch.library.custom_op("vit::patch_embed_fwd", mutates_args=())
def patch_embed_fwd(
    image: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, prefix: Tensor | None,
    mask_token: Tensor | None, masked: Tensor | None,
) -> Tensor:  # fmt: skip
    """tokens [B, R + N, D] in the wider dtype. All but image and weight are contiguous."""
    out = _patch_embed_fwd_fake(image, weight, bias, pos_embed, prefix, mask_token, masked)
    weight = weight.contiguous()
    (B, T, D), (_, C, PH, PW) = out.shape, weight.shape
    precision = runtime.precision(image.dtype)
    config = configs.patch_embed(runtime.arch(image.device), "fwd", image.dtype, precision)
    runtime.launch(
        _patch_embed_fwd_kernel, triton.cdiv(B * T, config.block_m) * triton.cdiv(D, config.block_n),
        image_ptr=image, w_ptr=weight, bias_ptr=bias, pos_ptr=pos_embed, prefix_ptr=prefix,
        mask_token_ptr=mask_token, masked_ptr=masked, out_ptr=out,
        M=B * T, D=D, C=C, T=T, R=0 if prefix is None else prefix.shape[1],
        NO_POS=0 if pos_embed is None else T - pos_embed.shape[1], GRID_W=image.shape[3] // PW,
        **_layout(image, PH, PW), PRECISION=precision, ACC=runtime.acc_type(image.dtype),
        BLOCK_M=config.block_m, BLOCK_D=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


@patch_embed_fwd.register_fake
def _patch_embed_fwd_fake(image, weight, bias, pos_embed, prefix, mask_token, masked):
    B, _, img_h, img_w = image.shape
    D, _, PH, PW = weight.shape
    T = (img_h // PH) * (img_w // PW) + (0 if prefix is None else prefix.shape[1])
    added = next((t for t in (pos_embed, prefix, mask_token) if t is not None), image)
    return image.new_empty(B, T, D, dtype=torch.promote_types(image.dtype, added.dtype))


def _sums_over_images(
    dy: Tensor, g: Tensor, is_masked: Tensor | None, num_prefix: int,
    dbias: Tensor, dpos: Tensor, dprefix: Tensor, dmask_token: Tensor,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """What `sum_partials` takes to fill the gradients that are sums over the images, except empty ones.

    g [B, T, D] is dy with zeros in masked rows, is_masked [B, T, 1].
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    sums = of_masked = None
    # Contiguous, because the order of PyTorch's sum depends on the strides.
    if dbias.numel() or dpos.numel() or dprefix.numel():
        sums = g.contiguous().sum(dim=0, dtype=wide)  # [T, D]
    if is_masked is not None and (dpos.numel() or dmask_token.numel()):
        of_masked = dy.contiguous().masked_fill(~is_masked, 0.0).sum(dim=0, dtype=wide)  # [T, D]

    result = []
    if dbias.numel():
        result.append((sums[num_prefix:], dbias))
    if dprefix.numel():
        result.append((sums[None, :num_prefix], dprefix))
    if dpos.numel():
        result.append(((sums if of_masked is None else sums + of_masked)[None, -dpos.shape[1] :], dpos))
    if dmask_token.numel():
        result.append((of_masked, dmask_token))
    return result


def _dw_partials(g: Tensor, image: Tensor, masked: Tensor | None, patch_size: list[int], num_prefix: int) -> Tensor:
    """Partial sums [splits, D, C, PH, PW] of Gᵀ·P."""
    (B, T, D), C, (PH, PW) = g.shape, image.shape[1], patch_size
    N = T - num_prefix
    precision = runtime.precision(g.dtype)
    config = configs.patch_embed(runtime.arch(g.device), "dw", g.dtype, precision)
    tiles = triton.cdiv(D, config.block_n) * triton.cdiv(C * PH * PW, config.block_k)
    # About two programs a multiprocessor, each with at least one block of rows.
    blocks = triton.cdiv(B * N, config.block_m)
    splits = max(1, min(blocks, 2 * runtime.num_sms(g.device) // tiles))
    rows_per_split = max(1, triton.cdiv(blocks, splits)) * config.block_m
    splits = triton.cdiv(B * N, rows_per_split)
    partials = g.new_empty(splits, D, C, PH, PW, dtype=torch.promote_types(g.dtype, torch.float32))
    runtime.launch(
        _patch_embed_dw_kernel, splits * tiles,
        dy_ptr=g, image_ptr=image, masked_ptr=masked, dw_ptr=partials,
        M=B * N, D=D, C=C, N=N, R=num_prefix, GRID_W=image.shape[3] // PW, ROWS_PER_SPLIT=rows_per_split,
        stride_dyb=g.stride(0), stride_dyt=g.stride(1), **_layout(image, PH, PW),
        PRECISION=precision, ACC=runtime.acc_type(g.dtype),
        BLOCK_M=config.block_m, BLOCK_D=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partials


def _fill_dimage(g: Tensor, weight: Tensor, dimage: Tensor, num_prefix: int) -> None:
    """Writes G·W to the pixels of dimage."""
    (B, T, D), (_, C, PH, PW) = g.shape, weight.shape
    N, K = T - num_prefix, C * PH * PW
    precision = runtime.precision(g.dtype)
    config = configs.patch_embed(runtime.arch(g.device), "dimage", g.dtype, precision)
    runtime.launch(
        _patch_embed_dimage_kernel, triton.cdiv(B * N, config.block_m) * triton.cdiv(K, config.block_k),
        dy_ptr=g, w_ptr=weight.contiguous(), dimage_ptr=dimage,
        M=B * N, D=D, C=C, N=N, R=num_prefix, GRID_W=dimage.shape[3] // PW,
        stride_dyb=g.stride(0), stride_dyt=g.stride(1), **_layout(dimage, PH, PW),
        PRECISION=precision, ACC=runtime.acc_type(g.dtype),
        BLOCK_M=config.block_m, BLOCK_D=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@torch.library.custom_op("vit::patch_embed_bwd", mutates_args=())
def patch_embed_bwd(
    dy: Tensor, image: Tensor | None, weight: Tensor | None, masked: Tensor | None,
    image_shape: list[int], patch_size: list[int], dtype: torch.dtype, num_prefix: int, num_pos: int,
    need_dbias: bool, need_dprefix: bool, need_dmask_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dimage, dw, dbias, dpos, dprefix, dmask_token), those not needed empty.

    dimage is computed if weight is given, dw if image is given. The first three are in ``dtype``, the others in that of
    dy. num_pos is the number of rows of the position embedding, or 0 if it needs no gradient.
    """
    dimage, dw, dbias, dpos, dprefix, dmask_token = _patch_embed_bwd_fake(
        dy, image, weight, masked, image_shape, patch_size, dtype, num_prefix, num_pos,
        need_dbias, need_dprefix, need_dmask_token,
    )  # fmt: skip
    g, is_masked = dy, None
    if masked is not None:
        is_masked = torch.nn.functional.pad(masked, (num_prefix, 0)).unsqueeze(2)  # [B, T, 1]
        g = dy.masked_fill(is_masked, 0.0)
    sums = _sums_over_images(dy, g, is_masked, num_prefix, dbias, dpos, dprefix, dmask_token)
    g = g.to(dtype)
    if g.stride(2) != 1:
        g = g.contiguous()
    if image is not None:
        sums.append((_dw_partials(g, image, masked, patch_size, num_prefix), dw))
    sum_partials(sums)
    if weight is not None:
        _fill_dimage(g, weight, dimage, num_prefix)
    return dimage, dw, dbias, dpos, dprefix, dmask_token


@patch_embed_bwd.register_fake
def _patch_embed_bwd_fake(
    dy, image, weight, masked, image_shape, patch_size, dtype, num_prefix, num_pos,
    need_dbias, need_dprefix, need_dmask_token,
):  # fmt: skip
    D = dy.shape[2]
    return (
        dy.new_empty(0 if weight is None else image_shape, dtype=dtype),
        dy.new_empty(0 if image is None else (D, image_shape[1], *patch_size), dtype=dtype),
        dy.new_empty(D if need_dbias else 0, dtype=dtype),
        dy.new_empty((1, num_pos, D) if num_pos else 0),
        dy.new_empty((1, num_prefix, D) if need_dprefix else 0),
        dy.new_empty((1, 1, D) if need_dmask_token else 0),
    )


def _setup_context(ctx, inputs, output):
    image, weight, _, pos_embed, prefix, _, masked = inputs
    need_dimage, need_dw = ctx.needs_input_grad[:2]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image if need_dw else None, weight if need_dimage else None, masked)
    ctx.image_shape, ctx.patch_size, ctx.dtype = image.shape, weight.shape[2:], image.dtype
    ctx.num_prefix = 0 if prefix is None else prefix.shape[1]
    ctx.num_pos = 0 if pos_embed is None else pos_embed.shape[1]


def _backward(ctx, dy):
    if dy is None:
        return (None,) * 7
    image, weight, masked = ctx.saved_tensors
    needs = ctx.needs_input_grad[:6]
    _, _, need_dbias, need_dpos, need_dprefix, need_dmask_token = needs
    grads = patch_embed_bwd(
        dy=dy, image=image, weight=weight, masked=masked, image_shape=ctx.image_shape, patch_size=ctx.patch_size,
        dtype=ctx.dtype, num_prefix=ctx.num_prefix, num_pos=ctx.num_pos if need_dpos else 0,
        need_dbias=need_dbias, need_dprefix=need_dprefix, need_dmask_token=need_dmask_token,
    )  # fmt: skip
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), None


patch_embed_fwd.register_autograd(_backward, setup_context=_setup_context)
runtime.refuse_second_derivative("patch_embed", patch_embed_bwd)


@autocasts("pos_embed", "prefix", "mask_token")
def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix: Tensor | None = None,
    *,
    mask_token: Tensor | None = None,
    bool_masked_pos: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Images to tokens: the stem of a ViT (Dosovitskiy et al., 2021), without an intermediate in memory.

    Each patch is projected, or replaced by the mask token. Prefix tokens (class, registers) are put in front, and the
    position embedding is added.

    Args:
        image: [B, C, H, W], any strides (channels_last, a slice, an expanded tensor); fp32, fp16 or bf16. H and W are
            multiples of the patch. Under `torch.autocast` image, weight and bias are taken in autocast's dtype.
        weight: [D, C, PH, PW], of the equivalent convolution.
        bias: [D] or None.
        pos_embed: [1, R + N, D], or [1, N, D] if the prefix tokens get none, or None; N = (H / PH)·(W / PW).
        prefix: [1, R, D] or None.
        mask_token: [1, 1, D], for masked-image modelling; unused without ``bool_masked_pos``.
        bool_masked_pos: [B, N], bool: which patches the mask token replaces. Neither the result nor a gradient depends
            on their pixels, not even on NaN.
        impl: "auto", "fused", "triton" or "reference".

    pos_embed, prefix and mask_token share one dtype: that of ``image``, or fp32 with fp16 or bf16 images.

    Returns:
        [B, R + N, D], contiguous, in the wider of the dtypes; patches in row-major order of the grid.

    Raises:
        ValueError: shapes that do not fit, unknown impl. TypeError: dtypes that do not fit.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run.
    """
    op = "patch_embed"
    check_floating(op, image=image, weight=weight, bias=bias)
    check_floating(op, pos_embed=pos_embed, prefix=prefix, mask_token=mask_token)
    for name, t in (("pos_embed", pos_embed), ("prefix", prefix), ("mask_token", mask_token)):
        if t is not None and (t.dtype is not torch.float32 or image.dtype not in runtime.HALF):
            check_floating(op, image=image, **{name: t})
    _check(op, image, weight, bias, pos_embed, prefix)
    _check_mask(op, image, weight, mask_token, bool_masked_pos)
    if bool_masked_pos is None:
        mask_token = None
    optional = [bias, pos_embed, prefix, mask_token, bool_masked_pos]
    if not runtime.use_triton(op, impl, [image, weight, *optional]):
        return reference.patch_embed(
            image, weight, bias, pos_embed, prefix, mask_token=mask_token, bool_masked_pos=bool_masked_pos
        )
    return patch_embed_fwd(image, weight, *(None if t is None else t.contiguous() for t in optional))


def _check(
    op: str, image: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, prefix: Tensor | None
) -> None:
    if image.dim() != 4:
        raise ValueError(f"{op}: image must have shape [B, C, H, W], got {tuple(image.shape)}")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight must have shape [D, C, PH, PW], none of them 0, got {tuple(weight.shape)}")
    (_, channels, img_h, img_w), (D, C, PH, PW) = image.shape, weight.shape
    if channels != C:
        raise ValueError(f"{op}: image has {channels} channels, shape {tuple(image.shape)}, but weight takes {C}")
    if img_h % PH or img_w % PW or not img_h or not img_w:
        raise ValueError(
            f"{op}: image height {img_h} and width {img_w} must be positive multiples of the patch {PH} x {PW}; "
            "resize, crop or pad the image"
        )
    if bias is not None and bias.shape != (D,):
        raise ValueError(f"{op}: bias must have shape ({D},), got {tuple(bias.shape)}")
    if prefix is not None and (prefix.dim() != 3 or prefix.shape[0] != 1 or prefix.shape[2] != D):
        raise ValueError(f"{op}: prefix must have shape (1, R, {D}), got {tuple(prefix.shape)}")
    N, R = (img_h // PH) * (img_w // PW), 0 if prefix is None else prefix.shape[1]
    # With == and not `in`, which torch.compile answers wrongly where H and W are symbols.
    if pos_embed is not None and not (pos_embed.shape == (1, R + N, D) or pos_embed.shape == (1, N, D)):
        without = f" or, without the {R} prefix tokens, (1, {N}, {D})" if R else ""
        raise ValueError(
            f"{op}: pos_embed must have shape (1, {R + N}, {D}){without} for {N} patches, got {tuple(pos_embed.shape)}"
        )


def _check_mask(op: str, image: Tensor, weight: Tensor, mask_token: Tensor | None, masked: Tensor | None) -> None:
    D, _, PH, PW = weight.shape
    if mask_token is not None and mask_token.shape != (1, 1, D):
        raise ValueError(f"{op}: mask_token must have shape (1, 1, {D}), got {tuple(mask_token.shape)}")
    if masked is None:
        return
    if mask_token is None:
        raise ValueError(f"{op}: bool_masked_pos needs a mask_token of shape (1, 1, {D})")
    if not isinstance(masked, Tensor) or masked.dtype is not torch.bool:
        got = masked.dtype if isinstance(masked, Tensor) else type(masked).__name__
        raise TypeError(f"{op}: bool_masked_pos must be a bool tensor, got {got}; convert it with .bool()")
    B, rows, columns = image.shape[0], image.shape[2] // PH, image.shape[3] // PW
    if masked.shape != (B, rows * columns):
        raise ValueError(
            f"{op}: bool_masked_pos must have shape ({B}, {rows * columns}), a value for each patch of the {rows} x "
            f"{columns} grid and none for prefix tokens, got {tuple(masked.shape)}"
        )
