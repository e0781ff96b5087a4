"""Preprocessing beside the libraries' own, and `vit classify`."""

import dataclasses
import json
import os

import numpy as np
import pytest
import torch
from peers import _import, import_timm, import_transformers

import vit
from vit.commands import cli

pytest.importorskip("PIL.Image")

from PIL import Image, ImageOps

from vit import preprocess
from vit.commands.demo import load_photo

pytestmark = pytest.mark.peers

SIZES = {"whole": (451, 300), "upright, odd": (234, 301), "odd margins": (303, 234), "small": (180, 100)}
TINY = vit.ViTConfig(img_size=32, patch_size=16, num_classes=5, embed_dim=32, depth=1, num_heads=2)


def photo(size: str) -> Image.Image:
    return ImageOps.fit(load_photo(), SIZES[size])


def assert_same_pixels(ours: torch.Tensor, theirs: torch.Tensor, std) -> None:
    """To rounding: a level of 8 bits is 1/255/std, and none may differ by as much as a hundredth of one."""
    assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
    levels = (ours - theirs).abs() * 255 * torch.tensor(std).view(3, 1, 1)
    assert levels.max().item() < 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["ViT", "Bit", "DeiT", "CLIP", "ViT without saying"])
def test_transformers(kind, size, tmp_path):
    name, *silent = kind.split(maxsplit=1)
    processor = getattr(import_transformers(), f"{name}ImageProcessorPil")()
    if name == "Bit":  # as facebook/dinov2-base has it
        processor = type(processor)(size={"shortest_edge": 256}, image_mean=[0.485, 0.456, 0.406])
    processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    if silent:
        path.write_text("{}")
    else:
        assert json.loads(path.read_text())["image_processor_type"] == f"{name}ImageProcessor"
    ours = preprocess.of_folder(tmp_path, (224, 224))
    theirs = processor(photo(size), return_tensors="pt")["pixel_values"]
    assert_same_pixels(ours(photo(size)), theirs, ours.std)
    if name == "ViT":
        assert_same_pixels(preprocess.preprocessing("hf", (224, 224))(photo(size)), theirs, ours.std)


FORMS = {
    "an integer": {"size": 64},
    "both sides": {"size": {"height": 64, "width": 48}},
    "the shorter side": {"size": {"shortest_edge": 64}},
    "an integer, cropped": {"size": 64, "crop_size": 40, "do_center_crop": True},
    "both sides, cropped": {"size": {"height": 64, "width": 48}, "crop_size": {"height": 32, "width": 40}},
    "cropped alone": {"do_resize": False, "crop_size": 150, "do_center_crop": True},
    "not cropped": {"size": 64, "do_center_crop": False},
    "not rescaled": {"do_rescale": False, "do_normalize": False},
    "not normalised": {"do_normalize": False},
    "another scale": {"rescale_factor": 1 / 128, "resample": 0, "image_std": [0.1, 0.2, 0.3]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["ViT", "Bit", "DeiT", "CLIP"])
def test_forms_of_a_processors_file(kind, form, tmp_path):
    """Every processor reads the same words differently; what theirs refuses is not compared."""
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": f"{kind}ImageProcessor"} | FORMS[form]))
    try:
        processor = getattr(import_transformers(), f"{kind}ImageProcessorPil").from_pretrained(tmp_path)
        theirs = processor(photo("whole"), return_tensors="pt")["pixel_values"]
    except (ValueError, TypeError, KeyError, AttributeError):
        pytest.skip("transformers refuses it")
    ours = preprocess.of_folder(tmp_path, (224, 224))
    assert_same_pixels(ours(photo("whole")), theirs.float(), ours.std)


@pytest.mark.parametrize("size", ["whole", "upright, odd", "odd margins"])
@pytest.mark.parametrize(
    ("source", "model"),
    [
        ("timm", "vit_base_patch16_224.augreg_in21k_ft_in1k"),
        ("timm", "vit_base_patch16_384.augreg_in21k_ft_in1k"),
        ("timm-imagenet", "deit_base_patch16_224.fb_in1k"),
        ("timm-imagenet", "vit_base_patch16_224.mae"),
        ("timm-clip", "vit_base_patch16_clip_224.openai"),
        ("timm-dinov2", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_timm(source, model, size, tmp_path):
    timm = import_timm()
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    theirs = timm.data.create_transform(**config)(photo(size))[None]
    ours = preprocess.preprocessing(source, config["input_size"][1:])
    assert_same_pixels(ours(photo(size)), theirs, config["std"])
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    assert_same_pixels(preprocess.of_folder(tmp_path, config["input_size"][1:])(photo(size)), theirs, config["std"])


@pytest.mark.parametrize("size", ["whole", "upright, odd", "odd margins"])
@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"])
def test_torchvision(weights, size):
    transforms = getattr(_import("torchvision").models.ViT_B_16_Weights, weights).transforms()
    (side,) = transforms.crop_size
    ours = preprocess.preprocessing("torchvision", (side, side))
    assert_same_pixels(ours(photo(size)), transforms(photo(size))[None], transforms.std)


@pytest.mark.parametrize("size", ["whole", "upright, odd"])
def test_dinov2(size):
    """dinov2/data/transforms.py: make_classification_eval_transform, with torchvision."""
    transforms = _import("torchvision").transforms
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    resize = transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC)
    steps = [resize, transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(mean, std)]
    theirs = transforms.Compose(steps)(photo(size))[None]
    assert_same_pixels(preprocess.preprocessing("dinov2", (224, 224))(photo(size)), theirs, std)


def test_google():
    """TensorFlow's resize is PyTorch's without antialiasing, and does not round to 8 bits.

    Where a picture grows there is nothing to antialias, and only the rounding is left: one level.
    """
    image = torch.from_numpy(np.array(photo("small"))).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.interpolate(image, (224, 224), mode="bilinear", align_corners=False) / 127.5 - 1
    ours = preprocess.preprocessing("google", (224, 224))(photo("small"))
    assert (ours - theirs).abs().max().item() <= 1.01 / 127.5


def test_big_vision():
    """resize_small(256) by area, central_crop(224), value_range(-1, 1); halving by area is the mean of four pixels."""
    big = load_photo().resize((700, 512))
    pixels = torch.from_numpy(np.array(big)).permute(2, 0, 1)[None].float()
    theirs = torch.nn.functional.avg_pool2d(pixels, 2)[:, :, 16:240, 63:287] / 127.5 - 1
    ours = preprocess.preprocessing("big_vision", (224, 224))(big)
    assert (ours - theirs).abs().max().item() <= 1.01 / 127.5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_the_right_way_up(orientation, tmp_path):
    """EXIF's orientation n says where row 0 and column 0 of what is stored are (TIFF 6.0, tag 274)."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "p.png", exif=exif)
    assert np.array_equal(np.array(preprocess.open_photo(tmp_path / "p.png")), pixels)


def test_a_photo_that_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(ValueError, match=r"p\.png is not a regular file"):
        preprocess.open_photo(tmp_path / "p.png")


def test_unknown_source_and_processor(tmp_path):
    with pytest.raises(ValueError, match="known: google, "):
        preprocess.preprocessing("nobody", (224, 224))
    path = tmp_path / "preprocessor_config.json"
    for text, match in [
        ('{"image_processor_type": "SamImageProcessor"}', "SamImageProcessor is not supported"),
        ('{"size": {"longest_edge": 224}}', "longest_edge"),
        ("{", "not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            preprocess.of_folder(tmp_path, (224, 224))


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder of Hugging Face's with names, a picture, and a loader that stands for `vit.load_pretrained`."""
    model = vit.VisionTransformer(TINY, seed=0)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0, 6.0]))
    asked, source = [], "timm"

    def load(*args):
        asked.append(tuple(map(str, args)))
        model.pretrained_cfg = {"source": "google" if asked[-1][-1].endswith(".npz") else source}
        return model

    monkeypatch.setattr(vit, "load_pretrained", load, raising=False)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    names = {str(i): name for i, name in enumerate(["ant", "bee", "cat", "dog", "eel"])}
    (folder / "config.json").write_text(json.dumps({"id2label": names}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32, "image_mean": [0.1, 0.2, 0.3]}))
    load_photo().save(tmp_path / "cat.png")
    return dataclasses.make_dataclass("Checkpoint", ["folder", "photo", "model", "asked"])(
        folder, str(tmp_path / "cat.png"), model, asked
    )


def test_classify_a_folder(checkpoint, capsys):
    command = ["classify", checkpoint.photo, "--weights", str(checkpoint.folder), "--top", "2", "--model", "vit_x"]
    assert cli.main(command) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "451 x 300 pixels: resized to 32 x 32, bilinear, mean 0.1 0.2 0.3, std 0.5 (preprocessor_config" in first
    assert [line.split()[2:] for line in lines] == [["eel", "(4)"], ["bee", "(1)"]]
    image = preprocess.of_folder(checkpoint.folder, (32, 32))(load_photo())
    prob = checkpoint.model(image)[0].softmax(0)[4].item()
    assert f"{100 * prob:.2f} %" in lines[0]
    assert checkpoint.asked == [("vit_x", str(checkpoint.folder))]


def test_classify_a_file(checkpoint, tmp_path, capsys):
    """Files beside it that are not its own say nothing about it."""
    command = ["classify", checkpoint.photo, "--weights"]
    assert cli.main([*command, str(tmp_path / "weights.npz")]) == 0
    out = capsys.readouterr().out
    assert "google-research" in out and "no class names" in out and "class 4" in out and out.count("\n") == 7
    assert checkpoint.asked == [(str(tmp_path / "weights.npz"),)]

    assert cli.main([*command, str(checkpoint.folder / "other.pth")]) == 2
    assert "--preprocess: google, " in capsys.readouterr().err
    assert cli.main([*command, str(checkpoint.folder / "other.pth"), "--preprocess", "torchvision"]) == 0
    assert "shorter side to 36, bilinear, centre 32 x 32" in capsys.readouterr().out
    assert cli.main([*command, str(checkpoint.folder / "model.safetensors")]) == 0
    assert "eel" in capsys.readouterr().out


def test_classify_cannot_start(checkpoint, tmp_path, capsys, monkeypatch):
    def error(*args) -> str:
        assert cli.main(["classify", *map(str, args)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    weights = ["--weights", checkpoint.folder]
    assert "missing.png" in error(tmp_path / "missing.png", *weights)
    assert "not a picture" in error(checkpoint.folder / "config.json", *weights)
    assert "unknown preprocessing" in error(checkpoint.photo, *weights, "--preprocess", "x")
    (checkpoint.folder / "preprocessor_config.json").write_text('{"size": 48}')
    assert "makes 48 x 48 pixels, but the model takes 32 x 32" in error(checkpoint.photo, *weights)
    headless = vit.VisionTransformer(dataclasses.replace(TINY, num_classes=0))
    monkeypatch.setattr(vit, "load_pretrained", lambda *args: headless)
    assert "no classification head" in error(checkpoint.photo, *weights)

    class CheckpointError(ValueError):
        pass

    def broken(*args):
        raise CheckpointError("weights.pt: truncated")

    monkeypatch.setattr(vit, "load_pretrained", broken)
    assert "weights.pt: truncated" in error(checkpoint.photo, *weights)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install Pillow" in error(checkpoint.photo, *weights)


def test_generic_labels_are_no_names(tmp_path):
    (tmp_path / "config.json").write_text('{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}')
    assert preprocess.class_names(tmp_path) == {}
    (tmp_path / "config.json").write_text('{"label_names": ["ant", "bee"]}')
    assert preprocess.class_names(tmp_path) == {0: "ant", 1: "bee"}
