"""Labelled images from IDX files, an image folder or an ``.npz`` file.

Nothing here executes what a file contains. Shapes: n images, H and W pixels, C channels (1 or 3), K classes.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vit.training.augment import uniforms
from vit.training.errors import TrainingError

FASHION_MNIST = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

_PLACES = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
_FASHION_LABELS = "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7"
_NPZ = ("images", "labels", "x_train", "y_train", "x_test", "y_test", "classes")
_SAMPLED = 1000  # images of a folder that are decoded for mean and std
_FOLDS, _SUBSETS = 2, 3  # streams of random numbers; the loader has 0 and 1


class Split:
    """Labelled images: ``split[i]`` is image i in uint8 [H, W, C], and ``split.labels`` is int64 [n]."""

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> np.ndarray:
        raise NotImplementedError

    def pixels(self) -> np.ndarray | None:
        """All images in uint8 [n, H, W, C], or None if they are not in memory."""
        return None


class ArraySplit(Split):
    """Images in memory: uint8 [n, H, W, C]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images, self.labels = images, labels

    def __getitem__(self, i: int) -> np.ndarray:
        return self._images[i]

    def pixels(self) -> np.ndarray:
        """All images in uint8 [n, H, W, C]."""
        return self._images


class FolderSplit(Split):
    """Image files, which Pillow decodes one by one."""

    def __init__(self, paths: Sequence[str], labels: np.ndarray, channels: int = 3):
        self.paths, self.labels, self.channels = paths, labels, channels

    def __getitem__(self, i: int) -> np.ndarray:
        photo = _preprocess().open_photo
        try:
            image = photo(Path(self.paths[i]))
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error).replace(self.paths[i], "it")
            raise TrainingError(f"{self.paths[i]}: {reason}; repair or remove it") from error
        return np.array(image) if self.channels == 3 else np.array(image.convert("L"))[..., None]


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        name: the source, as typed.
        train: the training images.
        test: the test images, if the source has them.
        classes: the names of the K classes.
        channels: 1 or 3. A folder has 1 if all sampled images are grey.
        image_size: (H, W) if all training images have one size. Of a folder, a sample is looked at.
        mean: of each channel, in 0..1, over the training images. A folder's are over at most 1,000 of them, each
            with the same weight.
        std: likewise.
        licence: "" if unknown.
        digest: SHA-256 in hex of labels, class names, and pixels or file names and sizes.
    """

    name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    digest: str


def open_data(source: str) -> Data:
    """Opens a data set.

    Args:
        source: one of

            - ``fashion-mnist``: the folder in the variable FASHION_MNIST, or else the one of Debian's package
              dataset-fashion-mnist, or else data/fashion-mnist;
            - a folder with IDX files: train-images-idx3-ubyte, train-labels-idx1-ubyte, and the same with t10k for
              the test, each with or without .gz;
            - a folder with DIR/train/CLASS/FILE, and DIR/test or else DIR/val for the test; or DIR/CLASS/FILE, without
              test images;
            - an ``.npz`` with ``images`` in uint8 [n, H, W] or [n, H, W, C] and ``labels``, integers [n] or [n, 1];
              ``x_train`` and ``y_train`` are the same. Optional: ``x_test`` and ``y_test``; ``classes``, K names.

    Raises:
        TrainingError: the source is missing, incomplete or damaged. The message names the file.
    """
    path, fashion = Path(source), source == "fashion-mnist"
    try:
        if fashion:
            path = _fashion_mnist()
        if path.is_file():
            if path.suffix != ".npz":
                raise TrainingError(f"{path} is a file, but not an .npz; for IDX files or images, name their folder")
            return _of_npz(source, path)
        if not path.is_dir():
            raise TrainingError(f"{source}: no such data set; name a folder, an .npz file, or fashion-mnist")
        if _idx(path, "train", "images") or _idx(path, "train", "labels"):
            return _of_idx(source, path, fashion)
        return _of_folder(source, path)
    except OSError as error:
        raise TrainingError(f"{error.filename or source}: {error.strerror or error}") from error


def split_validation(split: Split, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits off validation images: the same fraction of each class, with one image or more where there are two.

    Args:
        split: the training images.
        fraction: at least 0 and less than 1; 0 means no validation images.
        seed: decides which.

    Returns:
        Indices of training and of validation images, int64, each in ascending order.

    Raises:
        TrainingError: the fraction is out of range, or no image can be split off.
    """
    if not 0 <= fraction < 1:
        raise TrainingError(f"a validation fraction of {fraction:g} is not possible: choose 0 or more, and less than 1")
    every = np.arange(len(split))
    ranks, counts = _ranks(every, split.labels, seed, _FOLDS)
    taken = np.rint(fraction * counts).clip(1, counts - 1) if fraction else 0
    validation = ranks < taken
    if fraction and not validation.any():
        raise TrainingError("no class has two images, so none can be split off for validation: choose a fraction of 0")
    return every[~validation], every[validation]


def subset(indices: np.ndarray, labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The first ``size`` of ``indices`` in an order that takes the classes in turn, in proportion.

    A smaller subset is part of a larger one with the same ``indices`` and ``seed``.

    Args:
        indices: of the images to choose from.
        labels: of the whole split, not only of ``indices``.
        size: number of images.
        seed: decides the order.

    Returns:
        int64 [size], in ascending order.

    Raises:
        TrainingError: there are fewer images.
    """
    if not 0 < size <= len(indices):
        raise TrainingError(f"{size} training images are not possible: there are {len(indices)}")
    ranks, counts = _ranks(indices, labels, seed, _SUBSETS)
    ties = uniforms((seed, 0, _SUBSETS), indices, 2)[:, 1]
    return np.sort(indices[np.lexsort((ties, (ranks + 0.5) / counts))[:size]])


def _ranks(indices: np.ndarray, labels: np.ndarray, seed: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """For each index its rank within its class, in a random order, and the size of the class."""
    draws, labels = uniforms((seed, 0, stream), indices, 1)[:, 0], labels[indices]
    order = np.lexsort((draws, labels))
    counts = np.bincount(labels)
    starts = counts.cumsum() - counts
    ranks = np.empty(len(indices), np.int64)
    ranks[order] = np.arange(len(indices)) - starts[labels[order]]
    return ranks, counts[labels]


def _fashion_mnist() -> Path:
    told = os.environ.get("FASHION_MNIST")
    found = next((place for place in ((Path(told),) if told else _PLACES) if place.is_dir()), None)
    if found is None:
        where = f"FASHION_MNIST={told}" if told else " or ".join(map(str, _PLACES))
        raise TrainingError(
            f"Fashion-MNIST is not in {where}: apt install dataset-fashion-mnist, or name a folder with its IDX files"
        )
    return found


def _of_idx(name: str, folder: Path, fashion: bool) -> Data:
    splits = []
    for prefix in ("train", "t10k"):
        paths = [_idx(folder, prefix, what) for what in ("images", "labels")]
        if splits and not any(paths):
            splits.append(None)
            continue
        if not all(paths):
            missing = "labels-idx1" if paths[0] else "images-idx3"
            raise TrainingError(f"{folder}/{prefix}-{missing}-ubyte[.gz] is missing; put it beside the others")
        images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
        splits.append(_arrays(images, labels, str(paths[0]), str(paths[1])))
    train, test = splits
    fashion = fashion or hashlib.sha256(train.labels.astype(np.uint8)).hexdigest() == _FASHION_LABELS
    return _in_memory(name, train, test, FASHION_MNIST if fashion else None, "MIT" if fashion else "")


def _idx(folder: Path, prefix: str, what: str) -> Path | None:
    stem = f"{prefix}-{what}-idx{3 if what == 'images' else 1}-ubyte"
    return next((folder / end for end in (stem, f"{stem}.gz") if (folder / end).exists()), None)


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """An array of an IDX file: two zero bytes, 8 for uint8, the number of dimensions, sizes in 4 bytes each, data."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TrainingError(f"{path} is damaged: {error}; download it again") from error
    if content[:4] != bytes((0, 0, 8, dims)):
        raise TrainingError(
            f"{path} starts with {content[:4].hex() or 'nothing'} instead of 000008{dims:02}: it is not an IDX file of "
            f"{'images' if dims == 3 else 'labels'}; download it again"
        )
    shape = tuple(np.frombuffer(content[4 : 4 + 4 * dims].ljust(4 * dims, b"\0"), ">u4").tolist())
    array = np.frombuffer(content, np.uint8)[4 + 4 * dims :]
    if array.size != int(np.prod(shape, dtype=object)):
        sizes = " x ".join(map(str, shape))
        raise TrainingError(f"{path} promises {sizes} bytes, but holds {array.size}; download it again")
    return array.reshape(shape).copy()  # torch warns of arrays that cannot be written


def _of_npz(name: str, path: Path) -> Data:
    if not zipfile.is_zipfile(path):
        raise TrainingError(f"{path} is damaged or not an .npz file; write it again with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in _NPZ if key in file}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
        objects = "Object arrays" in str(error)
        reason = "it holds Python objects, which are never loaded" if objects else f"it is damaged: {error}"
        raise TrainingError(f"{path}: {reason}; write it again with plain arrays") from error
    splits = []
    for known in ((("images", "x_train"), ("labels", "y_train")), (("x_test",), ("y_test",))):
        keys = [next((key for key in keys if key in arrays), None) for keys in known]
        if splits and not any(keys):
            splits.append(None)
            continue
        if not all(keys):
            missing = " or ".join(known[1 if keys[0] else 0])
            raise TrainingError(f"{path} holds no array {missing}; add it")
        images, labels = (arrays[key] for key in keys)
        splits.append(_arrays(images, labels, *(f"{path}, {key}" for key in keys)))
    classes = arrays.get("classes")
    if classes is not None and (classes.ndim != 1 or classes.dtype.kind not in "US"):
        raise TrainingError(f"{path}, classes: {classes.dtype} {classes.shape} is not a list of names; write strings")
    return _in_memory(name, *splits, None if classes is None else tuple(classes.astype(str).tolist()))


def _arrays(images: np.ndarray, labels: np.ndarray, images_name: str, labels_name: str) -> ArraySplit:
    """A split of arrays, after checks of the two against each other."""
    if images.dtype != np.uint8 or (images.ndim != 3 and images.shape[3:] not in ((1,), (3,))):
        got = f"{images.dtype} {list(images.shape)}"
        raise TrainingError(f"{images_name}: {got} is not uint8 [n, H, W] or [n, H, W, 1 or 3]; convert it")
    images = images[..., None] if images.ndim == 3 else images
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TrainingError(f"{labels_name}: {labels.dtype} {list(labels.shape)} is not integers [n]; convert it")
    if len(images) != len(labels):
        raise TrainingError(
            f"{labels_name} has {len(labels)} labels, but {images_name} has {len(images)} images; give one for each"
        )
    if not images.size:
        raise TrainingError(f"{images_name} holds no image; choose another file")
    if labels.min() < 0 or labels.max() >= 1 << 31:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise TrainingError(f"{labels_name}: label {wrong} is not the index of a class; number the classes from 0")
    return ArraySplit(images, labels.astype(np.int64))


def _in_memory(name: str, train: Split, test: Split | None, classes: Sequence[str] | None, licence: str = "") -> Data:
    images = train.pixels()
    if test is not None and test.pixels().shape[3] != images.shape[3]:
        channels = f"{images.shape[3]} and {test.pixels().shape[3]}"
        raise TrainingError(f"{name}: training and test images have {channels} channels; convert one of them")
    highest = int(train.labels.max())
    if classes is None and highest >= len(train):
        raise TrainingError(f"{name}: label {highest} of {len(train)} images is no class; number the classes from 0")
    classes = tuple(map(str, range(highest + 1)) if classes is None else classes)
    step = max(1, (1 << 22) // images[0].size)
    mean, std = _moments(images[i : i + step] for i in range(0, len(images), step))
    return _data(name, train, test, classes, tuple(images.shape[1:3]), mean, std, licence)


def _of_folder(name: str, folder: Path) -> Data:
    _preprocess()
    inner = folder / "train"
    nested = inner.is_dir() and bool(_folders(inner))
    test_folder = next((folder / end for end in ("test", "val") if nested and (folder / end).is_dir()), None)
    classes = tuple(_folders(inner if nested else folder))
    train = _files(inner if nested else folder, classes)
    test = _files(test_folder, classes) if test_folder else None
    sizes, grey = set(), []

    def sampled() -> Iterable[np.ndarray]:
        for i in np.unique(np.linspace(0, len(train) - 1, _SAMPLED).astype(np.int64)):
            image = train[i]
            sizes.add(image.shape[:2])
            grey.append((image == image[..., :1]).all())
            yield image[None]

    mean, std = _moments(sampled())
    if all(grey):
        mean, std = mean[:1], std[:1]
    for split in (train, test) if test else (train,):
        split.channels = len(mean)
    return _data(name, train, test, classes, sizes.pop() if len(sizes) == 1 else None, mean, std, "")


def _folders(folder: Path) -> list[str]:
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _files(folder: Path, classes: tuple[str, ...]) -> FolderSplit:
    unknown = sorted(set(_folders(folder)) - set(classes))
    if unknown:
        raise TrainingError(f"{folder / unknown[0]} is a class without training images; add some or remove it")
    paths, labels = [], []
    for label, name in enumerate(classes):
        if (folder / name).is_dir():
            found = sorted(e.path for e in os.scandir(folder / name) if e.name.lower().endswith(SUFFIXES))
            if not found:
                raise TrainingError(f"{folder / name} holds no image ({' '.join(SUFFIXES)}); add some or remove it")
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise TrainingError(f"{folder} holds neither IDX files nor folders with the images of a class")
    return FolderSplit(paths, np.array(labels, np.int64))


def _moments(pieces: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of each channel in 0..1. Each piece, uint8 [n, H, W, C], has the weight n."""
    levels, total = np.arange(256) / 255, 0
    histogram = np.zeros(1)
    for piece in pieces:
        counts = [np.bincount(piece[..., channel].ravel(), minlength=256) for channel in range(piece.shape[3])]
        histogram = histogram + np.array(counts) / (piece.shape[1] * piece.shape[2])
        total += len(piece)
    mean = histogram @ levels / total
    std = np.sqrt((histogram * (levels - mean[:, None]) ** 2).sum(1) / total)
    std[std < 1e-6] = 1  # a constant channel becomes 0
    return tuple(mean.tolist()), tuple(std.tolist())


def _data(
    name: str,
    train: Split,
    test: Split | None,
    classes: tuple[str, ...],
    image_size: tuple[int, int] | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    licence: str,
) -> Data:
    digest = hashlib.sha256(repr(classes).encode())
    for what, split in (("training", train), ("test", test)):
        if split is None:
            continue
        highest = int(split.labels.max())
        if highest >= len(classes):
            raise TrainingError(
                f"{name}: a {what} image has label {highest}, but there are {len(classes)} classes: correct it"
            )
        digest.update(f"{what} {len(split)}".encode() + split.labels.tobytes())
        if isinstance(split, FolderSplit):
            for path in split.paths:
                digest.update(f"{os.path.basename(path)} {os.path.getsize(path)}\n".encode())
        else:
            images = split.pixels()
            digest.update(repr(images.shape).encode() + np.ascontiguousarray(images).data)
    if len(classes) < 2 or len(np.unique(train.labels)) < 2:
        raise TrainingError(f"{name} has images of one class only; training needs two classes or more")
    return Data(name, train, test, classes, len(mean), image_size, mean, std, licence, digest.hexdigest())


def _preprocess():
    try:
        from vit import preprocess
    except ImportError as error:
        raise TrainingError("an image folder requires Pillow: pip install Pillow") from error
    return preprocess
