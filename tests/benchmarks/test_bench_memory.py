"""Memory counted on meta tensors is compared with PyTorch's profiler on a CPU, and with counts by hand."""

import contextlib
import dataclasses
import functools
import gc
import json
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import vit
from benchmarks import memory, trace
from benchmarks.shapes import MODELS, SMALL
from vit.kernels import runtime
from vit.layers import Block

SHALLOW = vit.get_config("vit_tiny_patch16_224", img_size=64, depth=1)
CONFIG = vit.get_config("vit_tiny_patch16_224", img_size=64, depth=2)


def reference_blocks():
    return nn.Sequential(*vit.reference.VisionTransformer(CONFIG).blocks)


class OurBlocks(nn.Module):
    """Two narrow blocks with the Triton kernels, without the stem."""

    def __init__(self):
        super().__init__()
        narrow = dataclasses.replace(CONFIG, embed_dim=64, num_heads=2, impl="triton")
        self.blocks = vit.VisionTransformer(narrow).blocks

    def forward(self, x):
        return self.blocks(x)


def allocated(module, x, train):
    """Bytes at the peak of a step, from the events of PyTorch's allocator."""
    trace.step(module, x, train=train)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = trace.step(module, x, train=train)
    live = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def counted(module, x, train, **machine):
    x = x.detach().to("meta").requires_grad_(x.requires_grad)
    found = memory.count(module.to("meta"), x, train, **machine)
    return found.peak - found.parameters - found.images


@pytest.mark.parametrize("train", [False, True])
def test_peak_of_eager_against_the_allocator(train):
    x = torch.randn(8, 17, 192).requires_grad_(train)
    real = allocated(reference_blocks(), x, train)
    assert counted(reference_blocks(), x, train) == pytest.approx(real, rel=1e-3 if train else 0)  # seeds of dropout


@pytest.mark.interpreted
@pytest.mark.parametrize("train", [False, True])
def test_peak_of_ours_against_the_allocator(train, monkeypatch):
    """The interpreter runs the same host code."""
    launch = runtime.launch

    def launch_and_let_go(*args, **kwargs):  # the interpreter's reference cycles hold the arguments
        launch(*args, **kwargs)
        gc.collect(0)

    monkeypatch.setattr(runtime, "launch", launch_and_let_go)
    x = torch.randn(2, 9, 64).requires_grad_(train)
    gc.disable()  # otherwise the cycles may leave generation 0
    try:
        real = allocated(OurBlocks(), x, train)
    finally:
        gc.enable()
    machine = {"arch": 0, "num_sms": runtime.num_sms(x.device)}
    assert counted(OurBlocks(), x, train, **machine) == pytest.approx(real, rel=0.01 if train else 0)


@pytest.mark.parametrize(("provider", "units"), [("ours", 10), ("reference", 16)])
def test_saved_by_a_block_by_hand(provider, units):
    """In token matrices, ours saves two streams, qkv, o and h. PyTorch also saves two norms and gelu(h)."""
    shape = MODELS["B/16"]
    make = memory.factory(provider, shape)
    u = 2 * shape.rows * shape.width
    statistics = 4 * shape.rows * 4  # mean and rstd of two norms, fp32
    logsumexp = shape.rows * shape.heads * 4
    expected = units * u + statistics + logsumexp * (2 if provider == "ours" else 1)  # ours saves two numbers
    assert memory.saved_by_a_block(make, shape.batch, shape.config.depth) == pytest.approx(expected, abs=4096)


@pytest.mark.parametrize(("separates", "share"), [(True, 0.63), (False, 0.68)])
def test_peak_beside_eager(separates, share):
    """Of a step, also if the last block computes all tokens, as in other libraries' models; and of a forward."""
    shape = MODELS["B/16"]

    def peak(provider, train):
        return memory.count(*memory.factory(provider, shape)(shape.batch), train).peak

    with contextlib.nullcontext() if separates else patch.object(Block, "separates", lambda self: False):
        assert peak("ours", True) < share * peak("reference", True)
        assert peak("ours", False) < peak("reference", False)


@pytest.mark.peers
def test_other_libraries_models():
    """timm and transformers need as much as the reference. timm's accelerated model needs as much as ours."""
    import peers

    peers.import_timm()
    peers.import_transformers()
    shape = dataclasses.replace(MODELS["B/16"], batch=16)
    found = {p: memory.count(*memory.factory(p, shape)(16), train=True) for p in memory.PROVIDERS}
    with patch.object(Block, "separates", lambda self: False):  # timm's last block computes all tokens
        found["ours"] = memory.count(*memory.factory("ours", shape)(16), train=True)
    for theirs, same in (("timm", "reference"), ("hf", "reference"), ("accelerated", "ours")):
        assert found[theirs].saved == pytest.approx(found[same].saved, rel=1e-3), theirs
        assert found[theirs].peak == pytest.approx(found[same].peak, rel=0.01), theirs


def test_storages_are_followed_to_their_end():
    x = torch.empty(1000, device="meta")
    with memory.Live() as live:
        live.ignore(x)
        a = x + x
        view = a[10:].view(-1, 10)
        del a
        assert live.live == 4000
        b = view * 2
        assert (live.live, live.peak) == (4000 + b.nbytes, 4000 + b.nbytes)
        del view
        x.add_(1)
        assert (live.live, live.peak) == (b.nbytes, 4000 + b.nbytes)
        del b
    assert live.live == 0


@pytest.mark.parametrize("train", [False, True])
def test_largest_batch_is_the_largest(train):

    def make(batch):
        return vit.VisionTransformer(SHALLOW, device="meta"), torch.empty(batch, 3, 64, 64, device="meta")

    limit = 30e6
    batch = memory.largest_batch(make, limit, train)
    peaks = [memory.count(*make(n), train).peak for n in (batch, batch + 1)]
    assert peaks[0] <= limit < peaks[1]
    assert memory.largest_batch(make, 2**20, train) == 0
    assert memory.largest_batch(make, peaks[0], train) == batch


def test_command(tmp_path, capsys):
    out = tmp_path / "memory.json"
    assert memory.main(["--shape", str(SMALL), "--provider", "ours", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "counted, not measured" in said and "largest batch" not in said  # not requested
    content = json.loads(out.read_text())
    assert content["about"]["gpu"] == "none: counted, not measured"
    step, forward = content["records"]
    assert (step["mode"], forward["mode"]) == ("full", "fwd") and step["counted"] and step["provider"] == "ours"
    at_least = step["parameters_mb"] + step["gradients_mb"] + step["images_mb"]
    assert at_least < step["peak_mem_mb"] and forward["peak_mem_mb"] < step["peak_mem_mb"]
    assert 11 * step["saved_by_a_block_mb"] < step["saved_mb"] and forward["saved_mb"] == 0


# ---- more of the counts ----------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """A trainable layer, a frozen one, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 32, device="meta"), nn.Linear(32, 16, device="meta")
        self.second.requires_grad_(False)
        self.register_buffer("table", torch.empty(100, device="meta"))

    def forward(self, x):
        return self.second(self.first(x))


def test_memory_of_a_step_by_hand():
    """Only trainable parameters have gradients. Buffers count as parameters. The first layer saves only the image."""
    x, parameters = torch.empty(8, 64, device="meta"), 4 * (64 * 32 + 32 + 32 * 16 + 16 + 100)
    step = memory.count(Frozen(), x, True)
    assert (step.parameters, step.images, step.gradients) == (parameters, 8 * 64 * 4, 4 * (64 * 32 + 32))
    assert step.saved == 0  # the image counts once, and the second layer needs only its weight
    forward = memory.count(Frozen(), x, False)
    assert (forward.gradients, forward.saved) == (0, 0) and forward.parameters == parameters
    assert forward.peak == parameters + x.nbytes + 4 * (8 * 32 + 8 * 16)
    assert step.peak >= parameters + x.nbytes + step.gradients + 4 * 8 * 16


def test_a_tensor_that_is_saved_twice_counts_once():
    class Twice(nn.Module):
        def forward(self, x):
            y = x * 2
            return y * y + y.exp().sin()

    x = torch.empty(1000, device="meta", requires_grad=True)
    found = memory.count(Twice(), x, True)
    assert found.saved == 2 * 4000 and found.parameters == 0  # y, and exp(y), which exp and sin share
    grown = memory.count(Twice(), torch.empty(3000, device="meta", requires_grad=True), True)
    assert grown.saved == 3 * found.saved and grown.images == 3 * found.images


def bent(bend, batch):
    """A peak that is linear except for a corner."""
    return 1000 + 10 * batch + (bend if batch > 48 else 0)


@pytest.mark.parametrize("fit", [0, 1, 31, 32, 33, 63, 64, 65, 200])
def test_the_largest_batch_from_any_peak(fit, monkeypatch):
    """The linear guess may be too low or too high because of a corner."""
    for bend in (-30, 0, 30):
        peak = functools.partial(bent, bend)
        monkeypatch.setattr(memory, "count", lambda batch, train, p=peak: memory.Memory(0, 0, 0, 0, p(batch)))
        limit = peak(fit)
        most = max(batch for batch in range(300) if all(peak(b) <= limit for b in range(1, batch + 1)))
        found = memory.largest_batch(lambda batch: (batch,), limit, True)
        assert peak(found) <= limit < peak(found + 1) and (bend < 0 or found == most)


def test_models_are_made_in_any_batch_and_dtype():
    shape = dataclasses.replace(SMALL, batch=7)
    for dtype in (torch.bfloat16, torch.float32):
        for provider in ("ours", "reference"):
            model, image = memory.factory(provider, shape, dtype)(3)
            assert image.shape == (3, 3, 64, 64) and image.dtype is dtype and image.is_meta
            assert all(p.dtype is dtype and p.is_meta and p.requires_grad for p in model.parameters())
    assert memory.factory("ours", shape)(1)[1].dtype is torch.bfloat16


def test_command_says_what_is_not_installed_and_the_largest_batches(tmp_path, monkeypatch, capsys):
    """The limit is in GiB. The table of several shapes shows the records in MiB."""
    asked = []
    real = memory.records

    def records(shape, provider, gib):
        asked.append((str(shape), provider, gib))
        if provider == "timm":
            raise memory.CannotStart("timm is missing; pip install timm\nmore")
        return real(shape, provider, None)

    monkeypatch.setattr(memory, "records", records)
    out = tmp_path / "memory.json"
    words = [
        "--shape",
        str(SMALL),
        "--provider",
        "reference",
        "--provider",
        "timm",
        "--largest",
        "1.5",
        "--out",
        str(out),
    ]
    assert memory.main(words) == 0
    assert asked == [(str(SMALL), "reference", 1.5), (str(SMALL), "timm", 1.5)]
    said = capsys.readouterr().out
    assert "timm: timm is missing; pip install timm\n" in said and "more" not in said
    step, forward, skipped = json.loads(out.read_text())["records"]
    assert skipped["skipped"] == "timm is missing; pip install timm" and skipped["provider"] == "timm" and skipped["ok"]
    (row,) = [line.split() for line in said.splitlines() if line.startswith("reference")]
    keys = ("parameters_mb", "gradients_mb", "saved_mb", "saved_by_a_block_mb", "peak_mem_mb")
    u = 2 * 2 * 17 * 192 / 2**20
    assert row[1:] == [
        *(f"{step[key]:.0f}" for key in keys), f"{forward['peak_mem_mb']:.0f}",
        f"{step['saved_by_a_block_mb'] / u:.2f}",
    ]  # fmt: skip
    assert f"u = {u:.1f} MiB, one token matrix" in said


def test_records_of_largest_batches(monkeypatch):
    """The step comes first. A GiB has 2^30 bytes."""
    asked = []
    monkeypatch.setattr(memory, "largest_batch", lambda make, size, train: asked.append((size, train)) or 7 + train)
    found = memory.records(SMALL, "ours", 1.5)
    assert asked == [(1.5 * 2**30, True), (1.5 * 2**30, False)]
    assert [(r["op"], r["mode"], r.get("largest_batch")) for r in found] == [
        ("vit", "full", None), ("largest_batch", "full", 8), ("vit", "fwd", None), ("largest_batch", "fwd", 7),
    ]  # fmt: skip
    assert all(r["counted"] and r["bench"] == "memory" and r["shape"] == str(SMALL) for r in found)
    assert [r["gib"] for r in found if "gib" in r] == [1.5, 1.5]
