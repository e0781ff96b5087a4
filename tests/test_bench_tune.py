"""`benchmarks.tune`: what it refuses, what it prints; rehearsed without a GPU."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tune
from benchmarks.candidates import FORMS, candidates
from benchmarks.harness import Bench, Work
from benchmarks.log import Log
from benchmarks.shapes import MODELS, SMALL, Shape
from benchmarks.variants import configured
from vit import kernels
from vit.kernels import configs, reference
from vit.kernels.configs import Config

ROOT = Path(__file__).parent.parent
B = MODELS["B/16"]


def all_candidates(arch, dtype=torch.bfloat16):
    return {name: candidates(t.function, arch, B, dtype, t.role) for name, t in tune.TARGETS.items()}


# ---- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_candidates_begin_with_the_pinned_one(arch):
    found, bf16 = all_candidates(arch), torch.bfloat16
    for name, pinned in (
        ("gemm_fc1", configs.gemm(arch, bf16, "ieee")),
        ("attention_bwd", configs.attention_bwd(arch, 197, 64, bf16)),
        ("patch_embed_dw", configs.patch_embed(arch, "dw", bf16, "ieee")),
        ("layer_norm", configs.layer_norm(arch, 768)),
    ):
        assert found[name][0] == pinned, name
    assert all(len(of) == len(set(of)) >= 8 for of in found.values())


def test_candidates_are_what_can_run():
    found = all_candidates(90)
    assert Config(128, 256, 64, 8, 8, 3, 4) in found["mlp"]  # what kernels.md compiled without spills
    assert Config(128, 256, 64, 8, 4, 3, 2, warp_specialize=True) in found["mlp"]
    assert Config(128, 256, 64, 8, 4, 3, 2) not in found["mlp"]  # 256 accumulators a thread
    assert not any(c.warp_specialize for c in all_candidates(80)["mlp"])
    for c in found["mlp"]:
        assert 2 * c.num_stages * (c.block_m + c.block_n) * c.block_k <= 232_448
    assert {c.block_n for c in found["layer_norm"]} == {1024}  # a row is held whole


def test_the_nearest_are_tried_first():
    of = all_candidates(90)["attention_fwd"]
    changed = [sum(a != b for a, b in zip(*map(dataclasses.astuple, (c, of[0])), strict=True)) for c in of]
    assert changed == sorted(changed) and changed[:2] == [0, 1]
    of = all_candidates(90)["gemm_fc2"]
    assert {*of[1:7]} > {*FORMS} - {of[0]} and of[0] == configs.gemm(90, torch.bfloat16, "ieee")


def test_pinned_configuration_is_restored():
    pinned, other = configs.gemm(90, torch.bfloat16, "ieee"), Config(64, 64, 64, 8)
    with pytest.raises(KeyError), configured("gemm", other):
        assert configs.gemm(90, torch.bfloat16, "ieee") == other
        raise KeyError
    assert configs.gemm(90, torch.bfloat16, "ieee") == pinned
    roles = {role: configs.patch_embed(90, role, torch.bfloat16, "ieee") for role in ("fwd", "dw", "dimage")}
    with configured("patch_embed", other, "dw"):
        assert {r: configs.patch_embed(90, r, torch.bfloat16, "ieee") for r in roles} == roles | {"dw": other}


@pytest.mark.parametrize("config", [Config(), Config(128, 256, 64, 8, 4, 3, 4, True, False), Config(1, 1024)])
def test_printed_configuration_is_python(config):
    assert eval(tune.text_of(config), {"Config": Config}) == config
    assert eval(tune.text_of(config)) == config


# ---- measuring, rehearsed --------------------------------------------------------------------------------------------

FIRST, OTHER, THIRD = (Config(block_m=m, block_n=256, num_warps=4) for m in (2, 4, 8))


def trial_of(device, ours):
    """LayerNorm of 9 rows by ``ours(config now, x, weight, bias)``."""

    def run(x, weight, bias, impl):
        return ours(configs.layer_norm(0, 192), x, weight, bias)

    inputs = lambda s, rand: {"x": rand(1, 9, 192), "weight": rand(192), "bias": rand(192)}  # noqa: E731
    work = lambda s, e: {"fwd": Work(0, 1), "bwd": Work(0, 1)}  # noqa: E731
    bench = Bench("layer_norm", "layer_norm", inputs, work, reference.layer_norm, {"ours": run}, compiles=None)
    return tune.Trial(tune.Target("layer_norm", "_layer_norm", bench, "fwd"), SMALL, torch.float32, device)


def layer_norm(_, x, weight, bias):
    return kernels.layer_norm(x, weight, bias, impl="triton")


def log_of(path, **about):
    return Log(path, {"gpu": "rehearsal", "command": "python -m benchmarks.tune", **about}, rehearse=True)


@pytest.fixture
def fake_times(monkeypatch):
    """Milliseconds by configuration instead of a clock; ``seen``: the configuration of each call."""
    seen, ms = [], {}

    def milliseconds(fns, device, **_):
        return {name: [ms[(fn(), seen[-1])[1]]] * 3 for name, fn in fns.items()}

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    return seen, ms


def test_fastest_that_is_right_is_chosen(device, tmp_path, fake_times):
    seen, times = fake_times

    def ours(config, *args):
        seen.append(config)
        y = layer_norm(config, *args)
        return y * 1.01 if config == THIRD else y

    times |= {FIRST: 2.0, OTHER: 1.0, THIRD: 0.1}  # the fastest one is wrong
    log = log_of(tmp_path / "tune.json")
    trial = trial_of(device, ours)
    winner, ms, before = tune.tune("layer_norm", trial, [FIRST, OTHER, THIRD], {}, log)
    assert (winner, ms, before) == (OTHER, 1.0, 2.0)
    records = json.loads((tmp_path / "tune.json").read_text())["records"]
    wrong = [r for r in records if r["config"] == tune.text_of(THIRD)]
    assert len(wrong) == 1 and "parity" in wrong[0]["error"] and "ms_p50" not in wrong[0] and not wrong[0]["ok"]
    assert [r["config"] for r in records if r.get("chosen")] == [tune.text_of(OTHER)]
    assert all(r["rehearsal"] for r in records)
    comment, line = tune.line_for("layer_norm", trial, log, winner, ms, before).splitlines()
    assert "1 ms, before 2 ms (2.00x)" in comment and "rehearsal" in comment and comment.startswith("# ")
    namespace = {"Config": Config}
    exec(f"def f():\n    {comment}\n    {line}", namespace)
    assert namespace["f"]() == OTHER

    times[FIRST] = 1.01  # within noise
    assert tune.tune("layer_norm", trial, [FIRST, OTHER], {}, log)[0] == FIRST


def test_other_bits_are_refused(device, tmp_path):
    noise = itertools.count(1)
    trial = trial_of(device, lambda config, *args: layer_norm(config, *args) + (config == OTHER) * next(noise) * 2**-23)
    assert trial.wrong(FIRST)[1] is None and "other bits" in trial.wrong(OTHER)[1]


def test_wrong_pinned_configuration_ends_it(device, tmp_path):
    trial = trial_of(device, lambda config, *args: layer_norm(config, *args) + 1.0)
    with pytest.raises(RuntimeError, match=r"pinned configuration is not timed: parity"):
        tune.tune("layer_norm", trial, [FIRST, OTHER], {}, log_of(tmp_path / "tune.json"))


@pytest.mark.parametrize("name", ["attention_bwd", "layer_norm"])
def test_rehearsal_of_tuning(device, tmp_path, name):
    """The real ops, interpreted, timed by the clock: the candidate reaches the kernel and is right."""
    target, shape = tune.TARGETS[name], Shape("vit_tiny_patch16_224", 1, 32)
    trial = tune.Trial(target, shape, torch.float32, device)
    found = candidates(target.function, 0, shape, torch.float32, target.role)
    used = next(c for c in found[1:] if c.block_m != found[0].block_m)
    log = log_of(tmp_path / "tune.json")
    winner, ms, pinned_ms = tune.tune(name, trial, [found[0], used], {}, log)
    assert winner in (found[0], used) and 0 < ms <= pinned_ms
    assert log.ok and {r["config"] for r in log.records} == {tune.text_of(c) for c in (found[0], used)}


def test_cublas_stands_beside_the_candidates(device, tmp_path, monkeypatch, capsys):
    """However fast it is, it is never the configuration that is chosen."""
    target = tune.TARGETS["gemm_fc1"]
    trial = tune.Trial(target, Shape("vit_tiny_patch16_224", 1, 32), torch.float32, device)
    pinned, erf = tune.of_target(target, 0, trial.shape, torch.float32)[:2]
    monkeypatch.setattr(tune, "milliseconds", lambda fns, *_, **__: {k: [0.1 if k == "cublas" else 2.0] for k in fns})
    log = log_of(tmp_path / "tune.json")
    assert tune.tune("gemm_fc1", trial, [pinned, erf], {}, log)[0] == pinned and erf.cheap is False
    last = log.records[-1]
    assert last["config"] == "cublas" and last["ratio"] == 20 and not last["chosen"]
    flops = 2 * 5 * 192 * 768
    assert capsys.readouterr().out.splitlines()[-1].split() == ["cublas", "0.1", f"{flops / 1e8:.4g}", "20.000x"]


# ---- compiling, in processes of its own ------------------------------------------------------------------------------

COMMAND = """
import os, sys
from benchmarks import tune
from benchmarks.variants import compile_all
from vit.kernels.configs import Config

if __name__ == "__main__":
    said = {name: k[0]["error"] for name, k in compile_all({"dies": os.abort}, 90, jobs=1, seconds=60)}
    assert said["dies"] == "crashes the compiler"
    some = [Config(4, 1024), Config(8, 1024, num_warps=1), Config(4, 1024, num_warps=3), Config(2, 1024)]
    tune.of_target = lambda *_: some
    sys.argv = ["tune", "layer_norm", "--jobs", "2"]
    sys.exit(tune.main())
"""


@pytest.mark.skipif(not os.environ.get("THOROUGH"), reason="compiles for 15 seconds; THOROUGH=1 runs it")
def test_command_without_a_gpu(tmp_path):
    """A table; what spills, does not compile or crashes the compiler is dropped."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, heading, _, *lines, last = done.stdout.splitlines()
    assert first.startswith("No NVIDIA GPU here") and heading.endswith("compiled for sm_90, not measured")
    assert " ms" not in done.stdout
    said = {line.split(")")[0].removeprefix("Config("): line for line in lines}
    assert said["block_m=4, block_n=1024"].endswith(" pinned")
    assert " dropped: spills " in said["block_m=8, block_n=1024, num_warps=1"]
    assert " dropped: does not compile" in said["block_m=4, block_n=1024, num_warps=3"]
    assert last == "4 of 4 candidates compiled in time, 2 of them dropped"
