"""attention and attention_qkvpacked: accuracy, gradients, determinism, strides."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import make_tensor
from views import last_programs_only, nan_padded

from vit.kernels import attention, attention_qkvpacked, configs, reference, runtime
from vit.kernels.attention import (
    _launch_bwd,
    _launch_fwd,
    attention_bwd,
    attention_fwd,
    attention_qkvpacked_bwd,
    attention_qkvpacked_fwd,
    head_parts,
)
from vit.testing import check, check_op


def ours_packed(qkv: Tensor) -> Tensor:
    return attention_qkvpacked(qkv, impl="triton")


def reference_packed(qkv: Tensor) -> Tensor:
    return reference.attention_qkvpacked(qkv)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, impl="triton")


def reference_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v)


def grads(fn, leaves: list[Tensor], do: Tensor) -> list[Tensor]:
    """The output and the gradient of every leaf."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


# ---- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("B", "N", "H", "E"), [(3, 2, 2, 16), (2, 17, 3, 48), (1, 50, 2, 64), (1, 65, 1, 80)])
def test_packed(randn, dtype, B, N, H, E):
    check_op(ours_packed, reference_packed, {"qkv": randn(B, N, 3, H, E)}, dtype)


@pytest.mark.parametrize(("NQ", "NK", "H", "E"), [(1, 50, 2, 64), (50, 3, 2, 32), (65, 17, 1, 72), (17, 65, 1, 128)])
def test_unpacked(randn, dtype, NQ, NK, H, E):
    inputs = {"q": randn(2, NQ, H, E), "k": randn(2, NK, H, E), "v": randn(2, NK, H, E)}
    check_op(ours, reference_qkv, inputs, dtype)


def test_vit_length(randn):
    check_op(ours_packed, reference_packed, {"qkv": randn(1, 197, 3, 1, 64)}, torch.bfloat16)


LENGTHS = [2, 15, 16, 17, 31, 32, 33, 48, 49, 64]


@pytest.mark.parametrize(("NQ", "NK"), [*zip(LENGTHS, reversed(LENGTHS), strict=True), (64, 64), (48, 48), (49, 49)])
def test_every_kind_of_last_tile(randn, NQ, NK):
    """There are 0, 1 or 2 whole tiles of 32 queries and keys, and a last tile of 16, of 32 or none."""
    inputs = {"q": randn(2, NQ, 2, 24), "k": randn(2, NK, 2, 24), "v": randn(2, NK, 2, 24)}
    check_op(ours, reference_qkv, inputs, torch.float32)


def test_last_tiles_cover_all_rows_and_few_more():
    for block_n in (16, 32, 64, 128):
        for n in range(3 * block_n + 1):
            loop, tail = configs.walk(n, configs.Config(block_n=block_n))
            left = n % block_n
            assert loop == ("whole" if n >= block_n else "none")
            assert tail == 0 if left == 0 else left <= tail <= max(16, 2 * left - 1) and tail in (16, 32, 64, 128)
            masked = configs.walk(n, configs.Config(block_n=block_n, tail=False))
            assert masked == ("masked" if n else "none", 0)


@pytest.mark.parametrize("head_dim", range(16, 136, 8))
def test_every_head_dim(randn, head_dim):
    inputs = {"q": randn(1, 5, 2, head_dim), "k": randn(1, 18, 2, head_dim), "v": randn(1, 18, 2, head_dim)}
    check_op(ours, reference_qkv, inputs, torch.float32)


def test_head_parts_waste_less_than_16_columns():
    for head_dim in range(16, 136, 8):
        parts = head_parts(head_dim)
        assert sum(width for _, width, _ in parts) - head_dim < 16
        assert [start for start, _, _ in parts] == [sum(w for _, w, _ in parts[:i]) for i in range(len(parts))]
        assert sum(valid for _, _, valid in parts) == head_dim
    assert head_parts(80) == ((0, 64, 64), (64, 16, 16))
    assert head_parts(72) == ((0, 64, 64), (64, 16, 8))


@pytest.mark.parametrize("kind", ["x9", "x36", "very negative", "offset values"])
def test_extreme_logits(randn, dtype, kind):
    """q and k are multiples of 1/32, so every order of summation gives exactly the same logits.

    Otherwise the matrix products q kᵀ and k qᵀ round differently, and the softmax amplifies the difference.
    """
    B, N, H, E = 1, 50, 2, 64
    q, k, v = randn(B, N, H, E), randn(B, N, H, E), randn(B, N, H, E)
    if kind in ("x9", "x36"):
        q = q * int(kind[1:])
    elif kind == "very negative":  # logits about −300: the maximum must start at −∞, not at 0
        q, k = q / 8 + 6.0, k / 8 - 6.0
    else:
        v = v + 100.0
    q, k = ((t * 32).round() / 32 for t in (q, k))
    check_op(ours, reference_qkv, {"q": q, "k": k, "v": v}, dtype)


@pytest.mark.parametrize("kind", ["one-hot", "constant values"])
def test_logits_without_gradient(randn, dtype, kind):
    """The gradients of q and k are zero. The kernels may return the rounding error of do·v − do·o."""
    N, H, E = 50, 2, 64
    q, k, v, do = (randn(1, N, H, E).to(dtype) for _ in range(4))
    if kind == "one-hot":  # each query attends to one key
        k = torch.eye(N, E, device=q.device, dtype=dtype)[None, :, None].expand(1, N, H, E)
        q = 300.0 * k.flip(1)
        expected = v.flip(1)
    else:
        expected = v = v[:, :1].expand(1, N, H, E)
    out, dq, dk, dv = grads(ours, [q, k, v], do.flatten(2))
    unit = 0.0 if kind == "one-hot" else max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out, expected.flatten(2), rtol=unit, atol=0.0)
    noise = 1e-6 * (do.abs().double() * v.abs().double()).sum(-1).max() * E**-0.5
    assert dq.abs().max() <= noise * k.abs().max()
    assert dk.abs().max() <= noise * q.abs().max() * (1 if kind == "one-hot" else N)
    if kind == "one-hot":
        torch.testing.assert_close(dv, do.flip(1), rtol=1e-6, atol=0.0)


def test_scale(randn, dtype):
    check_op(
        lambda qkv: attention_qkvpacked(qkv, scale=0.37, impl="triton"),
        lambda qkv: reference.attention_qkvpacked(qkv, scale=0.37),
        {"qkv": randn(2, 17, 3, 1, 32)},
        dtype,
    )


def test_lse(randn, dtype):
    """The logsumexp is natural, in fp32 and without a gradient. It does not depend on whether inputs require grad."""
    q, k, v = ((6 * randn(2, n, 2, 48)).to(dtype) for n in (33, 40, 40))
    out, lse = attention(q, k, v, return_lse=True, impl="triton")
    eager = reference.attention(q, k, v, return_lse=True)[1]
    exact = torch.einsum("bqhe,bkhe->bhqk", q.double(), k.double()).div(math.sqrt(48)).logsumexp(-1)
    assert lse.dtype is torch.float32
    assert (lse - exact).abs().max() < 2e-6 * exact.abs().max()
    if dtype is torch.float32:
        check(lse, eager, exact, name="lse")
    assert torch.equal(out, attention(q, k, v, impl="triton"))

    packed = torch.stack([k, k, v], dim=2).requires_grad_()
    _, lse = attention_qkvpacked(packed, return_lse=True, impl="triton")
    assert not lse.requires_grad
    assert not attention_qkvpacked(packed, return_lse=True, impl="reference")[1].requires_grad
    torch.testing.assert_close(
        lse, reference.attention_qkvpacked(packed.double(), return_lse=True)[1].float(), rtol=1e-5, atol=1e-5
    )


def test_agrees_with_scaled_dot_product_attention(randn):
    B, N, H, E = 1, 33, 3, 40
    qkv, do = randn(B, N, 3, H, E), randn(B, N, H * E)

    def sdpa(qkv):
        return F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).reshape(B, N, H * E)

    for a, b in zip(grads(ours_packed, [qkv], do), grads(sdpa, [qkv], do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [8, 16])
def test_as_near_to_fp64_as_pytorchs_own(half, head_dim):
    """The inputs are the samples of PyTorch's OpInfo: few tokens, values up to 9, logits up to 200.

    The OpInfo's tolerances assume equal rounding, so two 16-bit results differ by more. The kernels round as PyTorch's
    flash attention does. The eager reference also rounds the logits, and its error is about five times as large.
    """
    torch.manual_seed(0)
    shapes = [(5, tokens, 4, head_dim) for tokens in (3, 6, 6)]
    inputs = {n: make_tensor(shape, device="cpu", dtype=half) for n, shape in zip("qkv", shapes, strict=True)}

    def padded(q, k, v):  # zeros change no logit
        q, k, v = (F.pad(t, (0, 16 - head_dim)) for t in (q, k, v))
        out = attention(q, k, v, scale=head_dim**-0.5, impl="triton")
        return out.unflatten(2, (4, 16))[..., :head_dim]

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    check_op(padded, sdpa, inputs, half)


# ---- properties ------------------------------------------------------------------------------------------------------


def test_a_constant_added_to_all_keys_changes_nothing(randn, dtype):
    """Softmax ignores the constant. So the gradients of the keys sum to zero, which is the gradient of a key bias."""
    qkv, do = randn(1, 33, 3, 2, 32).to(dtype), randn(1, 33, 64).to(dtype)
    _, dqkv = grads(ours_packed, [qkv], do)
    dk = dqkv.select(2, 1).double()
    unit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert dk.sum(dim=1).abs().max() < 4 * unit * dk.abs().sum(dim=1).max()
    if dtype is torch.float32:
        moved = qkv + torch.tensor([0.0, 1.0, 0.0], device=qkv.device)[:, None, None]
        torch.testing.assert_close(ours_packed(moved), ours_packed(qkv), rtol=1e-5, atol=1e-5)


def test_one_token(randn, dtype):
    """The output is v, and the gradient of v is do. q and k have no effect."""
    qkv, do = randn(3, 1, 3, 2, 72).to(dtype), randn(3, 1, 144).to(dtype)
    out, dqkv = grads(ours_packed, [qkv], do)
    assert torch.equal(out, qkv[:, :, 2].reshape(out.shape))
    torch.testing.assert_close(dqkv[:, :, 2].reshape(do.shape), do, rtol=1e-6, atol=0.0)
    assert dqkv[:, :, :2].abs().max() < 1e-4


def test_queries_heads_and_samples_do_not_mix(randn):
    """Each row, head and sample of the output depends only on its own inputs, bit for bit."""
    q, k, v = randn(3, 40, 2, 32), randn(3, 20, 2, 32), randn(3, 20, 2, 32)
    whole = ours(q, k, v).view(q.shape)
    assert torch.equal(whole[1:2, :, 1:], ours(q[1:2, :, 1:], k[1:2, :, 1:], v[1:2, :, 1:]).view(1, 40, 1, 32))
    assert torch.equal(whole[:, :7], ours(q[:, :7], k, v).view(3, 7, 2, 32))


@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)])
def test_empty(randn, shape):
    out, dqkv = grads(ours_packed, [randn(*shape)], randn(*shape[:2], 32))
    assert out.shape == (*shape[:2], 32) and dqkv.shape == shape
    q, k, v = randn(*shape).unbind(2)
    assert [t.shape for t in grads(ours, [q, k, v], randn(*shape[:2], 32))] == [out.shape, q.shape, k.shape, v.shape]


@pytest.mark.parametrize("tail", [True, False])
def test_no_queries(randn, monkeypatch, tail):
    """No query attends to the keys. The kernel writes zeros as their gradients."""
    monkeypatch.setattr(configs, "attention_bwd", lambda *_: configs.Config(block_m=32, block_n=32, tail=tail))
    out, dq, dk, dv = grads(ours, [randn(2, 0, 2, 16), randn(2, 3, 2, 16), randn(2, 3, 2, 16)], randn(2, 0, 32))
    assert out.shape == (2, 0, 32) and dq.shape == (2, 0, 2, 16)
    assert torch.equal(dk, torch.zeros(2, 3, 2, 16)) and torch.equal(dv, dk)


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.interpreted
def test_gradcheck(randn):
    qkv = randn(1, 3, 3, 2, 24).double().requires_grad_()
    assert torch.autograd.gradcheck(ours_packed, qkv, fast_mode=True)
    q, k, v = (randn(2, n, 2, 40).double().requires_grad_() for n in (35, 20, 20))  # several ragged tiles
    assert torch.autograd.gradcheck(ours, (q, k, v), fast_mode=True)


def test_opcheck(randn):
    B, NQ, NK, H, E = 1, 3, 5, 2, 16
    q, k, v = randn(B, NQ, H, E), randn(B, NK, H, E), randn(B, NK, H, E)
    o, m, log_l = attention_fwd(q, k, v, 0.25, True)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(attention_fwd, (*leaves, 0.25, True))
    for needs in [(True, True), (True, False), (False, True)]:
        torch.library.opcheck(attention_bwd, (randn(*o.shape), q, k, v, o, m, log_l, 0.25, *needs))
    qkv = randn(B, NQ, 3, H, E)
    o, m, log_l = attention_qkvpacked_fwd(qkv, 0.25, True)
    torch.library.opcheck(attention_qkvpacked_fwd, (qkv.clone().requires_grad_(), 0.25, True))
    torch.library.opcheck(attention_qkvpacked_fwd, (qkv, 0.25, False))
    for need_dbias in (False, True):
        args = (randn(*o.shape), qkv, o, m, log_l, 0.25, None, 0.0, 0, need_dbias)
        torch.library.opcheck(attention_qkvpacked_bwd, args)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
def test_frozen_inputs(randn, wanted):
    q, k, v, do = randn(1, 17, 2, 16), randn(1, 20, 2, 16), randn(1, 20, 2, 16), randn(1, 17, 32)
    every = dict(zip("qkv", grads(ours, [q, k, v], do)[1:], strict=True))
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in zip("qkv", (q, k, v), strict=True)}
    out = ours(*leaves.values())
    out.backward(do)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, every[name]) if name in wanted else leaf.grad is None


def test_backward_computes_only_what_is_wanted(randn):
    q, do = randn(2, 17, 2, 16), randn(2, 17, 32)
    saved = attention_fwd(q, q, q, 0.25, True)
    dq, dk, dv = attention_bwd(do, q, q, q, *saved, 0.25, False, True)
    assert dq.numel() == 0 and dk.shape == dv.shape == q.shape
    dq, dk, dv = attention_bwd(do, q, q, q, *saved, 0.25, True, False)
    assert dk.numel() == dv.numel() == 0 and dq.shape == q.shape


def test_no_grad_saves_nothing(randn):
    qkv = randn(1, 5, 3, 2, 16)
    assert [t.numel() for t in attention_qkvpacked_fwd(qkv, 0.25, False)] == [1 * 5 * 32, 0, 0]
    assert not ours_packed(qkv).requires_grad
    with torch.inference_mode():
        inferred = ours_packed(qkv.clone().requires_grad_())
    assert torch.equal(inferred, ours_packed(qkv))


def test_forward_mode_raises_and_auto_is_right(randn):
    qkv, tangent = randn(1, 5, 3, 1, 16), randn(1, 5, 3, 1, 16)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(ours_packed, (qkv,), (tangent,))
    _, by_auto = torch.func.jvp(attention_qkvpacked, (qkv,), (tangent,))
    _, by_reference = torch.func.jvp(reference_packed, (qkv,), (tangent,))
    torch.testing.assert_close(by_auto, by_reference)


def test_compile_fullgraph(randn):
    def fn(x, q, k, v):
        out, lse = attention_qkvpacked(x, num_heads=2, return_lse=True, impl="triton")
        return out + attention(q, k, v, impl="triton"), lse

    leaves = [randn(2, 5, 96).requires_grad_(), *(randn(2, n, 2, 16).requires_grad_() for n in (5, 7, 7))]
    direct, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    assert all(map(torch.equal, direct, compiled))
    do = randn(2, 5, 32)
    assert all(map(torch.equal, *(torch.autograd.grad(outs[0], leaves, do) for outs in (direct, compiled))))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(randn, impl, low):
    """Only the fp32 inputs are cast. The bits are those of the op on cast inputs, and gradients are fp32."""
    qkv, do = randn(2, 17, 3, 2, 16), randn(2, 17, 32).to(low)
    drop = {"dropout_p": 0.2, "seed": torch.tensor([3], device=qkv.device), "offset": 1}

    def packed(x):
        return attention_qkvpacked(x, **drop, impl=impl)

    def unpacked(q, k, v):
        return attention(q, k=k, v=v, **drop, impl=impl)  # keyword arguments are cast, too

    for fn, leaves in [(packed, [qkv]), (unpacked, list(qkv.unbind(2)))]:
        want = grads(lambda *t, fn=fn: fn(*(x.to(low) for x in t)), leaves, do)
        with torch.autocast(qkv.device.type, low):
            got = grads(fn, leaves, do)
            _, lse = attention_qkvpacked(qkv, return_lse=True, impl=impl)
            assert attention_qkvpacked(qkv.double(), impl="reference").dtype is torch.float64
        assert got[0].dtype is low and lse.dtype is torch.float32
        assert all(t.dtype is torch.float32 for t in got[1:])
        bits_equal(want, got, "autocast")


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_compiled(randn, impl):
    qkv = randn(2, 5, 96).requires_grad_()

    def fn(x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return attention_qkvpacked(x, num_heads=2, impl=impl)

    direct, compiled = fn(qkv), torch.compile(fn, fullgraph=True, backend="aot_eager")(qkv)
    assert compiled.dtype is torch.bfloat16 and torch.equal(direct, compiled)
    do = randn(2, 5, 32).bfloat16()
    assert torch.equal(*(torch.autograd.grad(out, qkv, do)[0] for out in (direct, compiled)))


# ---- the same bits ---------------------------------------------------------------------------------------------------


def bits_equal(a: list[Tensor], b: list[Tensor], what: str) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"{what}, tensor {i}"


def test_same_bits_packed(randn, dtype):
    """A second run, any packing, NaN around the buffers and any strides of the gradient change no bit."""
    B, N, H, E = 2, 17, 2, 24
    qkv, do = randn(B, N, 3, H, E).to(dtype), randn(B, N, H * E).to(dtype)
    first = grads(ours_packed, [qkv], do)
    variants = {
        "again": (qkv, do),
        "heads before q, k, v": (qkv.transpose(2, 3).contiguous().transpose(2, 3), do),
        "tokens first": tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in (qkv, do)),
        "last stride not 1": (qkv.mT.contiguous().mT, do.mT.contiguous().mT),
        "padded": (nan_padded(qkv), nan_padded(do)),
        "odd offsets": (nan_padded(qkv.flatten(2)).unflatten(2, (3, H, E)), do),
    }
    for name, variant in variants.items():
        bits_equal(first, grads(ours_packed, [variant[0]], variant[1]), name)

    out, dqkv = grads(lambda x: attention_qkvpacked(x, num_heads=H, impl="triton"), [qkv.flatten(2)], do)
    bits_equal(first, [out, dqkv.unflatten(2, (3, H, E))], "num_heads")
    one = torch.ones((), dtype=dtype, device=qkv.device).expand(B, N, H * E)  # the gradient of .sum().backward()
    bits_equal(grads(ours_packed, [qkv], one.contiguous()), grads(ours_packed, [qkv], one), "stride 0")

    q, k, v = qkv.unbind(2)
    out, *three = grads(ours, [q, k, v], do)
    bits_equal(first, [out, torch.stack(three, dim=2)], "unpacked")


def test_same_bits_unpacked(randn, dtype):
    B, NQ, NK, H, E = 2, 17, 20, 2, 72
    q, k, v, do = (randn(*s).to(dtype) for s in [(B, NQ, H, E), (B, NK, H, E), (B, NK, H, E), (B, NQ, H * E)])
    first = grads(ours, [q, k, v], do)

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    variants = {
        "again": (q, k, v, do),
        "views of [B, H, N, E]": (heads_first(q), k, heads_first(v), do),
        "padded": tuple(map(nan_padded, (q, k, v, do))),
        "last stride not 1": (q, k.mT.contiguous().mT, v, do),
    }
    for name, (*leaves, cotangent) in variants.items():
        bits_equal(first, grads(ours, leaves, cotangent), name)
    shared = grads(lambda q, k: ours(q, k[:1].expand(B, -1, -1, -1), v), [q, k], do)  # batch stride 0
    copied = grads(lambda q, k: ours(q, k[:1].repeat(B, 1, 1, 1), v), [q, k], do)
    bits_equal(copied, shared, "expanded keys")


def test_inputs_are_read_in_place(randn, monkeypatch):
    """The kernels read packed qkv, transposed views and the incoming gradient without a copy."""
    seen, launch = [], runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *a, **k: (seen.append(k), launch(*a, **k)))
    qkv, do = randn(2, 5, 3, 2, 16).requires_grad_(), randn(5, 2, 32).transpose(0, 1)
    (dqkv,) = torch.autograd.grad(ours_packed(qkv), qkv, do)
    k, v = randn(2, 2, 5, 16).transpose(1, 2), randn(2, 2, 5, 16).transpose(1, 2)
    ours(k, k, v)
    packed, delta, backward, unpacked = seen
    assert [a["q_ptr"].data_ptr() for a in (packed, backward, unpacked)] == [qkv.data_ptr()] * 2 + [k.data_ptr()]
    assert packed["k_ptr"].data_ptr() == qkv[:, :, 1].data_ptr() and unpacked["v_ptr"].data_ptr() == v.data_ptr()
    assert delta["do_ptr"].data_ptr() == backward["do_ptr"].data_ptr() == do.data_ptr()
    assert backward["dv_ptr"].untyped_storage().data_ptr() == dqkv.untyped_storage().data_ptr()
    assert [a["ALIGN"] for a in seen] == [8] * 4


LENGTHS_PROGRAM = """
import collections, sys
import torch, triton
from vit import kernels
from vit.kernels.dry_run import dry_run

found = collections.defaultdict(set)

def note(key, fn, **_):
    found[fn.name.rpartition(".")[2]].add(key)
    return True  # nothing is compiled

triton.knobs.runtime.jit_cache_hook = note
with dry_run(90):
    for tokens in range(1, 131):
        qkv = torch.empty(1, tokens, 3, 3, 64, dtype=getattr(torch, sys.argv[1]), requires_grad=True)
        kernels.attention_qkvpacked(qkv, impl="triton").sum().backward()
print(" ".join(f"{name}={len(keys)}" for name, keys in sorted(found.items())))
"""


@pytest.mark.parametrize(("dtype", "kinds"), [("bfloat16", 5), ("float32", 1)])
def test_a_new_length_compiles_nothing(dtype, kinds):
    """In 16 bits 130 lengths compile a kernel 5 times: with whole tiles or none, and a last tile of 16, 32 or none."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LENGTHS_PROGRAM, dtype], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = dict(part.split("=") for part in done.stdout.split())
    assert counts == {
        "_attention_fwd_kernel": str(kinds), "_attention_delta_kernel": "1", "_attention_bwd_kernel": str(kinds)
    }  # fmt: skip


SHIPPED = [(arch, head_dim) for arch in (80, 90) for head_dim in (64, 80, 88)]


@pytest.mark.parametrize(("arch", "head_dim"), SHIPPED)
@pytest.mark.parametrize("tile_dtype", [torch.float32, torch.bfloat16])
def test_shipped_tiles(randn, monkeypatch, arch, head_dim, tile_dtype):
    for name in ("attention_fwd", "attention_bwd"):
        shipped = getattr(configs, name)(arch, 67, head_dim, tile_dtype)
        monkeypatch.setattr(configs, name, lambda *_, shipped=shipped: shipped)
    check_op(ours_packed, reference_packed, {"qkv": randn(1, 67, 3, 1, head_dim)}, torch.float16)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (16, 32)])
def test_other_tiles(randn, monkeypatch, block_m, block_n, tail):
    config = configs.Config(block_m=block_m, block_n=block_n, tail=tail)
    monkeypatch.setattr(configs, "attention_fwd", lambda *_: config)
    monkeypatch.setattr(configs, "attention_bwd", lambda *_: config)
    inputs = {"q": randn(1, 33, 2, 72), "k": randn(1, 50, 2, 72), "v": randn(1, 50, 2, 72)}
    check_op(ours, reference_qkv, inputs, torch.float16)


# ---- the gradient of a bias of qkv -----------------------------------------------------------------------------------


def backward_with_sums(qkv: Tensor, do: Tensor, **drop) -> tuple[Tensor, Tensor]:
    scale = qkv.shape[-1] ** -0.5
    saved = attention_qkvpacked_fwd(qkv, scale, True, **drop)
    return attention_qkvpacked_bwd(do, qkv, *saved, scale, **drop, need_dbias=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_column_sums(randn, dtype, dropout_p):
    """The sums are the gradient of a bias that is added to qkv. They do not change the bits of dqkv."""
    B, N, H, E = 2, 50, 3, 24
    qkv, do = randn(B, N, 3, H, E).to(dtype), randn(B, N, H * E).to(dtype)
    drop = {"seed": torch.tensor([5], device=qkv.device), "dropout_p": dropout_p, "offset": 1} if dropout_p else {}

    def dbias(dtype: torch.dtype) -> Tensor:
        bias = torch.zeros(3, H, E, dtype=dtype, device=qkv.device, requires_grad=True)
        out = reference.attention_qkvpacked(qkv.to(dtype) + bias, **drop)
        return torch.autograd.grad(out, bias, do.to(dtype))[0].flatten()

    dqkv, sums = backward_with_sums(qkv, do, **drop)
    assert sums.dtype is torch.float32
    check(sums.sum(0).to(dtype), dbias(dtype), dbias(torch.float64), name="dbias")
    scale = E**-0.5
    without, empty = attention_qkvpacked_bwd(do, qkv, *attention_qkvpacked_fwd(qkv, scale, True, **drop), scale, **drop)
    assert torch.equal(dqkv, without) and empty.numel() == 0
    bits_equal([dqkv, sums], backward_with_sums(qkv, do, **drop), "again")


@pytest.mark.parametrize(("B", "N", "H", "E"), [(2, 50, 2, 16), (3, 33, 1, 80), (1, 64, 3, 24), (2, 5, 2, 40)])
def test_column_sums_are_of_one_tile_each(randn, B, N, H, E):
    """Row b · tiles + i has the sums of tile i of sample b, for each of the 3 · H · E columns."""
    dqkv, sums = backward_with_sums(randn(B, N, 3, H, E), randn(B, N, H * E))
    block = configs.attention_bwd(runtime.arch(dqkv.device), N, E, dqkv.dtype).block_m
    tiles = torch.stack([t.double().sum(1) for t in dqkv.split(block, dim=1)], dim=1)
    torch.testing.assert_close(sums.double(), tiles.view(-1, 3 * H * E), rtol=1e-5, atol=1e-5)


def test_column_sums_ignore_what_is_beyond_the_last_token(randn):
    """All logits are near −360. A row beyond the last token has the logit 0, so its P is infinite."""
    qkv = randn(1, 17, 3, 1, 32) / 8 + torch.tensor([8.0, -8.0, 0.0])[:, None, None].to(randn(1).device)
    dqkv, sums = backward_with_sums(qkv, randn(1, 17, 32))
    torch.testing.assert_close(sums.sum(0), dqkv.sum((0, 1)).flatten(), rtol=1e-4, atol=1e-4)


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", ["samples", "tokens", "heads"])
def test_offsets_beyond_32_bits(device, far):
    """All tensors of forward and backward have three samples, tokens or heads that are 2³⁰ elements apart.

    The operating system provides no memory for the pages between them, because nothing touches them.
    """
    gap, (B, N, H, E) = 2**30, {"samples": (3, 2, 1, 16), "tokens": (1, 3, 2, 16), "heads": (1, 2, 3, 16)}[far]
    near = torch.randn(B, N, 8, H, E, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    stride = list(near.stride())
    stride[{"samples": 0, "tokens": 1, "heads": 3}[far]] = gap
    memory = torch.from_numpy(np.zeros(2 * gap + near.numel(), dtype=np.float16)).to(device)
    apart = memory.as_strided(near.shape, stride)
    apart.copy_(near)
    for tensors in (near, apart):
        q, k, v, o, do, *grads = tensors.unbind(2)
        m, log_l, *scratch = torch.empty(4, B, H, N, device=device)
        _launch_fwd(q, k, v, o, m, log_l, 0.25, None, 0.0, 0)
        _launch_bwd(q, k, v, o, do, m, log_l, *grads, None, scratch, 0.25, None, 0.0, 0)
    assert torch.equal(near, apart)


def test_many_heads_go_on_grid_x(randn, monkeypatch):
    grids = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, grid, **_: grids.append(grid))
    qkv = randn(1, 1, 3, 1, 16).expand(35_001, 1, 3, 2, 16).requires_grad_()
    ours_packed(qkv).sum().backward()
    assert grids == [70_002, 70_002, 140_004]  # forward, delta, backward


@pytest.mark.interpreted
def test_the_last_of_many_heads(randn):
    """The two heads of the last sample, the last of 70,000, are right."""
    qkv, do = torch.zeros(35_000, 5, 3, 2, 16), torch.zeros(35_000, 5, 32)
    qkv[-1], do[-1] = randn(5, 3, 2, 16), randn(5, 32)
    alone = grads(ours_packed, [qkv[-1:]], do[-1:])
    with last_programs_only(4):
        many = grads(ours_packed, [qkv], do)
    bits_equal(alone, [t[-1:] for t in many], "last sample")


@pytest.mark.gpu
def test_many_heads(randn):
    qkv, do = randn(35_001, 2, 3, 2, 16).half(), randn(35_001, 2, 32).half()
    for a, b in zip(grads(ours_packed, [qkv], do), grads(reference_packed, [qkv], do), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("head_dim", [8, 20, 136])
def test_unsupported_head_dim(randn, head_dim):
    qkv = randn(1, 5, 3, 2, head_dim)
    with pytest.raises(RuntimeError, match=f"from 16 to 128 in steps of 8, not {head_dim}"):
        attention_qkvpacked(qkv, impl="triton")
    with pytest.raises(RuntimeError, match="steps of 8"):
        attention(*qkv.unbind(2), impl="triton")
    torch.testing.assert_close(attention_qkvpacked(qkv), reference_packed(qkv))
    torch.testing.assert_close(attention(*qkv.unbind(2)), reference_packed(qkv))


def test_reference_path(randn):
    qkv = randn(2, 5, 3, 2, 20)
    out, lse = attention_qkvpacked(qkv.flatten(2), num_heads=2, return_lse=True, impl="reference")
    expected = reference.attention_qkvpacked(qkv, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    out, lse = attention(*qkv.unbind(2), return_lse=True, impl="reference")
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.ones(2, 5, 96)}, ValueError, r"with num_heads given, got \(2, 5, 96\)"),
        ({"qkv": torch.ones(2, 5, 96), "num_heads": 5}, ValueError, r"shape \[B, N, 3·5·E\], got \(2, 5, 96\)"),
        ({"qkv": torch.ones(2, 5, 96), "num_heads": 0}, ValueError, "with num_heads=0"),
        ({"num_heads": 2}, ValueError, r"with num_heads=2 qkv must have shape .* got \(2, 5, 3, 2, 16\)"),
        ({"qkv": torch.ones(2, 5, 2, 2, 16)}, ValueError, r"\[B, N, 3, H, E\], .* got \(2, 5, 2, 2, 16\)"),
        ({"qkv": torch.ones(5, 3, 2, 16)}, ValueError, r"got \(5, 3, 2, 16\)"),
        ({"qkv": torch.ones(2, 5, 3, 2, 0)}, ValueError, "must not be empty"),
        ({"qkv": torch.ones(2, 5, 3, 2, 16, dtype=torch.int32)}, TypeError, "qkv must be a floating-point tensor"),
        ({"qkv": [1.0]}, TypeError, "qkv must be a torch.Tensor, got list"),
        ({"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
        ({"scale": -0.1}, ValueError, "scale must be positive"),
        ({"impl": "flash"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        attention_qkvpacked(**{"qkv": torch.ones(2, 5, 3, 2, 16)} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(5, 2, 16)}, ValueError, r"q must have shape \[B, NQ, H, E\], got \(5, 2, 16\)"),
        ({"k": torch.ones(2, 7, 3, 16)}, ValueError, r"k must have shape .* q \(2, 5, 2, 16\), got \(2, 7, 3, 16\)"),
        ({"k": torch.ones(1, 7, 2, 16)}, ValueError, "k must have shape"),
        ({"v": torch.ones(2, 7, 2, 8)}, ValueError, "v must have shape"),
        ({"v": torch.ones(2, 6, 2, 16)}, ValueError, r"same shape, got \(2, 7, 2, 16\) and \(2, 6, 2, 16\)"),
        ({"k": torch.ones(2, 0, 2, 16), "v": torch.ones(2, 0, 2, 16)}, ValueError, "at least one token"),
        ({"k": torch.ones(2, 7, 2, 16).half()}, TypeError, "k is torch.float16 but q is torch.float32"),
        ({"v": torch.ones(2, 7, 2, 16).bfloat16()}, TypeError, "v is torch.bfloat16 but q is torch.float32"),
        ({"k": torch.ones(2, 7, 2, 16, device="meta")}, ValueError, "all tensors must be on one device"),
        ({"scale": float("inf")}, ValueError, "scale must be positive and finite"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
    ],
)
def test_bad_qkv_input(change, error, message):
    args = {"q": torch.ones(2, 5, 2, 16), "k": torch.ones(2, 7, 2, 16), "v": torch.ones(2, 7, 2, 16)} | change
    with pytest.raises(error, match=message):
        attention(**args)


IMPLS = pytest.mark.parametrize("impl", ["auto", "triton", "reference"])


@IMPLS
@pytest.mark.parametrize("scale", [None, 1, 0.01, 5.0])
def test_scale_and_lse_beside_pytorchs_own(randn, impl, scale):
    """Batch, tokens, keys, heads and head dimension all differ. The scale may be an integer."""
    B, NQ, NK, H, E = 2, 5, 7, 3, 24
    q, k, v = randn(B, NQ, H, E), randn(B, NK, H, E), randn(B, NK, H, E)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(2)
    out, lse = attention(q, k, v, scale=scale, return_lse=True, impl=impl)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    logits = heads[0] @ heads[1].mT * (scale or 24**-0.5)
    assert lse.shape == (B, H, NQ)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    qkv = torch.stack([k, k * 0.5, v], dim=2)
    want = F.scaled_dot_product_attention(heads[1], heads[1] * 0.5, heads[2], scale=scale).transpose(1, 2).flatten(2)
    for packed, given in ((qkv, {}), (qkv.flatten(2), {"num_heads": H})):
        out, lse = attention_qkvpacked(packed, **given, scale=scale, return_lse=True, impl=impl)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        logits = heads[1] @ heads[1].mT * 0.5 * (scale or 24**-0.5)
        torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


@IMPLS
@pytest.mark.parametrize("num_heads", [1, 2, 3])
def test_width_between_the_heads(randn, impl, num_heads):
    """[B, N, 3·H·E] has the layout of timm's projection: queries, then keys, then values, each head by head."""
    x = randn(2, 5, 3 * num_heads * 16)
    q, k, v = (t.unflatten(2, (num_heads, 16)).transpose(1, 2) for t in x.chunk(3, dim=2))
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, num_heads * 16)
    torch.testing.assert_close(attention_qkvpacked(x, num_heads=num_heads, impl=impl), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["triton", "fused"])
@pytest.mark.parametrize("head_dim", [8, 12, 17, 100, 132, 136, 256])
def test_a_head_dimension_that_the_kernels_refuse_is_named(randn, impl, head_dim):
    q = randn(1, 3, 2, head_dim)
    said = f"impl='{impl}' cannot run: the kernels take head dimensions from 16 to 128 in steps of 8, not {head_dim}$"
    with pytest.raises(RuntimeError, match=f"^attention: {said}"):
        attention(q, q, q, impl=impl)
    with pytest.raises(RuntimeError, match=f"^attention_qkvpacked: {said}"):
        attention_qkvpacked(torch.stack([q, q, q], dim=2), impl=impl)


@pytest.mark.parametrize("op", [attention, attention_qkvpacked], ids=lambda op: op.__name__)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_tiles_are_asked_for_what_runs(randn, monkeypatch, op, p):
    """`configs` gets the architecture, a length, the head dimension, the dtype, and whether there is dropout."""
    asked = []
    for name in ("attention_fwd", "attention_bwd"):
        plain = getattr(configs, name)
        monkeypatch.setattr(configs, name, lambda *a, f=plain, n=name: asked.append((n, *a)) or f(*a))
    q, k, v = randn(1, 5, 2, 24).half().requires_grad_(), *(randn(1, 9, 2, 24).half() for _ in range(2))
    args = (q, k, v) if op is attention else (torch.stack([q] * 3, dim=2),)
    op(*args, dropout_p=p, impl="triton").sum().backward()
    keys, longer = (9, 9) if op is attention else (5, 5)
    arch, drops = runtime.arch(q.device), p > 0
    wanted = [("attention_fwd", keys), ("attention_bwd", longer)]
    assert asked == [(name, arch, n, 24, torch.float16, drops) for name, n in wanted]
