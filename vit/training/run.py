"""The folder of a run: args.json, summary.csv, last.pt, best.safetensors, curves.png, README.md.

Every file is replaced as a whole, so a process that is killed leaves the old file or the new one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import triton
from torch import Tensor, nn

import vit
from vit.training.data import Data
from vit.training.errors import TrainingError
from vit.training.options import MAY_CHANGE, Options, flag_of
from vit.weights import files, note


class Run:
    """The folder of a run.

    Args:
        folder: the folder, which `begin` creates.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.last, self.args = folder, folder / "last.pt", folder / "args.json"
        self.best = folder / ("best.safetensors" if importlib.util.find_spec("safetensors") else "best.npz")

    def read(self) -> dict[str, Any] | None:
        """The content of args.json; None if no run has begun here.

        Raises:
            TrainingError: the file cannot be read.
        """
        try:
            return json.loads(self.args.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TrainingError(f"{self.args} cannot be read: {reason}; choose another -o") from error

    def check(self, record: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """Checks that a run can begin or continue here.

        Args:
            record: what describes the run, see `record`.
            resume: whether to continue a run, if one has begun here.

        Returns:
            The record of the run to continue; None for a new one.

        Raises:
            TrainingError: the folder holds a run and ``resume`` is False, or another run, or other files.
        """
        old = self.read()
        if old is None:
            if rest := [path.name for path in self.folder.glob("*") if path.suffix != ".tmp"]:
                raise TrainingError(f"{self.folder} holds {rest[0]} and no run; choose another -o")
            return None
        if not resume:
            raise TrainingError(f"{self.folder} holds a run; continue it with --resume, or choose another -o")
        differences(self.folder, old, record)
        return old

    def begin(self, record: dict[str, Any]) -> None:
        """Creates the folder with args.json."""
        with writing(self.args, "choose another -o"):
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.replacing(self.args) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def state(self) -> dict[str, Any] | None:
        """The content of last.pt; None if nothing was saved yet.

        Raises:
            TrainingError: the file is damaged.
        """
        for rest in self.folder.glob(".*.tmp"):  # of a process that was killed
            rest.unlink(missing_ok=True)
        if not self.last.exists():
            return None
        try:
            return torch.load(self.last, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything
            kind = type(error).__name__
            raise TrainingError(f"{self.last} is damaged ({kind}); start again in another -o") from error

    def save(self, state: dict[str, Any]) -> None:
        """Writes last.pt."""
        with writing(self.last), files.replacing(self.last) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def save_best(self, model: nn.Module, cfg: dict[str, Any]) -> None:
        """Writes the weights with their note. The file names no kernels, so that it loads on every machine."""
        config = getattr(model, "config", None)
        said = note.write(dataclasses.replace(config, impl="auto"), cfg) if config else {"pretrained_cfg": cfg}
        with writing(self.best):
            files.write(self.best, model.state_dict(), said)

    def best_weights(self) -> dict[str, Tensor]:
        """The tensors of `save_best`."""
        return files.read(self.best).tensors

    def save_summary(self, rows: list[dict[str, float]]) -> None:
        """Writes summary.csv, if there is a row."""
        text = io.StringIO()
        if rows:
            table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
            self._text(self.folder / "summary.csv", text.getvalue())

    def save_card(self, text: str) -> None:
        """Writes README.md."""
        self._text(self.folder / "README.md", text)

    def save_curves(self, rows: list[dict[str, float]]) -> bool:
        """Draws curves.png. Returns False without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            return False
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3), layout="constrained")
        parts = {"loss": ("train_loss", "eval_loss"), "accuracy in %": ("eval_top1",)}
        for ax, (title, names) in zip(figure.subplots(1, 2), parts.items(), strict=True):
            for name in names:
                points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
                if points:
                    ax.plot(*zip(*points, strict=True), marker=".", label=name)
            ax.set(xlabel="epoch", ylabel=title)
            ax.xaxis.get_major_locator().set_params(integer=True)
            if ax.lines:
                ax.legend()
        path = self.folder / "curves.png"
        with writing(path), files.replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
        return True

    def _text(self, path: Path, text: str) -> None:
        with writing(path), files.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path, fix: str = "free some space; the files before it are whole, so --resume continues") -> Iterator:
    """Turns every error of writing ``path`` into TrainingError."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:  # torch and safetensors have their own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise TrainingError(f"cannot write {path}: {getattr(cause, 'strerror', None) or cause}; {fix}") from error


def differences(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises TrainingError if a run that began as ``old`` cannot continue as ``new``.

    Both are records. Options that are missing in ``new`` are not compared.
    """
    fix = "choose another -o for another run"
    for name, value in new["options"].items():
        before, now = (list(v) if isinstance(v, tuple) else v for v in (old["options"].get(name), value))
        if name not in MAY_CHANGE and before != now:
            said = [_said(name, v) for v in (before, now)]
            raise TrainingError(f"{folder} was trained with {said[0]}, not {said[1]}; {fix}")
    if "data" in new and old["data"]["digest"] != new["data"]["digest"]:
        names = [f"{r['data']['name']} (digest {r['data']['digest'][:12]})" for r in (old, new)]
        raise TrainingError(f"{folder} was trained on {names[0]}, not {names[1]}; {fix}")
    if old["processes"] != new.get("processes", old["processes"]):
        raise TrainingError(
            f"{folder} was trained by {old['processes']} processes, not {new['processes']}; start as many"
        )


def _said(name: str, value: Any) -> str:
    if value is None or value is False or value in ("", []):
        return f"no {flag_of(name)}"
    words = [] if value is True else value if isinstance(value, list) else [value]
    return " ".join([flag_of(name), *map(str, words)])


def digest(values: Any) -> str:
    """SHA-256 of all tensors in nested dictionaries and lists: of their places, dtypes, shapes and bits."""
    found = hashlib.sha256()

    def visit(place: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                visit(f"{place}/{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(f"{place}/{index}", item)
        elif isinstance(value, Tensor):
            found.update(f"{place} {value.dtype} {tuple(value.shape)}\n".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    visit("", values)
    return found.hexdigest()


def record(options: Options, data: Data, processes: int, command: str) -> dict[str, Any]:
    """The content of args.json: what determines the run."""
    sizes = {"train": len(data.train), "test": len(data.test or ())}
    told = {"name": data.name, "classes": list(data.classes), "licence": data.licence, "digest": data.digest}
    modules = {"torch": torch, "triton": triton, "numpy": numpy, "fused-vit": vit}
    return {
        "command": command,
        "options": dataclasses.asdict(options),
        "data": told | sizes,
        "processes": processes,
        "versions": {"python": platform.python_version()} | {n: m.__version__ for n, m in modules.items()},
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit of the package's checkout, with "-dirty" after it if files are changed; None if there is none."""
    root = Path(vit.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, capture_output=True, text=True, timeout=20).stdout.strip() or None
    return None
