"""Few-shot probe: how well a linear classifier reads frozen features, by regularised least squares in closed form.

The targets are −1 and 1, and each feature is standardised with its training mean and standard deviation, as in the
few-shot evaluation of big_vision. Three things differ. There a large constant feature makes the bias; here the bias is
not regularised. There the regularisation is 2^10; here cross-validation on the training images chooses it, because the
best one depends on the features. A feature that hardly varies, such as a pixel in a corner, is not blown up (`FLAT`).
Shapes: n images, d features, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vit.training.data import Data, Split, split_validation
from vit.training.errors import TrainingError
from vit.training.loader import Batches

L2 = tuple(4.0**k for k in range(9, -4, -1))  # the candidates, the largest first
FIXED_L2 = 2.0**10  # if no class has two images, as in big_vision
FOLDS = 5
FLAT = 0.1  # the least standard deviation to divide by, as a share of the mean over the features


@dataclasses.dataclass(frozen=True)
class Result:
    """The accuracy of a probe on the test images."""

    samples: int  # number of training images
    dimensions: int  # d
    l2: float
    accuracy: float  # from 0 to 1


def least_squares(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Minimises Σ_i |x_i·W + b − t_i|² + l2·|W|², where t_i is 1 for the label and −1 for the other classes.

    Args:
        features: [n, d], floating point. They are not standardised here.
        labels: int64 [n].
        num_classes: K.
        l2: the regularisation, above 0. The bias is not regularised.

    Returns:
        (W [d, K], b [K]) in fp64.
    """
    return _solver(features, labels, num_classes)(l2)


def _solver(features: Tensor, labels: Tensor, num_classes: int) -> Callable[[float], tuple[Tensor, Tensor]]:
    """`least_squares` for many l2: one eigendecomposition of the smaller of xᵀx and xxᵀ."""
    x, targets = features.double(), 2 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    centre, offset = x.mean(0), targets.mean(0)
    x, targets = x - centre, targets - offset  # then the best bias is 0
    if x.shape[0] >= x.shape[1]:
        values, left = torch.linalg.eigh(x.mT @ x)
        right = left.mT @ (x.mT @ targets)
    else:
        values, vectors = torch.linalg.eigh(x @ x.mT)
        left, right = x.mT @ vectors, vectors.mT @ targets

    def solve(l2: float) -> tuple[Tensor, Tensor]:
        weight = (left / (values.clamp(min=0) + l2)) @ right
        return weight, offset - centre @ weight

    return solve


def fit(features: Tensor, labels: Tensor, num_classes: int, l2: float | None = None) -> tuple[Tensor, Tensor, float]:
    """Standardises features [n, d], chooses l2 if it is None, and fits.

    The choice is that of the most correct predictions over up to five folds of each class, and the largest of equal
    ones.

    Returns:
        (W [d, K], b [K], l2): ``features @ W + b`` are the scores of features that are not standardised.
    """
    features = features.double()
    mean, std = features.mean(0), features.std(0, correction=0)
    std = std.clamp(min=(FLAT * std.mean()).clamp(min=1e-12))
    x = (features - mean) / std
    l2 = _chosen_l2(x, labels, num_classes) if l2 is None else l2
    weight, bias = least_squares(x, labels, num_classes, l2)
    weight = weight / std[:, None]
    return weight, bias - mean @ weight, l2


def _chosen_l2(x: Tensor, labels: Tensor, num_classes: int) -> float:
    place = torch.empty_like(labels)  # of the image among those of its class
    for label in labels.unique():
        place[labels == label] = torch.arange(int((labels == label).sum()))
    folds = min(FOLDS, int(place.max()) + 1)
    if folds < 2:
        return FIXED_L2
    correct = dict.fromkeys(L2, 0)
    for fold in range(folds):
        held = place % folds == fold
        solve = _solver(x[~held], labels[~held], num_classes)
        for l2 in L2:
            weight, bias = solve(l2)
            correct[l2] += int(((x[held] @ weight + bias).argmax(1) == labels[held]).sum())
    return max(L2, key=correct.__getitem__)  # the first of equal ones


def shots_of(indices: np.ndarray, labels: np.ndarray, classes: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Chooses ``shots`` images of each class. Those of fewer shots and the same seed are among them.

    Args:
        indices: of the images to choose from.
        labels: of the whole split.
        classes: names of the classes.
        shots: number of images of each class.
        seed: decides which.

    Raises:
        TrainingError: a class has too few images.
    """
    rng, chosen = np.random.default_rng(seed), []
    for label, name in enumerate(classes):
        mine = rng.permutation(indices[labels[indices] == label])
        if len(mine) < shots:
            raise TrainingError(f"class {name!r} has {len(mine)} training images, so --shots {shots} is too many")
        chosen.append(mine[:shots])
    return np.concatenate(chosen)


def features_of(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The features [B, d] of a `vit.VisionTransformer`: what its head reads.

    Without pooling, as after masked pre-training, that is the mean of the patch tokens.
    """

    def features(images: Tensor) -> Tensor:
        tokens = model.forward_head(model.forward_features(images), pre_logits=True)
        return tokens if tokens.ndim == 2 else tokens[:, model.num_prefix_tokens :].mean(1)

    return features


def raw_pixels(images: Tensor) -> Tensor:
    """The normalised pixels [B, d]; images of more than 64 pixels a side are averaged down to 64."""
    sides = tuple(min(side, 64) for side in images.shape[2:])
    return torch.nn.functional.adaptive_avg_pool2d(images, sides).flatten(1)


def held_out(data: Data) -> tuple[np.ndarray, Split, np.ndarray]:
    """(training indices, test split, its indices). Without a test split, a fifth of the training images is the test."""
    if data.test is not None:
        return np.arange(len(data.train)), data.test, np.arange(len(data.test))
    train, test = split_validation(data.train, 0.2, seed=0)
    return train, data.train, test


@torch.inference_mode()
def probe(
    encode: Callable[[Tensor], Tensor],
    data: Data,
    choices: Sequence[np.ndarray],
    *,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str = "cpu",
    l2: float | None = None,
) -> list[Result]:
    """Fits a probe on each choice of training images, and classifies the test images with all of them.

    Args:
        encode: images [B, C, H, W], normalised, on ``device``, to features [B, d].
        data: the images.
        choices: indices into ``data.train``, one array for each probe.
        img_size: (height, width) of the images for ``encode``.
        mean: what to subtract from each channel, for pixels from 0 to 1.
        std: what to divide each channel by.
        batch_size: number of images for one call of ``encode``.
        workers: number of loading processes.
        device: where ``encode`` runs.
        l2: the regularisation; None means that cross-validation chooses it.

    Returns:
        A result for each choice.
    """
    options = {
        "batch_size": batch_size, "img_size": img_size, "mean": mean, "std": std, "augment": None, "seed": 0,
        "shuffle": False, "workers": workers, "device": device, "drop_last": False,
    }  # fmt: skip
    used, count = np.unique(np.concatenate(choices)), len(data.classes)
    batches = [(encode(images).cpu(), labels.cpu()) for images, labels in Batches(data.train, used, **options).epoch(0)]
    features, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    places = [torch.from_numpy(np.searchsorted(used, choice)) for choice in choices]
    weights, biases, chosen = zip(*(fit(features[i], labels[i], count, l2) for i in places), strict=True)
    weight, bias = torch.cat(weights, 1), torch.cat(biases)  # of all probes side by side

    _, split, indices = held_out(data)
    correct = torch.zeros(len(choices), dtype=torch.int64)
    for images, truth in Batches(split, indices, **options).epoch(0):
        scores = (encode(images).cpu().double() @ weight + bias).unflatten(1, (len(choices), count))
        correct += (scores.argmax(2) == truth.cpu()[:, None]).sum(0)
    return [
        Result(len(choice), features.shape[1], value, hits / len(indices))
        for choice, value, hits in zip(choices, chosen, correct.tolist(), strict=True)
    ]
