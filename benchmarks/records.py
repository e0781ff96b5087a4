"""Reads result files: every ``bench_*.json`` of a folder, as checked records with their source.

A file is ``{"about": {gpu, driver, torch, triton, commit, command, utc}, "records": [...]}``. A record's own fields
replace those of ``about``. A list of records that have all of these fields is a file, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.shapes import LATENCY, MODELS

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NAMES = {shape.model: name for name, shape in reversed(MODELS.items())}
ABOUT = ("gpu", "driver", "torch", "triton", "commit", "command", "utc")


class ResultError(Exception):
    """A file is unusable or an argument is wrong. The message is one line."""


class Point(NamedTuple):
    """The subject of a record. ``mode`` is fwd, bwd or full (forward + backward)."""

    bench: str
    op: str
    shape: str
    dtype: str
    mode: str
    provider: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.op, *self[2:]) if part)


@dataclasses.dataclass(frozen=True)
class Record:
    """One point and its result: times, a largest batch, a ceiling, or a reason why there is none.

    Units: milliseconds, TFLOP/s, GB/s (10⁹ bytes), images/s, MiB. ``sol_fraction`` is floor / ``ms_p50``.
    ``about`` is that of its file, with the keys of `ABOUT`.
    """

    point: Point
    about: dict[str, str | None]  # gpu is never None
    path: Path
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    img_s: float | None = None
    sol_fraction: float | None = None
    peak_mem_mb: float | None = None
    largest_batch: float | None = None
    skipped: str | None = None
    error: str | None = None

    @property
    def timed(self) -> bool:
        return self.ms_p50 is not None

    @property
    def ours(self) -> bool:
        """Whether our kernels ran. ``accelerated…`` is another library's model with them."""
        return self.point.provider in ("ours", "triton", "graph", "accelerated", "accelerated-hf")

    @property
    def missing(self) -> str | None:
        """A short reason why there is no result, or None if there is one."""
        if self.error is not None:
            return "failed parity" if "parity" in self.error.lower() else f"failed: {_brief(self.error)}"
        return None if self.skipped is None else f"skipped: {_brief(self.skipped)}"


_NUMBERS = [f.name for f in dataclasses.fields(Record) if f.type == "float | None"]


def label(shape: str) -> str:
    """The text ``B/16, batch 256`` for ``vit_base_patch16_224/b256``."""
    model, _, batch = shape.partition("/b")
    base, at, side = model.partition("@")
    return f"{_NAMES.get(base, base)}{at}{side}, batch {batch}"


def model_shapes(records: Iterable[Record], dtype: str) -> list[str]:
    """The whole models of the table, in the order of `MODELS`. Others with ``@`` are only for the plot by side."""
    wanted = [str(shape) for shape in (*MODELS.values(), LATENCY)]
    found = {r.point.shape: 0 for r in records if r.point[:2] == ("vit", "vit") and r.point.dtype == dtype}
    return [s for s in wanted if s in found] + [s for s in found if s not in wanted and "@" not in s]


def dtypes_of(records: Iterable[Record]) -> list[str]:
    """The dtypes of whole models and ops, bfloat16 first."""
    found = {r.point.dtype for r in records if r.point.bench != "ceiling" and r.point.dtype}
    return sorted(found, key=lambda dtype: (dtype != "bfloat16", dtype))


def load(path: Path) -> list[Record]:
    """The records of a file, or of every ``bench_*.json`` in a folder. Of equal points the newest counts.

    Raises:
        ResultError: there is no file, a file is damaged, or the files of one folder are from several devices.
    """
    files = sorted(path.glob("bench_*.json")) if path.is_dir() else [path]
    if not files:
        raise ResultError(f"{path} has no bench_*.json")
    records = []
    for file in files:
        try:
            records += parse(json.loads(file.read_text(encoding="utf-8")), file)
        except OSError as error:
            raise ResultError(f"{file}: {error.strerror}") from None
        except ValueError as error:
            raise ResultError(f"{file} is not whole JSON ({error}); was its run cut short while it wrote?") from None
    gpus = sorted({str(r.about["gpu"]) for r in records})
    if len(gpus) > 1:
        raise ResultError(f"{path} has files of different devices: {', '.join(gpus)}")
    newest: dict[Point, Record] = {}
    for r in sorted(records, key=lambda r: r.about["utc"] or ""):  # stable: later in a file is newer
        newest[r.point] = r
    return [r for r in records if newest[r.point] is r]  # in the order of the files


def ceilings(records: Iterable[Record], dtype: str) -> tuple[float | None, float | None]:
    """The measured matrix rate in this dtype, TFLOP/s, and copy bandwidth, GB/s. None if there is none."""
    found = [r for r in records if r.point.bench == "ceiling" and r.missing is None]
    rates = [r.tflops for r in found if r.point.op == "matmul" and r.point.dtype == dtype]
    speeds = [r.gbps for r in found if r.point.op == "copy"]
    return rates[-1] if rates else None, speeds[-1] if speeds else None


def not_timed(records: Iterable[Record], full: bool = False) -> list[str]:
    """A line for each provider and reason with the points that were skipped or failed. ``full`` adds the message."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for r in records:
        if r.missing is not None:
            reason = r.missing + (f" ({_line(r.error or r.skipped)})" if full else "")
            where = " ".join(filter(None, (r.point.op, r.point.shape, r.point.dtype)))
            group = groups.setdefault((r.point.provider or r.point.bench, reason), {})
            group.setdefault(where, []).append(r.point.mode)
    lines = []
    for (provider, reason), places in groups.items():
        told = [f"{where} {'/'.join(modes)}".strip() for where, modes in places.items()]
        lines.append(f"{provider} {reason}: {', '.join(filter(None, told))}".removesuffix(": "))
    return lines


def number(x: float, digits: int = 3) -> str:
    """Rounded to so many significant digits, with thousands separators: 13,600; 1.40."""
    x = float(f"{x:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(x))) if x else 0
    return f"{x:,.{max(decimals, 0)}f}"


def parse(found: Any, path: Path) -> list[Record]:
    """The records of the content of a file. Messages name ``path``.

    Raises:
        ResultError: the content is not valid.
    """
    if isinstance(found, list):  # records with all fields
        found = {"about": {}, "records": found}
    if not isinstance(found, dict) or not isinstance(found.get("about"), dict):
        raise ResultError(f'{path} is not a result file: no "about"')
    if not isinstance(found.get("records"), list):
        raise ResultError(f'{path} is not a result file: no list "records"')
    about = _text(found["about"], ABOUT, f"{path}: about.")
    if not about.get("gpu") and not found["records"]:
        raise ResultError(f"{path}: about.gpu, the device, is missing")
    return [_record(r, about, path, i) for i, r in enumerate(found["records"])]


def _text(found: dict[str, Any], keys: Iterable[str], where: str) -> dict[str, str | None]:
    for key in keys:
        if not isinstance(found.get(key), str | None):
            raise ResultError(f"{where}{key} is not text")
    return {key: found[key] for key in keys if found.get(key)}


def _record(r: Any, about: dict[str, str | None], path: Path, index: int) -> Record:
    def must(holds: bool, message: str) -> None:
        if not holds:
            raise ResultError(f"{path}: record {index + 1}: {message}")

    must(isinstance(r, dict), "is not an object")
    where = f"{path}: record {index + 1}: "
    about = dict.fromkeys(ABOUT) | about | _text(r, ABOUT, where)
    must(bool(about["gpu"]), "about.gpu, the device, is missing")
    for kind in ("rehearsal", "predicted"):
        about |= {"gpu": kind} if r.get(kind) is True else {}
    names = dict.fromkeys(Point._fields, "") | _text(r, Point._fields, where)
    why = _text(r, ("skipped", "error"), where)
    values = {key: r[key] for key in _NUMBERS if r.get(key) is not None}
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        must(number and 0 < value < math.inf, f"{key} is {value!r}, not a positive number")
    failed = r.get("ok") is False
    if failed or "skipped" in why:
        # The end of a whole run has no point, so the name of the file stands for it.
        names["bench"] = names["bench"] or path.stem.removeprefix("bench_")
        why = {"error": why.get("error", "parity")} if failed else {"skipped": why["skipped"]}
        return Record(Point(**names), about, path, **why)
    for key in ("bench", "op"):
        must(bool(names[key]), f"{key} is missing")
    results = ("ms_p50", "largest_batch") if names["bench"] != "ceiling" else ("tflops", "gbps")
    none = f"has neither {' nor '.join(results)}, nor a reason (skipped, or ok: false)"
    must(any(key in values for key in results), none)
    times = [values[key] for key in ("ms_p20", "ms_p50", "ms_p80") if key in values]
    must(times == sorted(times), "ms_p20, ms_p50, ms_p80 are not in order")
    must((names["bench"], names["op"]) != ("vit", "vit") or "img_s" in values, "img_s is missing")
    return Record(Point(**names), about, path, **values)


def _line(text: str) -> str:
    """The last line of a message, which is the error of a traceback."""
    return (text.strip().splitlines() or [""])[-1].strip()


def _brief(text: str) -> str:
    """The text before the first colon, bracket, full stop or semicolon: ``out of memory``."""
    line = _line(text)
    for mark in (":", "(", ". ", ";"):
        line = line.split(mark)[0]
    return line.strip()[:60]
