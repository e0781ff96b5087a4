"""``make report``: README's table of speed and the plots, from the result files alone.

The files are ``benchmarks/results/<gpu>/bench_*.json``; the plots go beside them. Where no GPU has written one, the
prediction of ``benchmarks/prediction/prediction.json`` takes their place, in the same format with ``predicted: true``
and providers such as ``ours (predicted)`` and ``floor``, and everything made from it says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.records import Record, ResultError, ceilings, load, not_timed, number
from benchmarks.shapes import LATENCY, MODELS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
PREDICTION = ROOT / "benchmarks/prediction/prediction.json"
MARKERS = ("<!-- speed -->", "<!-- /speed -->")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_NAMES = {shape.model: name for name, shape in reversed(MODELS.items())}
_NONE = "Not measured yet: no GPU has run the kernels."


def label(shape: str) -> str:
    """For readers: ``B/16, batch 256`` of ``vit_base_patch16_224/b256``."""
    model, _, batch = shape.partition("/b")
    base, at, side = model.partition("@")
    return f"{_NAMES.get(base, base)}{at}{side}, batch {batch}"


def model_shapes(records: Iterable[Record], dtype: str) -> list[str]:
    """The whole models of the table, in the order of `MODELS`; those with ``@`` are for the plot against the side."""
    wanted = [str(shape) for shape in (*MODELS.values(), LATENCY)]
    found = {r.point.shape: 0 for r in records if r.point[:2] == ("vit", "vit") and r.point.dtype == dtype}
    return [s for s in wanted if s in found] + [s for s in found if s not in wanted and "@" not in s]


def dtypes_of(records: Iterable[Record]) -> list[str]:
    """Of whole models and ops; bfloat16 first."""
    found = {r.point.dtype for r in records if r.point.bench != "ceiling" and r.point.dtype}
    return sorted(found, key=lambda dtype: (dtype != "bfloat16", dtype))


def _main_dtype(records: list[Record]) -> str:
    return (dtypes_of(records) or [""])[0]


def table(records: list[Record]) -> str:
    """Models as rows, in Markdown; what was not timed has its reason in its cell."""
    predicted = any(r.predicted for r in records)
    tag, digits = (" (predicted)", 2) if predicted else ("", 3)
    runs = _runs(records)
    heads = ["PREDICTION, not measured" if predicted else "model"]
    for mode in ("forward", "forward + backward"):
        heads += [f"{mode}, img/s{tag}", "share of floor", f"best peer, img/s{tag}"]
    heads.append(f"training memory, GiB{tag}")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for dtype in dtypes_of(records):
        for shape in model_shapes(records, dtype):
            row = [r for r in records if r.point[:4] == ("vit", "vit", shape, dtype)]
            mine = [i for i, about in enumerate(runs, 1) if any(_run(r) == about for r in row)]
            name = f"{label(shape)}, {DTYPES.get(dtype, dtype)}"
            name += f" (run {', '.join(map(str, mine))})" if len(runs) > 1 else ""
            cells = [name, *_speed(row, "fwd", digits), *_speed(row, "full", digits), _memory(row, digits)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(records: list[Record], base: Path) -> str:
    """The table of one device and where it comes from; ``base``: the folder that links start from."""
    models = [
        r for r in records if r.point.bench == "vit" and "@" not in r.point.shape and r.point.op != "largest_batch"
    ]
    if not any(r.point.op for r in models):
        return f"**{records[0].about['gpu']}**: no whole model in its result files."
    lines = [table(records), ""]
    sources = [_source(records, run, base) for run in _runs(records)]
    if len(sources) > 1:
        sources = [f"Run {i}: {source}" for i, source in enumerate(sources, 1)]
    lines.append(" ".join(sources) + _floors(records))
    lines += [f"\n{told}" for dtype in dtypes_of(records) if (told := _latency(records, dtype))]
    if reasons := not_timed(models):
        lines += ["", f"Not timed: {'; '.join(reasons)}."]
    return "\n".join(lines)


def readme_text(devices: list[list[Record]], prediction: list[Record], base: Path) -> str:
    """What stands between README's markers: a section for each device, or the prediction, or neither."""
    if devices:
        heads = [f"**{records[0].about['gpu']}**\n\n" if len(devices) > 1 else "" for records in devices]
        return "\n\n".join(head + section(records, base) for head, records in zip(heads, devices, strict=True))
    if not prediction:
        return _NONE
    (rate, speed), gpu = ceilings(prediction, _main_dtype(prediction)), prediction[0].about["gpu"]
    if not rate or not speed:
        raise ResultError(
            f"{prediction[0].path} does not tell its ceilings: two records of bench ceiling, matmul and copy"
        )
    how = f"at the ceilings {number(rate)} TFLOP/s and {number(speed)} GB/s of {gpu}, to two digits"
    what = "Prediction, what counted bytes and FLOPs allow at most"
    return f"{_NONE} {what} {how}:\n\n{section(prediction, base)}"


def insert(readme: str, text: str) -> str:
    """README with ``text`` between its markers.

    Raises:
        ResultError: a marker is missing, doubled, or they are in the wrong order.
    """
    counts = [readme.count(marker) for marker in MARKERS]
    if counts != [1, 1] or readme.index(MARKERS[0]) > readme.index(MARKERS[1]):
        told = f"{MARKERS[0]} and after it one {MARKERS[1]}; it has {counts[0]} and {counts[1]}"
        raise ResultError(f"the README must have one {told}{', in the wrong order' if counts == [1, 1] else ''}")
    before, rest = readme.split(MARKERS[0])
    return f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"


def read(results: Path, prediction: Path, samples: bool = False) -> tuple[list[list[Record]], list[Record]]:
    """The records of each device, and those of the prediction; ``samples``: even made-up ones, for the tests.

    Raises:
        ResultError: a file is damaged, or is not what its place says: measured, predicted.
    """
    folders = sorted({file.parent for file in [*results.glob("bench_*.json"), *results.glob("*/bench_*.json")]})
    devices = [records for folder in folders if (records := load(folder))]
    predicted = load(prediction) if prediction.exists() else []
    for r in (r for records in (*devices, predicted) for r in records):
        if r.sample and not samples:
            raise ResultError(f"{r.path} is a sample ({r.about['gpu']}): samples never go into a report")
    for r in (r for records in devices for r in records if not r.measured):
        kind = "predicted" if r.predicted else r.about["gpu"]
        raise ResultError(f"{r.path} was not measured on a GPU ({kind}); it does not belong into {results}")
    for r in (r for r in predicted if not r.predicted and r.point.bench != "ceiling"):
        raise ResultError(f"{r.path} has a record that is not marked as predicted: {r.point}")
    return devices, predicted


def report(
    results: Path, readme: Path, prediction: Path, check: bool = False, plots: bool = True, samples: bool = False
) -> int:
    """Writes (or only compares) README's table, draws the plots, says what it did; the exit code."""
    devices, predicted = read(results, prediction, samples)
    old = readme.read_text(encoding="utf-8")
    new = insert(old, readme_text(devices, predicted, readme.resolve().parent))
    if check:
        print(f"{readme} {'has what the result files give' if old == new else 'is stale: run `make report`'}")
        return int(old != new)
    if not devices:
        rest = f"what follows is the prediction of {prediction}" if predicted else f"and no prediction in {prediction}"
        print(f"No GPU has written results into {results}; {rest}.")
    if old != new:
        readme.write_text(new, encoding="utf-8")
    print(f"{readme}: {'written' if old != new else 'unchanged'}")
    sources = devices or ([predicted] if predicted else [])
    if plots and importlib.util.find_spec("matplotlib") is None:
        print("Plots left out: no matplotlib here; pip install -c constraints.txt matplotlib")
    elif plots:
        from benchmarks.plots import draw

        for records in sources:
            print("\n".join(draw(records, records[0].path.parent)))
    for line in (line for records in sources for line in not_timed(records, full=True)):
        print(f"not timed: {line}")
    return 0


def _speed(row: list[Record], mode: str, digits: int) -> list[str]:
    """Three cells: images a second of ours, its share of the floor, the best peer and how many times faster ours is."""
    row = [r for r in row if r.point.mode in (mode, "")]
    ours = next((r for r in row if _name(r) == "ours"), None)
    peers = [r for r in row if r.timed and not r.ours and _name(r) != "floor"]
    best = max(peers, key=lambda r: r.img_s, default=None)
    timed = ours is not None and ours.timed
    first = number(ours.img_s, digits) if timed else "–" if ours is None else ours.missing
    share = f"{number(100 * ours.sol_fraction, 2)} %" if timed and ours.sol_fraction else "–"
    if best is None:
        return [first, share, "–"]
    ratio = f": {number(ours.img_s / best.img_s, digits)}×" if timed else ""
    return [first, share, f"{_name(best)} {number(best.img_s, digits)}{ratio}"]


def _memory(row: list[Record], digits: int) -> str:
    """Of forward + backward, and beside it the peer that needs least."""
    found = [r for r in row if r.point.mode == "full" and r.peak_mem_mb]
    ours = next((r for r in found if _name(r) == "ours"), None)
    peer = min((r for r in found if not r.ours), key=lambda r: r.peak_mem_mb, default=None)
    told = [number(ours.peak_mem_mb / 1024, digits)] if ours else ["–"]
    if peer:
        ratio = f": {number(ours.peak_mem_mb / peer.peak_mem_mb, digits)}×" if ours else ""
        told.append(f"{_name(peer)} {number(peer.peak_mem_mb / 1024, digits)}{ratio}")
    return "; ".join(told)


def _latency(records: list[Record], dtype: str) -> str:
    """A line of what one image takes, the fastest first."""
    found = [r for r in records if r.point[:2] == ("vit", "latency") and r.point.dtype == dtype and r.timed]
    told = [f"{_name(r)} {number(r.ms_p50)} ms" for r in sorted(found, key=lambda r: r.ms_p50)]
    return f"Forward of {label(found[0].point.shape)}, {DTYPES.get(dtype, dtype)}: {', '.join(told)}." if found else ""


def _name(r: Record) -> str:
    return r.point.provider.removesuffix(" (predicted)")


def _run(r: Record) -> tuple[str | None, ...]:
    return tuple(r.about.values())


def _runs(records: list[Record]) -> list[tuple[str | None, ...]]:
    """The runs that the table's figures are of, oldest first."""
    return sorted(
        {_run(r) for r in records if r.point[:2] == ("vit", "vit") and "@" not in r.point.shape},
        key=lambda run: run[-1] or "",
    )


def _source(records: list[Record], run: tuple[str | None, ...], base: Path) -> str:
    mine = [r for r in records if _run(r) == run]
    about = mine[0].about
    told = [about["gpu"], *(f"{key} {about[key]}" for key in ("driver", "torch", "triton", "commit") if about[key])]
    told += [f"`{about['command']}`"] if about["command"] else []
    told += [about["utc"][:10]] if about["utc"] else []
    files = sorted({r.path for r in mine if r.point.bench == "vit"})
    told += [f"[{file.name}]({Path(os.path.relpath(file.resolve(), base)).as_posix()})" for file in files]
    return f"{', '.join(told)}."


def _floors(records: list[Record]) -> str:
    rate, speed = ceilings(records, _main_dtype(records))
    if not rate or not speed or any(r.predicted for r in records):
        return ""
    return f" Floor: at {number(rate)} TFLOP/s and {number(speed)} GB/s, as this card was measured to do."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="README's table of speed, and plots."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of <gpu>/bench_*.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--prediction", type=Path, default=PREDICTION, help="used where no GPU has written results")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README's table is stale")
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    args = parser.parse_args(argv)
    try:
        for path in (args.results, args.readme, args.prediction):
            if not path.exists() and path not in (RESULTS, PREDICTION):
                raise ResultError(f"{path} does not exist")
        return report(**vars(args))
    except ResultError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
