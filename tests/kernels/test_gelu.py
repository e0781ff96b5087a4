"""gelu_and_grad, which `linear` and `mlp` use: accuracy, tails, and which results take the cheap form."""

import pytest
import torch
import triton
import triton.language as tl
from peers import import_transformers

from vit.kernels import linear, mlp, reference, runtime, tile
from vit.kernels.checks import ACTIVATIONS


@triton.jit
def _gelu_kernel(x_ptr, gelu_ptr, grad_ptr, size, ACTIVATION: tl.constexpr, CHEAP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size, other=0.0)
    gelu, grad = tile.gelu_and_grad(x, ACTIVATION, CHEAP)
    tl.store(gelu_ptr + offs, gelu, mask=offs < size)
    tl.store(grad_ptr + offs, grad, mask=offs < size)


def gelu_points(device, dtype):
    special = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1e-20, -1e-20, 50.0, -50.0, 65504.0, -65504.0, 3e38, -3e38]
    points = torch.cat([torch.linspace(-12, 12, 24_001), torch.tensor(special)])
    return points.to(device, dtype)


def run_gelu(x, activation, cheap):
    gelu, grad = torch.empty_like(x), torch.empty_like(x)
    runtime.launch(
        _gelu_kernel, triton.cdiv(x.numel(), 8192), x_ptr=x, gelu_ptr=gelu, grad_ptr=grad, size=x.numel(),
        ACTIVATION=activation, CHEAP=cheap, BLOCK=8192, num_warps=4, num_stages=1,
    )  # fmt: skip
    return gelu, grad


def exact_gelu(x, activation):
    leaf = x.double().requires_grad_()
    if activation == "quick_gelu":
        y = torch.nn.functional.silu(1.702 * leaf) / 1.702
    else:
        y = torch.nn.functional.gelu(leaf, approximate="tanh" if activation == "gelu_tanh" else "none")
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    return y.detach(), grad


# Largest absolute errors of gelu (up to 12) and of its derivative (up to 1.13) for |x| <= 12.
LIMITS = {
    ("gelu", False): (8e-7, 3e-7), ("gelu", True): (5e-7, 4e-7), ("gelu_tanh", False): (8e-7, 4e-7),
    ("gelu_tanh", True): (8e-7, 3e-6), ("quick_gelu", False): (8e-7, 4e-7), ("quick_gelu", True): (8e-7, 2e-6),
}  # fmt: skip
# From this |x| on, gelu is exactly x or nearly 0, and its derivative exactly 1 or nearly 0.
FAR = {"gelu": 12, "gelu_tanh": 12, "quick_gelu": 46}


@pytest.mark.parametrize(("activation", "cheap"), LIMITS)
def test_gelu_and_grad(device, activation, cheap):
    x = gelu_points(device, torch.float32)
    gelu, grad = run_gelu(x, activation, cheap)
    exact, exact_grad = exact_gelu(x, activation)
    assert gelu.isfinite().all() and grad.isfinite().all()
    near = x.abs() <= 12
    limit, limit_grad = LIMITS[activation, cheap]
    assert (gelu - exact)[near].abs().max() <= limit
    assert (grad - exact_grad)[near].abs().max() <= limit_grad
    right, left = x >= FAR[activation], x <= -FAR[activation]
    assert torch.equal(gelu[right], x[right]) and gelu[left].abs().max() < 1e-30
    assert torch.equal(grad[right], torch.ones_like(grad[right])) and grad[left].abs().max() < 1e-30
    assert (gelu[x <= 0] <= 0).all() and (gelu[x >= 0] >= 0).all()
    assert torch.equal(gelu[x == 0].signbit(), x[x == 0].signbit())


def ulp(y, dtype):
    """The distance between neighbouring numbers of this dtype at y."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(y.abs().clamp(info.tiny, info.max)))) * info.eps


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_number_of_16_bits(device, activation, half):
    """The error is at most half an ulp + 6e-7. For "gelu" in fp16 it is at most 0.75 ulp, also in the tail."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(half).to(device)
    x = x[x.isfinite()]
    for ours, exact in zip(run_gelu(x.float(), activation, True), exact_gelu(x, activation), strict=True):
        error, unit = (ours.to(half).double() - exact).abs(), ulp(exact, half)
        assert (error <= 0.5 * unit + 6e-7).all()
        if activation == "gelu" and half is torch.float16:
            assert (error <= 0.75 * unit).all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_cheap_form_is_as_good_as_pytorch(device, activation, half):
    """The rms error of 16-bit results is at most 1.05 times PyTorch's, which computes erf and tanh in fp32."""
    x = torch.linspace(-8, 8, 20_001).to(device, half)
    leaf = x.clone().requires_grad_()
    y = reference.gelu(leaf, activation)
    theirs = y.detach(), *torch.autograd.grad(y.sum(), leaf)
    for a, b, exact in zip(run_gelu(x.float(), activation, True), theirs, exact_gelu(x, activation), strict=True):
        rms = [(t.to(half).double() - exact).square().mean().sqrt() for t in (a, b)]
        assert rms[0] <= 1.05 * rms[1]


@pytest.mark.parametrize(("activation", "cheap"), LIMITS)
def test_infinity_and_nan(device, activation, cheap):
    x = torch.tensor([float("inf"), float("nan"), -0.0, 0.0], device=device)
    gelu, grad = run_gelu(x, activation, cheap)
    assert gelu[0] == float("inf") and gelu[1].isnan() and grad[1].isnan()
    assert gelu[2:].tolist() == [0.0, 0.0] and gelu[2:].signbit().tolist() == [True, False]
    torch.testing.assert_close(grad[2:], torch.full_like(grad[2:], 0.5), rtol=0.0, atol=1e-7)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gelu_and_grad_in_fp64(device, activation):
    x = gelu_points(device, torch.float64)
    for ours, exact in zip(run_gelu(x, activation, False), exact_gelu(x, activation), strict=True):
        near = x.abs() <= 12
        assert (ours - exact)[near].abs().max() <= 1e-14


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_16_bit_results_take_the_cheap_form(device, activation):
    x = torch.linspace(-6, 6, 1600, device=device).half().float().reshape(-1, 16)
    exact, cheap = run_gelu(x, activation, False)[0], run_gelu(x, activation, True)[0]
    assert not torch.equal(exact, cheap)
    identity = torch.eye(16, device=device)
    assert torch.equal(linear(x, identity, activation=activation, impl="triton"), exact)
    assert torch.equal(linear(x.half(), identity.half(), activation=activation, impl="triton"), cheap.half())


@pytest.mark.peers
def test_quick_gelu_is_that_of_clip(device):
    """The reference has the formula of transformers' CLIP."""
    x = gelu_points(device, torch.float32)
    theirs = import_transformers().activations.QuickGELUActivation()(x)
    assert torch.equal(reference.gelu(x, "quick_gelu"), theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(device, dtype, activation):
    """For the largest numbers of a dtype, values are x or 0 and gradients 1 or 0."""
    far = torch.tensor([[torch.finfo(dtype).max], [torch.finfo(dtype).min], [2000.0], [-2000.0]], device=device)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for op in (lambda x: linear(x, one, None, activation, impl="triton"),
               lambda x: mlp(x, one, None, one, None, activation, impl="triton")):  # fmt: skip
        x = far.to(dtype, copy=True).requires_grad_()
        y = op(x)
        y.sum().backward()
        assert torch.equal(y, x.clamp(min=0)) and torch.equal(x.grad, (x > 0).to(dtype))
