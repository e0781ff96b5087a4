"""``make tune OP=mlp``: tries other configurations of an op's kernels within a time budget.

First it compiles the candidates in parallel on the CPU, drops those that spill or do not fit, and prints a table. On a
GPU each of the others must pass the gate of `benchmarks.harness` and give the same bits twice. Then it is timed in turn
with the pinned configuration. The best few are timed again for longer, also with cuBLAS if that does the same. At the
end it prints their times and a line for ``kernels/configs.py`` with the measurement, or that the pinned configuration
stays. ``tune_<target>.json`` has the times. With ``TRITON_INTERPRET=1`` it is a rehearsal on a tiny shape, into
``build/``. The library itself never tunes at run time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import arguments, shapes
from benchmarks.candidates import OPS, TARGETS, Target, of_target
from benchmarks.harness import Bench, Gate, milliseconds, percentiles, ready, release, tensors_of
from benchmarks.log import Log, folder_of, table
from benchmarks.shapes import Shape
from benchmarks.variants import Kernels, compile_all, configured, summary, why_not
from vit.kernels import runtime
from vit.kernels.configs import Config

WORTH = 1.02  # the least ratio of times for which a configuration replaces the pinned one
FINALISTS = 3
FIGURES = ("registers", "spill", "shared", "wgmma", "tma")


def bench_of(target: Target, config: Config) -> Bench:
    """The bench of a target with our op as its only provider."""
    ours, impl = target.bench.providers["ours"], "triton" if runtime.INTERPRETED else target.impl
    return dataclasses.replace(target.bench, providers={"ours": functools.partial(ours, impl=impl)}, compiles=None)


def text_of(config: Config) -> str:
    """The source text of a configuration, without fields that have their default."""
    given = ((f.name, getattr(config, f.name), f.default) for f in dataclasses.fields(config))
    return f"Config({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_call(name: str, shape: Shape, dtype: torch.dtype, config: Config) -> None:
    """Compiles the launches of a forward and backward, and of a forward without gradients if the target times that.

    A batch of 16 compiles the same kernels as its multiples.
    """
    target = TARGETS[name]
    small = dataclasses.replace(shape, batch=16) if shape.batch % 16 == 0 else shape
    tensors = target.bench.inputs(small, lambda *sizes, scale=1.0: torch.empty(sizes, dtype=dtype))
    with configured(target.function, config, target.role):
        run = bench_of(target, config).run("ours", small, tensors)
        outs = run.call()
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.grad(outs, run.wanted, [torch.empty_like(o) for o in outs], allow_unused=True)
        if target.mode == "fwd":
            with torch.no_grad():
                run.call()


def compile_candidates(
    name: str, shape: Shape, dtype: torch.dtype, found: list[Config], arch: int, jobs: int, seconds: float
) -> dict[Config, Kernels]:
    """The candidates that compile within ``seconds``. Prints a line for each, with the reason if it is dropped."""
    texts = {text_of(config): config for config in found}
    calls = {text: functools.partial(compile_call, name, shape, dtype, config) for text, config in texts.items()}
    print(f"{name}, {shape}: compiled for sm_{arch}, not measured")
    good, rows = {}, []
    for text, launched in compile_all(calls, arch, jobs=jobs, seconds=seconds):
        kernels_ = [k for k in launched if k["kernel"].startswith((TARGETS[name].kernel, "?"))]
        why, f = why_not(arch, kernels_), summary(kernels_)
        note = f"dropped: {why}" if why else "pinned" if texts[text] == found[0] else None
        rows.append([text, *map(f.get, FIGURES), note])
        if why is None:
            good[texts[text]] = kernels_
    print(table(["configuration", *FIGURES, ""], rows))
    print(
        f"{len(rows)} of {len(found)} candidates compiled in time, {len(rows) - len(good)} of them dropped", flush=True
    )
    return good


# ---- measuring -------------------------------------------------------------------------------------------------------


class Trial:
    """One target at one shape, and its gate."""

    def __init__(self, target: Target, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.target, self.shape, self.dtype, self.device = target, shape, dtype, device
        self.tensors = tensors_of(target.bench, shape, dtype, device)
        self.gate = Gate(target.bench, shape, self.tensors)

    def wrong(self, config: Config) -> tuple[float, str | None]:
        """(rms error, a message if parity fails or a second call gives other bits)."""
        with self._configured(config):
            run = bench_of(self.target, config).run("ours", self.shape, self.tensors)
            error, wrong = self.gate.error(run)
            first, again = self.gate.results(run), self.gate.results(run)
        if wrong is None and not all(map(torch.equal, first, again)):
            wrong = "a second call gives other bits"
        return error, wrong

    def ready_of(self, bench: Bench, provider: str) -> Callable[[], Any]:
        run = bench.run(provider, self.shape, self.tensors)
        return ready(run, self.gate.cotangents, self.target.mode, self.device, self.device.type == "cuda")

    def ready(self, config: Config) -> Callable[[], Any]:
        """The function to time. On a GPU it is a CUDA graph, so that the CPU's time does not count."""
        with self._configured(config):
            fn = self.ready_of(bench_of(self.target, config), "ours")

        def call() -> Any:
            with self._configured(config):
                return fn()

        return call

    def _configured(self, config: Config) -> Any:
        return configured(self.target.function, config, self.target.role)


def tune(
    name: str, trial: Trial, found: list[Config], compiled: dict[Config, Kernels], log: Log
) -> tuple[Config, float, float]:
    """(the best configuration, its milliseconds, those of the pinned one). The pinned one is the first of ``found``.

    Raises:
        RuntimeError: the pinned one fails the gate.
    """
    pinned, base, ratios = found[0], None, {}
    about = {"bench": "tune", "op": name, "shape": str(trial.shape), "mode": trial.target.mode}
    for config in found:
        record = about | {"config": text_of(config), "pinned": config == pinned}
        if base and log.seconds_left < 0:
            log.add(ok=True, **record, skipped="budget")
            continue
        record |= summary(compiled.get(config, []))
        try:
            error_rms, wrong = trial.wrong(config)
            record["error_rms"] = error_rms if math.isfinite(error_rms) else None
            fn = None if wrong else trial.ready(config)
        except Exception as error:  # too little memory or another resource
            wrong = f"{type(error).__name__}: {error}"[:300]
        if wrong:
            log.add(ok=False, **record, error=f"{wrong}: not timed")
            if config == pinned:
                raise RuntimeError(f"{name}: the pinned configuration is not timed: {wrong}")
            continue
        base = base or fn
        found_ms = milliseconds({"pinned": base, "this": fn}, trial.device, rounds=2, rep_ms=15)
        pinned_ms, this = percentiles(found_ms["pinned"])["ms_p50"], percentiles(found_ms["this"])
        ratios[config] = pinned_ms / this["ms_p50"]
        log.add(ok=True, **record, **this, ratio=ratios[config])
        del fn
        release(trial.device)
    best = sorted(ratios, key=ratios.__getitem__, reverse=True)[:FINALISTS]
    fns = {config: trial.ready(config) for config in dict.fromkeys([pinned, *best])}
    if "cublas" in trial.target.bench.providers:
        fns["cublas"] = trial.ready_of(trial.target.bench, "cublas")
    final = {config: percentiles(times) for config, times in milliseconds(fns, trial.device, rounds=5).items()}
    ms = {config: found["ms_p50"] for config, found in final.items()}
    winner = min((config for config in ms if config != "cublas"), key=ms.__getitem__)
    if ms[pinned] < WORTH * ms[winner]:
        winner = pinned
    flops, rows = trial.target.bench.total(trial.shape, trial.dtype)[trial.target.mode].flops, []
    for config, times in final.items():
        ratio = ms[pinned] / ms[config]
        record = about | {"config": config if config == "cublas" else text_of(config), "pinned": config == pinned}
        log.add(ok=True, **record, chosen=config == winner, final=True, **times, ratio=ratio)
        rows.append([record["config"], ms[config], flops / ms[config] / 1e9, f"{ratio:.3f}x"])
    print(table(["configuration", "ms", "TFLOP/s", "faster than the pinned"], rows))
    return winner, ms[winner], ms[pinned]


def line_for(name: str, trial: Trial, log: Log, winner: Config, ms: float, pinned_ms: float) -> str:
    """The lines for `kernels/configs.py`: the measurement as a comment, and the configuration."""
    about = log.about
    measured = f"{ms:.4g} ms, before {pinned_ms:.4g} ms ({pinned_ms / ms:.2f}x)"
    where = f"{about['gpu']}, Triton {about['triton']}, commit {about['commit']}"
    return f"# {name}, {trial.shape} {trial.target.mode}: {measured}; {where}\nreturn {text_of(winner)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS, help="one target, or all targets of an op")
    parser.add_argument("--shape", type=arguments.shape, help=f"default {shapes.MODELS['B/16']}")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget", type=arguments.positive, default=60, help="seconds for each target (default 60)")
    parser.add_argument("--limit", type=arguments.count, help="number of candidates, those like the pinned one first")
    parser.add_argument("--arch", type=int, choices=(80, 86, 89, 90, 100), default=90, help="without a GPU")
    cpus = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=arguments.count, default=cpus, help="number of compilers at a time")
    args = parser.parse_args()
    rehearsal = runtime.INTERPRETED
    device = torch.device("cpu" if rehearsal else "cuda") if rehearsal or torch.cuda.is_available() else None
    if device is None:
        print("No NVIDIA GPU here: candidates are compiled, but not measured.")
    shape = args.shape or (shapes.SMALL if rehearsal else shapes.MODELS["B/16"])
    dtype = torch.float32 if rehearsal else getattr(torch, args.dtype)
    arch = args.arch if device is None else runtime.arch(device)
    card = "rehearsal" if rehearsal else torch.cuda.get_device_name() if device else ""
    done = 0
    for name in [n for n in TARGETS if n == args.op or n.rsplit("_", 1)[0] == args.op]:
        target, deadline = TARGETS[name], time.monotonic() + args.budget
        found, compiled = of_target(target, arch, shape, dtype)[: args.limit], {}
        if not rehearsal:
            seconds = args.budget / 2 if device else args.budget
            compiled = compile_candidates(name, shape, dtype, found, arch, args.jobs, seconds)
            found = [found[0], *(c for c in found[1:] if c in compiled)]
        if device is None:
            continue
        out = folder_of(card)
        out.mkdir(parents=True, exist_ok=True)
        about = {"gpu": card, "command": f"python -m benchmarks.tune {name} --shape {shape} --dtype {args.dtype}"}
        log = Log(out / f"tune_{name}.json", about, rehearsal, deadline)
        if device.type == "cuda":
            signal.alarm(int(args.budget) + 60)  # ends the run if a candidate hangs
        trial = Trial(target, shape, dtype, device)
        try:
            winner, ms, pinned_ms = tune(name, trial, found, compiled, log)
        except RuntimeError as error:
            print(error)
            done = 1
            continue
        verdict = "the pinned configuration stays" if winner == found[0] else "for kernels/configs.py:"
        print("rehearsal: times of an interpreter say nothing about a GPU" if rehearsal else verdict)
        print(f"{line_for(name, trial, log, winner, ms, pinned_ms)}\nresults in {log.path}")
    return done


if __name__ == "__main__":
    raise SystemExit(main())
