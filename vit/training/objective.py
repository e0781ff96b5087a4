"""What a run learns: labels, or the colours of masked patches (ViT paper, B.1.2).

An objective is called with (net, images, labels, key) in training and returns (loss, correct, count): the mean loss,
the number of right predictions as a tensor, and the number of predictions. ``key`` = (seed, epoch, batch) determines
its random numbers. ``score`` is for evaluation: it returns the sums [loss, top-1, top-5, count] in fp64, and which
images are right.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit.masked import corrupt, mean_colour
from vit.training.augment import mix
from vit.training.loader import Batches
from vit.training.options import Options

Key = tuple[int, int, int]


class Labels:
    """Cross entropy with label smoothing, mixup and CutMix, or binary cross entropy of each class."""

    def __init__(self, num_classes: int, options: Options) -> None:
        self.num_classes, self.options = num_classes, options

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor, int]:
        """Images fp32 [B, C, H, W] and labels int64 [B]. Accuracy counts the label of an image before it was mixed."""
        o, targets = self.options, labels
        if o.mixup or o.cutmix:
            how: dict[str, Any] = {"mixup": o.mixup, "cutmix": o.cutmix, "smoothing": o.smoothing, "key": key}
            images, targets = mix(images, labels, self.num_classes, **how)
        logits = net(images)
        wide = logits.float()
        if o.bce_loss:
            if targets is labels:
                targets = F.one_hot(labels, self.num_classes) * (1.0 - o.smoothing) + o.smoothing / self.num_classes
            loss = F.binary_cross_entropy_with_logits(wide, targets)
        else:
            loss = F.cross_entropy(wide, targets, label_smoothing=o.smoothing if targets is labels else 0.0)
        return loss, (wide.argmax(1) == labels).sum(), len(labels)

    def score(self, model: nn.Module, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """Cross entropy without smoothing."""
        logits = model(images).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        top = logits.topk(min(5, self.num_classes), dim=1).indices == labels[:, None]  # [B, 5]
        sums = [loss, top[:, 0].sum(), top.sum(), loss.new_tensor(len(labels))]
        return torch.stack([s.double() for s in sums]), top[:, 0]


class Masked:
    """The mean colours of corrupted patches. ``mean`` and ``std`` are those that normalised the images.

    Of ``world`` processes, this one trains on the rows ``rank``, ``rank + world`` … of each batch.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        patch_size: tuple[int, int],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.patch_size, self.rank, self.world = patch_size, rank, world

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, Tensor, int]:
        """Images fp32 [B, C, H, W]; the labels are not used."""
        return self._loss(net, images, key, self.rank, self.world)

    def _loss(
        self, net: nn.Module, images: Tensor, key: Key, rank: int = 0, world: int = 1
    ) -> tuple[Tensor, Tensor, int]:
        pixels = images * self.std.to(images.device) + self.mean.to(images.device)
        colours = mean_colour(pixels, self.patch_size)  # [B, N]
        B, N = colours.shape
        chosen = [part[rank::world] for part in corrupt(world * B, N, key)]
        count, chosen = int(chosen[0].sum()), [part.to(images.device) for part in chosen]
        loss, logits = net(images, colours, *chosen)
        return loss, ((logits.argmax(2) == colours) & chosen[0]).sum(), count

    def score(self, model: nn.Module, images: Tensor, labels: Tensor, key: Key) -> tuple[Tensor, None]:
        """The same loss, and the share of right colours as top-1 and top-5."""
        loss, correct, count = self._loss(model, images, key)
        sums = [loss * count, correct, correct, loss.new_tensor(count)]
        return torch.stack([s.double() for s in sums]), None


@dataclasses.dataclass
class Scores:
    """Sums over predictions.

    Attributes:
        sums: fp64 [4]: loss, right ones in the first place, right ones in the first five, number.
        classes: int64 [K, 2]: right ones and number of each class; 0 for `Masked`.
    """

    sums: Tensor
    classes: Tensor

    loss = property(lambda self: (self.sums[0] / self.sums[3]).item())
    top1 = property(lambda self: (100 * self.sums[1] / self.sums[3]).item(), doc="in %")
    top5 = property(lambda self: (100 * self.sums[2] / self.sums[3]).item(), doc="in %")
    count = property(lambda self: int(self.sums[3]))


@torch.no_grad()
def evaluate(objective: Labels | Masked, model: nn.Module, batches: Batches, num_classes: int) -> Scores:
    """Scores of a model in evaluation mode."""
    sums, classes = torch.zeros(4, dtype=torch.float64), torch.zeros(num_classes, 2, dtype=torch.int64)
    model.eval()
    for index, (images, labels) in enumerate(batches.epoch(0)):
        found, right = objective.score(model, images, labels, (0, 0, index))
        sums += found.cpu()
        if right is not None:
            for column, some in enumerate((labels[right], labels)):
                classes[:, column] += torch.bincount(some, minlength=num_classes).cpu()
    return Scores(sums, classes)
