"""`benchmarks.tune` without a GPU: candidates, choice and output."""

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

ROOT = Path(__file__).parents[2]
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
    assert Config(128, 256, 64, 8, 8, 3, 4) in found["mlp"]  # compiles without spills
    assert Config(128, 256, 64, 8, 4, 3, 2, warp_specialize=True) in found["mlp"]
    assert Config(128, 256, 64, 8, 4, 3, 2) not in found["mlp"]  # 256 accumulators per thread
    assert not any(c.warp_specialize for c in all_candidates(80)["mlp"])
    for c in found["mlp"]:
        assert 2 * c.num_stages * (c.block_m + c.block_n) * c.block_k <= 232_448
    assert {c.block_n for c in found["layer_norm"]} == {1024}  # a whole row


def test_the_nearest_are_tried_first():
    of = all_candidates(90)["attention_fwd"]
    changed = [sum(a != b for a, b in zip(*map(dataclasses.astuple, (c, of[0])), strict=True)) for c in of]
    assert changed == sorted(changed) and changed[:2] == [0, 1]
    of = all_candidates(90)["gemm_fc2"]
    assert {*of[1:8]} > {*FORMS} - {of[0]} and of[0] == configs.gemm(90, torch.bfloat16, "ieee")
    assert [c.pingpong for c in of[:3]] == [False, True, False]
    assert not any(c.pingpong for arch in (80, 100) for c in all_candidates(arch)["gemm_fc2"])


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
    """A trial of LayerNorm with 9 rows that calls ``ours(current config, x, weight, bias)``."""

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
    """(configurations of the calls, milliseconds by configuration), which replaces the clock."""
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

    times |= {FIRST: 2.0, OTHER: 1.0, THIRD: 0.1}  # THIRD is wrong
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
    """The interpreted ops are timed. The candidate reaches the kernel and is right."""
    target, shape = tune.TARGETS[name], Shape("vit_tiny_patch16_224", 1, 32)
    trial = tune.Trial(target, shape, torch.float32, device)
    found = candidates(target.function, 0, shape, torch.float32, target.role)
    used = next(c for c in found[1:] if c.block_m != found[0].block_m)
    log = log_of(tmp_path / "tune.json")
    winner, ms, pinned_ms = tune.tune(name, trial, [found[0], used], {}, log)
    assert winner in (found[0], used) and 0 < ms <= pinned_ms
    assert log.ok and {r["config"] for r in log.records} == {tune.text_of(c) for c in (found[0], used)}


def test_cublas_stands_beside_the_candidates(device, tmp_path, monkeypatch, capsys):
    """cuBLAS is never chosen, however fast it is."""
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


# ---- compiling, in separate processes --------------------------------------------------------------------------------

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


@pytest.mark.ci
def test_command_without_a_gpu(tmp_path):
    """It prints a table, and drops what spills, does not compile or crashes the compiler."""
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


# ---- more of the candidates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_candidate_is_beyond_what_a_program_can_have(arch, dtype):
    """Blocks are powers of two. Accumulators and elements per thread and shared memory have limits."""
    size = 2 if dtype is torch.bfloat16 else 4
    for name, found in all_candidates(arch, dtype).items():
        target = tune.TARGETS[name]
        for c in found[1:]:
            threads = 32 * c.num_warps
            assert c.num_warps in (1, 2, 4, 8, 16), name
            for block in (c.block_m, c.block_n, c.block_k):
                assert block & (block - 1) == 0, name
            if target.function == "gemm":
                groups = 2 if c.warp_specialize else 1
                assert c.block_m * c.block_n / (threads * groups) <= 128
                assert c.num_stages * (c.block_m + c.block_n) * c.block_k * size <= 227 * 1024
                assert c in FORMS or (c.block_k * size in (64, 128) and c.group_m in (8, 16))
                assert not c.warp_specialize or (arch == 90 and c.num_warps == 4) or c in FORMS
            elif target.function in ("layer_norm", "elementwise"):
                assert 4 <= c.block_m * c.block_n / threads <= 64
                assert c.block_n == 1024 if target.function == "layer_norm" else c.block_n <= 1024
            elif target.function == "patch_embed":
                m, n, k = c.block_m, c.block_n, c.block_k
                rows, cols, inner = {"fwd": (m, n, k), "dw": (n, k, m), "dimage": (m, k, n)}[target.role]
                assert rows * cols / threads <= 128 and c.num_stages * (rows + cols) * inner * size <= 227 * 1024


def test_forms_that_are_new_come_before_all_others_but_the_pinned_one():
    """In every target, candidates that differ in more fields come later."""
    for name, found in all_candidates(90).items():
        first = dataclasses.astuple(found[0])
        differs = [
            0 if c in FORMS else sum(a != b for a, b in zip(dataclasses.astuple(c), first, strict=True)) for c in found
        ]
        assert differs == sorted(differs), name


def test_fc1_is_tried_with_both_gelus_side_by_side():
    target = tune.TARGETS["gemm_fc1"]
    found = tune.of_target(target, 90, B, torch.bfloat16)
    assert [c.cheap for c in found] == [found[0].cheap, False] * (len(found) // 2)
    assert all(dataclasses.replace(a, cheap=False) == b for a, b in zip(found[::2], found[1::2], strict=True))
    other = tune.TARGETS["gemm_fc2"]
    assert tune.of_target(other, 90, B, torch.bfloat16) == candidates("gemm", 90, B, torch.bfloat16)


def test_what_each_target_times():
    """(function, op, mode, role, impl) of each target."""
    found = {name: (t.function, t.bench.op, t.mode, t.role, t.impl) for name, t in tune.TARGETS.items()}
    assert found == {
        "mlp": ("gemm", "mlp", "full", None, "auto"),
        "linear": ("gemm", "qkv", "full", None, "triton"),
        "gemm_fc1": ("gemm", "fc1", "fwd", None, "triton"),
        "gemm_fc2": ("gemm", "fc2", "fwd", None, "triton"),
        "gemm_qkv": ("gemm", "qkv", "fwd", None, "triton"),
        "gemm_proj": ("gemm", "proj", "fwd", None, "triton"),
        "attention_fwd": ("attention_fwd", "attention", "fwd", None, "triton"),
        "attention_bwd": ("attention_bwd", "attention", "bwd", None, "triton"),
        "layer_norm": ("layer_norm", "residual_layer_norm", "full", None, "triton"),
        "patch_embed_fwd": ("patch_embed", "patch_embed", "fwd", "fwd", "triton"),
        "patch_embed_dw": ("patch_embed", "patch_embed", "bwd", "dw", "triton"),
        "patch_embed_dimage": ("patch_embed", "patch_embed", "bwd", "dimage", "triton"),
        "elementwise": ("elementwise", "dropout", "full", None, "triton"),
    }


# ---- more of the choice, with a fake clock ---------------------------------------------------------------------------


def fake_trial(configs_now):
    """A trial that is right and takes no time. A call returns its configuration."""
    trial = tune.Trial.__new__(tune.Trial)
    inputs = lambda s, rand: {"x": rand(1)}  # noqa: E731
    work = lambda s, e: {"fwd": Work(6e9, 1), "bwd": Work(0, 1)}  # noqa: E731
    bench = Bench("layer_norm", "layer_norm", inputs, work, None, {"ours": None}, compiles=None)
    trial.target, trial.shape = tune.Target("layer_norm", "_layer_norm", bench, "fwd"), SMALL
    trial.dtype, trial.device = torch.float32, torch.device("cpu")
    trial.wrong = lambda config: configs_now.get(config, (1e-7, None))
    trial.ready = lambda config: lambda: config
    return trial


def clock(monkeypatch, ms):
    """``ms`` of each configuration: a number, or (first round, final round)."""
    asked = []

    def milliseconds(fns, device, **how):
        asked.append((len(fns), how))
        final = how["rounds"] == 5
        found = {name: ms[fn()] for name, fn in fns.items()}
        return {name: [t[final] if isinstance(t, tuple) else t] * 3 for name, t in found.items()}

    monkeypatch.setattr(tune, "milliseconds", milliseconds)
    monkeypatch.setattr(tune, "release", lambda device: None)  # slow
    return asked


SEVERAL = [Config(block_m=m, block_n=256, num_warps=4) for m in (1, 2, 4, 8, 16, 32)]


def test_the_best_three_are_timed_once_more_beside_the_pinned_one(monkeypatch, tmp_path, capsys):
    """The final round decides, not the short first one."""
    first, second, third, fourth, fifth, sixth = SEVERAL
    ms = {first: 4.0, second: 5.0, third: (2.0, 3.0), fourth: (1.0, 3.5), fifth: (3.0, 2.5), sixth: (3.9, 0.1)}
    asked, log = clock(monkeypatch, ms), log_of(tmp_path / "tune.json")
    winner, best, before = tune.tune("layer_norm", fake_trial({}), SEVERAL, {}, log)
    assert (winner, best, before) == (fifth, 2.5, 4.0)
    assert asked == [(2, {"rounds": 2, "rep_ms": 15})] * 6 + [(4, {"rounds": 5})]
    short, final = log.records[:6], log.records[6:]
    assert [r["ratio"] for r in short] == pytest.approx([1, 0.8, 2, 4, 4 / 3, 4 / 3.9])
    assert [r["pinned"] for r in short] == [True] + [False] * 5 and not any("final" in r for r in short)
    texts = [tune.text_of(c) for c in (first, fourth, third, fifth)]
    assert [r["config"] for r in final] == texts and [r["chosen"] for r in final] == [False, False, False, True]
    assert [r["ratio"] for r in final] == pytest.approx([1, 4 / 3.5, 4 / 3, 1.6]) and all(r["final"] for r in final)
    assert {(r["bench"], r["op"], r["shape"], r["mode"]) for r in log.records} == {
        ("tune", "layer_norm", str(SMALL), "fwd")
    }
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[-3:] == ["2.5", "2.4", "1.600x"]  # ms, TFLOP/s, beside the pinned one


@pytest.mark.parametrize(("ms", "stays"), [(1.0 / 1.019, True), (1.0 / 1.021, False), (1.0, True), (1.5, True)])
def test_two_per_cent_are_worth_a_change(ms, stays, monkeypatch, tmp_path):
    clock(monkeypatch, {FIRST: 1.0, OTHER: ms})
    winner, best, before = tune.tune("layer_norm", fake_trial({}), [FIRST, OTHER], {}, log_of(tmp_path / "t.json"))
    assert (winner == FIRST) is stays and before == 1.0 and best == pytest.approx(1.0 if stays else ms)


def test_an_error_of_a_candidate_or_the_end_of_the_time_leaves_the_rest(monkeypatch, tmp_path):
    clock(monkeypatch, {FIRST: 1.0, OTHER: 0.5, THIRD: 0.4})
    trial = fake_trial({THIRD: (float("nan"), "parity: nan")})

    def ready(config, right=trial.ready):
        if config == OTHER:
            raise Exception("out of resource")  # Triton's own errors are no RuntimeErrors
        return right(config)

    trial.ready, log = ready, log_of(tmp_path / "t.json")
    compiled = {THIRD: [{"registers": 7, "spill": 0, "shared": 5, "wgmma": 0, "tma": 0}]}
    assert tune.tune("layer_norm", trial, [FIRST, OTHER, THIRD], compiled, log)[0] == FIRST
    first, other, third, _ = log.records
    assert first["ok"] and other["error"] == "Exception: out of resource: not timed" and not other["ok"]
    assert third["error"] == "parity: nan: not timed" and third["error_rms"] is None and third["registers"] == 7
    assert "registers" not in first and first["error_rms"] == 1e-7
    late = log_of(tmp_path / "late.json")
    late.deadline = 0.0
    assert (
        tune.tune("layer_norm", fake_trial({}), [FIRST, OTHER], {}, late)[0] == FIRST
    )  # the pinned one always is timed
    assert [r.get("skipped") for r in late.records] == [None, "budget", None] and late.ok


# ---- the command without the compiler --------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """`python -m benchmarks.tune` without a GPU and without the interpreter: returns what would be compiled."""
    asked = []

    def compiles(name, shape, dtype, found, arch, jobs, seconds):
        asked.append((name, str(shape), dtype, len(found), arch, jobs, seconds))
        return {}

    monkeypatch.setattr(tune.runtime, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tune, "compile_candidates", compiles)

    def call(*words):
        monkeypatch.setattr("sys.argv", ["tune", *words])
        assert tune.main() == 0
        return asked

    return call


@pytest.mark.parametrize(
    ("op", "names"),
    [
        ("attention", ["attention_fwd", "attention_bwd"]),
        ("gemm", ["gemm_fc1", "gemm_fc2", "gemm_qkv", "gemm_proj"]),
        ("patch_embed", ["patch_embed_fwd", "patch_embed_dw", "patch_embed_dimage"]),
        ("mlp", ["mlp"]),
        ("layer_norm", ["layer_norm"]),
        ("gemm_fc2", ["gemm_fc2"]),
    ],
)
def test_an_op_stands_for_all_its_targets(op, names, command):
    asked = command(op, "--jobs", "3", "--limit", "5")
    assert [name for name, *_ in asked] == names
    assert {rest[1:] for rest in asked} == {(str(B), torch.bfloat16, 5, 90, 3, 60)}


def test_options_of_tuning_reach_the_compiler(command):
    words = "linear --shape vit_tiny_patch16_224/b3 --dtype float16 --budget 7 --arch 80 --jobs 2"
    ((name, shape, dtype, count, *rest),) = command(*words.split())
    assert (name, shape, dtype) == ("linear", "vit_tiny_patch16_224/b3", torch.float16) and rest == [80, 2, 7]
    assert count == len(candidates("gemm", 80, Shape("vit_tiny_patch16_224", 3), torch.float16))
