"""Batches of a split. They depend on seed, epoch and sample only: not on workers, processes, or where an epoch resumes.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vit.training.augment import Augment, fit, uniforms
from vit.training.data import Split
from vit.training.errors import TrainingError

_ORDER, _AUGMENT = 0, 1  # streams of random numbers


class Batches:
    """The batches of an epoch, normalised and on the device.

    Only one epoch is read at a time. Neither torch's nor numpy's global generators are used.

    Args:
        split: the images.
        indices: int64, which images of the split.
        batch_size: of all processes together.
        img_size: (height, width); an image of another size is resized whole.
        mean: of each channel, in 0..1.
        std: likewise.
        augment: None for evaluation.
        seed: of shuffling and augmentation.
        shuffle: another order in each epoch; otherwise that of ``indices``.
        workers: processes that load; 0 loads in this process, which is best for images in memory.
        device: of the batches.
        rank: this process gets rows rank, rank + world, … of each batch. The last batch of an evaluation can leave it
            none.
        world: number of processes.
        drop_last: drops an incomplete last batch.

    Raises:
        TrainingError: the images do not fill one batch, or ``world`` does not divide ``batch_size``.
    """

    def __init__(
        self,
        split: Split,
        indices: np.ndarray,
        *,
        batch_size: int,
        img_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment | None,
        seed: int,
        shuffle: bool,
        workers: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        drop_last: bool,
    ):
        if batch_size % world:
            raise TrainingError(f"batch size {batch_size} is not divisible by {world} processes; choose one that is")
        if drop_last and len(indices) < batch_size:
            raise TrainingError(f"{len(indices)} images do not fill a batch of {batch_size}; choose a smaller one")
        self.steps = len(indices) // batch_size if drop_last else -(-len(indices) // batch_size)
        self._device = torch.device(device)
        shape = (1, -1, 1, 1)
        self._mean = 255 * torch.tensor(mean, dtype=torch.float32, device=device).view(shape)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float32, device=device).view(shape))
        every, size = np.asarray(indices), tuple(img_size)
        self._source = _Source(split, every, batch_size, len(mean), size, augment, seed, shuffle, rank, world)
        self._keys: list[tuple[int, int]] = []
        self._loader = None
        if workers:
            self._loader = DataLoader(
                self._source,
                batch_size=None,
                sampler=self._keys,
                num_workers=workers,
                collate_fn=_as_it_is,
                pin_memory=self._device.type == "cuda",
                persistent_workers=True,
                worker_init_fn=_own_session,
                generator=torch.Generator(),  # otherwise it draws from the global generator
            )

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: fp32 [B, C, H, W] and int64 [B].

        Args:
            number: of the epoch.
            start: number of batches to skip. They are not loaded.

        Raises:
            TrainingError: an image cannot be read, or a worker died.
        """
        self._keys[:] = [(number, step) for step in range(start, self.steps)]
        for fetched in self._fetched():
            if isinstance(fetched, TrainingError):
                # A new one: a traceback that holds its own error is a cycle, and would keep the workers.
                raise TrainingError(str(fetched))
            images, labels = fetched
            if self._device.type == "cuda" and self._loader is None:
                images, labels = images.pin_memory(), labels.pin_memory()
            images, labels = (x.to(self._device, non_blocking=True) for x in (images, labels))
            yield (images.float() - self._mean) * self._scale, labels

    def _fetched(self) -> Iterable[tuple[Tensor, Tensor] | TrainingError]:
        if self._loader is None:
            yield from map(self._source.__getitem__, list(self._keys))
            return
        try:
            handler = signal.getsignal(signal.SIGCHLD)
            iterator = iter(self._loader)
            # PyTorch's handler would raise the death of a worker anywhere in the main program, not here.
            with contextlib.suppress(ValueError, TypeError):  # not in the main thread; not a handler of Python
                signal.signal(signal.SIGCHLD, handler)
            yield from iterator
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise TrainingError(f"loading stopped: {error}; perhaps memory is short: choose fewer workers") from error


@dataclasses.dataclass
class _Source:
    """What a worker gets: item (epoch, step) is images in uint8 [B, C, H, W] and labels, or the error."""

    split: Split
    indices: np.ndarray
    batch_size: int
    channels: int
    img_size: tuple[int, int]
    augment: Augment | None
    seed: int
    shuffle: bool
    rank: int
    world: int
    _order: tuple[int, np.ndarray] = (-1, np.empty(0))  # of the last epoch that was asked for

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | TrainingError:
        epoch, step = key
        if self._order[0] != epoch:
            draws = uniforms((self.seed, epoch, _ORDER), self.indices, 1)[:, 0]
            self._order = epoch, self.indices[np.argsort(draws, kind="stable")] if self.shuffle else self.indices
        rows = slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        samples = self._order[1][rows]
        if not len(samples):
            return torch.zeros(0, self.channels, *self.img_size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
        try:
            pixels = self.split.pixels()
            images = [self.split[i] for i in samples] if pixels is None else pixels[samples]
        except TrainingError as error:  # as a value: PyTorch would add the worker's traceback to the message
            return error
        if self.augment is None:
            batch = fit(images, self.img_size)
        else:
            batch = self.augment(images, self.img_size, (self.seed, epoch, _AUGMENT), samples)
        return batch, torch.from_numpy(self.split.labels[samples])


def _as_it_is(item: object) -> object:
    return item


def _own_session(worker: int) -> None:
    """Ctrl-C and signals to the process group do not reach the workers: the main process decides when to stop."""
    os.setsid()
