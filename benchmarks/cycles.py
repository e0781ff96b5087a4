"""A cycle model of the compiled code shows where each kernel spends its clocks. It needs no GPU and measures nothing.

    python -m benchmarks.cycles [--shape vit_base_patch16_224/b256] [--arch 90] [--kernel attention] [--out FILE]

For our kernels, `benchmarks.walk` executes the SASS of a few programs with the arguments of the launch, and
`benchmarks.sm` simulates a quadrant of a multiprocessor that runs them. It simulates twice: the first programs start
together, or apart. The prediction is the mean. For cuBLAS, PyTorch's attention and passes over memory it takes
published rates (`published`), which hold for large batches. The time of the host is not counted.

tests/benchmarks/test_bench_cycles.py checks that predictions are within -20 and +25 % of the published rates of
Triton's attention and GEMM. Nothing else has been checked.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import roofline  # isort: skip (before kernels are imported)

import torch

from benchmarks import arguments, bench_vit, compiled, memory
from benchmarks.devices import DEVICES, ceilings
from benchmarks.harness import Ceilings
from benchmarks.log import git_commit, table, utc
from benchmarks.sass import disassemble
from benchmarks.shapes import MODELS, Shape
from benchmarks.sm import Machine, machine, simulate
from benchmarks.trace import Launch, trace
from benchmarks.walk import Constants, Step, constants, loops, walk
from vit.kernels.dry_run import dry_run

LABEL = "MODEL of executed SASS and published rates, not a measurement"
LAUNCH = 2.5  # us of an empty kernel among others
SAMPLES, STEPS = 8, 100_000  # most programs of a launch that are executed, and most steps of all
ROUNDS = 5  # the simulation replaces the programs on a multiprocessor this often
BINDS = 0.6  # if no unit is busy for this part of the time, latencies bind the kernel

# ---- our kernels -----------------------------------------------------------------------------------------------------


def sample(programs: int, count: int) -> list[int]:
    """Numbers of ``count`` programs, spread so that every tile and role is sampled equally often."""
    stride = next(s for s in itertools.count(round(0.618 * programs)) if math.gcd(s, programs) == 1)
    return [k * stride % programs for k in range(min(count, programs))]


def from_memory(programs: Sequence[Sequence[Sequence[Step]]], launch: Constants, total: int) -> dict[int, float]:
    """For each tensor, the part of the loads of ``total`` such programs that memory serves, which is each byte once."""
    loads: collections.Counter[int] = collections.Counter()
    for step in (step for program in programs for steps in program for step in steps):
        if step.bytes and step.instruction.base not in ("STG", "UTMASTG"):
            loads[step.tensor] += step.bytes
    return {t: min(1.0, launch.sizes.get(t, n) * len(programs) / n / total) for t, n in loads.items()}


def predict(launch: Launch, blocks: int, machine: Machine) -> dict[str, Any]:
    """The prediction for a launch of which ``blocks`` programs share a multiprocessor.

    Raises:
        ValueError: the path of a program cannot be followed.
    """
    result = compiled.compile_kernel(launch.kernel, launch.grid, launch.args, launch.options)
    code, given, total = disassemble(result.asm["cubin"]), constants(launch, result), math.prod(launch.grid)
    first_warps = range(0, result.metadata.num_warps, 4)
    if result.metadata.num_warps < 4:
        raise ValueError("a program of fewer than four warps leaves quadrants empty, which is not modelled")
    programs = [[walk(code, given, 0, warp) for warp in first_warps]]
    count = max(1, min(SAMPLES, STEPS // sum(map(len, programs[0]))))
    programs += [[walk(code, given, number, warp) for warp in first_warps] for number in sample(total, count)[1:]]

    sms = min(machine.num_sms, total)
    of_sm = math.ceil(total / sms)
    simulated, shares = min(of_sm, max(ROUNDS * blocks, 12)), from_memory(programs, given, total)
    together = apart = simulate(programs, blocks, simulated, machine, shares, sms=sms)
    if of_sm > 2 * blocks > 2:
        apart = simulate(programs, blocks, simulated, machine, shares, together.latency / blocks, sms)
    ends = sorted(timing.clocks(of_sm, blocks) for timing in (together, apart))
    clocks = sum(ends) / 2

    traces = [steps for program in programs for steps in program]
    pipes = collections.Counter(step.instruction.pipe for steps in traces for step in steps)
    found = {at: loop for steps in traces for at, loop in loops(steps).items()}
    return {
        "executed": sum(pipes.values()) / len(programs),  # per program, in a quadrant
        "pipes": {pipe: n / len(programs) for pipe, n in pipes.items()},
        "loops": " ".join(f"{size}x{n}" for _, (size, n) in sorted(found.items()) if n > 1),
        "clocks": clocks / of_sm,
        "busy": {unit: n * of_sm / simulated / clocks for unit, n in apart.busy.items() if unit != "read"},
        "us": max(LAUNCH, clocks / machine.ghz / 1e3),
        "range": [max(LAUNCH, end / machine.ghz / 1e3) for end in ends],
    }


# ---- published rates -------------------------------------------------------------------------------------------------

#: Parts of a large product's rate. Triton's Gluon tutorial has 588 of 665 TFLOP/s for cuBLAS at K = 1024. The others
#: are estimates.
SHORT, LONG, WEIGHTS = 0.88, 0.95, 0.90  # K up to 1024, longer, and gradients of weights
PASS, SUM = 0.90, 0.75  # parts of a copy's rate: elementwise passes, sums over rows
#: TFLOP/s of FlashAttention-2 on an H100 for whole tiles of 128 tokens, estimated from its rates at 512 tokens in Shah
#: et al., FlashAttention-3, 2024.
ATTENTION = {"fwd": 271.0, "bwd": 215.0}


def published(launch: Launch, rates: Ceilings) -> float:
    """Microseconds of an operation of PyTorch."""
    us = launch.bytes / rates.gbps / 1e3 / (SUM if launch.name == "sum" else PASS)
    if "attention" in launch.name:
        tokens = launch.shapes[0][-2]
        whole = (128 * math.ceil(tokens / 128) / tokens) ** 2
        us = max(us, launch.flops * whole / ATTENTION[launch.phase] / 1e6)
    elif launch.flops:
        (rows, inner), columns = launch.shapes[0][-2:], launch.shapes[1][-1]
        part = WEIGHTS if inner > max(rows, columns) else LONG if inner > 1024 else SHORT
        us = max(us, launch.flops / rates.tflops / 1e6 / part)
    return max(us, LAUNCH)


# ---- a model ---------------------------------------------------------------------------------------------------------


def timed(launch: Launch, count: int, arch: int, known: dict[tuple, dict[str, Any]]) -> dict[str, Any]:
    """The line of `benchmarks.roofline` with the predicted time. ``known`` has the kernels that are done."""
    rates, _ = ceilings(DEVICES[arch])
    line = roofline.line(launch, count, arch, rates, compiles=True)
    if launch.kernel is None:
        return line | {"us": published(launch, rates)}
    if "error" in line:
        return line
    key = tuple(line[name] for name in ("kernel", "bytes", "flops", "tile", "registers", "shared", "programs"))
    if key not in known:
        try:
            known[key] = predict(launch, line["blocks_per_sm"], machine(arch))
        except ValueError as error:
            known[key] = {"error": str(error)}
    return line | known[key]


def analyse(shape: Shape, arch: int, wanted: str | None) -> dict[str, Any]:
    """The lines of a model's launches and their sums, or only those of our kernels with ``wanted`` in their name."""
    machine(arch)
    device = DEVICES[arch]
    rates, source = ceilings(device)
    known: dict[tuple, dict[str, Any]] = {}
    lines, wholes = [], []
    for mode, provider in itertools.product(roofline.MODES, ("ours",) if wanted else ("ours", "reference")):
        model, image = memory.factory(provider, shape)(shape.batch)
        launches = trace(model, image, train=mode == "full", arch=arch, num_sms=device.num_sms)
        if wanted:
            launches = [x for x in launches if x.kernel is not None and wanted in roofline.label(x)]
        with dry_run(arch, num_sms=device.num_sms):
            found = [timed(launch, count, arch, known) for launch, count in roofline.alike(launches)]
        lines += [{"mode": mode, "provider": provider, **x} for x in found]
        if wanted:
            continue
        floor = bench_vit.BENCHES[0].total(shape, torch.bfloat16)[mode].floor_ms(rates)
        low, ms, high = (sum(x["count"] * us[k] for x in found for us in [_range(x)]) / 1e3 for k in range(3))
        speed = {"ms": ms, "range": [low, high], "img_s": 1e3 * shape.batch / ms, "sol_fraction": floor / ms}
        wholes.append({"mode": mode, "provider": provider, "predicted": True, **speed})
    if not lines:
        raise ValueError(f"no kernel of {shape} has {wanted!r} in its name")
    where = {"shape": str(shape), "arch": arch, "card": device.name, "rates": source, "dtype": "bfloat16"}
    return where | {"kernels": lines, "models": wholes}


def _range(line: dict[str, Any]) -> tuple[float, float, float]:
    """(low, predicted, high), in microseconds."""
    us = line.get("us", math.nan)
    low, high = line.get("range", (us, us))
    return low, us, high


PIPES = ("fma", "imad", "alu", "mufu", "shared")
HEADS = ("launch", "x", "tile", "registers", "programs/SM", "loops", "SASS", *PIPES, "clocks")
TIME = ("bound by", "us", "range", "floor us", "share")
WHOLE = ("model, not measured", "img/s", "share of floor", "beside eager", "ms", "range")


def show(result: dict[str, Any]) -> str:
    """The tables of one model."""
    texts = [
        f"\n{result['shape']} bf16 on {result['card']} (sm_{result['arch']}; rates {result['rates']}). {LABEL}\n"
        "loops: instructions x iterations. SASS, its units and clocks: of one program, in one quadrant."
    ]
    for mode, title in roofline.MODES.items():
        lines = [x for x in result["kernels"] if (x["mode"], x["provider"]) == (mode, "ours")]
        least = roofline.SMALL * sum(x["count"] * x.get("us", 0.0) for x in lines)
        small = [x for x in lines if not x["tile"] and x["count"] * x.get("us", math.nan) < least]
        texts.append(f"\n{title}\n{table(HEADS + TIME, [_row(x) for x in lines if x not in small])}")
        together = sum(x["count"] * x["us"] for x in small)
        texts += [f"{sum(x['count'] for x in small)} smaller operations, {together:.0f} us together"] if small else []
        texts += [f"{x['kernel']}: {x['error']}" for x in lines if "error" in x]
    rows = []
    for x in result["models"]:
        (eager,) = (e for e in result["models"] if (e["mode"], e["provider"]) == (x["mode"], "reference"))
        name = f"{'ours' if x is not eager else 'eager'}, {roofline.MODES[x['mode']]}"
        found = f"{x['img_s']:,.0f}", f"{x['sol_fraction']:.0%}", f"{eager['ms'] / x['ms']:.2f}x", f"{x['ms']:.2f}"
        rows.append([name, *found, "{:.2f}-{:.2f}".format(*x["range"])])
    return "\n".join([*texts, "", table(WHOLE, rows)] if rows else texts)


def _row(x: dict[str, Any]) -> list[Any]:
    row = [f"{x['phase']} {x['kernel'][:45]}", x["count"], x["tile"], x.get("registers"), x.get("blocks_per_sm")]
    if "pipes" not in x:
        us, said = x.get("us", math.nan), "error" if "error" in x else "published"
        return [*row, *[None] * 8, said, f"{us:.1f}", None, f"{x['floor_us']:.1f}", f"{x['floor_us'] / us:.0%}"]
    counts = [f"{n:.0f}" for n in (x["executed"], *(x["pipes"].get(pipe, 0) for pipe in PIPES), x["clocks"])]
    unit, part = max(x["busy"].items(), key=lambda pair: pair[1])
    bound = f"{unit} {part:.0%}" if part >= BINDS else f"latency ({unit} {part:.0%})"
    low, us, high = _range(x)
    times = bound, f"{us:.1f}", f"{low:.0f}-{high:.0f}", f"{x['floor_us']:.1f}", f"{x['floor_us'] / us:.0%}"
    return [*row, x["loops"], *counts, *times]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", action="append", type=arguments.shape, help="vit_base_patch16_224/b256 if none")
    parser.add_argument("--arch", default=90, type=int, help="compute capability times ten; only 90 has a model")
    parser.add_argument("--kernel", help="only our kernels with this in their name, such as gemm dgelu")
    parser.add_argument("--out", type=arguments.file, help="write everything to this file as well")
    args = parser.parse_args(words)
    results = []
    for shape in args.shape or [MODELS["B/16"]]:
        try:
            results.append(analyse(shape, args.arch, args.kernel))
        except ValueError as error:
            parser.error(str(error))
        print(show(results[-1]), flush=True)
    if args.out:
        about = {"label": LABEL, "torch": torch.__version__, "commit": git_commit(), "utc": utc()}
        args.out.write_text(json.dumps({"about": about, "records": results}, indent=1) + "\n")
    return 1 if any("error" in x for result in results for x in result["kernels"]) else 0


if __name__ == "__main__":
    sys.exit(main())
