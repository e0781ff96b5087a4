"""A small ResNet, the convolutional network that the experiments compare the ViT with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a 1 x 1 convolution if the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity()
        if stride != 1 or inside != outside:
            convolution = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """A ResNet (He et al., CVPR 2016) with one block per stage: 78 k parameters, 9.4 M multiply-adds at 28 x 28 x 1.

    Args:
        num_classes: number of classes.
        in_chans: channels of the images.
        widths: channels of the stages. Each stage after the first halves the height and width.
        seed: draws the weights without the global generator.
    """

    def __init__(
        self, num_classes: int, in_chans: int = 1, widths: tuple[int, ...] = (16, 32, 64), seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(widths[0])
            before = (widths[0], *widths)
            self.stages = nn.Sequential(
                *(_Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(zip(before, widths, strict=False)))
            )
            self.head = nn.Linear(widths[-1], num_classes)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to logits [B, num_classes]."""
        x = self.stages(F.relu(self.norm(self.stem(images))))
        return self.head(x.mean((2, 3)))
