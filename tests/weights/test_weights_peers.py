"""Files that timm, transformers and torchvision write themselves load, and the model computes what theirs does."""

import argparse
import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from peers import import_timm, import_torchvision, import_transformers, randomise, timm_twin
from test_weights import COARSE, FLAX, GAP, READINGS, SMALL, bits, image, load, load_readings, make

import vit
from vit.config import ViTConfig
from vit.weights.fit import adapt_input

pytestmark = pytest.mark.peers

SIZES = {k: v for k, v in SMALL.items() if k != "num_classes"}
LIMIT = 2e-5


def assert_same_logits(ours, theirs, x=None):
    x = image(ours) if x is None else x
    with torch.no_grad():
        got, want = ours.eval()(x), theirs(x)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= LIMIT * want.abs().max()


def loaded(path, theirs, x=None, **fields):
    """Loads by name and into a live model with another eps; returns the first."""
    named = vit.load_pretrained("vit_tiny_patch16_224", path, **SIZES | fields)
    assert_same_logits(named, theirs, x)
    live = vit.VisionTransformer(named.config, seed=1)
    before = [id(p) for p in live.parameters()]
    for module in live.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.3
    assert_same_logits(load(live, path), theirs, x)
    assert [id(p) for p in live.parameters()] == before and bits(live) == bits(named)
    return named


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.3},
        GAP,
        {"global_pool": "avg"},
        {"qkv_bias": False, "qk_norm": True, "num_classes": 0},
    ],
)
def test_timm(fields, suffix, tmp_path):
    theirs = timm_twin(ViTConfig(**SMALL | fields)).eval()
    randomise(theirs)
    path = tmp_path / f"model{suffix}"
    if suffix == ".pt":
        torch.save(theirs.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(theirs.state_dict(), path)
    model = loaded(path, theirs)
    vit.save_pretrained(model, tmp_path / "back.pt")
    theirs.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)
    assert bits(theirs) == bits(model)


def test_timm_training_checkpoint(tmp_path):
    """What timm's own CheckpointSaver writes, with its average of the weights."""
    utils = importlib.import_module(f"{import_timm().__name__}.utils")
    theirs = timm_twin(ViTConfig(**SMALL)).eval()
    randomise(theirs)
    ema = utils.ModelEmaV3(theirs)
    randomise(ema.module, seed=5)
    optimizer = torch.optim.AdamW(theirs.parameters())
    args = argparse.Namespace(model="vit", lr=0.1)
    saver = utils.CheckpointSaver(theirs, optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    loaded(tmp_path / "last.pth.tar", ema.module)


def test_timm_resizes_the_position_embedding_likewise(tmp_path):
    timm = import_timm()
    source = make()
    torch.save(source.state_dict(), tmp_path / "m.pt")
    ours = load(make(img_size=(56, 40)), tmp_path / "m.pt")
    want = timm.layers.resample_abs_pos_embed(source.pos_embed, [7, 5], num_prefix_tokens=1)
    torch.testing.assert_close(ours.pos_embed, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("row", "own", "grid"), READINGS)
def test_timm_reads_the_grid_likewise(row, own, grid, tmp_path):
    """timm's filter takes the source's size from the model's pretrained_cfg, and its layout from the model."""
    source = make(**COARSE, no_embed_class=not row)
    torch.save(dict(source.state_dict()), tmp_path / "m.pt")
    size = {"img_size": (56 * grid[0], 56 * grid[1])}
    theirs = timm_twin(ViTConfig(**SMALL | COARSE | size | {"no_embed_class": not row})).eval()
    theirs.pretrained_cfg = {"input_size": (3, 224, 224)}
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    theirs.load_state_dict(import_timm().models.vision_transformer.checkpoint_filter_fn(state, theirs))
    for model in load_readings(tmp_path / "m.pt", row, own, grid):
        assert_same_logits(model, theirs)


@pytest.mark.parametrize("channels", [1, 3, 4, 8])
def test_timm_adapts_channels_likewise(channels):
    timm = import_timm()
    weight = torch.randn(8, 3, 4, 4)
    assert torch.equal(adapt_input(weight, channels), timm.models.adapt_input_conv(channels, weight))


@pytest.mark.parametrize("case", [c for c in FLAX if "hidden" not in c and "no class" not in c])
def test_timm_reads_flax_likewise(case, tmp_path):
    """timm's own reader of .npz files gives the same weights; its model computes erf GELU."""
    import_timm()
    np.savez(tmp_path / "w.npz", **FLAX[case])
    fields = (GAP if "GAP" in case else {}) | {"no_embed_class": case.startswith("big"), "depth": 2}
    theirs = timm_twin(ViTConfig(**SMALL | fields)).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    ours = vit.load_pretrained("vit_tiny_patch16_224", tmp_path / "w.npz", **SIZES, act_layer="gelu")
    assert bits(ours) == bits(theirs)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("case", [("google", {}), ("big_vision", {"no_embed_class": True}), ("big_vision", GAP)])
def test_timm_reads_what_we_write_for_flax(case, tmp_path):
    import_timm()
    dialect, fields = case
    model = make(act_layer="gelu_tanh", **fields)
    vit.save_pretrained(model, tmp_path / "w.npz", dialect)
    theirs = timm_twin(model.config).eval()
    theirs.load_pretrained(str(tmp_path / "w.npz"))
    assert bits(theirs) == bits(model)


def hf_config(**fields):
    words = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return import_transformers().ViTConfig(**words | {"intermediate_size": 64, "num_labels": 5} | fields)


def hf_model(kind="ViTForImageClassification", **fields):
    model = getattr(import_transformers(), kind)(hf_config(**fields)).eval()
    randomise(model)
    return model


class Logits(torch.nn.Module):
    def __init__(self, model, field="logits"):
        super().__init__()
        self.model, self.field = model, field

    def forward(self, x):
        return getattr(self.model(x), self.field)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("fields", [{}, {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "qkv_bias": False}])
def test_hf_folder(fields, shards, tmp_path):
    theirs = hf_model(**fields)
    theirs.save_pretrained(tmp_path, **{"max_shard_size": "20KB"} if shards else {})
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    model, own = loaded(tmp_path, Logits(theirs)), {"qkv_bias": fields.get("qkv_bias", True)}
    assert model.config.norm_eps == fields.get("layer_norm_eps", 1e-12)
    assert model.pretrained_cfg["label_names"] == [f"LABEL_{i}" for i in range(5)]
    if shards:
        assert bits(load(make(seed=1, **own), tmp_path / "model.safetensors.index.json")) == bits(model)
    else:
        assert bits(load(make(seed=1, **own), tmp_path / "model.safetensors")) == bits(model)


def test_hf_in_memory_and_bin(tmp_path):
    theirs = hf_model()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model = loaded(tmp_path / "pytorch_model.bin", Logits(theirs))
    vit.save_pretrained(model, tmp_path / "back.pt", "hf_memory")
    again = hf_model()
    again.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=True)
    assert bits(again) == bits(theirs)


def test_hf_backbone_with_pooler(tmp_path):
    theirs = hf_model("ViTModel", pooler_output_size=24)
    theirs.save_pretrained(tmp_path)
    model = loaded(tmp_path, Logits(theirs, "pooler_output"), representation_size=24)
    vit.save_pretrained(model, tmp_path / "back", "hf")
    again, info = import_transformers().ViTModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert bits(again) == bits(theirs) and not any(info.values())
    plain = vit.load_pretrained("vit_tiny_patch16_224", tmp_path, **SIZES).eval()
    x = image(plain)
    want = theirs(x).last_hidden_state
    assert (plain.forward_features(x) - want).abs().max() < LIMIT * want.abs().max()


def test_hf_masked_image_model(tmp_path):
    theirs = hf_model("ViTForMaskedImageModeling", encoder_stride=8)
    theirs.save_pretrained(tmp_path)
    model = vit.load_pretrained("vit_tiny_patch16_224", tmp_path, **SIZES).eval()
    x, mask = image(model), torch.rand(2, 16) < 0.5
    want = theirs.vit(x, bool_masked_pos=mask).last_hidden_state
    assert (model.forward_features(x, mask) - want).abs().max() < LIMIT * want.abs().max()


@pytest.mark.parametrize("fields", [{}, {"act_layer": "quick_gelu", "norm_eps": 1e-5, "img_size": (16, 48)}])
def test_hf_reads_what_we_write(fields, tmp_path):
    transformers = import_transformers()
    model = make(**fields)
    vit.save_pretrained(model, tmp_path / "ours", "hf")
    theirs, info = transformers.ViTForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same_logits(model, Logits(theirs.eval()))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, own = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs"))
    assert {k: own[k] for k in ours if k != "num_labels"} == {k: ours[k] for k in ours if k != "num_labels"}
    assert bits(load(make(seed=1, **fields), tmp_path / "theirs")) == bits(model)


def small_config(kind, **fields):
    words = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return getattr(import_transformers(), f"{kind}Config")(**words, intermediate_size=64, **fields)


@pytest.mark.parametrize(
    ("kind", "config", "what"),
    [
        ("DINOv3ViTModel", "DINOv3ViT", "DINOv3"),
        ("DeiTForImageClassificationWithTeacher", "DeiT", "a DeiT of transformers with two classifiers"),
        ("Siglip2VisionModel", "Siglip2Vision", "a siglip2_vision_model checkpoint of transformers"),
        ("BlipVisionModel", "BlipVision", "BLIP"),
        ("OwlViTVisionModel", "OwlViTVision", "OWL-ViT|a owlvit_vision_model"),
        ("CLIPSegVisionModel", "CLIPSegVision", "a clipseg_vision_model checkpoint of transformers"),
        ("BeitModel", "Beit", "a beit checkpoint|BEiT"),
        ("SwinModel", "Swin", "a swin checkpoint|Swin"),
    ],
)
def test_families_of_transformers_are_named(kind, config, what, tmp_path):
    transformers = import_transformers()
    if config == "Swin":
        config = transformers.SwinConfig(image_size=32, depths=[1], num_heads=[2], embed_dim=16, window_size=2)
    else:
        config = small_config(config)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "memory.pt")
    for target in ([make()], []):
        with pytest.raises(vit.CheckpointError, match=f"({what}).*load_pretrained does not read yet") as caught:
            vit.load_pretrained(*target, tmp_path)
        assert str(caught.value).endswith(" and call vit.accelerate")
    with pytest.raises(vit.CheckpointError):
        vit.load_pretrained(tmp_path / "memory.pt")


def test_pre_training_model_of_mae(tmp_path):
    """Its encoder has ViT's names, and there is a decoder."""
    transformers = import_transformers()
    sizes = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    theirs = transformers.ViTMAEForPreTraining(small_config("ViTMAE", **sizes, mask_ratio=0.0)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = vit.load_pretrained(tmp_path).eval()
    x, order = image(ours), torch.arange(16).float().expand(2, -1)  # it shuffles the patches by noise
    with torch.no_grad():
        got, want = ours.forward_features(x), theirs.vit(x, noise=order).last_hidden_state
    assert (got - want).abs().max() < LIMIT * want.abs().max()


def test_average_of_swa(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(theirs := timm_twin(ViTConfig(**SMALL)).eval())
    randomise(theirs)
    average.update_parameters(theirs)
    torch.save(average.state_dict(), tmp_path / "swa.pt")
    loaded(tmp_path / "swa.pt", theirs)


def torchvision_model(**fields):
    words = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)
    model = import_torchvision().models.VisionTransformer(**words | fields).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("fields", [{}, {"representation_size": 24}])
def test_torchvision(fields, old, tmp_path):
    theirs = torchvision_model(**fields)
    state = theirs.state_dict()
    if old:
        state = {k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for k, v in state.items()}
    torch.save(state, tmp_path / "m.pth")
    model = loaded(tmp_path / "m.pth", theirs)
    vit.save_pretrained(model, tmp_path / "back.pth", "torchvision_old" if old else "torchvision")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == state.keys()
    again = torchvision_model(**fields)
    randomise(again, seed=2)
    again.load_state_dict(back, strict=True)  # it renames old names itself
    assert bits(again) == bits(theirs)


def test_torchvision_resizes_the_position_embedding_likewise(tmp_path):
    torchvision = import_torchvision()
    theirs = torchvision_model()
    torch.save(theirs.state_dict(), tmp_path / "m.pth")
    larger = torchvision_model(image_size=48)
    resized = torchvision.models.vision_transformer.interpolate_embeddings(48, 8, theirs.state_dict())
    larger.load_state_dict(resized)
    loaded(tmp_path / "m.pth", larger, torch.randn(2, 3, 48, 48), img_size=48)


DINOV2_NAMES = [  # transformers' name, and that of facebookresearch/dinov2
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.o_proj", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
]


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2(registers, tmp_path):
    """transformers' model computes what DINOv2's does; its weights are renamed here by hand."""
    transformers = import_transformers()
    words = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**words, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**words)).eval()
    randomise(theirs)
    state = theirs.state_dict()
    for index in range(2):
        for leaf in ("weight", "bias"):
            parts = [state.pop(f"encoder.layer.{index}.attention.{p}_proj.{leaf}") for p in "qkv"]
            state[f"blocks.{index}.attn.qkv.{leaf}"] = torch.cat(parts)
    for old, new in DINOV2_NAMES:
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "dinov2.pth")
    model = vit.load_pretrained("vit_tiny_patch16_224", tmp_path / "dinov2.pth", **SIZES).eval()
    assert model.pretrained_cfg["source"] == "dinov2" and model.config.reg_tokens == registers
    x, mask = image(model), torch.rand(2, 16) < 0.5
    for options in ({}, {"bool_masked_pos": mask}):
        with torch.no_grad():
            got, want = model.forward_features(x, **options), theirs(x, **options).last_hidden_state
        assert (got - want).abs().max() < LIMIT * want.abs().max()
    if not registers:  # with registers, the class token absorbs its position
        vit.save_pretrained(model, tmp_path / "back.pth", "dinov2")
        back = torch.load(tmp_path / "back.pth", weights_only=True)
        assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in back)


def test_dropout_stands_where_the_source_has_it(tmp_path):
    """Hugging Face has none after the activation; timm has."""
    transformers = import_transformers()
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, **sizes, **rates))
    theirs.save_pretrained(tmp_path)
    found = vit.load_pretrained(tmp_path)
    config = found.config
    assert (config.pos_drop_rate, config.proj_drop_rate, config.attn_drop_rate) == (0.3, 0.3, 0.2)
    assert config.hidden_drop_rate == found.blocks[0].mlp.drop_rate == 0.0 and found.blocks[0].drop_rate == 0.3

    live = vit.VisionTransformer(dataclasses.replace(config, act_drop_rate=None, pos_drop_rate=0.1, proj_drop_rate=0.1))
    vit.load_pretrained(live, tmp_path)  # the rates stay the model's
    assert live.config.proj_drop_rate == live.blocks[0].drop_rate == 0.1 and live.blocks[0].mlp.drop_rate == 0.0
    vit.save_pretrained(live, tmp_path / "ours.pt")  # it states the rate, unlike timm's file
    torch.save(live.state_dict(), tmp_path / "theirs.pt")
    for name, rate in (("ours", 0.0), ("theirs", 0.1), ("ours", 0.0)):
        vit.load_pretrained(live, tmp_path / f"{name}.pt", norm_eps=1e-6)
        assert live.blocks[0].mlp.drop_rate == rate
