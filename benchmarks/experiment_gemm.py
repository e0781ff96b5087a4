"""``make experiment-gemm``: which form of the GEMM, and which GELU, against cuBLAS and a pass of its own for GELU.

Every form is a configuration of the one kernel, every product one of ViT-B/16 at batch 256. A form that spills, does
not compile or fails parity says so and is not timed. On a GPU the times go into ``bench_gemm.json`` as they are known,
fc1 and fc2 first, and a table ends the run; without one the table has what the forms compile to for ``--arch``. Where
kernels are interpreted (``TRITON_INTERPRET=1``) it is a rehearsal of the measurement on a tiny shape, into ``build/``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import signal
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import arguments
from benchmarks.gpu_stages.cases import name_of
from benchmarks.gpu_stages.record import Log, folder_of
from benchmarks.harness import Bench, Ceilings, Point, Run, Work, measure, measure_ceilings
from benchmarks.shapes import MODELS, SMALL, Shape
from benchmarks.variants import Kernels, compile_all, configured, gpu, summary, why_not, without_gpu
from vit import kernels
from vit.kernels import configs, reference, runtime
from vit.kernels.configs import Config
from vit.kernels.linear import gemm

PRODUCTS = {  # of a block: inputs, outputs
    "fc1": lambda s: (s.width, s.hidden),
    "fc2": lambda s: (s.hidden, s.width),
    "qkv": lambda s: (s.width, 3 * s.width),
    "proj": lambda s: (s.width, s.width),
}
EPILOGUES = {"bias": None, "erf": False, "cheap": True}  # None: no GELU; else whether GELU does without erf
FORMS = {
    "cublas": None,
    "128x256 w8 split 2": Config(128, 256, 64, 8, 8, 3, 2),
    "128x256 w8 split 4": Config(128, 256, 64, 8, 8, 3, 4),
    "128x256 w4 specialised": Config(128, 256, 64, 8, 4, 3, 1, True),
    "128x256 w4 specialised split 2": Config(128, 256, 64, 8, 4, 3, 2, True),
    "128x128 w4 split 4, two an SM": Config(128, 128, 64, 8, 4, 3, 4),
    "pinned": configs.gemm(90, torch.bfloat16, "ieee"),
}
BASELINE = "cublas"


def config_of(form: str, epilogue: str) -> Config:
    return dataclasses.replace(FORMS[form], cheap=EPILOGUES[epilogue])


def activation_of(epilogue: str) -> str | None:
    return None if EPILOGUES[epilogue] is None else "gelu"


def run_form(form: str, epilogue: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    activation = activation_of(epilogue)
    if form == BASELINE:
        y = F.linear(x, weight, bias)
        return y if activation is None else F.gelu(y)
    with configured("gemm", config_of(form, epilogue)):
        return kernels.linear(x, weight, bias, activation, impl="triton")


class Forward(Bench):
    """Nothing wants a gradient, so that the gate checks the very kernel that is timed."""

    def run(self, name: str, shape: Shape, tensors: dict[str, Tensor]) -> Run:
        return Run(functools.partial(self.provider(name), **tensors), [], [])

    def exact(self, shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype) -> Run:
        return Run(functools.partial(self.reference, **{k: t.to(dtype) for k, t in tensors.items()}), [], [])


def bench_of(product: str, epilogue: str, forms: list[str]) -> Bench:
    def inputs(s: Shape, rand: Any) -> dict[str, Tensor]:
        k, n = PRODUCTS[product](s)
        return {"x": rand(s.batch, s.tokens, k), "weight": rand(n, k, scale=k**-0.5), "bias": rand(n)}

    def work(s: Shape, e: int) -> dict[str, Work]:
        k, n = PRODUCTS[product](s)
        fwd = Work(2 * s.rows * k * n, (s.rows * (k + n) + n * k + n) * e)  # x, weight, bias -> y
        return {"fwd": fwd, "bwd": fwd + fwd}

    providers = {form: functools.partial(run_form, form, epilogue) for form in forms}
    right = functools.partial(reference.linear, activation=activation_of(epilogue))
    return Forward("gemm", f"{product} {epilogue}", inputs, work, right, providers, compiles=None)


def compile_form(form: str, epilogue: str) -> None:
    m, k, n = 3152, 768, 3072  # compiles as every product here does: all sizes are multiples of 16
    x, weight, bias = (torch.empty(s, dtype=torch.bfloat16) for s in [(m, k), (n, k), (n,)])
    with configured("gemm", config_of(form, epilogue)):
        gemm(x, weight, bias, activation_of(epilogue), trans_b=True)


def compile_forms(arch: int, jobs: int, seconds: float) -> dict[tuple[str, str], Kernels]:
    names = {f"{form}/{epilogue}": (form, epilogue) for form in FORMS if form != BASELINE for epilogue in EPILOGUES}
    calls = {name: functools.partial(compile_form, *key) for name, key in names.items()}
    return {names[name]: found for name, found in compile_all(calls, arch, jobs=jobs, seconds=seconds)}


def experiment(
    log: Log, shape: Shape, device: torch.device, dtype: torch.dtype, products: list[str], forms: list[str],
    compiled: dict[tuple[str, str], Kernels] | None, arch: int, ceilings: Ceilings,
) -> None:  # fmt: skip
    """Measures every product, epilogue and form; ``compiled`` is None where kernels are interpreted."""
    for product in products:
        for epilogue in EPILOGUES:
            about = {"bench": "gemm", "op": f"{product} {epilogue}", "shape": str(shape)}
            about |= {"dtype": name_of(dtype), "mode": "fwd"}
            if log.seconds_left < 0:
                log.add(ok=True, **about, skipped="budget")
                continue
            run = []
            for form in forms:
                why = None
                if compiled is not None and form != BASELINE:
                    found = compiled.get((form, epilogue))
                    why = "not compiled in time" if found is None else why_not(arch, found)
                if why is None:
                    run.append(form)
                else:
                    log.add(ok=True, **about, provider=form, skipped=why)
            measure(Point(bench_of(product, epilogue, run), shape, dtype, ("fwd",)), log, ceilings, device)


# ---- tables ----------------------------------------------------------------------------------------------------------


def measured_table(records: list[dict[str, Any]], compiled: dict[tuple[str, str], Kernels] | None) -> str:
    """A block for each product, a line for each form: µs, TFLOP/s and how much faster than the baseline."""
    lines = []
    cells = {(*r["op"].split(), r.get("provider")): r for r in records if r["bench"] == "gemm"}
    for product in dict.fromkeys(product for product, _, _ in cells):
        lines += [
            "",
            f"{product:<31}" + "".join(f"{e + ': µs, TFLOP/s, ratio':>30}" for e in EPILOGUES) + "  registers",
        ]
        for form in FORMS:
            row = [cells.get((product, e, form), {}) for e in EPILOGUES]
            if any(row):
                base = [cells.get((product, e, BASELINE), {}).get("ms_p50") for e in EPILOGUES]
                text = "".join(f"{_cell(r, b):>30}" for r, b in zip(row, base, strict=True))
                lines.append(f"{form:<31}{text}  {_registers(form, compiled)}")
    return "\n".join(lines)


def _cell(record: dict[str, Any], base: float | None) -> str:
    if "ms_p50" not in record:
        return (record.get("skipped") or record.get("error") or "-")[:28]
    ms = record["ms_p50"]
    return f"{1e3 * ms:.1f} {record['tflops']:7.1f} {base / ms if base else float('nan'):5.2f}x"


def _registers(form: str, compiled: dict[tuple[str, str], Kernels] | None) -> str:
    if compiled is None or form == BASELINE:
        return ""
    found = [summary(compiled.get((form, e), [])) for e in EPILOGUES]
    return " / ".join(f"{f['registers']}" + (f" ({f['spill']} B spilled)" if f["spill"] else "") for f in found if f)


def compiled_table(arch: int, compiled: dict[tuple[str, str], Kernels]) -> str:
    """What each form and epilogue compiles to."""
    lines = [
        f"{'form':<31}{'epilogue':<10}{'registers':>9}{'spill B':>9}{'shared B':>10}{'wgmma':>7}{'TMA':>5}  verdict"
    ]
    for form in FORMS:
        for epilogue in EPILOGUES:
            if form == BASELINE:
                continue
            found = compiled.get((form, epilogue), [])
            f = summary(found)
            figures = "".join(
                f"{f.get(k, '-'):>{w}}"
                for k, w in [("registers", 9), ("spill", 9), ("shared", 10), ("wgmma", 7), ("tma", 5)]
            )
            verdict = why_not(arch, found) if found else "not compiled in time"
            lines.append(f"{form:<31}{epilogue:<10}{figures}  {verdict or 'to be timed'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiment_gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--product", choices=PRODUCTS, action="append", help="only this one (may be repeated)")
    parser.add_argument(
        "--arch", type=int, choices=(80, 86, 89, 90, 100), default=90, help="to compile for, without a GPU"
    )
    parser.add_argument(
        "--budget", type=arguments.positive, default=220, help="seconds after which nothing else is begun"
    )
    parser.add_argument(
        "--jobs", type=arguments.count, default=len(os.sched_getaffinity(0)), help="compilers at a time"
    )
    args = parser.parse_args()
    deadline, device = time.monotonic() + args.budget, gpu()
    arch = args.arch if device is None else runtime.arch(device)
    compiled = None if runtime.INTERPRETED else compile_forms(arch, args.jobs, min(args.budget, 150))
    if compiled is not None:
        print(f"bf16, aligned sizes: compiled for sm_{arch}, not measured{without_gpu()}")
        print(compiled_table(arch, compiled), flush=True)
    if device is None:
        return 0
    rehearsal = device.type == "cpu"
    name = "rehearsal" if rehearsal else torch.cuda.get_device_name()
    out = folder_of(name)
    out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": name, "command": "python -m benchmarks.experiment_gemm"}
    log = Log(out / "bench_gemm.json", about, rehearsal, deadline)
    shape, dtype = (SMALL, torch.float16) if rehearsal else (MODELS["B/16"], torch.bfloat16)
    products = args.product or (["fc2"] if rehearsal else list(PRODUCTS))
    if not rehearsal:
        signal.alarm(int(args.budget) + 30)  # a form that hangs ends the run; what was found is written
    ceilings = measure_ceilings(log, device, dtype)
    specialised = [form for form, config in FORMS.items() if config is not None and config.warp_specialize]
    # Those last, because a mistake of the compiler would be a program that waits forever.
    for forms in ([form for form in FORMS if form not in specialised], [BASELINE, *specialised]):
        experiment(log, shape, device, dtype, products, forms, compiled, arch, ceilings)
        print(measured_table(log.records, compiled), flush=True)
    print("rehearsal: times of an interpreter say nothing about a GPU" if rehearsal else f"results in {log.path}")
    return 0 if log.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
