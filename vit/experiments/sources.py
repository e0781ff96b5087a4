"""The images of an experiment: parts of data sets."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from vit.training.data import ArraySplit, Data, FolderSplit, Split, open_data, split_validation, subset
from vit.training.errors import TrainingError


def sources(source: str, *, transfer: bool, pretrain: str, quick: bool) -> tuple[Data, Data | None]:
    """The data, with test images, and those of the pre-training.

    Without test images, a fifth of the training images is the test.

    Args:
        source: the data, see `open_data`.
        transfer: whether there is a pre-training.
        pretrain: its data; "" means the classes of ``source`` with an odd index. The others are then the data.
        quick: 2,000 training images and 500 test images, for a rehearsal.

    Raises:
        TrainingError: the data cannot be read or do not fit.
    """
    data, other = open_data(source), open_data(pretrain) if pretrain else None
    if data.test is None:
        train, test = split_validation(data.train, 0.2, seed=0)
        data = dataclasses.replace(taken(data, train, []), test=taken(data, test, []).train)
    if transfer and other is None:
        if len(data.classes) < 4:
            raise TrainingError(f"{source} has {len(data.classes)} classes, too few to split; name --pretrain OTHER")
        data, other = (of_classes(data, range(first, len(data.classes), 2)) for first in (0, 1))
    if other is not None and other.channels != data.channels:
        channels = f"{pretrain} has {other.channels} channels, but {source} has {data.channels}"
        raise TrainingError(f"{channels}; choose other data")
    if quick:
        data, other = (None if every is None else _few(every) for every in (data, other))
    return data, other


def taken(data: Data, train: Iterable[int], test: Iterable[int]) -> Data:
    """The data with these images alone. Mean and std stay those of all training images."""
    train, test = (np.asarray(list(indices), np.int64) for indices in (train, test))
    digest = hashlib.sha256(data.digest.encode() + train.tobytes() + b"test" + test.tobytes()).hexdigest()
    splits = _taken(data.train, train), _taken(data.test, test) if len(test) else None
    return dataclasses.replace(data, train=splits[0], test=splits[1], digest=digest)


def of_classes(data: Data, chosen: Iterable[int]) -> Data:
    """The images of these classes, which are numbered anew."""
    chosen = list(chosen)
    new = np.full(len(data.classes), -1)
    new[chosen] = np.arange(len(chosen))
    made = taken(data, *(np.flatnonzero(new[split.labels] >= 0) for split in (data.train, data.test)))
    for split in (made.train, made.test):
        split.labels = new[split.labels]
    return dataclasses.replace(made, classes=tuple(data.classes[i] for i in chosen))


def _taken(split: Split, indices: np.ndarray) -> Split:
    if isinstance(split, FolderSplit):
        return FolderSplit([split.paths[i] for i in indices], split.labels[indices], split.channels)
    return ArraySplit(split.pixels()[indices], split.labels[indices])


def _few(data: Data) -> Data:
    train, test = (
        subset(np.arange(len(split)), split.labels, min(len(split), most), seed=0) if split else []
        for split, most in ((data.train, 2000), (data.test, 500))
    )
    return taken(data, train, test)
