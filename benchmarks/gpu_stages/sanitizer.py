"""Every op once, at one shape, under memcheck and racecheck of compute-sanitizer.

The ops run in a separate process, ``python -m benchmarks.gpu_stages.sanitizer``. It prints a marker before and after
each op, so each message of the tool belongs to an op.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile

from benchmarks.log import ROOT, Log

BEGIN, DONE = "@@ begin ", "@@ done "
SECONDS = {"memcheck": 40, "racecheck": 50}
FIXED = ("COMPUTE-SANITIZER", "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards")  # messages that are no faults


def sanitizer(log: Log, rehearse: bool) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    for check, seconds in SECONDS.items():
        if rehearse and check == "memcheck":
            command = []  # without the tool
        elif tool is None:
            log.add(ok=True, tool=check, skipped="compute-sanitizer is not installed")
            continue
        else:  # torch causes API errors on purpose
            command = [tool, "--tool", check, "--report-api-errors", "no"]
        command += [sys.executable, "-m", __name__, str(seconds), *(["tiny"] if rehearse else [])]
        _run(log, check, command)


def _run(log: Log, check: str, command: list[str]) -> None:
    # One cudaMalloc for each tensor, so that memcheck finds accesses beyond its end.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+") as output:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT).returncode
        output.seek(0)
        lines = output.read().splitlines()
    begun = 0
    for i, line in enumerate(lines):
        if not line.startswith(BEGIN):
            continue
        begun += 1
        op = line.removeprefix(BEGIN)
        rest = lines[i + 1 :]
        end = next((j for j, other in enumerate(rest) if other.startswith(BEGIN)), len(rest))
        said = [text for text in rest[:end] if text.startswith("=========") and not any(f in text for f in FIXED)]
        found = {"tool": check, "op": op, "findings": [text[:200] for text in said[:12]]}
        if DONE + op in rest[:end]:
            log.add(ok=not said, **found)
        elif any(text.startswith("Timeout (") for text in rest) and not said:
            log.add(ok=True, **found, skipped="not finished in time, nor the ops after it")
            return
        else:
            log.add(ok=False, **found, error="not finished")
    log.add(ok=code == 0 and begun > 0, tool=check, exit_code=code, ops=begun, end_of_output=lines[-3:])


def _child() -> None:
    """Runs the ops. It exits after some seconds, so that it does not outlive the stage and its output is kept."""
    faulthandler.dump_traceback_later(int(sys.argv[1]), exit=True)
    rehearse = "tiny" in sys.argv
    from benchmarks.gpu_stages import cases

    device = cases.device(rehearse)
    for case in cases.op_cases(device, rehearse, batch=1):
        print(BEGIN + case.op, flush=True)
        case.results()
        cases.synchronize(device)
        print(DONE + case.op, flush=True)


if __name__ == "__main__":
    _child()
