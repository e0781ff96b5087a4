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


class Schedule:
    """When a run ends, and the learning rate of each step: linear warm-up times the decay.

    Args:
        options: the options.
        per_epoch: steps of an epoch.

    Attributes:
        total: steps of the run; None if the clock ends it.

    Raises:
        TrainingError: the warm-up is not shorter than the run.
    """

    def __init__(self, options: Options, per_epoch: int) -> None:
        self.options = o = options
        self.total = o.steps or (o.epochs * per_epoch if o.epochs else None)
        self.warmup = o.warmup_steps if o.warmup_epochs is None else round(o.warmup_epochs * per_epoch)
        if self.total and (self.warmup or 0) >= self.total:
            raise TrainingError(
                f"a warm-up of {self.warmup} steps is not shorter than the run of {self.total}; lower --warmup-steps "
                "or --warmup-epochs, or make the run longer"
            )

    def progress(self, step: int, elapsed: float) -> float:
        """The share of the run, 0 to 1, that is done after ``step`` steps and ``elapsed`` seconds."""
        done = step / self.total if self.total else elapsed / (60 * self.options.max_minutes)
        return min(done, 1.0)

    def rate(self, step: int, elapsed: float) -> float:
        """The learning rate of the step after ``step`` steps and ``elapsed`` seconds."""
        o, progress = self.options, self.progress(step, elapsed)
        if self.warmup is None:
            begun = (step + 1) / (0.05 * self.total) if self.total else progress / 0.05
        else:
            begun = (step + 1) / self.warmup if self.warmup else 1.0
        decay = {"cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "linear": 1.0 - progress, "constant": 1.0}
        return o.lr * min(begun, 1.0) * decay[o.sched]


def running_average(model: nn.Module, decay: float) -> AveragedModel:
    """The running average of the weights (Polyak & Juditsky).

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the initial weights are soon forgotten.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        t = int(averaged.n_averaged)  # ``count`` is on the GPU, and reading it would wait
        torch._foreach_lerp_(averages, current, 1.0 - min(decay, (1.0 + t) / (10.0 + t)))

    averaged = AveragedModel(model, multi_avg_fn=update)  # `update` reads it
    return averaged
