"""What an accelerated model returns and refuses, beside the library's own."""

import copy
import functools
import inspect

import pytest
import torch
import zoo
from peers import import_timm, randomise
from test_accelerate import assert_close, fused_modules
from test_accelerate_semantics import DROPOUTS, pair
from torch import nn
from torch._dynamo.utils import counters

import vit

pytestmark = pytest.mark.peers

# ---- Hugging Face ----------------------------------------------------------------------------------------------------

HF = {
    "ViT": lambda: zoo.hf_model("ViTForImageClassification", "ViTConfig"),
    "DeiT": lambda: zoo.hf_model("DeiTForImageClassification", "DeiTConfig"),
    "Dinov2": lambda: zoo.hf_model("Dinov2ForImageClassification", "Dinov2Config"),
    "registers": lambda: zoo.hf_model("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"),
}


def flat(out) -> dict[str, torch.Tensor]:
    """Every tensor of a ModelOutput or tuple, by its place."""
    items = out.items() if hasattr(out, "items") else enumerate(out)
    found = {}
    for key, value in items:
        if isinstance(value, torch.Tensor):
            found[str(key)] = value.detach()
        elif value is not None:
            found |= {f"{key}.{name}": v for name, v in flat(value).items()}
    return found


@pytest.mark.parametrize("name", HF)
def test_hugging_face_outputs(name):
    model, original = pair(HF[name], train=False)
    original.set_attn_implementation("eager")
    image = zoo.images("")
    for options in (
        {},
        {"return_dict": False},
        {"labels": torch.tensor([1, 3])},
        {"output_hidden_states": True},
        {"output_attentions": True},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
    ):
        ours, theirs = model(image, **options), original(image, **options)
        assert type(ours) is type(theirs) and list(flat(ours)) == list(flat(theirs))
        assert_close(flat(ours), flat(theirs))
    assert len([key for key in flat(model(image, output_attentions=True)) if "attentions" in key]) == 2
    model.set_attn_implementation("eager")
    for of in (model, original):
        of.config.output_attentions = True
    assert_close(flat(model(image)), flat(original(image)))


def test_gradients_flow_through_the_attention_maps():
    model, original = pair(HF["ViT"], train=False)
    original.set_attn_implementation("eager")
    found = []
    for of in (model, original):
        image = zoo.images("").requires_grad_()
        maps = of(image, output_attentions=True).attentions
        found.append({"image": torch.autograd.grad(sum(m.square().sum() for m in maps), image)[0]})
    assert_close(*found, limit=1e-4)


def test_attention_maps_under_dropout_are_those_that_were_used():
    model, _ = pair(DROPOUTS["hf attention"])
    attention, x = model.vit.layers[0].attention, torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    out, weights = attention(x, output_attentions=True)
    value = attention.v_proj(x).unflatten(-1, (2, 16)).transpose(1, 2)
    torch.testing.assert_close(attention.o_proj((weights @ value).transpose(1, 2).flatten(2)), out)
    assert 0.2 < (weights == 0).float().mean() < 0.6


def test_hugging_face_arguments():
    image, large = zoo.images(""), torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    model, original = pair(HF["ViT"], train=False)
    want = {"interpolate_pos_encoding": True}
    assert_close(flat(model(large, **want)), flat(original(large, **want)))
    with pytest.raises(ValueError, match="doesn't match model"):
        model(large)
    for mask in (torch.ones(2, 10), torch.arange(10).expand(2, 10) < 7, torch.ones(2, 1, 10, 10).tril().bool()):
        assert_close(flat(model.vit(image, attention_mask=mask)), flat(original.vit(image, attention_mask=mask)))
    model, original = pair(lambda: zoo.hf_model("ViTForMaskedImageModeling", "ViTConfig"), train=False)
    where = torch.arange(9) % 3 == torch.arange(2)[:, None]
    ours, theirs = model(image, bool_masked_pos=where), original(image, bool_masked_pos=where)
    assert type(ours) is type(theirs) and ours.loss is not None
    assert_close(flat(ours), flat(theirs))


# ---- timm ------------------------------------------------------------------------------------------------------------


def test_timm_interface():
    model, original = pair(lambda: zoo.timm_model(reg_tokens=2, init_values=0.5, dynamic_img_size=True), train=False)
    image, mask = zoo.images(""), torch.ones(12, 12, dtype=torch.bool).tril()
    bias = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    calls = {
        "forward": lambda m: m(image),
        "another size": lambda m: m(torch.nn.functional.pad(image, (0, 16))),
        "channels_last": lambda m: m(image.contiguous(memory_format=torch.channels_last)),
        "features": lambda m: m.forward_features(image),
        "head": lambda m: m.forward_head(m.forward_features(image), pre_logits=True),
        "mask": lambda m: m(image, attn_mask=mask),
        "bias": lambda m: m.forward_features(image, attn_mask=bias),
        "causal": lambda m: m(image, is_causal=True),
        "intermediates": lambda m: m.forward_intermediates(image, norm=True, return_prefix_tokens=True),
        "one early": lambda m: m.forward_intermediates(image, indices=[0], stop_early=True, intermediates_only=True),
        "dict": lambda m: m.forward_intermediates(image, output_dict=True, output_fmt="NLC", attn_mask=mask),
        "layers": lambda m: m.get_intermediate_layers(image, n=2, reshape=True, norm=True),
    }
    for label, call in calls.items():
        ours, theirs = call(model), call(original)
        assert type(ours) is type(theirs), label
        wrap = dict if isinstance(ours, dict) else lambda out: {"0": out} if isinstance(out, torch.Tensor) else out
        assert_close(flat(wrap(ours)), flat(wrap(theirs)))
    with pytest.raises(AssertionError, match="divisible"):
        model(image[:, :, :20])
    for of in (model, original):
        of.set_input_size((32, 32))
        of.reset_classifier(3, "avg")
        randomise(of)
    large = torch.nn.functional.pad(image, (0, 8, 0, 8))
    assert_close(zoo.results("", model, large), zoo.results("", original, large))


def test_images_that_the_convolution_crops_or_refuses():
    """A convolution ignores what is left of a patch, takes one image without a batch, and refuses less than a patch."""
    model, original = pair(lambda: zoo.timm_model(), train=False)
    ours, theirs = model.patch_embed.proj, original.patch_embed.proj
    image = torch.randn(2, 3, 21, 30, generator=torch.Generator().manual_seed(0))
    for x in (image, image[0]):
        assert_close({"grid": ours(x)}, {"grid": theirs(x)})
    assert ours(image[:0]).shape == theirs(image[:0]).shape
    for x in (image[:, :, :5], image[:, :2], image.long()):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            theirs(x)
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            ours(x)


# ---- signatures, dtypes, compilation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm", "timm DINOv2", "torchvision", "hf ViT", "hf Dinov2"])
def test_signatures(name):
    original = zoo.build(name)
    model = vit.accelerate(copy.deepcopy(original))
    for ours, theirs in zip(model.modules(), original.modules(), strict=True):
        assert isinstance(ours, type(theirs)) and str(type(ours)) == str(type(theirs))
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)


@pytest.mark.parametrize("name", ["timm", "timm DINOv2", "timm qk_norm", "torchvision", "hf ViT", "hf Dinov2"])
def test_dtypes_under_autocast(name):
    """Every module's output has the dtype that it had, but for a LayerNorm inside a block: autocast's, by design."""
    original = zoo.build(name)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)
    for part in [part for part, module in original.named_modules() if list(module.children()) or part.count(".") < 2]:
        dtypes = []
        for of in (model, original):
            seen = []
            handle = of.get_submodule(part).register_forward_hook(
                lambda module, args, out, seen=seen: (
                    seen.append((out[0] if isinstance(out, tuple) else out).dtype)
                    if isinstance(out, (torch.Tensor, tuple))
                    else None
                )
            )
            with torch.autocast("cpu", torch.bfloat16):
                outs = zoo.outputs(name, of, image)
            handle.remove()
            dtypes.append((seen, [out.dtype for out in outs.values()]))
        assert dtypes[0] == dtypes[1], part


COMPILED = {
    "timm": lambda: zoo.timm_model(reg_tokens=2, init_values=0.5),
    "torchvision": lambda: zoo.torchvision_model(num_layers=1),
    "hf": lambda: zoo.hf_model("ViTForImageClassification", "ViTConfig", num_hidden_layers=1),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_once_for_all_batch_sizes(name):
    model, original = pair(COMPILED[name], train=False)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 4, 5):
        found = []
        for of in (compiled, original):
            image = zoo.images("", batch=batch).requires_grad_()
            logits = zoo.outputs("", of, image)["logits"]
            found.append({"logits": logits, "image": torch.autograd.grad(logits.square().sum(), image)[0]})
        assert_close(*found)
    assert counters["stats"]["unique_graphs"] == 1


# ---- refusals --------------------------------------------------------------------------------------------------------


def _naflex_rope() -> nn.Module:
    naflex = import_timm().models.naflexvit
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "rope_type": "axial"}
    return naflex.NaFlexVit(naflex.NaFlexVitCfg(**small), num_classes=5)


def _with(**parts: str) -> nn.Module:
    return zoo.timm_model(**{key: getattr(import_timm().layers, cls) for key, cls in parts.items()})


def _timm_block(cls: str) -> nn.Module:
    return zoo.timm_model(block_fn=getattr(import_timm().models.vision_transformer, cls))


REFUSED = {
    "SwiGLU": (
        lambda: _with(mlp_layer="SwiGLU"),
        r"Block \(blocks.0 and 1 more\): its mlp is timm.layers.mlp.SwiGLU",
    ),
    "GluMlp": (lambda: _with(mlp_layer="GluMlp"), r"blocks.0 and 1 more\): its mlp is timm.layers.mlp.GluMlp"),
    "RMSNorm": (
        lambda: _with(norm_layer="RmsNorm"),
        r"blocks.0 and 1 more\): its norm1 is timm.layers.norm.RmsNorm",
    ),
    "rope": (_naflex_rope, r"EvaBlock \(blocks.0 and 1 more\): an unknown class"),
    "diff": (lambda: zoo.timm_model(attn_layer="diff"), r"blocks.0 and 1 more\): its attn is timm.*DiffAttention"),
    "parallel": (lambda: _timm_block("ParallelScalingBlock"), "has no block that the fused ops can run"),
    "post-norm": (lambda: _timm_block("ResPostBlock"), r"ResPostBlock \(blocks.0 and 1 more\): an unknown class"),
    "eva": (
        lambda: import_timm().create_model("eva02_tiny_patch14_224", depth=1, img_size=28, embed_dim=48, num_heads=3),
        r"EvaBlock \(blocks.0\): an unknown class",
    ),
    "swin": (
        lambda: import_timm().create_model(
            "swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 2)
        ),
        "SwinTransformerBlock .*: an unknown class",
    ),
    "resnet": (lambda: import_timm().create_model("resnet10t"), "no attention block was found"),
    "hf SwiGLU": (
        lambda: zoo.hf_model("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
        r"Dinov2Layer \(encoder.layer.0 and 1 more\): its mlp is .*Dinov2SwiGLUFFN",
    ),
    "hf MAE": (lambda: zoo.hf_model("ViTMAEModel", "ViTMAEConfig"), "ViTMAELayer .*: an unknown class"),
    "TransformerEncoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2)), "an unknown class"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_known_block(name):
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        vit.accelerate(model)
    assert not fused_modules(model)


def test_our_own_model_needs_none_of_it():
    with pytest.raises(ValueError, match="runs on the fused ops as it is"):
        vit.accelerate(vit.create_model("vit_tiny_patch16_224", depth=1))


def test_blocks_of_other_kinds_stay_beside_known_ones():
    original = zoo.timm_model()
    layers = import_timm().layers
    original.blocks[1].mlp = layers.SwiGLU(32, 64)
    randomise(original)
    model = copy.deepcopy(original.eval())
    with pytest.warns(UserWarning) as caught:
        vit.accelerate(model)
    message = "accelerate: these stay as they are: timm.models.vision_transformer.Block (blocks.1): its mlp is "
    assert [str(w.message) for w in caught] == [message + "timm.layers.mlp.SwiGLU"]
    assert not fused_modules(model.blocks[1]) and fused_modules(model.blocks[0])
    assert_close(zoo.results("", model, zoo.images("")), zoo.results("", original, zoo.images("")))


@pytest.mark.parametrize("why", ["an unknown part", "a forward of its own"])
def test_what_lies_deep_inside_a_block_that_stays_stays(why):
    """Norms of queries and keys, and of the hidden units, too."""
    layers = import_timm().layers
    original = zoo.timm_model(qk_norm=True, scale_mlp_norm=True, scale_attn_norm=True, init_values=0.5)
    if why == "an unknown part":
        original.blocks[1].drop_path2 = layers.SqueezeExcite(32)
        original.blocks[1].drop_path2.forward = lambda x: x
    else:
        original.blocks[1].forward = functools.partial(type(original.blocks[1]).forward, original.blocks[1])
    randomise(original)
    model = copy.deepcopy(original.eval())
    if why == "a forward of its own":
        model.blocks[1].forward = functools.partial(type(model.blocks[1]).forward, model.blocks[1])
    with pytest.warns(UserWarning, match=r"blocks\.1\)"):
        vit.accelerate(model)
    deep = {name.rpartition(".")[2] for name in fused_modules(model.blocks[0])}
    assert not fused_modules(model.blocks[1]) and {"q_norm", "norm"} <= deep
    assert_close(zoo.results("", model, zoo.images("")), zoo.results("", original, zoo.images("")))


def test_an_error_changes_nothing():
    model = zoo.timm_model()
    for call, error, message in (
        (lambda: vit.accelerate(model, impl="cuda"), ValueError, "impl must be one of"),
        (lambda: vit.accelerate(model, attn=True), TypeError, "unexpected keyword argument 'attn'"),
        (lambda: vit.accelerate(model.state_dict()), TypeError, "must be a torch.nn.Module, got OrderedDict"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert not fused_modules(model)
    vit.accelerate(model)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TypeError, match="unexpected keyword"):
        vit.accelerate(model, qkv=False)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("cls", ["Block", "Attention", "Mlp", "LayerNorm", "LayerScale"])
@pytest.mark.parametrize("wraps", [False, True])
def test_a_class_whose_forward_was_replaced(cls, wraps, monkeypatch):
    timm = import_timm()
    owner = timm.models.vision_transformer.Block if cls == "Block" else getattr(timm.layers, cls)
    model, library = zoo.build("timm DINOv2"), owner.forward

    def doubled(self, x, **options):
        return 2 * library(self, x, **options)

    monkeypatch.setattr(owner, "forward", functools.wraps(library)(doubled) if wraps else doubled)
    with pytest.raises(ValueError, match=r"Block \(blocks.0 and 1 more\): .*forward (was )?replaced"):
        vit.accelerate(model)
    assert not fused_modules(model)


def test_subclasses_that_compute_something_else_are_not_taken_for_what_they_inherit():
    class Doubled(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return 2 * super()._conv_forward(x, weight, bias)

    class Same(nn.LayerNorm):
        pass

    original = zoo.timm_model(norm_layer=Same)
    original.patch_embed.proj = Doubled(3, 32, 8, 8)
    randomise(original.eval())
    model = vit.accelerate(copy.deepcopy(original))
    assert_close(zoo.results("", model, zoo.images("")), zoo.results("", original, zoo.images("")))


def test_mixed_dtypes():
    """LayerNorms kept in fp32 in a bf16 model: what PyTorch does on this device, result or error."""
    original = zoo.build("timm").bfloat16()
    for module in original.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    model = vit.accelerate(copy.deepcopy(original))
    image = zoo.images("timm").bfloat16()
    assert_close({"logits": model(image)}, {"logits": original(image)}, 0.05)
