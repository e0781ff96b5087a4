"""Runs stages within a budget, each in a separate process that writes its records to disk at once."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.log import amend, run_stage, utc


@dataclasses.dataclass(frozen=True)
class Stage:
    """The function of a stage as ``module:name``, its seconds, and options for the call.

    The seconds are those on an H100 whose kernels are not compiled yet.
    """

    target: str
    seconds: float
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def run(stages: dict[str, Stage], out: Path, budget: float, gpu: str, rehearse: bool) -> int:
    """Runs the stages one after another. Returns 0 if all of them ran and every record is ok.

    A stage may take its share of the remaining budget, or its own seconds if these are more. It does not run if less
    than half of these are left.
    """
    out.mkdir(parents=True, exist_ok=True)
    about = {"gpu": gpu, "command": shlex.join(["python", "-m", *_module(), *sys.argv[1:]])}
    deadline = time.monotonic() + budget
    results = {}
    for i, (name, stage) in enumerate(stages.items()):
        left = deadline - time.monotonic()
        wanted = sum(s.seconds for s in list(stages.values())[i:])
        limit = min(left, max(stage.seconds, stage.seconds / wanted * left))
        if limit < stage.seconds / 2:
            result = {"result": "not run: budget", "left_s": round(left)}
        else:
            print(f"== {name} (at most {limit:.0f} s)", flush=True)
            result = _run_one(name, stage, out, limit, about, rehearse)
        results[name] = result | {"utc": utc()} | ({"rehearsal": True} if rehearse else {})
        _summarise(out / "summary.json", results)
        print(f"== {name}: {' '.join(f'{k}={v}' if k != 'result' else v for k, v in result.items())}", flush=True)
    bad = [f"{name} ({r['result']})" for name, r in results.items() if r["result"] != "ok"]
    print(f"{len(stages) - len(bad)} of {len(stages)} stages ok{': not ' if bad else ''}{', '.join(bad)}")
    print(f"results in {out}")
    return 1 if bad else 0


def _run_one(name: str, stage: Stage, out: Path, limit: float, about: dict[str, str], rehearse: bool) -> dict[str, Any]:
    path = out / f"{name}.json"
    path.unlink(missing_ok=True)
    start = time.monotonic()
    # CUDA does not work after a fork. A rehearsal has no GPU, so a fork saves the import of torch.
    context = multiprocessing.get_context("fork" if rehearse else "spawn")
    process = context.Process(target=run_stage, args=(stage.target, path, about, rehearse, limit, dict(stage.options)))
    process.start()
    process.join(limit)
    died = None
    if process.is_alive():
        died = f"stopped after {limit:.0f} s; what it had found is here"
        _kill(process)
    elif process.exitcode not in (0, 1) or not path.exists():
        died = f"ended with exit code {process.exitcode}"
    if died:
        amend(path, {"ok": False, "error": died})
    records = json.loads(path.read_text())["records"]
    failed = sum(not r["ok"] for r in records)
    return {
        "result": "FAILED" if failed or not records else "ok", "seconds": round(time.monotonic() - start, 1),
        "records": len(records), "failed": failed, "skipped": sum("skipped" in r for r in records),
    }  # fmt: skip


def _module() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name.removesuffix(".__main__")] if spec else []


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    """Kills a stage and its child processes. A stage starts a session of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
    process.join()


def _summarise(path: Path, results: dict[str, Any]) -> None:
    """Replaces the lines of these stages, and keeps those of earlier runs."""
    lines = (json.loads(path.read_text()) if path.exists() else {}) | results
    path.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in lines.items()) + "\n}\n")
