"""The experiments: their models, tables, statistics, and what survives a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_runs import images

from vit.commands import cli
from vit.experiments import report, tables
from vit.experiments.models import PATCHES, Model, build, permute_patches, sin_cos, training_flops
from vit.experiments.sources import of_classes, sources
from vit.experiments.tables import Settings, settle, table
from vit.experiments.verdict import Claim, statistics, verdict
from vit.training.data import open_data
from vit.training.resnet import SmallResNet

ROOT = Path(__file__).resolve().parents[2]
SMALL = Model(img_size=(8, 8), patch_size=(2, 2))
SHORT = ["-b", "16", "--images-seen", "32", "--seeds", "0", "1", "-j", "1"]  # two steps


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **images(250))
    return str(path)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)


# ---- models ----------------------------------------------------------------------------------------------------------


def test_resnet_has_its_size_and_its_gradients(draw):
    model = SmallResNet(10, 1, seed=1)
    assert 77_000 < sum(p.numel() for p in model.parameters()) < 79_000
    conv = [(1, 16, 9, 784)] + [(16, 16, 9, 784)] * 2  # in, out, taps, places
    for a, b, places in ((16, 32, 196), (32, 64, 49)):
        conv += [(a, b, 9, places), (b, b, 9, places), (a, b, 1, places)]
    products = sum(np.prod(c) for c in conv) + 640
    with FlopCounterMode(display=False) as counter:
        model.eval()(draw(1, 1, 28, 28))
    assert counter.get_total_flops() == 2 * products and 9.2e6 < products < 9.5e6

    model, x, y = model.double().train(), draw(4, 1, 12, 12).double(), torch.tensor([0, 3, 3, 9])
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().max() > 1e-6 for grad in grads.values())
    squares, ends, step = sum((g**2).sum() for g in grads.values()), [], 1e-6
    with torch.no_grad():
        for direction in (1, -2):
            for name, p in model.named_parameters():
                p += direction * step * grads[name]
            ends.append(F.cross_entropy(model(x), y))
    assert (ends[0] - ends[1]).item() / (2 * step) == pytest.approx(squares.item(), rel=1e-4)


def test_cost_of_training_is_that_of_the_counter(draw):
    for model in (Model(), Model("resnet"), Model(pool="avg", positions="none", patches=PATCHES[1])):
        net, x = build(model, 1, 10, 3), draw(6, 1, 28, 28)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(net(x), torch.arange(6)).backward()
        assert training_flops(model, 1, 10) == counter.get_total_flops() / 6 > 5e7


def test_permuted_patches(draw):
    x, order = draw(2, 3, 4, 6), torch.stack([torch.randperm(6) for _ in range(2)])
    found, expected = permute_patches(x, (2, 2), order), torch.empty_like(x)
    for b in range(2):
        for n in range(6):
            (r, c), (i, j) = divmod(n, 3), divmod(order[b, n].item(), 3)
            expected[b, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = x[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
    assert torch.equal(found, expected)


def test_only_a_model_without_positions_ignores_the_order_of_patches(draw):
    x, names = draw(4, 1, 8, 8), ("none", "1-D", "2-D", "sin-cos")
    for how in PATCHES[1:]:
        changes = {}
        for positions in names:
            place, shuffled = (
                build(Model("vit", positions, "avg", p, (8, 8), (2, 2)), 1, 6, 5).eval() for p in (PATCHES[0], how)
            )
            torch.nn.init.normal_(place.head.weight, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                shuffled.model.head.weight.copy_(place.head.weight)
                if positions in ("1-D", "2-D"):
                    for net in (place, shuffled.model):
                        for name, param in net.named_parameters():
                            if "pos_embed" in name:
                                param *= 20
                changes[positions] = (place(x) - shuffled(x)).abs().max().item()
        assert changes["none"] < 1e-5 and all(changes[name] > 1e-2 for name in names[1:]), changes


def test_position_embeddings(draw):
    expected = np.zeros((6, 8))
    for n in range(6):
        for k, frequency in enumerate((1.0, 0.01)):
            r, c = frequency * (n // 3), frequency * (n % 3)
            expected[n, [k, k + 2, k + 4, k + 6]] = np.sin(r), np.cos(r), np.sin(c), np.cos(c)
    np.testing.assert_allclose(sin_cos(2, 3, 8), expected, atol=1e-6)

    one, two, none = (build(Model("vit", p, img_size=(8, 8), patch_size=(2, 2)), 1, 6, 0) for p in ("1-D", "2-D", "none"))  # fmt: skip # noqa: E501
    grid = two.pos_embed[0, 1:].view(4, 4, 64)
    assert torch.equal(grid[..., :32], grid[:, :1, :32].expand(4, 4, 32))
    assert torch.equal(grid[..., 32:], grid[:1, :, 32:].expand(4, 4, 32))
    assert torch.equal(two.pos_embed[0, 0], one.pos_embed[0, 0]) and not none.pos_embed.any()
    assert grid.std().item() == pytest.approx(0.02, rel=0.15)
    torch.nn.init.normal_(two.head.weight)
    two(draw(2, 1, 8, 8)).square().sum().backward()
    learned = {n: p for n, p in two.named_parameters() if "pos_embed" in n}
    assert sorted(p.numel() for p in learned.values()) == [64, 128, 128]
    assert all(p.grad.abs().max() > 0 and p.ndim == 1 for p in learned.values())  # one dimension: no weight decay
    assert none.pos_embed.requires_grad is False


# ---- tables and statistics -------------------------------------------------------------------------------------------


def test_data_scale_is_at_equal_images_and_at_equal_flops(source):
    settings = settle(Settings("data-scale", source, sizes=(20, 100, 10**6), images_seen=6400, batch_size=16))
    data, _ = sources(source, transfer=False, pretrain="", quick=False)
    runs = table(settings, data, None)
    assert len({run.name for run in runs}) == len(runs) == 3 * 3 * 3
    cost = {kind: training_flops(Model(kind, img_size=(8, 8), patch_size=(1, 1)), 1, 6) for kind in ("vit", "resnet")}
    vit, same_images, same_flops = dict.fromkeys(run.series for run in runs)
    seen = {(run.series, run.size): run.steps * run.batch_size for run in runs}
    sizes = sorted({run.size for run in runs})
    assert sizes[:2] == [20, 100] and 100 < sizes[2] < len(data.train)  # all but the validation images
    for size in sizes:
        assert seen[vit, size] == seen[same_images, size] == 6400
        flops = [seen[name, size] * cost[kind] for name, kind in ((vit, "vit"), (same_flops, "resnet"))]
        assert abs(flops[0] - flops[1]) <= 0.5 * 16 * cost["resnet"]  # half a step


def test_halves_of_the_classes(source):
    data = open_data(source)
    part = of_classes(data, (1, 4))
    chosen = np.isin(data.test.labels, (1, 4))
    assert np.array_equal(part.test.labels, data.test.labels[chosen] // 4)
    assert np.array_equal(part.test.pixels(), data.test.pixels()[chosen])
    assert part.classes == ("1", "4") and part.digest != of_classes(data, (1, 3)).digest
    task, other = sources(source, transfer=True, pretrain="", quick=False)
    assert (task.classes, other.classes) == (("0", "2", "4"), ("1", "3", "5"))


def test_verdicts():
    values = {("a", ""): [80.0, 82.0, 84.5], ("b", ""): [79.0, 79.5, 80.0], ("c", ""): [80.2, 81.7, 84.6]}
    values |= {("d", ""): [80.0, 86.0, 82.0], ("e", ""): [75.0, 84.0, 83.0], ("one", ""): [3.0]}
    assert statistics(values["a", ""]) == pytest.approx((np.mean([80, 82, 84.5]), np.std([80, 82, 84.5], ddof=1)))

    def of(a, b, expected):
        return verdict(Claim("", "", {(a, ""): 1.0, (b, ""): -1.0}, expected), values)

    each = np.subtract(values["a", ""], values["b", ""])
    assert of("a", "b", "better")[:2] == pytest.approx((each.mean(), each.std(ddof=1)))
    said = {pair: [of(*pair, kind)[2] for kind in ("better", "as good")] for pair in ("ab", "ba", "ac", "ad", "ae")}
    assert said["ab"] == ["agrees", "does not agree"]
    assert said["ba"] == ["does not agree", "does not agree"]
    assert said["ac"] == ["does not agree", "agrees"]
    assert said["ad"] == said["ae"] == ["within the spread", "within the spread"]  # differences -0.5 and 1.5
    assert verdict(Claim("", "", {("one", ""): 1.0}), values)[2] == "no verdict"


def test_validation_chooses_the_learning_rate():
    def result(lr, seed, test, validation):
        return {"run": {"task": "train", "series": "a", "x": "", "lr": lr}, "test": test, "validation": validation}

    found = report.rows([result(1e-3, 0, 90.0, 60.0), result(1e-3, 1, 90.0, 62.0), result(1e-2, 0, 50.0, 70.0),
                         result(1e-2, 1, 52.0, 53.0)])  # fmt: skip
    assert [(row.lr, row.chosen, row.mean) for row in found] == [(1e-3, False, 90.0), (1e-2, True, 51.0)]


def test_claims_are_about_runs_of_the_table(source):
    for name in tables.EXPERIMENTS:
        settings = settle(Settings(name, source, sizes=(20, 60) if name in ("data-scale", "transfer") else ()))
        data = sources(source, transfer=name == "transfer", pretrain="", quick=False)
        cells = dict.fromkeys((run.series, run.x) for run in table(settings, *data) if run.task != "pretrain")
        claims = tables.claims(name, cells)
        assert claims and all(claim.factors.keys() <= cells.keys() for claim in claims)
        assert all(sum(claim.factors.values()) == 0 for claim in claims)


# ---- the command -----------------------------------------------------------------------------------------------------


def experiment(*args) -> int:
    return cli.main(["experiment", *map(str, args)])


def test_transfer_report(source, tmp_path, capsys):
    more = ["--sizes", "24", "--steps", "2", "--lrs", "1e-3", "3e-3", *SHORT]
    assert experiment("transfer", source, "-o", tmp_path, *more) == 0
    done = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*.json")]
    with (tmp_path / "transfer.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 + 3 and sum(int(row["chosen"]) for row in rows) == 5
    for row in rows:
        mine = [d for d in done if d["run"]["series"] == row["series"] and row["lr"] in ("", str(d["run"]["lr"]))]
        tests = [d["test"] for d in mine]
        assert (int(row["n"]), float(row["test_mean"])) == (2, pytest.approx(np.mean(tests), abs=1e-4))
        assert float(row["test_std"]) == pytest.approx(np.std(tests, ddof=1), abs=1e-4)
        assert all(d["test_images"] == (open_data(source).test.labels % 2 == 0).sum() for d in mine)
    text = (tmp_path / "transfer.md").read_text()
    assert "fine-tuned above from scratch" in text and "(0, 2, 4)" in text and "(1, 3, 5)" in text
    assert (tmp_path / "transfer.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "transfer.md").unlink()
    assert experiment("transfer", source, "-o", tmp_path, *more, "--plot-only") == 0
    assert (tmp_path / "transfer.md").read_text().splitlines()[6:] == text.splitlines()[6:]
    capsys.readouterr()
    assert experiment("transfer", source, "-o", tmp_path, *more, "--impl", "reference") == 2
    assert "was made with impl auto, not reference; choose another -o" in capsys.readouterr().err


@pytest.mark.ci
def test_killed_experiment_continues(source, tmp_path):
    args, finished = ["pooling", source, "--lrs", "1e-3", "2e-3", "4e-3", *SHORT[:-2]], {}
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "vit", "experiment", *args, "-o", str(tmp_path / "a"), "-j", "2"]
    process = subprocess.Popen(words, env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    folder, end = tmp_path / "a/runs", time.time() + 120
    while len(list(folder.glob("*.json"))) < 2 and time.time() < end and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in folder.glob("*.json"):
        finished[path.name] = path.read_bytes(), path.stat().st_mtime_ns
    assert 2 <= len(finished) < 12
    assert experiment(*args, "-o", tmp_path / "a", "-j", "1") == 0
    for name, (content, when) in finished.items():
        assert ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) == (content, when)
    assert experiment(*args, "-o", tmp_path / "b", "-j", "1") == 0
    found = [(tmp_path / name / "pooling.csv").read_text() for name in "ab"]
    assert found[0] == found[1] and found[0].count("\n") == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pooling", "--sizes", "5"], "--sizes is not an option of pooling"),
        (["pooling", "--images-seen", "5"], "--images-seen 5 is no batch of 128"),
        (["pooling", "--seeds", "1", "1"], "--seeds has a value twice"),
        (["data-scale", "--plot-only"], "9 of 9 runs in"),
        (["transfer", "--pretrain", "nowhere"], "nowhere: no such data set"),
        (["transfer", "--img-size", "7"], "images of 7x7 pixels have no half size"),
    ],
)
def test_refusals(source, tmp_path, capsys, args, message):
    assert experiment(args[0], source, "-o", tmp_path, *args[1:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vit experiment: ") and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
