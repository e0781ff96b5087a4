"""transformers' Dinov2, CLIP, SigLIP, MAE and MSN, and OpenCLIP's tower, by path alone: the library's features."""

import json
import warnings

import numpy as np
import pytest
import torch
from peers import import_timm, import_transformers, randomise
from test_weights import bits, flax_params, image, make

import vit

LIMIT = 2e-5
WORDS = {
    "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "mlp_ratio": 2,
}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}


def built(kind, config, **fields):
    """A model of transformers with random weights that matter; CLIP and SigLIP have the fields under vision_config."""
    transformers = import_transformers()
    words = WORDS | fields
    if config in ("CLIP", "Siglip"):
        words = {"vision_config": words, "text_config": TEXT | {"max_position_embeddings": 4}, "projection_dim": 24}
        words["text_config"] |= {"bos_token_id": 1, "eos_token_id": 2}
    model = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**words)).eval()
    randomise(model)
    return model


def silently(path, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return vit.load_pretrained(path, **fields).eval()


@torch.no_grad()
def assert_same(ours, want, call=lambda model, x: model.forward_features(x), x=None, **options):
    x = image(ours) if x is None else x
    got, want = call(ours, x, **options), want(x)
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= LIMIT, error


def tokens_before_norm(model, x):
    """transformers' last_hidden_state of CLIP, which its post_layernorm has not normalised."""
    patches, prefix = model.forward_intermediates(
        x, 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )[0]
    return torch.cat([prefix, patches], dim=1)


DINOV2 = [("Dinov2Model", "Dinov2"), ("Dinov2WithRegistersModel", "Dinov2WithRegisters"), ("Dinov2Backbone", "Dinov2")]
ODD = {"image_size": 56, "qkv_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 0.01}


@pytest.mark.peers
@pytest.mark.parametrize("fields", [{}, {"image_size": 40, "num_channels": 1, "layerscale_value": 0.1}, ODD])
@pytest.mark.parametrize(("kind", "config"), DINOV2)
def test_dinov2(kind, config, fields, tmp_path):
    theirs = built(kind, config, **fields)
    theirs.save_pretrained(tmp_path)
    ours = silently(tmp_path)
    assert ours.config.norm_eps == fields.get("layer_norm_eps", 1e-6) and ours.config.num_classes == 0
    assert ours.config.act_layer == ("gelu_tanh" if fields is ODD else "gelu") and ours.config.init_values
    assert ours.config.reg_tokens == (4 if "Registers" in kind else 0)
    channels = ours.config.in_chans
    if kind == "Dinov2Backbone":  # one map of the last block, normalised
        assert_same(
            ours,
            lambda x: theirs(x).feature_maps[-1].flatten(2).mT,
            lambda m, x: m.forward_features(x)[:, 1:],
            x=torch.randn(2, channels, *ours.config.img_size),
        )
        return
    x, mask = torch.randn(2, channels, *ours.config.img_size), torch.rand(2, ours.config.num_patches) < 0.5
    assert_same(ours, lambda x: theirs(x).last_hidden_state, x=x)
    assert_same(ours, lambda x: theirs(x).pooler_output, lambda m, x: m(x), x=x)
    assert_same(
        ours, lambda x: theirs(x, bool_masked_pos=mask).last_hidden_state, lambda m, x: m.forward_features(x, mask), x=x
    )
    torch.save(theirs.state_dict(), tmp_path / "memory.pt")  # transformers 5 has other names in memory
    heads = {"num_heads": 4, "grid_size": ours.config.grid_size}
    assert bits(silently(tmp_path / "memory.pt", **heads)) == bits(ours)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["DeiTModel", "DeiTForImageClassification", "DeiTForMaskedImageModeling"])
def test_deit(kind, tmp_path):
    """The distillation token is a register. The head reads the class token alone, as in transformers."""
    theirs = built(kind, "DeiT", num_labels=5, encoder_stride=8, hidden_act="gelu_new", image_size=40)
    theirs.save_pretrained(tmp_path / "folder")
    torch.save(theirs.state_dict(), tmp_path / "memory.pt")
    masked = kind == "DeiTForMaskedImageModeling"  # its decoder is left out
    ours = vit.load_pretrained(tmp_path / "folder").eval() if masked else silently(tmp_path / "folder")
    assert (ours.config.reg_tokens, ours.config.no_embed_class, ours.config.act_layer) == (1, False, "gelu_tanh")
    encoder = theirs if kind == "DeiTModel" else theirs.deit
    assert_same(ours, lambda x: encoder(x).last_hidden_state)
    if "Classification" in kind:
        assert ours.config.num_classes == 5
        assert_same(ours, lambda x: theirs(x).logits, lambda m, x: m(x))
    again = vit.load_pretrained(tmp_path / "memory.pt", num_heads=4, grid_size=(5, 5), act_layer="gelu_tanh")
    assert bits(again) == bits(ours)
    vit.save_pretrained(ours, tmp_path / "back.safetensors", "hf_deit")
    assert bits(vit.load_pretrained(tmp_path / "back.safetensors", num_heads=4, grid_size=(5, 5))) == bits(ours)


@pytest.mark.peers
@pytest.mark.parametrize(("kind", "config"), DINOV2[:2])
def test_dinov2_at_another_size(kind, config, tmp_path):
    """Dinov2 resizes its position embedding bicubically, and with antialias if it has registers."""
    theirs = built(kind, config)
    theirs.save_pretrained(tmp_path)
    ours, x = silently(tmp_path, dynamic_img_size=True), torch.randn(2, 3, 24, 16)
    assert_same(ours, lambda x: theirs(x).last_hidden_state, x=x)
    small = silently(tmp_path, img_size=(24, 16))
    assert_same(small, lambda x: theirs(x).last_hidden_state, x=x)


@pytest.mark.peers
@pytest.mark.parametrize("config", ["Dinov2", "Dinov2WithRegisters"])
def test_dinov2_classifier_is_left_out(config, tmp_path):
    theirs = built(f"{config}ForImageClassification", config, hidden_dropout_prob=0.3, drop_path_rate=0.2, num_labels=5)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="its classifier reads the class token beside the mean of the patches.*left out"
    ):
        ours = vit.load_pretrained(tmp_path).eval()
    encoder = theirs.dinov2 if config == "Dinov2" else theirs.dinov2_with_registers
    assert_same(ours, lambda x: encoder(x).last_hidden_state)
    rates = (ours.config.pos_drop_rate, ours.config.proj_drop_rate, ours.config.drop_path_rate)
    assert ours.config.num_classes == 0 and rates == (0.3, 0.0, 0.2)
    with pytest.warns(UserWarning, match="left out"):
        assert vit.load_pretrained(tmp_path, num_classes=3).head.weight.count_nonzero() == 0


@pytest.mark.peers
@pytest.mark.parametrize("memory", [False, True])
def test_swiglu_is_refused(memory, tmp_path):
    theirs = built("Dinov2Model", "Dinov2", use_swiglu_ffn=True)
    theirs.save_pretrained(tmp_path)
    if memory:
        torch.save(theirs.state_dict(), tmp_path / "m.pt")
    with pytest.raises(vit.CheckpointError, match=r"a Dinov2 with SwiGLU of transformers.*call vit\.acc"):
        vit.load_pretrained(tmp_path / "m.pt" if memory else tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize("fields", [{}, {"image_size": 40, "hidden_act": "gelu", "layer_norm_eps": 0.01}])
@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_clip(kind, fields, tmp_path):
    theirs = built(kind, "CLIPVision", projection_dim=24, attention_dropout=0.25, **fields)
    theirs.save_pretrained(tmp_path)
    ours = silently(tmp_path)
    assert ours.config.pre_norm and ours.patch_embed.proj.bias is None and ours.config.attn_drop_rate == 0.25
    assert ours.config.norm_eps == fields.get("layer_norm_eps", 1e-5)
    assert ours.config.act_layer == fields.get("hidden_act", "quick_gelu")
    assert ours.pretrained_cfg["mean"] == (0.48145466, 0.4578275, 0.40821073)
    x = torch.randn(2, 3, *ours.config.img_size)
    assert_same(ours, lambda x: theirs(x).last_hidden_state, tokens_before_norm, x=x)
    if kind == "CLIPVisionModel":
        assert_same(ours, lambda x: theirs(x).pooler_output, lambda m, x: m(x), x=x)
    else:
        assert_same(ours, lambda x: theirs(x).image_embeds, lambda m, x: m(x), x=x)
        assert ours.head.weight.shape == (24, 48) and not ours.head.bias.count_nonzero()
        vit.save_pretrained(ours, tmp_path / "back.pt", "hf_clip")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert back.keys() == theirs.state_dict().keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
    larger = silently(tmp_path, dynamic_img_size=True)
    assert_same(
        larger,
        lambda x: theirs(x, interpolate_pos_encoding=True).last_hidden_state,
        tokens_before_norm,
        x=torch.randn(1, 3, 56, 56),
    )
    live = vit.VisionTransformer(ours.config, seed=1)
    sizes = {"img_size": ours.config.img_size, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    named = vit.load_pretrained("vit_base_patch16_clip_224", tmp_path, **sizes, mlp_ratio=2.0)
    assert bits(vit.load_pretrained(live, tmp_path)) == bits(named) == bits(ours) and named.config == ours.config
    torch.save(theirs.state_dict(), tmp_path / "alone.pt")
    with pytest.raises(vit.CheckpointError, match="nothing tells with which GELU"):
        vit.load_pretrained(tmp_path / "alone.pt", num_heads=4)


@pytest.mark.peers
@pytest.mark.parametrize("config", ["CLIP", "Siglip"])
def test_the_tower_of_two(config, tmp_path):
    theirs = built(f"{config}Model", config, hidden_act="gelu_new")
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
    torch.save(theirs.state_dict() | positions, tmp_path / "pytorch_model.bin")  # as older versions wrote
    with pytest.warns(UserWarning, match=r"it holds more than a ViT: logit_\w+, .*text_model.*left out"):
        ours = vit.load_pretrained(tmp_path).eval()
    assert ours.config.num_heads == 4 and ours.config.act_layer == "gelu_tanh"  # that of vision_config
    assert_same(ours, lambda x: theirs.get_image_features(x).pooler_output, lambda m, x: m(x))


@pytest.mark.peers
@pytest.mark.parametrize("config", ["CLIP", "Siglip"])
def test_a_classifier_of_other_features_is_left_out(config, tmp_path):
    theirs = built(f"{config}ForImageClassification", config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its classifier reads the mean of the patches, which our head does not"):
        ours = vit.load_pretrained(tmp_path).eval()
    assert_same(ours, lambda x: theirs.vision_model(x).pooler_output, lambda m, x: m(x))


OPEN_CLIP_NAMES = [  # transformers' name, and OpenCLIP's
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".ln_"),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
]


def open_clip_names(state):
    """transformers' CLIP under OpenCLIP's names, with a text tower."""
    state, made = dict(state), {"visual.proj": state.pop("visual_projection.weight").T.contiguous()}
    for index in range(2):
        path = f"vision_model.encoder.layers.{index}.self_attn"
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"{path}.{part}_proj.{leaf}") for part in "qkv"]
            made[f"visual.transformer.resblocks.{index}.attn.in_proj_{leaf}"] = torch.cat(parts)
    for name, tensor in state.items():
        for old, new in OPEN_CLIP_NAMES:
            name = name.replace(old, new)
        made[name] = tensor
    text = {"transformer.resblocks.0.ln_1.weight": torch.ones(4), "positional_embedding": torch.ones(3, 4)}
    return made | text | {"logit_scale": torch.ones(()), "text_projection": torch.ones(4, 4)}


@pytest.mark.peers
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_open_clip(suffix, act, tmp_path):
    theirs = built("CLIPVisionModelWithProjection", "CLIPVision", projection_dim=24, hidden_act=act)
    state, path = open_clip_names(theirs.state_dict()), tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    with pytest.raises(vit.CheckpointError, match="nothing tells with which GELU; name it or pass act_layer="):
        vit.load_pretrained(path, num_heads=4)
    with pytest.warns(UserWarning, match="it holds more than a ViT"):
        ours = vit.load_pretrained(path, num_heads=4, act_layer=act).eval()
    assert ours.pretrained_cfg["source"] == "open_clip"
    assert_same(ours, lambda x: theirs(x).image_embeds, lambda m, x: m(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the activation and the text tower
        vit.save_pretrained(ours, tmp_path / "back.pt", "open_clip")
        live = vit.VisionTransformer(ours.config, seed=1)
        vit.load_pretrained(live, path)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == {name for name in state if name.startswith("visual.")}
    assert all(torch.equal(back[name], state[name]) for name in back)
    assert bits(live) == bits(ours) and live.config.act_layer == act
    timm = import_timm()
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(
        dict(state),
        timm.models.VisionTransformer(32, 8, embed_dim=48, depth=2, num_heads=4, pre_norm=True, mlp_ratio=2),
    )
    assert all(torch.equal(filtered[name], tensor) for name, tensor in ours.state_dict().items())


def test_torchscript_archives_are_not_executed(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, x):
            return x

    torch.jit.script(Model()).save(tmp_path / "ViT-B-16.pt")
    with pytest.raises(
        vit.CheckpointError, match=r"is a TorchScript archive.*not executed; .*state_dict\(\)"
    ) as caught:
        vit.load_pretrained(tmp_path / "ViT-B-16.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.peers
@pytest.mark.parametrize("fields", [{}, {"image_size": 40, "hidden_act": "gelu", "layer_norm_eps": 0.01}])
@pytest.mark.parametrize("head", [True, False])
def test_siglip(head, fields, tmp_path):
    theirs = built("SiglipVisionModel", "SiglipVision", vision_use_head=head, **fields)
    theirs.save_pretrained(tmp_path)
    ours = silently(tmp_path)
    assert ours.config.global_pool == ("map" if head else "avg") and not ours.config.num_prefix_tokens
    assert ours.config.act_layer == fields.get("hidden_act", "gelu_tanh")
    x = torch.randn(2, 3, *ours.config.img_size)
    assert_same(ours, lambda x: theirs(x).last_hidden_state, x=x)
    if head:
        assert_same(ours, lambda x: theirs(x).pooler_output, lambda m, x: m(x), x=x)
        vit.save_pretrained(ours, tmp_path / "own.safetensors")
        assert bits(silently(tmp_path / "own.safetensors")) == bits(ours)
    larger = silently(tmp_path, img_size=(56, 32))
    assert_same(
        larger, lambda x: theirs(x, interpolate_pos_encoding=True).last_hidden_state, x=torch.randn(1, 3, 56, 32)
    )
    back = tmp_path / "back.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the activation
        vit.save_pretrained(ours, back, "hf_siglip")
    found = {name.removeprefix("vision_model."): t for name, t in torch.load(back, weights_only=True).items()}
    assert found.keys() == theirs.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.peers
def test_siglip_of_timm(tmp_path):
    """By path alone and by name; and the reference computes the same."""
    timm = import_timm()
    sizes = {"img_size": 32, "embed_dim": 192, "depth": 2, "num_heads": 3, "num_classes": 5}
    theirs = timm.create_model("vit_base_patch16_siglip_224", pretrained=False, **sizes).eval()
    randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    named = vit.load_pretrained("vit_base_patch16_siglip_224", tmp_path / "m.pt", **sizes).eval()
    alone = silently(tmp_path / "m.pt", num_heads=3)
    assert bits(named) == bits(alone) and alone.config.global_pool == "map" and not alone.config.class_token
    reference = vit.reference.VisionTransformer(named.config).eval()
    reference.load_state_dict(named.state_dict())
    for ours in (named, alone, reference):
        assert_same(ours, theirs, lambda m, x: m(x), x=torch.randn(2, 3, 32, 32))


def test_another_pooling_leaves_attention_pooling_out(tmp_path):
    model = make(global_pool="map", class_token=False)
    torch.save(dict(model.state_dict()), tmp_path / "m.pt")
    for pool in ("avg", ""):
        fields = {"num_heads": 2, "global_pool": pool, "fc_norm": False}
        with pytest.warns(
            UserWarning, match="it pools by attention, the model with global_pool=.*that part is left out"
        ):
            ours = vit.load_pretrained(tmp_path / "m.pt", num_classes=0, **fields).eval()
        assert ours.attn_pool is None
        assert_same(ours, model.forward_features)
        with pytest.raises(vit.CheckpointError, match=r"head reads attention pooling.*global_pool='map'"):
            vit.load_pretrained(tmp_path / "m.pt", **fields)


@pytest.mark.peers
def test_map_head_of_big_vision(tmp_path):
    """timm reads the same file; its reader takes `params/`."""
    timm = import_timm()
    generator = np.random.default_rng(0)

    def draw(*shape):
        return (generator.standard_normal(shape) * 0.3).astype(np.float32)

    params = {k: v for k, v in flax_params(True, cls=False).items() if not k.startswith("params/head")}
    prefix = "params/" if any(name.startswith("params/") for name in params) else ""
    dim = params[f"{prefix}embedding/bias"].shape[0]
    hidden = params[f"{prefix}Transformer/encoderblock_0/MlpBlock_0/Dense_0/bias"].shape[0]
    heads, width = params[f"{prefix}Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/bias"].shape
    attention = f"{prefix}MAPHead_0/MultiHeadDotProductAttention_0"
    for part in ("query", "key", "value"):
        params |= {
            f"{attention}/{part}/kernel": draw(dim, heads, width),
            f"{attention}/{part}/bias": draw(heads, width),
        }
    params |= {f"{attention}/out/kernel": draw(heads, width, dim), f"{attention}/out/bias": draw(dim)}
    mlp = f"{prefix}MAPHead_0/MlpBlock_0"
    params |= {f"{mlp}/Dense_0/kernel": draw(dim, hidden), f"{mlp}/Dense_0/bias": draw(hidden)}
    params |= {f"{mlp}/Dense_1/kernel": draw(hidden, dim), f"{mlp}/Dense_1/bias": draw(dim)}
    params |= {f"{prefix}MAPHead_0/LayerNorm_0/{leaf}": draw(dim) for leaf in ("scale", "bias")}
    params[f"{prefix}MAPHead_0/probe"] = draw(1, 1, dim)
    np.savez(tmp_path / "w.npz", **params)
    ours = silently(tmp_path / "w.npz")
    config = ours.config
    assert config.global_pool == "map" and config.act_layer == "gelu_tanh" and config.num_heads == heads
    theirs = timm.models.VisionTransformer(
        config.img_size, config.patch_size, config.in_chans, config.num_classes, "map", dim, config.depth, heads,
        config.mlp_ratio, class_token=False, act_layer="gelu_tanh",
    ).eval()  # fmt: skip
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    assert bits(ours) == bits(theirs)
    assert_same(ours, theirs, lambda m, x: m(x))
    vit.save_pretrained(ours, tmp_path / "back.npz", "big_vision")
    with np.load(tmp_path / "back.npz") as back:
        assert {name.removeprefix("params/") for name in back} == {name.removeprefix(prefix) for name in params}
        assert all(np.array_equal(back[f"params/{name.removeprefix(prefix)}"], params[name]) for name in params)


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTMAEForPreTraining"])
def test_mae(kind, tmp_path):
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    theirs = built(kind, "ViTMAE", mask_ratio=0.0, **sizes)
    theirs.save_pretrained(tmp_path)
    if kind == "ViTMAEModel":
        ours, encoder = silently(tmp_path), theirs
    else:
        with pytest.warns(UserWarning, match="it holds more than a ViT: decoder.decoder_embed.bias.*are left out"):
            ours, encoder = vit.load_pretrained(tmp_path).eval(), theirs.vit
    order = torch.arange(16).float().expand(2, -1)  # it shuffles the patches by noise
    assert_same(ours, lambda x: encoder(x, noise=order).last_hidden_state)


@pytest.mark.peers
def test_msn(tmp_path):
    theirs = built("ViTMSNForImageClassification", "ViTMSN", num_labels=5)
    theirs.save_pretrained(tmp_path)
    ours = silently(tmp_path)
    assert_same(ours, lambda x: theirs(x).logits, lambda m, x: m(x))
    assert_same(ours, lambda x: theirs.vit(x).last_hidden_state)


BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
BASE |= {"mlp_ratio": 4, "patch_size": 16, "image_size": 224}


@pytest.mark.peers
@pytest.mark.parametrize(
    ("kind", "config", "fields"),
    [
        ("Dinov2Model", "Dinov2", {"patch_size": 14, "image_size": 518}),
        ("CLIPVisionModelWithProjection", "CLIPVision", {"projection_dim": 512}),
        ("SiglipVisionModel", "SiglipVision", {}),
    ],
)
def test_real_sizes(kind, config, fields, tmp_path):
    """With the library's own initial weights, and ours by path alone."""
    transformers = import_transformers()
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**BASE | fields)).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = silently(tmp_path, dynamic_img_size=True), torch.randn(1, 3, 224, 224)
    field = "image_embeds" if "Projection" in kind else "pooler_output"
    assert_same(ours, lambda x: getattr(theirs(x), field), lambda m, x: m(x), x=x)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()


CHANGES = {
    "Dinov2": (
        "layernorm.weight", "embeddings.cls_token", "encoder.layer.1.layer_scale2.lambda1",
        "encoder.layer.0.mlp.fc2.bias",
    ),
    "CLIPVision": (
        "post_layernorm.bias", "embeddings.class_embedding", "encoder.layers.1.self_attn.out_proj.bias",
        "embeddings.position_embedding.weight",
    ),
    "SiglipVision": (
        "head.probe", "head.attention.in_proj_weight", "head.mlp.fc1.weight", "post_layernorm.weight",
        "embeddings.patch_embedding.bias", "head.attention.in_proj_bias",
    ),
}  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize("config", CHANGES)
def test_wrong_and_missing_tensors(config, tmp_path):
    theirs = built(f"{config}Model", config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    for name in CHANGES[config]:
        name = next(own for own in state if own.endswith(name))
        for value in (None, torch.ones(3, 5), state[name].double()[None, None], state[name].int()):
            changed = {k: v for k, v in state.items() if k != name} | ({} if value is None else {name: value})
            torch.save(changed, tmp_path / "pytorch_model.bin")
            with pytest.raises(vit.CheckpointError) as caught:
                vit.load_pretrained(tmp_path)
            assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    torch.save(state | {"encoder.stranger": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(vit.CheckpointError, match=r"encoder\.stranger"):
        vit.load_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    words = json.loads((tmp_path / "config.json").read_text())
    for word, value in {
        "hidden_act": "relu",
        "num_attention_heads": 5,
        "image_size": 96,
        "layer_norm_eps": "x",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps(words | {word: value}))
        with pytest.raises(vit.CheckpointError) as caught:
            vit.load_pretrained(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_projection_has_no_place_for_a_bias(tmp_path):
    model = make(pre_norm=True)
    for dialect in ("hf_clip", "open_clip"):
        with pytest.raises(ValueError, match=r"has no place for head\.bias"):
            vit.save_pretrained(model, tmp_path / "m.pt", dialect)
