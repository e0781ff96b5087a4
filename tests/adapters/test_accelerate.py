"""`vit.accelerate` on models of three libraries: outputs and gradients within the policy, and `vit.restore`."""

import copy
import gc
import inspect
import io
import re
import warnings
import weakref
from collections import Counter

import pytest
import torch
import zoo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vit
from vit.testing import check_draws

pytestmark = pytest.mark.peers

# Softmax ignores what all keys of a row share, so the gradient of a key bias is only rounding noise. It is judged in
# one tensor together with other biases.
JOINT = re.compile(
    r"\b(?:[qkv]_(?=proj\.(?:base\.)?bias)|(?:query|key|value)(?=\.(?:base\.)?bias)|[qk]_(?=norm\.bias))"
)


def joined(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    groups = {}
    for name, tensor in found.items():
        groups.setdefault(JOINT.sub("qkv_", str(name)).replace(".base.", "."), []).append(tensor)
    return {name: torch.cat(group) if len(group) > 1 else group[0] for name, group in groups.items()}


def assert_parity(name: str, original: nn.Module, accelerated: nn.Module, device, draws=8, autocast=False) -> None:
    exact = copy.deepcopy(original).double()
    found = {"ours": [], "eager": [], "exact": []}
    for seed in range(draws):
        image = zoo.images(name, seed=seed).to(device, next(original.parameters()).dtype)
        for key, model in (("ours", accelerated), ("eager", original), ("exact", exact)):
            with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast and key != "exact"):
                found[key].append(joined(zoo.results(name, model, image)))
    check_draws(zip(*found.values(), strict=True))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_cpu_path_fp32(name):
    """As many draws as `vit.testing.parity.enough_draws` wants: timm's own attention is the same operator now."""
    original = zoo.build(name)
    assert_parity(name, original, vit.accelerate(copy.deepcopy(original)), "cpu", draws=32)


@pytest.mark.parametrize("name", zoo.REAL)
def test_cpu_path_fp32_of_real_names(name):
    original = zoo.build(name)
    assert_parity(name, original, vit.accelerate(copy.deepcopy(original)), "cpu", draws=8)


@pytest.mark.parametrize("name", [*zoo.TOWERS, *zoo.PARTIAL])
def test_cpu_path_fp32_of_more_classes(name):
    original = zoo.build(name)
    assert_parity(name, original, vit.accelerate(copy.deepcopy(original)), "cpu", draws=32)


@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.TOWERS, *zoo.PARTIAL])
def test_cpu_path_bf16(name):
    original = zoo.build(name, eager=True).bfloat16()
    assert_parity(name, original, vit.accelerate(copy.deepcopy(original)), "cpu")


AUTOCAST = [
    "timm DINOv2", "timm qk_norm", "timm avg", "timm ResPost", "timm ParallelThings", "timm ParallelScaling",
    "timm DINOv3", "timm EVA", "timm EVA-02", "torchvision", "hf ViT", "hf Dinov2", "hf DINOv3", "hf BLIP", "hf YOLOS",
    "hf SigLIP",
]  # fmt: skip


@pytest.mark.parametrize("name", AUTOCAST)
def test_cpu_path_under_autocast(name):
    original = zoo.build(name, eager=True)
    assert_parity(name, original, vit.accelerate(copy.deepcopy(original)), "cpu", autocast=True)


# For two blocks: the first norm, three pairs of an add and a norm, the last norm. Outside a nn.Sequential, the add at a
# block's end and the norm of the next block stay separate.
FUSED = {
    "timm": {
        "patch_embed": 1,
        "layer_norm": 2,
        "residual_layer_norm": 3,
        "attention_qkvpacked": 2,
        "linear": 4,
        "mlp": 2,
    },
    "torchvision": {
        "patch_embed": 1,
        "layer_norm": 2,
        "residual_layer_norm": 3,
        "attention_qkvpacked": 2,
        "linear": 4,
        "mlp": 2,
    },
    "timm SigLIP": {  # with three layers, a norm, an attention and an MLP in its pooling
        "patch_embed": 1,
        "layer_norm": 3,
        "residual_layer_norm": 3,
        "attention_qkvpacked": 2,
        "attention": 1,
        "linear": 7,
        "mlp": 3,
    },
    "hf ViT": {"patch_embed": 1, "layer_norm": 3, "residual_layer_norm": 2, "attention": 2, "linear": 8, "mlp": 2},
}


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name):
    model = vit.accelerate(zoo.build(name))
    with vit.kernels.runtime.record_choices() as choices:
        zoo.outputs(name, model, zoo.images(name))
    assert Counter(choice.op for choice in choices) == FUSED[name]


def many_images(name: str) -> torch.Tensor:
    return torch.cat([zoo.images(name, seed=seed) for seed in range(100 // len(zoo.images(name)))])


@pytest.mark.parametrize("name", ["hf ViT", "hf ViTModel", "hf DINOv3", "hf YOLOS", "hf Dinov2", "hf SigLIP"])
def test_many_tokens_have_one_product_for_queries_keys_and_values(name):
    original = zoo.build(name)
    model, image = vit.accelerate(copy.deepcopy(original)), many_images(name)
    layers = []
    for call in (zoo.images(name), image):
        with vit.kernels.runtime.record_choices() as choices:
            zoo.outputs(name, model, call)
        layers.append(sum(choice.op == "linear" for choice in choices))
    assert layers[0] - layers[1] == 2 * 2  # in two blocks
    assert_close(zoo.results(name, model, image), zoo.results(name, original, image))


def test_many_tokens_and_attention_maps():
    original, image = zoo.build("hf ViT", eager=True), many_images("hf ViT")
    model = vit.accelerate(copy.deepcopy(original))
    ours, theirs = (of(image, output_attentions=True).attentions for of in (model, original))
    assert_close(dict(enumerate(ours)), dict(enumerate(theirs)))


@pytest.mark.parametrize("layer", ["query", "key", "value"])
def test_many_tokens_and_a_layer_that_is_called(layer):
    """With a hook on one of three layers, all three are called."""
    model, image, seen = vit.accelerate(zoo.build("hf YOLOS")), many_images("hf YOLOS"), []
    called = next(module for name, module in model.named_modules() if name.endswith(f"attention.{layer}"))
    called.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    zoo.outputs("hf YOLOS", model, image)
    assert len(seen) == 1 and seen[0][0] == len(image)


@pytest.mark.parametrize("name", ["timm", "timm qk_norm", "hf ViT"])
def test_a_scale_of_the_logits_that_somebody_set(name):
    original = zoo.build(name, eager=True)
    for module in original.modules():
        for attribute in ("scale", "scaling"):
            if hasattr(module, attribute):
                setattr(module, attribute, 0.7)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)
    assert_close(zoo.results(name, model, image), zoo.results(name, original, image))
    if name == "hf ViT":
        ours, theirs = (of(image, output_attentions=True).attentions for of in (model, original))
        assert_close(dict(enumerate(ours)), dict(enumerate(theirs)))


KERNELS = [
    "timm",
    "timm DINOv2", "timm CLIP", "timm SigLIP", "timm qk_norm", "timm gated", "torchvision", "hf ViT", "hf Dinov2",
    "timm RoPE, grouped", "hf YOLOS", "hf SigLIP",
]  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_fp32(name, device):
    original = zoo.build(name).to(device)
    accelerated = vit.accelerate(copy.deepcopy(original), impl="triton")
    with vit.kernels.runtime.record_choices() as choices:
        assert_parity(name, original, accelerated, device, draws=3)
    ops = {choice.op for choice in choices}
    assert {"mlp", "layer_norm", "residual_layer_norm", "patch_embed"} <= ops
    assert {"attention_qkvpacked", "attention"} & ops and {choice.path for choice in choices} == {"triton"}


@pytest.mark.parametrize(("name", "count"), {"timm": 4, "timm EVA": 2, "hf ViT": 2, "hf YOLOS": 2}.items())
def test_norms_computed_again_in_the_backward(name, count, device):
    """For a packed projection and the MLP of two blocks. Three projections would compute the same norm three times."""
    model = vit.accelerate(zoo.build(name).to(device), impl="triton")
    outputs = zoo.outputs(name, model, zoo.images(name).to(device))
    with torch.profiler.profile() as profile:
        sum(t.sum() for t in outputs.values()).backward()
    assert sum(event.name == "vit::layer_norm_fwd" for event in profile.events()) == count


LIBRARIES = ["timm DINOv2", "timm qk_norm", "torchvision", "hf ViT", "hf Dinov2"]


def bits(found: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in found.items()}


def fused_modules(model: nn.Module) -> list[str]:
    """Names of the modules that do not run the forward of their library."""
    return [name for name, module in model.named_modules() if type(module).forward.__code__.co_filename == OURS]


OURS = inspect.getfile(vit.adapters.fused)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float = 2e-5) -> None:
    ours, theirs = joined(ours), joined(theirs)
    assert list(ours) == list(theirs)
    for name, want in theirs.items():
        assert ours[name].dtype == want.dtype and ours[name].shape == want.shape, name
        error, scale = (ours[name] - want).abs().max().item(), want.abs().max().item()
        assert error <= limit * scale, f"{name}: {error:.2e} of {scale:.2e}"  # fails for NaN, too


@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.TOWERS, *zoo.PARTIAL])
def test_state_dict_and_parameters_stay_and_restore_gives_the_original_bits(name):
    model = zoo.build(name)
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    found = bits(zoo.results(name, model, zoo.images(name)))
    assert vit.accelerate(model) is model
    assert fused_modules(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert list(model.state_dict()) == list(before) and bits(model.state_dict()) == bits(before)
    model.load_state_dict(before, strict=True)
    assert vit.restore(model) is model
    assert not fused_modules(model)
    assert bits(zoo.results(name, model, zoo.images(name))) == found


@pytest.mark.parametrize("name", LIBRARIES)
def test_accelerate_and_restore_twice(name):
    original = zoo.build(name)
    image = zoo.images(name)
    model = vit.accelerate(copy.deepcopy(original))
    once = bits(zoo.results(name, model, image))
    assert bits(zoo.results(name, vit.accelerate(model), image)) == once
    before = fused_modules(model)
    vit.accelerate(model, attention=False, mlp=False, patch_embed=False)
    assert set(fused_modules(model)) < set(before)
    vit.restore(vit.restore(model))
    assert not fused_modules(model)
    assert bits(zoo.results(name, model, image)) == bits(zoo.results(name, original, image))


@pytest.mark.parametrize("feature", ["attention", "mlp", "norm", "patch_embed"])
@pytest.mark.parametrize("name", [name for name in LIBRARIES if "qk_norm" not in name])  # its attention has norms
def test_each_feature_alone(name, feature):
    original, image = zoo.build(name), zoo.images(name)
    only = {"attention": False, "mlp": False, "norm": False, "patch_embed": False} | {feature: True}
    model = vit.accelerate(copy.deepcopy(original), **only)
    with vit.kernels.runtime.record_choices() as choices:
        assert_close(zoo.results(name, model, image), zoo.results(name, original, image))
    inside = {"attention": {"attention_qkvpacked", "attention"}, "mlp": {"mlp"}, "patch_embed": {"patch_embed"}}
    inside["norm"] = {"layer_norm", "residual_layer_norm"}
    assert inside.pop(feature) & {choice.op for choice in choices}
    assert not set().union(*inside.values()) & {choice.op for choice in choices}


def test_a_block_that_is_one_part_is_fused_only_with_its_attention():
    original, image = zoo.build("timm ParallelScaling"), zoo.images("timm ParallelScaling")
    model = vit.accelerate(copy.deepcopy(original), attention=False)
    assert "blocks.0" not in fused_modules(model) and "blocks.0.in_norm" in fused_modules(model)
    assert_close(zoo.results("", model, image), zoo.results("", original, image))
    assert "blocks.0" in fused_modules(vit.accelerate(model))


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_optimizer_made_before_continues(name):
    original = zoo.build(name)
    copies = [original, copy.deepcopy(original)]
    # With AdamW's default eps a gradient of 1e-8, which rounding turns into 0, takes a step of full size.
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5) for model in copies]

    def step(seed: int) -> None:
        for model, optimizer in zip(copies, optimizers, strict=True):
            outs = zoo.outputs(name, model, zoo.images(name, seed=seed))
            sum(out.square().mean() for out in outs.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

    step(0)
    vit.accelerate(copies[0])
    for seed in (1, 2, 3):
        step(seed)
    assert optimizers[0].state_dict()["state"][0]["step"] == 4
    for (key, ours), theirs in zip(copies[0].named_parameters(), copies[1].parameters(), strict=True):
        noise_only = ".k_proj.bias" in key or "k_norm.bias" in key or key.endswith(("qkv.bias", "in_proj_bias"))
        if not noise_only:  # AdamW takes steps of full size on the noise in a key bias
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", LIBRARIES)
def test_copies(name):
    """Deep copies and saved models stay accelerated, with their own parameters."""
    original, image = zoo.build(name), zoo.images(name)
    model = vit.accelerate(copy.deepcopy(original))
    want, file = zoo.results(name, model, image), io.BytesIO()
    torch.save(model, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert fused_modules(twin) == fused_modules(model) and twin is not model
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert bits(zoo.results(name, twin, image)) == bits(want)
        assert bits(zoo.results(name, vit.restore(twin), image)) == bits(zoo.results(name, original, image))
        model.load_state_dict(original.state_dict())


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ["timm", "hf ViT"])
def test_copies_keep_their_impl(name, impl):
    model, file = vit.accelerate(zoo.build(name), impl=impl), io.BytesIO()
    torch.save(model, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    want = vit.explain(model, zoo.images(name))
    assert want and all(row.reason.startswith({"auto": "auto:", "reference": "asked for"}[impl]) for row in want)
    for twin in (loaded, copy.deepcopy(model)):
        assert vit.explain(twin, zoo.images(name)) == want


def parts_of(model: nn.Module) -> list[str]:
    """One module of each class that is fused."""
    classes = {type(model.get_submodule(name)): name for name in fused_modules(model)}
    return list(classes.values())


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("how", ["copy", "replica"])
def test_a_shallow_copy_computes_with_what_it_holds(name, how):
    """Each fused module: the copy uses its own parameters, and the original module keeps its own."""
    original = zoo.build(name)
    model = vit.accelerate(copy.deepcopy(original))

    def other(of: nn.Module, part: str) -> nn.Module:
        module = of.get_submodule(part)
        twin = copy.copy(module) if how == "copy" else module._replicate_for_data_parallel()
        twin._parameters = {k: p if p is None else nn.Parameter(0.5 * p) for k, p in module._parameters.items()}
        twin._modules = {k: None if m is None else copy.deepcopy(m) for k, m in module._modules.items()}
        for parameter in (p for child in twin._modules.values() if child is not None for p in child.parameters()):
            parameter.data *= 0.5
        return twin

    def call(of: nn.Module, part: str, module: nn.Module) -> dict[str, torch.Tensor]:
        seen = []
        handle = of.get_submodule(part).register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
        zoo.outputs(name, of, zoo.images(name))
        handle.remove()
        out = module(*seen[0][0], **seen[0][1])
        return {"out": out[0] if isinstance(out, tuple) else out}

    for part in parts_of(model):
        ours, theirs = (call(of, part, other(of, part)) for of in (model, original))
        assert_close(ours, theirs)
        assert_close(*(call(of, part, of.get_submodule(part)) for of in (model, original)))


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_model_that_is_deleted_is_gone(name):
    """As in the library, without the cyclic collector: nothing refers back to it."""
    model = vit.accelerate(zoo.build(name))
    zoo.outputs(name, model, zoo.images(name))
    parameters = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        alive = sum(ref() is not None for ref in parameters)
    finally:
        gc.enable()
    assert alive == 0 < len(parameters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LIBRARIES)
def test_to_another_dtype_afterwards(name, dtype):
    original = zoo.build(name).to(dtype)
    model = vit.accelerate(zoo.build(name)).to(dtype)
    limit = {torch.float16: 2e-2, torch.bfloat16: 0.15, torch.float64: 1e-12}[dtype]
    assert_close(zoo.results(name, model, zoo.images(name)), zoo.results(name, original, zoo.images(name)), limit)


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("name", LIBRARIES)
def test_frozen_parameters(name, odd):
    original = zoo.build(name)
    for i, parameter in enumerate(original.parameters()):
        parameter.requires_grad_(i % 2 == odd)
    model = vit.accelerate(copy.deepcopy(original))
    assert_close(zoo.results(name, model, zoo.images(name)), zoo.results(name, original, zoo.images(name)))
    sum(out.sum() for out in zoo.outputs(name, model, zoo.images(name)).values()).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_tied_weights():
    original = zoo.build("timm")
    original.blocks[1].mlp.fc1.weight = original.blocks[0].mlp.fc1.weight
    original.blocks.append(original.blocks[0])
    model = vit.accelerate(copy.deepcopy(original))
    image = zoo.images("timm")
    assert_close(zoo.results("timm", model, image), zoo.results("timm", original, image))


@pytest.mark.parametrize("name", LIBRARIES)
def test_torch_func(name):
    """Other parameters (functional_call), two sets (vmap), and a directional derivative (jvp)."""
    # In eval(), and with a fused attention, PyTorch's MultiheadAttention has no forward-mode derivative.
    original, image = zoo.build(name, eager=True, train=True), zoo.images(name)
    model = vit.accelerate(copy.deepcopy(original))
    stacked = {k: torch.stack([p, 0.5 * p]).detach() for k, p in original.named_parameters()}

    def call(parameters, of):
        out = torch.func.functional_call(of, parameters, (image,))
        return out if isinstance(out, torch.Tensor) else out["logits"]

    def both(of):
        halves = {k: t[1] for k, t in stacked.items()}
        tangents = {k: torch.ones_like(t) for k, t in halves.items()}
        found = {"functional_call": call(halves, of)}
        found["primal"], found["jvp"] = torch.func.jvp(lambda p: call(p, of), (halves,), (tangents,))
        found["vmap"] = torch.func.vmap(lambda p: call(p, of))(stacked)
        return {k: t.detach() for k, t in found.items()}

    with sdpa_kernel(SDPBackend.MATH):
        want = both(original)
    assert_close(both(model), want)


def test_torch_func_on_the_kernels_is_refused(device):
    model = vit.accelerate(zoo.build("timm"), impl="triton").to(device)
    image, parameters = zoo.images("timm").to(device), dict(model.named_parameters())
    with pytest.raises(RuntimeError, match="func transforms are not defined"):
        torch.func.vmap(lambda x: model(x[None]))(image)
    with pytest.raises(RuntimeError, match="forward-mode AD is not defined"):
        torch.func.jvp(lambda p: torch.func.functional_call(model, p, (image,)), (parameters,), (parameters,))
