"""`gemm_pingpong`: its source on a model of Hopper's asynchronous copies, and which products it takes."""

import dataclasses

import gluon_model
import pytest
import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vit.kernels import configs, gemm_pingpong, linear, mlp, reference, runtime
from vit.kernels.checks import ACTIVATIONS
from vit.kernels.dry_run import dry_run
from vit.kernels.linear import gemm

TILE = configs.Config(16, 16, 8, 2, pingpong=True)


def gelu_and_grad(x, activation):
    leaf = x.double().requires_grad_()
    y = reference.gelu(leaf, activation)
    return y.detach().float(), torch.autograd.grad(y.sum(), leaf)[0].float()


@pytest.fixture
def model(monkeypatch):
    """Runs launches of the kernel on the model, on so many multiprocessors."""

    def make(programs, seed):
        def launch(kernel, grid, *, num_warps, num_stages, **args):
            args = {k: gluon_model.Descriptor(v) if isinstance(v, TensorDescriptor) else v for k, v in args.items()}
            args = {k: gluon_model.Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
            gluon_model.run(kernel.fn.__name__, gemm_pingpong, args, grid, gelu_and_grad, seed)

        monkeypatch.setattr(configs, "gemm", lambda *_: TILE)
        monkeypatch.setattr(runtime, "launch", launch)
        monkeypatch.setattr(runtime, "arch", lambda device: 90)
        monkeypatch.setattr(runtime, "num_sms", lambda device: programs)
        monkeypatch.setattr(TensorDescriptor, "__post_init__", lambda self: None)  # smaller blocks than hardware takes

    return make


# One tile, ragged in every direction, fewer programs than tiles, one step of K or fewer than the ring has buffers.
SHAPES = [((16, 8, 16), 1), ((17, 40, 24), 3), ((50, 72, 40), 2), ((70, 16, 56), 4), ((33, 100, 72), 1)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("shape", "programs"), SHAPES)
@pytest.mark.parametrize("form", ["plain", "gelu", "gelu and h", "dgelu", "dgelu and all"])
def test_on_the_model(randn, model, form, shape, programs, seed):
    (M, K, N), half = shape, torch.float16
    a, weight, bias, pre = (randn(*s).to(half) for s in [(M, K), (N, K), (N,), (M, N)])
    product = a.double() @ weight.double().T
    model(programs, seed)
    activation = ACTIVATIONS[seed % 3]
    if form.startswith("dgelu"):
        every = form.endswith("all")
        out, aux, sums = gemm(a, weight.T.contiguous(), None, activation, pre, aux=every, sums=every)
        gelu, slope = gelu_and_grad(pre, activation)
        want, second = product * slope, gelu
        if every:
            torch.testing.assert_close(sums.double(), want.sum(dim=0), rtol=2e-3, atol=1e-2)
    else:
        activation = None if form == "plain" else activation
        out, aux, _ = gemm(a, weight, bias, activation, trans_b=True, aux=form.endswith("h"))
        h = product + bias
        want, second = h if activation is None else gelu_and_grad(h, activation)[0], h
    torch.testing.assert_close(out.double(), want.double(), rtol=2e-3, atol=2e-3)
    if aux.numel():
        torch.testing.assert_close(aux.double(), second.double(), rtol=2e-3, atol=2e-3)


def launched(monkeypatch, call, arch=90, **changes):
    """Names of the kernels that a call and its backward launch, with the kernel turned on."""
    pinned, names = configs.gemm, []
    monkeypatch.setattr(configs, "gemm", lambda *a: dataclasses.replace(pinned(*a), pingpong=True, **changes))
    with dry_run(arch, lambda kernel, *_: names.append(kernel.__name__)):
        call().sum().backward()
    monkeypatch.undo()
    return [name.removeprefix("_").removesuffix("_kernel") for name in names]


def test_takes(monkeypatch):
    """fc1 and its derivative in 16 bits on Hopper; what it cannot compute goes where it went."""

    def tensors(hidden=80, dtype=torch.bfloat16):
        shapes = [(2, 5, 48), (hidden, 48), (hidden,), (24, hidden), (24,)]
        return [torch.empty(s, dtype=dtype, requires_grad=True) for s in shapes]

    drop = {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64)}
    both = ["gemm_pingpong"] * 2
    assert launched(monkeypatch, lambda: mlp(*tensors())) == both
    assert launched(monkeypatch, lambda: mlp(*tensors(dtype=torch.float16))) == both
    plain = ["gemm"] * 2
    assert launched(monkeypatch, lambda: mlp(*tensors(dtype=torch.float32))) == plain
    assert launched(monkeypatch, lambda: mlp(*tensors(), **drop)) == plain
    assert launched(monkeypatch, lambda: mlp(*tensors(hidden=84))) == plain
    for arch in (80, 89, 100, 120):
        assert launched(monkeypatch, lambda: mlp(*tensors()), arch) == plain
    assert launched(monkeypatch, lambda: mlp(*tensors()), cheap=False) == plain
    x, weight, bias = tensors()[:3]
    products = ["gemm_pingpong", "gemm_pingpong", "gemm"]  # y, dx, dw
    assert launched(monkeypatch, lambda: linear(x, weight, bias, impl="triton")) == products


def test_off_by_default():
    for arch in (80, 89, 90, 100):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert not configs.gemm(arch, dtype, "ieee").pingpong
