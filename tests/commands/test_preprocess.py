"""Preprocessing against the libraries', and `vit classify`."""

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
    """Equal to within a hundredth of an 8-bit level, which is 1/255/std."""
    assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
    levels = (ours - theirs).abs() * 255 * torch.tensor(std).view(3, 1, 1)
    assert levels.max().item() < 0.01


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["ViT", "Bit", "DeiT", "CLIP", "ViT unnamed"])
def test_transformers(kind, size, tmp_path):
    name, *silent = kind.split(maxsplit=1)
    processor = getattr(import_transformers(), f"{name}ImageProcessorPil")()
    if name == "Bit":  # as in facebook/dinov2-base
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
    """Every processor reads the same keys differently; refused forms are skipped."""
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

    An enlarged picture needs no antialiasing, so only the rounding differs, by one level.
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
    """EXIF's orientation n says where row 0 and column 0 of the file are (TIFF 6.0, tag 274)."""
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
    """A folder of Hugging Face's with names, a picture, and a loader that replaces `vit.load_pretrained`."""
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
    """Files next to it that are not its own are ignored."""
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


def rgb(width: int, height: int) -> Image.Image:
    """Pixels of many colours, none of them black."""
    pixels = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3) % 251 + 1
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 96), (96, 64), (224, 384), (384, 224), (384, 512), (512, 384)])
@pytest.mark.parametrize("source", preprocess.SOURCES)
def test_every_source_at_sizes_that_are_not_square(source, size):
    """(height, width) -> the resize, the crop and the filter by hand; large variants need both sides of 384."""
    mean, std = {
        **dict.fromkeys(("timm-clip", "hf_clip", "open_clip"), (preprocess.CLIP_MEAN, preprocess.CLIP_STD)),
        **dict.fromkeys(("google", "big_vision", "hf", "hf_siglip", "timm"), ((0.5,) * 3,) * 2),
    }.get(source, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    large, longer = min(size) >= 384, max(size)
    cropped = ("dinov2", "hf_dinov2", "hf_dinov2_reg", "hf_deit")
    by_percent = dict.fromkeys(("big_vision", "torchvision", *cropped), 87.5).get(source, 90)
    by_percent = 100 if source in ("timm-dinov2", "hf_clip", "open_clip") else by_percent
    if large and source not in cropped:
        by_percent = 100
    resample = {"google": 2, "hf": 2, "big_vision": 4, "torchvision": 3 if large else 2}.get(source, 3)
    found = preprocess.preprocessing(source, size)
    whole = source in ("google", "hf", "hf_siglip")
    assert found.resize == (size if whole else int(longer * 100 / by_percent)) and type(found.resize) is not float
    assert found.crop == (None if whole else size)
    assert (found.resample, found.mean, found.std, found.scale) == (resample, mean, std, 1 / 255)
    height, width = size
    assert found(rgb(50, 30)).shape == (1, 3, height, width)
    name = {2: "bilinear", 3: "bicubic", 4: "box"}[resample]
    first = f"resized to {width} x {height}" if whole else f"shorter side to {found.resize}"
    centre = "" if whole else f"centre {width} x {height}, "
    assert str(found).startswith(f"{first}, {name}, {centre}mean 0.")
    assert ("IMAGENET1K_SWAG" in str(found)) == (source == "torchvision" and large)


@pytest.mark.parametrize(("std", "said"), [((0.5,) * 3, "std 0.5 ("), ((0.5, 0.25, 0.5), "std 0.5 0.25 0.5 (")])
def test_what_is_said_where_nothing_is_resized_or_cropped(std, said):
    steps = preprocess.Preprocessing("me", None, None, 3, (0.1234,) * 3, std)
    assert str(steps) == f"mean 0.123, {said}me)"
    assert steps(rgb(6, 4)).shape == (1, 3, 4, 6)


@pytest.mark.parametrize("odd_down", [False, True])
@pytest.mark.parametrize("crop", [(4, 6), (3, 4), (5, 2), (9, 11), (2, 13), (8, 3)])
def test_centre_crop_by_hand(crop, odd_down):
    """Half of an odd margin is rounded down, or to even; pixels outside the picture are black."""
    photo = rgb(6, 4)
    want = np.zeros((*crop, 3))
    top, left = ((have - n) // 2 if odd_down else round((have - n) / 2) for have, n in zip((4, 6), crop, strict=True))
    pixels = np.array(photo)
    for y in range(crop[0]):
        for x in range(crop[1]):
            if 0 <= y + top < 4 and 0 <= x + left < 6:
                want[y, x] = pixels[y + top, x + left]
    found = preprocess.Preprocessing("me", None, crop, 3, (0.0,) * 3, (1.0,) * 3, 1.0, odd_down)(photo)
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), want)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_photos_of_other_modes_are_read_in_colour(mode, tmp_path):
    photo = rgb(20, 12).convert(mode)
    steps = preprocess.preprocessing("timm", (8, 16))
    assert torch.equal(steps(photo), steps(photo.convert("RGB")))
    name = tmp_path / ("p.tiff" if mode == "CMYK" else "p.png")
    photo.save(name)
    opened = preprocess.open_photo(name)
    assert opened.mode == "RGB" and np.array_equal(np.array(opened), np.array(photo.convert("RGB")))


def test_to_tensor_keeps_photos_channels_and_sides_in_order():
    photos = [rgb(5, 3), rgb(5, 3).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    found = preprocess.to_tensor(photos, mean, std, 1 / 128)
    want = (np.stack([np.array(p) for p in photos]).astype(np.float64) / 128 - mean) / std
    assert found.dtype is torch.float32 and found.shape == (2, 3, 3, 5)
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - want).max() < 1e-6
    plain = (np.array(photos[1]).astype(np.float64) / 255 - 0.5) / 0.5  # the defaults
    assert np.abs(preprocess.to_tensor(photos)[1].permute(1, 2, 0).numpy() - plain).max() < 1e-6


def test_timms_config_says_how_a_photo_is_prepared(tmp_path):
    """Its keys, and timm's defaults for missing ones; "squash" takes the whole picture."""
    path, size = tmp_path / "config.json", (64, 96)
    assert preprocess.of_folder(tmp_path, size) is None
    for told in ({}, {"pretrained_cfg": None}, []):
        path.write_text(json.dumps(told))
        assert preprocess.of_folder(tmp_path, size) is None
    words = {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8}
    for told, resize, resample in [
        ({}, 106, 3),
        (words, 120, 2),
        (words | {"crop_mode": "center", "crop_pct": 1.0}, 96, 2),
        (words | {"crop_mode": "squash"}, (80, 120), 2),
        ({"crop_mode": "squash", "interpolation": "lanczos", "crop_pct": 1}, (64, 96), 1),
    ]:
        path.write_text(json.dumps({"pretrained_cfg": told}))
        found = preprocess.of_folder(tmp_path, size)
        assert (found.resize, found.crop, found.resample) == (resize, size, resample), told
        assert (found.mean, found.std) == tuple(tuple(told.get(word, (0.5,) * 3)) for word in ("mean", "std"))
        assert found.source == str(path) and not found.odd_down
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32}))  # this file wins
    assert preprocess.of_folder(tmp_path, size).resize == (32, 32)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Bit", "CLIP"])
@pytest.mark.parametrize(
    "words",
    [
        {"image_processor_type": "{}ImageProcessor"},
        {"image_processor_type": "{}ImageProcessorFast"},
        {"feature_extractor_type": "{}FeatureExtractor"},
        {"image_processor_type": "{}ImageProcessor", "feature_extractor_type": "SamFeatureExtractor"},
    ],
)
def test_what_a_processor_does_where_its_file_says_nothing(words, kind, tmp_path):
    """The defaults of transformers by hand, under old and new processor names."""
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({word: name.format(kind) for word, name in words.items()}))
    found = preprocess.of_folder(tmp_path, (64, 96))
    resize = {"ViT": (224, 224), "DeiT": (256, 256)}.get(kind, 224)
    assert (found.resize, found.crop) == (resize, None if kind == "ViT" else (224, 224))
    assert found.resample == (2 if kind == "ViT" else 3) and found.scale == 1 / 255
    assert found.mean == ((0.5,) * 3 if kind in ("ViT", "DeiT") else (0.48145466, 0.4578275, 0.40821073))
    assert found.std == ((0.5,) * 3 if kind == "ViT" or kind == "DeiT" else (0.26862954, 0.26130258, 0.27577711))
    assert str(found).endswith("(preprocessor_config.json)")


@pytest.mark.parametrize(
    ("told", "resize", "crop"),
    [
        ({"size": {"height": 48, "width": 80}}, (48, 80), None),
        ({"size": {"shortest_edge": 48}}, 48, None),
        ({"size": 48, "do_center_crop": True, "crop_size": {"height": 24, "width": 40}}, (48, 48), (24, 40)),
        ({"size": 48, "do_center_crop": True, "crop_size": 24}, (48, 48), (24, 24)),
        ({"do_resize": False, "size": 48}, None, None),
    ],
)
def test_height_and_width_of_a_processors_file(told, resize, crop, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    found = preprocess.of_folder(tmp_path, (8, 8))
    assert (found.resize, found.crop) == (resize, crop)
    if crop or isinstance(resize, tuple):
        assert found(rgb(50, 30)).shape[2:] == (crop or resize)


def test_class_names_by_their_numbers(tmp_path):
    assert preprocess.class_names(tmp_path) == {}
    for told, want in [
        ({}, {}),
        ([], {}),
        ({"id2label": None, "label_names": None}, {}),
        ({"id2label": {"10": "k", "2": "c"}}, {10: "k", 2: "c"}),
        ({"id2label": {"0": "LABEL_0", "1": "bee"}}, {0: "LABEL_0", 1: "bee"}),
        ({"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}, {0: "LABEL_1", 1: "LABEL_0"}),
        ({"id2label": {}, "label_names": ["ant"]}, {0: "ant"}),
        ({"id2label": {"0": "bee"}, "label_names": ["ant"]}, {0: "bee"}),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(told))
        assert preprocess.class_names(tmp_path) == want
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        preprocess.class_names(tmp_path)
