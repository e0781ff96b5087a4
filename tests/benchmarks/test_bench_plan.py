"""`make bench` without a GPU: timing, the order of measurements, and the records."""

import dataclasses
import gc
import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, plan
from benchmarks import log as record
from benchmarks.largest_batch import largest
from benchmarks.log import Log
from benchmarks.shapes import MODELS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_providers_take_turns():
    order = []
    times = harness.milliseconds({name: lambda name=name: order.append(name) for name in "abc"}, CPU, rounds=3)
    assert "".join(order) == "abcabcabc" and [len(t) for t in times.values()] == [3, 3, 3]
    assert harness.percentiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"ms_p20": 2.0, "ms_p50": 3.5, "ms_p80": 5.0}


def test_modes_compute_what_they_say():
    calls = {"fwd": 0, "bwd": 0}

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls["fwd"] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            calls["bwd"] += 1
            return dx

    x = torch.randn(3, requires_grad=True)
    run = harness.Run(lambda: Count.apply(x), [x], [x])
    for mode, expected in (("fwd", (1, 0)), ("bwd", (0, 1)), ("full", (1, 1))):
        fn = harness.mode_of(run, lambda outs: [torch.ones_like(o) for o in outs], mode)
        calls.update(fwd=0, bwd=0)
        fn()
        assert (calls["fwd"], calls["bwd"]) == expected
        fn()


def test_the_most_wanted_comes_first():
    first = next(plan.points("vit", plan.Wanted(), rehearse=False))
    assert str(first.shape) == "vit_base_patch16_224/b256" and {"ours", "reference", "timm", "hf"} <= {*first.providers}
    for name in plan.SECONDS:
        quick = list(plan.points(name, plan.Wanted(quick=True), rehearse=False))
        whole = list(plan.points(name, plan.Wanted(), rehearse=False))
        assert len(quick) < len(whole) and not any("compile-max" in p.providers for p in quick)
        assert {str(p.shape) for p in whole} >= {str(s) for s in MODELS.values()}
        assert all("ours" in p.providers for p in whole)  # all are compared with ours


def test_nothing_is_begun_that_would_be_stopped(tmp_path, monkeypatch):
    """A compiled provider has its own point, so its failure loses no other result. It starts only with enough time."""
    for name in plan.SECONDS:
        for point in plan.points(name, plan.Wanted(), rehearse=False):
            compiled = [p for p in point.providers if p.startswith("compile")]
            assert len(compiled) <= 1 and plan.least(point) >= (10 if compiled else 4)
    begun = []
    monkeypatch.setattr(plan, "measure", lambda point, *_: begun.append(point))
    monkeypatch.setattr(plan, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(plan, "device_of", lambda rehearse: CPU)
    log = Log(tmp_path / "bench_vit.json", {"gpu": "none"}, deadline=time.monotonic() + 30)
    plan.run(log, False, "vit", plan.Wanted(quick=True))
    gc.unfreeze()
    assert len(begun) == 7 and {r["provider"] for r in log.records} == {"compile"}
    assert [r["skipped"] for r in log.records] == ["budget"]


def test_one_point_can_be_picked():
    wanted = plan.Wanted(ops=("qkv",), shapes=("vit_base_patch16_224/b8",), providers=("cublas",), modes=("bwd",))
    assert wanted.some and list(plan.stages(wanted)) == ["bench_linear"]
    (point,) = plan.points("linear", wanted, rehearse=False)
    assert (point.bench.op, str(point.shape), point.providers, point.modes) == (
        "qkv", "vit_base_patch16_224/b8", ("cublas",), ("bwd",),
    )  # fmt: skip
    wanted = plan.Wanted(ops=("mlp",), shapes=("vit_base_patch16_224/b8",), providers=("cublas", "compile"))
    assert [p.providers for p in plan.points("mlp", wanted, rehearse=False)] == [("cublas",), ("compile",)]
    wanted = plan.Wanted(ops=("mlp",), shapes=("vit_base_patch16_224/b8",))
    assert [p.providers for p in plan.points("mlp", wanted, rehearse=False)] == [
        ("ours", "triton", "cublas"), ("ours", "compile"), ("ours", "compile-max"),
    ]  # fmt: skip
    for wrong in ({"ops": ("mpl",)}, {"shapes": ("b8",)}, {"providers": ("hers",)}, {"modes": ("forward",)}):
        with pytest.raises(ValueError, match=r"there are|not understood"):
            plan.stages(plan.Wanted(**wrong))


def test_without_time_the_rest_is_named(tmp_path):
    log = Log(tmp_path / "bench_mlp.json", {"gpu": "none"}, rehearse=True, deadline=0.0)
    plan.run(log, True, "mlp", plan.Wanted())
    assert [r.get("skipped") for r in log.records] == [None, None, "budget"]


@pytest.mark.parametrize("fit", [0, 1, 2, 3, 137, 1000, 65_536])
def test_the_largest_batch_is_found(fit):
    tried = []
    found = largest(lambda batch: tried.append(batch) or batch <= fit, 2**16)
    assert found <= fit <= 1.03 * found + 1 and len(tried) < 25
    assert fit < 1000 or all(batch % 16 == 0 for batch in tried)


def test_a_copy_without_a_checkout_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.git_commit() is None
    monkeypatch.setenv("COMMIT", "abc1234")
    assert record.git_commit() == "abc1234"


def test_a_checkout_knows_its_commit_better_than_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "abc1234")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.git_commit() and head.startswith(record.git_commit())


def test_every_record_on_disk_says_where_it_is_from(tmp_path):
    log = Log(tmp_path / "bench_x.json", {"gpu": "none", "command": "python -m x"})
    log.add(ok=True, bench="x")
    log.add(ok=True, bench="x", torch="another")
    found = json.loads(log.path.read_text())
    assert set(found["about"]) == {"gpu", "driver", "torch", "triton", "commit", "command", "utc"}
    assert found["records"] == [
        {"ok": True, "bench": "x", **found["about"], **own} for own in ({}, {"torch": "another"})
    ]


def test_the_stages_share_the_whole_budget():
    assert sum(whole for _, whole in plan.SECONDS.values()) <= 600 and sum(q for q, _ in plan.SECONDS.values()) <= 240


# ---- more of the plan ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "some"),
    [
        ({}, False),
        ({"quick": True}, False),
        ({"ops": ("vit",)}, True),
        ({"shapes": ("vit_base_patch16_224/b1",)}, True),
        ({"providers": ("ours",)}, True),
        ({"modes": ("fwd",)}, True),
        ({"dtype": "float16"}, True),
    ],
)
def test_what_is_only_a_part_of_a_run(fields, some):
    """A partial run has its own folder, and searches the largest batches only on request."""
    wanted = plan.Wanted(**fields)
    assert wanted.some is some
    assert plan._sweep("vit", wanted) is (not some and not fields.get("quick"))
    assert not plan._sweep("mlp", wanted)


def test_when_largest_batches_are_looked_for():
    asked = plan.Wanted(ops=("largest_batch",), providers=("ours",))
    assert plan._sweep("vit", asked) and list(plan.stages(asked)) == ["bench_vit"]
    for wanted in (
        dataclasses.replace(asked, quick=True),
        dataclasses.replace(asked, shapes=("vit_base_patch16_224/b1",)),
        plan.Wanted(ops=("vit",)),
    ):
        assert not plan._sweep("vit", wanted)


@pytest.mark.parametrize("quick", [False, True])
def test_a_stage_for_each_file_in_order_with_its_seconds(quick):
    wanted = plan.Wanted(quick=quick)
    found = plan.stages(wanted)
    assert list(found) == [
        f"bench_{name}" for name in ("vit", "attention", "mlp", "layer_norm", "linear", "patch_embed")
    ]
    want = (110, 30, 20, 15, 20, 15) if quick else (335, 75, 45, 40, 50, 30)
    assert tuple(stage.seconds for stage in found.values()) == want
    for name, stage in found.items():
        assert stage.target == "benchmarks.plan:run"
        assert stage.options == {"name": name.removeprefix("bench_"), "wanted": wanted}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", plan.SECONDS)
def test_every_point_has_the_dtype_and_modes_that_are_wanted(name, dtype):
    of_op = {"vit": {"fwd", "full"}, "latency": {"fwd"}}
    for point in plan.points(name, plan.Wanted(dtype=dtype), rehearse=False):
        assert point.dtype is getattr(torch, dtype)
        assert set(point.modes) <= of_op.get(point.bench.op, {"fwd", "bwd", "full"})
    modes = [p.modes for p in plan.points(name, plan.Wanted(modes=("full", "fwd")), rehearse=False)]
    assert {m for of in modes for m in of} == {"fwd", "full"} and all(of == tuple(sorted(of)) or of for of in modes)


def test_an_op_of_a_file_leaves_the_others_out():
    """An op is selected by its name or by that of its file."""
    for ops, want in (
        (("residual_layer_norm",), {"residual_layer_norm"}),
        (("layer_norm",), {"layer_norm", "residual_layer_norm"}),
        (("linear",), {"qkv", "proj", "fc1", "fc2"}),
        (("proj", "fc2", "latency"), {"proj", "fc2", "latency"}),
    ):
        wanted = plan.Wanted(ops=ops)
        points = [p for name in plan.SECONDS for p in plan.points(name, wanted, rehearse=False)]
        assert {p.bench.op for p in points} == want


@pytest.mark.parametrize(
    ("name", "shape", "providers", "seconds"),
    [
        ("mlp", "B/16", ("ours", "triton", "cublas"), 4),
        ("mlp", "L/16", ("ours", "compile"), 14),
        ("mlp", "B/16", ("compile-max",), 44),
        ("vit", "B/16", ("ours", "compile"), 59),
        ("vit", "B/16", ("compile-max-cudnn",), 144),
        ("vit", "L/16", ("compile-cudnn", "compile-reduce"), 4 + 2 * (55 + 15)),
        ("vit", "H/14", ("ours", "compile"), 4 + 55 * 32 / 12),
    ],
)
def test_how_much_time_a_point_needs(name, shape, providers, seconds):
    """The time to compile a model grows with its depth."""
    point = harness.Point(plan.benches(name)[0], MODELS[shape], providers=providers)
    assert plan.least(point) == pytest.approx(seconds)


def test_a_rehearsal_is_small_in_fp32_and_compiles_only_what_is_asked_for(tmp_path, monkeypatch):
    begun, searched = [], []
    monkeypatch.setattr(plan, "measure", lambda point, log, ceilings, device: begun.append((point, device)))
    monkeypatch.setattr(plan, "measure_ceilings", lambda log, device, dtype: begun.append((dtype, device)))
    monkeypatch.setattr(plan.largest_batch, "search", lambda log, side, dtype, device: searched.append((side, dtype)))
    log = Log(tmp_path / "x.json", {"gpu": "none"}, rehearse=True)
    plan.run(log, True, "vit", plan.Wanted())
    gc.unfreeze()
    assert begun[0] == (torch.float32, CPU) and not log.records
    for point, device in begun[1:]:
        assert str(point.shape) == "vit_tiny_patch16_224@64/b2" and point.dtype is torch.float32 and device == CPU
        assert not any(p.startswith("compile") for p in point.providers)
    plan.run(log, True, "vit", plan.Wanted(ops=("largest_batch",)))
    gc.unfreeze()
    assert searched == [(64, torch.float32)]
    asked = plan.points("vit", plan.Wanted(providers=("ours", "compile")), rehearse=True)
    assert [p.providers for p in asked if p.bench.op == "vit"] == [("ours",), ("ours", "compile")]


def test_on_a_gpu_largest_batches_come_last_of_every_side(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(plan, "device_of", lambda rehearse: CPU)
    monkeypatch.setattr(plan, "measure", lambda point, *_: order.append(point.dtype))
    monkeypatch.setattr(plan, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(plan.largest_batch, "search", lambda log, side, dtype, device: order.append((side, dtype)))
    plan.run(Log(tmp_path / "x.json", {"gpu": "none"}), False, "vit", plan.Wanted())
    gc.unfreeze()
    assert order[-5:] == [(side, torch.bfloat16) for side in (64, 128, 224, 384, 512)]
    assert set(order[:-5]) == {torch.bfloat16}


def test_every_provider_without_a_result_is_named_where_time_is_short(tmp_path, monkeypatch):
    """A compiled provider is named. One record without a name stands for a point of several others."""
    monkeypatch.setattr(plan, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(plan, "device_of", lambda rehearse: CPU)
    log = Log(tmp_path / "x.json", {"gpu": "none"}, deadline=0.0)
    plan.run(log, False, "mlp", plan.Wanted(dtype="float16"))
    gc.unfreeze()
    found = [(r["shape"], r["provider"]) for r in log.records]
    assert found == [(str(s), "") for s in MODELS.values()] + [
        (str(MODELS[s]), c) for c in ("compile", "compile-max") for s in ("B/16", "L/16")
    ]
    assert log.ok and {(r["op"], r["bench"], r["dtype"], r["skipped"]) for r in log.records} == {
        ("mlp", "mlp", "float16", "budget")
    }


@pytest.mark.parametrize("at_most", [1, 2, 15, 16, 100])
def test_no_batch_beyond_the_most_is_tried(at_most):
    tried = []
    found = largest(lambda batch: tried.append(batch) or True, at_most)
    assert max(tried) <= at_most and found <= at_most and found * 2 > at_most


def test_a_search_says_what_it_found(tmp_path, monkeypatch):
    """The search covers ours and the reference. If not one image fits, it skips. An error of ours is a failure."""
    from benchmarks import largest_batch

    told = []
    results = {"ours": lambda batch: batch <= 1, "reference": lambda batch: False}

    def fits(name, shape, dtype, device):
        told.append((name, str(shape), dtype))
        return results[name](shape.batch)

    monkeypatch.setattr(largest_batch, "step_fits", fits)
    monkeypatch.setattr(largest_batch, "release", lambda device: None)  # slow
    log = Log(tmp_path / "x.json", {"gpu": "none"})
    largest_batch.search(log, 128, torch.float16, CPU)
    ours, reference = log.records
    assert (ours["provider"], ours["largest_batch"], ours["dtype"], ours["mode"]) == ("ours", 1, "float16", "full")
    assert (ours["op"], ours["shape"], ours["bench"]) == ("largest_batch", "vit_base_patch16_224@128/b1", "vit")
    assert reference["skipped"] == "memory: not one image" and "largest_batch" not in reference and log.ok
    assert told[0] == ("ours", "vit_base_patch16_224@128/b2", torch.float16)
    results["ours"] = lambda batch: 1 / 0
    largest_batch.search(log, 128, torch.float16, CPU)
    assert not log.records[2]["ok"] and "ZeroDivisionError" in log.records[2]["error"] and log.records[3]["ok"]
    late = Log(tmp_path / "y.json", {"gpu": "none"}, deadline=time.monotonic() + 15)
    largest_batch.search(late, 128, torch.float16, CPU)
    assert [r["skipped"] for r in late.records] == ["budget"] * 2


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    """`python -m benchmarks` without the run: returns what would run."""
    from benchmarks import __main__, stages

    asked = []
    monkeypatch.setattr(stages, "run", lambda *args: asked.append(args) or 7)

    def call(*words, gpu=None):
        monkeypatch.setattr("sys.argv", ["python -m benchmarks", *words])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        return __main__.main(), asked

    return call


@pytest.mark.parametrize(
    ("words", "gpu", "folder", "budget", "name"),
    [
        ([], "NVIDIA H100", "benchmarks/results/nvidia-h100", 600, "NVIDIA H100"),
        (["--quick"], "NVIDIA H100", "benchmarks/results/nvidia-h100", 240, "NVIDIA H100"),
        (["--budget", "7.5"], "NVIDIA H100", "benchmarks/results/nvidia-h100", 7.5, "NVIDIA H100"),
        (["--op", "mlp"], "NVIDIA H100", "build/bench/nvidia-h100", 600, "NVIDIA H100"),
        (["--dtype", "float16"], "NVIDIA H100", "build/bench/nvidia-h100", 600, "NVIDIA H100"),
        (["--rehearse"], None, "build/rehearsal", 600, "rehearsal"),
        (["--rehearse"], "NVIDIA H100", "build/rehearsal", 600, "rehearsal"),
    ],
)
def test_where_a_run_writes_and_how_long_it_may_take(command, words, gpu, folder, budget, name):
    code, ((planned, out, seconds, said, rehearse),) = command(*words, gpu=gpu)
    assert code == 7 and out == ROOT / folder and seconds == budget and said == name
    assert rehearse is ("--rehearse" in words) and next(iter(planned)) == (
        "bench_mlp" if "--op" in words else "bench_vit"
    )


def test_what_is_picked_on_the_command_line(command, tmp_path, capsys):
    words = (
        "--op mlp,qkv --shape vit_base_patch16_224/b8,vit_base_patch16_224/b9 --provider ours,cublas --mode fwd,full"
    )
    code, ((planned, out, *_),) = command(*words.split(), "--out", str(tmp_path / "a/b"), "--rehearse")
    assert code == 7 and out == tmp_path / "a/b" and out.is_dir() and list(planned) == ["bench_mlp", "bench_linear"]
    wanted = planned["bench_mlp"].options["wanted"]
    assert (wanted.ops, wanted.modes, wanted.dtype) == (("mlp", "qkv"), ("fwd", "full"), "bfloat16")
    assert wanted.shapes == ("vit_base_patch16_224/b8", "vit_base_patch16_224/b9")
    assert wanted.providers == ("ours", "cublas") and wanted.quick is False
    code, asked = command()
    assert code == 2 and len(asked) == 1 and "No NVIDIA GPU here: nothing was measured." in capsys.readouterr().out


def test_compare_on_the_command_line(command, monkeypatch):
    told = []
    monkeypatch.setattr("benchmarks.compare.main", lambda words: told.append(words) or 1)
    code, asked = command("--compare", "older", "newer")
    assert code == 1 and told == [["older", "newer"]] and asked == []


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_stages_share_the_budget_and_one_that_no_longer_fits_is_named(tmp_path, monkeypatch, capsys):
    from benchmarks import stages

    now, limits = [1000.0], {}

    def run_one(name, stage, out, limit, about, rehearse):
        limits[name] = limit
        now[0] += {"a": 40, "b": 50, "c": 0}[name]
        return {"result": "FAILED" if name == "b" else "ok", "records": 1}

    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stages, "_run_one", run_one)
    wanted = {name: stages.Stage("x:y", seconds) for name, seconds in (("a", 20), ("b", 30), ("c", 30))}
    (tmp_path / "summary.json").write_text('{"earlier": {"result": "ok"}}')
    assert stages.run(wanted, tmp_path, 100, "a card", True) == 1
    assert limits == {"a": 25.0, "b": 30.0}  # 100 · 20 / 80; 60 · 30 / 60; for c 10 of 30 are left
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["earlier", "a", "b", "c"] and summary["a"]["result"] == "ok"
    assert summary["c"]["result"] == "not run: budget" and summary["c"]["left_s"] == 10
    assert all(summary[name]["rehearsal"] is True for name in "abc")
    out = capsys.readouterr().out
    assert "1 of 3 stages ok: not b (FAILED), c (not run: budget)" in out and f"results in {tmp_path}" in out
    now[0], limits["c"] = 1000.0, None
    assert stages.run({"c": wanted["c"]}, tmp_path, 15, "a card", False) == 0 and limits["c"] == 15  # enough
    assert "rehearsal" not in json.loads((tmp_path / "summary.json").read_text())["c"]
