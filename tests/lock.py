"""Compile-only lock: compiles every kernel, pinned configuration and dtype, without a GPU.

    python tests/lock.py [--update] [--arch 80,89,90,100] [--case NAME] [--jobs 2] [--json FILE]

The host code of the ops runs on CPU tensors (lock_cases.py), and the launcher compiles instead of launching. So a
kernel gets the specialisation of production: aligned pointers, sizes divisible by 16 or equal to 1, constexprs, pinned
configuration. It checks that a kernel compiles, does not spill, fits shared and tensor memory, has no atomics, and uses
wgmma (sm_100: tcgen05) where possible and not serialised. Every kernel must have a case, and the figures must equal the
lock file of the installed Triton version. TRITON_INTERPRET is ignored.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.compiled import ASYNC_DOT, SHARED_LIMIT, compiling, figures  # isort: skip (before kernels are imported)

import torch
import triton
from lock_cases import CASES, EXCUSED
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = ROOT / "tests" / "lock" / f"triton-{triton.__version__}.json"
TENSOR_MEMORY_LIMIT = 512  # columns, for the accumulators of sm_100
DTYPES = {arch: ["bf16"] for arch in SHARED_LIMIT} | {90: ["bf16", "fp16", "fp32", "tf32"]}
TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


def problems(arch: int, got: dict[str, Any]) -> list[str]:
    """The faults of a compiled kernel, each with a remedy."""
    found = []
    if not got["registers"]:
        found.append("there is no output of ptxas; delete build/lock and run again")
    if got["spill"]:
        found.append(
            f"spills {got['spill']} bytes at {got['registers']} registers; pin smaller tiles in kernels/configs.py"
        )
    if got["shared"] > SHARED_LIMIT[arch]:
        found.append(f"needs {got['shared']:,} of {SHARED_LIMIT[arch]:,} bytes of shared memory; pin fewer stages")
    if got.get("tensor_memory", 0) > TENSOR_MEMORY_LIMIT:
        found.append(
            f"needs {got['tensor_memory']} of {TENSOR_MEMORY_LIMIT} columns of tensor memory; pin smaller tiles"
        )
    if got["atomics"]:
        found.append(f"has {got['atomics']} atomics: not reproducible; write partials and sum them in order")
    if "ptxas_warnings" in got:
        found.append(
            f"ptxas serialises its wgmma ({', '.join(got['ptxas_warnings'])}); free registers or split the dot"
        )
    instruction = ASYNC_DOT.get(arch)
    if slow := got.get(f"dots_without_{instruction}"):
        found.append(
            f"{slow} dots with 64 rows or more are not {instruction}; change the tile or the warps (a multiple of 4)"
        )
    return found


def run_case(name: str, arch: int, dtype: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(figures of every kernel of a case: forward, backward and inference, failures)."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    locked: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    seen: set[str] = set()
    inputs: list[Tensor] = []

    def make(*shape: int, dtype: torch.dtype | None = None, _default: torch.dtype = TORCH_DTYPE[dtype]) -> Tensor:
        inputs.append(torch.empty(shape, dtype=dtype or _default).requires_grad_())
        return inputs[-1]

    def report(mode: str, kernel: str, arguments: dict[str, Any], compiled: Any) -> None:
        flags = [n if v is True else v for n, v in arguments.items() if n.isupper() and n != "PRECISION"]
        full = " ".join([kernel, *(f for f in flags if isinstance(f, str)), *mode.split()])
        where = f"{full} in case {name}, {dtype}, sm_{arch}"
        if isinstance(compiled, Exception):
            failed.append(f"{where}: does not compile: {str(compiled).strip()[-600:]}")
        elif compiled.hash not in seen:
            seen.add(compiled.hash)
            key = f"sm_{arch} {dtype} {name} {full}"
            twin = 1 + sum(k == key or k.startswith(f"{key} #") for k in locked)
            tile = {n: v for n, v in arguments.items() if n.startswith("BLOCK_")}
            got = locked[key + (f" #{twin}" if twin > 1 else "")] = tile | figures(compiled)
            if key not in EXCUSED:
                failed.extend(f"{where}: {what}" for what in problems(arch, got))

    try:
        with compiling(arch, functools.partial(report, "")):
            outputs = CASES[name].call(make)
            outputs = [o for o in ([outputs] if isinstance(outputs, Tensor) else outputs) if o.requires_grad]
            torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs], allow_unused=True)
        if dtype == "bf16":
            with compiling(arch, functools.partial(report, "no_grad")), torch.no_grad():
                CASES[name].call(make)
    except Exception as error:
        failed.append(f"case {name}, {dtype}, sm_{arch}: {type(error).__name__}: {error}")
    return locked, failed


# ---- the command -----------------------------------------------------------------------------------------------------


def all_kernels() -> set[str]:
    """The names of all kernels: every ``@triton.jit`` or ``@gluon.jit`` function called ``_*_kernel``."""
    sources = (path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    kernel = re.compile(r"@(?:triton|gluon)\.jit[^\n]*\n(?:@[^\n]*\n)*def (_\w+_kernel)\b")
    return {name for s in sources for name in kernel.findall(s)}


def compare(locked: dict[str, Any], recorded: dict[str, Any]) -> list[str]:
    """The differences from the lock file."""
    changed = []
    for key in sorted(locked.keys() | recorded.keys()):
        old, new = recorded.get(key), locked.get(key)
        if old is None or new is None:
            changed.append(f"{key}: {'not in' if old is None else 'only in'} {LOCK_FILE.name}")
        elif old != new:
            what = (f"{f} {old.get(f)} -> {new.get(f)}" for f in {**old, **new} if old.get(f) != new.get(f))
            changed.append(f"{key}: {', '.join(what)}")
    if changed:
        changed.append(
            f"{LOCK_FILE.name} differs: if that is intended, run `python tests/lock.py --update` and commit it"
        )
    return changed


def _end_with_parent() -> None:
    """Ends a worker whose parent was killed, for example by a timeout. Otherwise it would wait forever."""
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def run(archs: list[int], dtypes: list[str], cases: list[str], jobs: int) -> tuple[dict[str, Any], list[str]]:
    """(figures of all kernels, failures other than differences from the lock file)."""
    tasks = [
        (case, arch, dtype)
        for case in cases
        for arch in archs
        for dtype in DTYPES[arch]
        if dtype in dtypes and dtype in CASES[case].dtypes
    ]
    locked: dict[str, Any] = {}
    failed: list[str] = []
    # No threads: Triton is not thread-safe.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_end_with_parent) as pool:
        futures: list[Future] = [pool.submit(run_case, *task) for task in tasks]
        for task, future in zip(tasks, futures, strict=True):
            try:
                kernels_of_case, failures = future.result()
            except Exception as error:  # a compiler crash also ends the process and its later cases
                failed.append(f"case {' '.join(map(str, task))}: {type(error).__name__}; try --case {task[0]} --jobs 1")
            else:
                locked |= kernels_of_case
                failed += failures
    return locked, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the lock file of the installed Triton version")
    parser.add_argument("--arch", default="80,89,90,100", help="compute capabilities times ten")
    parser.add_argument("--dtype", default="bf16,fp16,fp32,tf32", help="dtypes (default: %(default)s)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case (may be repeated)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write figures and failures to this file")
    args = parser.parse_args()
    archs, dtypes, start = [int(a) for a in args.arch.split(",")], args.dtype.split(","), time.time()
    locked, failed = run(archs, dtypes, args.case or list(CASES), args.jobs)
    if args.case is None:
        missing = all_kernels() - {key.split()[3] for key in locked} - {f.split()[0] for f in failed}
        failed += [f"{kernel}: no case compiles it; add one to tests/lock_cases.py" for kernel in sorted(missing)]
    recorded = json.loads(LOCK_FILE.read_text()) if LOCK_FILE.exists() else None
    if args.update:
        recorded = {
            key: value for key, value in (recorded or {}).items() if not _asked(key, archs, dtypes, args.case)
        } | locked
        lines = (f"{json.dumps(key)}: {json.dumps(recorded[key])}" for key in sorted(recorded))
        LOCK_FILE.parent.mkdir(exist_ok=True)
        LOCK_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    elif recorded is not None:
        failed += compare(locked, {key: v for key, v in recorded.items() if _asked(key, archs, dtypes, args.case)})
    else:
        print(f"{LOCK_FILE.name} does not exist: figures are checked, but not compared")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"kernels": locked, "failures": failed}, indent=1))
    print("\n".join(failed), end="\n" if failed else "")
    summary = f"Triton {triton.__version__}: {len(locked)} compiled kernels, {len(failed)} failures"
    print(f"{summary}, {time.time() - start:.0f} s")
    return 1 if failed else 0


def _asked(key: str, archs: list[int], dtypes: list[str], cases: list[str] | None) -> bool:
    arch, dtype, case = key.split()[:3]
    return int(arch.removeprefix("sm_")) in archs and dtype in dtypes and (cases is None or case in cases)


if __name__ == "__main__":
    sys.exit(main())
