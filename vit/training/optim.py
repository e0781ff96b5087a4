"""The optimizer, the schedule of its learning rate, and the running average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vit.groups import NO_WEIGHT_DECAY, param_groups_layer_decay
from vit.model import VisionTransformer
from vit.training.errors import TrainingError
from vit.training.options import Options


def optimizer(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer of a model. Each group has ``lr_scale``; `set_rate` applies it.

    Tokens, position embedding and parameters with one dimension have no weight decay.

    Raises:
        TrainingError: ``layer_decay`` is given for a model that is no ViT of this package.
    """
    if options.layer_decay != 1.0:
        if not isinstance(model, VisionTransformer):
            raise TrainingError(f"--layer-decay needs a classifier, not {type(model).__name__}; leave it out")
        groups = param_groups_layer_decay(model, options.weight_decay, options.layer_decay)
    else:
        decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, param in model.named_parameters():
            if param.requires_grad:
                decayed[param.ndim > 1 and name.rpartition(".")[2] not in NO_WEIGHT_DECAY].append(param)
        groups = [
            {"params": params, "lr_scale": 1.0, "weight_decay": options.weight_decay if decays else 0.0}
            for decays, params in decayed.items()
            if params
        ]
    if options.opt == "sgd":
        return torch.optim.SGD(groups, options.lr, momentum=options.momentum)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.opt]
    return kind(groups, options.lr, betas=(0.9, 0.999))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def rate(options: Options, progress: float, warmup: float) -> float:
    """The learning rate: linear warm-up times the decay.

    Args:
        options: ``lr`` and ``sched``.
        progress: share of the run that is done, 0 to 1.
        warmup: share of the warm-up that is done; 1 or more after it.
    """
    decays = {"cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "linear": 1.0 - progress, "constant": 1.0}
    return options.lr * min(warmup, 1.0) * decays[options.sched]


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """The running average of the weights (Polyak & Juditsky).

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the initial weights are soon forgotten.
    """

    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        t = int(count)  # it is on the CPU
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + t) / (10.0 + t)))

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))
