"""``python -m benchmarks.compare A B``: what changed from A to B beyond noise; each is a result file or a folder.

A time has changed if the intervals from the 20th to the 80th percentile of the two runs do not touch and the medians
differ by more than 2 %. A record without percentiles has an interval of its median alone. A largest batch, which is
searched and not timed, has changed if it differs by more than 2 %. A point that was timed in A and failed in B counts
as slower.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from benchmarks.records import ABOUT, Record, ResultError, ceilings, load, number

#: Medians that differ by less are equal: clocks and temperature alone move them so much from one run to the next.
THRESHOLD = 1.02


def compare(a: Path, b: Path, across_devices: bool = False) -> tuple[str, int]:
    """What to print, and the exit code: 1 if something is slower, else 0.

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
    dtypes = [sorted({r.point.dtype for r in records if _is_result(r) and r.point.dtype}) for records in runs]
    if dtypes[0] != dtypes[1]:
        told = f"A has {', '.join(dtypes[0]) or 'none'}, B {', '.join(dtypes[1]) or 'none'}"
        lines.append(f"The dtypes differ ({told}): only points of the same dtype are compared.")
    if clocks := _ceilings(*runs, sorted(set(dtypes[0]) & set(dtypes[1]))):
        lines.append(f"ceilings: {clocks}")

    here, there = ({p for p, r in records.items() if _is_result(r)} for records in (old, new))
    changed = sorted((ratio, p) for p in here & there if (ratio := change(old[p], new[p])) is not None)
    for ratio, p in reversed(changed):  # how much more time; the slowest first
        lines.append(f"{_word(ratio, old[p])} {ratio:.3f}×  {p}  {_values(old[p], new[p])}")
    lost = sorted(p for p in here if p in new and new[p].missing)
    failed = [p for p in lost if new[p].error is not None]
    lines += [f"{new[p].missing} in B  {p}" for p in (*failed, *(p for p in lost if p not in failed))]
    slower = sum(ratio > 1 for ratio, _ in changed)
    lines.append(
        f"{len(here & there)} points compared, {len(changed)} changed ({slower} slower), "
        f"{len(here - there)} only in A, {len(there - here)} only in B"
    )
    return "\n".join(lines), 1 if slower or failed else 0


def change(old: Record, new: Record) -> float | None:
    """By what factor the time grew (or the largest batch shrank); None within the noise."""
    if old.timed and new.timed:
        apart = (old.ms_p80 or old.ms_p50) < (new.ms_p20 or new.ms_p50) or (new.ms_p80 or new.ms_p50) < (
            old.ms_p20 or old.ms_p50
        )
        ratio = new.ms_p50 / old.ms_p50
    elif old.largest_batch and new.largest_batch:
        apart, ratio = True, old.largest_batch / new.largest_batch
    else:
        return None
    return ratio if apart and abs(math.log(ratio)) > math.log(THRESHOLD) else None


def _is_result(r: Record) -> bool:
    """What is compared as a point; the card's ceilings have a line of their own."""
    return r.missing is None and r.point.bench != "ceiling"


def _word(ratio: float, r: Record) -> str:
    return ("slower" if ratio > 1 else "faster") if r.timed else ("smaller" if ratio > 1 else "larger")


def _values(old: Record, new: Record) -> str:
    if old.timed:
        return f"{number(old.ms_p50, 4)} → {number(new.ms_p50, 4)} ms"
    return f"largest batch {old.largest_batch:.0f} → {new.largest_batch:.0f}"


def _ceilings(old: list[Record], new: list[Record], dtypes: list[str]) -> str:
    told = []
    for dtype in dtypes or [""]:
        (rate, speed), (rate2, speed2) = ceilings(old, dtype), ceilings(new, dtype)
        if rate and rate2:
            told.append(f"{dtype} {number(rate)} → {number(rate2)} TFLOP/s")
    if speed and speed2:
        told.append(f"copy {number(speed, 4)} → {number(speed2, 4)} GB/s")
    return ", ".join(told)


def _about(records: list[Record]) -> str:
    """Every value that occurs, in the order of `ABOUT`."""
    told = []
    for key in ABOUT:
        values = sorted({r.about[key] for r in records if r.about[key]})
        told += [f"{'' if key in ('gpu', 'utc') else key + ' '}{' and '.join(values)}"] if values else []
    return ", ".join(told) or "no records"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__.split(":")[1].split(";")[0]
    )
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
