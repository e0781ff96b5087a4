"""`vit classify`, `attention` and `inspect` on our own files: grey images, and what the note in the file says."""

import json

import numpy as np
import pytest
import torch

import vit
from vit.commands import cli
from vit.testing.parity import widen

pytest.importorskip("PIL.Image")

from PIL import Image

from vit import preprocess
from vit.training.augment import fit

NAMES = ["ant", "bee", "cat", "dog", "eel"]
MEAN, STD = 0.286, 0.353
GREY = {"mean": (MEAN,), "std": (STD,), "label_names": NAMES, "training": {"seed": 0}}
COLOUR = GREY | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def make(cfg, path, channels=1, **fields) -> vit.VisionTransformer:
    fields = {"img_size": 28, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2} | fields
    model = vit.VisionTransformer(vit.ViTConfig(in_chans=channels, **fields), seed=0).eval()
    widen(model, torch.Generator().manual_seed(1))
    model.pretrained_cfg = cfg
    vit.save_pretrained(model, path, "timm" if path.suffix else "hf")
    return model


def pixels(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with grey.png, colour.png and model.npz, a model of grey images, as the current one."""
    Image.fromarray(pixels(28, 28)).save(tmp_path / "grey.png")
    Image.fromarray(pixels(28, 28, 3)).save(tmp_path / "colour.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def expected(model, image: np.ndarray) -> list[str]:
    """The lines of classes for an image [H, W, C] that is already normalised, by the reference."""
    exact = vit.reference.VisionTransformer(model.config, seed=0).double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        probs = exact(torch.from_numpy(image).movedim(2, 0)[None])[0].softmax(0).numpy()
    return [f"  {100 * probs[i]:6.2f} %  {NAMES[i]} ({i})" for i in np.argsort(-probs)]


def classified(capsys, *words) -> list[str]:
    assert cli.main(["classify", *words]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words) -> str:
    assert cli.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "%" not in out
    return err


# ---- classify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_grey_image_needs_no_option(suffix, here, capsys):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model = make(GREY, here / f"best{suffix}")
    first, *lines = classified(capsys, "grey.png", "--weights", f"best{suffix}")
    assert "28 x 28 pixels: grey, resized to 28 x 28, bilinear, mean 0.286, std 0.353 (as best." in first
    assert lines == expected(model, (pixels(28, 28, 1).astype(float) / 255 - MEAN) / STD)


def test_colours_become_luminance(here, capsys):
    """ITU-R 601-2, as Pillow says of its mode L, to within its rounding."""
    luminance = (pixels(28, 28, 3).astype(float) @ [0.299, 0.587, 0.114])[..., None]
    prepare = preprocess.Preprocessing("me", (28, 28), None, 2, (MEAN,), (STD,))
    found = prepare(preprocess.open_photo(here / "colour.png"))
    assert found.shape == (1, 1, 28, 28) and found.dtype is torch.float32
    assert np.abs(found[0, 0].numpy() * STD + MEAN - luminance[..., 0] / 255).max() < 0.51 / 255
    assert prepare.view(Image.open("colour.png")).mode == "L"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(40, 61), (28, 28), (11, 90)])
def test_other_sizes_are_resized_whole_as_in_training(size, channels, here):
    image = pixels(*size, channels)
    cfg = GREY if channels == 1 else COLOUR
    prepare = preprocess.of_note(cfg | {"source": "timm"}, (28, 20), "it").for_channels(channels)
    Image.fromarray(image.squeeze(2) if channels == 1 else image).save("p.png")
    found = prepare(preprocess.open_photo(here / "p.png"))
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    levels = (found[0] * std + mean) * 255
    assert (levels - fit(image[None], (28, 20))[0]).abs().max() < 1.1


def test_the_note_of_a_model_of_colours(here, capsys):
    """Also if training started from the weights of a library with other means."""
    model = make(COLOUR | {"source": "google"}, here / "best.npz", 3)
    first, *lines = classified(capsys, "colour.png", "--weights", "best.npz")
    assert "pixels: resized to 28 x 28, bilinear, mean 0.1 0.2 0.3, std 0.4 0.5 0.6 (as best.npz says)" in first
    assert lines == expected(model, (pixels(28, 28, 3).astype(float) / 255 - COLOUR["mean"]) / COLOUR["std"])
    first, *lines = classified(capsys, "colour.png", "--weights", "best.npz", "--preprocess", "timm", "--top", "2")
    assert "shorter side to 31, bicubic, centre 28 x 28, mean 0.5" in first and len(lines) == 2


def test_weights_that_we_did_not_train_are_prepared_as_their_library_does(here, capsys):
    make({"source": "google", "mean": (0.1,) * 3, "std": (0.2,) * 3, "label_names": NAMES}, here / "m.npz", 3)
    first, *lines = classified(capsys, "colour.png", "--weights", "m.npz")
    assert "mean 0.5, std 0.5 (google-research/vision_transformer)" in first and "eel (4)" in " ".join(lines)
    make({"source": "google", "label_names": [*NAMES, "fox"]}, here / "m.npz", 3)  # of an earlier head
    assert "no class names" in " ".join(classified(capsys, "colour.png", "--weights", "m.npz"))
    make({"source": "timm", "label_names": NAMES}, here / "m.npz", 3)
    assert "--preprocess: google, " in refused(capsys, "classify", "colour.png", "--weights", "m.npz")


def test_grey_models_and_preprocessing_for_colours(here, capsys):
    make({}, here / "m.npz")
    said = classified(capsys, "grey.png", "--weights", "m.npz", "--preprocess", "hf")
    assert "grey, resized to 28 x 28, bilinear, mean 0.5, std 0.5 (ViTImageProcessor" in said[0]
    assert said[1].endswith("these are indices:") and "class " in said[2]
    wrong = refused(capsys, "classify", "grey.png", "--weights", "m.npz", "--preprocess", "torchvision")
    assert wrong == (
        "vit classify: torchvision, IMAGENET1K_V1 prepares pictures with 3 channels, but the model takes 1\n"
    )
    make({"mean": (0.1, 0.2), "std": (0.3, 0.4)}, here / "two.npz", 2)
    wrong = refused(capsys, "classify", "grey.png", "--weights", "two.npz")
    assert wrong == "vit classify: the model takes images with 2 channels, but photographs have 1 or 3\n"
    assert preprocess.preprocessing("hf", (8, 8)).for_channels(3).mean == (0.5,) * 3
    one = preprocess.Preprocessing("me", None, None, 2, (0.4,), (0.2,))
    assert (one.for_channels(3).mean, one.for_channels(3).std) == ((0.4,) * 3, (0.2,) * 3)


def test_a_grey_folder_of_transformers(here, capsys):
    model = make(GREY, here / "folder", img_size=16, patch_size=8)
    told = json.loads((here / "folder" / "preprocessor_config.json").read_text())
    assert told["image_mean"] == [MEAN]
    Image.fromarray(pixels(16, 16)).save("small.png")
    first, *lines = classified(capsys, "small.png", "--weights", "folder")
    assert "grey, resized to 16 x 16, bilinear, mean 0.286" in first
    assert lines == expected(model, (pixels(16, 16, 1).astype(float) / 255 - MEAN) / STD)


@pytest.mark.parametrize(
    "wrong",
    [{"std": (0.0,)}, {"std": (float("nan"),)}, {"mean": (float("inf"),)}, {"std": ()}, {"mean": (), "std": ()}],
)
def test_a_note_that_cannot_normalise(wrong, here, capsys):
    make(GREY | wrong, here / "m.npz")
    assert "cannot normalise a picture" in refused(capsys, "classify", "grey.png", "--weights", "m.npz")


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (["LABEL_0", "LABEL_1"], {}), (None, {}), (7, {}), ("ant", {}), ([], {}), (["a", 3], {0: "a", 1: "3"}),
        ({"0": "a"}, {0: "a"}),
    ],
)  # fmt: skip
def test_names_of_a_note(told, names):
    assert preprocess.real_names(told) == names


# ---- attention and inspect -------------------------------------------------------------------------------------------


def test_attention_of_a_grey_image(here, capsys):
    model = make(GREY, here / "best.npz")
    assert cli.main(["attention", "grey.png", "colour.png", "--weights", "best.npz", "--save", "a.npz"]) == 0
    assert "\ngrey, resized to 28 x 28" in capsys.readouterr().out
    image = torch.from_numpy((pixels(28, 28).astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD))
    _, maps = model.attention_maps(image[None, None])
    with np.load("a.npz") as found:
        assert found["rows"].shape == (2, 2, 2, 50)
        for layer, probs in maps.items():
            np.testing.assert_allclose(found["rows"][layer, 0], probs[0, :, 0].detach(), atol=1e-5)
        assert np.abs(found["rows"][:, 0] - found["rows"][:, 1]).max() > 1e-3


def test_the_figure_shows_a_grey_photograph_in_grey(here):
    """And not in the colours of matplotlib's default map, which it gives to arrays with one channel."""
    pytest.importorskip("matplotlib")
    make(GREY, here / "best.npz")
    Image.new("L", (28, 28), 77).save("flat.png")
    Image.new("RGB", (28, 28), (200, 40, 30)).save("red.png")
    assert cli.main(["attention", "flat.png", "red.png", "--weights", "best.npz", "-o", "o.png", "--rollout"]) == 0
    luminance = round(0.299 * 200 + 0.587 * 40 + 0.114 * 30)
    for name, level in (("o-1.png", 77), ("o-2.png", luminance)):
        figure = np.array(Image.open(name).convert("RGB"))
        assert (figure == level).all(-1).sum() > 10_000


def test_inspect_a_grey_model(here, capsys):
    pytest.importorskip("matplotlib")
    make(GREY, here / "best.npz")
    assert cli.main(["inspect", "--weights", "best.npz", "--save", "i.npz", "-o", "i.png"]) == 0
    assert "32 filters of 1 x 4 x 4; the first 16 principal components" in capsys.readouterr().out
    with np.load("i.npz") as found:
        assert found["filters"].shape == (16, 1, 4, 4) and found["position_similarity"].shape == (7, 7, 7, 7)
    assert max(Image.open("i.png").size) > 500
