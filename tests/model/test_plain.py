"""Changes to a part of the model take effect: hooks, wrappers, pruning, parametrisations, another module.

The fused ops read the weights of a part without calling it. So each change is made to the fast model and to the
reference, which calls all its parts.
"""

import dataclasses
import functools
import types

import pytest
import torch
from peers import assert_same, outputs_and_gradients, randomise
from torch import nn
from torch.nn.modules import module as module_
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.two_tensor import TwoTensor

import vit
from vit import chain, kernels, plain
from vit.kernels import runtime

CONFIG = vit.ViTConfig(
    img_size=(24, 16), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, init_values=0.5
)
LINEARS = [
    "patch_embed.proj",
    "blocks.0.attn.qkv",
    "blocks.1.attn.proj",
    "blocks.0.mlp.fc1",
    "blocks.1.mlp.fc2",
    "head",
]
NORMS = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "norm"]


class LoRA(nn.Module):
    """A low-rank update of a frozen layer. Like peft's, it exposes the wrapped layer's weight."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.linspace(-1, 1, 2 * base.in_features).reshape(2, -1))
        self.up = nn.Parameter(torch.linspace(-1, 1, 2 * base.out_features).reshape(-1, 2))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T / x.shape[-1]


def replace(model, name, made):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def wrap(model, name):
    replace(model, name, LoRA(model.get_submodule(name)))


def other_norm(model, name):
    old = model.get_submodule(name)
    new = nn.RMSNorm(old.normalized_shape, eps=1e-3)
    new.weight = old.weight
    replace(model, name, new)


def on(what):
    return lambda model, name: what(model.get_submodule(name))


CHANGES = {
    "forward hook": on(lambda m: m.register_forward_hook(lambda _m, _args, out: out * 1.5)),
    "forward pre-hook": on(lambda m: m.register_forward_pre_hook(lambda _m, args: (args[0].square(),))),
    "backward hook": on(lambda m: m.register_full_backward_hook(lambda _m, grads, _outs: (grads[0] * 2,))),
    "backward pre-hook": on(lambda m: m.register_full_backward_pre_hook(lambda _m, grads: (grads[0] * 2,))),
    "other input": on(
        lambda m: m.register_forward_pre_hook(lambda _m, args: (args[0] + args[0].roll(1, -1), *args[1:]))
    ),
    "LoRA": wrap,
    "pruned": on(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "weight_norm": on(parametrizations.weight_norm),
    "RMSNorm": other_norm,
}
CASES = [(change, part) for change in ("forward hook", "backward hook") for part in LINEARS + NORMS]
CASES += [("backward pre-hook", part) for part in LINEARS + NORMS]
CASES += [("other input", part) for part in ("blocks.0", "blocks.1", "blocks.1.attn", "blocks.0.mlp", "norm", "head")]
CASES += [("forward pre-hook", part) for part in ("blocks.1.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.norm2")]
CASES += [(change, part) for change in ("LoRA", "pruned", "weight_norm") for part in LINEARS[1:]]
CASES += [(change, "patch_embed.proj") for change in ("pruned", "weight_norm")]
CASES += [("RMSNorm", part) for part in NORMS]


def twins(impl="auto"):
    reference = vit.reference.VisionTransformer(CONFIG)
    randomise(reference)
    fast = vit.VisionTransformer(vit.ViTConfig(**{**vars(CONFIG), "impl": impl}))
    fast.load_state_dict(reference.state_dict())
    return fast, reference


def assert_alike(fast, reference, device):
    image = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for model in (fast.to(device), reference.to(device)):
        for name, param in model.named_parameters():
            if name.endswith("base.weight") or name.endswith("base.bias"):
                param.requires_grad_(True)
        found.append(outputs_and_gradients(model, model, image))
    assert_same(*found, 2e-5)


@pytest.mark.parametrize(("change", "part"), CASES)
def test_counts(change, part):
    fast, reference = twins()
    plain = reference(torch.ones(1, 3, 24, 16))
    for model in (fast, reference):
        CHANGES[change](model, part)
    if change not in ("backward hook", "backward pre-hook", "weight_norm"):  # these change gradients only
        assert not torch.allclose(reference(torch.ones(1, 3, 24, 16)), plain)  # the change has an effect
    assert_alike(fast, reference, "cpu")


@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "pre_norm": True, "reg_tokens": 2}], ids=["plain", "options"])
def test_a_hook_that_does_nothing_changes_nothing(fields, act_layer):
    """A hook on one part at a time: the called part and its surroundings compute what the fused op does."""
    model = vit.VisionTransformer(vit.ViTConfig(**vars(CONFIG) | fields | {"act_layer": act_layer}))
    randomise(model.double())
    image = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)).double()
    want = outputs_and_gradients(model, model, image)
    hooked = [name for name, _ in model.named_modules()]
    for name in hooked:
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: None)
        assert_same(outputs_and_gradients(model, model, image), want, 1e-12)
        handle.remove()


@pytest.mark.parametrize(("change", "part"), [("LoRA", "blocks.0.attn.qkv"), ("forward hook", "blocks.0.norm2")])
def test_counts_beside_kernels(change, part, device):
    fast, reference = twins("triton")
    for model in (fast, reference):
        CHANGES[change](model, part)
    assert_alike(fast, reference, device)


def test_dropout_of_a_wrapped_mlp():
    """The activation's dropout draws the same mask whether or not the layers around it are plain."""
    config = vit.ViTConfig(**{**vars(CONFIG), "proj_drop_rate": 0.4})
    model = vit.VisionTransformer(config, seed=0).train()
    image, seed = torch.randn(2, 3, 24, 16), torch.tensor([5])
    plain = model(image, dropout_seed=seed)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _args, out: out)
    torch.testing.assert_close(model(image, dropout_seed=seed), plain, rtol=1e-5, atol=1e-5)


# ---- what counts as plain, module by module --------------------------------------------------------------------------


def bound_to_another(module):
    module.forward = type(module)(3, 4).forward


def forward_of_its_own(module):
    module.forward = lambda x: 2 * x


def derived(module):
    module.__class__ = type("Derived", (type(module),), {})


def subclass_tensor(name):
    """A weight of a tensor subclass, as quantised and distributed ones are."""

    def change(module):
        values = getattr(module, name).detach()
        module._parameters[name] = nn.Parameter(TwoTensor(values, values.clone()))

    return change


def ignored(*_args, **_kwargs):
    return None


NOT_PLAIN = {
    "forward hook": lambda m: m.register_forward_hook(ignored),
    "forward hook with keywords": lambda m: m.register_forward_hook(ignored, with_kwargs=True),
    "forward hook, always called": lambda m: m.register_forward_hook(ignored, always_call=True),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(ignored),
    "forward pre-hook with keywords": lambda m: m.register_forward_pre_hook(ignored, with_kwargs=True),
    "backward hook": lambda m: m.register_full_backward_hook(ignored),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(ignored),
    "old backward hook": lambda m: m.register_backward_hook(ignored),
    "global forward hook": lambda m: module_.register_module_forward_hook(ignored),
    "global forward hook, always called": lambda m: module_.register_module_forward_hook(ignored, always_call=True),
    "global forward pre-hook": lambda m: module_.register_module_forward_pre_hook(ignored),
    "global backward hook": lambda m: module_.register_module_full_backward_hook(ignored),
    "global backward pre-hook": lambda m: module_.register_module_full_backward_pre_hook(ignored),
    "compiled": lambda m: m.compile(backend="eager"),
    "forward of its own": forward_of_its_own,
    "forward of another": bound_to_another,
    "weight_norm": parametrizations.weight_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "weight of another kind": subclass_tensor("weight"),
    "bias of another kind": subclass_tensor("bias"),
    "derived": derived,
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_linear_layer_that_is_more_than_its_parameters(kind):
    module, other = nn.Linear(3, 4), nn.Linear(3, 4)
    assert plain.is_linear(module)
    handle = NOT_PLAIN[kind](module)
    try:
        assert not plain.is_linear(module)
        assert plain.is_linear(other) != kind.startswith("global")
        if kind != "derived":  # it runs its class's forward, but is not a Linear
            assert plain.plain(module) == (kind in ("weight_norm", "pruned") and type(module) is not nn.Linear)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    if hasattr(handle, "remove"):
        assert plain.is_linear(module) and plain.is_linear(other)


def test_what_does_not_happen_in_a_call_does_not_count():
    """Hooks on ``state_dict``, a child or a parameter, and the module's own bound forward."""
    module = nn.Linear(3, 4)
    module.register_state_dict_post_hook(ignored)
    module.register_load_state_dict_post_hook(ignored)
    module.register_load_state_dict_pre_hook(ignored)
    module.register_state_dict_pre_hook(ignored)
    module.weight.register_hook(ignored)
    module.forward = module.forward
    module.note = 3
    assert plain.is_linear(module)
    outer = nn.Sequential(nn.Linear(3, 3))
    outer[0].register_forward_hook(ignored)
    assert plain.plain(outer) and not plain.plain(outer[0])


@pytest.mark.parametrize("kind", ["forward hook", "backward hook", "forward of its own", "derived"])
def test_absent(kind):
    module = nn.Identity()
    assert plain.absent(None) and plain.absent(module)
    assert not plain.absent(nn.Dropout(0.0)) and not plain.absent(nn.Sequential())
    NOT_PLAIN[kind](module)
    assert not plain.absent(module)


@pytest.mark.parametrize("module", [nn.LazyLinear(4), nn.Bilinear(3, 3, 4), nn.Conv1d(3, 4, 1), nn.Embedding(3, 4)])
def test_other_layers_with_a_weight_are_not_linear(module):
    assert not plain.is_linear(module)


def test_the_output_projection_of_pytorchs_attention_is_linear():
    assert plain.is_linear(nn.MultiheadAttention(8, 2).out_proj)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("called", [False, True])
def test_linear_uses_the_op_or_calls_the_module(called, bias):
    module, x = nn.Linear(3, 4, bias=bias), torch.randn(2, 5, 3)
    if called:
        module.register_forward_hook(lambda m, args, out: 3 * out)
    with runtime.record_choices() as choices:
        found = plain.linear(module, x, "reference")
    want = x @ module.weight.T + (module.bias if bias else 0)
    torch.testing.assert_close(found, 3 * want if called else want)
    assert [choice.op for choice in choices] == ([] if called else ["linear"])
    assert all(choice.reason.startswith("asked for") for choice in choices)


def test_a_class_that_is_patched_before_or_after_it_is_first_seen(monkeypatch):
    first = {"__module__": __name__, "forward": lambda self, x: x}
    Before, After, Never = (type(name, (nn.Module,), dict(first)) for name in ("Before", "After", "Never"))
    Never.forward = Before.forward
    other = types.FunctionType((lambda self, x: 2 * x).__code__, {"__name__": "somewhere.else"})
    Before.forward = other
    assert plain.patched(Before) and not plain.patched(After)
    plain.remember(Before, After, Never)
    assert plain.replaced(Before()) and not plain.replaced(After()) and not plain.replaced(Never())
    After.forward = other
    plain.remember(Before, After, Never)  # keeps what was stored first
    assert plain.replaced(After()) and plain.replaced(Before()) and not plain.replaced(Never())
    After.forward = lambda self, x: 3 * x  # same file as the first: only the remembered forward reveals it
    plain.remember(After)
    assert not plain.patched(After) and plain.replaced(After())
    After.forward = other
    assert plain.patched(type("Inherits", (After,), {}))
    wrapped = functools.wraps(first["forward"])(other)
    Never.forward = wrapped
    assert plain.patched(Never)


# ---- the chain of blocks ---------------------------------------------------------------------------------------------


def link_of(log, index, norm):
    def run(x, y, next_norm):
        log.append((index, None if y is None else y.item(), next_norm))
        x = x + 10**index
        return x, None if next_norm is None else -x

    return chain.Link(run, norm)


def test_each_block_gets_the_norm_of_the_next_and_its_own_input_normalised():
    log, x = [], torch.tensor(1000.0)
    norms = ["norm 0", None, "norm 2"]
    out = list(chain.chain(x, [link_of(log, i, norm) for i, norm in enumerate(norms)], "last"))
    assert log == [(0, None, None), (1, None, "norm 2"), (2, -1011.0, "last")]
    assert [(x.item(), y if y is None else y.item()) for x, y in out] == [
        (1000.0, None), (1001.0, None), (1011.0, -1011.0), (1111.0, -1111.0)
    ]  # fmt: skip


@pytest.mark.parametrize("last", [None, "last"])
def test_a_chain_of_one_block(last):
    log, x = [], torch.tensor(5.0)
    out = list(chain.chain(x, [link_of(log, 0, "norm")], last))
    assert log == [(0, None, last)] and len(out) == 2 and out[0] == (x, None)
    assert out[1] == (6.0, None if last is None else -6.0)


def test_a_block_that_is_called_gets_the_stream_alone():
    log, seen = [], []

    def block(*args, **kwargs):
        seen.append((args, kwargs))
        return args[0] * 2

    links = [link_of(log, 0, "norm 0"), chain.called(block), link_of(log, 2, "norm 2")]
    assert links[1].norm is None
    out = [x.item() for x, _ in chain.chain(torch.tensor(1.0), links, None)]
    assert out == [1.0, 2.0, 4.0, 104.0] and seen == [((torch.tensor(2.0),), {})]
    assert log == [(0, None, None), (2, None, None)]


def test_a_chain_runs_block_by_block_as_it_is_asked():
    """Stopping early skips the later blocks."""
    log = []
    steps = chain.chain(torch.tensor(1.0), [link_of(log, i, "norm") for i in range(3)])
    next(steps)
    assert log == []
    next(steps)
    assert [index for index, *_ in log] == [0]


# ---- vit.explain -----------------------------------------------------------------------------------------------------


class Ops(nn.Module):
    """Calls the given ops, each with its path and dtype."""

    def __init__(self, *calls, fails: bool = False):
        super().__init__()
        self.calls, self.fails, self.seen = calls, fails, []
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, scale=1):
        self.seen.append((torch.is_grad_enabled(), self.training, float(scale)))
        self.count += 1
        for op, impl, dtype in self.calls:
            weight = self.weight.to(dtype)
            x = x.to(dtype)
            if op == "layer_norm":
                x = kernels.layer_norm(x, weight, weight, impl=impl)
            else:
                x = kernels.linear(x, torch.eye(4, dtype=dtype), impl=impl)
        if self.fails:
            raise KeyError("on purpose")
        return x * scale


AUTO, FORCED = "auto", "reference"
CALLS = [
    ("linear", AUTO, torch.float64),
    ("layer_norm", AUTO, torch.float32),
    ("linear", AUTO, torch.float32),
    ("layer_norm", FORCED, torch.float32),
    ("layer_norm", AUTO, torch.float32),
    ("linear", AUTO, torch.float64),
    ("layer_norm", AUTO, torch.float64),
    ("linear", AUTO, torch.float64),
]


@pytest.mark.parametrize("reverse", [False, True])
def test_explain_counts_by_op_path_reason_and_dtype_in_the_order_of_first_use(reverse):
    calls = CALLS[::-1] if reverse else CALLS
    rows = vit.explain(Ops(*calls), torch.randn(2, 4))
    reason = {AUTO: "auto", FORCED: "asked for"}
    found = [(r.op, r.reason.startswith("asked for"), r.dtype, r.calls) for r in rows]
    want = {}
    for op, impl, dtype in calls:
        key = op, reason[impl] == "asked for", dtype
        want[key] = want.get(key, 0) + 1
    assert found == [(*key, count) for key, count in want.items()] and len(found) == 5
    assert {(row.reason.startswith("auto"), row.path) for row in rows} == {(True, "pytorch"), (False, "reference")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        rows[0].calls = 7
    assert isinstance(rows, list) and rows == list(rows)
    lines = str(rows).split("\n")
    assert len(lines) == 5 and str(rows) == f"{rows}"
    for line, row in zip(lines, rows, strict=True):
        op, path, count, dtype, *rest = line.split()
        assert (op, path, count, dtype) == (row.op, row.path, f"x{row.calls}", str(row.dtype))
        assert " ".join(rest) == row.reason
    assert len({line.index(row.reason) for line, row in zip(lines, rows, strict=True)}) == 1  # columns


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_explain_runs_one_forward_without_gradients_and_with_all_arguments(training, grad):
    model = Ops(*CALLS).train(training)
    with torch.set_grad_enabled(grad):
        vit.explain(model, torch.randn(2, 4), scale=3)
        vit.explain(model, torch.randn(2, 4), 4)
        vit.explain(model, x=torch.randn(2, 4))
        vit.explain(model, scale=5, x=torch.randn(2, 4))
        assert torch.is_grad_enabled() == grad
    assert model.seen == [(False, training, scale) for scale in (3.0, 4.0, 1.0, 5.0)]
    assert model.count == 0


def test_explain_after_an_error_and_inside_another_recorder():
    with pytest.raises(KeyError, match="on purpose"):
        vit.explain(Ops(*CALLS, fails=True), torch.randn(2, 4))
    assert torch.is_grad_enabled()
    with runtime.record_choices() as outer:
        Ops(("linear", AUTO, torch.float32))(torch.randn(2, 4))
        rows = vit.explain(Ops(("layer_norm", AUTO, torch.float32)), torch.randn(2, 4))
        with pytest.raises(KeyError):
            vit.explain(Ops(*CALLS, fails=True), torch.randn(2, 4))
        Ops(("linear", AUTO, torch.float64))(torch.randn(2, 4))
    assert [row.op for row in rows] == ["layer_norm"]
    assert [(choice.op, choice.dtype) for choice in outer] == [("linear", torch.float32), ("linear", torch.float64)]


def first_hook(*_args):
    return None


def second_hook(*_args):
    return None


GLOBAL = {
    "forward": module_.register_module_forward_hook,
    "forward pre": module_.register_module_forward_pre_hook,
    "backward": module_.register_module_full_backward_hook,
    "backward pre": module_.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_explain_names_every_global_hook_in_its_last_entry(kind):
    model, empty, x = Ops(*CALLS), Ops(), torch.randn(2, 4)
    want = vit.explain(model, x)
    handles = [GLOBAL[kind](hook) for hook in (first_hook, second_hook, functools.partial(ignored))]
    try:
        rows, nothing = vit.explain(model, x), vit.explain(empty, x)
    finally:
        for handle in handles:
            handle.remove()
    assert rows[:-1] == want and nothing == [] and str(nothing) == ""
    assert (rows[-1].op, rows[-1].path, rows[-1].calls) == ("modules", "called", 3)
    assert rows[-1].dtype is rows[0].dtype
    assert rows[-1].reason.startswith("a global module hook (first_hook, second_hook, functools.partial(")
    assert rows[-1].reason.endswith("makes every module be called by itself")
    assert plain.global_hooks() == [] and vit.explain(model, x) == want


def test_all_kinds_of_global_hooks_are_named():
    handles = [register(first_hook) for register in GLOBAL.values()]
    try:
        assert plain.global_hooks() == ["first_hook"] * 4
    finally:
        for handle in handles:
            handle.remove()


def test_a_chain_without_blocks_gives_what_it_got():
    x = torch.ones(2)
    assert [(stream is x, y) for stream, y in chain.chain(x, [])] == [(True, None)]
    model, _ = twins()
    del model.blocks[1], model.blocks[0]
    torch.testing.assert_close(model.blocks(x), x)


def test_what_a_model_keeps_of_an_explained_forward_can_be_trained_with():
    """No gradients, and no inference tensor, which autograd refuses to save."""

    class Caches(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.kept = vit.VisionTransformer(CONFIG), None

        def forward(self, x):
            if self.kept is None:
                self.kept = x.new_ones(5)
            return self.model(x) * self.kept

    model, image = Caches(), torch.ones(1, 3, 24, 16)
    vit.explain(model, image)
    assert not model.kept.is_inference() and not model.kept.requires_grad
    model(image).sum().backward()
