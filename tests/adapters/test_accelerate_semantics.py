"""`vit.accelerate` changes nothing else: hooks, replaced parts, wrappers, random numbers."""

import copy
import warnings

import pytest
import torch
import zoo
from peers import import_timm, randomise
from test_accelerate import assert_close, bits
from torch import nn
from torch.nn.utils import parametrizations, prune

import vit
from vit.adapters import parts

pytestmark = pytest.mark.peers

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
    "timm ResPost": ["blocks.0.norm1", "blocks.0.attn", "blocks.1.drop_path2", "blocks.1.norm2"],
    "timm ParallelThings": [
        "blocks.0.attns.0", "blocks.1.attns.0", "blocks.0.attns.0.norm", "blocks.0.attns.1.norm",
        "blocks.0.attns.0.attn", "blocks.1.attns.0.ls", "blocks.1.ffns.0", "blocks.1.ffns.0.norm",
        "blocks.1.ffns.1.mlp",
    ],
    "timm ParallelScaling": [
        "blocks.0.in_norm", "blocks.1.in_norm", "blocks.0.in_proj", "blocks.0.q_norm", "blocks.1.mlp_act",
        "blocks.0.mlp_drop", "blocks.0.attn_out_proj", "blocks.0.mlp_out_proj", "blocks.0.ls", "blocks.1.drop_path",
    ],
    "timm DINOv3": ["blocks.0", "blocks.0.attn", "blocks.0.attn.proj", "blocks.0.norm2", "blocks.1.mlp"],
    "timm PE": ["blocks.0.attn.qkv", "blocks.1.norm1"],
    "timm RoPE, grouped": ["blocks.0.attn.k_proj", "blocks.0.attn.k_norm"],
    "hf DINOv3": ["model.layer.0.attention", "model.layer.0.attention.k_proj", "model.layer.0.mlp.act_fn"],
    "hf CLIP": [
        "vision_model.encoder.layers.1", "vision_model.encoder.layers.0.layer_norm1",
        "vision_model.encoder.layers.0.self_attn", "vision_model.encoder.layers.0.self_attn.out_proj",
        "vision_model.encoder.layers.0.layer_norm2", "vision_model.encoder.layers.0.mlp", "vision_model.pre_layrnorm",
    ],
    "hf BLIP": [
        "encoder.layers.0.self_attn", "encoder.layers.0.self_attn.qkv", "encoder.layers.0.self_attn.dropout",
        "encoder.layers.1.self_attn.projection",
    ],
    "hf YOLOS": [
        "vit.encoder.layer.1", "vit.encoder.layer.0.attention", "vit.encoder.layer.0.attention.attention",
        "vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.0.attention.output",
        "vit.encoder.layer.0.intermediate", "vit.encoder.layer.0.intermediate.dense",
        "vit.encoder.layer.0.intermediate.intermediate_act_fn", "vit.encoder.layer.0.output",
        "vit.encoder.layer.0.output.dense", "vit.encoder.layer.0.output.dropout", "vit.encoder.layer.1.layernorm_after",
    ],
    "hf ViTPose": ["encoder.layer.0.mlp", "encoder.layer.0.mlp.activation", "encoder.layer.1.attention"],
    "hf SigLIP": ["head", "head.attention", "head.layernorm", "head.mlp"],
}  # fmt: skip
BEFORE_OR_AFTER = pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
PART_CASES = [(name, part) for name, parts in PARTS.items() for part in parts]


def changed(out, factor):
    """A module's output, of any form, times factor."""
    if isinstance(out, tuple):
        return (out[0] * factor, *out[1:])
    if isinstance(out, torch.Tensor):
        return out * factor
    return type(out)(**{k: v * factor for k, v in out.items()})


@BEFORE_OR_AFTER
@pytest.mark.parametrize(("name", "part"), PART_CASES)
def test_a_hook_sees_and_changes_what_it_did(name, part, after):
    """It runs as often, with the same shapes and keywords, if added before or after accelerate."""
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
    assert part == "" or "forward" in vars(model.get_submodule(part))  # the user's stays


@BEFORE_OR_AFTER
@pytest.mark.parametrize(("name", "part"), [case for case in PART_CASES if case[1]])
def test_a_subclass_runs_its_own_forward(name, part, after):
    """A class derived from a part's class counts as another class, wherever the part is."""
    original = zoo.build(name)
    model = copy.deepcopy(original)
    for of, accelerated in ((model, after), (original, False)):
        if accelerated:
            vit.accelerate(model)
        module = of.get_submodule(part)
        base = type(module)

        def forward(self, *args, base=base, **kwargs):
            return changed(base.forward(self, *args, **kwargs), 1.5)

        module.__class__ = type(base.__name__, (base,), {"forward": forward})
    image = zoo.images(name)
    want = zoo.outputs(name, original, image)
    if not after:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            vit.accelerate(model)
    assert_close(zoo.outputs(name, model, image), want)


@pytest.mark.parametrize("part", ["1", "0.attn.proj", "1.norm1", "1.ls1", "0.mlp.act"])
def test_backward_and_pre_hooks(part):
    original = zoo.build("timm DINOv2")
    model = vit.accelerate(copy.deepcopy(original))
    for of in (model, original):
        module = of.blocks.get_submodule(part)
        module.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))
        of.blocks[0].mlp.fc1.register_full_backward_pre_hook(lambda module, grad_out: (grad_out[0] * 3,))
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
    """An accelerated row of blocks runs the blocks that it holds now."""

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


@BEFORE_OR_AFTER
@pytest.mark.parametrize("change", ["hook", "forward", "pruned", "weight_norm"])
def test_the_output_projection_of_torchvisions_attention(change, after):
    """PyTorch's attention reads its parameters without calling it; so a hook on it sees nothing, as before."""
    original = zoo.build("torchvision")
    model, calls = copy.deepcopy(original), [[], []]
    if after:
        vit.accelerate(model)
    for of, seen in zip((model, original), calls, strict=True):
        projection = of.encoder.layers[0].self_attention.out_proj
        if change == "hook":
            projection.register_forward_hook(lambda module, args, out, seen=seen: seen.append(1))
        elif change == "forward":
            projection.forward = lambda x: 2 * x
        else:
            WRAPPERS[change](projection)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = model if after else vit.accelerate(model)
    image = zoo.images("torchvision")
    assert_close(zoo.results("torchvision", model, image), zoo.results("torchvision", original, image))
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", ["timm", "torchvision", "hf ViT"])
def test_hooks_that_are_removed_leave_nothing(name):
    """Afterwards the same ops run as before, with the same bits."""
    model, image = vit.accelerate(zoo.build(name)), zoo.images(name)
    want, ops = bits(zoo.results(name, model, image)), vit.explain(model, image)
    handles = []
    for module in model.modules():
        handles += [module.register_forward_hook(lambda *_: None), module.register_forward_pre_hook(lambda *_: None)]
        handles.append(module.register_full_backward_hook(lambda *_: None))
    assert len(vit.explain(model, image)) != len(ops) or vit.explain(model, image) != ops
    for handle in handles:
        handle.remove()
    assert vit.explain(model, image) == ops
    assert bits(zoo.results(name, model, image)) == want


@BEFORE_OR_AFTER
@pytest.mark.parametrize("name", ["timm", "torchvision", "hf ViT"])
def test_a_forward_that_is_put_back_is_the_modules_own(name, after):
    """Tools that wrap ``forward`` for a while leave the bound method in the module's ``__dict__``."""
    image = zoo.images(name)
    want = [(row.op, row.calls) for row in vit.explain(vit.accelerate(zoo.build(name)), image)]
    model = zoo.build(name)
    model = vit.accelerate(model) if after else model
    for module in model.modules():
        swapped = isinstance(module, (nn.LayerNorm, nn.Conv2d)) and not after  # the library's forward would stay there
        if not list(module.children()) and not swapped:
            module.forward = module.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model if after else vit.accelerate(model)
    assert [(row.op, row.calls) for row in vit.explain(model, image)] == want
    assert_close(zoo.outputs(name, model, image), zoo.outputs(name, zoo.build(name), image))


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
    "hf BLIP": ["self_attn.qkv", "mlp.fc2"],
    "hf YOLOS": ["attention.value", "intermediate.dense", "layer.1.output.dense"],
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


# ---- randomness ------------------------------------------------------------------------------------------------------


def _with_dropout_between_its_paths() -> nn.Module:
    model = zoo.timm_model(drop_path_rate=0.5, depth=3, init_values=0.7)
    for block in model.blocks:
        block.attn.proj_drop.p = block.mlp.drop2.p = 0.3
    return model


DROP_PATHS = {
    "timm": lambda: zoo.timm_model(drop_path_rate=0.5, depth=3),
    "timm LayerScale": _with_dropout_between_its_paths,
    "timm ResPost": lambda: zoo.blocks("ResPostBlock", drop_path_rate=0.5, depth=3),
    "timm ParallelThings": lambda: zoo.blocks("ParallelThingsBlock", drop_path_rate=0.5, depth=3),
    "timm ParallelScaling": lambda: zoo.blocks("ParallelScalingBlock", drop_path_rate=0.5, depth=3),
    "timm EVA": lambda: zoo.MODELS["timm EVA"](drop_path_rate=0.5, depth=3),
    "hf": lambda: zoo.hf_model("Dinov2ForImageClassification", "Dinov2Config", drop_path_rate=0.5),
}
DROPOUTS = {
    "timm attn_drop": lambda: zoo.timm_model(attn_drop_rate=0.4),
    "timm ParallelThings": lambda: zoo.MODELS["timm ParallelThings"](attn_drop_rate=0.4, drop_path_rate=0.4),
    "timm ParallelScaling": lambda: zoo.MODELS["timm ParallelScaling"](attn_drop_rate=0.4, proj_drop_rate=0.2),
    "timm EVA": lambda: zoo.MODELS["timm EVA"](attn_drop_rate=0.4),
    "timm attn_drop, qk_norm": lambda: zoo.timm_model(attn_drop_rate=0.4, qk_norm=True),
    "timm proj_drop": lambda: zoo.timm_model(proj_drop_rate=0.4, pos_drop_rate=0.2),
    "torchvision attention_dropout": lambda: zoo.torchvision_model(attention_dropout=0.4),
    "torchvision dropout": lambda: zoo.torchvision_model(dropout=0.4),
    "hf attention": lambda: zoo.hf_model("ViTForImageClassification", "ViTConfig", attention_probs_dropout_prob=0.4),
    "hf hidden": lambda: zoo.hf_model("ViTForImageClassification", "ViTConfig", hidden_dropout_prob=0.4),
    "hf CLIP attention": lambda: zoo.TOWERS["hf CLIP"](attention_dropout=0.4),
    "hf BLIP attention": lambda: zoo.TOWERS["hf BLIP"](attention_dropout=0.4),
    "hf YOLOS attention": lambda: zoo.TOWERS["hf YOLOS"](attention_probs_dropout_prob=0.4),
    "hf YOLOS hidden": lambda: zoo.TOWERS["hf YOLOS"](hidden_dropout_prob=0.4),
}


def pair(make, train: bool = True) -> tuple[nn.Module, nn.Module]:
    """An accelerated model and its original."""
    torch.manual_seed(0)
    original = make()
    randomise(original)
    original.train(train)
    return vit.accelerate(copy.deepcopy(original)), original


def seeded(name: str, model: nn.Module, image: torch.Tensor, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return zoo.results(name, model, image)


@pytest.mark.parametrize("name", DROP_PATHS)
def test_drop_path_draws_the_paths_of_the_library(name):
    model, original = pair(DROP_PATHS[name])
    image = zoo.images("", batch=6)
    assert_close(seeded("", model, image), seeded("", original, image))
    with torch.autocast("cpu", torch.bfloat16):  # another draw would give errors as large as the logits
        assert_close(seeded("", model, image), seeded("", original, image), 0.1)


def test_drop_path_in_the_dtype_of_the_branch():
    """Under autocast, LayerScale makes the branch fp32, so 1/keep has fp32 precision."""
    timm = import_timm()
    x, branch = torch.randn(64, 5, 8), torch.randn(64, 5, 8).bfloat16()
    scale, drop = timm.layers.LayerScale(8, init_values=0.7), timm.layers.DropPath(0.3).train()
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        ours, _ = parts.add_norm(x, branch, None, "auto", scale, drop)
        torch.manual_seed(0)
        torch.testing.assert_close(ours, x + drop(scale(branch)), rtol=1e-6, atol=1e-6)


def test_drop_path_on_the_kernels(device):
    model, original = (of.to(device) for of in pair(DROP_PATHS["timm LayerScale"]))
    vit.accelerate(model, impl="triton")
    image = zoo.images("", batch=3).to(device)
    assert_close(seeded("", model, image), seeded("", original, image))


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    """Seeded, off in eval(), with the library's distribution over 1,024 copies of an image."""
    model, original = pair(DROPOUTS[name])
    image = zoo.images("")
    assert bits(seeded("", model, image)) == bits(seeded("", model, image))
    assert bits(seeded("", model, image)) != bits(seeded("", model, image, seed=4))

    copies = image[:1].expand(1024, -1, -1, -1)
    with torch.no_grad():
        torch.manual_seed(1)
        ours, theirs = (next(iter(zoo.outputs("", of, copies).values())) for of in (model, original))
    spread = theirs.std(0)
    assert (spread > 0).all()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread * (2 / 1024) ** 0.5).all()
    assert ((ours.std(0) / spread).log().abs() < 0.15).all()

    assert_close(zoo.results("", model.eval(), image), zoo.results("", original.eval(), image))


CHECKPOINTED = {name: make for name, make in DROPOUTS.items() if "torchvision" not in name}
CHECKPOINTED |= {f"{name} drop_path": make for name, make in DROP_PATHS.items()}


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [(name, kind) for name in CHECKPOINTED for kind in ([False, True] if name.startswith("hf") else [None])],
)
def test_checkpointing_redraws_what_it_drew(name, reentrant):
    """Gradients are unchanged, and the backward pass reruns each part as often as the library's does."""
    model, original = pair(CHECKPOINTED[name])
    image = zoo.images("")
    want, calls = seeded("", model, image), []
    for of in (model, original):
        if name.startswith("timm"):
            of.set_grad_checkpointing(True)
        else:
            of.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        ran = []
        for part, module in of.named_modules():
            if part.endswith((".attn", ".attention", ".self_attn", ".mlp")):
                module.register_forward_hook(lambda module, args, out, part=part, ran=ran: ran.append(part))
        torch.manual_seed(3)
        pixels = image.clone().requires_grad_()
        outs, generator = zoo.outputs("", of, pixels), torch.Generator().manual_seed(9)
        torch.autograd.backward(
            list(outs.values()), [torch.randn(out.shape, generator=generator) for out in outs.values()]
        )
        if of is model:
            found = outs | {"grad image": pixels.grad}
            found |= {f"grad {k}": p.grad for k, p in of.named_parameters() if p.grad is not None}
            assert_close(found, want, 1e-6)
        calls.append(ran)
    assert calls[0] == calls[1]


def _checkpoints_in_its_call(base: type) -> type:
    """A layer of some transformers versions: ``__call__`` does the checkpointing, not ``forward``."""

    def call(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(lambda *args: base.__call__(self, *args, **kwargs), *args)
        return base.__call__(self, *args, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__call__": call}
    layer = type(base.__name__, (base,), names)
    layer.forward = base.forward.__wrapped__
    return layer


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["ViTForImageClassification ViTConfig", "Dinov2Model Dinov2Config"])
@pytest.mark.parametrize("own_call", [False, True])
def test_layers_checkpoint_in_training_and_once(name, training, on, own_call):
    """As often as the library's, which does it in ``forward`` or, in some versions, ``__call__``."""
    original = zoo.hf_model(*name.split())
    randomise(original.train(training))
    if own_call:
        for module in original.modules():
            if type(module).__name__.endswith("Layer"):
                module.__class__ = _checkpoints_in_its_call(type(module))
    model, image, found = vit.accelerate(copy.deepcopy(original)), zoo.images(""), []
    for of in (model, original):
        calls = []

        def checkpoint(function, *args, calls=calls):
            calls.append(function)
            return function(*args)

        layers = [module for module in of.modules() if hasattr(module, "gradient_checkpointing")]
        layers = [module for module in layers if type(module).__name__.endswith("Layer")]
        assert len(layers) == 2
        for layer in layers:
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = on, checkpoint
        found.append((calls, zoo.results("", of, image)))
    assert [len(calls) for calls, _ in found] == [2 if on and training else 0] * 2
    assert_close(found[0][1], found[1][1])


def test_randomness_left_to_the_library_is_drawn_as_before():
    """A call that falls back draws no random numbers before the library does."""
    model, original = pair(lambda: zoo.timm_model(attn_drop_rate=0.3, qk_norm=True))
    image, mask = zoo.images(""), torch.ones(10, 10, dtype=torch.bool).tril()
    found = []
    for of in (model, original):
        torch.manual_seed(2)
        found.append({"logits": of(image, attn_mask=mask)})
    assert_close(*found)
    model, original = pair(DROPOUTS["hf attention"])
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    found = []
    for of in (model, original):
        torch.manual_seed(2)
        found.append({"hidden": of.vit(image, attention_mask=mask).last_hidden_state})
    assert_close(*found)
