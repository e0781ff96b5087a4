"""`make gpu` rehearsed without a GPU: every stage runs and writes its records, and failures are reported.

Wrong results show that the checks of the stages can fail.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import STAGES
from benchmarks.gpu_stages import cases, exact, limits, pingpong, sanitizer, training
from benchmarks.log import Log
from vit import ViTConfig
from vit.kernels import configs
from vit.kernels.linear import gemm
from vit.reference import VisionTransformer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal; with a GPU, make gpu is the real thing")
OPS = {"patch_embed", "layer_norm", "residual_layer_norm", "linear", "mlp", "attention_qkvpacked", "attention"}


def python(*args: str, **env: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("STAGE", "BUDGET")} | env
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text())["records"]


# ---- the rehearsal ---------------------------------------------------------------------------------------------------


# All tests of the rehearsal run in one worker of xdist, so it runs once. It takes four minutes.
one_worker = pytest.mark.xdist_group("rehearsal")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal")
    done = python("-m", "benchmarks.gpu", "--rehearse", "--out", str(out), "--budget", "1800")
    return out, done


@one_worker
@pytest.mark.ci
@pytest.mark.parametrize("stage", STAGES)
def test_rehearsal(rehearsal, stage):
    out, done = rehearsal
    result = json.loads((out / f"{stage}.json").read_text())
    assert result["about"]["gpu"] == "rehearsal" and result["about"]["torch"] == torch.__version__
    assert result["records"] and all(r["ok"] and r["rehearsal"] for r in result["records"]), done.stdout + done.stderr
    assert json.loads((out / "summary.json").read_text())[stage]["result"] == "ok"
    seen = {r.get("op") for r in result["records"]}
    if stage in ("smoke", "determinism", "nan_bands", "race", "streams", "large", "sanitizer"):
        assert seen >= OPS
    if stage in ("graphs", "checkpoint"):
        assert {r["impl"] for r in result["records"]} == {"triton", "auto"}
    if stage == "graphs":
        assert seen == {"vit", "vit.graph"}
    if stage == "sanitizer":
        assert result["records"][-1]["skipped"] == "compute-sanitizer is not installed"


@one_worker
@pytest.mark.ci
def test_rehearsal_ends_well(rehearsal):
    assert rehearsal[1].returncode == 0 and f"{len(STAGES)} of {len(STAGES)} stages ok" in rehearsal[1].stdout


# ---- the driver ------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(tmp_path):
    done = python("-m", "benchmarks.gpu", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "No NVIDIA GPU here: nothing was run" in done.stdout
    assert not list(tmp_path.iterdir())


def test_stage_and_budget_choose(tmp_path):
    done = python("-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path), STAGE="heads, smoke", BUDGET="1")
    assert done.returncode == 1 and "0 of 2 stages ok" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["heads", "smoke"]
    assert all(line["result"] == "not run: budget" for line in summary.values())
    assert not (tmp_path / "smoke.json").exists()
    done = python("-m", "benchmarks.gpu", "--rehearse", "--stage", "smoke,smoking", "--out", str(tmp_path))
    assert done.returncode == 2 and "no stage smoking" in done.stderr


@pytest.mark.ci
def test_a_stage_that_fails_is_recorded_and_does_not_stop_the_next(tmp_path):
    (tmp_path / "stages.py").write_text("""
import os, signal, time
def raises(log, rehearse):
    log.add(ok=True, step=1)
    raise RuntimeError("boom")
def dies(log, rehearse):
    log.add(ok=True, step=1)
    os.kill(os.getpid(), signal.SIGSEGV)
def hangs(log, rehearse):
    log.add(ok=True, step=1)
    time.sleep(600)
def silent(log, rehearse):
    pass
def attempts(log, rehearse):
    import torch
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    log.attempt(no_memory, op="big")
    log.attempt(lambda: 1 / 0, op="wrong")
def fine(log, rehearse):
    log.add(ok=True)
""")
    script = """
import sys, torch
from pathlib import Path
from benchmarks.stages import Stage, run
names = ["raises", "dies", "missing", "silent", "attempts", "hangs", "fine"]
stages = {n: Stage("stages:" + n, 6 if n == "hangs" else 30) for n in names}
sys.exit(run(stages | {"late": Stage("stages:fine", 1e6)}, Path(sys.argv[1]), 400, "rehearsal", True))
"""
    done = python("-c", script, str(tmp_path), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1 and "1 of 8 stages ok" in done.stdout, done.stdout + done.stderr
    found = {name: [r.get("error") for r in records(tmp_path / f"{name}.json")] for name in ("raises", "dies", "hangs")}
    assert found["raises"][0] is None and "RuntimeError: boom" in found["raises"][1]
    assert found["dies"] == [None, "ended with exit code -11"]
    assert found["hangs"][0] is None and found["hangs"][1].startswith("stopped after")
    assert "no attribute 'missing'" in records(tmp_path / "missing.json")[0]["error"]
    big, wrong = records(tmp_path / "attempts.json")
    assert big["ok"] and big["skipped"].startswith("memory: CUDA out of memory")
    assert not wrong["ok"] and "ZeroDivisionError" in wrong["error"]
    summary = {name: line["result"] for name, line in json.loads((tmp_path / "summary.json").read_text()).items()}
    assert summary == dict.fromkeys(summary, "FAILED") | {"fine": "ok", "late": "not run: budget"}


# ---- the checks can fail ---------------------------------------------------------------------------------------------


def test_one_bit_is_seen():
    a = torch.randn(3, 5, dtype=torch.bfloat16)
    b = a.clone()
    b.view(torch.int16)[2, 4] ^= 1
    assert cases.same_bits([a], [[a.clone()], [a.clone()]])["ok"]
    assert cases.same_bits([a, a], [[a, a], [a, b]])["differing"] == {1: 1}
    assert not cases.same_bits([a, a], [[a, b]])["ok"]
    several = cases.same_bits([a, a], [[b, a], [b, a], [a, a]])  # the last repeat is right
    assert not several["ok"] and several["differing"] == {0: 2} and several["times"] == 3
    nan = torch.full_like(a, float("nan"))
    assert not cases.same_bits([nan], [[nan]])["ok"]


def test_nan_bands_surround_every_row():
    for shape in ((7,), (3, 5), (2, 3, 16, 8)):
        t = torch.randn(shape)
        view = exact._in_nans(t)
        assert torch.equal(view, t)
        assert view._base.isnan().sum() == view._base.numel() - t.numel()
        assert len(shape) == 1 or view.view(-1, shape[-1]).stride(0) == shape[-1] + 32


class _Elsewhere(cases.Case):
    """A LayerNorm that reads the neighbouring sample, as after an overflow of its offset."""

    @property
    def ours(self):
        return lambda x, **params: self.eager(x=x.roll(1, 0), **params)


def test_a_sample_read_from_elsewhere_is_seen():
    tensors = {"x": torch.randn(6, 5, 32), "weight": torch.randn(32), "bias": torch.randn(32)}
    assert limits._check_samples(cases.Case("layer_norm", dict(tensors)), ["x"], [3])["ok"]
    record = limits._check_samples(_Elsewhere("layer_norm", dict(tensors)), ["x"], [3])
    assert not record["ok"] and not record["zero_elsewhere"] and record["error_rms"] > 0.5


def test_what_the_sanitizer_says_belongs_to_an_op(tmp_path):
    output = """
========= COMPUTE-SANITIZER
@@ begin layer_norm
@@ done layer_norm
@@ begin attention
========= Invalid __global__ read of size 2 bytes
=========     at _attention_fwd_kernel+0x4d0
@@ done attention
@@ begin mlp
========= ERROR SUMMARY: 1 error
"""
    log = Log(tmp_path / "sanitizer.json", {"gpu": "none"})
    sanitizer._run(log, "memcheck", [sys.executable, "-c", f"print('''{output}'''); raise SystemExit(9)"])
    verdicts = {r.get("op"): r["ok"] for r in log.records}
    assert verdicts == {"layer_norm": True, "attention": False, "mlp": False, None: False}
    assert "Invalid __global__ read" in log.records[1]["findings"][0] and log.records[-1]["exit_code"] == 9
    output = "@@ begin layer_norm\n@@ done layer_norm\n@@ begin attention\nTimeout (0:00:40)!"
    log = Log(tmp_path / "sanitizer.json", {"gpu": "none"})
    sanitizer._run(log, "memcheck", [sys.executable, "-c", f"print({output!r}); raise SystemExit(1)"])
    assert [r.get("skipped", r["ok"]) for r in log.records] == [True, "not finished in time, nor the ops after it"]


def test_training_with_a_wrong_gradient_is_seen():
    """γ of LayerScale has the wrong sign in its gradient. The loss changes little, but far more than by rounding."""
    config = ViTConfig(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2.0, num_classes=10, init_values=0.5
    )

    def curve(dtype, wrong=False):
        model = VisionTransformer(config, seed=0)
        if wrong:
            model.blocks[0].ls1.gamma.register_hook(torch.neg)
        losses = training.train(model, dtype, 60, 16)
        return [sum(losses[i : i + 10]) / 10 for i in range(0, 60, 10)]

    double, single = curve(torch.float64), curve(torch.float32)
    record = training.verdict(single, single, double)
    assert record["ok"] and record["distance"] > 0
    wrong = training.verdict(curve(torch.float32, wrong=True), single, double)
    assert not wrong["ok"] and wrong["distance"] > 2 * wrong["limit"], wrong
    assert not training.verdict([float("nan")] * 6, single, double)["ok"]


@pytest.mark.parametrize(("form", "wrong"), [("gelu and h", 0), ("gelu and h", 1), ("dgelu and sums", 2)])
def test_the_gate_of_a_kernel_can_fail(monkeypatch, form, wrong):
    """With the kernel of `linear` in its place, which passes unless a result is wrong by 2 %."""

    def product(*args, factor, **kwargs):
        found = list(gemm(*args, **kwargs))
        found[wrong] = found[wrong] * (factor if configs.gemm(0, torch.float32, "ieee").pingpong else 1.0)
        return found

    for factor in (1.0, 1.02):
        monkeypatch.setattr(pingpong, "gemm", functools.partial(product, factor=factor))
        found = pingpong._compare((37, 48, 24), torch.float32, torch.device("cpu"), form, "gelu", 1)
        assert found["ok"] == (factor == 1.0) and found["kernel"] == ["_gemm_kernel"]
