"""Random crops, flips and mixtures of images, with random numbers that depend on keys only.

Shapes: B images, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vit.training.errors import TrainingError

KINDS = ("none", "flip", "crop", "crop-flip", "rrc", "randaugment")

_TRIES = 10  # of a random resized crop, as in torchvision
_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # its share of the area and its width : height
_DRAWS = 2 * _TRIES + 4


def uniforms(key: tuple[int, ...], samples: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1), fp64 [n, count], a function of the key, the sample and the column only.

    They are SplitMix64's: a hash of a counter, so that a batch costs no generator for each of its samples.

    Args:
        key: any integers, such as seed, epoch and what the numbers are for.
        samples: integers [n].
        count: numbers for each sample.
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _scramble(state + np.uint64(word % (1 << 64)))
    rows = _scramble(state + samples.astype(np.uint64))
    columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_scramble(rows[:, None] + columns) >> np.uint64(11)) * 2.0**-53


def _scramble(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Augment:
    """A random change of each training image.

    Attributes:
        kind: ``none``; ``flip``: left and right; ``crop``: shift by up to an eighth of the size, zeros outside;
            ``crop-flip``: both; ``rrc``: random resized crop, as in torchvision, and flip; ``randaugment``: as
            ``crop-flip``, then torchvision's RandAugment.

    Raises:
        TrainingError: the kind is unknown, or torchvision cannot be imported.
    """

    kind: str = "crop-flip"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TrainingError(f"unknown augmentation {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind == "randaugment":
            _rand_augment()

    def __call__(
        self,
        images: np.ndarray | Sequence[np.ndarray],
        size: tuple[int, int],
        key: tuple[int, ...],
        samples: np.ndarray,
    ) -> Tensor:
        """Changed images in uint8 [B, C, *size].

        Args:
            images: B images in uint8 [H, W, C], of any sizes, or one array of them.
            size: (height, width) of the result.
            key: for the random numbers.
            samples: for the random numbers; integers [B].
        """
        draws = uniforms(key, samples, _DRAWS)
        if self.kind == "rrc":
            pairs = zip(images, draws, strict=True)
            batch = fit([image[_crop(*image.shape[:2], numbers)] for image, numbers in pairs], size)
        else:
            batch = fit(images, size)
            if self.kind not in ("none", "flip"):
                batch = _shift(batch, draws)
        if self.kind not in ("none", "crop"):
            flip = torch.from_numpy(draws[:, -1] < 0.5)
            batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
        if self.kind == "randaugment":
            batch = _randaugment(batch, draws[:, -2])
        return batch


def fit(images: np.ndarray | Sequence[np.ndarray], size: tuple[int, int]) -> Tensor:
    """Images in uint8 [H, W, C], or an array of them, as uint8 [B, C, *size].

    What has another size is resized whole, whatever its aspect ratio: bilinear with antialias, as Pillow does.
    """
    if isinstance(images, np.ndarray):
        batch = torch.from_numpy(images).movedim(3, 1)
        return batch if batch.shape[2:] == size else _resize(batch, size)
    return torch.cat([fit(image[None], size) for image in images])


def _resize(batch: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(batch, size, mode="bilinear", antialias=True)


def _shift(batch: Tensor, draws: np.ndarray) -> Tensor:
    height, width = batch.shape[2:]
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    tops, lefts = (
        torch.from_numpy((draws[:, i] * (2 * pad + 1)).astype(np.int64)) for i, pad in enumerate((pad_y, pad_x))
    )
    windows = F.pad(batch, (pad_x, pad_x, pad_y, pad_y)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(batch)), :, tops, lefts]


def _crop(height: int, width: int, draws: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns of a random resized crop: torchvision's distribution."""
    areas = height * width * (_SCALE[0] + draws[:_TRIES] * (_SCALE[1] - _SCALE[0]))
    low, high = np.log(_RATIO)
    ratios = np.exp(low + draws[_TRIES : 2 * _TRIES] * (high - low))
    widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if fits.any():
        first = fits.argmax()
        h, w = int(heights[first]), int(widths[first])
        top, left = int(draws[-4] * (height - h + 1)), int(draws[-3] * (width - w + 1))
    else:  # the largest crop with an allowed ratio, in the centre
        w, h = min(width, max(1, round(height * _RATIO[1]))), min(height, max(1, round(width / _RATIO[0])))
        top, left = (height - h) // 2, (width - w) // 2
    return slice(top, top + h), slice(left, left + w)


def _rand_augment() -> Any:
    try:
        from torchvision.transforms import RandAugment
    except Exception as error:  # a torchvision for another torch raises RuntimeError, AttributeError or OSError
        raise TrainingError(
            f"augmentation 'randaugment' requires torchvision, which cannot be imported ({error}); choose 'crop-flip'"
        ) from error
    return RandAugment()


def _randaugment(batch: Tensor, draws: np.ndarray) -> Tensor:
    transform, result = _rand_augment(), []
    with torch.random.fork_rng(devices=[]):
        for image, number in zip(batch, draws, strict=True):
            torch.default_generator.manual_seed(int(number * 2**53))  # torch.manual_seed would also seed the GPU
            result.append(transform(image))
    return torch.stack(result)


def mix(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    mixup: float,
    cutmix: float,
    smoothing: float,
    key: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """timm's Mixup in batch mode: one mixture for the batch, and CutMix or Mixup by the flip of a coin if both are on.

    The partner of row i is row i + B // 2, where timm takes the reversed batch. Then processes that have every
    world-th row of a batch pair the same images as one process does, if 2 · world divides the batch size.

    Args:
        images: float [B, C, H, W].
        labels: int64 [B].
        num_classes: K.
        mixup: α of Mixup's Beta(α, α); 0 is off.
        cutmix: α of CutMix's; 0 is off.
        smoothing: share of the target that is spread over all classes.
        key: (seed, epoch, step), from which the random numbers follow.

    Returns:
        The images, and soft targets in fp32 [B, K].
    """
    classes = torch.arange(num_classes, device=labels.device)
    targets = (labels[:, None] == classes).float() * (1 - smoothing) + smoothing / num_classes
    if mixup <= 0 and cutmix <= 0:
        return images, targets
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([word % (1 << 64) for word in key])))
    cut = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    lam = float(rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup))
    half = len(images) // 2
    partners = images.roll(-half, 0)
    if cut:
        height, width = images.shape[2:]
        sides = [(int(n * math.sqrt(1 - lam)), int(rng.integers(n)), n) for n in (height, width)]
        (top, bottom), (left, right) = ((max(at - side // 2, 0), min(at + side // 2, n)) for side, at, n in sides)
        images = images.clone()
        images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = images * lam + partners * (1 - lam)
    return images, targets * lam + targets.roll(-half, 0) * (1 - lam)
