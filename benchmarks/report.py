"""``make report``: README's table of speed and the plots, from the result files.

The files are ``benchmarks/results/<gpu>/bench_*.json``, and the plots are written beside them. Without a file, the
README says that nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path

from benchmarks.log import ROOT
from benchmarks.log import table as markdown_table
from benchmarks.records import (
    DTYPES,
    Record,
    ResultError,
    ceilings,
    dtypes_of,
    label,
    load,
    model_shapes,
    not_timed,
    number,
)  # fmt: skip

RESULTS = ROOT / "benchmarks/results"
MARKERS = ("<!-- speed -->", "<!-- /speed -->")
_NONE = """\
Not measured yet: no GPU has run the kernels. `make roofline` prints what counted bytes and FLOPs allow at most on four
cards, and calls that a prediction."""


def table(records: list[Record]) -> str:
    """A table in Markdown with a row per model. A cell without a time has the reason."""
    heads, rows = ["model"], []
    for mode in ("forward", "forward + backward"):
        heads += [f"{mode}, img/s", "share of floor", "best peer, img/s"]
    for dtype in dtypes_of(records):
        for shape in model_shapes(records, dtype):
            row = [r for r in records if r.point[:4] == ("vit", "vit", shape, dtype)]
            name = f"{label(shape)}, {DTYPES.get(dtype, dtype)}"
            rows.append([name, *_speed(row, "fwd"), *_speed(row, "full"), _memory(row)])
    return markdown_table([*heads, "training memory, GiB"], rows, markdown=True)


def section(records: list[Record], base: Path) -> str:
    """The table of one device and its sources. Links are relative to the folder ``base``."""
    models = [r for r in records if r.point.bench == "vit" and "@" not in r.point.shape]
    models = [r for r in models if r.point.op != "largest_batch"]
    if not any(r.point.op for r in models):
        return f"**{records[0].about['gpu']}**: no whole model in its result files."
    sources = dict.fromkeys(_source(r, base) for r in sorted(models, key=lambda r: r.about["utc"] or ""))
    lines = [table(records), "", " ".join(sources)]
    rates = ceilings(records, (dtypes_of(records) or [""])[0])
    if all(rates):
        tflops, gbps = map(number, rates)
        lines[-1] += f" Floor: at {tflops} TFLOP/s and {gbps} GB/s, as this card was measured to do."
    lines += [f"\n{told}" for dtype in dtypes_of(records) if (told := _latency(records, dtype))]
    if reasons := not_timed(models):
        lines += ["", f"Not timed: {'; '.join(reasons)}."]
    return "\n".join(lines)


def readme_text(devices: list[list[Record]], base: Path) -> str:
    """The text between README's markers: a section for each device, or that there is none."""
    heads = [f"**{records[0].about['gpu']}**\n\n" if len(devices) > 1 else "" for records in devices]
    parts = [head + section(records, base) for head, records in zip(heads, devices, strict=True)]
    return "\n\n".join(parts) or _NONE


def insert(readme: str, text: str) -> str:
    """README with ``text`` between its markers.

    Raises:
        ResultError: a marker is missing or doubled, or they are in the wrong order.
    """
    parts = re.split(f"({'|'.join(MARKERS)})", readme)
    if tuple(parts[1::2]) != MARKERS:
        raise ResultError(f"the README must have one {MARKERS[0]} and after it one {MARKERS[1]}")
    return "".join([*parts[:2], f"\n{text}\n", *parts[3:]])


def read(results: Path, samples: bool = False) -> list[list[Record]]:
    """The records of each device. ``samples`` allows invented ones, for the tests.

    Raises:
        ResultError: a file is damaged, or was not measured.
    """
    folders = sorted({file.parent for file in [*results.glob("bench_*.json"), *results.glob("*/bench_*.json")]})
    devices = [records for folder in folders if (records := load(folder))]
    for r in (r for records in devices for r in records):
        gpu = r.about["gpu"]
        if "sample" in gpu.lower() and not samples:
            raise ResultError(f"{r.path} is a sample ({gpu}): samples never go into a report")
        if gpu.lower() in ("predicted", "rehearsal", "cpu"):
            raise ResultError(f"{r.path} was not measured on a GPU ({gpu}); it does not belong in {results}")
    return devices


def report(results: Path, readme: Path, check: bool = False, plots: bool = True, samples: bool = False) -> int:
    """Writes README's table, or only compares it, draws the plots, and returns the exit code."""
    devices = read(results, samples)
    old = readme.read_text(encoding="utf-8")
    new = insert(old, readme_text(devices, readme.resolve().parent))
    if check:
        print(f"{readme} {'has what the result files give' if old == new else 'is stale: run `make report`'}")
        return int(old != new)
    if not devices:
        print(f"Nothing is measured: no GPU has written results into {results}.")
    if old != new:
        readme.write_text(new, encoding="utf-8")
    print(f"{readme}: {'written' if old != new else 'unchanged'}")
    if plots and importlib.util.find_spec("matplotlib") is None:
        print("Plots left out: no matplotlib here; pip install -c constraints.txt matplotlib")
    elif plots:
        from benchmarks.plots import draw

        for records in devices:
            print("\n".join(draw(records, records[0].path.parent)))
    for line in (line for records in devices for line in not_timed(records, full=True)):
        print(f"not timed: {line}")
    return 0


def _speed(row: list[Record], mode: str) -> list[str]:
    """Three cells: images/s of ours, its share of the floor, and the best peer with the ratio of ours to it."""
    row = [r for r in row if r.point.mode in (mode, "")]
    ours = next((r for r in row if r.point.provider == "ours"), None)
    peers = [r for r in row if r.timed and not r.ours]
    best = max(peers, key=lambda r: r.img_s, default=None)
    timed = ours is not None and ours.timed
    first = number(ours.img_s) if timed else "–" if ours is None else ours.missing
    share = f"{number(100 * ours.sol_fraction, 2)} %" if timed and ours.sol_fraction else "–"
    if best is None:
        return [first, share, "–"]
    ratio = f": {number(ours.img_s / best.img_s)}×" if timed else ""
    return [first, share, f"{best.point.provider} {number(best.img_s)}{ratio}"]


def _memory(row: list[Record]) -> str:
    """Memory of forward + backward of ours, and of the peer with the least."""
    found = [r for r in row if r.point.mode == "full" and r.peak_mem_mb]
    ours = next((r for r in found if r.point.provider == "ours"), None)
    peer = min((r for r in found if not r.ours), key=lambda r: r.peak_mem_mb, default=None)
    told = [number(ours.peak_mem_mb / 1024)] if ours else ["–"]
    if peer:
        ratio = f": {number(ours.peak_mem_mb / peer.peak_mem_mb)}×" if ours else ""
        told.append(f"{peer.point.provider} {number(peer.peak_mem_mb / 1024)}{ratio}")
    return "; ".join(told)


def _latency(records: list[Record], dtype: str) -> str:
    """A line with the latencies of one image, the fastest first."""
    found = [r for r in records if r.point[:2] == ("vit", "latency") and r.point.dtype == dtype and r.timed]
    told = [f"{r.point.provider} {number(r.ms_p50)} ms" for r in sorted(found, key=lambda r: r.ms_p50)]
    return f"Forward of {label(found[0].point.shape)}, {DTYPES.get(dtype, dtype)}: {', '.join(told)}." if found else ""


def _source(r: Record, base: Path) -> str:
    about, link = r.about, Path(os.path.relpath(r.path.resolve(), base)).as_posix()
    told = [about["gpu"], *(f"{key} {about[key]}" for key in ("driver", "torch", "triton", "commit") if about[key])]
    told += [f"`{about['command']}`"] if about["command"] else []
    told += [about["utc"][:10]] if about["utc"] else []
    return f"{', '.join(told)}, [{r.path.name}]({link})."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="README's table, and plots.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of <gpu>/bench_*.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if README's table is stale")
    parser.add_argument("--no-plots", dest="plots", action="store_false")
    args = parser.parse_args(argv)
    try:
        for path in (args.results, args.readme):
            if not path.exists() and path != RESULTS:
                raise ResultError(f"{path} does not exist")
        return report(**vars(args))
    except ResultError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
