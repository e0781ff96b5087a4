"""Files that hold checkpoints: what is around the tensors, what must not load, and what a dialect cannot hold."""

import argparse
import builtins
import json
import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from test_weights import GAP, SMALL, SUFFIXES, bits, image, load, make, save

import vit
from vit.config import ViTConfig


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda s: {"model": s, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model": {"junk": torch.ones(1)}, "model_ema": s},
        lambda s: {"model_ema": 0.999, "model": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
        lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    ],
)
def test_wrappers(wrap, tmp_path):
    model = make()
    torch.save(wrap(model.state_dict()), tmp_path / "m.pth")
    assert bits(load(make(seed=1), tmp_path / "m.pth")) == bits(model)


def test_block_chunks_of_dinov2(tmp_path):
    model = make(num_classes=0, init_values=0.1)
    path = save(model, tmp_path / "m.pt", "dinov2")
    state = torch.load(path, weights_only=True)
    chunks = {k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for k, v in state.items()}
    assert any("blocks.1.1.ls2.gamma" in k for k in chunks) and chunks["mask_token"].shape == (1, 32)
    torch.save(chunks, path)
    assert bits(load(make(num_classes=0, init_values=0.1, seed=1), path)) == bits(model)


def test_shards_and_folders(tmp_path):
    model = make()
    state = torch.load(save(model, tmp_path / "all.pt", "hf"), weights_only=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    names = sorted(state)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, keys in parts.items():
        torch.save({k: state[k] for k in keys}, folder / file)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {k: file for file, keys in parts.items() for k in keys}}))
    for path in (folder, index):
        assert bits(load(make(seed=1), path)) == bits(model)
    index.write_text(json.dumps({"weight_map": {names[0]: "../all.pt"}}))
    with pytest.raises(vit.CheckpointError, match=r"not a file beside it"):
        vit.load_pretrained(model, folder)
    index.write_text(json.dumps({"weight_map": {"head": "a.bin"}}))
    with pytest.raises(vit.CheckpointError, match=r"the shards lack head"):
        vit.load_pretrained(model, folder)


def test_folder_of_hugging_face(tmp_path):
    pytest.importorskip("safetensors")
    model = make(act_layer="quick_gelu", norm_eps=3e-5, img_size=(16, 48))
    model.pretrained_cfg = {
        "source": "hf",
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 2.0, 3.0),
        "label_names": list("abcde"),
    }
    vit.save_pretrained(model, tmp_path / "new", "hf")
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    again = vit.load_pretrained(make(seed=1, img_size=(16, 48)), tmp_path / "new")
    assert torch.equal(again(image(model)), model(image(model)))
    assert again.pretrained_cfg["label_names"] == list("abcde") and tuple(again.pretrained_cfg["mean"]) == (
        0.1,
        0.2,
        0.3,
    )
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert ViTConfig.from_hf(config) == again.config.__class__(**vars(again.config) | {"interpolation": "bicubic"})
    resized = load(make(), tmp_path / "new")  # 2*6 patches are no square: config.json says which grid
    want = vit.reference.interpolate_pos_embed(model.pos_embed, (2, 6), (4, 4), model.config.interpolation)
    torch.testing.assert_close(resized.pos_embed, want, rtol=0, atol=1e-5)
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    named = load("vit_tiny_patch16_224", tmp_path / "new", **sizes)
    torch.testing.assert_close(named.pos_embed, want, rtol=0, atol=1e-5)
    with pytest.raises(vit.CheckpointError, match=r"num_attention_heads=2, the model has num_heads=4"):
        vit.load_pretrained(make(num_heads=4, img_size=(16, 48)), tmp_path / "new")
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    with pytest.raises(vit.CheckpointError, match=r"hidden_act='silu'"):
        vit.load_pretrained(model, tmp_path / "new")


def test_names_of_a_hub(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such file"):
        vit.load_pretrained(make(), tmp_path / "nothing.pt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install fused-vit\[hub\]"):
        vit.load_pretrained(make(), "some-org/some_vit-b.16")
    model = make()

    def snapshot_download(name, allow_patterns):
        assert name == "some-org/some_vit-b.16"
        if "pytorch_model*.bin" in allow_patterns:
            save(model, tmp_path / "pytorch_model.bin", "hf")
        return str(tmp_path)

    hub = types.ModuleType("huggingface_hub")
    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert bits(load(make(seed=1), "some-org/some_vit-b.16")) == bits(model)


def test_without_safetensors(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "m.safetensors").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", missing)
    for call in (vit.load_pretrained, vit.save_pretrained):
        with pytest.raises(ImportError, match=r"pip install fused-vit\[weights\]"):
            call(make(), tmp_path / "m.safetensors")


# What must not load


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def resnet_like():
    return {"conv1.weight": torch.ones(8, 3, 7, 7), "layer1.0.bn1.weight": torch.ones(8), "fc.weight": torch.ones(5, 8)}


def swin_like():
    names = (
        "patch_embed.proj.weight",
        "patch_embed.norm.weight",
        "layers.0.blocks.0.attn.qkv.weight",
        "head.fc.weight",
    )
    return {name: torch.ones(4, 4) for name in names}


def changed(**edits):
    """A state dict of ours with entries replaced, or removed for None."""
    state = dict(make().state_dict())
    for key, value in edits.items():
        name = key.replace("__", ".")
        state[name] = value(state.get(name)) if callable(value) else value
        if state[name] is None:
            del state[name]
    return state


def without_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_header(path):
    data = bytearray(path.read_bytes())
    data[:16] = b"\xff" * 16
    path.write_bytes(bytes(data))


BAD_STATES = {
    "ResNet": (resnet_like, "no ViT in a known dialect"),
    "Swin": (swin_like, "no ViT in a known dialect"),
    "empty": (dict, "holds no tensors"),
    "list": (lambda: [torch.ones(3)], "holds a list"),
    "number": (lambda: {"a": 3}, "holds a int under 'a'"),
    "other depth": (lambda: make(depth=3).state_dict(), "it has 3 blocks, the model depth=2"),
    "other width": (lambda: make(embed_dim=48).state_dict(), "it has cls_token of shape"),
    "other patch": (lambda: make(patch_size=16).state_dict(), "patch_embed.proj.weight of shape"),
    "LayerScale": (lambda: make(init_values=0.1).state_dict(), "it has blocks.0.ls1.gamma"),
    "registers": (lambda: make(reg_tokens=3).state_dict(), "it has reg_token"),
    "another block": (lambda: changed(blocks__0__attn__extra=torch.ones(2)), "it has blocks.0.attn.extra"),
    "mis-shaped": (lambda: changed(norm__weight=torch.ones(31)), r"norm.weight of shape \(31,\) instead of \(32,\)"),
    "a head too narrow": (lambda: changed(head__weight=torch.ones(5, 31)), r"head.weight of shape \(5, 31\)"),
    "half a head": (lambda: changed(head__bias=None), "it lacks head.bias"),
    "missing": (lambda: changed(blocks__1__mlp__fc2__bias=None), "it lacks blocks.1.mlp.fc2.bias"),
    "no position embedding": (lambda: changed(pos_embed=None), "it lacks what dialect 'timm' calls"),
    "position embedding": (lambda: changed(pos_embed=torch.ones(1, 17, 31)), r"\(1, 17, 31\), not \(1, tokens, 32\)"),
    "no rows": (lambda: changed(pos_embed=torch.ones(1, 0, 32)), "0 rows"),
    "integers": (lambda: changed(norm__weight=lambda t: t.int()), "norm.weight is torch.int32"),
    "sparse": (lambda: changed(head__weight=lambda t: t.to_sparse()), "not a plain tensor"),
    "meta": (lambda: changed(head__weight=lambda t: t.to("meta")), "not a plain tensor"),
}


def assert_refused(path, match):
    model = make(seed=3)
    before, config = bits(model), model.config
    with pytest.raises(vit.CheckpointError, match=match) as caught:
        vit.load_pretrained(model, path)
    assert bits(model) == before and model.config is config and model.norm.eps == config.norm_eps
    assert str(path) in str(caught.value) and caught.value.path and "\n" not in caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("case", BAD_STATES)
def test_checkpoints_that_do_not_fit(case, tmp_path):
    state, match = BAD_STATES[case]
    torch.save(state(), tmp_path / "m.pt")
    assert_refused(tmp_path / "m.pt", match)


def test_pickled_model(tmp_path):
    torch.save(make(), tmp_path / "m.pt")
    assert_refused(tmp_path / "m.pt", r"holds pickled objects.*save model.state_dict\(\)")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".bin"])
@pytest.mark.parametrize(
    "damage", [without_half, flipped_header, lambda p: p.write_bytes(b""), lambda p: p.write_text("x")]
)
def test_damaged_files(damage, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = save(make(), tmp_path / f"m{suffix}")
    damage(path)
    assert_refused(path, "damaged|npz")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pt", "legacy pt", "plain pickle", "npz", "npy"])
def test_pickle_bombs_do_not_run(kind, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "m.pt"
    state = changed(bomb=Bomb(marker))
    if kind == "pt":
        torch.save(state, path)
    elif kind == "legacy pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "plain pickle":
        path.write_bytes(pickle.dumps({"head.weight": Bomb(marker)}))
    else:
        path = tmp_path / "m.npz"
        array = np.array([Bomb(marker)], dtype=object)
        with path.open("wb") as file:
            np.savez(file, a=array) if kind == "npz" else np.save(file, array)
    assert_refused(path, ".")
    assert not marker.exists()


def test_other_paths(tmp_path):
    (tmp_path / "m.h5").write_text("x")
    assert_refused(tmp_path / "m.h5", "unknown kind of file")
    (tmp_path / "folder").mkdir()
    assert_refused(tmp_path / "folder", "the folder has none of")
    (tmp_path / "m.index.json").write_text("[1]")
    assert_refused(tmp_path / "m.index.json", ".")


def test_wrong_number_of_heads_in_flax(tmp_path):
    path = save(make(num_heads=4), tmp_path / "m.npz", "google")
    assert_refused(path, "4 heads, the model num_heads=2")


def test_wrong_arguments(tmp_path):
    path = save(make(), tmp_path / "m.pt")
    with pytest.raises(TypeError, match=r"expected a vit.VisionTransformer, got torch.nn.modules.linear.Linear"):
        vit.load_pretrained(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"unknown model 'vit_tny"):
        vit.load_pretrained("vit_tny_patch16_224", path)
    with pytest.raises(ValueError, match=r"dialect='flax' is unknown"):
        vit.load_pretrained(make(), path, dialect="flax")
    with pytest.raises(ValueError, match=r"norm_eps=-1"):
        vit.load_pretrained(make(), path, norm_eps=-1)
    with pytest.raises(ValueError, match=r"depth=3 cannot be changed"):
        vit.load_pretrained(make(), path, depth=3)
    with pytest.raises(ValueError, match=r"meta device"):
        vit.load_pretrained(vit.VisionTransformer(ViTConfig(**SMALL), device="meta"), path)
    with pytest.raises(vit.CheckpointError, match=r"dialect 'google' calls"):
        vit.load_pretrained(make(), path, dialect="google")
    wrapped = make()
    wrapped.blocks[0].mlp.fc1.register_parameter("lora", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(vit.CheckpointError, match=r"fc1.lora is not as its config says"):
        vit.load_pretrained(wrapped, path)


@pytest.mark.parametrize(
    ("dialect", "fields", "match"),
    [
        ("google", {"init_values": 0.1}, "'google' has no place for blocks.0.ls1.gamma"),
        ("google", {"qkv_bias": False}, "'google' needs blocks.0.attn.qkv.bias"),
        ("google", {"pre_norm": True}, "'google' needs patch_embed.proj.bias"),
        ("google", {"global_pool": "avg"}, "'google' pools 'token'"),
        ("big_vision", {}, "no position embedding for class"),
        ("hf", {"reg_tokens": 3}, "no position embedding for class or register"),
        ("hf", {"reg_tokens": 3, "no_embed_class": True}, "'hf' has no place for reg_token"),
        ("hf", {"representation_size": 24}, "no head with a hidden layer"),
        ("hf_memory", GAP, "'hf_memory' needs cls_token"),
        ("torchvision", {"use_mask_token": True}, "'torchvision' has no place for mask_token"),
        ("torchvision_old", {"qk_norm": True}, "no place for blocks.0.attn.k_norm.bias"),
        ("dinov2", {}, "'dinov2' has no place for head.bias, head.weight"),
        ("onnx", {}, "dialect='onnx' is unknown"),
    ],
)
def test_what_a_dialect_cannot_hold(dialect, fields, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        vit.save_pretrained(make(**fields), tmp_path / "m.npz", dialect)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mode_of_the_file(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    (tmp_path / "other").touch()
    path = save(make(), tmp_path / f"m{suffix}")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = save(make(), tmp_path / "m.npz")
    before = path.read_bytes()

    def fails(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fails)
    with pytest.raises(OSError, match=r"disk full"):
        vit.save_pretrained(make(seed=1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["m.npz"]
    for bad in (tmp_path / "m.h5", tmp_path / "noname", tmp_path):
        with pytest.raises(ValueError, match=r"suffix|folder"):
            vit.save_pretrained(make(), bad)
    with pytest.raises(TypeError, match=r"expected a vit.VisionTransformer"):
        vit.save_pretrained(torch.nn.Linear(2, 2), path)
