"""runtime.listen_to_attention: what a listener hears of the attention ops, and that it changes nothing."""

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vit.kernels import attention, attention_qkvpacked, attention_statistics, runtime
from vit.kernels.runtime import attention_listener, listen_to_attention


class Heard(list):
    """A listener that keeps what it hears, and checks that no gradient can flow into it."""

    def __call__(self, q: Tensor, k: Tensor, scale: float, saved: tuple[Tensor, Tensor] | None) -> None:
        assert not torch.is_grad_enabled()
        assert not any(t.requires_grad for t in (q, k, *(saved or ())))
        self.append((q, k, scale, saved))


def packed(q: Tensor, k: Tensor, v: Tensor, **options):
    return attention_qkvpacked(torch.stack([q, k, v], dim=2), **options)


every_impl = pytest.mark.parametrize("impl", ["triton", "reference"])
every_op = pytest.mark.parametrize("op", [attention, packed], ids=["attention", "attention_qkvpacked"])


def leaves(randn, N=13, E=16):
    return [randn(2, N, 2, E).requires_grad_() for _ in range(3)]


@every_op
@every_impl
@pytest.mark.parametrize("scale", [None, 0.7])
def test_what_it_hears(randn, dtype, op, impl, scale):
    """Queries and keys, the scale, and statistics of the forward that give the bits of those computed without them."""
    q, k, v = (t.detach().to(dtype) for t in leaves(randn))
    heard = Heard()
    with listen_to_attention(heard):
        op(q, k, v, scale=scale, impl=impl)
    ((q_heard, k_heard, scale_heard, saved),) = heard
    assert torch.equal(q_heard, q) and torch.equal(k_heard, k) and scale_heard == (scale or 0.25)
    options = {"grid_size": (3, 4), "num_prefix_tokens": 1, "scale": scale_heard, "received": True, "impl": impl}
    want = attention_statistics(q, k, **options)
    found = attention_statistics(q_heard, k_heard, saved=saved, **options)
    for name, a, b in zip(want._fields, found, want, strict=True):
        assert torch.equal(a, b), name
    assert (saved is None) == (impl == "reference")


@every_impl
def test_keys_of_another_length(randn, impl):
    q, k, v = randn(2, 5, 2, 16), randn(2, 7, 2, 16), randn(2, 7, 2, 16)
    heard = Heard()
    with listen_to_attention(heard):
        attention(q, k, v, impl=impl)
    (q_heard, k_heard, _, saved) = heard[0]
    assert q_heard.shape == q.shape and k_heard.shape == k.shape
    assert saved is None or [t.shape for t in saved] == [(2, 2, 5)] * 2


@every_op
@every_impl
@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("return_lse", [True, False])
def test_outputs_and_gradients_are_the_same(randn, op, impl, learning, return_lse):
    inputs = [t.requires_grad_(learning) for t in leaves(randn)]
    drop = {"dropout_p": 0.3, "seed": torch.tensor([3], device=inputs[0].device), "offset": 1}
    options = {"impl": impl, "return_lse": return_lse}

    def results(drop):
        outs = op(*inputs, **options, **drop)
        outs = outs if return_lse else (outs,)
        grads = torch.autograd.grad(outs[0].square().sum(), inputs) if learning else ()
        return [*outs, *grads]

    for some in ({}, drop):
        want, heard = results(some), Heard()
        with listen_to_attention(heard):
            found = results(some)
        assert len(heard) == 1
        assert all(map(torch.equal, found, want)) and len(found) == len(want)


@every_impl
def test_without_a_listener_nothing_is_saved(randn, monkeypatch, impl):
    launched, launch = [], runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *a, **o: (launched.append(o["m_ptr"]), launch(*a, **o)))
    q = randn(1, 5, 2, 16)
    attention(q, q, q, impl=impl)
    with listen_to_attention(Heard()):
        attention(q, q, q, impl=impl)
    assert [m is None for m in launched] == ([True, False] if impl == "triton" else [])


@every_impl
def test_nested(randn, impl):
    """The innermost listener hears, None switches all off, and the outer one hears again after."""
    q, outer, inner = randn(1, 5, 2, 16), Heard(), Heard()
    assert attention_listener() is None
    with listen_to_attention(outer):
        attention(q, q, q, impl=impl)
        with listen_to_attention(inner):
            attention(q, q, q, impl=impl)
            with listen_to_attention(None):
                assert attention_listener() is None
                attention(q, q, q, impl=impl)
            assert attention_listener() is inner
            attention(q, q, q, impl=impl)
        assert (len(outer), len(inner)) == (1, 2)
        attention(q, q, q, impl=impl)
        assert attention_listener() is outer
    attention(q, q, q, impl=impl)
    assert attention_listener() is None and (len(outer), len(inner)) == (2, 2)


@every_op
@every_impl
def test_exceptions_end_it(randn, op, impl):
    """Of the block, of the listener itself and of an op."""
    q, heard = randn(1, 5, 2, 16), Heard()

    def broken(*_):
        raise KeyError("heard enough")

    with listen_to_attention(heard):
        with pytest.raises(KeyError, match="heard enough"), listen_to_attention(broken):
            op(q, q, q, impl=impl)
        assert attention_listener() is heard
        with pytest.raises(ZeroDivisionError), listen_to_attention(None):
            raise ZeroDivisionError
        with pytest.raises(ValueError, match="scale"):
            op(q, q, q, scale=0.0, impl=impl)
        assert attention_listener() is heard and not heard
        op(q, q, q, impl=impl)
    assert attention_listener() is None and len(heard) == 1


def test_another_thread_hears_nothing(randn):
    """Neither of a listener here, nor is one of its own heard here."""
    q, here, there = randn(1, 5, 2, 16), Heard(), Heard()
    inside, done = threading.Event(), threading.Event()

    def other():
        attention(q, q, q)
        with listen_to_attention(there):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    with listen_to_attention(here):
        thread.start()
        assert inside.wait(60)
        attention(q, q, q)
        done.set()
        thread.join(60)
    assert not thread.is_alive() and len(here) == 1 and not there


@every_op
@every_impl
def test_compiled_code_tells_nothing(randn, op, impl):
    def fn(q, k, v):
        return op(q, k, v, impl=impl) * 2

    inputs, heard = leaves(randn), Heard()
    want = fn(*inputs)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    with listen_to_attention(heard):
        for _ in range(2):  # compiles, and runs what was compiled
            found = compiled(*inputs)
            torch.testing.assert_close(found, want)
            grads = torch.autograd.grad(found.sum(), inputs)
    assert not heard
    for a, b in zip(grads, torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_before_it_listens(randn):
    """The same code, compiled without a listener: it is neither recompiled nor told."""
    q, heard, graphs = randn(1, 5, 2, 16), Heard(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda q: attention(q, q, q), fullgraph=True, backend=backend)
    compiled(q)
    with listen_to_attention(heard):
        compiled(q)
    assert not heard and len(graphs) == 1


@every_op
@every_impl
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_tells_nothing(randn, op, impl, reentrant):
    """A checkpointed forward is heard once, though its backward computes it again; gradients are the same."""
    inputs, calls, heard = leaves(randn), [], Heard()

    def fn(q, k, v):
        calls.append(attention_listener())
        return op(q, k, v, impl=impl)

    want = torch.autograd.grad(fn(*inputs).square().sum(), inputs)
    calls.clear()
    with listen_to_attention(heard):
        out = checkpoint(fn, *inputs, use_reentrant=reentrant)
        assert len(heard) == 1
        out.square().sum().backward()
    assert calls == [heard, None] and len(heard) == 1
    for t, grad in zip(inputs, want, strict=True):
        torch.testing.assert_close(t.grad, grad)


@every_op
@every_impl
def test_it_hears_what_autocast_cast(randn, op, impl):
    heard = Heard()
    with torch.autocast(randn(1).device.type, torch.bfloat16), listen_to_attention(heard):
        op(*leaves(randn), impl=impl)
    q, k, _, saved = heard[0]
    assert q.dtype is k.dtype is torch.bfloat16
    assert saved is None or {t.dtype for t in saved} == {torch.float32}


def test_statistics_are_no_attention(randn):
    """attention_statistics runs the forward for m and log l, and tells nothing, so a listener may call it."""
    q, heard = randn(1, 5, 2, 16), Heard()
    with listen_to_attention(heard):
        for impl in ("triton", "reference"):
            attention_statistics(q, q, grid_size=(1, 5), impl=impl)
    assert not heard
    found = []
    with listen_to_attention(lambda q, k, scale, saved: found.append(attention_statistics(
        q, k, grid_size=(1, 5), scale=scale, saved=saved, impl="triton"
    ))):  # fmt: skip
        attention(q, q, q, impl="triton")
    assert torch.equal(found[0].entropy, attention_statistics(q, q, grid_size=(1, 5), impl="triton").entropy)
