"""`linear` and `mlp` are as exact as their mirror: the same algorithm in PyTorch, which rounds at the same places.

Sums are fp32, and the bias is part of them. The forward applies GELU to the unrounded h, the backward to the saved,
rounded h. keep · gelu(h) and dh are rounded before the products that read them.
"""

import functools

import pytest
import torch

from vit.kernels import linear, mlp, reference
from vit.kernels.checks import ACTIVATIONS
from vit.testing import check_mirror

HALF = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def product(a, b):
    return a.float() @ b.float()


def tf32(x):
    """x without its lowest 13 bits, which a tensor core ignores."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def tf32_product(a, b):
    return tf32(a.contiguous()) @ tf32(b.contiguous())


def bf16_product(a, b):
    """The bug: the sum is rounded after every 16 elements of K."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    for k in range(0, a.shape[1], 16):
        total = (total.float() + product(a[:, k : k + 16], b[k : k + 16])).to(torch.bfloat16)
    return total.float()


def gelu_and_grad(h, activation):
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        y = reference.gelu(leaf, activation)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


def plus(x, bias):
    return x if bias is None else x + bias.float()


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, product):
        pre = plus(product(x, weight.T), bias)
        ctx.save_for_backward(x, weight, pre.to(x.dtype))
        ctx.activation, ctx.product = activation, product
        return (pre if activation is None else gelu_and_grad(pre, activation)[0]).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, weight, pre), product = ctx.saved_tensors, ctx.product
        dh = dy
        if ctx.activation is not None:
            dh = (dy.float() * gelu_and_grad(pre.float(), ctx.activation)[1]).to(dy.dtype)
        grads = product(dh, weight), product(dh.T, x), dh.float().sum(dim=0)
        return *(g.to(dy.dtype) for g in grads), None, None


class Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, keep, product):
        pre = plus(product(x, fc1_weight.T), fc1_bias)
        act = (gelu_and_grad(pre, activation)[0] * keep).to(x.dtype)
        ctx.save_for_backward(x, fc1_weight, fc2_weight, pre.to(x.dtype), keep)
        ctx.activation, ctx.product = activation, product
        return plus(product(act, fc2_weight.T), fc2_bias).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x, fc1_weight, fc2_weight, pre, keep), product = ctx.saved_tensors, ctx.product
        act, slope = gelu_and_grad(pre.float(), ctx.activation)
        act = (act * keep).to(dy.dtype)
        dh = (product(dy, fc2_weight) * slope * keep).to(dy.dtype)
        grads = (
            product(dh, fc1_weight), product(dh.T, x), dh.float().sum(dim=0),
            product(dy.T, act), dy.float().sum(dim=0),
        )  # fmt: skip
        return *(g.to(dy.dtype) for g in grads), None, None, None


def layer(randn):
    return {"x": randn(139, 320), "weight": randn(72, 320) * 320**-0.5, "bias": randn(72)}


def check_linear(randn, dtype, activation, ours=linear, product=product):
    check_mirror(
        lambda **a: ours(**a, activation=activation),
        lambda **a: Linear.apply(*a.values(), activation, product),
        lambda **a: reference.linear(**a, activation=activation),
        layer(randn),
        dtype,
    )


def block(randn):
    return {
        "x": randn(139, 96), "fc1_weight": randn(320, 96) * 96**-0.5, "fc1_bias": randn(320),
        "fc2_weight": randn(48, 320) * 320**-0.5, "fc2_bias": randn(48),
    }  # fmt: skip


def check_mlp(randn, dtype, activation, p=0.0, ours=mlp, product=product):
    inputs = block(randn)
    seed = torch.tensor([7], device=inputs["x"].device)
    drop = {"dropout_p": p, "seed": seed, "offset": 3}
    keep = reference.dropout_scale(seed, 3, torch.Size((139, 320)), p).float()
    check_mirror(
        lambda **a: ours(**a, activation=activation, **drop),
        lambda **a: Mlp.apply(*a.values(), activation, keep, product),
        lambda **a: reference.mlp(**a, activation=activation, **drop),
        inputs,
        dtype,
    )


@HALF
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_linear(randn, half, activation):
    check_linear(randn, half, activation, functools.partial(linear, impl="triton"))


@HALF
@pytest.mark.parametrize(("activation", "p"), [("gelu", 0.0), ("gelu", 0.25), ("gelu_tanh", 0.0), ("quick_gelu", 0.25)])
def test_mlp(randn, half, activation, p):
    check_mlp(randn, half, activation, p, functools.partial(mlp, impl="triton"))


@pytest.mark.gpu
def test_tf32(randn, monkeypatch):
    """This needs a GPU, because the interpreter multiplies in fp32 whatever the precision is."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    check_linear(randn, torch.float32, "gelu", functools.partial(linear, impl="triton"), tf32_product)
    check_mlp(randn, torch.float32, "gelu", 0.25, functools.partial(mlp, impl="triton"), tf32_product)


def with_bug(function, *args):
    """The mirror with a bug, instead of the op."""
    return lambda activation, dropout_p=0.0, seed=None, offset=0, **a: function.apply(*a.values(), *args)


@HALF
def test_a_sum_in_bf16_fails(randn, half):
    with pytest.raises(AssertionError, match="output 0: rms"):
        check_linear(randn, half, "gelu", with_bug(Linear, "gelu", bf16_product))
    keep = torch.ones((), device=randn(1).device)
    with pytest.raises(AssertionError, match="output 0: rms"):
        check_mlp(randn, half, "gelu", 0.0, with_bug(Mlp, "gelu", keep, bf16_product))


@pytest.mark.parametrize("half", [torch.float16])
def test_tanh_for_erf_fails(randn, half):
    """bf16 is too coarse for the difference. The fp32 tests of both ops detect it, too."""
    keep = torch.ones((), device=randn(1).device)
    with pytest.raises(AssertionError, match="rms"):
        check_linear(randn, half, "gelu", with_bug(Linear, "gelu_tanh", product))
    with pytest.raises(AssertionError, match="rms"):
        check_mlp(randn, half, "gelu", 0.0, with_bug(Mlp, "gelu_tanh", keep, product))


@HALF
def test_h_rounded_before_the_gelu_fails(randn, half):
    """Eager PyTorch rounds h, so `check_op` does not detect it."""
    with pytest.raises(AssertionError, match="output 0: rms"):
        check_linear(randn, half, "gelu", reference.linear)
