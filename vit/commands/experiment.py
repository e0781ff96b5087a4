"""`vit experiment`: a measurement beside a sentence of the article."""

from __future__ import annotations

import argparse
from pathlib import Path

from vit.commands.console import say
from vit.experiments import report, tables
from vit.experiments.runs import Runs
from vit.training.loop import Interrupted
from vit.training.options import size


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of `vit experiment`."""
    add = parser.add_argument
    add("name", choices=tuple(tables.EXPERIMENTS), metavar="NAME", help=" | ".join(tables.EXPERIMENTS))
    add("data", metavar="DATA", help="fashion-mnist, a folder or an .npz file")
    add("-o", "--out", required=True, type=Path, metavar="DIR", help="folder of the runs and the report")
    add("--seeds", type=_natural, nargs="+", default=[0, 1, 2], metavar="N", help="seeds (default: 0 1 2)")
    add("--images-seen", type=_positive, default=0, metavar="N", help="length of a training or the pre-training")
    add("--lrs", type=_rate, nargs="+", default=[], metavar="LR", help="learning rates; the validation images choose")
    add("--sizes", type=_positive, nargs="+", default=[], metavar="N",
        help="data-scale, transfer: numbers of training images")  # fmt: skip
    add("--steps", type=_positive, nargs="+", default=[], metavar="N", help="transfer: lengths of the fine-tuning")
    add("--pretrain", default="", metavar="DATA", help="transfer: pre-train on these data, not on half of the classes")
    add("-b", "--batch-size", type=_positive, default=128, metavar="N", help="images of a batch (default: 128)")
    add("--img-size", type=size, metavar="N|HxW", help="size of the images in pixels (default: the data's)")
    add("--quick", action="store_true", help="a rehearsal of seconds; its figures mean nothing")
    add("--plot-only", action="store_true", help="only write the report again")
    add("-j", "--jobs", type=_positive, default=2, metavar="N",
        help="runs at a time, as processes of one thread; 1: this process and its threads (default: 2)")  # fmt: skip
    add("--amp-dtype", choices=("bfloat16", "float16"), default="", help="autocast to this dtype")
    add("--impl", choices=("auto", "fused", "triton", "reference"), default="auto", help="path of every op")
    add("--device", default="", metavar="NAME", help="device (default: cuda if available)")


def run(args: argparse.Namespace, command: str) -> int:
    """Runs the command.

    Args:
        args: the parsed arguments.
        command: the command line, for the report.

    Returns:
        The exit code: 0, or 128 + the number of the signal that stopped it.

    Raises:
        TrainingError: see the message.
    """
    lists = {name: tuple(getattr(args, name)) for name in ("seeds", "sizes", "steps", "lrs")}
    rest = ("name", "data", "pretrain", "images_seen", "batch_size", "img_size", "quick", "impl", "amp_dtype", "device")
    settings = tables.settle(tables.Settings(**lists, **{name: getattr(args, name) for name in rest}))
    runs = Runs(settings, args.out)
    if settings.quick:
        say("A rehearsal (--quick): few images and steps. Its figures mean nothing.")
    try:
        if not args.plot_only:
            say(f"{settings.name}: {len(runs.table)} runs, {args.jobs} at a time; those in {args.out} are not repeated")
            runs.do(args.jobs, say)
    except (Interrupted, KeyboardInterrupt) as stop:
        say("stopped; the same command continues")
        return 128 + getattr(stop, "number", 2)
    for path in report.write(runs, command.replace(" --plot-only", "")):
        say(str(path))
    return 0


def _positive(text: str) -> int:
    value = _natural(text)
    if not value:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _natural(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"must be an integer of at most 9 digits, got {text[:20]!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text[:20]!r}")
    return value
