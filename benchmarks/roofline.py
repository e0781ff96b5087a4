"""Predicts the least cost and the occupancy of every kernel without a GPU.

    python -m benchmarks.roofline [--shape vit_base_patch16_224/b256] [--arch 90] [--no-compile] [--out FILE]

For each launch of a forward, and of a forward and backward (`benchmarks.trace`), it prints bytes, FLOPs, and the floor,
which is the longer of the two at the card's rates. For our kernels it adds registers, spills and shared memory from the
compiler, programs and warps per multiprocessor, waves of the grid, and the share of the card that the last wave uses.
For the whole model, ours and eager PyTorch's, it prints the speed with every launch at its floor, and the memory
(`benchmarks.memory`). Nothing is measured.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import compiled  # isort: skip (before kernels are imported)

import torch

from benchmarks import arguments, bench_vit, memory
from benchmarks.devices import DEVICES, ceilings, occupancy, waves
from benchmarks.harness import Ceilings, Work
from benchmarks.log import git_commit, table, utc
from benchmarks.records import ResultError
from benchmarks.shapes import MODELS, Shape
from benchmarks.trace import Launch, trace
from vit.kernels.dry_run import dry_run

LABEL = "PREDICTION from counted bytes and FLOPs, not a measurement"
MODES = {"fwd": "forward, no gradients", "full": "forward + backward"}
SMALL = 0.005  # operations with a smaller part of the model's time share one line


def analyse(shape: Shape, arch: int, compiles: bool) -> dict[str, Any]:
    """The lines of the launches of a model on one card, and the predictions for the whole."""
    device = DEVICES[arch]
    rates, source = ceilings(device)
    kernels, wholes = [], []
    for mode, provider in itertools.product(MODES, ("ours", "reference")):
        model, image = memory.factory(provider, shape)(shape.batch)
        launches = trace(model, image, train=mode == "full", arch=arch, num_sms=device.num_sms)
        if provider == "ours":
            with dry_run(arch, num_sms=device.num_sms):
                lines = [line(found, count, arch, rates, compiles) for found, count in alike(launches)]
            kernels += [{"mode": mode, **entry} for entry in lines]
        ms = sum(Work(a.flops, a.bytes).floor_ms(rates) for a in launches)
        share = bench_vit.BENCHES[0].total(shape, torch.bfloat16)[mode].floor_ms(rates) / ms
        peak = memory.count(model, image, mode == "full", arch, device.num_sms).peak
        found = {"ms": ms, "img_s": 1e3 * shape.batch / ms, "sol_fraction": share, "peak_mem_mb": peak / 2**20}
        wholes.append({"mode": mode, "provider": provider, "predicted": True} | found)
    where = {"shape": str(shape), "arch": arch, "card": device.name, "rates": source, "dtype": "bfloat16"}
    return where | {"tflops": rates.tflops, "gbps": rates.gbps, "kernels": kernels, "models": wholes}


def analyses(tasks: list[tuple[Shape, int]], compiles: bool) -> Iterator[dict[str, Any]]:
    """`analyse` of each, two at a time."""
    if len(tasks) == 1:
        yield analyse(*tasks[0], compiles)
        return
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # no threads: Triton is not thread-safe
        yield from pool.map(analyse, *zip(*tasks, strict=True), [compiles] * len(tasks))


def alike(launches: list[Launch]) -> list[tuple[Launch, int]]:
    """Each kind of launch with its count, in the order of the first launches."""
    kinds: dict[tuple, list[Launch]] = {}
    for launch in launches:
        kinds.setdefault(_kind(launch), []).append(launch)
    return [(of_kind[0], len(of_kind)) for of_kind in kinds.values()]


def _kind(launch: Launch) -> tuple:
    return label(launch), launch.phase, launch.flops, launch.bytes, launch.grid, tile(launch)


def label(launch: Launch) -> str:
    """``gemm dgelu``, or PyTorch's operation with the shapes of its operands."""
    if launch.args is None:
        return f"{launch.name} {' '.join('x'.join(map(str, shape)) for shape in launch.shapes[:2])}".strip()
    name = launch.name.removeprefix("_").removesuffix("_kernel")
    if launch.args.get("ACTIVATION") is not None:
        preact = launch.args.get("preact_ptr", launch.args.get("preact_desc"))
        name += " gelu" if preact is None else " dgelu"
    return name + (" + residual" if launch.args.get("branch_ptr") is not None else "")


def tile(launch: Launch) -> str:
    """Blocks, warps and stages of our kernels: ``128x128x64 w8 s3``."""
    if launch.args is None:
        return ""
    blocks = "x".join(str(v) for k, v in launch.args.items() if k.startswith("BLOCK_"))
    return f"{blocks} w{launch.options['num_warps']} s{launch.options['num_stages']}"


def line(launch: Launch, count: int, arch: int, rates: Ceilings, compiles: bool) -> dict[str, Any]:
    floor = 1e3 * Work(launch.flops, launch.bytes).floor_ms(rates)
    counted = {"count": count, "bytes": launch.bytes, "flops": launch.flops, "floor_us": floor, "tile": tile(launch)}
    found = {"kernel": label(launch), "phase": launch.phase} | counted
    if launch.kernel is None or not compiles:
        return found
    result = compiled.compile_kernel(launch.kernel, launch.grid, launch.args, launch.options)
    if isinstance(result, Exception):
        return found | {"error": f"does not compile: {str(result).strip()[-300:]}"}
    said, device = compiled.figures(result), DEVICES[arch]
    found |= {name: said[name] for name in ("registers", "spill", "shared")}
    fit = occupancy(device, said["registers"], said["shared"], said["warps"])
    if fit.blocks == 0:
        return found | {"error": "does not fit on a multiprocessor"}
    programs = functools.reduce(int.__mul__, launch.grid)
    count_of_waves, last = waves(programs, device.num_sms * fit.blocks)
    of_grid = {"programs": programs, "waves": count_of_waves, "last_wave": last}
    return found | {"blocks_per_sm": fit.blocks, "warps_per_sm": fit.warps} | of_grid


# ---- the command -----------------------------------------------------------------------------------------------------


HEADS = ("launch", "x", "MB", "GFLOP", "floor us", "tile")
FIT = ("registers", "spill", "shared", "programs/SM", "warps/SM", "waves")
WHOLE = ("prediction, not measured", "img/s at most", "share of floor", "beside eager", "ms at least", "peak GiB")


def show(result: dict[str, Any]) -> str:
    """The tables of one model on one card."""
    texts = [
        f"\n{result['shape']} bf16 on {result['card']} (sm_{result['arch']}): {result['tflops']:g} TFLOP/s, "
        f"{result['gbps']:g} GB/s ({result['rates']}). {LABEL}"
    ]
    for mode, title in MODES.items():
        lines = [entry for entry in result["kernels"] if entry["mode"] == mode]
        least = SMALL * sum(x["count"] * x["floor_us"] for x in lines)
        small = [x for x in lines if x["count"] * x["floor_us"] < least and not x["tile"]]
        texts.append(f"\n{title}\n{table(HEADS + FIT, [_row(x) for x in lines if x not in small])}")
        together = sum(x["count"] * x["floor_us"] for x in small)
        texts += [f"{sum(x['count'] for x in small)} smaller operations, {together:.1f} us together"] if small else []
        texts += [f"{x['kernel']}: {x['error']}" for x in lines if "error" in x]
    rows = []
    for x in result["models"]:
        (eager,) = (e for e in result["models"] if (e["mode"], e["provider"]) == (x["mode"], "reference"))
        name = f"{'ours' if x is not eager else 'eager'}, {MODES[x['mode']]}"
        found = f"{x['img_s']:,.0f}", f"{x['sol_fraction']:.0%}", f"{eager['ms'] / x['ms']:.2f}x", f"{x['ms']:.2f}"
        rows.append([name, *found, f"{x['peak_mem_mb'] / 1024:.2f}"])
    return "\n".join([*texts, "", table(WHOLE, rows)])


def _row(x: dict[str, Any]) -> list[Any]:
    counted = x["count"], f"{x['bytes'] / 1e6:.1f}", f"{x['flops'] / 1e9:.1f}", f"{x['floor_us']:.1f}", x["tile"]
    fit = [x.get(k) for k in ("registers", "spill", "shared", "blocks_per_sm", "warps_per_sm")]
    waves = f"{x['waves']:.2f} (last {x['last_wave']:.0%})" if "waves" in x else None
    return [f"{x['phase']} {x['kernel'][:45]}", *counted, *fit, waves]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", action="append", type=arguments.shape, help="vit_base_patch16_224/b256; default all")
    parser.add_argument("--arch", default="80,89,90,100", type=_archs, help="compute capabilities times ten")
    parser.add_argument("--no-compile", action="store_true", help="only counts, in seconds")
    parser.add_argument("--out", type=arguments.file, help="write everything to this file as well")
    args = parser.parse_args(words)
    start, results = time.time(), []
    tasks = [(shape, arch) for shape in args.shape or MODELS.values() for arch in args.arch]
    try:
        for result in analyses(tasks, not args.no_compile):
            print(show(result), flush=True)
            print(f"{len(results) + 1} of {len(tasks)}, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
            results.append(result)
    except ResultError as error:  # in the files with the card's rates
        parser.error(str(error))
    if args.out:
        said = {"label": LABEL, "torch": torch.__version__, "commit": git_commit(), "utc": utc()}
        args.out.write_text(json.dumps({"about": said, "records": results}, indent=1) + "\n")
    return 1 if any("error" in x for result in results for x in result["kernels"]) else 0


def _archs(text: str) -> list[int]:
    for arch in text.split(","):
        if arch not in map(str, DEVICES):
            raise argparse.ArgumentTypeError(f"no architecture {arch}; there are {', '.join(map(str, DEVICES))}")
    return [int(arch) for arch in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
