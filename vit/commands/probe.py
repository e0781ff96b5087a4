"""`vit probe`: few-shot accuracy of frozen features, beside those of random weights and raw pixels."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io

import numpy as np
import torch

import vit
from vit.commands import inside, parity
from vit.commands.console import say, step
from vit.training.data import open_data, subset
from vit.training.errors import TrainingError
from vit.training.probe import Result, features_of, held_out, probe, raw_pixels, shots_of

ROWS = ("frozen features", "random weights", "raw pixels")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        CannotStart: the file to write cannot be written, the checkpoint does not exist, or the device cannot be used.
        TrainingError: the data cannot be read, or do not fit the model or the options.
        ValueError: the checkpoint cannot be loaded.
        OSError: a file cannot be read or written.
    """
    inside.check_outputs([], args.save)
    data = open_data(args.data)
    model, what = inside.load(args.weights, None, args.img_size)
    config = model.config
    if config.in_chans != data.channels:
        raise TrainingError(
            f"{args.weights} takes images with {config.in_chans} channels, but {args.data} has {data.channels}; choose "
            "other data or another checkpoint"
        )
    indices, _, tested = held_out(data)
    columns = args.max_train_samples or args.shots
    every = []  # seed by seed
    for seed in args.seed:
        for n in columns:
            if args.max_train_samples:
                every.append(subset(indices, data.train.labels, n, seed))
            else:
                every.append(shots_of(indices, data.train.labels, data.classes, n, seed))

    with parity.explained(f"cannot use --device {args.device}"):
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model.to(device)
    cfg = model.pretrained_cfg
    norm = cfg if len(cfg.get("mean", ())) == len(cfg.get("std", ())) == data.channels else vars(data)
    options = {
        "img_size": config.img_size, "mean": norm["mean"], "std": norm["std"], "batch_size": args.batch_size,
        "workers": args.workers, "device": device,
    }  # fmt: skip
    found: dict[str, list[Result]] = {}
    for row in (ROWS[0], ROWS[2]):
        encode = features_of(model) if row == ROWS[0] else raw_pixels
        with step(row):
            found[row] = probe(encode, data, every, **options)
    found[ROWS[1]] = []
    for i, seed in enumerate(args.seed):
        with step(f"{ROWS[1]}, seed {seed}"):
            fresh = vit.VisionTransformer(config, seed).eval().to(device)
            mine = every[i * len(columns) : (i + 1) * len(columns)]
            found[ROWS[1]] += probe(features_of(fresh), data, mine, **options)

    size = " x ".join(map(str, config.img_size[::-1]))
    over = f"test images, {len(data.classes)} classes" if data.test else "held-out training images"
    say(f"{what} on {args.data}: images of {size}, {len(tested):,} {over}")
    say(table(found, columns, args))
    if args.save:
        inside.write({args.save: _csv(found, columns, args)})


def table(found: dict[str, list[Result]], columns: list[int], args: argparse.Namespace) -> str:
    """Accuracy in percent, a row for each kind of features; with several seeds mean ± standard deviation."""
    unit = "training images" if args.max_train_samples else "images of each class"
    seeds = ", ".join(map(str, args.seed))
    over = f"mean ± standard deviation over seeds {seeds}" if len(args.seed) > 1 else f"seed {seeds}"
    lines = [f"Accuracy in %, linear probe on a few {unit}; {over}:"]
    lines.append(f"{'features':<24}{'numbers':>8}" + "".join(f"{column:>14}" for column in columns))
    for row in ROWS:
        values = 100 * np.array([result.accuracy for result in found[row]]).reshape(len(args.seed), len(columns))
        cells = [f"{v.mean():.1f}" + (f" ± {v.std(ddof=1):.1f}" if len(v) > 1 else "") for v in values.T]
        lines.append(f"{row:<24}{found[row][0].dimensions:>8}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _csv(found: dict[str, list[Result]], columns: list[int], args: argparse.Namespace) -> bytes:
    file = io.StringIO()
    write = csv.writer(file, lineterminator="\n").writerow
    names = [field.name for field in dataclasses.fields(Result)]
    write(["features", "max_train_samples" if args.max_train_samples else "shots", "seed", *names])
    for row in ROWS:
        told = [(column, seed) for seed in args.seed for column in columns]
        for place, result in zip(told, found[row], strict=True):
            write([row, *place, *dataclasses.astuple(result)])
    return file.getvalue().encode()
