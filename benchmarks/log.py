"""Common parts of the commands: the log of results, its folder, and tables."""

from __future__ import annotations

import datetime
import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_stage(
    target: str, path: Path, about: dict[str, str], rehearse: bool, seconds: float, options: dict[str, Any]
) -> None:
    """The process of a stage. Its exit code is 0 if every record is ok, else 1."""
    deadline = time.monotonic() + seconds
    os.setsid()  # so that its child processes can be killed with it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS raises in deterministic mode without it
    import torch

    torch.backends.cudnn.allow_tf32 = False  # on by default, which makes eager's fp32 convolution less exact
    torch.manual_seed(0)
    log = Log(path, about, rehearse, deadline)
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(log, rehearse, **options)
    except Exception:
        log.add(ok=False, error=traceback.format_exc(limit=8))
    sys.exit(0 if log.ok else 1)


class Log:
    """Records of one stage. The file is complete after every record. ``deadline`` is of the monotonic clock.

    In the file every record includes ``about``, so records of many files can be one table.
    """

    def __init__(
        self, path: Path, about: dict[str, str], rehearse: bool = False, deadline: float = float("inf")
    ) -> None:
        import torch
        import triton

        self.path, self.rehearse, self.deadline = path, rehearse, deadline
        self.about = about | {
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": git_commit(),
            "utc": utc(),
        }
        self.records: list[dict[str, Any]] = []
        write(self.path, self.about, [])

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def ok(self) -> bool:
        return bool(self.records) and all(r["ok"] for r in self.records)

    def add(self, *, ok: bool, **record: Any) -> None:
        """Adds a record. One with ``skipped``, a reason, is no result of the kernels."""
        self.records.append({"ok": ok, **record} | ({"rehearsal": True} if self.rehearse else {}))
        shown = {
            k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items() if k not in ("tensors", "loss")
        }
        verdict = "FAILED" if not ok else "skip  " if "skipped" in record else "ok    "
        print(f"{verdict} {' '.join(f'{k}={v}' for k, v in shown.items())}", flush=True)
        write(self.path, self.about, [r | self.about | r for r in self.records])

    def attempt(self, fn: Callable[[], dict[str, Any]], **about: Any) -> None:
        """Adds ``about`` with the result of ``fn``. Too little memory is a skip, any other error a failure."""
        import torch

        start = time.perf_counter()
        try:
            found = fn()
        except torch.OutOfMemoryError as error:
            found = {"ok": True, "skipped": f"memory: {error}"[:300]}
        except Exception as error:
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        self.add(**about, **found, seconds=time.perf_counter() - start)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def write(path: Path, about: dict[str, Any], records: list[dict[str, Any]]) -> None:
    lines = ",\n".join(json.dumps(r) for r in records)
    path.write_text(f'{{"about": {json.dumps(about)},\n"records": [\n{lines}\n]}}\n')


def amend(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to the file of a stage whose process has ended."""
    found = json.loads(path.read_text()) if path.exists() else {"about": {"utc": utc()}, "records": []}
    write(path, found["about"], [*found["records"], record])


def folder_of(gpu: str, results: str = "benchmarks/results") -> Path:
    """The folder for the files of a card. ``gpu`` is its name, or "rehearsal"."""
    return ROOT / ("build/rehearsal" if gpu == "rehearsal" else f"{results}/{'-'.join(gpu.lower().split())}")


def name_of(dtype: Any) -> str:
    """The name of a `torch.dtype` in records: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], markdown: bool = False) -> str:
    """A table. The first column is left-aligned, the others are right-aligned. None is an empty cell.

    A float has four digits. For other formats pass text.
    """
    lines = [[*heads]]
    lines += [["" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    if markdown:
        lines.insert(1, ["---", *["---:"] * (len(heads) - 1)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def utc() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of the checkout. Without a ``.git`` here, it is the variable COMMIT."""
    return _output("git", f"--git-dir={ROOT / '.git'}", "rev-parse", "--short", "HEAD") or os.environ.get("COMMIT")


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
