"""``python -m benchmarks.compare A B``: changes from A to B beyond noise. Each is a result file or a folder.

A time has changed if the intervals from the 20th to the 80th percentile of the two runs do not touch and the medians
differ by more than 2 %. The interval of a record without percentiles is its median. A largest batch has changed if it
differs by more than 2 %. A point that was timed in A and failed in B counts as slower.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.records import ABOUT, Record, ResultError, ceilings, load, number

#: Medians that differ by less are equal, because clocks and temperature change them that much between runs.
THRESHOLD = 1.02


def compare(a: Path, b: Path, across_devices: bool = False) -> tuple[str, int]:
    """(text, exit code). The exit code is 1 if something is slower, else 0.

    Raises:
        ResultError: nothing to read, or the devices differ and ``across_devices`` is not set.
    """
    old, new = ({r.point: r for r in load(path)} for path in (a, b))
    runs = [list(records.values()) for records in (old, new)]
    lines = [f"{name}: {_about(records)}" for name, records in zip("AB", runs, strict=True)]
    gpus = [sorted({r.about["gpu"] for r in records}) for records in runs]
    if all(gpus) and gpus[0] != gpus[1]:
        if not across_devices:
            told = f"A is of {', '.join(gpus[0])}, B of {', '.join(gpus[1])}"
            raise ResultError(f"different devices: {told}; --across-devices compares them nevertheless")
        lines.append("The devices differ: what follows says nothing about a change of the code.")
    here, there = (
        {p for p, r in records.items() if r.missing is None and p.bench != "ceiling"} for records in (old, new)
    )
    dtypes = [sorted({p.dtype for p in points if p.dtype}) for points in (here, there)]
    if dtypes[0] != dtypes[1]:
        told = f"A has {', '.join(dtypes[0]) or 'none'}, B {', '.join(dtypes[1]) or 'none'}"
        lines.append(f"The dtypes differ ({told}): only points of the same dtype are compared.")
    for dtype in sorted({*dtypes[0]} & {*dtypes[1]}):
        for unit, *values in zip((f"TFLOP/s {dtype}", "GB/s"), *(ceilings(run, dtype) for run in runs), strict=True):
            lines += [f"ceiling: {' → '.join(number(v, 4) for v in values)} {unit}"] if all(values) else []

    changed = sorted((ratio, p) for p in here & there if (ratio := change(old[p], new[p])) is not None)
    for ratio, p in reversed(changed):  # the slowest first
        time = ("faster", "slower"), "ms_p50", "ms"
        words, field, unit = time if old[p].timed else (("larger", "smaller"), "largest_batch", "images")
        values = " → ".join(number(getattr(r, field), 4) for r in (old[p], new[p]))
        lines.append(f"{words[ratio > 1]} {ratio:.3f}×  {p}  {values} {unit}")
    lost = sorted((new[p].error is None, p) for p in here if p in new and new[p].missing)
    lines += [f"{new[p].missing} in B  {p}" for _, p in lost]
    slower, failed = sum(ratio > 1 for ratio, _ in changed), any(not skipped for skipped, _ in lost)
    lines.append(
        f"{len(here & there)} points compared, {len(changed)} changed ({slower} slower), "
        f"{len(here - there)} only in A, {len(there - here)} only in B"
    )
    return "\n".join(lines), 1 if slower or failed else 0


def change(old: Record, new: Record) -> float | None:
    """The factor by which the time grew or the largest batch shrank, or None within the noise."""
    if old.timed and new.timed:
        (low, high), (low2, high2) = ((r.ms_p20 or r.ms_p50, r.ms_p80 or r.ms_p50) for r in (old, new))
        apart, ratio = high < low2 or high2 < low, new.ms_p50 / old.ms_p50
    elif old.largest_batch and new.largest_batch:
        apart, ratio = True, old.largest_batch / new.largest_batch
    else:
        return None
    return ratio if apart and abs(math.log(ratio)) > math.log(THRESHOLD) else None


def _about(records: list[Record]) -> str:
    """The values that occur, in the order of `ABOUT`."""
    told = []
    for key in ABOUT:
        values = sorted({r.about[key] for r in records if r.about[key]})
        told += [f"{'' if key in ('gpu', 'utc') else key + ' '}{' and '.join(values)}"] if values else []
    return ", ".join(told) or "no records"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Changes from A to B.")
    parser.add_argument("a", type=Path, help="result file, or folder of bench_*.json")
    parser.add_argument("b", type=Path, help="the newer one")
    parser.add_argument("--across-devices", action="store_true", help="compare although the devices differ")
    args = parser.parse_args(argv)
    try:
        text, code = compare(args.a, args.b, args.across_devices)
    except ResultError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
