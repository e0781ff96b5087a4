"""Attention is as exact as its mirror: the same formulas in PyTorch, tile by tile, with the roundings of the kernels.

Eager attention rounds logits and probabilities to 16 bits, so a fused kernel can lose accuracy and still be better than
eager. The bugs below stay within eager's error, or nearly. The comparison with the mirror detects them. There is no
mirror in fp32, where results would differ only by the order of sums.
"""

import pytest
import torch
from torch import Tensor

from vit.kernels import attention, configs, reference, runtime

FACTOR = 1.25
NAMES = ("output", "dq", "dk", "dv")


def mirror(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, keep: Tensor | float = 1.0, bug: str = ""):
    """(o, dq, dk, dv), all [B, H, N, E] in one dtype. Only P and dS are rounded before their products."""
    dtype, arch = q.dtype, runtime.arch(q.device)
    keep = torch.as_tensor(keep, device=q.device).expand(*q.shape[:3], k.shape[2])
    sizes = k.shape[2], q.shape[3], dtype, bool((keep != 1).any())
    forward, backward = configs.attention_fwd(arch, *sizes).block_n, configs.attention_bwd(arch, *sizes).block_n

    def rounded(x: Tensor) -> Tensor:  # the operand of a product
        return x.to(torch.bfloat16 if bug == "P and dS in bf16" else dtype).float()

    def summed(x: Tensor) -> Tensor:  # the accumulator
        return x.to(dtype).float() if bug == "16-bit accumulators" else x

    q, k, v, do = (t.float() for t in (q, k, v, do))
    read = (k * scale).to(dtype).float() if bug == "keys scaled before the product" else k
    logit_scale = 1.0 if bug == "keys scaled before the product" else scale

    m = q.new_full((*q.shape[:3], 1), float("-inf"))
    total, acc = torch.zeros_like(m), torch.zeros_like(q)
    for k_tile, v_tile, kept in zip(read.split(forward, 2), v.split(forward, 2), keep.split(forward, 3), strict=True):
        logits = q @ k_tile.mT
        m_new = torch.maximum(m, logits.amax(-1, keepdim=True))
        p, alpha = ((x * logit_scale).exp() for x in (logits - m_new, m - m_new))
        total = total * alpha + p.sum(-1, keepdim=True)
        acc = summed(acc * alpha + rounded(p * kept) @ v_tile)
        m = m_new
    o = (acc / total).to(dtype)

    delta = (do * o.float()).sum(-1, keepdim=True)
    p = ((q @ read.mT - m) * logit_scale - total.log()).exp()
    ds = rounded(p * (do @ v.mT * keep - delta))
    p = rounded(p * keep)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    for ds_tile, k_tile in zip(ds.split(backward, 3), k.split(backward, 2), strict=True):
        dq = summed(dq + ds_tile @ k_tile)
    for ds_tile, p_tile, q_tile, do_tile in zip(*(t.split(backward, 2) for t in (ds, p, q, do)), strict=True):
        dk = summed(dk + ds_tile.mT @ q_tile)
        dv = summed(dv + p_tile.mT @ do_tile)
    return o, (dq * scale).to(dtype), (dk * scale).to(dtype), dv.to(dtype)


def kernels(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, **drop):
    """(o, dq, dk, dv) of the kernels, from and to [B, H, N, E]."""
    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, scale=scale, impl="triton", **drop)
    results = [out.detach().view(leaves[0].shape)]
    results += torch.autograd.grad(out, leaves, do.transpose(1, 2).flatten(2))
    return [t.transpose(1, 2) for t in results]


def exact(q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, keep: Tensor | float = 1.0):
    leaves = [t.double().detach().requires_grad_() for t in (q, k, v)]
    probs = (leaves[0] @ leaves[1].mT * scale).softmax(-1)
    out = (probs * keep) @ leaves[2]
    return [out.detach(), *torch.autograd.grad(out, leaves, do.double())]


def errors(results, exact) -> list[float]:
    return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(results, exact, strict=True)]


def inputs(randn, dtype, gain: float = 1.0) -> list[Tensor]:
    """Head dimension 80 has two parts, and its scale is no power of two. Of several tiles the last is ragged."""
    q, k, v, do = (randn(1, 2, n, 80) for n in (105, 70, 70, 105))
    return [(gain * q).to(dtype), *(t.to(dtype) for t in (k, v, do))]


@pytest.mark.parametrize("dtype", runtime.HALF, ids=str)
@pytest.mark.parametrize(("gain", "dropout_p"), [(1.0, 0.0), (6.0, 0.0), (1.0, 0.3)])
def test_no_worse_than_the_mirror(randn, dtype, gain, dropout_p):
    tensors, scale = inputs(randn, dtype, gain), 80**-0.5
    seed = torch.tensor([11], device=tensors[0].device)
    keep = reference.dropout_scale(seed, 2, torch.Size((1, 2, 105, 70)), dropout_p)
    ours = kernels(*tensors, scale, dropout_p=dropout_p, seed=seed, offset=2)
    r64 = exact(*tensors, scale, keep)
    limits = errors(mirror(*tensors, scale, keep.float()), r64)
    for name, got, limit in zip(NAMES, errors(ours, r64), limits, strict=True):
        assert got <= FACTOR * limit, f"{name}: rms {got:.3e}, mirror {limit:.3e}"


@pytest.mark.parametrize(
    ("bug", "gain", "dtype"),
    [
        ("keys scaled before the product", 6.0, torch.bfloat16),
        ("keys scaled before the product", 6.0, torch.float16),
        ("16-bit accumulators", 1.0, torch.bfloat16),
        ("16-bit accumulators", 1.0, torch.float16),
        ("P and dS in bf16", 1.0, torch.float16),
    ],
)
def test_the_factor_catches(randn, bug, gain, dtype):
    """The factor detects the bug in the output and in every gradient."""
    tensors, scale = inputs(randn, dtype, gain), 80**-0.5
    r64 = exact(*tensors, scale)
    limits = errors(mirror(*tensors, scale), r64)
    for name, got, limit in zip(NAMES, errors(mirror(*tensors, scale, bug=bug), r64), limits, strict=True):
        assert got > FACTOR * limit, f"{name}: rms {got:.3e}, mirror {limit:.3e}"
