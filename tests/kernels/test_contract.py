"""What autograd, memory and the compiler may expect of every op: a table of calls, and a test of each property."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import driver
from views import nan_padded, wide_rows

from vit import kernels
from vit.kernels import reference, runtime
from vit.kernels.dry_run import dry_run

DROP = {"dropout_p": 0.4, "seed": torch.tensor([7]), "offset": 3}
MASK = {"bool_masked_pos": torch.tensor([[True, False], [False, False]])}
PREFIX = {"num_prefix_tokens": 1}
STREAM = {"residual": (2, 5, 24), "branch": (2, 5, 24)}
NORM = {"weight": (24,), "bias": (24,)}
LAYERS = {"fc1_weight": (40, 24), "fc1_bias": (40,), "fc2_weight": (16, 40), "fc2_bias": (16,)}
PATCHES = {"image": (2, 3, 8, 16), "weight": (16, 3, 8, 8), "bias": (16,), "pos_embed": (1, 2, 16)}
# The op, the shapes of its differentiable arguments and its options. None stands for an argument that is left out.
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
    "residual, branch bias": ("residual_layer_norm", {**STREAM, **NORM, "branch_bias": (24,)}, {}),
    "residual, gamma": ("residual_layer_norm", {**STREAM, **NORM, "gamma": (24,)}, {}),
    "residual, path": ("residual_layer_norm", {**STREAM, **NORM}, {"row_scale": torch.tensor([0.0, 2.0])}),
    "residual, dropout": ("residual_layer_norm", {**STREAM, **NORM}, DROP),
    "residual, all": (
        "residual_layer_norm", {**STREAM, **NORM, "branch_bias": (24,), "gamma": (24,)},
        {"row_scale": torch.tensor([0.5, 2.0]), **DROP},
    ),
    "patch_embed": ("patch_embed", {**PATCHES, "bias": None, "pos_embed": None}, {}),
    "patch_embed, prefix": ("patch_embed", {**PATCHES, "prefix": (1, 2, 16)}, {}),
    "patch_embed, mask": ("patch_embed", {**PATCHES, "prefix": (1, 2, 16), "mask_token": (1, 1, 16)}, MASK),
    "dropout": ("dropout", {"x": (2, 5, 24)}, {"p": 0.4, "seed": DROP["seed"]}),
}  # fmt: skip
# Ops without gradients.
WITHOUT_GRADIENT = {
    "statistics": ("attention_statistics", {"q": (2, 7, 2, 16), "k": (2, 7, 2, 16)}, {"grid_size": (2, 3), **PREFIX}),
    "statistics, all": (
        "attention_statistics", {"q": (2, 7, 2, 24), "k": (2, 7, 2, 24)},
        {"grid_size": (1, 2), "num_prefix_tokens": 5, "patch_size": (16, 14.5), "scale": 0.7, "received": True},
    ),
}  # fmt: skip
ALL, OPS_WITHOUT_GRADIENT = CALLS | WITHOUT_GRADIENT, {op for op, *_ in WITHOUT_GRADIENT.values()}
# Outputs that the backward reads. A change in place is an error, as in PyTorch.
SAVED = {("attention_qkvpacked", 0), ("attention", 0), ("residual_layer_norm", 0)}
CHANGED = "modified by an inplace operation"

every_call = pytest.mark.parametrize("call", ALL)
every_gradient = pytest.mark.parametrize("call", CALLS)
every_op = pytest.mark.parametrize("call", {op: call for call, (op, *_) in CALLS.items()}.values())  # last of each
every_op_at_all = pytest.mark.parametrize("call", {op: call for call, (op, *_) in ALL.items()}.values())


def make(call, device, batch=None):
    """(name of the op, its arguments, its options) on the device. ``batch`` replaces the first dimension."""
    op, shapes, options = ALL[call]
    generator = torch.Generator().manual_seed(0)
    shapes = {n: shape for n, shape in shapes.items() if shape is not None}
    batched = ("x", "qkv", "q", "k", "v", "residual", "branch", "image")
    if batch is not None:
        shapes = {n: (batch, *shape[1:]) if n in batched else shape for n, shape in shapes.items()}
        options = {n: o[:1].expand(batch, *o.shape[1:]) if n in ("row_scale", *MASK) else o for n, o in options.items()}
    inputs = {n: torch.randn(shape, generator=generator).to(device) for n, shape in shapes.items()}
    return op, inputs, {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}


def run(op, inputs, options, module=kernels):
    """The outputs that are not None. A required bias that is absent is None."""
    required = {"linear": ("bias",), "mlp": ("fc1_bias", "fc2_bias"), "patch_embed": ("bias",)}.get(op, ())
    impl = {"impl": "triton"} if module is kernels else {}
    outs = getattr(module, op)(**impl | dict.fromkeys(required) | inputs | options)
    if op in OPS_WITHOUT_GRADIENT:
        return tuple(out for out in outs if out is not None)
    return outs if isinstance(outs, tuple) else (outs,)


def directions(outs):
    return [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).to(o) for i, o in enumerate(outs)]


def mixed(inputs):
    """The inputs in fp16, and in fp32 where the op allows that together with fp16."""
    wide = ("residual", "pos_embed", "prefix", "mask_token", "gamma", "branch_bias")
    return {n: t if n in wide else t.half() for n, t in inputs.items()}


def gradients(op, inputs, options, layout=lambda dy: dy, module=kernels):
    """Outputs and the gradients of all inputs, for fixed incoming gradients in another layout."""
    leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
    outs = run(op, leaves, options, module)
    if op in OPS_WITHOUT_GRADIENT:
        return list(outs)
    return [*outs, *torch.autograd.grad(outs, list(leaves.values()), [layout(dy) for dy in directions(outs)])]


def change(y):
    return F.relu_(y.mul_(2).add_(1))


@every_op
def test_results_can_be_changed_in_place(call, device):
    """``nn.Dropout(inplace=True)`` and hooks do so. The gradients are right, or autograd raises."""
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


@pytest.mark.interpreted
@every_call
def test_fp64_is_kept_throughout(call, device):
    """Results and gradients are within 1e-11 of the reference. Only the factor of dropout is an fp32 number."""
    op, inputs, options = make(call, device)
    options = {n: o.double() if n == "row_scale" else o for n, o in options.items()}
    options |= {"return_lse": True} if op in ("attention", "attention_qkvpacked") else {}
    inputs, found = {n: t.double() for n, t in inputs.items()}, []
    for module in (kernels, reference):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
        outs = run(op, leaves, options, module)
        learnt = [out for out in outs if out.requires_grad]
        grads = torch.autograd.grad(learnt, list(leaves.values()), directions(learnt)) if call in CALLS else ()
        found.append([*outs, *grads])
    limit = 5e-7 if "seed" in options else 1e-12
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=10 * limit, rtol=limit)


@every_gradient
def test_each_gradient_alone(call, device):
    """If only one argument requires grad, its gradient is the same as if all do."""
    op, inputs, options = make(call, device)
    exact = gradients(op, {n: t.double() for n, t in inputs.items()}, options, module=reference)[-len(inputs) :]
    for name, want in zip(inputs, exact, strict=True):
        alone = {n: t.detach().requires_grad_(n == name) for n, t in inputs.items()}
        outs = [out for out in run(op, alone, options) if out.requires_grad]
        (found,) = torch.autograd.grad(outs, [alone[name]], directions(outs))
        torch.testing.assert_close(found.double(), want, atol=2e-5, rtol=1e-4, msg=name)


@every_call
def test_one_wide_argument_beside_fp16(call, device):
    """One argument is fp32, with and without those that share its dtype. Both paths return the same types."""
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
    assert raised or op in ("residual_layer_norm", "dropout")  # these two may read no input again


@every_op
def test_second_derivatives_raise_and_say_what_to_do(call, device):
    op, inputs, options = make(call, device)
    leaves = [t.requires_grad_() for t in inputs.values()]
    loss = sum(out.square().sum() for out in run(op, inputs, options))
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"\b{op}\b.*: the Triton kernels .* use impl='reference'"):
        sum(g.square().sum() for g in grads).backward()


class Ops(TorchDispatchMode):
    """Records each call of a custom op of ours and what it returned."""

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
    """This holds for forward and backward. torch.compile plans memory from the fakes."""
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
    assert {op for op, *_ in ALL.values()} == ops


@pytest.mark.parametrize(
    ("layout", "call"),
    [
        *((nan_padded, call) for call in ALL),
        *((wide_rows, call) for call in {op: c for c, (op, *_) in ALL.items()}.values()),
    ],
)
def test_layout_of_one_tensor_changes_no_bit(call, layout, device):
    """One tensor at a time, also an incoming gradient, is a view at an odd offset or with a longer row stride."""
    op, inputs, options = make(call, device)
    right = gradients(op, inputs, options)
    for name in inputs:
        found = gradients(op, inputs | {name: layout(inputs[name])}, options)
        assert all(map(torch.equal, found, right)), name
    assert all(map(torch.equal, gradients(op, inputs, options, layout), right))


@every_op
def test_expanded_gradients(call, device):
    """The gradient of a mean over tokens is one row for all, with a stride of 0."""
    op, inputs, options = make(call, device)
    expanded = gradients(op, inputs, options, lambda dy: dy[:, :1].expand(dy.shape))
    assert all(
        map(
            torch.equal,
            expanded,
            gradients(op, inputs, options, lambda dy: dy[:, :1].repeat_interleave(dy.shape[1], 1)),
        )
    )


@pytest.mark.parametrize("call", [c for c in ALL if c != "linear, no bias"])  # its x has no batch
def test_batches_of_none_and_one(call, device):
    op, inputs, options = make(call, device, batch=0)
    leaves = list(inputs.values()) if call in CALLS else []
    for found, like in zip(gradients(op, inputs, options), [*run(op, inputs, options), *leaves], strict=True):
        assert found.shape == like.shape and not found.any()
    # A batch of one gives the first of two, also with dropout.
    op, inputs, options = make(call, device)
    first = {n: t[:1] if t.shape[0] == 2 else t for n, t in inputs.items()}
    options = {n: o[:1] if n in ("row_scale", *MASK) else o for n, o in options.items()}
    whole, one = run(*make(call, device)), run(op, first, options)
    for a, b in zip(one, whole, strict=True):
        torch.testing.assert_close(a, b[:1])


@pytest.mark.parametrize("scale", [None, 0.05, 2.0])
@pytest.mark.parametrize("call", ["attention_qkvpacked", "attention", "attention, scale, dropout"])
def test_lse_of_any_scale(call, scale, device):
    """Ops and reference are compared with PyTorch's logsumexp."""
    op, inputs, options = make(call, device)
    q, k, *_ = inputs["qkv"].unbind(2) if op == "attention_qkvpacked" else inputs.values()
    want = (torch.einsum("bqhe,bkhe->bhqk", q, k) * (scale or q.shape[-1] ** -0.5)).logsumexp(dim=-1)
    for module in (kernels, reference):
        _, lse = run(op, inputs, options | {"scale": scale, "return_lse": True}, module)
        torch.testing.assert_close(lse, want)


@pytest.mark.parametrize("op", sorted({op for op, *_ in ALL.values()}))
def test_the_reference_takes_the_same_arguments(op):
    """They have the same order, kinds and defaults. Only ``impl`` is missing, and what says what to save.

    attention_statistics also takes what the forward saved, and its reference some of the queries.
    """
    own = {"attention_statistics": ["saved"], "layer_norm": ["recompute"], "residual_layer_norm": ["recompute"]}
    own, its = [*own.get(op, []), "impl"], ["first_query"] if op == "attention_statistics" else []
    ours = list(inspect.signature(getattr(kernels, op)).parameters.values())
    theirs = inspect.signature(getattr(reference, op)).parameters
    assert [p.name for p in ours if p not in theirs.values()] == own
    assert [p.name for p in ours if p.name not in own] == [name for name in theirs if name not in its]


@pytest.mark.parametrize("call", [call for call, (_, _, options) in CALLS.items() if "seed" in options])
def test_a_dropout_without_a_seed_draws_one(call, device):
    """Each call draws another mask, and the same one after `torch.manual_seed`. The backward uses the same mask."""
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


# Options with other values than the defaults, which no row of the table has.
OTHER = {
    "linear": {"activation": "gelu_tanh"},
    "mlp": {"activation": "quick_gelu"},
    "layer_norm": {"eps": 0.3},
    "residual_layer_norm": {"eps": 0.3},
    "attention": {"scale": 0.6, "return_lse": True},
    "attention_qkvpacked": {"scale": 0.6, "return_lse": True},
}


@every_call
@pytest.mark.parametrize("impl", ["auto", "fused", "triton", "reference"])
def test_every_way_through_an_op_gets_all_its_options(call, impl, device):
    op, inputs, options = make(call, device)
    options = options | OTHER.get(op, {})

    def results(inputs, options, module):
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
        outs = run(op, leaves, options, module)
        learning = [out for out in outs if out.requires_grad]  # no gradient flows through the logsumexp
        grads = torch.autograd.grad(learning, list(leaves.values()), directions(learning)) if call in CALLS else ()
        return [*outs, *grads]

    exact = results({n: t.double() for n, t in inputs.items()}, options, reference)
    for got, want in zip(results(inputs, options | {"impl": impl}, kernels), exact, strict=True):
        torch.testing.assert_close(got.double(), want.double(), atol=2e-5, rtol=1e-4)


@every_call
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_argument_is_written(call, impl, device):
    """Forward and backward write to no argument, option or incoming gradient."""
    op, inputs, options = make(call, device)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    outs = run(op, leaves, options | {"impl": impl})
    into = directions(outs)
    given = [*leaves.values(), *(o for o in options.values() if isinstance(o, torch.Tensor)), *into, *outs]
    before = [(t.detach().clone(), t._version) for t in given]
    if op not in OPS_WITHOUT_GRADIENT:
        torch.autograd.grad(outs, list(leaves.values()), into)
    assert all(torch.equal(t, was) and t._version == version for t, (was, version) in zip(given, before, strict=True))
    assert all(torch.equal(t, inputs[n]) and t._version == 0 for n, t in leaves.items())
    plain = {n: t.clone() for n, t in inputs.items()}  # without grad a write in place would not raise
    run(op, plain, options | {"impl": impl})
    assert all(torch.equal(t, inputs[n]) and t._version == 0 for n, t in plain.items())
    tensors = {n: o for n, o in options.items() if isinstance(o, torch.Tensor)}
    assert all(torch.equal(o, ALL[call][2][n].to(device)) for n, o in tensors.items())


@every_call
@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(call, impl, half, device):
    """Products have autocast's dtype. The stream keeps its dtype, and so do tokens with fp32 addends."""
    op, inputs, options = make(call, device)
    want = [half]
    if op == "residual_layer_norm":
        want = [torch.float32, half]
    elif op == "dropout" or {"pos_embed", "prefix", "mask_token"} & set(inputs):  # autocast does not cast dropout
        want = [torch.float32]
    elif op == "attention_statistics":
        want = [torch.float32] * (6 if "received" in options else 5)
    elif op.startswith("attention"):
        options, want = options | {"return_lse": True}, [half, torch.float32]
    with torch.autocast(device.type, half):
        outs = run(op, inputs, options | {"impl": impl})
    assert [out.dtype for out in outs] == want


@pytest.mark.interpreted
@every_call
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_autocast_leaves_fp64_alone(call, impl, device):
    op, inputs, options = make(call, device)
    inputs, options = {n: t.double() for n, t in inputs.items()}, options | {"impl": impl}
    want = run(op, inputs, options)
    with torch.autocast(device.type, torch.bfloat16):
        found = run(op, inputs, options)
    assert all(a.dtype is torch.float64 and torch.equal(a, b) for a, b in zip(found, want, strict=True))


@every_op_at_all
def test_autocast_of_another_device_does_nothing(call, device):
    op, inputs, options = make(call, device)
    other = "cpu" if device.type == "cuda" else "cuda"
    want, was = run(op, inputs, options), torch.is_autocast_enabled(other)
    torch.set_autocast_enabled(other, True)
    try:
        found = run(op, inputs, options)
    finally:
        torch.set_autocast_enabled(other, was)
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(found, want, strict=True))


@every_call
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
def test_arguments_by_place_are_those_by_name(call, autocast, device):
    op, inputs, options = make(call, device)
    parameters = inspect.signature(getattr(kernels, op)).parameters.values()
    given = inputs | options
    places = [given.pop(p.name, None if p.default is p.empty else p.default) for p in parameters if p.kind != 3]
    assert [p.kind for p in parameters if p.name == "impl"] == [inspect.Parameter.KEYWORD_ONLY]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        found, want = getattr(kernels, op)(*places, **given, impl="triton"), run(op, inputs, options)
        with pytest.raises(TypeError, match="positional argument"):
            getattr(kernels, op)(*places, *[None] * 20)
    assert all(map(torch.equal, found if isinstance(found, tuple) else (found,), want))


# Dimensions that may be longer by one: the batch, the tokens, and lengths that no other argument has.
FREE = {
    ("linear", "x"): (0, 1), ("linear, no bias", "x"): (0,), ("linear, no bias", "weight"): (0,),
    ("linear, gelu", "x"): (0, 1), ("mlp, no biases", "fc2_weight"): (0,),
    **{(call, "x"): (0, 1) for call in ("mlp", "mlp, no biases", "mlp, dropout", "layer_norm", "layer_norm, no bias")},
    **{(call, "qkv"): (0, 1, 3, 4) for call in CALLS if call.startswith("attention_qkvpacked")},
    **{(call, "q"): (1,) for call in CALLS if call.split(",")[0] == "attention"},
    **{(call, "image"): (0,) for call in ("patch_embed", "patch_embed, prefix")},
    ("patch_embed", "weight"): (0,), ("patch_embed, prefix", "prefix"): (1,), ("patch_embed, mask", "prefix"): (1,),
    ("dropout", "x"): (0, 1, 2),
}  # fmt: skip


@every_call
def test_each_dimension_of_each_argument_is_checked(call, device):
    """A dimension that is longer by one fits, or both paths raise an error that names the argument or the length."""
    op, inputs, options = make(call, device)
    for name, t in inputs.items():
        for dim in range(t.dim()):
            shape = [n + (i == dim) for i, n in enumerate(t.shape)]
            changed = inputs | {name: torch.ones(shape, device=device)}
            if dim in FREE.get((call, name), ()):
                run(op, changed, options | {"impl": "reference"})
                continue
            for impl in ("triton", "reference"):
                with pytest.raises(ValueError, match=f"^{op}: ") as raised:
                    run(op, changed, options | {"impl": impl})
                message = str(raised.value).removeprefix(f"{op}: ")
                assert name in message or str(shape[dim]) in message, (name, dim)
    for name in set(options) & {"row_scale", *MASK}:
        for dim in range(options[name].dim()):
            longer = torch.cat([options[name], options[name].narrow(dim, 0, 1)], dim)
            with pytest.raises(ValueError, match=f"^{op}: {name} must have shape"):
                run(op, inputs, options | {name: longer})


@every_call
def test_each_tensor_of_another_dtype_is_refused(call, device):
    """All others are fp32. An integer, fp64 or fp16 tensor is refused, but a branch may be fp16."""
    op, inputs, options = make(call, device)
    for name, t in inputs.items():
        with pytest.raises(TypeError, match=rf"^{op}: {name} must be a floating-point tensor, got torch\.int32"):
            run(op, inputs | {name: t.int()}, options)
        for dtype in (torch.float16, torch.float64):
            if len(inputs) == 1 or (name == "branch" and dtype is torch.float16):
                continue
            with pytest.raises(
                TypeError, match=rf"^{op}: \w+ is torch\.float\d\d but \w+ is torch\.float\d\d"
            ) as raised:
                run(op, inputs | {name: t.to(dtype)}, options)
            assert f" {name} is {dtype}" in str(raised.value)


@every_call
def test_each_tensor_of_another_device_is_refused(call, device):
    op, inputs, options = make(call, device)
    given = inputs | {n: o for n, o in options.items() if isinstance(o, torch.Tensor)}
    for name in given if len(given) > 1 else ():
        moved = given | {name: given[name].to("meta")}
        with pytest.raises(ValueError, match=f"^{op}: all tensors must be on one device, got ") as raised:
            run(op, {n: moved[n] for n in inputs}, options | {n: o for n, o in moved.items() if n not in inputs})
        assert "meta" in str(raised.value) and device.type in str(raised.value)


@every_op_at_all
def test_a_transform_over_any_argument_is_refused(call, device):
    op, inputs, options = make(call, device)
    for name in inputs:
        with pytest.raises(RuntimeError, match=f"^{op}: impl='triton' cannot run: torch.func transforms are not"):
            torch.func.vmap(lambda t, name=name: run(op, inputs | {name: t}, options))(inputs[name][None])


@every_call
@pytest.mark.parametrize("impl", ["auto", "fused", "triton", "reference"])
def test_each_call_notes_one_choice(call, impl, device):
    """The choice has the shape and dtype of the main argument. The backward adds none."""
    op, inputs, options = make(call, device)
    with runtime.record_choices() as choices:
        gradients(op, inputs, options | {"impl": impl})
    (choice,) = choices
    main = next(iter(inputs.values()))
    assert (choice.op, choice.shape, choice.dtype) == (op, tuple(main.shape), main.dtype)
    plain = op == "linear" and not options
    path = "reference" if impl == "reference" else "triton"
    path = "pytorch" if impl == "auto" and device.type == "cpu" else path
    assert choice.path == ("cublas" if path == "triton" and plain and impl != "triton" else path)
    reasons = {
        "reference": "asked for with impl='reference'",
        "pytorch": "auto: a cpu tensor runs PyTorch's operators",
        "cublas": f"{impl}: cuBLAS runs plain products",
        "triton": "auto: supported on this GPU" if impl == "auto" else f"asked for with impl='{impl}'",
    }
    interpreted = runtime.INTERPRETED and choice.path == "triton" and impl != "auto"
    assert choice.reason == reasons[choice.path] + (", interpreted" if interpreted else "")


@every_gradient
def test_without_gradients_only_results_are_written(call, device):
    """Tensors for the backward are empty under no_grad, in inference mode, and if nothing requires grad."""
    op, inputs, options = make(call, device)
    learning = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    results = sum(out.numel() for out in run(op, inputs, options))
    for given, mode in [(inputs, torch.enable_grad), (learning, torch.no_grad), (learning, torch.inference_mode)]:
        with mode(), Ops() as ops:
            outs = run(op, given, options)
        assert sum(t.numel() for t in tree_leaves([call[-1] for call in ops.calls])) == results
        assert not any(out.requires_grad for out in outs)


@every_op_at_all
def test_every_product_has_pytorchs_precision(call, device, monkeypatch):
    """Every kernel with a product, forward and backward, gets the result of `runtime.precision`."""
    op, inputs, options = make(call, device)
    found = []
    monkeypatch.setattr(runtime, "precision", lambda dtype: f"of {dtype}")
    monkeypatch.setattr(runtime, "launch", lambda *a, **k: found.append(k.get("PRECISION")))
    for dtype in (torch.float32, torch.float16):
        found.clear()
        gradients(op, {n: t.to(dtype) for n, t in inputs.items()}, options)
        products = [precision for precision in found if precision is not None]
        assert set(products) == ({f"of {dtype}"} if op in ("linear", "mlp", "patch_embed") or "att" in op else set())


SEEDED = [call for call, (_, _, options) in CALLS.items() if "seed" in options]


@pytest.mark.parametrize("call", SEEDED)
def test_seeds(call, device):
    """A seed is one int64 in any shape. A call with a seed draws none, and p = 0 ignores it."""
    op, inputs, options = make(call, device)
    state, right = torch.get_rng_state(), gradients(op, inputs, options)
    for shape in ((), (1, 1)):
        assert all(map(torch.equal, gradients(op, inputs, options | {"seed": options["seed"].reshape(shape)}), right))
    assert not any(map(torch.equal, run(op, inputs, options | {"seed": options["seed"] + 1}), right))
    if "offset" in options:
        assert not any(map(torch.equal, run(op, inputs, options | {"offset": 4}), right))
    probability = "p" if op == "dropout" else "dropout_p"
    for impl in ("auto", "triton", "reference"):
        for seed in (
            options["seed"].int(),
            options["seed"].double(),
            options["seed"][:0],
            7,
            options["seed"].repeat(2),
        ):
            with pytest.raises(TypeError, match=rf"^{op}: seed must be an int64 tensor of one element, .*, got "):
                run(op, inputs, options | {"seed": seed, "impl": impl})
        for p in (-1e-9, 1.0, 2.0, float("nan")):
            with pytest.raises(ValueError, match=rf"^{op}: dropout_p must be in \[0, 1\), got {p}"):
                run(op, inputs, options | {probability: p, "impl": impl})
        off = run(op, inputs, options | {probability: 0.0, "seed": "none", "impl": impl})
        without = {n: o for n, o in options.items() if n not in (probability, "seed", "offset")}
        want = [inputs["x"]] if op == "dropout" else run(op, inputs, without | {"impl": impl})
        assert all(map(torch.equal, off, want))
    if op != "dropout":  # its p has no default
        assert all(map(torch.equal, run(op, inputs, without | {"seed": options["seed"]}), run(op, inputs, without)))
    assert torch.equal(torch.get_rng_state(), state)


@every_call
def test_auto_is_the_default_and_takes_the_kernels_of_a_gpu(call, monkeypatch):
    """A dry run of compute capability 8.0 (the oldest) and 9.0 runs on tensors of "cpu" and "meta"."""
    op, inputs, options = make(call, torch.device("cpu"))
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert inspect.signature(getattr(kernels, op)).parameters["impl"].default == "auto"
    launched = []
    want = ["cublas" if op == "linear" and not options else "triton"]
    for arch in (80, 90):
        for place in ("cpu", "meta"):
            given = {n: t.to(place) for n, t in inputs.items()}
            chosen = {n: t.to(place) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
            with dry_run(arch, lambda *launch: launched.append(launch)), runtime.record_choices() as choices:
                outs = run(op, given, chosen | {"impl": "auto"})
            assert [choice.path for choice in choices] == want
            assert [out.shape for out in outs] == [out.shape for out in run(op, inputs, options, reference)]
            with dry_run(arch, None), runtime.record_choices() as choices:  # none of these launches a kernel
                run(op, given, chosen | {"impl": "reference"})
                wide = {n: t.double() for n, t in given.items()}
                run(op, wide, chosen | {"impl": "auto"})
                with pytest.raises(RuntimeError, match=rf"^{op}: impl='fused' cannot run: dtype torch\.float64 is not"):
                    run(op, wide, chosen | {"impl": "fused"})
            assert [choice.path for choice in choices] == ["reference", "pytorch"]
            assert choices[1].reason.startswith("auto: dtype torch.float64 is not supported by the Triton kernels")
    for _, grid, _, form in launched:
        assert all(isinstance(n, int) and n > 0 for n in grid)
        assert set(form) == {"num_warps", "num_stages", "enable_fp_fusion"} and form["enable_fp_fusion"] is True


def test_dry_runs_nest_and_end():
    """After an exception, too, the GPU, Triton's driver and PyTorch's products are those of before."""
    active, x = driver._active, torch.ones(3, 2)
    device = x.device

    def target():
        return runtime.arch(device), runtime.num_sms(device)

    before = target()
    with pytest.raises(KeyError), dry_run(80, num_sms=7):
        assert target() == (80, 7)
        with pytest.raises(ZeroDivisionError), dry_run(90):
            assert target() == (90, 132) and driver._active.get_current_target().arch == 90
            raise ZeroDivisionError
        assert target() == (80, 7) and driver._active.get_current_target().arch == 80
        assert (x @ x.T).shape == (3, 3) and torch.addmm(torch.ones(5), x, torch.ones(2, 5)).shape == (3, 5)
        raise KeyError
    assert target() == before and driver._active is active and runtime.current_dry_run is None
    assert torch.equal(x @ x.T, torch.full((3, 3), 2.0))
    assert torch.equal(torch.addmm(torch.ones(5), x, torch.ones(2, 5)), torch.full((3, 5), 3.0))


def test_what_a_launch_may_be():
    """The limits are CUDA's. An empty grid launches nothing. A dry run gets the arguments of the kernel."""
    launched = []

    def launch(grid):
        with dry_run(90, lambda *args: launched.append(args)):
            runtime.launch(kernel, grid, num_warps=2, num_stages=5, x=1)

    def kernel():
        pass

    for grid in (0, (0, 1), (1, 0), (0, 65_536), (2**31, 0)):
        launch(grid)
    assert not launched
    largest = [2**31 - 1, (2**31 - 1, 65_535), (1, 1, 65_535)]
    for grid in largest:
        launch(grid)
    form = {"num_warps": 2, "num_stages": 5, "enable_fp_fusion": True}
    assert launched == [(kernel, g if isinstance(g, tuple) else (g,), {"x": 1}, form) for g in largest]
    for grid in (2**31, (2**31, 1), (1, 65_536), (1, 1, 65_536)):
        with pytest.raises(ValueError, match=r"^kernel: a grid of \(.*\) exceeds what CUDA can launch"):
            launch(grid)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@every_op_at_all
def test_what_is_no_tensor_is_named(call, impl, device):
    op, inputs, options = make(call, device)
    tensors = inputs | {n: o for n, o in options.items() if isinstance(o, torch.Tensor) and n != "seed"}
    for name in tensors:
        given = inputs | options | {name: [1.0]} | {"impl": impl}
        with pytest.raises(TypeError, match=rf"^{op}: {name} must be a .*[tT]ensor.* got list"):
            getattr(kernels, op)(**given)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_dropout_is_contiguous_whatever_its_input(impl, device):
    x = torch.ones(2, 5, 24, device=device).movedim(1, -1)
    y = kernels.dropout(x, 0.4, DROP["seed"].to(device), impl=impl)
    assert not x.is_contiguous() and y.is_contiguous()


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (1, 3, 8), (3, 1)], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "residual_layer_norm", "dropout", "linear", "mlp"])
def test_a_row_or_column_alone_with_strides(op, shape, device):
    """In a matrix of one row or one column, only one of the strides matters."""
    width = shape[-1]
    x = torch.randn(*shape[:-1], 2 * width, generator=torch.Generator().manual_seed(0)).to(device)[..., ::2]
    weight = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).to(device)
    rest = {
        "layer_norm": (),
        "residual_layer_norm": (x,),
        "dropout": (0.4, DROP["seed"].to(device)),
        "linear": (weight,),
        "mlp": (weight, None, weight.mT.contiguous(), None),
    }[op]
    strided, dense = x.detach().requires_grad_(), x.contiguous().requires_grad_()
    outs = [tree_leaves(getattr(kernels, op)(given, *rest, impl="triton")) for given in (strided, dense)]
    for found, want in zip(*outs, strict=True):
        assert torch.equal(found, want)
    grads = [torch.autograd.grad(out[-1].square().sum(), x)[0] for out, x in zip(outs, (strided, dense), strict=True)]
    assert torch.equal(*grads)
