"""attention_probs: the probabilities, which the fused kernels do not store. A call of it does not change the op."""

import pytest
import torch
from torch import Tensor

from vit.kernels import attention, attention_probs, attention_qkvpacked
from vit.testing import check


def naive(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The formula of timm's Attention without a fused kernel, from [B, N, H, E]."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)


@pytest.mark.parametrize("scale", [None, 0.6])
def test_probabilities(randn, dtype, scale):
    q, k = (3 * randn(2, n, 3, 40).to(dtype) for n in (17, 50))
    probs = attention_probs(q, k, scale=scale)
    exact = naive(q.double(), k.double(), scale or 40**-0.5)
    assert probs.dtype is torch.float32 and probs.shape == (2, 3, 17, 50)
    check(probs, naive(q.float(), k.float(), scale or 40**-0.5), exact)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 17, device=q.device), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(attention_probs(q.double(), k.double(), scale=scale), exact)


def test_they_are_those_of_the_fused_forward(randn, dtype):
    """The probabilities times v are its output, and its logsumexp normalises them. Its bits do not change."""
    qkv = randn(2, 33, 3, 2, 32).to(dtype)
    q, k, v = qkv.unbind(2)
    before, lse = attention_qkvpacked(qkv, return_lse=True, impl="triton")
    probs = attention_probs(q, k)
    assert torch.equal(attention_qkvpacked(qkv, impl="triton"), before)
    out = torch.einsum("bhqk,bkhe->bqhe", probs, v.float()).flatten(2)
    unit = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(out, before.float(), rtol=2 * unit, atol=2 * unit)
    logits = torch.einsum("bqhe,bkhe->bhqk", q.float(), k.float()) * 32**-0.5
    torch.testing.assert_close(probs, (logits - lse[..., None]).exp(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("queries", [[0], [3, -1, 3], range(2, 5), torch.tensor([4, 0])])
def test_chosen_queries(randn, queries):
    q, k = randn(2, 6, 3, 16), randn(2, 9, 3, 16)
    whole = attention_probs(q, k)
    want = whole[:, :, list(queries) if isinstance(queries, range) else queries]
    torch.testing.assert_close(attention_probs(q, k, queries=queries), want)
    torch.testing.assert_close(attention_probs(q[:, :, 1:2], k[:, :, 1:2]), whole[:, 1:2])  # a chosen head


def test_gradcheck(randn):
    q, k = (randn(1, n, 2, 8).double().requires_grad_() for n in (4, 5))

    def fn(q, k):
        return attention_probs(q, k, queries=[2, 0], scale=0.5)

    assert torch.autograd.gradcheck(fn, (q, k)) and torch.autograd.gradgradcheck(fn, (q, k))


def test_autocast(randn):
    """Queries and keys are cast as for the fused op. The probabilities are fp32."""
    q, k = randn(1, 5, 2, 16).requires_grad_(), randn(1, 7, 2, 16)
    with torch.autocast(q.device.type, torch.bfloat16):
        probs = attention_probs(q, k)
        assert attention(q, k, k).dtype is torch.bfloat16
    assert torch.equal(probs, attention_probs(q.bfloat16(), k.bfloat16())) and probs.dtype is torch.float32
    assert torch.autograd.grad(probs.square().sum(), q)[0].dtype is torch.float32


def test_compile_fullgraph(randn):
    q, k = randn(1, 5, 2, 16), randn(1, 7, 2, 16)
    compiled = torch.compile(attention_probs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, queries=[0]), attention_probs(q, k, queries=[0]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(5, 2, 16)}, ValueError, r"q must have shape \[B, NQ, H, E\], got \(5, 2, 16\)"),
        ({"k": torch.ones(2, 7, 3, 16)}, ValueError, r"k must have shape .* got \(2, 7, 3, 16\)"),
        ({"k": torch.ones(2, 0, 2, 16)}, ValueError, "k must have at least one token"),
        ({"k": torch.ones(2, 7, 2, 16).half()}, TypeError, "k is torch.float16 but q is torch.float32"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"queries": [0, 5]}, IndexError, "queries has 5, but there are 5 queries"),
        ({"queries": [-6]}, IndexError, "queries has -6"),
        ({"queries": torch.ones(5, dtype=torch.bool)}, TypeError, "queries must be a list of indices, got torch.bool"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"^attention_probs: {message}"):
        attention_probs(**{"q": torch.ones(2, 5, 2, 16), "k": torch.ones(2, 7, 2, 16)} | change)


@pytest.mark.parametrize("queries", [[], (), range(0), torch.tensor([], dtype=torch.int64)], ids=str)
def test_no_queries_is_not_all_queries(randn, queries):
    assert attention_probs(randn(2, 6, 3, 16), randn(2, 9, 3, 16), queries=queries).shape == (2, 3, 0, 9)


@pytest.mark.parametrize(
    "queries", [[-5], [4], [4, -5, 4], (0, 1), torch.tensor([-1, 0]), torch.tensor([2], dtype=torch.int32)]
)
def test_queries_from_both_ends(randn, queries):
    """The result has the first and last query in the order of the list, also if an index repeats."""
    q, k = randn(2, 5, 3, 16), randn(2, 9, 3, 16)
    places = [i % 5 for i in torch.as_tensor(queries).tolist()]
    want = torch.stack([naive(q, k, 0.25)[:, :, i] for i in places], dim=2)
    torch.testing.assert_close(attention_probs(q, k, queries=queries), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(1, 7, 2, 16)}, ValueError, r"k must have shape .*\(2, 5, 2, 16\), got \(1, 7, 2, 16\)"),
        ({"k": torch.ones(2, 7, 2, 8)}, ValueError, r"k must have shape .* got \(2, 7, 2, 8\)"),
        ({"k": torch.ones(2, 7, 16)}, ValueError, r"k must have shape .* got \(2, 7, 16\)"),
        ({"q": torch.ones(2, 5, 2, 16).int()}, TypeError, r"q must be a floating-point tensor, got torch\.int32"),
        ({"k": [1.0]}, TypeError, r"k must be a torch\.Tensor, got list"),
        ({"scale": -1.0}, ValueError, r"scale must be positive and finite, got -1\.0"),
        ({"scale": float("inf")}, ValueError, "scale must be positive and finite, got inf"),
        ({"queries": range(4, 7)}, IndexError, "queries has 5, but there are 5 queries"),
        ({"queries": torch.tensor([[1]])}, TypeError, r"queries must be a list of indices, got torch\.int64 \(1, 1\)"),
        ({"queries": torch.tensor([1.0])}, TypeError, r"queries must be a list of indices, got torch\.float32"),
        ({"queries": torch.tensor(1)}, TypeError, r"queries must be a list of indices, got torch\.int64 \(\)"),
    ],
)
def test_more_bad_input(change, error, message):
    with pytest.raises(error, match=f"^attention_probs: {message}"):
        attention_probs(**{"q": torch.ones(2, 5, 2, 16), "k": torch.ones(2, 7, 2, 16)} | change)
