"""Data sets against what was written into them, and one line for each kind of damage."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from PIL import Image

from vit.training import data
from vit.training.data import open_data, split_validation, subset
from vit.training.errors import TrainingError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (20, 5, 4), np.uint8), (np.arange(20) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, *, train=(IMAGES, LABELS), test=(IMAGES[:7], LABELS[:7]), gz=True):
    folder.mkdir(exist_ok=True)
    for prefix, arrays in (("train", train), ("t10k", test)):
        for end, array in zip(("images-idx3", "labels-idx1"), arrays or (), strict=False):
            content = idx(array)
            path = folder / f"{prefix}-{end}-ubyte{'.gz' if gz else ''}"
            path.write_bytes(gzip.compress(content) if gz else content)
    return folder


def write_folder(folder, images=6, size=(8, 6), classes=("cat", "dog", "emu"), mode="RGB", suffix="png"):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            array = np.random.default_rng([label, i]).integers(0, 256, (*size, len(mode)), np.uint8).squeeze()
            Image.fromarray(array).save(folder / name / f"{i}.{suffix}")
    return folder


def refused(source, *words: str) -> str:
    with pytest.raises(TrainingError) as caught:
        opened = open_data(str(source))
        for split in (opened.train, opened.test):
            for i in range(len(split) if split else 0):
                split[i]
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


@pytest.mark.parametrize("gz", [True, False])
def test_idx(gz, tmp_path):
    opened = open_data(str(write_idx(tmp_path / "d", gz=gz)))
    assert (opened.train.pixels() == IMAGES[..., None]).all() and (opened.train[3] == IMAGES[3][..., None]).all()
    assert opened.train.labels.dtype == np.int64 and (opened.train.labels == LABELS).all()
    assert len(opened.test) == 7 and (opened.test.pixels()[..., 0] == IMAGES[:7]).all()
    assert opened.channels == 1 and opened.image_size == (5, 4) and opened.licence == ""
    assert opened.classes == tuple("0123456789")
    np.testing.assert_allclose(opened.mean, [(IMAGES / 255).mean()], rtol=1e-12)
    np.testing.assert_allclose(opened.std, [(IMAGES / 255).std()], rtol=1e-12)
    assert open_data(str(write_idx(tmp_path / "e", test=None))).test is None


def test_fashion_mnist_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(write_idx(tmp_path / "d")))
    opened = open_data("fashion-mnist")
    assert opened.classes[9] == "Ankle boot" and opened.licence == "MIT" and opened.name == "fashion-mnist"
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "missing"))
    refused("fashion-mnist", "apt install dataset-fashion-mnist", "IDX", "missing")
    monkeypatch.delenv("FASHION_MNIST")
    monkeypatch.setattr(data, "_PLACES", (tmp_path / "d",))
    assert len(open_data("fashion-mnist").train) == 20
    write_idx(tmp_path / "d", train=(IMAGES, LABELS + 5))
    refused("fashion-mnist", "label 14", "10 classes")


def test_the_real_fashion_mnist():
    if not data._PLACES[0].is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    opened = open_data(str(data._PLACES[0]))
    assert len(opened.train) == 60_000 and len(opened.test) == 10_000 and opened.image_size == (28, 28)
    assert opened.classes[0] == "T-shirt/top" and opened.licence == "MIT"  # told by the labels, not by the name
    np.testing.assert_allclose((*opened.mean, *opened.std), (0.2860, 0.3530), atol=5e-5)  # well-known figures
    assert (np.bincount(opened.test.labels) == 1000).all()


def test_npz(tmp_path):
    colour = RNG.integers(0, 256, (9, 4, 4, 3), np.uint8) // np.array([1, 2, 3], np.uint8)
    path, labels = tmp_path / "d.npz", np.arange(9).reshape(9, 1) % 3
    np.savez_compressed(path, images=colour, labels=labels, classes=["a", "b", "c"], x_test=colour[:2], y_test=[2, 1])
    opened = open_data(str(path))
    assert opened.channels == 3 and opened.classes == ("a", "b", "c") and (opened.train.pixels() == colour).all()
    assert opened.train.labels.tolist() == [0, 1, 2] * 3 and opened.test.labels.tolist() == [2, 1]
    np.testing.assert_allclose(opened.mean, (colour / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(opened.std, (colour / 255).std((0, 1, 2)))
    np.savez(path, x_train=colour[..., 0], y_train=labels[:, 0])
    assert open_data(str(path)).channels == 1 and open_data(str(path)).test is None


@pytest.mark.parametrize("nested", ["test", "val", None])
def test_folder(nested, tmp_path):
    write_folder(tmp_path / "train" if nested else tmp_path)
    (tmp_path / ".cache").mkdir()
    if nested:
        write_folder(tmp_path / nested, images=2, classes=("dog",), size=(3, 3))
    opened = open_data(str(tmp_path))
    assert opened.classes == ("cat", "dog", "emu") and opened.image_size == (8, 6) and opened.channels == 3
    assert opened.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and opened.train.pixels() is None
    expected = np.random.default_rng([1, 2]).integers(0, 256, (8, 6, 3), np.uint8)
    assert (pickle.loads(pickle.dumps(opened.train))[8] == expected).all()
    every = np.stack([opened.train[i] for i in range(18)]) / 255
    np.testing.assert_allclose(opened.mean, every.mean((0, 1, 2)))
    np.testing.assert_allclose(opened.std, every.std((0, 1, 2)))
    assert (opened.test.labels.tolist() if nested else opened.test) == ([1, 1] if nested else None)


def test_grey_folder_of_different_sizes(tmp_path):
    write_folder(tmp_path, mode="L")
    Image.new("L", (9, 9), 100).save(tmp_path / "cat" / "z.png")
    opened = open_data(str(tmp_path))
    assert opened.channels == 1 and opened.image_size is None and opened.train[6].shape == (9, 9, 1)
    means = [opened.train[i].mean() / 255 for i in range(19)]
    np.testing.assert_allclose(opened.mean, [np.mean(means)])  # a larger image has the same weight


def test_digest(tmp_path):
    """It follows the content, not the place."""
    digest = open_data(str(write_idx(tmp_path / "d"))).digest
    assert open_data(str(write_idx(tmp_path / "e", gz=False))).digest == digest
    other, labels = IMAGES.copy(), LABELS.copy()
    other[19, 4, 3] ^= 1
    labels[[0, 1]] = labels[[1, 0]]
    for i, train in enumerate([(other, LABELS), (IMAGES, labels), (IMAGES.reshape(20, 4, 5), LABELS)]):
        assert open_data(str(write_idx(tmp_path / str(i), train=train))).digest != digest
    assert open_data(str(write_idx(tmp_path / "f", test=None))).digest != digest
    digest = open_data(str(write_folder(tmp_path / "g"))).digest
    assert open_data(str(write_folder(tmp_path / "h"))).digest == digest
    (tmp_path / "h/cat/0.png").rename(tmp_path / "h/dog/00.png")
    assert open_data(str(tmp_path / "h")).digest != digest


def test_bad_idx(tmp_path):
    def damaged(name, change, *words):
        path = write_idx(tmp_path / "d") / name
        path.write_bytes(change(path.read_bytes()))
        refused(tmp_path / "d", str(path), *words)

    images, labels = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"
    damaged(images, lambda b: b[:-20], "damaged", "download")
    damaged(images, lambda b: b[:100] + b"\0\0\0\0" + b[104:], "damaged")
    damaged(images, lambda b: b[:10] + b"\xff" + b[11:], "damaged", "invalid block type")
    damaged(images, lambda b: b"GIF" + b, "damaged")
    damaged(images, lambda b: gzip.compress(idx(LABELS)), "00000801 instead of 00000803")
    damaged(labels, lambda b: gzip.compress(b""), "nothing instead of 00000801")
    damaged(images, lambda b: gzip.compress(idx(IMAGES)[:-1]), "20 x 5 x 4", "399")
    damaged(images, lambda b: gzip.compress(struct.pack(">4I", 0x803, 1 << 31, 1 << 31, 1 << 31)), "holds 0")
    damaged(images, lambda b: gzip.compress(idx(IMAGES[:19])), "20 labels", "19 images")
    (write_idx(tmp_path / "d") / labels).unlink()
    refused(tmp_path / "d", "t10k-labels-idx1-ubyte", "is missing")
    refused(write_idx(tmp_path / "e", test=(IMAGES, LABELS + 1)), "test image has label 10", "10 classes")
    refused(write_idx(tmp_path / "f", train=(IMAGES, LABELS + 90)), "label 99 of 20 images")
    refused(write_idx(tmp_path / "g", train=(IMAGES, 0 * LABELS), test=None), "one class only")
    refused(write_idx(tmp_path / "h", train=(IMAGES[:0], LABELS[:0])), "holds no image")
    refused(tmp_path / "d" / images, "name their folder")
    refused(tmp_path / "nowhere", "nowhere: no such data set")


class Trap:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_bad_npz(tmp_path, capsys):
    def bad(*words, **arrays):
        np.savez(tmp_path / "d.npz", **arrays)
        refused(tmp_path / "d.npz", "d.npz", *words)

    labels, objects = LABELS.astype(int), np.array([Trap()] * 20, object)
    bad("Python objects", images=objects, labels=labels)
    bad("Python objects", images=IMAGES, labels=labels, classes=np.array(["a", None], object))
    assert "unpickled" not in capsys.readouterr().out.splitlines()
    bad("no array labels or y_train", images=IMAGES)
    bad("no array images or x_train", a=IMAGES)
    bad("no array x_test", images=IMAGES, labels=labels, y_test=labels)
    bad("float64 [20, 5, 4] is not uint8", images=IMAGES / 255, labels=labels)
    bad("uint8 [20, 5, 2, 2] is not uint8", images=IMAGES.reshape(20, 5, 2, 2), labels=labels)
    bad("float64 [20] is not integers", images=IMAGES, labels=labels / 2)
    bad("19 labels", "20 images", images=IMAGES, labels=labels[1:])
    bad("label -1", images=IMAGES, labels=labels - 1)
    bad("label 9", "2 classes", images=IMAGES, labels=labels, classes=["a", "b"])
    bad("is not a list of names", images=IMAGES, labels=labels, classes=np.arange(10))
    bad("3 and 1 channels", images=IMAGES.reshape(20, 5, -1)[..., :3, None].repeat(3, 3), labels=labels,
        x_test=IMAGES, y_test=labels)  # fmt: skip
    np.savez(tmp_path / "d.npz", images=IMAGES, labels=labels)
    content = (tmp_path / "d.npz").read_bytes()
    for broken in (content[:-30], content[:500] + b"?" + content[501:], b"", b"text"):
        (tmp_path / "d.npz").write_bytes(broken)
        refused(tmp_path / "d.npz", "d.npz", "damaged")


def test_bad_folder(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither IDX files nor folders")
    refused(write_folder(tmp_path / "one", classes=("cat",)), "one class only")
    folder = write_folder(tmp_path / "some")
    (folder / "fox").mkdir()
    refused(folder, str(folder / "fox"), "holds no image")
    write_folder(tmp_path / "new/train")
    write_folder(tmp_path / "new/test", classes=("yak",))
    refused(tmp_path / "new", "yak", "without training images")
    broken = write_folder(tmp_path / "broken", size=(40, 40), suffix="jpg") / "dog" / "3.jpg"
    content = broken.read_bytes()
    for damage, words in ((content[:-400], "truncated"), (b"not a picture", "not a picture"), (b"", "not a picture")):
        broken.write_bytes(damage)
        assert refused(tmp_path / "broken", str(broken), words, "repair or remove it").count("3.jpg") == 1
    monkeypatch.setattr(data, "_SAMPLED", 2)  # the broken image is not among those that are decoded at first
    open_data(str(tmp_path / "broken"))
    refused(tmp_path / "broken", str(broken))


def test_a_folder_needs_pillow(tmp_path, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "vit.preprocess", raising=False)
    monkeypatch.delattr("vit.preprocess", raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    refused(write_idx(tmp_path).parent / "nothing", "no such")
    open_data(str(tmp_path))
    (tmp_path / "images").mkdir()
    refused(tmp_path / "images", "requires Pillow: pip install Pillow")


def test_validation():
    labels = np.repeat([0, 1, 2, 3], [100, 40, 3, 1])
    split = data.ArraySplit(np.zeros((144, 1, 1, 1), np.uint8), labels)
    train, validation = split_validation(split, 0.1, seed=0)
    assert np.bincount(labels[validation], minlength=4).tolist() == [10, 4, 1, 0]
    assert sorted([*train, *validation]) == list(range(144)) and (np.diff(train) > 0).all()
    assert (split_validation(split, 0.1, seed=0)[1] == validation).all()
    assert (split_validation(split, 0.1, seed=1)[1] != validation).any()
    assert len(split_validation(split, 0, seed=0)[1]) == 0
    assert np.bincount(labels[split_validation(split, 0.99, seed=0)[0]]).tolist() == [1, 1, 1, 1]
    for fraction in (1, -0.1, float("nan")):
        with pytest.raises(TrainingError, match="not possible"):
            split_validation(split, fraction, seed=0)
    with pytest.raises(TrainingError, match="no class has two images"):
        split_validation(data.ArraySplit(np.zeros((2, 1, 1, 1), np.uint8), np.array([0, 1])), 0.5, seed=0)


def test_subsets_are_nested():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [600, 300, 100]))
    indices = np.arange(1000)[::-1][:900]
    previous = np.array([], int)
    for size in (1, 10, 100, 450, 900):
        chosen = subset(indices, labels, size, seed=3)
        assert len(set(chosen)) == size and set(previous) <= set(chosen) <= set(indices)
        expected = size * np.bincount(labels[indices]) / 900
        assert (np.abs(np.bincount(labels[chosen], minlength=3) - expected) <= 1).all()
        previous = chosen
    assert set(subset(indices, labels, 100, seed=3)) != set(subset(indices, labels, 100, seed=4))
    balanced = np.arange(60) % 10
    assert (np.bincount(balanced[subset(np.arange(60), balanced, 30, seed=0)]) == 3).all()
    for size in (0, 901):
        with pytest.raises(TrainingError, match="there are 900"):
            subset(indices, labels, size, seed=0)
