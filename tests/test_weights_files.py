"""Files that hold checkpoints: what is around the tensors, what must not load, and what a dialect cannot hold."""

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
    """Lightning, DINO's head beside the backbone: what is left out is named; two models are not guessed between."""
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
    """Its mask token is the decoder's, also where that is as wide as the encoder."""
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
    """Through every kind of file, whatever its dialect and that of the source."""
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
    """image_size is [height, width] in transformers; the embedding is taken as it is."""
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
    torch.save(tensors, tmp_path / "folder" / "pytorch_model.bin")  # says nothing of itself
    assert told["image_size"] == (list(size) if isinstance(size, tuple) else size)
    for found in (
        weights,
        load(tmp_path / "folder").state_dict(),
        load(make(img_size=size, seed=1), tmp_path / "folder").state_dict(),
    ):
        assert torch.equal(found["pos_embed"], model.pos_embed)


@pytest.mark.parametrize("count", [5, 12, 101])
def test_class_names_have_the_order_of_their_numbers(count, tmp_path):
    """JSON keeps them as text, in which "10" is before "2", and in any order."""
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
    """transformers keeps words that it does not know: after its own training they are old."""
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
    for key in ("mean", "std"):  # of a folder that is not ours
        assert load(tmp_path).pretrained_cfg[key] == model.pretrained_cfg[key]


HOSTILE = {
    "no number": {"norm_eps": "small"},
    "huge depth": {"depth": 10**9},
    "huge image": {"img_size": [10**6, 10**6]},
    "deeper than it is": {"depth": 9_999},
    "another grid": {"img_size": [64, 64]},
    "heads that do not divide": {"num_heads": 5},
    "other classes": {"num_classes": 7},
    "NaN": {"mlp_ratio": float("nan")},
    "mean that is none": {"pretrained_cfg": {"mean": "a"}},
    "cfg that is none": {"pretrained_cfg": [1]},
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", HOSTILE)
def test_notes_that_no_model_has(case, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model = make()
    note = vit.weights.note.write(model.config, None)
    vit.weights.files.write(tmp_path / f"m{suffix}", dict(model.state_dict()), note | HOSTILE[case])
    by_name = [] if case in ("another grid", "other classes", "deeper than it is") else [["vit_tiny_patch16_224"]]
    for target in ([], *by_name):  # which does not take those from a file
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
    """A pipe would be waited for: each is refused before it is opened."""
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


FAMILIES = {  # names that the libraries give; see test_weights_peers.py for their own files
    r"Dinov2 checkpoint of transformers, which .* not read yet; load it with transformers and call vit.accelerate": (
        "embeddings.patch_embeddings.projection.weight", "encoder.layer.0.layer_scale1.lambda1"),
    "a CLIP checkpoint of transformers": ("vision_model.embeddings.class_embedding",),
    "a SigLIP checkpoint of transformers": ("vision_model.embeddings.patch_embedding.weight",),
    "a CLIP of OpenAI or OpenCLIP": ("visual.class_embedding", "visual.conv1.weight"),
    "BEiT": ("beit.embeddings.cls_token",),
    "BEiT.*": ("cls_token", "patch_embed.proj.weight", "pos_embed", "blocks.0.attn.q_bias"),
    "DeiT III or BEiT": ("cls_token", "patch_embed.proj.weight", "pos_embed", "blocks.0.gamma_1"),
    "a Swin Transformer": ("patch_embed.proj.weight", "layers.0.blocks.0.attn.qkv.weight"),
    "DINOv3": ("cls_token", "storage_tokens", "patch_embed.proj.weight", "blocks.0.norm1.weight"),
    "DINOv3 ": ("embeddings.patch_embeddings.weight", "layer.0.layer_scale1.lambda1"),
    "a model with SwiGLU": ("patch_embed.proj.weight", "blocks.0.mlp.w12.weight"),
    "a distilled DeiT": ("patch_embed.proj.weight", "blocks.0.norm1.weight", "dist_token"),
    "pools by attention": ("patch_embed.proj.weight", "blocks.0.norm1.weight", "attn_pool.latent"),
}  # fmt: skip


@pytest.mark.parametrize("what", FAMILIES)
def test_models_that_no_dialect_holds(what, tmp_path):
    torch.save({name: torch.ones(2, 2) for name in FAMILIES[what]}, tmp_path / "m.pt")
    for target in ([make()], [], ["vit_tiny_patch16_224"]):
        with pytest.raises(vit.CheckpointError, match=what.strip()) as caught:
            vit.load_pretrained(*target, tmp_path / "m.pt")
        assert "which load_pretrained does not read yet; load it with" in str(caught.value)


def test_model_type_of_a_folder(tmp_path):
    torch.save({"embeddings.x": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    for kind in ("swinv2", "dinov2", "siglip2"):
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
    "average beside a class token": {"global_pool": "avg"},
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
    """What it has no place for is an error before anything is written; the rest comes back to the same bits."""
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
