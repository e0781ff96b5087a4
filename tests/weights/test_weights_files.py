"""Checkpoint files: wrappers of the tensors, what must not load, and what a dialect cannot hold."""

import argparse
import builtins
import contextlib
import json
import os
import pickle
import socket
import sys
import types
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from test_weights import GAP, SMALL, SUFFIXES, bits, image, load, make, save

import vit
from vit.config import ViTConfig


def other_weights():
    return make(seed=2).state_dict()


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
        lambda s: {"n_averaged": torch.tensor(3)} | prefixed("module.", s),  # AveragedModel, SWA
        lambda s: {"state_dict": prefixed("model.", s)},  # Lightning
        lambda s: {"state_dict": prefixed("net._orig_mod.", s), "hyper_parameters": {"lr": 0.1}},
        lambda s: {
            "student": prefixed("module.backbone.", other_weights()),
            "teacher": prefixed("backbone.", s),
        },  # DINO
        lambda s: {"net": {"state_dict": s}},
        lambda s: {k.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): v for k, v in s.items()},
        lambda s: {k.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k.replace('.norm', '._fsdp_wrapped_module._orig_mod.norm')}": v for k, v in s.items()},
    ],
)
def test_wrappers(wrap, tmp_path):
    model = make()
    torch.save(wrap(dict(model.state_dict())), tmp_path / "m.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_pretrained(other := make(seed=1), tmp_path / "m.pth")
    assert bits(other) == bits(model)


@pytest.mark.parametrize("raw", ["state_dict", "model"])
@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("first", [False, True])
def test_the_average_is_taken_before_what_it_averages(raw, average, first, tmp_path):
    model = make()
    content = {average: model.state_dict(), raw: make(seed=2).state_dict()}
    torch.save(content if first else dict(reversed(content.items())), tmp_path / "m.pt")
    assert bits(load(make(seed=1), tmp_path / "m.pt")) == bits(model)


@pytest.mark.parametrize("prefix", ["backbone.", "model.vit.", "module.encoder.", "student.backbone."])
@pytest.mark.parametrize("dialect", ["timm", "hf", "torchvision"])
def test_a_vit_inside_another_model(dialect, prefix, tmp_path):
    """Lightning, DINO's head next to the backbone: a warning names what is left out; two models are an error."""
    model = make(num_classes=0)
    inner = torch.load(save(model, tmp_path / "m.pt", dialect), weights_only=True)
    state = prefixed(prefix, dict(inner)) | {"head.mlp.0.weight": torch.ones(2), "criterion.centre": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "m.ckpt.pt")
    with pytest.warns(UserWarning, match="more than a ViT: head.mlp.0.weight, criterion.centre are left out"):
        vit.load_pretrained(
            other := make(num_classes=0, seed=1, norm_eps=1e-12 if dialect == "hf" else 1e-6), tmp_path / "m.ckpt.pt"
        )
    assert bits(other) == bits(model)
    torch.save(state | prefixed("teacher.", dict(inner)), tmp_path / "m.ckpt.pt")
    assert_refused(
        tmp_path / "m.ckpt.pt", r"several models, under .*teacher\..*; save one of them alone: \{k\.removeprefix"
    )


def test_the_classifier_of_a_wrapped_model_of_hugging_face(tmp_path):
    state = torch.load(save(make(), tmp_path / "m.pt", "hf"), weights_only=True)
    torch.save(prefixed("model.", dict(state)), tmp_path / "n.pt")
    assert bits(load(make(seed=1), tmp_path / "n.pt")) == bits(make())


@pytest.mark.parametrize("decoder", [16, 32])
def test_pre_training_checkpoint_of_mae(decoder, tmp_path):
    """Its mask token is the decoder's, even if it is as wide as the encoder."""
    state = dict(make(num_classes=0).state_dict()) | {
        "mask_token": torch.ones(1, 1, decoder),
        "decoder_pos_embed": torch.ones(1, 17, decoder),
        "decoder_embed.weight": torch.ones(decoder, 32),
        "decoder_embed.bias": torch.ones(decoder),
        "decoder_blocks.0.norm1.weight": torch.ones(decoder),
        "decoder_norm.weight": torch.ones(decoder),
        "decoder_pred.weight": torch.ones(192, decoder),
    }
    torch.save({"model": state, "epoch": 3}, tmp_path / "mae.pth")
    for target in ([make(num_classes=0, seed=1)], []):
        found = load(*target, tmp_path / "mae.pth", **{} if target else {"num_heads": 2})
        assert bits(found) == bits(make(num_classes=0)) and not found.config.use_mask_token
    masked = load(make(num_classes=0, use_mask_token=True), tmp_path / "mae.pth")
    assert not masked.mask_token.any()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


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


@pytest.mark.parametrize("name", ["folder", "m.safetensors", "m.pt", "m.npz"])
def test_what_is_known_of_the_images_comes_back(name, tmp_path):
    """Through every kind of file, also in another dialect than the source's."""
    if name in ("folder", "m.safetensors"):
        pytest.importorskip("safetensors")
    model = make()
    model.pretrained_cfg = {
        "source": "torchvision", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "label_names": list("abcde"),
    }  # fmt: skip
    for dialect in ("hf",) if name == "folder" else ("timm", "hf", "torchvision"):
        save(model, tmp_path / name, dialect)
        found = load(tmp_path / name).pretrained_cfg
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()} == {
            k: list(v) if isinstance(v, tuple) else v for k, v in model.pretrained_cfg.items()
        }


@pytest.mark.parametrize("size", [(32, 16), (16, 32), 32])
def test_the_grid_that_a_config_json_says(size, tmp_path):
    """image_size is [height, width] in transformers; the embedding is not resized."""
    pytest.importorskip("safetensors")
    model = make(img_size=size)
    save(model, tmp_path / "folder", "hf")
    config = tmp_path / "folder" / "config.json"
    told = {k: v for k, v in json.loads(config.read_text()).items() if k != "fused_vit"}
    config.write_text(json.dumps(told))
    weights = dict(load(tmp_path / "folder").state_dict())
    vit.save_pretrained(model, tmp_path / "plain.pt", "hf")
    tensors = dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    (tmp_path / "folder" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "folder" / "pytorch_model.bin")  # it has no note
    assert told["image_size"] == (list(size) if isinstance(size, tuple) else size)
    for found in (
        weights,
        load(tmp_path / "folder").state_dict(),
        load(make(img_size=size, seed=1), tmp_path / "folder").state_dict(),
    ):
        assert torch.equal(found["pos_embed"], model.pos_embed)


@pytest.mark.parametrize("count", [5, 12, 101])
def test_class_names_have_the_order_of_their_numbers(count, tmp_path):
    """JSON keeps them as text, in any order, and "10" sorts before "2"."""
    names = [f"class {(7 * i) % count}" for i in range(count)]
    vit.save_pretrained(make(num_classes=count), tmp_path / "folder", "hf")
    config = tmp_path / "folder" / "config.json"
    told = json.loads(config.read_text()) | {"id2label": {str(i): names[i] for i in reversed(range(count))}}
    config.write_text(json.dumps(told))
    model = load(tmp_path / "folder")
    assert model.pretrained_cfg["label_names"] == names
    vit.save_pretrained(model, tmp_path / "again", "hf")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert [again["id2label"][str(i)] for i in range(count)] == names
    assert again["label2id"] == {name: i for i, name in enumerate(names)}


def test_a_folder_that_others_changed(tmp_path):
    """transformers keeps unknown keys: after its own training our note is out of date."""
    pytest.importorskip("safetensors")
    model = make(interpolation="bicubic_antialias", drop_rate=0.2)
    model.pretrained_cfg = {"source": "hf", "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    vit.save_pretrained(model, tmp_path, "hf")
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written["fused_vit"]["drop_rate"] == 0.2
    prepare = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (prepare["image_mean"], prepare["image_std"]) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    tensors = torch.load(save(model, tmp_path / "m.pt", "hf"), weights_only=True)
    vit.weights.files.write(tmp_path / "model.safetensors", tensors, {})  # as transformers does: no note in it
    assert vit.load_pretrained(tmp_path).config == model.config
    changes = {"layer_norm_eps": 1e-3, "hidden_act": "quick_gelu", "num_attention_heads": 4, "image_size": [64, 16]}
    for word, value in changes.items():
        path.write_text(json.dumps(written | {word: value}))
        with pytest.warns(UserWarning, match="config.json was changed"):
            found = vit.load_pretrained(tmp_path).config
        theirs = ViTConfig.from_hf(written | {word: value})
        assert found == ViTConfig(**vars(theirs) | {"interpolation": "bicubic", "act_drop_rate": 0.0, "fc_norm": False})
    for key in ("mean", "std"):  # as in any foreign folder
        assert load(tmp_path).pretrained_cfg[key] == model.pretrained_cfg[key]


HOSTILE = {
    "no number": {"norm_eps": "small"},
    "huge depth": {"depth": 10**9},
    "huge image": {"img_size": [10**6, 10**6]},
    "too deep": {"depth": 9_999},
    "another grid": {"img_size": [64, 64]},
    "heads that do not divide": {"num_heads": 5},
    "other classes": {"num_classes": 7},
    "NaN": {"mlp_ratio": float("nan")},
    "mean is text": {"pretrained_cfg": {"mean": "a"}},
    "cfg is a list": {"pretrained_cfg": [1]},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", HOSTILE)
def test_notes_that_no_model_has(case, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model = make()
    note = vit.weights.note.write(model.config, None)
    vit.weights.files.write(tmp_path / f"m{suffix}", dict(model.state_dict()), note | HOSTILE[case])
    by_name = [] if case in ("another grid", "other classes", "too deep") else [["vit_tiny_patch16_224"]]
    for target in ([], *by_name):  # a named model ignores those cases
        sizes = {k: v for k, v in SMALL.items() if target and k != "num_classes"}
        with pytest.raises(vit.CheckpointError):
            vit.load_pretrained(*target, tmp_path / f"m{suffix}", **sizes)
    vit.weights.files.write(tmp_path / f"m{suffix}", dict(model.state_dict()), note | {"rope": True})
    with pytest.warns(UserWarning, match="it says rope of its model, which this version does not know"):
        assert vit.load_pretrained(tmp_path / f"m{suffix}").config == model.config


def test_notes_that_are_not_plain(tmp_path):
    state = make().state_dict()
    ring = {}
    ring["pretrained_cfg"] = ring
    for note in (ring, {"norm_eps": torch.ones(1)}):
        state._metadata = {"": {"fused_vit": note}}
        torch.save(state, tmp_path / "m.pt")
        assert_refused(tmp_path / "m.pt", "Circular|not JSON serializable")
    with np.load(save(make(), tmp_path / "m.npz")) as file:
        np.savez(tmp_path / "n.npz", **file)
    for comment in (b"hello", b"[1]", b"{}", b"\xff", b"null", b'{"fused_vit": 3}'):
        with zipfile.ZipFile(tmp_path / "n.npz", "a") as archive:
            archive.comment = comment
        assert bits(load(make(seed=1), tmp_path / "n.npz")) == bits(make())
    model = make()
    model.pretrained_cfg = {"source": "timm", "label_names": ["a long name of a class"] * 9000}
    save(model, tmp_path / "long.npz")  # more than a comment can hold
    assert load(tmp_path / "long.npz").config == model.config
    model.pretrained_cfg = {"mean": torch.ones(3)}
    with pytest.raises(TypeError):
        vit.save_pretrained(model, tmp_path / "new", "hf")
    assert not (tmp_path / "new").exists()


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


def ring(of):
    """A container that holds itself under the name of a wrapper."""
    outer = of()
    outer["model"] = outer
    return outer


def nested(depth):
    state = changed()
    for _ in range(depth):
        state = {"model": state}
    return state


BAD_STATES = {
    "a ring": (lambda: ring(dict), "holds a dict under 'model' where tensors are expected; save the part"),
    "an ordered ring": (lambda: ring(OrderedDict), "holds a OrderedDict under 'model'"),
    "a larger ring": (lambda: {"state_dict": ring(dict)}, "holds a dict under 'model'"),
    "deep": (lambda: nested(100), "holds a dict under 'model'"),
    "unknown wrapper": (lambda: {"weights": changed()}, "holds a dict under 'weights'.*save the part with the tensors"),
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
    "missing and more": (
        lambda: changed(norm__weight=None, blocks__1__norm1__bias=None, extra=torch.ones(2), norm__bias=torch.ones(3)),
        r"not fit the model: it lacks blocks.1.norm1.bias, norm.weight, and it has extra, norm.bias of shape \(3,\)",
    ),
    "five more": (lambda: changed(**{f"extra{i}": torch.ones(2) for i in range(5)}), "extra2, extra3 and 1 more$"),
    "four more": (lambda: changed(**{f"extra{i}": torch.ones(2) for i in range(4)}), "it has .*extra2, extra3$"),
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


def test_a_list_that_holds_itself(tmp_path):
    outer = []
    outer.append(outer)
    for content in (outer, {"model": outer}):
        torch.save(content, tmp_path / "m.pt")
        assert_refused(tmp_path / "m.pt", "holds a list")


def test_very_deep_files(tmp_path):
    """Nested 100,000 times: written by hand, because no writer gets that far."""
    marker = b"}X\x05\x00\x00\x00model"
    content = b"\x80\x02" + marker * 100_000 + b"}" + b"s" * 100_000 + b"."
    torch.save({}, tmp_path / "empty.pt")
    with zipfile.ZipFile(tmp_path / "empty.pt") as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    assert_refused(tmp_path / "m.pt", "holds a dict under 'model'")
    header = json.dumps({"__metadata__": {"fused_vit": "[" * 100_000}}).encode()
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert_refused(tmp_path / "m.safetensors", ".")
    (tmp_path / "m.index.json").write_text("[" * 100_000)
    assert_refused(tmp_path / "m.index.json", ".")


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".bin"])
def test_a_refused_file_is_closed(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    path = save(make(), tmp_path / f"m{suffix}")
    for damage in (without_half, lambda p: p.write_bytes(b"PK\x03\x04x"), lambda p: p.write_bytes(b"x")):
        damage(path)
        try:
            vit.load_pretrained(make(), path)
        except vit.CheckpointError:
            opened = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
            held = [os.readlink(link) for link in opened if os.path.islink(link)]
            assert str(path) not in held


@pytest.mark.parametrize("name", ["m.safetensors", "m.npz", "m.pt", "m.bin", "m.index.json"])
def test_what_is_no_regular_file(name, tmp_path):
    """Opening a pipe would block: each is refused before that."""
    os.mkfifo(tmp_path / name)
    assert_refused(tmp_path / name, "is not a regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    assert_refused(tmp_path / name, "is not a regular file")
    (tmp_path / name).unlink()
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):  # its path may not be long
        server.bind(name)
        assert_refused(tmp_path / name, "is not a regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert_refused(tmp_path / name, "the folder has none of")


def test_what_is_no_regular_file_in_a_folder(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert_refused(tmp_path, "the folder has none of")
    os.mkfifo(tmp_path / "a.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    for shard, reason in (("a.bin", "a.bin: is not a regular file"), ("b.bin", "b.bin: is missing")):
        index.write_text(json.dumps({"weight_map": {"x": shard}}))
        for path in (tmp_path, index):
            with pytest.raises(vit.CheckpointError, match=reason):
                vit.load_pretrained(make(), path)
    for name in ("config.json", "preprocessor_config.json"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(vit.CheckpointError, match=r"config\.json: is not a regular file"):
        vit.load_pretrained(make(), tmp_path)


FAMILIES = {  # tensor names of the libraries; test_weights_peers.py has their real files
    "a Dinov2 with SwiGLU of transformers": (
        "embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layer_scale1.lambda1",
        "encoder.layer.0.mlp.weights_in.weight"),
    "BLIP": ("vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.0.self_attn.qkv.weight"),
    "OWL-ViT": ("vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layernorm.weight"),
    "a ResNet": ("visual.conv1.weight", "visual.layer1.0.conv1.weight"),
    "CoCa": ("visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight", "visual.attn_pool.query"),
    "BEiT": ("beit.embeddings.cls_token",),
    "BEiT.*": ("cls_token", "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.q_bias"),
    "DeiT III or BEiT": ("cls_token", "patch_embed.proj.weight", "pos_embed", "blocks.0.gamma_1"),
    "a Swin Transformer": ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"),
    "DINOv3": ("cls_token", "storage_tokens", "patch_embed.proj.weight", "blocks.0.norm1.weight"),
    "DINOv3 ": ("embeddings.patch_embeddings.weight", "layer.0.layer_scale1.lambda1"),
    "a model with SwiGLU": ("patch_embed.proj.weight", "blocks.0.mlp.w12.weight"),
    "a distilled DeiT": ("patch_embed.proj.weight", "blocks.0.norm1.weight", "dist_token"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAMILIES)
def test_models_that_no_dialect_holds(what, tmp_path):
    torch.save({name: torch.ones(2, 2) for name in FAMILIES[what]}, tmp_path / "m.pt")
    for target in ([make()], [], ["vit_tiny_patch16_224"]):
        with pytest.raises(vit.CheckpointError, match=what.strip()) as caught:
            vit.load_pretrained(*target, tmp_path / "m.pt")
        assert "which load_pretrained does not read yet; load it with" in str(caught.value)
        assert str(caught.value).endswith(" and call vit.accelerate")


def test_model_type_of_a_folder(tmp_path):
    torch.save({"embeddings.x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for kind in ("swinv2", "dinov3_vit", "siglip2"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(vit.CheckpointError, match=f"this is a {kind} checkpoint of transformers"):
            vit.load_pretrained(tmp_path)


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
    with pytest.raises(ValueError, match=r"unknown model ''"):
        vit.load_pretrained("", path)
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


PARTS = {
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "LayerScale": {"init_values": 0.1},
    "no bias of q, k, v": {"qkv_bias": False},
    "pre_norm": {"pre_norm": True},
    "qk_norm": {"qk_norm": True},
    "mask token": {"use_mask_token": True},
    "hidden layer": {"representation_size": 24},
    "no class token": GAP,
    "average, class token": {"global_pool": "avg"},
    "norm after pooling": {"global_pool": "avg", "fc_norm": True} | {"class_token": False},
    "class row": {"no_embed_class": False},
    "no pooling": {"global_pool": ""},
}
HOLDS = {  # which of PARTS the libraries' models have
    "timm": set(PARTS),
    "hf": {"no bias of q, k, v", "mask token", "class row"},
    "hf_memory": {"no bias of q, k, v", "mask token", "class row"},
    "torchvision": {"hidden layer", "class row"},
    "torchvision_old": {"hidden layer", "class row"},
    "google": {"hidden layer", "no class token", "class row"},
    "big_vision": {"hidden layer", "no class token"},
    "dinov2": {"registers", "LayerScale", "no bias of q, k, v", "mask token", "class row", "no pooling"},
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dialect", HOLDS)
def test_what_each_dialect_holds(dialect, part, tmp_path):
    """A part without a place is an error, and nothing is written; the rest comes back bit for bit."""
    fields = {"num_classes": 0} if dialect == "dinov2" else {}
    fields |= {"no_embed_class": True} if dialect == "big_vision" else {}
    model = make(**fields | PARTS[part])
    if part not in HOLDS[dialect]:
        with pytest.raises(ValueError):
            vit.save_pretrained(model, tmp_path / "m.npz", dialect)
        assert not os.listdir(tmp_path)
        return
    save(model, tmp_path / "m.npz", dialect)
    assert bits(load(make(seed=1, **fields | PARTS[part]), tmp_path / "m.npz", dialect=dialect)) == bits(model)


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


def sizes():
    return {field: value for field, value in SMALL.items() if field != "num_classes"}


WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student", "net", "encoder")


@pytest.mark.parametrize("index", range(len(WRAPPERS)))
def test_order_of_the_wrappers(index, tmp_path):
    """In any order; entries that are no mappings are skipped."""
    content = {name: {"w": torch.full((1,), i)} for i, name in enumerate(WRAPPERS) if i >= index}
    content |= {name: 3 for i, name in enumerate(WRAPPERS) if i < index}
    for made in (content, dict(reversed(content.items()))):
        torch.save(made, tmp_path / "m.pt")
        assert vit.weights.files.read(tmp_path / "m.pt").tensors["w"].item() == index


@pytest.mark.parametrize("depth", [1, 7, 8, 9])
def test_eight_wrappers_are_opened(depth, tmp_path):
    torch.save(nested(depth), tmp_path / "m.pt")
    if depth < 9:
        assert bits(load(make(seed=1), tmp_path / "m.pt")) == bits(make())
    else:
        assert_refused(tmp_path / "m.pt", "holds a OrderedDict|holds a dict")


def test_loading_leaves_pytorchs_list_of_safe_objects(tmp_path):
    """The user's own entries stay, those added while reading a file do not; also after an error."""
    load(make(seed=1), save(make(), tmp_path / "first.pt"))  # PyTorch adds its own
    before = set(torch.serialization.get_safe_globals())
    good, bad = save(make(), tmp_path / "m.pt"), tmp_path / "bad.pt"
    torch.save(make(), bad)
    with torch.serialization.safe_globals([Bomb]):
        load(make(seed=1), good)
        with pytest.raises(vit.CheckpointError):
            vit.load_pretrained(make(), bad)
        assert set(torch.serialization.get_safe_globals()) == {*before, Bomb}
    assert set(torch.serialization.get_safe_globals()) == before and argparse.Namespace not in before


def test_which_file_of_a_folder_is_read(tmp_path):
    """safetensors before pickles, and whole files before their shards."""
    pytest.importorskip("safetensors")
    names = ("pytorch_model.bin.index.json", "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors")
    for seed, name in enumerate(names):
        model = make(seed=seed + 10)
        if name.endswith(".index.json"):
            shard = f"shard{seed}.bin"
            save(model, tmp_path / shard)
            (tmp_path / name).write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), shard)}))
        else:
            save(model, tmp_path / name)
        assert bits(load(make(seed=1), tmp_path)) == bits(model), name


def test_home_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(make(), "~/m.pt")
    assert os.listdir(tmp_path) == ["m.pt"] and bits(load(make(seed=1), "~/m.pt")) == bits(make())


def test_when_the_hub_is_asked(tmp_path, monkeypatch):
    """Only for a name that cannot be a path; for pickles only where there are no safetensors."""
    asked, model = [], make()
    hub = types.ModuleType("huggingface_hub")

    def snapshot_download(name, allow_patterns):
        asked.append(sorted(allow_patterns))
        save(model, tmp_path / "hub" / "model.safetensors", "hf")
        return str(tmp_path / "hub")

    hub.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "hub").mkdir()
    for path in ("here/nothing", "owner/model.pt", "owner/model.json", "owner/name/more", "nothing", "./x", "/no/such"):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            vit.load_pretrained(make(), path)
    assert asked == []
    pytest.importorskip("safetensors")
    assert bits(load(make(seed=1), "owner/name")) == bits(model)
    assert asked == [["*.json", "model*.safetensors"]]


def test_what_is_saved_holds_nothing_else(tmp_path):
    """Each tensor has its own storage, though q, k and v are parts of one, and requires no grad."""
    for dialect in ("hf", "torchvision", "google"):
        state = torch.load(save(make(), tmp_path / "m.pt", dialect), weights_only=True)
        for name, tensor in state.items():
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name
            assert not tensor.requires_grad


@pytest.mark.parametrize(("length", "kept"), [(65_535, True), (65_536, False)])
def test_class_names_that_a_comment_can_just_hold(length, kept, tmp_path):
    """65,535 bytes; longer names are dropped, and the rest comes back."""
    model = make()
    cfg = {"source": "timm", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "label_names": [""]}
    empty = len(json.dumps({"fused_vit": vit.weights.note.write(model.config, cfg)}))
    model.pretrained_cfg = cfg | {"label_names": ["x" * (length - empty)]}
    save(model, tmp_path / "m.npz")
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        assert (len(archive.comment) == length) == kept
    found = load(tmp_path / "m.npz").pretrained_cfg
    assert (found["source"], found["mean"], found["std"]) == ("timm", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert found.get("label_names") == (model.pretrained_cfg["label_names"] if kept else None)
    assert load(tmp_path / "m.npz").config == model.config


@pytest.mark.parametrize("size", [(16, 48), (48, 16)])
def test_files_of_a_folder_by_hand(size, tmp_path):
    """Heights before widths, in each file's own keys."""
    pytest.importorskip("safetensors")
    model = make(
        img_size=size, patch_size=(8, 4), in_chans=1, qkv_bias=False, act_layer="gelu_tanh", norm_eps=1e-5,
        attn_drop_rate=0.1, pos_drop_rate=0.2, proj_drop_rate=0.2, act_drop_rate=0.0,
    )  # fmt: skip
    model.pretrained_cfg = {"source": "hf", "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a folder's config.json says the numerics
        vit.save_pretrained(model, tmp_path / "vit.v2", "hf")
    said = json.loads((tmp_path / "vit.v2" / "config.json").read_text())
    assert said.pop("fused_vit")["img_size"] == list(size)
    labels = {f"LABEL_{i}": i for i in range(5)}
    assert said == {
        "architectures": ["ViTForImageClassification"], "model_type": "vit", "image_size": list(size),
        "patch_size": [8, 4], "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "qkv_bias": False, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new",
        "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.2, "encoder_stride": 8, "label2id": labels,
        "id2label": {str(i): name for name, i in labels.items()},
    }  # fmt: skip
    prepare = json.loads((tmp_path / "vit.v2" / "preprocessor_config.json").read_text())
    assert prepare == {
        "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "rescale_factor": 1 / 255,
        "size": {"height": size[0], "width": size[1]},
    }  # fmt: skip
    tensors = torch.load(save(model, tmp_path / "m.pt", "hf"), weights_only=True)
    vit.weights.files.write(tmp_path / "vit.v2" / "model.safetensors", tensors, {})
    (tmp_path / "vit.v2" / "config.json").write_text(json.dumps(said))  # as transformers would have written it
    assert load(tmp_path / "vit.v2", in_chans=1).config.grid_size == (size[0] // 8, size[1] // 4)
    with pytest.raises(ValueError, match=r"x\.json has no suffix"):
        vit.save_pretrained(model, tmp_path / "x.json", "hf")


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "act_drop_rate": 0.0}, 0.1),
        ({"pos_drop_rate": 0.1, "proj_drop_rate": 0.1}, None),  # act_drop_rate is proj_drop_rate then
        ({"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "act_drop_rate": 0.2}, None),
        ({"pos_drop_rate": 0.1, "proj_drop_rate": 0.2, "act_drop_rate": 0.0}, None),
        ({}, 0.0),
    ],
)
def test_config_json_tells_a_dropout_only_if_it_is_transformers(rates, told, tmp_path):
    """There one rate is that of the embeddings and of both projections, and nothing drops after the activation."""
    pytest.importorskip("safetensors")
    vit.save_pretrained(make(**rates), tmp_path / "m", "hf")
    assert json.loads((tmp_path / "m/config.json").read_text()).get("hidden_dropout_prob") == told
    assert load(tmp_path / "m").config == make(**rates).config


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu"])
def test_a_model_without_a_head_in_a_folder(act, tmp_path):
    pytest.importorskip("safetensors")
    model = make(num_classes=0, representation_size=24, act_layer=act, pos_drop_rate=0.1)
    model.pretrained_cfg = {"source": "hf", "label_names": list("ab")}
    vit.save_pretrained(model, tmp_path / "m", "hf")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]  # no mean is known
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["architectures"] == ["ViTModel"] and not {"id2label", "label2id", "hidden_dropout_prob"} & said.keys()
    assert (said["pooler_output_size"], said["pooler_act"], said["image_size"], said["patch_size"]) == (
        24,
        "tanh",
        32,
        8,
    )
    assert said["hidden_act"] == {"gelu": "gelu", "gelu_tanh": "gelu_new", "quick_gelu": "quick_gelu"}[act]


@pytest.mark.parametrize("labels", [["a"], list("abcdef"), [], None])
def test_class_names_of_another_number_are_not_written(labels, tmp_path):
    pytest.importorskip("safetensors")
    model = make()
    model.pretrained_cfg = {"source": "hf"} | ({} if labels is None else {"label_names": labels})
    vit.save_pretrained(model, tmp_path / "m", "hf")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["id2label"] == {str(i): f"LABEL_{i}" for i in range(5)}


@pytest.mark.parametrize(
    ("word", "value", "ours"),
    [
        ("architectures", ["ViTForMaskedImageModeling"], True),
        ("id2label", {str(i): name for i, name in enumerate("vwxyz")}, True),
        ("torch_dtype", "float32", True),
        ("id2label", {"0": "a"}, False),
        ("label2id", None, False),
        ("num_channels", 1, False),
        ("attention_probs_dropout_prob", 0.3, False),
    ],
)
def test_which_words_of_a_folder_make_our_note_old(word, value, ours, tmp_path):
    pytest.importorskip("safetensors")
    model = make(drop_rate=0.2)
    vit.save_pretrained(model, tmp_path, "hf")
    said = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(said | {word: value}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vit.weights.note.read(vit.weights.files.read(tmp_path))
    config, notes = found
    assert (config == model.config) == ours and bool(notes) != ours and not caught


def test_numerics_that_an_early_version_wrote(tmp_path):
    """Written without the other fields; they win over the dialect's defaults."""
    said = {"norm_eps": 1e-3, "act_layer": "quick_gelu", "interpolation": "bicubic", "act_drop_rate": 0.3}
    vit.weights.files.write(tmp_path / "m.pt", dict(make().state_dict()), said)
    for target, options in ((make(), {}), ("vit_tiny_patch16_224", sizes())):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = vit.load_pretrained(target, tmp_path / "m.pt", **options).config
        assert {field: getattr(found, field) for field in said} == said
    asked = vit.load_pretrained(make(), tmp_path / "m.pt", norm_eps=1e-4).config
    assert (asked.norm_eps, asked.act_layer) == (1e-4, "quick_gelu")


@pytest.mark.parametrize("target", ["live", "named", "alone"])
def test_warnings_point_at_the_call(target, tmp_path):
    """At the user's line, not at one of ours."""
    state = dict(make().state_dict()) | {}
    torch.save({"model": prefixed("model.", state) | {"other.w": torch.ones(1)}}, tmp_path / "m.pt")
    args = {"live": [make()], "named": ["vit_tiny_patch16_224"], "alone": []}[target]
    options = {"live": {}, "named": sizes(), "alone": {"num_heads": 2}}[target]
    with pytest.warns(UserWarning, match="more than a ViT: other.w are left out") as caught:
        vit.load_pretrained(*args, tmp_path / "m.pt", **options)
    assert [record.filename for record in caught] == [__file__]
    assert str(caught[0].message).startswith(f"{tmp_path / 'm.pt'}: ")
    with pytest.warns(
        UserWarning, match=r"with norm_eps=1e-06 \(the model: 0.1\) and act_layer='gelu_tanh' \(the mod"
    ) as caught:
        vit.save_pretrained(make(norm_eps=0.1), tmp_path / "m.npz", "google")
    assert [record.filename for record in caught] == [__file__]


def test_saving_warns_only_of_what_is_lost(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.save_pretrained(make(norm_eps=0.1, act_layer="quick_gelu"), tmp_path / "m.pt")
        vit.save_pretrained(make(act_layer="gelu_tanh"), tmp_path / "m.npz", "google")
        vit.save_pretrained(make(norm_eps=1e-12), tmp_path / "n.npz", "hf")
        vit.save_pretrained(torch.compile(make(), backend="eager"), tmp_path / "compiled.pt")
    assert bits(load(make(seed=1), tmp_path / "compiled.pt")) == bits(make())
    with pytest.raises(ValueError, match="cls_token is on the meta device; there is nothing to save"):
        vit.save_pretrained(vit.VisionTransformer(ViTConfig(**SMALL), device="meta"), tmp_path / "meta.pt")
    assert not (tmp_path / "meta.pt").exists()


@pytest.mark.parametrize("kind", ["vit", "vit_mae", "vit_msn", "", None])
def test_model_types_that_have_the_names_of_a_vit(kind, tmp_path):
    model = make(num_classes=0)
    tensors = torch.load(save(model, tmp_path / "m.pt", "hf"), weights_only=True)
    torch.save(dict(tensors), tmp_path / "pytorch_model.bin")
    (tmp_path / "m.pt").unlink()
    said = {"num_attention_heads": 2, "image_size": 32, "patch_size": 8} | (
        {} if kind is None else {"model_type": kind}
    )
    (tmp_path / "config.json").write_text(json.dumps(said))
    assert bits(load(make(num_classes=0, seed=1), tmp_path)) == bits(model)


@pytest.mark.parametrize("dialect", ["timm", "hf", "torchvision", "google", "dinov2"])
def test_blocks_with_numbers_of_two_digits(dialect, tmp_path):
    """As text 10 sorts before 2; in DINOv2's chunks the second number counts."""
    fields = {"num_classes": 0, "depth": 12, "mlp_ratio": 0.5}
    model = make(**fields)
    path = save(model, tmp_path / "m.pt", dialect)
    assert bits(load(make(seed=1, **fields), path)) == bits(model)
    state = dict(torch.load(path, weights_only=True))
    torch.save(dict(sorted(state.items(), reverse=True)), path)
    assert bits(load(make(seed=1, **fields), path)) == bits(model)
    if dialect == "dinov2":
        for i in range(12):
            state = {k.replace(f"blocks.{i}.n", f"blocks.{i // 4}.{i}.n"): v for k, v in state.items()}
            for part in ("attn", "mlp"):
                old, new = f"blocks.{i}.{part}", f"blocks.{i // 4}.{i}.{part}"
                state = {new + k.removeprefix(old) if k.startswith(old) else k: v for k, v in state.items()}
        assert "blocks.2.11.norm1.weight" in state
        torch.save(state, path)
        assert bits(load(make(seed=1, **fields), path)) == bits(model)


# Live models


def test_a_live_model_keeps_its_mode_and_what_is_equal_may_be_said(tmp_path):
    path = save(make(), tmp_path / "m.pt")
    for training in (False, True):
        model = make(seed=1).train(training)
        load(model, path, depth=2, embed_dim=32, img_size=(32, 32), num_classes=9)
        assert {module.training for module in model.modules() if any(True for _ in module.parameters())} == {training}
    for options in ({"dtype": torch.float16}, {"device": "cpu"}, {"img_size": 48}, {"drop_rate": 0.1}):
        (field,) = options
        with pytest.raises(ValueError, match=f"^{field}=.* cannot be changed in a live model"):
            vit.load_pretrained(make(), path, **options)


@pytest.mark.parametrize("state", ["missing", "other depth", "integers", "position embedding", "half a head"])
def test_a_refusal_leaves_the_head_and_what_is_known_of_the_source(state, tmp_path):
    """Even if another number of classes is requested."""
    torch.save(BAD_STATES[state][0](), tmp_path / "m.pt")
    model = make(seed=3)
    model.pretrained_cfg = {"source": "timm", "mean": (0.1, 0.2, 0.3)}
    before, parameters, cfg, config = bits(model), list(model.parameters()), model.pretrained_cfg, model.config
    classes = 5 if state == "half a head" else 9
    with pytest.raises(vit.CheckpointError):
        vit.load_pretrained(model, tmp_path / "m.pt", num_classes=classes, norm_eps=1e-3, act_layer="quick_gelu")
    assert bits(model) == before and model.pretrained_cfg == cfg and model.config is config
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.norm.eps == 1e-6 and {b.mlp.activation for b in model.blocks} == {"gelu"}


def test_a_live_model_that_was_changed(tmp_path):
    """A changed shape or a missing part is an error; a head to be replaced or a shared parameter is not."""
    path = save(make(), tmp_path / "m.pt")
    model = make(seed=1)
    model.head = torch.nn.Linear(32, 6)
    with pytest.raises(vit.CheckpointError, match=r"changed after it was made: head\.(weight|bias) is not as its conf"):
        vit.load_pretrained(model, path)
    assert load(model, path, num_classes=3).head.weight.shape == (3, 32)
    model = make(seed=1)
    model.norm = torch.nn.Identity()
    with pytest.raises(vit.CheckpointError, match=r"changed after it was made: norm\.(weight|bias) is not as its conf"):
        vit.load_pretrained(model, path)
    shared = make(seed=1)
    shared.blocks[1].norm1 = shared.blocks[0].norm1
    load(shared, path)
    assert shared.blocks[1].norm1 is shared.blocks[0].norm1
    assert torch.equal(shared.blocks[0].norm1.weight, make().blocks[1].norm1.weight)


def test_numerics_reach_the_norms_of_every_part(tmp_path):
    fields = {"pre_norm": True, "qk_norm": True, "global_pool": "avg", "act_layer": "quick_gelu", "init_values": 0.1}
    path = save(make(**fields, norm_eps=3e-4), tmp_path / "m.pt")
    for fc_norm in (True, False):
        path = save(make(**fields, norm_eps=3e-4, fc_norm=fc_norm), tmp_path / "m.pt")
        live = load(make(**fields | {"act_layer": "gelu"}, norm_eps=1e-2, fc_norm=fc_norm), path)
        norms = [m.eps for m in live.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert len(norms) == 2 + 2 * 4 and set(norms) == {3e-4}


def test_a_new_model_is_made_where_it_is_asked_for(tmp_path):
    """On the default or the given device, in the given dtype."""
    path = save(make(num_classes=0), tmp_path / "m.pt")
    for args, options in (([], {}), (["vit_tiny_patch16_224"], sizes())):
        asked = load(*args, path, device="meta", dtype=torch.bfloat16, **options)
        assert {(p.device.type, p.dtype) for p in asked.parameters()} == {("meta", torch.bfloat16)}
        with torch.device("meta"):
            assert {p.device.type for p in load(*args, path, **options).parameters()} == {"meta"}
            there = load(*args, path, device="cpu", **options)
        assert bits(there) == bits(make(num_classes=0))


def test_a_mask_token_that_is_missing_is_said(tmp_path):
    path = save(make(num_classes=0), tmp_path / "m.pt")
    model = make(num_classes=0, use_mask_token=True)
    with pytest.warns(UserWarning, match="it has no mask token: the model's is zero now"):
        vit.load_pretrained(model, path)
    assert not model.mask_token.any()
    with warnings.catch_warnings():  # an extra one is ignored
        warnings.simplefilter("error")
        vit.load_pretrained(make(num_classes=0), save(make(num_classes=0, use_mask_token=True), tmp_path / "n.pt"))


@pytest.mark.parametrize("form", ["note", "timm", "timm top", "hf", "hf and timm", "preprocessor"])
def test_where_mean_and_names_come_from(form, tmp_path):
    """Our own note first, then config.json of timm or transformers, preprocessor_config.json."""
    timm = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "label_names": list("abcde")}
    labels = {"id2label": {str(i): name for i, name in enumerate("vwxyz")}}
    config = {
        "note": {"pretrained_cfg": timm | {"mean": [9, 9, 9]}},
        "timm": {"pretrained_cfg": timm} | labels,
        "timm top": {"pretrained_cfg": timm | {"label_names": list("ABCDE")}, "label_names": list("abcde")},
        "hf": labels,
        "hf and timm": labels | {"label_names": list("abcde")},
        "preprocessor": {},
    }[form]
    note = {"pretrained_cfg": {"source": "google"} | timm} if form == "note" else {}
    vit.weights.files.write(tmp_path / "pytorch_model.bin", dict(make().state_dict()), note)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if form in ("preprocessor", "timm"):
        own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]} if form == "preprocessor" else {}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(own or {"image_mean": [7, 7, 7]}))
    found = load(make(seed=1), tmp_path).pretrained_cfg
    assert found["source"] == ("google" if form == "note" else "timm")
    want = {} if form.startswith("hf") else {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert {k: v for k, v in found.items() if k in ("mean", "std")} == want
    assert "".join(found.get("label_names", "")) == {"hf": "vwxyz", "preprocessor": ""}.get(form, "abcde")


@pytest.mark.parametrize("where", ["absolute", "below", "above", "itself", "below and back", "folder"])
def test_a_shard_is_a_file_beside_its_index(where, tmp_path):
    """An index that points anywhere else is refused, even if a good checkpoint is there."""
    model, folder = make(), tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for place in (tmp_path, folder, folder / "below"):
        torch.save(model.state_dict(), place / "shard.bin")
    named = {
        "absolute": str(folder / "shard.bin"),
        "below": "below/shard.bin",
        "above": "../shard.bin",
        "itself": "./shard.bin",
        "below and back": "below/../shard.bin",
        "folder": "below",
    }[where]
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), named)}))
    with pytest.raises(vit.CheckpointError, match=r"is not a file beside it|is not a regular file"):
        vit.load_pretrained(index)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(model.state_dict(), "shard.bin")}))
    assert vit.load_pretrained(index, num_heads=model.config.num_heads).config.embed_dim == model.config.embed_dim
