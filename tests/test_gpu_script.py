"""`make gpu`, rehearsed without a GPU: the script runs, writes its records, and tells when a stage fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal; with a GPU, make gpu is the real thing")


def gpu_script(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *args]
    env = {k: v for k, v in os.environ.items() if k not in ("STAGE", "BUDGET")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu_script("--out", str(tmp_path))
    assert done.returncode == 2
    assert "No NVIDIA GPU here: nothing was run" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["smoke", "ops", "vit", "time"])
def test_rehearsal(stage, tmp_path):
    done = gpu_script("--rehearse", "--stage", stage, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / f"{stage}.json").read_text())
    assert result["about"]["gpu"] == "rehearsal" and result["about"]["torch"] == torch.__version__
    assert all(record["ok"] for record in result["records"])
    if stage == "smoke":
        ops = {r["op"] for r in result["records"]}
        assert ops >= {
            "patch_embed",
            "layer_norm",
            "residual_layer_norm",
            "linear",
            "mlp",
            "attention",
            "attention_qkv",
        }
    if stage == "time":
        timed = {(r["provider"], r["mode"]) for r in result["records"] if r.get("bench") == "vit"}
        assert timed == {(p, m) for p in ("ours", "reference") for m in ("fwd", "full")}


def test_a_stage_that_runs_out_of_time_is_stopped_and_told(tmp_path):
    done = gpu_script("--rehearse", "--stage", "time", "--out", str(tmp_path), "--budget", "1")
    assert done.returncode == 1
    assert "stopped after 1 s" in done.stdout and "0 of 1 stages ok: failed time" in done.stdout
