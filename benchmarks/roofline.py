"""What every kernel must cost and how it sits on the card, and what each fusion is worth: predictions without a GPU.

    python -m benchmarks.roofline [--shape vit_base_patch16_224/b256] [--arch 90] [--no-compile] [--out FILE]

Per launch of a forward, and of a forward and backward (`benchmarks.trace`): bytes, FLOPs, and its floor, the longer of
the two at the card's rates. Of our kernels also what the compiler says (registers, spills, shared memory; the GPU need
not be here) and what follows: programs and warps on a multiprocessor at once, and waves, how often the grid fills the
card, with the share of it that the last wave uses. Then the time of the whole model, every launch at its floor, as
built and with each fusion of `benchmarks.fusions` taken away or added. Nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks import compiled  # isort: skip (before kernels are imported)

import torch

import vit
from benchmarks import arguments, bench_vit, fusions
from benchmarks.devices import DEVICES, ceilings, occupancy, waves
from benchmarks.gpu_stages import record
from benchmarks.harness import Ceilings, Work
from benchmarks.records import ResultError
from benchmarks.shapes import MODELS, Shape
from benchmarks.trace import Launch, trace
from vit.kernels import runtime

LABEL = "PREDICTION from counted bytes and FLOPs, not a measurement"
MODES = {"fwd": "forward, no gradients", "full": "forward + backward"}
SMALL = 0.005  # of the model's time: lines below it are one line together


def analyse(shape: Shape, arch: int, compiles: bool) -> dict[str, Any]:
    """The lines of every launch of a model on one card, and the predictions for the whole."""
    device = DEVICES[arch]
    rates, source = ceilings(device)
    model = vit.VisionTransformer(shape.config, device="meta", dtype=torch.bfloat16)
    c = shape.config
    image = torch.empty(shape.batch, c.in_chans, *c.img_size, device="meta", dtype=torch.bfloat16)
    kernels, wholes = [], []
    for mode in MODES:
        launches = trace(model, image, train=mode == "full", arch=arch, num_sms=device.num_sms)
        with runtime.dry_run(arch, num_sms=device.num_sms):
            lines = [line(found, count, arch, rates, compiles) for found, count in alike(launches)]
        kernels += [{"mode": mode, **entry} for entry in lines]
        traced = sum(Work(a.flops, a.bytes).floor_ms(rates) for a in launches)
        wholes += predictions(shape, mode, rates, traced)
    where = {"shape": str(shape), "arch": arch, "card": device.name, "rates": source, "dtype": "bfloat16"}
    return where | {"tflops": rates.tflops, "gbps": rates.gbps, "kernels": kernels, "models": wholes}


def analyses(tasks: list[tuple[Shape, int]], compiles: bool) -> Iterator[dict[str, Any]]:
    """`analyse` of each, two at a time."""
    if len(tasks) == 1:
        yield analyse(*tasks[0], compiles)
        return
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # never threads: Triton is not thread-safe
        for future in [pool.submit(analyse, *task, compiles) for task in tasks]:
            yield future.result()


def alike(launches: list[Launch]) -> list[tuple[Launch, int]]:
    """Each kind of launch with how often it comes, in the order of the first."""
    kinds = {_kind(launch): launch for launch in reversed(launches)}
    counts = Counter(map(_kind, launches))
    return [(kinds[kind], counts[kind]) for kind in dict.fromkeys(map(_kind, launches))]


def _kind(launch: Launch) -> tuple:
    return label(launch), launch.phase, launch.flops, launch.bytes, launch.grid, tile(launch)


def label(launch: Launch) -> str:
    """``gemm dgelu``, or PyTorch's operation with the shapes of its operands."""
    if launch.args is None:
        return f"{launch.name} {' '.join('x'.join(map(str, shape)) for shape in launch.shapes[:2])}".strip()
    name = launch.name.removeprefix("_").removesuffix("_kernel")
    if launch.args.get("ACTIVATION") is not None:
        name += " dgelu" if launch.args["preact_ptr"] is not None else " gelu"
    return name + (" + residual" if launch.args.get("branch_ptr") is not None else "")


def tile(launch: Launch) -> str:
    """Of our kernels: ``128x128x64 w8 s3``, the blocks, warps and stages."""
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


def predictions(shape: Shape, mode: str, rates: Ceilings, traced_ms: float) -> list[dict[str, Any]]:
    """Of the whole model: as the code is, as planned, and with each fusion taken away or added."""
    work = bench_vit.work(shape, 2)
    useful = work["fwd"].flops if mode == "fwd" else work["fwd"].flops + work["bwd"].flops
    floor_ms, train = useful / rates.tflops / 1e9, mode == "full"

    def entry(what: str, built: bool, ms: float, units: float | None = None) -> dict[str, Any]:
        shares = {"ms": ms, "img_s": 1e3 * shape.batch / ms, "share_of_compute_floor": floor_ms / ms}
        return {"mode": mode, "what": what, "built": built, "units_per_layer": units} | shares

    def planned(what: str, built: bool, fused: frozenset[str]) -> dict[str, Any]:
        ms = fusions.milliseconds(fusions.plan(shape, fused, train), rates)
        return entry(what, built, ms, fusions.layer_units(shape, fused, train))

    found = [entry("the code's own launches", True, traced_ms), planned("as built", True, fusions.BUILT)]
    found.append(planned("nothing fused", False, frozenset()))
    for name, fusion in fusions.FUSIONS.items():
        if mode not in fusion.modes:
            continue
        fused = fusions.BUILT - {name} if fusion.built else fusions.BUILT | {name}
        found.append(planned(f"{'without' if fusion.built else 'with'}: {fusion.what}", fusion.built, fused))
    return [*found, planned("everything fused", False, fusions.ALL)]


# ---- the command -----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    rows = [
        f"\n{result['shape']} bf16 on {result['card']} (sm_{result['arch']}): {result['tflops']:g} TFLOP/s, "
        f"{result['gbps']:g} GB/s ({result['rates']}). {LABEL}"
    ]
    for mode, title in MODES.items():
        rows.append(f"\n{title}\n{'':3s} {'launch':45s} {'x':>3s} {'MB':>8s} {'GFLOP':>8s} {'floor us':>8s}  tile")
        rows[-1] += " " * 17 + "regs spill shared blk/SM warps/SM  waves (last)"
        lines = [entry for entry in result["kernels"] if entry["mode"] == mode]
        least = SMALL * sum(entry["count"] * entry["floor_us"] for entry in lines)
        small = [x for x in lines if x["count"] * x["floor_us"] < least and not x["tile"]]
        for x in lines:
            if x in small:
                continue
            rows.append(
                f"{x['phase']:3s} {x['kernel'][:45]:45s} {x['count']:3d} {x['bytes'] / 1e6:8.1f} "
                f"{x['flops'] / 1e9:8.1f} {x['floor_us']:8.1f}  {x['tile']:20s}{_fit(x)}".rstrip()
            )
        if small:
            together = sum(x["count"] * x["floor_us"] for x in small)
            rows.append(f"    {sum(x['count'] for x in small)} smaller operations, {together:.1f} us together")
        rows.append(
            f"\n{'':11s} {'whole model, ' + title:70s} {'u/layer':>7s} {'ms':>8s} {'img/s':>8s}  of compute floor"
        )
        for x in (entry for entry in result["models"] if entry["mode"] == mode):
            units = f"{x['units_per_layer']:7.1f}" if x["units_per_layer"] else " " * 7
            rows.append(
                f"{'built' if x['built'] else 'not built':11s} {x['what']:70s} {units} {x['ms']:8.2f} "
                f"{x['img_s']:8.0f}  {x['share_of_compute_floor']:.0%}"
            )
    return "\n".join(rows)


def _fit(x: dict[str, Any]) -> str:
    if "error" in x:
        return x["error"].replace("\n", " ")[:80]
    if "registers" not in x:
        return ""
    fit = f"{x['registers']:5d} {x['spill']:5d} {x['shared']:6d} {x['blocks_per_sm']:6d} {x['warps_per_sm']:8d}"
    return f"{fit} {x['waves']:6.2f} ({x['last_wave']:.0%})"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--shape", action="append", type=arguments.shape, help="vit_base_patch16_224/b256, say; all if none"
    )
    parser.add_argument("--arch", default="80,89,90,100", type=_archs, help="compute capabilities times ten")
    parser.add_argument("--no-compile", action="store_true", help="counts alone, in seconds")
    parser.add_argument("--out", type=arguments.file, help="write everything to this file as well")
    args = parser.parse_args(words)
    start, results = time.time(), []
    tasks = [(shape, arch) for shape in args.shape or MODELS.values() for arch in args.arch]
    try:
        for result in analyses(tasks, not args.no_compile):
            print(table(result), flush=True)
            print(f"{len(results) + 1} of {len(tasks)}, {time.time() - start:.0f} s", file=sys.stderr, flush=True)
            results.append(result)
    except ResultError as error:  # in the files that the card's rates are read from
        parser.error(str(error))
    if args.out:
        said = {"label": LABEL, "torch": torch.__version__, "commit": record.git_commit(), "utc": record.utc()}
        args.out.write_text(json.dumps({"about": said, "records": results}, indent=1) + "\n")
    return 1 if any("error" in x for result in results for x in result["kernels"]) else 0


def _archs(text: str) -> list[int]:
    for arch in text.split(","):
        if arch not in map(str, DEVICES):
            raise argparse.ArgumentTypeError(f"no architecture {arch}; there are {', '.join(map(str, DEVICES))}")
    return [int(arch) for arch in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
