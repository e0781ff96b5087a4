"""`vit train`, `vit finetune` and `vit evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from vit.commands.console import say
from vit.training import options, run
from vit.training.data import Data, open_data
from vit.training.errors import TrainingError
from vit.training.loader import Batches
from vit.training.loop import Trainer
from vit.training.objective import Labels, Scores, evaluate
from vit.training.ranks import Ranks
from vit.training.report import introduce
from vit.training.start import explained, load
from vit.training.stop import Interrupted


def add_train(parser: argparse.ArgumentParser, finetune: bool) -> None:
    """The arguments of `vit train` or `vit finetune`."""
    parser.add_argument("data", metavar="DATA", help="fashion-mnist, a folder or an .npz file")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run in RUN, if there is one")
    options.add_options(parser, leave_out=("objective",) if finetune else ("weights",))


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vit evaluate`."""
    add = parser.add_argument
    add("data", metavar="DATA", help="fashion-mnist, a folder or an .npz file")
    add("--weights", required=True, type=Path, metavar="PATH", help="a checkpoint: a file or a Hugging Face folder")
    add("--model", default="", metavar="NAME", help="name of the model, if the checkpoint does not contain it")
    add("--split", choices=("test", "train"), default="test", help="the images (default: %(default)s)")
    add("--per-class", action="store_true", help="also print the accuracy of each class")
    add("-b", "--batch-size", type=int, default=128, metavar="N", help="images of a batch (default: %(default)s)")
    add("-j", "--workers", type=int, default=0, metavar="N", help="processes that load images (default: %(default)s)")
    add("--device", default="", metavar="NAME", help="device (default: cuda if available)")
    add("--impl", choices=("auto", "fused", "triton", "reference"), default="auto", help="path of every op")


def train(args: argparse.Namespace, command: str) -> int:
    """Runs `vit train` or `vit finetune`.

    Args:
        args: the parsed arguments.
        command: the command line, for the card.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        TrainingError: see the message.
    """
    typed, old = options.typed(args), run.Run(args.out).read()
    if old is not None and args.resume:
        run.differences(args.out, old, {"options": typed})
        may_change = {name: typed[name] for name in options.MAY_CHANGE if name in typed}
        chosen = options.Options(**(old["options"] | may_change))
    else:
        chosen = options.resolve(**typed)
    try:
        data = open_data(args.data)
        trainer = Trainer(chosen, data, output=args.out, resume=args.resume, command=command, say=say)
        introduce(trainer)
        trainer.fit()
    except Interrupted as stop:
        return 128 + stop.number
    except torch.OutOfMemoryError as error:
        raise TrainingError("the GPU's memory is full; lower -b, or use --grad-checkpointing or --amp-dtype") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def evaluate_file(args: argparse.Namespace) -> None:
    """Runs `vit evaluate`.

    Raises:
        TrainingError: see the message.
    """
    for name in ("batch_size", "workers"):
        if getattr(args, name) < (name == "batch_size"):
            raise TrainingError(f"{options.flag_of(name)} {getattr(args, name)} is too small")
    with explained():
        model = load(args.weights, args.model, impl=args.impl).eval()
    data, device, config = open_data(args.data), Ranks(args.device).device, model.config
    if config.in_chans != data.channels:
        raise TrainingError(f"{args.weights} takes {config.in_chans} channels, and {data.name} has {data.channels}")
    if config.num_classes != len(data.classes):
        classes = f"{config.num_classes} classes" if config.num_classes else "no head"
        raise TrainingError(
            f"{args.weights} has {classes}, and {data.name} has {len(data.classes)} classes; "
            "vit finetune gives it a new head"
        )
    split = data.test if args.split == "test" else data.train
    if split is None:
        raise TrainingError(f"{data.name} has no test images; use --split train")
    cfg = model.pretrained_cfg
    told = len(cfg.get("mean", ())) == data.channels
    mean, std = (cfg["mean"], cfg["std"]) if told else (data.mean, data.std)
    figures = ["/".join(f"{value:.4f}" for value in values) for values in (mean, std)]
    source = args.weights if told else f"{data.name}, because {args.weights} does not say it"
    say(f"images of {config.img_size[0]} x {config.img_size[1]}, mean {figures[0]}, std {figures[1]} (from {source})")
    names = cfg.get("label_names")
    if names and list(names) != list(data.classes):
        index = next(i for i, (a, b) in enumerate(zip(names, data.classes, strict=True)) if a != b)
        say(f"class {index} is {names[index]!r} in {args.weights} and {data.classes[index]!r} in {data.name}")
    batches = Batches(
        split, np.arange(len(split)), batch_size=args.batch_size, img_size=config.img_size, mean=tuple(mean),
        std=tuple(std), augment=None, seed=0, shuffle=False, workers=args.workers, device=device, drop_last=False,
    )  # fmt: skip
    objective = Labels(len(data.classes), options.Options())
    say(_table(evaluate(objective, model.to(device), batches, len(data.classes)), data, args))


def _table(scores: Scores, data: Data, args: argparse.Namespace) -> str:
    top5 = f", top-5 {scores.top5:.2f} %" if len(data.classes) > 5 else ""
    lines = [f"{args.split}: accuracy {scores.top1:.2f} %{top5}, loss {scores.loss:.4f}, {scores.count:,} images"]
    if args.per_class:
        width = max(map(len, data.classes))
        for name, (right, count) in zip(data.classes, scores.classes.tolist(), strict=True):
            lines.append(
                f"  {name:<{width}}  {100 * right / count if count else float('nan'):6.2f} %  {count:,} images"
            )
    return "\n".join(lines)
