"""Correct results: every op once, the kernel tests compiled, and ViT-B/16 against `vit.reference`."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import time
from typing import Any

import torch

import vit
from benchmarks.gpu_stages import cases
from benchmarks.log import ROOT, Log, name_of
from vit.testing import measure, relative_error

OP_TESTS = ("patch_embed", "layer_norm", "linear", "mlp", "attention")


def smoke(log: Log, rehearse: bool) -> None:
    """Every op once, forward and backward, with head_dim 64 and 80."""
    device = cases.device(rehearse)
    for head_dim, heads in ((64, 12), (80, 16)):
        for case in cases.op_cases(device, rehearse, head_dim, heads):
            log.attempt(functools.partial(_once, case, device), op=case.op, head_dim=head_dim)


def _once(case: cases.Case, device: torch.device) -> dict[str, Any]:
    start = time.perf_counter()
    ours = case.results()
    cases.synchronize(device)
    seconds = time.perf_counter() - start
    worst = max(relative_error(a, b) for a, b in zip(ours, case.results(case.eager), strict=True))
    return {"ok": worst < 0.03, "error_rms": worst, "first_call_s": seconds}


def ops(log: Log, rehearse: bool) -> None:
    """The kernel tests, file by file, in several processes, because compilation takes most of the time."""
    workers = ["-n", str(min(os.cpu_count() or 1, 8))] if importlib.util.find_spec("xdist") else []
    for op in OP_TESTS[1:2] if rehearse else OP_TESTS:
        command = [sys.executable, "-m", "pytest", f"tests/kernels/test_{op}.py", "-q", "--tb=short", *workers]
        command.append("--basetemp=.pytest-tmp-ops")  # not that of a surrounding test run
        if rehearse:
            command += ["-k", "bad_", "-n", "0"] if workers else ["-k", "bad_"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        summary = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), done.stderr[-300:])
        failures = [line[:400] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
        log.add(
            ok=done.returncode == 0, op=op, summary=summary.strip("= "), seconds=time.perf_counter() - start,
            failures=failures[:60],
        )  # fmt: skip


def whole_model(log: Log, rehearse: bool) -> None:
    """The policy for whole models judges the logits and every gradient of ViT-B/16."""
    device = cases.device(rehearse)
    name = "vit_tiny_patch16_224" if rehearse else "vit_base_patch16_224"
    small = {"img_size": 32, "depth": 1, "num_classes": 10, "impl": "triton"} if rehearse else {}
    for dtype in (torch.float32,) if rehearse else (torch.bfloat16, torch.float16, torch.float32):
        ours = vit.create_model(name, seed=0, **small).to(device, dtype)
        eager, exact = (vit.reference.VisionTransformer(ours.config).to(device, d) for d in (dtype, torch.float64))
        for model in (eager, exact):
            model.load_state_dict(ours.state_dict())
        image = torch.randn(2, 3, *ours.config.img_size, device=device, dtype=dtype)
        cotangent = torch.randn(2, ours.config.num_classes, device=device, dtype=dtype)

        a, b, c = (_named_results(m, image, cotangent) for m in (ours, eager, exact))
        reports = [measure(a[k], b[k], c[k], scope="model", name=k) for k in c]
        worst = max(reports, key=lambda r: r.rms / max(r.rms_limit, 1e-30))
        log.add(
            ok=all(r.ok for r in reports), shape=name, dtype=name_of(dtype), tensors=[str(r) for r in reports],
            count=len(reports), failed=[r.name for r in reports if not r.ok][:40], worst=str(worst),
        )  # fmt: skip
        del ours, eager, exact, model, a, b, c


def _named_results(model: torch.nn.Module, image: torch.Tensor, cotangent: torch.Tensor) -> dict[str, Any]:
    dtype = next(model.parameters()).dtype
    names = ["logits", "image", *(name for name, _ in model.named_parameters())]
    return dict(zip(names, cases.model_results(model, image.to(dtype), cotangent.to(dtype)), strict=True))
