"""Checkpoints loaded without a model name, and the commands that take one."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peers import randomise
from test_weights import foreign

import vit
from vit.commands.cli import main

SIZES = {"img_size": 32, "patch_size": 8, "depth": 2, "mlp_ratio": 0.5}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
CASES = [
    ("timm", ".pt", {}),
    ("timm", ".npz", {"patch_size": (8, 16), "img_size": (16, 32), "depth": 1}),
    ("timm", ".safetensors", {"reg_tokens": 4, "init_values": 0.1, "global_pool": "avg"}),
    ("timm", ".pt", {"qk_norm": True, "reg_tokens": 2, "no_embed_class": True, "mlp_ratio": 1.3, "in_chans": 1}),
    ("hf", ".safetensors", {"use_mask_token": True}),
    ("hf", "", {"num_heads": 6, "img_size": (16, 48), "norm_eps": 1e-5, "act_layer": "gelu_tanh"}),
    ("hf_memory", ".pt", {"num_classes": 0}),
    ("torchvision", ".pt", {"representation_size": 24}),
    ("torchvision_old", ".pt", {}),
    ("google", ".npz", {"num_heads": 6, "act_layer": "gelu_tanh"}),
    ("big_vision", ".npz", {"num_heads": 2, "act_layer": "gelu_tanh"} | GAP),
    ("dinov2", ".pt", {"num_classes": 0, "reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}),
]
PHOTO = next((Path(vit.__file__).parent / "assets").glob("*.jpg"))


def make(**fields) -> vit.VisionTransformer:
    config = dict(img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=5, mlp_ratio=0.5)
    model = vit.VisionTransformer(vit.ViTConfig(**config | fields))
    randomise(model)
    return model.eval()


def hf_names(model, tmp_path):
    return torch.load(foreign(model, tmp_path / "names.pt", "hf"), weights_only=True)


def saved(model, path, dialect):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about numerics a dialect cannot hold
        vit.save_pretrained(model, path, dialect)
    return path


@pytest.mark.parametrize(("dialect", "suffix", "fields"), CASES)
def test_architecture_is_told_by_the_checkpoint(dialect, suffix, fields, tmp_path):
    model = make(**fields)
    eps = 1e-12 if dialect.startswith("hf") else 1e-6
    path = saved(model, tmp_path / f"model{suffix}", dialect)
    found = vit.load_pretrained(path, norm_eps=fields.get("norm_eps", eps)).eval()
    for module in model.modules():
        if isinstance(module, vit.layers.LayerNorm):
            module.eps = fields.get("norm_eps", eps)
    image = torch.randn(2, model.config.in_chans, *model.config.img_size)
    with torch.no_grad():
        assert torch.equal(found(image), model(image))
    assert all(torch.equal(found.state_dict()[k], t) for k, t in model.state_dict().items() if k in found.state_dict())
    for field in ("img_size", "patch_size", "num_heads", "depth", "embed_dim", "class_token", "reg_tokens"):
        assert getattr(found.config, field) == getattr(model.config, field)


@pytest.mark.parametrize("file", ["model.pt", "model.npz", "folder"])
def test_a_checkpoint_alone_gives_the_bits_that_it_gives_with_the_name(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative path works, too
    path = saved(make(drop_rate=0.1), Path(file), "hf" if file == "folder" else "timm")
    alone = vit.load_pretrained(file)
    named = vit.load_pretrained("vit_tiny_patch16_224", path, **SIZES)
    assert alone.config == named.config and alone.state_dict().keys() == named.state_dict().keys()
    assert all(torch.equal(alone.state_dict()[k], t) for k, t in named.state_dict().items())
    half = vit.load_pretrained(path, dtype=torch.float16)
    assert torch.equal(half.head.weight, named.head.weight.half())


def test_one_argument_is_a_checkpoint(tmp_path, monkeypatch):
    name = "vit_tiny_patch16_224"
    path = saved(make(), tmp_path / "model.pt", "timm")
    for args, kind, match in [
        ((None, path), TypeError, r"the first argument is None; leave it out: load_pretrained\(path\)"),
        ((None,), TypeError, "leave it out"),
        ((make(),), TypeError, r"the checkpoint is missing; write load_pretrained\(model, path\)"),
        ((make(), None), TypeError, "the checkpoint is missing"),
        ((name, True), TypeError, "a checkpoint is a file, a folder or a name on the Hugging Face hub, got True"),
        ((3,), TypeError, "got 3"),
        ((name,), FileNotFoundError, rf"{name} names a model.*write load_pretrained\('{name}', path\), or create"),
        ((name, None), FileNotFoundError, "names a model"),
        ((f"{name}.pt",), FileNotFoundError, r"pt: there is no such file or folder"),
        ((path, path), TypeError, "expected a vit.VisionTransformer, got pathlib"),
    ]:
        with pytest.raises(kind, match=match):
            vit.load_pretrained(*args)
    for told in (True, False):
        with pytest.raises(TypeError, match=r"names no weights; write pretrained=PATH or pretrained='owner/name' "):
            vit.create_model(name, pretrained=told)
    monkeypatch.chdir(tmp_path.parent)  # "" means this folder, which has no checkpoint, not random weights
    with pytest.raises(vit.CheckpointError, match="the folder has none of"):
        vit.create_model(name, pretrained="")
    made = vit.create_model(name, pretrained=path, dtype=torch.float64, num_classes=5, **SIZES)
    assert made.head.weight.dtype is torch.float64
    named = vit.load_pretrained(name, path, num_classes=5, **SIZES).double()
    assert made.config == named.config and all(map(torch.equal, made.parameters(), named.parameters()))
    monkeypatch.chdir(tmp_path)
    saved(make(), tmp_path / name, "hf")  # a folder of that name wins
    assert vit.load_pretrained(name).config == make().config


def test_overrides_win(tmp_path):
    path = saved(make(), tmp_path / "model.pt", "timm")
    found = vit.load_pretrained(path, num_classes=7, img_size=48, num_heads=6)
    assert found.head.weight.shape == (7, 192) and found.config.img_size == (48, 48) and found.config.num_heads == 6
    with pytest.raises(TypeError, match="did you mean 'num_heads'"):
        vit.load_pretrained(path, heads=6)


OTHER = {  # every field of ViTConfig, unlike `make`
    "img_size": (16, 64), "patch_size": (8, 4), "in_chans": 4, "num_classes": 7, "global_pool": "", "embed_dim": 96,
    "depth": 1, "num_heads": 6, "mlp_ratio": 7 / 3, "qkv_bias": False, "qk_norm": True, "init_values": 0.3,
    "class_token": False, "no_embed_class": True, "reg_tokens": 2, "pre_norm": True, "final_norm": False,
    "fc_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-3, "use_mask_token": True, "representation_size": 24,
    "dynamic_img_size": True, "interpolation": "bicubic", "drop_rate": 0.1, "pos_drop_rate": 0.2,
    "proj_drop_rate": 0.3, "act_drop_rate": 0.15, "attn_drop_rate": 0.25, "drop_path_rate": 0.35,
    "patch_drop_rate": 0.45, "weight_init": "jax", "impl": "reference",
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("field", vit.ViTConfig.__dataclass_fields__)
def test_every_field_comes_back(field, tmp_path):
    pool = {"global_pool": "avg"} if field == "class_token" else {}
    model = make(**{field: OTHER[field]} | pool)
    assert getattr(model.config, field) != getattr(make().config, field)
    image = torch.randn(1, model.config.in_chans, *model.config.img_size)
    for suffix in (".pt", ".npz", ".safetensors"):
        path = tmp_path / f"m{suffix}"
        vit.save_pretrained(model, path)
        found = vit.load_pretrained(path)
        assert found.config == model.config
        assert torch.equal(found.eval()(image), model(image))


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors", ""])
def test_what_a_file_says_is_compared_with_the_model(suffix, tmp_path):
    path = saved(make(num_heads=6, patch_drop_rate=0.5, drop_rate=0.1), tmp_path / f"m{suffix}", "hf")
    for target, options in ((make(), {}), ("vit_tiny_patch16_224", SIZES)):
        before = {k: t.clone() for k, t in target.state_dict().items()} if options == {} else {}
        with pytest.raises(vit.CheckpointError, match=r"num_(attention_)?heads=6, the model has num_heads=3"):
            vit.load_pretrained(target, path, **options)
        assert all(torch.equal(before[k], target.state_dict()[k]) for k in before)
    named = vit.load_pretrained("vit_tiny_patch16_224", path, **SIZES, num_heads=6, drop_rate=0.3).config
    assert (named.patch_drop_rate, named.drop_rate, named.img_size) == (0.5, 0.3, (32, 32))
    live = vit.load_pretrained(make(num_heads=6, drop_rate=0.2), path).config
    assert (live.patch_drop_rate, live.drop_rate) == (0.0, 0.2)  # its own


def test_another_pooling_before_the_same_head(tmp_path):
    path = saved(make(global_pool="avg", fc_norm=False), tmp_path / "m.pt", "timm")
    with pytest.raises(vit.CheckpointError, match="reads global_pool='avg', not the model's 'token'"):
        vit.load_pretrained(make(), path)
    assert vit.load_pretrained("vit_tiny_patch16_224", path, **SIZES).config.global_pool == "avg"
    assert vit.load_pretrained(make(), path, num_classes=9).config.global_pool == "token"
    assert vit.load_pretrained(make(global_pool=""), path).config.global_pool == ""


def test_a_head_that_is_not_the_notes(tmp_path):
    state = make().state_dict()
    state._metadata[""]["fused_vit"] = vit.weights.note.write(make(num_classes=7).config, None)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(vit.CheckpointError, match="says num_classes=7, but has a head of 5 classes"):
        vit.load_pretrained(tmp_path / "m.pt")


def test_what_cannot_be_told(tmp_path):
    odd = foreign(make(embed_dim=48), tmp_path / "odd.pt")
    clip = foreign(make(pre_norm=True), tmp_path / "clip.pt")
    wide = foreign(make(img_size=(16, 32)), tmp_path / "wide.pt")
    oblong = foreign(make(img_size=(16, 48)), tmp_path / "oblong.pt")
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7)}, tmp_path / "resnet.pt")
    for path, reason in (
        (odd, "how many heads its width of 48 has; name the model or pass num_heads="),
        (clip, "which GELU.*act_layer="),
        (wide, "position embedding has 9 rows.*grid_size="),
        (oblong, "position embedding has 13 rows.*grid_size="),
        (tmp_path / "resnet.pt", "no ViT in a known dialect"),
    ):
        with pytest.raises(vit.CheckpointError, match=reason):
            vit.load_pretrained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vit.load_pretrained(odd, num_heads=3).config.num_heads == 3
        config = vit.load_pretrained(clip, num_heads=3, act_layer="quick_gelu").config
        assert (config.act_layer, config.norm_eps) == ("quick_gelu", 1e-5)
        for path, grid in ((wide, (2, 4)), (oblong, (2, 6))):
            config = vit.load_pretrained(path, num_heads=3, grid_size=grid).config
            assert config.grid_size == grid and not config.no_embed_class
        config = vit.load_pretrained(wide, num_heads=3, grid_size=3).config
        assert config.grid_size == (3, 3) and config.no_embed_class
    with pytest.raises(vit.CheckpointError, match=r"9 rows; that is not 4\*4"):
        vit.load_pretrained(wide, grid_size=4)
    with pytest.raises(ValueError, match=r"grid_size='4' must be an integer"):
        vit.load_pretrained(wide, grid_size="4")


def test_the_number_of_heads_is_assumed_aloud(tmp_path):
    """One short warning, only for foreign files that do not state it."""
    for suffix, dialect in ((".pt", "timm"), (".npz", "torchvision"), (".pt", "hf")):
        path = foreign(make(), tmp_path / f"m{suffix}", dialect)
        with pytest.warns(UserWarning, match="3 are assumed, as vit_tiny has; pass num_heads=") as caught:
            assert vit.load_pretrained(path).config.num_heads == 3
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vit.load_pretrained(path, num_heads=6)
            vit.load_pretrained("vit_tiny_patch16_224", path, **SIZES)
            vit.load_pretrained(saved(make(num_heads=6), tmp_path / "ours.npz", dialect))
            vit.load_pretrained(foreign(make(act_layer="gelu_tanh"), tmp_path / "g.npz", "google"))
    folder = saved(make(num_heads=6), tmp_path / "folder", "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["fused_vit"]
    (folder / "config.json").write_text(json.dumps(config))
    model = vit.load_pretrained("vit_tiny_patch16_224", folder, **SIZES, num_heads=6)
    vit.weights.files.write(folder / "model.safetensors", hf_names(model, tmp_path), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vit.load_pretrained(folder).config.num_heads == 6  # config.json tells
    path = foreign(make(num_heads=6, global_pool="avg", fc_norm=False), tmp_path / "model.pt")
    timm = {"architecture": "vit", "global_pool": "avg", "model_args": {"num_heads": 6}}
    (tmp_path / "timm").mkdir()
    path.rename(tmp_path / "timm" / "pytorch_model.bin")
    (tmp_path / "timm" / "config.json").write_text(json.dumps(timm))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = vit.load_pretrained(tmp_path / "timm").config
    assert (config.num_heads, config.global_pool) == (6, "avg")


def test_classify_from_the_command_line(tmp_path, capsys):
    model = make()
    model.pretrained_cfg = {"source": "hf", "mean": (0.5,) * 3, "std": (0.5,) * 3, "label_names": list("abcde")}
    folder = saved(model, tmp_path / "folder", "hf")
    assert main(["classify", str(PHOTO), "--weights", str(folder), "--top", "5"]) == 0
    said = capsys.readouterr().out
    assert all(f"{letter} ({index})" in said for index, letter in enumerate("abcde"))
    google = saved(make(act_layer="gelu_tanh"), tmp_path / "model.npz", "google")
    assert main(["classify", str(PHOTO), "--weights", str(google)]) == 0
    assert "indices" in capsys.readouterr().out
    plain = saved(make(), tmp_path / "plain.pt", "timm")
    assert main(["classify", str(PHOTO), "--weights", str(plain)]) == 2
    assert "--preprocess" in capsys.readouterr().err
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nothing")
    assert main(["classify", str(PHOTO), "--weights", str(tmp_path / "broken.npz")]) == 2
    said = capsys.readouterr().err
    assert "broken.npz" in said and len(said.splitlines()) == 1


def test_parity_of_a_file(tmp_path, capsys):
    path = saved(make(depth=1), tmp_path / "model.safetensors", "timm")
    assert main(["parity", "--model", str(path), "--batch-size", "1"]) == 0
    assert "Parity: pass" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "patch"), [((16, 64), 8), ((64, 16), 8), ((8, 32), (2, 8))])
def test_timms_config_says_height_and_width(size, patch, tmp_path):
    """timm's config.json has input_size = (channels, height, width); without it, 16 patches mean a square."""
    model = make(img_size=size, patch_size=patch)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, *size]}}))
    found = vit.load_pretrained(tmp_path, num_heads=3).eval()
    assert found.config.img_size == size
    image = torch.randn(2, 3, *size)
    assert torch.equal(found(image), model(image))


FOREIGN = {  # parts that the tensors of a foreign file reveal: the model's fields, and fields that come back different
    "registers": ({"reg_tokens": 3}, {}),
    "registers without rows": ({"reg_tokens": 2, "no_embed_class": True}, {}),
    "LayerScale": ({"init_values": 0.3}, {"init_values": 1e-5}),
    "no bias of q, k, v": ({"qkv_bias": False}, {}),
    "qk_norm": ({"qk_norm": True}, {}),
    "pre_norm": ({"pre_norm": True, "norm_eps": 1e-5}, {}),
    "mask token": ({"use_mask_token": True}, {}),
    "hidden layer": ({"representation_size": 24}, {}),
    "no class token": (GAP, {}),
    "norm after pooling": ({"class_token": False, "global_pool": "avg"}, {"fc_norm": True}),
    "norm after pooling, class token": ({"global_pool": "avg"}, {"fc_norm": True}),
    "no final norm": ({"final_norm": False}, {"final_norm": False}),
    "no head": ({"num_classes": 0}, {}),
    "two channels": ({"in_chans": 2}, {}),
    "deep and odd": ({"depth": 3, "mlp_ratio": 0.6875}, {}),
    "patch that is not square": ({"patch_size": (8, 4), "img_size": (16, 8)}, {}),
}


@pytest.mark.parametrize("by_name", [False, True], ids=["alone", "named"])
@pytest.mark.parametrize("part", FOREIGN)
def test_parts_that_a_file_of_others_shows(part, by_name, tmp_path):
    """The whole configuration by hand, and the output of the model that wrote it."""
    fields, found_by = FOREIGN[part]
    model = make(**fields)
    path = foreign(model, tmp_path / "m.pt")
    asked = {"num_heads": 3} | ({"act_layer": "gelu"} if part == "pre_norm" else {})
    if by_name:
        args = ["vit_tiny_patch16_224"]
        asked |= SIZES | {k: v for k, v in fields.items() if k in ("depth", "mlp_ratio", "patch_size", "img_size")}
        asked |= {"norm_eps": 1e-5} if part == "pre_norm" else {}
        asked |= {"in_chans": 2} if part == "two channels" else {}
    else:
        args = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = vit.load_pretrained(*args, path, **asked).eval()
    want = {"fc_norm": False, "interpolation": "bicubic_antialias"} | found_by
    assert vars(found.config) == vars(model.config) | want
    image = torch.randn(2, model.config.in_chans, *model.config.img_size)
    with torch.no_grad():
        assert torch.equal(found(image), model(image))


@pytest.mark.parametrize(("width", "size", "heads"), [(192, "tiny", 3), (384, "small", 6), (512, "medium", 8),
    (768, "base", 12), (1024, "large", 16), (1152, "so400m", 16), (1280, "huge", 16), (1408, "giant", 16)])  # fmt: skip
def test_heads_that_a_width_usually_has(width, size, heads, tmp_path):
    config = vit.ViTConfig(
        img_size=8, patch_size=8, embed_dim=width, depth=1, num_heads=1, num_classes=0, mlp_ratio=0.01
    )
    torch.save(dict(vit.VisionTransformer(config, seed=0).state_dict()), tmp_path / "m.pt")
    with pytest.warns(
        UserWarning, match=f"it does not say how many heads it has: {heads} are assumed, as vit_{size} has"
    ):
        assert vit.load_pretrained(tmp_path / "m.pt").config.num_heads == heads


@pytest.mark.parametrize("patch", [[8, 4], [4, 8], 8])
@pytest.mark.parametrize("image", [[16, 32], [32, 16], 32])
def test_config_json_of_hugging_face_says_heights_before_widths(image, patch, tmp_path):
    size, sides = (tuple(x) if isinstance(x, list) else (x, x) for x in (image, patch))
    model = make(img_size=size, patch_size=sides)
    torch.save(hf_names(model, tmp_path), tmp_path / "pytorch_model.bin")
    told = {"image_size": image, "patch_size": patch, "num_attention_heads": 3, "hidden_dropout_prob": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(told))
    found = vit.load_pretrained(tmp_path, norm_eps=1e-6).eval()
    assert (found.config.img_size, found.config.patch_size) == (size, sides)
    assert (found.config.pos_drop_rate, found.config.proj_drop_rate, found.config.attn_drop_rate) == (0.25, 0.25, 0.0)
    image = torch.randn(2, 3, *size)
    assert torch.equal(found(image), model(image))
    smaller = make(img_size=sides, patch_size=sides)  # resized to one patch from config.json's grid
    vit.load_pretrained(smaller, tmp_path)
    grid = (size[0] // sides[0], size[1] // sides[1])
    want = vit.reference.interpolate_pos_embed(model.pos_embed, grid, (1, 1), "bicubic")
    torch.testing.assert_close(smaller.pos_embed, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heads", [3, 12])
def test_config_json_without_heads_means_twelve(heads, tmp_path):
    """As in transformers; 224 pixels and patches of 16 likewise."""
    model = make(num_heads=heads, img_size=224, patch_size=16, depth=1)
    torch.save(hf_names(model, tmp_path), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"hidden_size": 192}')
    target = make(num_heads=heads, img_size=224, patch_size=16, depth=1)
    if heads == 12:
        assert torch.equal(vit.load_pretrained(target, tmp_path).pos_embed, model.pos_embed)
    else:
        with pytest.raises(vit.CheckpointError, match="says num_attention_heads=12, the model has num_heads=3"):
            vit.load_pretrained(target, tmp_path)


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"])
def test_what_an_architecture_cannot_be_told_without(name, tmp_path):
    state = dict(make().state_dict())
    del state[name]
    torch.save(state, tmp_path / "m.pt")
    told = "no ViT in a known dialect|dialect 'timm' it has no patch projection, MLP or position embedding"
    with pytest.raises(vit.CheckpointError, match=told):
        vit.load_pretrained(tmp_path / "m.pt", dialect=None if "proj" in name else "timm")


@pytest.mark.parametrize(("told", "want"), [("avg", "avg"), ("token", "token"), ("map", "token"), ("", "token")])
def test_pooling_that_timms_config_says(told, want, tmp_path):
    torch.save(dict(make().state_dict()), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"global_pool": told, "model_args": {"num_heads": 6}}))
    config = vit.load_pretrained(tmp_path).config
    assert (config.global_pool, config.num_heads, config.use_fc_norm) == (want, 6, False)
    assert vit.load_pretrained(tmp_path, num_heads=3, global_pool="").config.global_pool == ""
    assert vit.load_pretrained(tmp_path, num_heads=3).config.num_heads == 3


def test_a_new_head_is_made_where_the_model_is_whatever_the_default_device(tmp_path):
    path = saved(make(), tmp_path / "model.pt", "timm")
    live = make()
    with torch.device("meta"):
        named = vit.load_pretrained(path, num_heads=3, device="cpu", num_classes=9)
        vit.load_pretrained(live, path, num_classes=9)
    for model in (named, live):
        assert model.head.weight.device.type == "cpu" and not model.head.weight.any() and model.head.out_features == 9
