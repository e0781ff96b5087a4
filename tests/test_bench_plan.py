"""`make bench`, without a GPU: the clock, what is measured in which order, and what is written down."""

import gc
import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, plan
from benchmarks import log as record
from benchmarks.largest_batch import largest
from benchmarks.log import Log
from benchmarks.shapes import MODELS

ROOT = Path(__file__).resolve().parent.parent
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
        assert all("ours" in p.providers for p in whole)  # whoever is compared is measured beside ours


def test_nothing_is_begun_that_would_be_stopped(tmp_path, monkeypatch):
    """A compiled provider has a point of its own, so that it takes no other's result along, and time enough or none."""
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
