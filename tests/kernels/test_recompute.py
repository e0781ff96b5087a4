"""LayerNorm outputs that linear and mlp compute again in their backward: what is saved, and all gradients."""

import contextlib
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from vit.kernels import layer_norm, linear, mlp, recompute, reference, residual_layer_norm, runtime
from vit.testing import check_op

D, WIDE = 48, 80
READERS = {
    "linear": (lambda y, w1, b1, w2, impl: linear(y, w1, b1, impl=impl), "triton"),
    "cublas": (lambda y, w1, b1, w2, impl: linear(y, w1, b1, impl=impl), "fused"),
    "gelu": (lambda y, w1, b1, w2, impl: linear(y, w1, b1, "gelu", impl=impl), "triton"),
    "mlp": (lambda y, w1, b1, w2, impl: mlp(y, w1, b1, w2, None, impl=impl), "triton"),
}
readers = pytest.mark.parametrize("reader", READERS)


@pytest.fixture
def given(randn):
    return {
        "x": 2 * randn(2, 17, D) + 1, "weight": randn(D) + 1, "bias": randn(D),
        "w1": randn(WIDE, D) / 7, "b1": randn(WIDE), "w2": randn(D, WIDE) / 9,
    }  # fmt: skip


def leaves(given):
    return {name: t.clone().requires_grad_() for name, t in given.items()}


def read(y, reader, t):
    run, impl = READERS[reader]
    return run(y, t["w1"], t["b1"], t["w2"], impl)


def normed(t, **options):
    return layer_norm(t["x"], t["weight"], t["bias"], impl="triton", **options)


@contextlib.contextmanager
def saving():
    """The elements of each storage that autograd saves inside."""
    saved = {}

    def keep(t):
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes() // t.element_size()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        yield saved


def key(t):
    return t.untyped_storage()._cdata


@readers
@pytest.mark.parametrize("affine", [False, True])
def test_gradients(given, dtype, reader, affine):
    run, impl = READERS[reader]

    def ours(x, weight, bias, w1, b1, w2):
        return run(layer_norm(x, weight, bias, recompute=True, impl="triton"), w1, b1, w2, impl)

    def exact(x, weight, bias, w1, b1, w2):
        return run(reference.layer_norm(x, weight, bias), w1, b1, w2, "reference")

    inputs = given if affine else given | {"weight": None, "bias": None}
    check_op(ours, exact, inputs | ({} if reader == "mlp" else {"w2": None}), dtype)


@readers
def test_residual(given, randn, dtype, reader):
    run, impl = READERS[reader]

    def pair(add_norm, path, **options):
        def call(x, branch, weight, bias, w1, b1, w2):
            stream, y = add_norm(x, branch, weight, bias, 1e-3, **options)
            return stream, run(y, w1, b1, w2, path)

        return call

    inputs = given | {"branch": randn(2, 17, D)} | ({} if reader == "mlp" else {"w2": None})
    ours = pair(residual_layer_norm, impl, recompute=True, impl="triton")
    check_op(ours, pair(reference.residual_layer_norm, "reference"), inputs, dtype)


@readers
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_y_is_not_saved_and_has_the_same_bits_again(given, randn, reader, stream):
    """Nor does its note keep it alive."""
    grads = []
    for again in (False, True):
        t = leaves({name: v.bfloat16() for name, v in given.items()} | {"x": given["x"].to(stream)})
        with saving() as saved:
            s, y = residual_layer_norm(
                t["x"], t["x"].bfloat16() / 2, t["weight"], t["bias"], 1e-3, recompute=again, impl="triton"
            )
            out = read(y, reader, t)
        assert key(s) in saved and (key(y) in saved) is not again
        alive = weakref.ref(y)
        del y
        assert (alive() is None) is again
        out.sum().backward()
        grads.append({name: v.grad for name, v in t.items() if v.grad is not None})
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())
    assert {"x", "weight", "bias", "w1", "b1"} <= set(grads[1])


@readers
@pytest.mark.parametrize("changed", ["y", "x", "weight", "bias"])
def test_changed_in_place(given, reader, changed):
    """y itself is saved if it, or what it was computed from, has changed since."""
    t = leaves(given)
    y = normed(t, recompute=True)
    with torch.no_grad():
        (y if changed == "y" else t[changed]).mul_(3)
    seen = y.detach().clone().requires_grad_()
    out = read(y, reader, t)
    cotangent = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, t["w1"], cotangent)
    (want,) = torch.autograd.grad(read(seen, reader, t), t["w1"], cotangent)
    assert torch.equal(found, want)


@readers
def test_changed_in_place_after_it_was_read(given, reader):
    t = leaves(given)
    out = read(normed(t, recompute=True), reader, t)
    with torch.no_grad():
        t["bias"].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), t["w1"])


@pytest.mark.parametrize("change", ["view", "cast"])
def test_another_tensor_is_saved(given, change):
    t = leaves(given)
    y = normed(t, recompute=True)
    other = y[:, 0] if change == "view" else y.double().float()
    with saving() as saved:
        out = linear(other, t["w1"], t["b1"], impl="triton")
    assert key(other) in saved
    (dw,) = torch.autograd.grad(out.sum(), t["w1"])
    torch.testing.assert_close(dw, other.detach().reshape(-1, D).sum(0).expand(WIDE, D))


def test_frozen(given):
    """Nothing is saved for a weight that does not require grad."""
    t = given | {"x": given["x"].clone().requires_grad_()}
    y = normed(t, recompute=True)
    with saving() as saved:
        out = linear(y, t["w1"], t["b1"], impl="fused")
    assert key(y) not in saved and key(t["x"]) not in saved
    out.sum().backward()
    with torch.no_grad():
        assert not recompute.has_source(normed(t, recompute=True))


def test_the_path_is_cublas(given):
    """The product stays cuBLAS's, in the bits of PyTorch's linear layer. What is not computed again stays PyTorch's."""
    t = leaves(given)
    y = normed(t, recompute=True)
    with runtime.record_choices() as choices:
        ours = linear(y, t["w1"], t["b1"], impl="fused")
    plain = linear(y.clone(), t["w1"], t["b1"], impl="fused")
    assert [c.path for c in choices] == ["cublas"] and torch.equal(ours, plain)
    assert "linear_fwd" in ours.grad_fn.name() and "linear_fwd" not in plain.grad_fn.name()
    assert "linear_fwd" not in linear(y, t["w1"], t["b1"], impl="reference").grad_fn.name()


@pytest.mark.parametrize("change", [False, True])
@readers
def test_compiled(given, reader, change):
    """Compiled code has the same bits, also if y changes in place. It does not save y, except for cuBLAS."""

    def step(x, weight, bias, w1, b1, w2):
        y = layer_norm(x, weight, bias, recompute=True, impl="triton")
        if change:
            y.mul_(3)
        return read(y, reader, {"w1": w1, "b1": b1, "w2": w2})

    results, sizes = [], []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch._dynamo.reset()
        t = leaves(given)
        with saving() as saved:
            out = run(*t.values())
        sizes.append(sum(saved.values()))
        out.sum().backward()
        results.append([out, *(v.grad for v in t.values() if v.grad is not None)])
    assert all(map(torch.equal, *results))
    if not change:
        assert sizes[1] - sizes[0] == (2 * 17 * D - D if reader == "cublas" else 0)  # y instead of the norm's bias
