"""A checkpoint whose architecture nobody names, and the commands that take one."""

import warnings
from pathlib import Path

import pytest
import torch
from peers import randomise

import vit
from vit.cli import main

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


def saved(model, path, dialect):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numerics that a dialect does not say
        vit.save_pretrained(model, path, dialect)
    return path


@pytest.mark.parametrize(("dialect", "suffix", "fields"), CASES)
def test_architecture_is_told_by_the_checkpoint(dialect, suffix, fields, tmp_path):
    model = make(**fields)
    eps = 1e-12 if dialect.startswith("hf") else 1e-6
    path = saved(model, tmp_path / f"model{suffix}", dialect)
    found = vit.load_pretrained(None, path, norm_eps=fields.get("norm_eps", eps)).eval()
    for module in model.modules():
        if isinstance(module, vit.layers.LayerNorm):
            module.eps = fields.get("norm_eps", eps)
    image = torch.randn(2, model.config.in_chans, *model.config.img_size)
    with torch.no_grad():
        assert torch.equal(found(image), model(image))
    assert all(torch.equal(found.state_dict()[k], t) for k, t in model.state_dict().items() if k in found.state_dict())
    for field in ("img_size", "patch_size", "num_heads", "depth", "embed_dim", "class_token", "reg_tokens"):
        assert getattr(found.config, field) == getattr(model.config, field)


def test_overrides_win(tmp_path):
    path = saved(make(), tmp_path / "model.pt", "timm")
    found = vit.load_pretrained(None, path, num_classes=7, img_size=48, num_heads=6)
    assert found.head.weight.shape == (7, 192) and found.config.img_size == (48, 48) and found.config.num_heads == 6
    with pytest.raises(TypeError, match="did you mean 'num_heads'"):
        vit.load_pretrained(None, path, heads=6)


def test_what_cannot_be_told(tmp_path):
    odd = saved(make(embed_dim=48), tmp_path / "odd.pt", "timm")
    clip = saved(make(pre_norm=True), tmp_path / "clip.pt", "timm")
    wide = saved(make(img_size=(16, 32)), tmp_path / "wide.pt", "timm")
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7)}, tmp_path / "resnet.pt")
    for path, reason in (
        (odd, "how many heads its width of 48 has; name the model"),
        (clip, "which GELU"),
        (wide, "position embedding has 9 rows"),
        (tmp_path / "resnet.pt", "no ViT in a known dialect"),
    ):
        with pytest.raises(vit.CheckpointError, match=reason):
            vit.load_pretrained(None, path)


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
