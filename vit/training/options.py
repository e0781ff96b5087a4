"""The options of a training run: the fields of `Options` are the command line's options, in timm's words.

`RECIPES` has presets. The figures of the paper's presets are from its table 3 and appendix B.1
(https://arxiv.org/abs/2010.11929).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import math
from typing import Any

from vit.training.augment import KINDS
from vit.training.errors import TrainingError

_LENGTHS = ("epochs", "steps", "max_minutes")


def _option(default: Any, help: str, metavar: str | None = None, flag: str = "", choices: Any = None) -> Any:
    told = {"help": help, "metavar": metavar, "flag": flag, "choices": choices}
    return dataclasses.field(default=default, metadata=told)


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that determines a run except the data and the machine. The defaults are the recipe ``small``.

    Without ``epochs``, ``steps`` and ``max_minutes`` a run has 10 epochs.

    Raises:
        TrainingError: a value is out of range, or two lengths are given.
    """

    recipe: str = _option("small", "preset of the other options", choices=("small", "paper-jft", "paper-i1k", "paper-finetune"))  # fmt: skip # noqa: E501
    # the model
    model: str = _option("", "a name from `vit info`; without one, a small ViT that fits the images", "NAME")
    weights: str = _option("", "the checkpoint to start from", "PATH")
    img_size: tuple[int, int] | None = _option(None, "size of the images in pixels (default: the model's or the data's)", "N|HxW")  # fmt: skip # noqa: E501
    set: tuple[str, ...] = _option((), "fields of the model's configuration: --set depth=6 embed_dim=96", "NAME=VALUE")
    drop: float = _option(0.0, "dropout after the position embedding and every linear layer except qkv", "P")
    drop_path: float = _option(0.0, "stochastic depth of the last block", "P")
    impl: str = _option("auto", "path of every op", choices=("auto", "fused", "triton", "reference"))
    objective: str = _option("labels", "what to learn: labels, or the paper's colours of masked patches", choices=("labels", "masked"))  # fmt: skip # noqa: E501
    # the length
    epochs: int | None = _option(None, "length of the run in epochs (default: 10)", "N")
    steps: int | None = _option(None, "length of the run in optimizer steps", "N")
    max_minutes: float | None = _option(None, "length in minutes; the schedule follows the clock, so the result depends on the machine", "T")  # fmt: skip # noqa: E501
    # the data
    batch_size: int = _option(128, "images of a batch, over all processes", "N", flag="-b")
    val_split: float = _option(0.05, "share of the training images that selects the best weights; 0: none", "SHARE")
    val_interval: int = _option(1, "epochs between two evaluations", "N")
    max_train_samples: int | None = _option(None, "train on this many images, with the classes in proportion", "N")
    augment: str = _option("none", "augmentation, which pays in long runs", choices=KINDS)  # fmt: skip
    smoothing: float = _option(0.1, "label smoothing", "P")
    mixup: float = _option(0.0, "mixup's alpha; 0: off", "ALPHA")
    cutmix: float = _option(0.0, "CutMix's alpha; 0: off", "ALPHA")
    bce_loss: bool = _option(False, "binary cross entropy of each class instead of softmax")
    # the optimizer
    opt: str = _option("adamw", "optimizer", choices=("adamw", "adam", "sgd"))
    lr: float = _option(3e-3, "learning rate", "LR")
    momentum: float = _option(0.9, "momentum of sgd", "M")
    weight_decay: float = _option(0.05, "weight decay", "WD")
    layer_decay: float = _option(1.0, "factor of the learning rate from each layer to the one before", "F")
    sched: str = _option("cosine", "decay of the learning rate", choices=("cosine", "linear", "constant"))
    warmup_epochs: float | None = _option(None, "linear warm-up in epochs (default: 5 %% of the run)", "N")
    warmup_steps: int | None = _option(None, "linear warm-up in steps", "N")
    clip_grad: float = _option(1.0, "largest norm of the gradient; 0: no clipping", "NORM")
    grad_accum_steps: int = _option(1, "batches whose gradients one step averages", "N")
    model_ema_decay: float = _option(0.0, "evaluate a running average of the weights; its decay rises to this", "D")
    # the machine
    amp_dtype: str = _option("", "autocast to this dtype", choices=("bfloat16", "float16"))
    grad_checkpointing: bool = _option(False, "recompute activations in backward, which saves memory")
    compile: bool = _option(False, "run the model with torch.compile")
    seed: int = _option(0, "seed of weights, data and dropout", "N")
    device: str = _option("", "device (default: cuda if available)", "NAME")
    workers: int = _option(0, "processes that load images", "N", flag="-j")
    checkpoint_every: int | None = _option(None, "steps between two saves (default: at each evaluation)", "N")
    tensorboard: bool = _option(False, "also write TensorBoard's logs; needs tensorboard")

    def __post_init__(self) -> None:
        for name in ("img_size", "set"):  # JSON has lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in (*choices, field.default):
                raise TrainingError(f"{flag_of(field.name)} {value} is unknown; use one of {', '.join(choices)}")
        for names, holds, words in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not (math.isfinite(value) and holds(value)):
                    raise TrainingError(f"{flag_of(name)} {value} must be {words}")
        if len(given := [flag_of(n) for n in _LENGTHS if getattr(self, n) is not None]) > 1:
            raise TrainingError(f"{' and '.join(given)} exclude each other; give one of them")
        if not given:
            object.__setattr__(self, "epochs", 10)
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise TrainingError("--warmup-epochs and --warmup-steps exclude each other; give one of them")
        self.config_fields()

    def config_fields(self) -> dict[str, Any]:
        """The fields of `vit.ViTConfig` that the options name.

        Raises:
            TrainingError: an assignment of ``set`` is no NAME=VALUE.
        """
        rates = {"pos_drop_rate": self.drop, "proj_drop_rate": self.drop, "drop_path_rate": self.drop_path}
        return rates | {"impl": self.impl} | dict(map(assignment, self.set))


_RANGES = (
    (
        ("lr", "batch_size", "val_interval", "grad_accum_steps", "epochs", "steps", "max_minutes", "checkpoint_every",
         "max_train_samples"),
        lambda value: value > 0, "above 0",
    ),
    (
        ("weight_decay", "mixup", "cutmix", "clip_grad", "warmup_epochs", "warmup_steps", "workers"),
        lambda value: value >= 0, "0 or more",
    ),
    (
        ("drop", "drop_path", "smoothing", "val_split", "momentum", "model_ema_decay"),
        lambda value: 0 <= value < 1, "at least 0 and below 1",
    ),
    (("layer_decay",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
    (("seed",), lambda value: 0 <= value < 2**63, "0 or more, below 2**63"),
)  # fmt: skip

#: Presets: values of other options. The paper's Adam decouples the weight decay, as AdamW does.
RECIPES: dict[str, dict[str, Any]] = {
    "small": {},
    "paper-jft": dict(
        epochs=7, batch_size=4096, opt="adamw", lr=8e-4, sched="linear", weight_decay=0.1, warmup_steps=10_000,
        clip_grad=0.0, smoothing=0.0, augment="rrc",
    ),
    "paper-i1k": dict(
        epochs=300, batch_size=4096, opt="adamw", lr=3e-3, sched="cosine", weight_decay=0.3, warmup_steps=10_000,
        clip_grad=1.0, drop=0.1, smoothing=0.0, augment="rrc",
    ),
    "paper-finetune": dict(
        steps=500, batch_size=512, opt="sgd", momentum=0.9, lr=0.01, sched="cosine", weight_decay=0.0, warmup_steps=0,
        clip_grad=1.0, smoothing=0.0, model_ema_decay=0.9999,
    ),
}  # fmt: skip
#: What the paper says, as the paper's figures.
PAPER = {
    "paper-jft": "The paper, ViT-B on JFT-300M (table 3): 7 epochs, Adam with beta 0.9 and 0.999, batch 4096, learning "
    "rate 8e-4 (ViT-L/16 4e-4, ViT-H/14 3e-4) with linear decay after 10,000 steps of warm-up, weight decay 0.1, no "
    "dropout, 224 pixels.",
    "paper-i1k": "The paper, ViT on ImageNet (table 3): 300 epochs, Adam with beta 0.9 and 0.999, batch 4096, learning "
    "rate 3e-3 with cosine decay after 10,000 steps of warm-up, weight decay 0.3, dropout 0.1, gradients clipped at "
    "norm 1, 224 pixels.",
    "paper-finetune": "The paper, fine-tuning (B.1.1): SGD with momentum 0.9, batch 512, learning rate searched from "
    "0.001 to 0.06, cosine decay, no weight decay, gradients clipped at norm 1, 384 pixels; 20,000 steps on ImageNet, "
    "10,000 on CIFAR, 500 on Pets and Flowers. On ImageNet it averages the weights with 0.9999 (Polyak). A constant "
    "0.9999 would leave 95 % of the initial weights after 500 steps, so here the decay warms up.",
}
#: Options of the machine. They change no weights, so a resumed run may have others.
MAY_CHANGE = ("workers", "device", "checkpoint_every", "tensorboard")


def resolve(**typed: Any) -> Options:
    """The options of a recipe, with ``typed`` in place of its values.

    Raises:
        TrainingError: as for `Options`, or the recipe is unknown.
    """
    recipe = dict(RECIPES.get(typed.get("recipe", "small"), {}))  # Options refuses an unknown recipe
    for names in (_LENGTHS, ("warmup_epochs", "warmup_steps")):
        if any(name in typed for name in names):  # replaces the recipe's, which may be another of them
            recipe = {name: value for name, value in recipe.items() if name not in names}
    return Options(**(recipe | typed))


def flag_of(name: str) -> str:
    """--batch-size for batch_size."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Adds the options to a parser. Only those that are typed are in its result, see `typed`."""
    for field in dataclasses.fields(Options):
        if field.name in leave_out:
            continue
        told, kind = field.metadata, field.type.removesuffix(" | None")
        how: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "metavar": told["metavar"]}
        if kind == "bool":
            how |= {"action": "store_true"}
            del how["metavar"]
        elif field.name == "set":
            how |= {"nargs": "+", "action": "extend"}
        elif field.name == "img_size":
            how["type"] = size
        elif told["choices"]:
            how |= {"choices": told["choices"]}
        else:
            how["type"] = {"int": int, "float": float, "str": str}[kind]
        default = "" if field.default in (None, "", (), False) else f" (default: {field.default})"
        flags = [told["flag"]] if told["flag"] else []
        parser.add_argument(*flags, flag_of(field.name), help=told["help"] + default, **how)


def typed(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were typed."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Options) if hasattr(args, f.name)}
    return values | ({"set": tuple(values["set"])} if "set" in values else {})


def size(text: str) -> tuple[int, int]:
    """'224' or '224x160' as (H, W).

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 6 and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be pixels, as 28 or 28x20, got {text[:20]!r}")
    return int(sides[0]), int(sides[-1])


def assignment(text: str, error: type[Exception] = TrainingError) -> tuple[str, Any]:
    """Parses ``depth=2`` to ("depth", 2), or raises ``error``. A value that is no Python literal stays a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise error(f"--set takes NAME=VALUE, got {text!r}")
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value
