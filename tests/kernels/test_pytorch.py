"""Attention with ``impl="auto"`` on a CPU: PyTorch's fused operator, with the derivatives of the formula."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit.kernels import attention, attention_qkvpacked, pytorch, reference, runtime
from vit.testing import check_op

N = 33


@pytest.fixture
def rand():
    """``rand(*shape)``: normal numbers on the CPU, other ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator, dtype=dtype)


@pytest.fixture
def fused(monkeypatch):
    """The calls of PyTorch's fused forward."""
    calls, apply = [], pytorch._Attention.apply
    monkeypatch.setattr(pytorch._Attention, "apply", lambda *args: (calls.append(args), apply(*args))[1])
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [7, 64, 136])
def test_accuracy(rand, fused, dtype, head_dim):
    """Judged as a kernel is, also at a head dimension that the kernels do not take.

    The logits are small. Of large ones PyTorch's operator rounds the logsumexp, which the formula does not compute.
    """
    scale = 0.5 * head_dim**-0.5
    inputs = {name: rand(2, n, 2, head_dim) for name, n in (("q", 5), ("k", N), ("v", N))}
    for op, formula, given in (
        (attention_qkvpacked, reference.attention_qkvpacked, {"qkv": rand(2, N, 3, 2, head_dim)}),
        (attention, reference.attention, inputs),
    ):
        if dtype is torch.float64:
            given = {name: t.to(dtype) for name, t in given.items()}
            torch.testing.assert_close(op(**given), formula(**given), rtol=1e-12, atol=1e-12)
        else:
            check_op(lambda op=op, **a: op(**a, scale=scale), lambda f=formula, **a: f(**a, scale=scale), given, dtype)
            assert bool(fused) == (dtype is torch.float32)  # in 16 bits the gradients are the formula's


@pytest.mark.parametrize("wanted", ["qkv", "q", "k", "v"])
def test_derivatives_to_any_order(rand, fused, wanted):
    lengths = {"q": 3, "k": 5, "v": 5}
    inputs = [rand(2, n, 3, 4, dtype=torch.float64).requires_grad_(name in wanted) for name, n in lengths.items()]
    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs)
    assert fused

    def third(op):
        first = torch.autograd.grad(op(*inputs).square().sum(), wrt, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), wrt, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in second), wrt)

    wrt = [t for t in inputs if t.requires_grad]
    torch.testing.assert_close(third(attention), third(reference.attention))


def test_second_derivatives_of_one_tensor_for_all_three(rand):
    x = rand(2, 5, 3, 4, dtype=torch.float64).requires_grad_()

    def second(op):
        (first,) = torch.autograd.grad(op(x, x, x).square().sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), x)

    torch.testing.assert_close(second(attention), second(reference.attention))


def forward_mode(op, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(op(torch.autograd.forward_ad.make_dual(x, x + 1))).tangent


def loss(op):
    return lambda x: op(x).square().sum()


TRANSFORMS = {
    "vmap": lambda op, x: torch.func.vmap(op)(x[None]),
    "jvp": lambda op, x: torch.func.jvp(op, (x,), (x + 1,)),
    "forward mode": forward_mode,
    "gradients of each sample": lambda op, x: torch.func.vmap(torch.func.grad(loss(op)))(x[:, None]),
    "Hessian": lambda op, x: torch.func.hessian(loss(op))(x),
    "Hessian times vector": lambda op, x: torch.func.jvp(torch.func.grad(loss(op)), (x,), (x + 1,)),
    "meta": lambda op, x: torch.tensor(op(x.to("meta")).shape),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(rand, name):
    x = rand(2, 5, 3, 2, 4)
    found, want = (TRANSFORMS[name](op, x) for op in (attention_qkvpacked, reference.attention_qkvpacked))
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", ["jvp", "gradients of each sample", "Hessian times vector"])
def test_compiled_transforms(rand, name):
    x = rand(2, 5, 3, 2, 4)
    compiled = torch.compile(lambda x: TRANSFORMS[name](attention_qkvpacked, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), TRANSFORMS[name](reference.attention_qkvpacked, x))


@pytest.mark.filterwarnings("ignore")
def test_graphs_run_the_same_operator(rand):
    qkv = rand(2, N, 3, 2, 16).requires_grad_()
    want = attention_qkvpacked(qkv)
    (dqkv,) = torch.autograd.grad(want.square().sum(), qkv)
    out = torch.compile(attention_qkvpacked, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close((out, *torch.autograd.grad(out.square().sum(), qkv)), (want, dqkv))

    class Module(torch.nn.Module):
        def forward(self, qkv):
            return attention_qkvpacked(qkv)

    graphs = [torch.export.export(Module(), (qkv.detach(),)).module(), torch.jit.trace(Module(), qkv.detach())]
    for graph in graphs:
        assert "scaled_dot_product" in str(graph.graph)
        torch.testing.assert_close(graph(qkv.detach()), want.detach())


def saved(call):
    """The shapes that autograd saves, and the number of elements in all their storages."""
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (tensors.append(t), t)[1], lambda t: t):
        call()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in tensors}
    return [t.shape for t in tensors], sum(storages.values())


def test_backward_needs_no_probabilities(rand):
    qkv = rand(2, N, 3, 2, 16).requires_grad_()
    shapes, size = saved(lambda: attention_qkvpacked(qkv))
    assert not any(list(shape[-2:]) == [N, N] for shape in shapes)
    assert size == qkv.numel() + qkv.numel() // 3 + 2 * 2 * N  # qkv, the output and the logsumexp
    shapes, more = saved(lambda: reference.attention_qkvpacked(qkv))
    assert any(list(shape[-2:]) == [N, N] for shape in shapes) and more > size


def test_the_formula_runs_where_the_operator_would_give_less(rand, fused):
    qkv, seed = rand(2, N, 3, 2, 16).requires_grad_(), torch.tensor([3])
    for options in ({"return_lse": True}, {"dropout_p": 0.3, "seed": seed}):
        found, want = attention_qkvpacked(qkv, **options), reference.attention_qkvpacked(qkv, **options)
        assert all(map(torch.equal, *((x if isinstance(x, tuple) else (x,)) for x in (found, want))))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attention_qkvpacked(qkv), reference.attention_qkvpacked(qkv))
    with FlopCounterMode(display=False) as counter:
        attention_qkvpacked(qkv).sum().backward()
    assert counter.get_total_flops() == (2 + 4) * 2 * 2 * 2 * N * N * 16 and not fused
    assert attention_qkvpacked(qkv[:, :0]).shape == (2, 0, 32)


def test_a_listener_hears_and_changes_no_bit(rand, fused):
    qkv, heard = rand(2, N, 3, 2, 16).requires_grad_(), []

    def step():
        out = attention_qkvpacked(qkv)
        return out, *torch.autograd.grad(out.square().sum(), qkv)

    want = step()
    with runtime.listen_to_attention(lambda *told: heard.append(told)):
        found = step()
    assert all(map(torch.equal, found, want)) and len(fused) == 2
    with torch.no_grad():
        assert torch.equal(attention_qkvpacked(qkv), want[0])
    ((q, k, scale, stats),) = heard
    assert torch.equal(q, qkv[:, :, 0]) and torch.equal(k, qkv[:, :, 1]) and (scale, stats) == (0.25, None)


def test_autocast(rand):
    qkv = rand(2, N, 3, 2, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_qkvpacked(qkv)
    out.float().square().sum().backward()
    assert torch.equal(out, attention_qkvpacked(qkv.bfloat16()))
    with torch.no_grad():
        torch.testing.assert_close(attention_qkvpacked(qkv.bfloat16()), out, rtol=2e-2, atol=2e-2)
    assert out.dtype is torch.bfloat16 and qkv.grad.dtype is torch.float32
