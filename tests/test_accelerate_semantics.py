"""`vit.accelerate` changes nothing else: hooks, wrappers, randomness, signatures, dtypes, compilation, refusals."""

import copy
import warnings

import pytest
import torch
import zoo
from peers import randomise
from test_accelerate import assert_close
from torch import nn
from torch.nn.utils import parametrizations, prune

import vit

PARTS = {
    "timm DINOv2": [
        "", "patch_embed.proj", "blocks", "blocks.0", "blocks.1", "blocks.1.norm1", "blocks.0.attn",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj", "blocks.0.attn.proj_drop", "blocks.1.ls1", "blocks.0.drop_path1", "blocks.1.drop_path2",
        "blocks.0.norm2", "blocks.0.mlp", "blocks.0.mlp.fc1", "blocks.0.mlp.act", "blocks.0.mlp.drop1",
        "blocks.0.mlp.norm", "blocks.0.mlp.fc2", "blocks.0.mlp.drop2", "norm", "head",
    ],
    "timm": ["blocks.0.ls1", "blocks.1.ls2"],
    "timm qk_norm": ["blocks.0.attn.q_norm", "blocks.0.attn.k_norm", "blocks.0.attn.norm"],
    "timm gated": ["blocks.0.attn.gate", "blocks.0.attn.q_norm", "blocks.0.attn.k_norm"],
    "timm scale_norm": ["blocks.0.attn.norm", "blocks.1.mlp.norm"],
    "torchvision": [
        "conv_proj", "encoder.layers", "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_1.ln_1",
        "encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_0.dropout",
        "encoder.layers.encoder_layer_0.mlp", "encoder.layers.encoder_layer_0.mlp.0",
        "encoder.layers.encoder_layer_0.mlp.1", "encoder.layers.encoder_layer_0.mlp.2", "encoder.ln",
    ],
    "hf ViT": [
        "vit.layers.0", "vit.layers.0.layernorm_before", "vit.layers.0.layernorm_after", "vit.layers.0.attention",
        "vit.layers.0.attention.q_proj", "vit.layers.0.attention.o_proj", "vit.layers.0.dropout", "vit.layers.0.mlp",
        "vit.layers.0.mlp.fc1", "vit.layers.0.mlp.activation_fn", "vit.layers.0.mlp.fc2", "vit.layernorm",
    ],
    "hf Dinov2": [
        "dinov2.encoder.layer.0.norm2", "dinov2.encoder.layer.0.layer_scale1", "dinov2.encoder.layer.0.drop_path",
    ],
}  # fmt: skip
BEFORE_OR_AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
PART_CASES = [(name, part) for name, parts in PARTS.items() for part in parts]


def changed(out, factor):
    """1.5 times a module's output, of whatever form."""
    if isinstance(out, tuple):
        return (out[0] * factor, *out[1:])
    if isinstance(out, torch.Tensor):
        return out * factor
    return type(out)(**{k: v * factor for k, v in out.items()})


@BEFORE_OR_AFTER
@pytest.mark.parametrize(("name", "part"), PART_CASES)
def test_a_hook_sees_and_changes_what_it_did(name, part, after):
    """As often, with the same shapes and keywords, whether it was there before accelerate or came after it."""
    original = zoo.build(name)
    model = copy.deepcopy(original)
    seen = [[], []]
    if after:
        vit.accelerate(model)
    for of, calls in zip((model, original), seen, strict=True):

        def hook(module, args, kwargs, out, calls=calls):
            first = out[0] if isinstance(out, tuple) else out
            calls.append((len(args), sorted(kwargs), getattr(first, "shape", None)))
            return changed(out, 1.5)

        of.get_submodule(part).register_forward_hook(hook, with_kwargs=True)
    if not after:
        vit.accelerate(model)
    image = zoo.images(name)
    assert_close(zoo.outputs(name, model, image), zoo.outputs(name, original, image))
    assert seen[0] == seen[1] and seen[0]


@BEFORE_OR_AFTER
@pytest.mark.parametrize(("name", "part"), PART_CASES)
def test_a_replaced_forward_is_honoured(name, part, after):
    original = zoo.build(name)
    model = copy.deepcopy(original)
    if after:
        vit.accelerate(model)
    for of in (model, original):
        module = of.get_submodule(part)
        module.forward = lambda *args, forward=module.forward, **kwargs: changed(forward(*args, **kwargs), 1.5)
    image = zoo.images(name)
    want = zoo.outputs(name, original, image)
    if not after:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            vit.accelerate(model)
    assert_close(zoo.outputs(name, model, image), want)
    vit.restore(model)
    assert part == "" or "forward" in vars(model.get_submodule(part))  # somebody else's stays


@pytest.mark.parametrize("part", ["1", "0.attn.proj", "1.norm1", "1.ls1", "0.mlp.act"])
def test_backward_and_pre_hooks(part):
    original = zoo.build("timm DINOv2")
    model = vit.accelerate(copy.deepcopy(original))
    for of in (model, original):
        module = of.blocks.get_submodule(part)
        module.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))
        module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
    image = zoo.images("timm DINOv2")
    assert_close(zoo.results("timm DINOv2", model, image), zoo.results("timm DINOv2", original, image))


def test_global_hooks():
    """A hook on all modules sees the same modules in the same order."""
    original = zoo.build("timm DINOv2")
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images("timm DINOv2")
    seen = []
    for of in (model, original):
        names = {module: name for name, module in of.named_modules()}
        calls = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out, names=names, calls=calls: calls.append(names.get(module))
        )
        of(image)
        handle.remove()
        seen.append(calls)
    assert seen[0] == seen[1]


def test_blocks_exchanged_afterwards():
    """A row of blocks that was accelerated as one runs what is in it now."""

    class Halved(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return 0.5 * self.block(x)

    for change in (
        lambda model: model.blocks.__setitem__(1, Halved(model.blocks[1])),
        lambda model: model.blocks.__setitem__(0, nn.Identity()),
        lambda model: model.blocks.append(copy.deepcopy(model.blocks[0])),
        lambda model: vit.restore(model.blocks[1]),
        lambda model: model.prune_intermediate_layers(1),
    ):
        original = zoo.build("timm")
        model, image = vit.accelerate(copy.deepcopy(original)), zoo.images("timm")
        change(model)
        change(original)
        assert_close(zoo.results("timm", model, image), zoo.results("timm", original, image))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


LINEARS = {
    "timm": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
    "torchvision": ["mlp.0", "mlp.3"],
    "hf ViT": ["attention.q_proj", "attention.v_proj", "attention.o_proj", "mlp.fc2"],
    "hf Dinov2": ["attention.k_proj", "mlp.fc1"],
}


def wrap(model: nn.Module, ends: list[str], wrapper) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(tuple(ends)):
            parent, _, child = name.rpartition(".")
            wrapped = wrapper(module)
            if wrapped is not module:
                setattr(model.get_submodule(parent), child, wrapped)


def spectral(module):
    return parametrizations.spectral_norm(module).eval()


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)
    return module


WRAPPERS = {
    "LoRA": LoRA,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": spectral,
    "pruned": pruned,
}


@BEFORE_OR_AFTER
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", LINEARS)
def test_wrapped_linears(name, wrapper, after):
    original = zoo.build(name)
    model = copy.deepcopy(original)
    if after:
        vit.accelerate(model)
    for of in (model, original):
        torch.manual_seed(0)
        wrap(of, LINEARS[name], WRAPPERS[wrapper])
        if wrapper == "LoRA":
            randomise(of)
    if not after:
        vit.accelerate(model)
    image = zoo.images(name)
    assert_close(zoo.results(name, model, image), zoo.results(name, original, image))
