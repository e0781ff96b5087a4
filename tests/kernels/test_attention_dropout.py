"""Dropout of the attention probabilities: forward and backward draw the mask of the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from views import last_programs_only, nan_padded

from vit.kernels import attention, attention_qkvpacked, configs, dropout_seed, reference
from vit.kernels.attention import (
    _launch_bwd,
    _launch_fwd,
    attention_bwd,
    attention_fwd,
    attention_qkvpacked_bwd,
    attention_qkvpacked_fwd,
)
from vit.testing import check_op


@pytest.fixture
def drop(device):
    return {"dropout_p": 0.3, "seed": torch.tensor([-1234567890123456789], device=device), "offset": 7}


def grads(fn, leaves: list[Tensor], do: Tensor) -> list[Tensor]:
    """The output and the gradient of every leaf."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = fn(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


@pytest.mark.parametrize(("B", "N", "H", "E", "p"), [(2, 17, 3, 16, 0.1), (1, 65, 2, 80, 0.5)])
def test_packed(randn, drop, dtype, B, N, H, E, p):
    check_op(
        lambda qkv: attention_qkvpacked(qkv, **drop | {"dropout_p": p}, impl="triton"),
        lambda qkv: reference.attention_qkvpacked(qkv, **drop | {"dropout_p": p}),
        {"qkv": randn(B, N, 3, H, E)},
        dtype,
    )


@pytest.mark.parametrize(("NQ", "NK", "H", "E"), [(1, 50, 2, 64), (50, 3, 2, 32), (65, 35, 1, 72)])
def test_unpacked(randn, drop, dtype, NQ, NK, H, E):
    inputs = {"q": randn(2, NQ, H, E), "k": randn(2, NK, H, E), "v": randn(2, NK, H, E)}
    check_op(
        lambda **a: attention(**a, **drop, scale=0.2, impl="triton"),
        lambda **a: reference.attention(**a, scale=0.2, **drop),
        inputs,
        dtype,
    )


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16)])
def test_the_mask_does_not_depend_on_tiles(randn, drop, monkeypatch, block_m, block_n):
    for name in ("attention_fwd", "attention_bwd"):
        monkeypatch.setattr(configs, name, lambda *_, **__: configs.Config(block_m=block_m, block_n=block_n))
    check_op(
        lambda **a: attention(**a, **drop, impl="triton"),
        lambda **a: reference.attention(**a, **drop),
        {"q": randn(1, 33, 2, 24), "k": randn(1, 50, 2, 24), "v": randn(1, 50, 2, 24)},
        torch.float32,
    )


def test_forward_and_backward_draw_one_mask(randn, drop):
    """The output and the gradients of q, k and v show the mask itself.

    With equal logits P = 1/NK. With unit vectors in v, the output is the mask / NK. With unit vectors in do, so is dv.
    """
    B, H, NQ, NK = 2, 3, 17, 32
    q, k = torch.zeros(B, NQ, H, 32), torch.zeros(B, NK, H, 32)
    v = torch.eye(NK)[None, :, None].expand(B, NK, H, NK)  # head_dim = NK
    want = reference.dropout_scale(
        drop["seed"].cpu(), drop["offset"], torch.Size((B, H, NQ, NK)), drop["dropout_p"]
    ).float()
    device = drop["seed"].device
    q, k, v = (t.to(device).requires_grad_() for t in (q, k, v))
    out = attention(q, k, v, **drop, impl="triton").view(B, NQ, H, NK)
    torch.testing.assert_close(out.detach().cpu().transpose(1, 2) * NK, want, rtol=1e-6, atol=0.0)

    eye = torch.eye(32, device=device)[:NQ, None].expand(B, NQ, H, 32)  # do of query i is unit vector i
    (dv,) = torch.autograd.grad(out, v, eye, retain_graph=True)
    torch.testing.assert_close(dv[..., :NQ].cpu().permute(0, 2, 3, 1) * NK, want, rtol=1e-6, atol=0.0)

    # dS = P (keep · do vᵀ − delta) with do = 1. dq is dS times k and dk is dSᵀ times q, so k and q hold unit vectors.
    ones = torch.ones_like(out).flatten(2)
    tiny = 1e-6  # logits stay equal
    with torch.no_grad():
        k.copy_(tiny * torch.eye(NK, device=device)[:, None].expand(B, NK, H, NK))
    out = attention(q, k, v, **drop, scale=1.0, impl="triton")
    (dq,) = torch.autograd.grad(out, q, ones)
    exact = (want - want.mean(-1, keepdim=True)) / NK
    torch.testing.assert_close(dq.cpu().transpose(1, 2) / tiny, exact, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        k.zero_()
        q.copy_(tiny * eye)
    out = attention(q, k, v, **drop, scale=1.0, impl="triton")
    (dk,) = torch.autograd.grad(out, k, ones)
    torch.testing.assert_close(dk[..., :NQ].cpu().permute(0, 2, 3, 1) / tiny, exact, rtol=1e-4, atol=1e-6)


def test_agrees_with_scaled_dot_product_attention(randn, drop):
    """Dropout comes after the softmax. PyTorch's attention to an identity as v returns the probabilities."""
    B, N, H, E = 1, 9, 2, 16
    q, k, v = (randn(B, N, H, E) for _ in range(3))
    probs = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), torch.eye(N, device=q.device).expand(B, H, N, N)
    )
    keep = reference.dropout_scale(drop["seed"], drop["offset"], probs.shape, drop["dropout_p"]).to(probs)
    want = ((probs * keep) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(q, k, v, **drop, impl="triton"), want, rtol=1e-5, atol=1e-6)


def test_statistics(randn):
    """The mean over seeds is attention without dropout, within the standard error."""
    qkv, p, draws = randn(1, 20, 3, 2, 16), 0.4, 400
    outs = torch.stack([
        reference.attention_qkvpacked(qkv, dropout_p=p, seed=torch.tensor([i], device=qkv.device)) for i in range(draws)
    ])  # fmt: skip
    error = (outs.mean(0) - reference.attention_qkvpacked(qkv)) / (outs.std(0) / draws**0.5)
    assert error.abs().max() < 5 and 0.8 < error.square().mean() < 1.2


def test_lse_is_that_of_all_probabilities(randn, drop):
    qkv = randn(1, 20, 3, 2, 16)
    for impl in ("triton", "reference"):
        _, lse = attention_qkvpacked(qkv, return_lse=True, impl=impl)
        assert torch.equal(attention_qkvpacked(qkv, return_lse=True, **drop, impl=impl)[1], lse)


def test_off_is_off(randn, drop):
    """p = 0 ignores seed and offset, and runs the kernel without dropout."""
    qkv = randn(1, 20, 3, 2, 16)
    off = drop | {"dropout_p": 0.0}
    for impl in ("triton", "reference"):
        assert torch.equal(attention_qkvpacked(qkv, **off, impl=impl), attention_qkvpacked(qkv, impl=impl))
        q, k, v = qkv.unbind(2)
        assert torch.equal(attention(q, k, v, **off, impl=impl), attention_qkvpacked(qkv, impl=impl))


@pytest.mark.interpreted
def test_gradcheck(randn, drop):
    qkv = randn(1, 3, 3, 2, 24).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_qkvpacked(x, **drop, impl="triton"), qkv, fast_mode=True)
    q, k, v = (randn(1, n, 2, 16).double().requires_grad_() for n in (35, 20, 20))
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **drop, impl="triton"), (q, k, v), fast_mode=True)


def test_opcheck(randn, drop):
    last = (drop["seed"], drop["dropout_p"], drop["offset"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    q, k = randn(1, 3, 2, 16), randn(1, 5, 2, 16)
    o, m, log_l = attention_fwd(q, k, k, 0.25, True, *last)
    leaves = [t.clone().requires_grad_() for t in (q, k, k)]
    torch.library.opcheck(attention_fwd, (*leaves, 0.25, True, *last))
    args = (randn(*o.shape), q, k, k, o, m, log_l, 0.25, True, True, *last)
    torch.library.opcheck(attention_bwd, args, test_utils=tests)
    qkv = randn(1, 3, 3, 2, 16)
    o, m, log_l = attention_qkvpacked_fwd(qkv, 0.25, True, *last)
    torch.library.opcheck(attention_qkvpacked_fwd, (qkv.clone().requires_grad_(), 0.25, True, *last))
    for need_dbias in (False, True):
        args = (randn(*o.shape), qkv, o, m, log_l, 0.25, *last, need_dbias)
        torch.library.opcheck(attention_qkvpacked_bwd, args, test_utils=tests)


@pytest.mark.parametrize("wanted", ["q", "v", "kv"])
def test_frozen_inputs(randn, drop, wanted):
    tensors, do = [randn(1, n, 2, 16) for n in (17, 20, 20)], randn(1, 17, 32)
    every = grads(lambda *t: attention(*t, **drop, impl="triton"), tensors, do)[1:]
    leaves = [t.clone().requires_grad_(n in wanted) for n, t in zip("qkv", tensors, strict=True)]
    attention(*leaves, **drop, impl="triton").backward(do)
    for name, leaf, want in zip("qkv", leaves, every, strict=True):
        assert torch.equal(leaf.grad, want) if name in wanted else leaf.grad is None


def test_same_bits(randn, drop, dtype):
    """A second run, packing and any strides of inputs and gradients change no bit."""
    qkv, do = randn(2, 17, 3, 2, 24).to(dtype), randn(2, 17, 48).to(dtype)

    def packed(x):
        return attention_qkvpacked(x, **drop, impl="triton")

    first = grads(packed, [qkv], do)
    tokens_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (qkv, do)]
    for x, cotangent in [(qkv, do), tokens_first, (nan_padded(qkv), nan_padded(do)), (qkv.mT.contiguous().mT, do)]:
        assert all(map(torch.equal, first, grads(packed, [x], cotangent)))
    out, *three = grads(lambda *t: attention(*t, **drop, impl="triton"), list(qkv.unbind(2)), do)
    assert torch.equal(first[0], out) and torch.equal(first[1], torch.stack(three, dim=2))


def test_compiled_code_draws_anew_at_every_call(randn):
    def fn(x):
        return attention_qkvpacked(x, dropout_p=0.5, seed=dropout_seed(x), offset=3, impl="triton")

    compiled, qkv = torch.compile(fn, fullgraph=True, backend="aot_eager"), randn(1, 5, 3, 2, 16).requires_grad_()
    torch.manual_seed(5)
    first, second = compiled(qkv), compiled(qkv)
    torch.manual_seed(5)
    eager = fn(qkv)
    assert torch.equal(first, eager) and not torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(out.sum(), qkv)[0] for out in (first, eager)))


@pytest.mark.interpreted
def test_rows_beyond_32_bits(randn, drop, tmp_path):
    """The rows of the mask, (b · H + h) · NQ + query, are beyond 2³² in the last sample.

    All samples share their memory. The statistics are in a sparse file, of which only the last sample is written.
    """
    N, E, scale, p = 40, 16, 0.25, drop["dropout_p"]
    B = 2**32 // N + 2
    q, k, v, do = (randn(1, N, 1, E) for _ in range(4))
    o, dq, dk, dv = (torch.empty(1, N, 1, E) for _ in range(4))
    m, log_l, *scratch = (
        torch.from_numpy(np.memmap(tmp_path / name, dtype=np.float32, mode="w+", shape=(B, 1, N))) for name in "mlsd"
    )
    logits = torch.einsum("bqhe,bkhe->bhqk", q, k)
    m[-1:] = logits.amax(-1)
    log_l[-1:] = (scale * (logits - m[-1:, ..., None])).logsumexp(-1)
    every = [t.expand(B, N, 1, E) for t in (q, k, v, o, do, dq, dk, dv)]
    with last_programs_only(2):  # tiles of 32 queries
        _launch_fwd(*every[:4], m[:0], log_l[:0], scale, drop["seed"], p, drop["offset"])
    with last_programs_only(4):  # two tiles of keys, and two of queries
        _launch_bwd(*every[:5], m, log_l, *every[5:], None, scratch, scale, drop["seed"], p, drop["offset"])

    rows = torch.arange((B - 1) * N, B * N)
    assert rows.min() >= 2**32
    words = reference.dropout_words(drop["seed"], drop["offset"], rows, N)
    keep = torch.where(words >= int(p * 2**32), 1 / (1 - p), 0.0)

    def eager(q, k, v):
        probs = (torch.einsum("bqhe,bkhe->bhqk", q, k) * scale).softmax(-1)
        return torch.einsum("bhqk,bkhe->bqhe", probs * keep, v)

    for got, want in zip((o, dq, dk, dv), grads(eager, [q, k, v], do), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_empty(randn, drop):
    for shape in [(0, 5, 3, 2, 16), (2, 0, 3, 2, 16)]:
        out, dqkv = grads(
            lambda x: attention_qkvpacked(x, **drop, impl="triton"), [randn(*shape)], randn(*shape[:2], 32)
        )
        assert out.shape == (*shape[:2], 32) and dqkv.shape == shape


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be in"),
        ({"seed": 17}, TypeError, "int64 tensor of one element, .* got int"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, TypeError, r"got torch.int64 \(2,\)"),
        ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_bad_input(randn, drop, impl, change, error, message):
    qkv = randn(1, 5, 3, 2, 16)
    with pytest.raises(error, match=f"^attention_qkvpacked: .*{message}"):
        attention_qkvpacked(qkv, **drop | change, impl=impl)
    with pytest.raises(error, match=f"^attention: .*{message}"):
        attention(*qkv.unbind(2), **drop | change, impl=impl)
