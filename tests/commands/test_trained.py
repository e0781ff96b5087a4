"""The weights that ship: their model card is true, and the demo's part with them can fail."""

import gzip
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

import vit
from vit.commands import trained

ASSETS = resources.files("vit") / "assets"
FULL = Path("/usr/share/datasets/fashion-mnist")


def reference():
    """The network in plain torch.nn with the shipped weights, which numpy reads, and what normalises its images."""
    model = vit.load_pretrained(ASSETS / trained.WEIGHTS)
    plain = vit.reference.VisionTransformer(model.config)
    with np.load(ASSETS / trained.WEIGHTS, allow_pickle=False) as arrays:
        plain.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return plain.eval(), model.pretrained_cfg


def accuracy(images, labels):
    model, cfg = reference()
    pixels = (torch.from_numpy(images.copy())[:, None] / 255 - cfg["mean"][0]) / cfg["std"][0]
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in pixels.split(500)])
    return 100 * np.mean(found.numpy() == labels)


def card():
    return (ASSETS / "fashion-mnist.md").read_text(encoding="utf-8")


def test_the_committed_images_have_the_accuracy_of_the_card():
    """Another CPU rounds differently, which may change one image."""
    with np.load(ASSETS / trained.IMAGES, allow_pickle=False) as arrays:
        found = accuracy(arrays["images"], arrays["labels"])
    told = re.search(r"first 500 test images \| accuracy ([\d.]+) %", card())
    assert abs(found - float(told[1])) <= 0.2


@pytest.mark.ci
@pytest.mark.skipif(not FULL.exists(), reason="Fashion-MNIST is not installed: apt install dataset-fashion-mnist")
def test_all_test_images_have_the_accuracy_of_the_card():
    def read(name, offset):
        return np.frombuffer(gzip.decompress((FULL / name).read_bytes()), np.uint8, offset=offset)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    labels = read("t10k-labels-idx1-ubyte.gz", 8)
    told = float(re.search(r"\| test \| accuracy ([\d.]+) %", card())[1])
    assert told == round(reference()[1]["training"]["test_top1"], 2) and told >= 89
    assert abs(accuracy(images, labels) - told) <= 0.05
    with np.load(ASSETS / trained.IMAGES, allow_pickle=False) as arrays:
        assert (arrays["images"] == images[:500]).all() and (arrays["labels"] == labels[:500]).all()


def test_the_file_says_where_it_comes_from():
    told, text = reference()[1]["training"], card()
    assert {"command", "seed", "data", "licence", "commit", "test_top1", "sha256"} <= told.keys()
    assert told["licence"] == "MIT" and told["command"] in text and told["sha256"] in text and told["commit"] in text
    assert "MIT" in (ASSETS / "LICENSE.txt").read_text(encoding="utf-8").partition("fashion-mnist")[2]
    assert sum(path.stat().st_size for path in Path(str(ASSETS)).glob("fashion-mnist*")) < 4e6


def test_the_demo_counts_what_is_right(monkeypatch, capsys):
    """Each label moved to the next class: what was right is wrong, and the demo fails."""
    model, images, labels = trained.load(torch.device("cpu"))
    pictures = {}
    for moved in (0, 1):
        monkeypatch.setattr(trained, "load", lambda device, moved=moved: (model, images, (labels + moved) % 10))
        pictures[moved], passed = trained.show(torch.device("cpu"))
        out = capsys.readouterr().out
        right = int(re.search(r" (\d+) right", out)[1])
        assert passed == (moved == 0) and (right > 38) == passed
        assert out.count(" taken for ") == 48 - right
    assert pictures[0].tobytes() == pictures[1].tobytes() and pictures[0].size == (904, 220)
    drawn = np.asarray(pictures[0])
    places = ((np.arange(106) + 0.5) * 28 / 106).astype(int)  # the nearest pixel of an image
    for i in range(8):
        panel = drawn[:106, 114 * i : 114 * i + 106]
        assert (panel == images[i][places][:, places][..., None]).all()
