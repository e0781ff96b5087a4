"""What autograd, memory and the compiler may expect of every op: a table of calls, and a test for each demand."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from views import nan_padded, wide_rows

from vit import kernels
from vit.kernels import reference

DROP = {"dropout_p": 0.4, "seed": torch.tensor([7]), "offset": 3}
MASK = {"bool_masked_pos": torch.tensor([[True, False], [False, False]])}
STREAM = {"residual": (2, 5, 24), "branch": (2, 5, 24)}
NORM = {"weight": (24,), "bias": (24,)}
LAYERS = {"fc1_weight": (40, 24), "fc1_bias": (40,), "fc2_weight": (16, 40), "fc2_bias": (16,)}
PATCHES = {"image": (2, 3, 8, 16), "weight": (16, 3, 8, 8), "bias": (16,), "pos_embed": (1, 2, 16)}
# Each: the op, the shapes of its differentiable arguments, its options. None: an argument left out.
CALLS = {
    "linear": ("linear", {"x": (2, 5, 24), "weight": (16, 24), "bias": (16,)}, {}),
    "linear, no bias": ("linear", {"x": (5, 24), "weight": (16, 24), "bias": None}, {}),
    "linear, gelu": ("linear", {"x": (2, 5, 24), "weight": (16, 24), "bias": (16,)}, {"activation": "gelu"}),
    "mlp": ("mlp", {"x": (2, 5, 24), **LAYERS}, {}),
    "mlp, no biases": ("mlp", {"x": (2, 5, 24), **LAYERS, "fc1_bias": None, "fc2_bias": None}, {}),
    "mlp, dropout": ("mlp", {"x": (2, 5, 24), **LAYERS}, DROP),
    "attention_qkvpacked": ("attention_qkvpacked", {"qkv": (2, 5, 3, 2, 16)}, {}),
    "attention_qkvpacked, one token": ("attention_qkvpacked", {"qkv": (1, 1, 3, 2, 16)}, {"scale": 0.7}),
    "attention_qkvpacked, scale, dropout": ("attention_qkvpacked", {"qkv": (2, 5, 3, 2, 24)}, {"scale": 0.7, **DROP}),
    "attention": ("attention", {"q": (2, 5, 2, 16), "k": (2, 7, 2, 16), "v": (2, 7, 2, 16)}, {}),
    "attention, scale, dropout": (
        "attention", {"q": (2, 5, 2, 24), "k": (2, 7, 2, 24), "v": (2, 7, 2, 24)}, {"scale": 0.7, **DROP}
    ),
    "layer_norm": ("layer_norm", {"x": (2, 5, 24), **NORM}, {}),
    "layer_norm, no bias": ("layer_norm", {"x": (2, 5, 24), "weight": (24,)}, {}),
    "residual": ("residual_layer_norm", STREAM, {}),
    "residual, gamma": ("residual_layer_norm", {**STREAM, **NORM, "gamma": (24,)}, {}),
    "residual, path": ("residual_layer_norm", {**STREAM, **NORM}, {"row_scale": torch.tensor([0.0, 2.0])}),
    "residual, dropout": ("residual_layer_norm", {**STREAM, **NORM}, DROP),
    "residual, all": (
        "residual_layer_norm", {**STREAM, **NORM, "gamma": (24,)}, {"row_scale": torch.tensor([0.5, 2.0]), **DROP}
    ),
    "patch_embed": ("patch_embed", {**PATCHES, "bias": None, "pos_embed": None}, {}),
    "patch_embed, prefix": ("patch_embed", {**PATCHES, "prefix": (1, 2, 16)}, {}),
    "patch_embed, mask": ("patch_embed", {**PATCHES, "prefix": (1, 2, 16), "mask_token": (1, 1, 16)}, MASK),
    "dropout": ("dropout", {"x": (2, 5, 24)}, {"p": 0.4, "seed": DROP["seed"]}),
}  # fmt: skip
# Results that the backward reads: changing them is an error, as for PyTorch's attention and for the input of its norm.
SAVED = {("attention_qkvpacked", 0), ("attention", 0), ("residual_layer_norm", 0)}
CHANGED = "modified by an inplace operation"

every_call = pytest.mark.parametrize("call", CALLS)
every_op = pytest.mark.parametrize("call", {op: call for call, (op, *_) in CALLS.items()}.values())  # with most options


def make(call, device, batch=None):
    """The op's name, its arguments by name and its options, on the device; ``batch`` instead of the first dimension."""
    op, shapes, options = CALLS[call]
    generator = torch.Generator().manual_seed(0)
    shapes = {n: shape for n, shape in shapes.items() if shape is not None}
    batched = ("x", "qkv", "q", "k", "v", "residual", "branch", "image")
    if batch is not None:
        shapes = {n: (batch, *shape[1:]) if n in batched else shape for n, shape in shapes.items()}
        options = {n: o[:1].expand(batch, *o.shape[1:]) if n in ("row_scale", *MASK) else o for n, o in options.items()}
    inputs = {n: torch.randn(shape, generator=generator).to(device) for n, shape in shapes.items()}
    return op, inputs, {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}


def run(op, inputs, options, module=kernels):
    """The outputs; absent biases, which some ops require, are None."""
    required = {"linear": ("bias",), "mlp": ("fc1_bias", "fc2_bias"), "patch_embed": ("bias",)}.get(op, ())
    impl = {"impl": "triton"} if module is kernels else {}
    outs = getattr(module, op)(**impl | dict.fromkeys(required) | inputs | options)
    return outs if isinstance(outs, tuple) else (outs,)


def directions(outs):
    return [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]


def mixed(inputs):
    """fp16, and fp32 where that may stand beside it."""
    wide = ("residual", "pos_embed", "prefix", "mask_token", "gamma")
    return {n: t if n in wide else t.half() for n, t in inputs.items()}


def gradients(op, inputs, options, layout=lambda dy: dy, module=kernels):
    """Outputs and the gradients of all inputs, for fixed directions of the outputs in another layout."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    outs = run(op, leaves, options, module)
    return [*outs, *torch.autograd.grad(outs, list(leaves.values()), [layout(dy) for dy in directions(outs)])]


def change(y):
    return F.relu_(y.mul_(2).add_(1))


@every_op
def test_results_can_be_changed_in_place(call, device):
    """As ``nn.Dropout(inplace=True)`` and hooks change them: the gradients are right, or autograd raises."""
    op, inputs, options = make(call, device)
    exact = {n: t.double().requires_grad_() for n, t in inputs.items()}
    for i in range(len(run(op, inputs, options))):
        leaves = [t.requires_grad_() for t in inputs.values()]
        y = run(op, inputs, options)[i]
        change(y)
        direction = directions([y])[0]
        if (op, i) in SAVED:
            with pytest.raises(RuntimeError, match=CHANGED):
                torch.autograd.grad(y, leaves, direction)
            continue
        want = change(run(op, exact, options, reference)[i].clone())
        torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
        grads = torch.autograd.grad(y, leaves, direction)
        wanted = torch.autograd.grad(want, list(exact.values()), direction.double())
        for got, right in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got.double(), right, atol=1e-4, rtol=1e-4)


@every_call
def test_gradients_are_those_of_the_reference(call, device):
    op, inputs, options = make(call, device)
    exact = gradients(op, {n: t.double() for n, t in inputs.items()}, options, module=reference)
    for got, want in zip(gradients(op, inputs, options), exact, strict=True):
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)


@every_call
def test_each_gradient_alone(call, device):
    """Where one argument learns and all others are frozen, it learns what it learns beside them."""
    op, inputs, options = make(call, device)
    exact = gradients(op, {n: t.double() for n, t in inputs.items()}, options, module=reference)[-len(inputs) :]
    for name, want in zip(inputs, exact, strict=True):
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        outs = [out for out in run(op, alone, options) if out.requires_grad]
        (found,) = torch.autograd.grad(outs, [alone[name]], directions(outs))
        torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=1e-4, msg=name)


@every_call
def test_one_wide_argument_beside_fp16(call, device):
    """Each that may be fp32, with and without those that share its dtype: both paths return the same types."""
    op, inputs, options = make(call, device)
    together = ("pos_embed", "prefix", "mask_token")
    for name in [n for n, t in mixed(inputs).items() if t.dtype is torch.float32]:
        group = together if name in together else (name,)
        some = {n: t if n in group else t.half() for n, t in inputs.items()}
        for gone in ([], [n for n in group if n not in (name, "mask_token")]):
            kept = {n: t for n, t in some.items() if n not in gone}
            found, want = (run(op, kept, options | {"impl": impl}) for impl in ("triton", "reference"))
            assert [(o.dtype, o.shape) for o in found] == [(o.dtype, o.shape) for o in want], (name, gone)


@every_call
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "wide beside fp16"])
def test_both_paths_return_the_same_types(call, autocast, device):
    op, inputs, options = make(call, device)
    inputs = inputs if autocast else mixed(inputs)
    with torch.autocast(device.type, torch.float16, enabled=autocast):
        found, want = (run(op, inputs, options | {"impl": impl}) for impl in ("triton", "reference"))
    assert [(o.dtype, o.shape) for o in found] == [(o.dtype, o.shape) for o in want]


@every_op
def test_arguments_changed_in_place_never_give_wrong_gradients(call, device):
    op, inputs, options = make(call, device)
    right = gradients(op, inputs, options)
    raised = []
    for name in inputs:
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        used = {n: t.clone() for n, t in leaves.items()}
        outs = run(op, used, options)
        with torch.no_grad():
            used[name].add_(1)
        try:
            grads = torch.autograd.grad(outs, list(leaves.values()), directions(outs))
            assert all(map(torch.equal, grads, right[len(outs) :])), name
        except RuntimeError as error:
            assert CHANGED in str(error)
            raised.append(name)
    assert raised or op in ("residual_layer_norm", "dropout")  # most need an input, not a residual nor a bias


@every_op
def test_second_derivatives_raise_and_say_what_to_do(call, device):
    op, inputs, options = make(call, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    loss = sum(out.square().sum() for out in run(op, inputs, options))
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"\b{op}\b.*: the Triton kernels .* use impl='reference'"):
        sum(g.square().sum() for g in grads).backward()


class Ops(TorchDispatchMode):
    """Notes each call of a custom op of ours, with what it returned."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.namespace == "vit":
            self.calls.append((func, args, kwargs or {}, out))
        return out


def metadata(tree):
    return [(t.shape, t.stride(), t.dtype) for t in tree_leaves(tree)]


@pytest.mark.parametrize("layout", ["contiguous", "channels last, mixed types"])
@every_call
def test_fakes_have_the_shapes_strides_and_types_of_the_real(call, layout, device):
    """Of the forward and of the backward. torch.compile plans memory by the fakes."""
    op, inputs, options = make(call, device)
    if layout != "contiguous":
        laid = {n: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t for n, t in inputs.items()}
        inputs = mixed(laid)
    with Ops() as ops:
        gradients(op, inputs, options)
    assert len(ops.calls) == 2
    for func, args, kwargs, real in ops.calls:
        with FakeTensorMode() as mode:
            fake = func(*tree_map(lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t, args), **kwargs)
        assert metadata(fake) == metadata(real), func


def test_every_op_is_in_the_table():
    ops = {name for name in kernels.__all__ if "impl" in inspect.signature(getattr(kernels, name)).parameters}
    assert {op for op, *_ in CALLS.values()} == ops


@every_call
@pytest.mark.parametrize("layout", [nan_padded, wide_rows], ids=["padded", "wide rows"])
def test_layout_of_one_tensor_changes_no_bit(call, layout, device):
    """One at a time, an incoming gradient too: at an odd offset, with odd strides."""
    op, inputs, options = make(call, device)
    right = gradients(op, inputs, options)
    for name in inputs:
        found = gradients(op, inputs | {name: layout(inputs[name])}, options)
        assert all(map(torch.equal, found, right)), name
    assert all(map(torch.equal, gradients(op, inputs, options, layout), right))


@every_op
def test_expanded_gradients(call, device):
    """As a mean over tokens hands in: one row for all, with a stride of 0."""
    op, inputs, options = make(call, device)
    expanded = gradients(op, inputs, options, lambda dy: dy[:, :1].expand(dy.shape))
    assert all(
        map(
            torch.equal,
            expanded,
            gradients(op, inputs, options, lambda dy: dy[:, :1].repeat_interleave(dy.shape[1], 1)),
        )
    )


@pytest.mark.parametrize("call", [c for c in CALLS if c != "linear, no bias"])  # its x has no batch
def test_batches_of_none_and_one(call, device):
    op, inputs, options = make(call, device, batch=0)
    leaves = list(inputs.values())
    for found, like in zip(gradients(op, inputs, options), [*run(op, inputs, options), *leaves], strict=True):
        assert found.shape == like.shape and not found.any()
    # A batch of one is the first of two: with a mask drawn per element, too.
    op, inputs, options = make(call, device)
    first = {n: t[:1] if t.shape[0] == 2 else t for n, t in inputs.items()}
    options = {n: o[:1] if n in ("row_scale", *MASK) else o for n, o in options.items()}
    whole, one = run(*make(call, device)), run(op, first, options)
    for a, b in zip(one, whole, strict=True):
        torch.testing.assert_close(a, b[:1])


@pytest.mark.parametrize("scale", [None, 0.05, 2.0])
@pytest.mark.parametrize("call", ["attention_qkvpacked", "attention", "attention, scale, dropout"])
def test_lse_of_any_scale(call, scale, device):
    """Beside PyTorch's own logsumexp, not beside the reference of this package alone."""
    op, inputs, options = make(call, device)
    q, k, *_ = inputs["qkv"].unbind(2) if op == "attention_qkvpacked" else inputs.values()
    want = (torch.einsum("bqhe,bkhe->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)).logsumexp(dim=-1)
    for module in (kernels, reference):
        _, lse = run(op, inputs, options | {"scale": scale, "return_lse": True}, module)
        torch.testing.assert_close(lse, want)


@pytest.mark.parametrize("op", sorted({op for op, *_ in CALLS.values()}))
def test_the_reference_takes_the_same_arguments(op):
    """In the same order, of the same kind, with the same defaults; only ``impl`` is the op's own."""
    ours = list(inspect.signature(getattr(kernels, op)).parameters.values())
    assert [p.name for p in ours if p not in inspect.signature(getattr(reference, op)).parameters.values()] == ["impl"]
    assert [p.name for p in ours if p.name != "impl"] == list(inspect.signature(getattr(reference, op)).parameters)


@pytest.mark.parametrize("call", [call for call, (_, _, options) in CALLS.items() if "seed" in options])
def test_a_dropout_without_a_seed_draws_one(call, device):
    """As PyTorch's: another mask each time, the same one after `torch.manual_seed`, and backward drops what it did."""
    op, inputs, options = make(call, device)
    unseeded = {n: o for n, o in options.items() if n != "seed"}
    torch.manual_seed(3)
    first, second = (gradients(op, inputs, unseeded) for _ in range(2))
    torch.manual_seed(3)
    seed = kernels.dropout_seed(next(iter(inputs.values())))
    wanted = gradients(op, inputs, options | {"seed": seed})
    assert all(map(torch.equal, first, wanted)) and not all(map(torch.equal, first, second))


@pytest.mark.parametrize("module", [kernels, reference])
def test_the_stream_and_its_norm_have_names(module, device):
    op, inputs, options = make("residual, all", device)
    out = run(op, inputs, options, module)
    assert out._fields == ("stream", "y") and out.stream is out[0]
    torch.testing.assert_close(F.layer_norm(out.stream, (24,), inputs["weight"], inputs["bias"], 1e-6), out.y)
