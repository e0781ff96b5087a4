"""What an accelerated model returns and refuses, against the library's."""

import copy
import functools
import inspect
import warnings
from collections import Counter

import pytest
import torch
import zoo
from peers import import_timm, randomise
from test_accelerate import assert_close, fused_modules
from test_accelerate_semantics import DROPOUTS, pair
from torch import nn
from torch._dynamo.utils import counters

import vit
from vit.adapters import part_of, parts
from vit.kernels.runtime import record_choices

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


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "autocast"])
@pytest.mark.parametrize("name", HF)
def test_dtype_of_the_attention_maps(name, kind):
    model, original = pair(HF[name], train=False)
    original.set_attn_implementation("eager")
    image = zoo.images("")
    if kind != "autocast":
        model, original, image = (of.to(getattr(torch, kind)) for of in (model, original, image))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            found = [dict(enumerate(of(image, output_attentions=True).attentions)) for of in (model, original)]
        assert len(found[0]) == 2
        assert_close(*found, limit=1e-6 if kind == "float64" else 0.05)  # ViT's eager softmax is in fp32


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_attention_maps_under_dropout_with_and_without_gradients(heads, grad):
    """The returned weights are those used for the output, and two calls drop different ones."""
    options = {"attention_probs_dropout_prob": 0.4, "num_attention_heads": heads}
    model, _ = pair(lambda: zoo.hf_model("ViTForImageClassification", "ViTConfig", **options))
    attention, x = model.vit.layers[0].attention, torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))
    seen = []
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            out, weights = attention(x, output_attentions=True)
            assert weights.shape == (3, heads, 10, 10)
            value = attention.v_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            torch.testing.assert_close(attention.o_proj((weights @ value).transpose(1, 2).flatten(2)), out)
            seen.append(weights == 0)
        assert not torch.equal(*seen) and 0.2 < seen[0].float().mean() < 0.6
        query, key = (p(x).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        probs = torch.softmax(query @ key.mT * (32 // heads) ** -0.5, -1)
        torch.testing.assert_close(weights, torch.where(seen[1], 0, probs / 0.6))
        weights = attention.eval()(x, output_attentions=True)[1]
        torch.testing.assert_close(weights, probs)


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


TAKES_ROPE = {
    "timm ResPost": False, "timm ParallelThings": False, "timm ParallelScaling": False, "timm DINOv3": True,
    "timm EVA, post-norm": True, "timm PE": True,
}  # fmt: skip


@pytest.mark.parametrize("name", TAKES_ROPE)
def test_calls_of_blocks_with_masks_and_positions(name):
    """By place and by keyword. What a block does not take is an error."""
    model, original = pair(lambda: zoo.MODELS[name](), train=False)
    generator, tokens = torch.Generator().manual_seed(0), 12 if name == "timm DINOv3" else 10
    x, mask = torch.randn(2, tokens, 32, generator=generator), torch.ones(tokens, tokens, dtype=torch.bool).tril()
    rope = [torch.randn(9, 32, generator=generator)] if TAKES_ROPE[name] else []
    calls = [((), {}), ((*rope, mask), {}), (rope, {"attn_mask": mask}), (rope, {"is_causal": True}), (rope, {})]
    for args, kwargs in calls:
        ours, theirs = (of.blocks[0](x, *args, **kwargs) for of in (model, original))
        assert_close({"x": ours}, {"x": theirs})
    assert not torch.allclose(original.blocks[0](x, *rope), original.blocks[0](x, *rope, mask), rtol=1e-3)
    for of in (model, original):
        with pytest.raises(TypeError):
            of.blocks[0](x, masks=mask)
        with pytest.raises(TypeError):
            of.blocks[0](x, *rope, mask, False, None)


def test_images_that_the_convolution_crops_or_refuses():
    """A convolution ignores partial patches, takes one image without a batch, and refuses less than a patch."""
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


@pytest.mark.parametrize("name", ["timm", "timm scale_norm", "torchvision", "hf ViT", "hf Dinov2 registers"])
def test_names_and_documentation_of_classes_and_forwards(name):
    original = zoo.build(name)
    model = vit.accelerate(copy.deepcopy(original))
    for part in fused_modules(model):
        ours, theirs = model.get_submodule(part), original.get_submodule(part)
        assert type(ours) is not type(theirs) and type(ours).__mro__[1:] == type(theirs).__mro__
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
            assert getattr(type(ours), attribute) == getattr(type(theirs), attribute)
            assert getattr(ours.forward, attribute) == getattr(theirs.forward, attribute)
        assert repr(ours) == repr(theirs) and vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize("name", ["timm", "timm DINOv2", "timm qk_norm", "torchvision", "hf ViT", "hf Dinov2"])
def test_dtypes_under_autocast(name):
    """Every module's output keeps its dtype, except a LayerNorm in a block: by design it has autocast's."""
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


def _with(**parts: str) -> nn.Module:
    return zoo.timm_model(**{key: getattr(import_timm().layers, cls) for key, cls in parts.items()})


def _clip(model: str = "CLIP", folder: str = "clip", **text) -> nn.Module:
    """Both towers, and the weights of `randomise`."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = small | {"image_size": 24, "patch_size": 8}
    text = small | {"vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 49, "projection_dim": 32} | text
    both = {"text_config": text, "vision_config": vision, "projection_dim": 32}
    model = zoo.hf_model(f"{model}Model", f"{model}Config", **both)
    randomise(model)
    return model.eval()


def _timm_block(cls: str) -> nn.Module:
    return zoo.timm_model(block_fn=getattr(import_timm().models.vision_transformer, cls))


REFUSED = {
    "parallel": (
        lambda: _timm_block("DiffParallelScalingBlock"),
        r"DiffParallelScalingBlock \(blocks.0 and 1 more\): an unknown class",
    ),
    "no known part": (
        lambda: _with(norm_layer="RmsNorm", mlp_layer="SwiGLU", attn_layer="DiffAttention"),
        r"Block \(blocks.0 and 1 more\): none of its parts has a kernel",
    ),
    "swin": (
        lambda: import_timm().create_model(
            "swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 2)
        ),
        "SwinTransformerBlock .*: an unknown class",
    ),
    "resnet": (lambda: import_timm().create_model("resnet10t"), "no attention block was found"),
    "hf FLAVA": (lambda: zoo.hf_model("FlavaImageModel", "FlavaImageConfig"), "FlavaLayer .*: an unknown class"),
    "hf experts": (
        lambda: zoo.TOWERS["hf ViTPose"](num_experts=2, part_features=8),
        r"VitPoseBackboneLayer \(encoder.layer.0 and 1 more\): its MLP has experts",
    ),
    "hf text": (lambda: _clip().text_model, r"CLIPTextModel \(\): a text model$"),
    "TransformerEncoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2)), "an unknown class"),
}


LOOKS = {
    "attn": True, "self_attention": True, "SelfAttention": True, "cross_attn": True, "Attn": True,
    "attn_pool": False, "AttentionPool": False, "mixer": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8)], ids=lambda norm: type(norm).__name__
)
@pytest.mark.parametrize("child", LOOKS)
def test_what_looks_like_a_block(child, norm):
    """It has attention that is not pooling, and a norm of any kind and name."""
    block = nn.Module()
    block.add_module("first", norm)
    block.add_module(child, nn.Linear(8, 8))
    a_block = LOOKS[child] and not isinstance(norm, nn.Linear)
    message = r"Module \(0\): an unknown class$" if a_block else "no attention block was found in it$"
    with pytest.raises(ValueError, match=message):
        vit.accelerate(nn.Sequential(block))


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
    original.blocks[1].add_module("adapter", layers.SwiGLU(32, 64))
    randomise(original)
    model = copy.deepcopy(original.eval())
    with pytest.warns(UserWarning) as caught:
        vit.accelerate(model)
    message = "accelerate: these stay as they are: timm.models.vision_transformer.Block (blocks.1): its adapter is "
    assert [str(w.message) for w in caught] == [message + "timm.layers.mlp.SwiGLU"]
    assert not fused_modules(model.blocks[1]) and fused_modules(model.blocks[0])
    used = {k: v for k, v in zoo.results("", original, zoo.images("")).items() if "adapter" not in k}
    assert_close(zoo.results("", model, zoo.images("")), used)


@pytest.mark.parametrize("why", ["an unknown part", "a forward of its own"])
def test_what_lies_deep_inside_a_block_that_stays_stays(why):
    """Also norms of queries, keys and hidden units."""
    layers = import_timm().layers
    original = zoo.timm_model(qk_norm=True, scale_mlp_norm=True, scale_attn_norm=True, init_values=0.5)
    if why == "an unknown part":
        original.blocks[1].drop_path3 = layers.SqueezeExcite(32)
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


@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.TOWERS])
def test_known_models_are_accelerated_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.accelerate(vit.accelerate(zoo.build(name)), impl="reference")


@pytest.mark.parametrize("name", zoo.TOWERS)
def test_each_layer_of_transformers_is_fused(name):
    model = vit.accelerate(zoo.build(name))
    layers = sum(
        part_of(type(module)) is not None and part_of(type(module)).kind == "block" for module in model.modules()
    )
    with record_choices() as choices:
        zoo.outputs(name, model, zoo.images(name))
    ops = Counter(choice.op for choice in choices)
    assert layers == ops["residual_layer_norm"] == ops["mlp"] - ("SigLIP" in name) > 1
    assert ops["attention"] + ops["attention_qkvpacked"] == layers + (name == "hf SigLIP")  # SigLIP 2 pools with a mask
    # ViTPose pads its images, RADIO and SigLIP 2 get patches, and the patches of a video are cubes.
    assert ops["patch_embed"] == (name not in ("hf ViTPose", "hf RADIO", "hf SigLIP 2", "hf ViViT", "hf VideoMAE"))


@pytest.mark.parametrize("name", zoo.TOWERS)
def test_hidden_states_and_attention_maps_of_transformers(name):
    """As from eager attention. Where the library refuses, we refuse."""
    original = zoo.build(name, eager=True)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)
    asked, found = {"output_hidden_states": True, "output_attentions": True}, []
    for of in (model, original):
        forward = functools.partial(of.forward, **asked)
        try:
            found.append(flat(forward(**zoo.arguments(name, image))))
        except TypeError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        assert any("attentions" in key for key in found[1]) or name == "hf ViTPose"
        assert_close(*found)


TWO_TOWERS = {
    "CLIP": lambda: _clip(),
    "MetaClip2": lambda: _clip("MetaClip2"),
    "Siglip": lambda: _clip("Siglip"),
    "ChineseCLIP": lambda: _clip("ChineseCLIP"),
    "OwlViT": lambda: _clip("OwlViT"),
}


@pytest.mark.parametrize("name", TWO_TOWERS)
def test_the_text_tower_beside_a_vision_tower_is_untouched(name):
    """One line says so. Its features keep their bits."""
    original = TWO_TOWERS[name]()
    model = copy.deepcopy(original)
    with pytest.warns(UserWarning) as caught:
        vit.accelerate(model)
    (message,) = (str(w.message) for w in caught)
    assert message.count("a text model") == 1 == message.count(";") + 1, message
    assert fused_modules(model) and not [part for part in fused_modules(model) if "text" in part]
    text = {"input_ids": torch.tensor([[3, 7, 11, 49], [5, 49, 1, 1]])}
    text["attention_mask"] = (text["input_ids"] != 1).long()
    ours, theirs = (flat(of.get_text_features(**text)) for of in (model, original))
    assert_close(ours, theirs, 0.0)
    call = text | {"pixel_values": zoo.images("")}
    assert_close(flat(model(**call)), flat(original(**call)))


def test_causal_and_masked_calls_take_the_librarys_attention():
    """The layers of a text tower, where somebody accelerates them alone."""
    original = _clip().text_model
    model = copy.deepcopy(original)
    vit.accelerate(model.encoder)
    ids, found = torch.tensor([[3, 7, 11, 49], [5, 49, 1, 1]]), []
    for mask in (None, ids != 1):
        for of in (model, original):
            out = of(input_ids=ids, attention_mask=mask)
            states = out.last_hidden_state
            grads = torch.autograd.grad(states.square().sum(), [*of.parameters()])
            found.append({"states": states} | dict(zip(dict(of.named_parameters()), grads, strict=True)))
        assert_close(*found[-2:])
    assert not torch.allclose(found[0]["states"], found[2]["states"])
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"is_causal": True}, {"attention_mask": torch.ones(2, 1, 5, 5).tril().bool()}):
        ours, theirs = (of.encoder.layers[0](x, **{"attention_mask": None} | options) for of in (model, original))
        assert_close({"x": ours}, {"x": theirs})


def _llava(text: dict) -> nn.Module:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    vision = small | {"model_type": "clip_vision_model", "image_size": 24, "patch_size": 8}
    model = zoo.hf_model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config=vision,
        text_config=small | {"vocab_size": 60, "pad_token_id": 0} | text,
        image_token_index=59,
        image_token_id=59,
        vision_feature_layer=-1,
    )
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("text", [{"model_type": "llama", "num_key_value_heads": 1}, {"model_type": "phi"}], ids=str)
def test_the_language_model_behind_a_vision_tower_is_untouched(text):
    """Also one with LayerNorms. With the same inputs its outputs are the same bits."""
    original = _llava(text)
    model = copy.deepcopy(original)
    with pytest.warns(UserWarning, match=r"these stay as they are: \S+ \(model.language_model\): a text model$"):
        vit.accelerate(model)
    tower = [part for part in fused_modules(model) if part.startswith("model.vision_tower")]
    assert len(tower) > 8 and not [part for part in fused_modules(model) if "language_model" in part]
    embeds = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    ours, theirs = (of.model.language_model(inputs_embeds=embeds).last_hidden_state for of in (model, original))
    assert torch.equal(ours, theirs)
    found = []
    for of in (model, original):
        image = zoo.images("", batch=1).requires_grad_()
        ids = torch.tensor([[1, *[59] * 9, 7, 8]])
        logits = of(input_ids=ids, pixel_values=image, attention_mask=torch.ones_like(ids)).logits
        wanted = {"image": image} | dict(of.named_parameters())
        grads = torch.autograd.grad(logits.square().sum(), [*wanted.values()], allow_unused=True)
        found.append({"logits": logits.detach()} | {k: g for k, g in zip(wanted, grads, strict=True) if g is not None})
    assert_close(*found)


def test_padded_images_take_the_librarys_attention_and_the_rest_is_fused():
    """SigLIP 2 with images of other sizes. A mask of ones is none."""
    original = zoo.build("hf SigLIP 2")
    model, call = vit.accelerate(copy.deepcopy(original)), zoo.arguments("hf SigLIP 2", zoo.images(""))
    call["spatial_shapes"] = torch.tensor([[3, 3], [2, 3]])
    call["pixel_attention_mask"] = torch.arange(9) < torch.tensor([[9], [6]])
    with record_choices() as choices:
        ours, theirs = (flat(of(**call)) for of in (model, original))
    assert_close(ours, theirs)
    ops = Counter(choice.op for choice in choices)
    assert not ops["attention"] and ops["residual_layer_norm"] == 2 == ops["mlp"] - 1


def test_the_one_warning_groups_modules_by_class_and_reason_and_points_at_the_caller():
    layers = import_timm().layers
    model = zoo.timm_model(depth=6)
    model.blocks[1].mlp = layers.SwiGLU(32, 64)
    model.blocks[2].norm2 = layers.RmsNorm(32)
    model.blocks[3].mlp = layers.SwiGLU(32, 64)
    model.blocks[4].mlp = layers.SwiGLU(32, 64)
    model.blocks[4].drop_path3 = nn.Tanh()
    model.blocks[5].attn.extra = nn.Linear(3, 3)  # an extra child of a part is no reason
    wrapped = nn.ModuleDict({"inner": model, "encoder": nn.TransformerEncoderLayer(32, 2)})
    with pytest.warns(UserWarning) as caught:
        vit.accelerate(wrapped)
    block = "timm.models.vision_transformer.Block"
    assert [str(w.message) for w in caught] == [
        "accelerate: these stay as they are: "
        "timm.layers.mlp.SwiGLU (inner.blocks.1.mlp and 1 more): no kernel computes it; "
        "timm.layers.norm.RmsNorm (inner.blocks.2.norm2): no kernel computes it; "
        f"{block} (inner.blocks.4): its drop_path3 is torch.nn.modules.activation.Tanh; "
        "torch.nn.modules.transformer.TransformerEncoderLayer (encoder): an unknown class"
    ]
    assert caught[0].filename == __file__
    assert {name.split(".")[2] for name in fused_modules(wrapped) if "blocks." in name} == {*"01235"}


NO_KERNEL = "no kernel computes it"
CALLED_PARTS = {
    "norm1": (lambda: nn.LayerNorm((10, 32)), "it normalises over more than the last dimension"),
    "norm2": (lambda: nn.LayerNorm((10, 32)), "it normalises over more than the last dimension"),
    "norm2 of one number": (lambda: nn.Linear(32, 32), NO_KERNEL),
    "mlp": (lambda: import_timm().layers.SwiGLU(32, 64), NO_KERNEL),
    "mlp that is an attention": (lambda: import_timm().layers.Attention(32, 2), NO_KERNEL),
    "attn": (lambda: import_timm().models.vision_transformer.DiffAttention(32, 2), NO_KERNEL),
    "attn.q_norm": (lambda: import_timm().layers.RmsNorm(16), NO_KERNEL),
    "mlp.norm": (lambda: import_timm().layers.RmsNorm(128), NO_KERNEL),
    "drop_path2": (nn.Tanh, NO_KERNEL),
    "ls1": (nn.ReLU, NO_KERNEL),
}


@pytest.mark.parametrize("what", CALLED_PARTS)
def test_a_part_without_a_kernel_is_called_and_the_rest_of_the_block_is_fused(what):
    """Here in the last block. The warning and `vit.explain` name it."""
    make, reason = CALLED_PARTS[what]
    part = what.partition(" ")[0]
    original = zoo.timm_model(depth=3, init_values=0.5)
    original.blocks[2].set_submodule(part, make())
    randomise(original.eval())
    model, cls = copy.deepcopy(original), parts.path_of(type(original.blocks[2].get_submodule(part)))
    with pytest.warns(UserWarning) as caught:
        vit.accelerate(model)
    assert [str(w.message) for w in caught] == [
        f"accelerate: these stay as they are: {cls} (blocks.2.{part}): {reason}"
    ]
    names = set(fused_modules(model.blocks[2]))
    assert names >= {"", "attn", "norm1", "norm2", "mlp"} - {part} and not fused_modules(
        model.blocks[2].get_submodule(part)
    )
    rows = [(row.op, row.calls, row.reason) for row in vit.explain(model, zoo.images("")) if row.path == "called"]
    assert rows == [(part.rpartition(".")[2], 1, f"{cls}: {reason}")]
    assert_close(zoo.results("", model, zoo.images("")), zoo.results("", original, zoo.images("")))
    again = [type(module) for module in model.modules()]
    with pytest.warns(UserWarning, match=reason):
        vit.accelerate(model)
    assert [type(module) for module in model.modules()] == again


def test_a_block_with_a_further_child_is_not_touched():
    model = zoo.timm_model(depth=3)
    model.blocks[2].add_module("adapter", nn.Linear(32, 32))
    message = r"^accelerate: these stay as they are: \S*Block \(blocks\.2\): its adapter is .*Linear$"
    with pytest.warns(UserWarning, match=message):
        vit.accelerate(model)
    assert not fused_modules(model.blocks[2]) and len(fused_modules(model.blocks[0])) == 5
    (row,) = (row for row in vit.explain(model, zoo.images("")) if row.path == "called")
    assert (row.op, row.calls) == ("blocks", 1) and row.reason.endswith("its adapter is torch.nn.modules.linear.Linear")


def test_mlps_of_other_layers():
    """timm's of convolutions, and torchvision's with one more layer."""
    model = zoo.timm_model()
    model.blocks[1].mlp = import_timm().layers.Mlp(32, 64, use_conv=True)
    with pytest.warns(UserWarning, match=r"Mlp \(blocks.1.mlp\): it is made of convolutions$"):
        vit.accelerate(model)
    assert not fused_modules(model.blocks[1].mlp) and "" in fused_modules(model.blocks[1])
    original = zoo.torchvision_model()
    original.encoder.layers[1].mlp.append(nn.Tanh())
    randomise(original)
    model = copy.deepcopy(original)
    with pytest.warns(UserWarning, match="it has 6 layers, not fc1, GELU, dropout, fc2, dropout"):
        vit.accelerate(model)
    assert not fused_modules(model.encoder.layers[1].mlp) and "" in fused_modules(model.encoder.layers[1])
    assert_close(zoo.results("", model, zoo.images("")), zoo.results("", original, zoo.images("")))


def test_all_models_inside_a_module_are_accelerated():
    """Of three libraries at once, each as if alone."""
    names = ["timm DINOv2", "timm scale_norm", "torchvision", "hf ViT", "hf Dinov2"]
    both = vit.accelerate(nn.ModuleList([zoo.build(name) for name in names]))
    for index, name in enumerate(names):
        alone = vit.accelerate(zoo.build(name))
        assert fused_modules(both[index]) == fused_modules(alone)
        assert_close(zoo.outputs(name, both[index], zoo.images(name)), zoo.outputs(name, alone, zoo.images(name)), 0.0)


def test_a_derived_patch_embedding_is_one():
    class Derived(import_timm().layers.PatchEmbed):
        def forward(self, x):
            return 2 * super().forward(x)

    original = zoo.timm_model(embed_layer=Derived)
    randomise(original)
    model = vit.accelerate(copy.deepcopy(original))
    assert "patch_embed.proj" in fused_modules(model)
    assert_close(zoo.results("", model, zoo.images("")), zoo.results("", original, zoo.images("")))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_last_call_decides_on_impl_and_features(impl):
    model, image = zoo.build("timm"), zoo.images("timm")
    for other, options in (("reference", {}), ("auto", {"mlp": False}), ("fused", {"norm": False})):
        vit.accelerate(model, impl=other, **options)
    vit.accelerate(model, impl=impl)
    rows, want = (vit.explain(of, image) for of in (model, vit.accelerate(zoo.build("timm"), impl=impl)))
    assert rows == want and len(rows) == 6
    assert all(row.reason.startswith({"auto": "auto:", "reference": "asked for"}[impl]) for row in rows)


@pytest.mark.parametrize("name", [*zoo.MODELS, *zoo.TOWERS, *zoo.PARTIAL])
def test_every_op_of_a_model_gets_the_impl(name):
    """Every op runs on the requested path; one that ignored it would run as with "auto"."""
    model = vit.accelerate(zoo.build(name), impl="reference")
    with record_choices() as choices:
        zoo.outputs(name, model, zoo.images(name))
        with torch.autocast("cpu", torch.bfloat16):
            zoo.outputs(name, model, zoo.images(name))
    assert choices and all(choice.reason.startswith("asked for") for choice in choices)


def test_a_refusal_leaves_an_accelerated_model_accelerated():
    model = vit.accelerate(zoo.timm_model(), impl="reference")
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'fused', 'triton', 'reference', got 'cuda'"):
        vit.accelerate(model, impl="cuda")
    assert [type(module) for module in model.modules()] == before
    for block in model.blocks:
        block.drop_path3 = nn.Tanh()
    changed = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"VisionTransformer has no block .*\(blocks\.0 and 1 more\): its drop_path3"):
        vit.accelerate(model)
    assert [type(module) for module in model.modules()] == changed


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
