"""What `vit attention` and `vit inspect` share: their models and their files."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vit
from vit.commands import parity
from vit.commands.console import step
from vit.testing.parity import widen

PICTURES = (".png", ".jpg", ".pdf", ".svg")


def load(weights: Path | None, model: str | None, img_size: tuple[int, int] | None) -> tuple[nn.Module, str]:
    """The model of --weights or --model in evaluation, and a description. Nothing is downloaded.

    Raises:
        CannotStart: both or neither are given, or there is no such model.
        ValueError, OSError: the checkpoint cannot be loaded.
    """
    options = {} if img_size is None else {"img_size": img_size}
    if (weights is None) == (model is None):
        raise parity.CannotStart("give either --weights FILE or --model, such as --model vit_small_patch16_224")
    if weights is not None:
        if not weights.exists():  # the hub would be asked for it
            raise parity.CannotStart(f"{weights}: there is no such file or folder")
        with step(f"loading {weights}"):
            return vit.load_pretrained(weights, **options).eval(), str(weights)
    with parity.explained("cannot build the model"):
        if model in vit.list_models():
            with step(f"building {model}"):
                own = vit.create_model(model, seed=0, **options).eval()
                widen(own, torch.Generator().manual_seed(0))
            return own, f"{model}, random weights"
        made, what = parity.build(model, img_size, {})
    return made.eval(), what


def check_outputs(pictures: Sequence[Path], save: Path | None, inputs: Sequence[Path] = ()) -> None:
    """Checks before the work, which may take minutes, that the files can be written.

    Raises:
        CannotStart: matplotlib is missing, a file cannot be written, or it would replace another.
    """
    for path in pictures:
        if path.suffix.lower() not in PICTURES:
            raise parity.CannotStart(f"-o {path} must end in {', '.join(PICTURES)}")
    if pictures and importlib.util.find_spec("matplotlib") is None:
        raise parity.CannotStart(
            "matplotlib is missing, which draws the figure; pip install matplotlib, or leave out -o: the numbers and "
            "--save do not need it"
        )
    outputs = [*pictures, *([save] if save else [])]
    for i, path in enumerate(outputs):
        if path in outputs[:i] or any(path.exists() and other.exists() and path.samefile(other) for other in inputs):
            raise parity.CannotStart(f"{path} would be replaced by another file of this command; choose another name")
        try:
            new = not path.exists()
            path.open("ab").close()
            if new:
                path.unlink()
        except OSError as error:
            raise parity.CannotStart(f"cannot write {path}: {error.strerror}") from error


def npz(arrays: Mapping[str, Any]) -> bytes:
    """The content of an .npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def write(contents: Mapping[Path, bytes]) -> None:
    for path, content in contents.items():
        path.write_bytes(content)
        print(f"Written: {path}", flush=True)
