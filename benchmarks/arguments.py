"""Types of command-line arguments. A wrong argument gives one line and exit status 2 before anything runs."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.shapes import Shape


def positive(text: str) -> float:
    """Seconds, GiB."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return float(text)


def count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def shape(text: str) -> Shape:
    """A model and a batch, such as "vit_base_patch16_224/b256"."""
    from benchmarks.shapes import parse

    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder(text: str) -> Path:
    """A folder to write to. It is created."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {error.strerror}") from None
    return Path(text)


def file(text: str) -> Path:
    """A file to write. Its folder is created."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"cannot write to {text}: it is a folder")
    folder(str(Path(text).parent))
    return Path(text)
