"""Batches: bits that depend on seed, epoch and sample only; augmentation and mixtures against numpy and Pillow."""

import multiprocessing
import os
import signal
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_folder

from vit.training import augment
from vit.training.augment import Augment, fit, mix, uniforms
from vit.training.data import ArraySplit, open_data
from vit.training.errors import TrainingError
from vit.training.loader import Batches

RNG = np.random.default_rng(0)
SPLIT = ArraySplit(RNG.integers(0, 256, (50, 12, 8, 3), np.uint8), RNG.integers(0, 5, 50))
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def batches(split=SPLIT, indices=None, **options):
    defaults = {"batch_size": 8, "img_size": (12, 8), "mean": MEAN, "std": STD, "augment": Augment(), "seed": 7}
    defaults |= {"shuffle": True, "drop_last": True}
    return Batches(split, np.arange(len(split)) if indices is None else indices, **(defaults | options))


def assert_same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for (images, labels), (others, other_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(images, others) and torch.equal(labels, other_labels)


def test_evaluation():
    """Order and numbers of numpy; the last batch is smaller."""
    indices = np.arange(49, 10, -1)
    taken = batches(indices=indices, augment=None, shuffle=False, drop_last=False)
    images, labels = (torch.cat(parts).numpy() for parts in zip(*taken.epoch(3), strict=True))
    expected = (SPLIT.pixels()[indices].transpose(0, 3, 1, 2) / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[
        :, None, None
    ]
    assert images.dtype == np.float32 and labels.dtype == np.int64 and (labels == SPLIT.labels[indices]).all()
    np.testing.assert_allclose(images, expected, atol=2e-6)
    assert taken.steps == 5 and [len(x) for x, _ in taken.epoch(0)] == [8, 8, 8, 8, 7]


def test_every_image_once_in_another_order():
    unchanged = batches(augment=Augment("none"), batch_size=10)
    orders = []
    for epoch in (0, 1, 0):
        labels, seen = [], []
        for images, y in unchanged.epoch(epoch):
            pixels = (images * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)) * 255
            pixels = pixels.round().to(torch.uint8).movedim(1, 3).numpy()
            seen += [int((SPLIT.pixels() == image).all((1, 2, 3)).argmax()) for image in pixels]
            labels += y.tolist()
        assert sorted(seen) == list(range(50)) and (SPLIT.labels[seen] == labels).all()
        orders.append(seen)
    assert orders[0] != orders[1] and orders[0] == orders[2] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize("kind", ["crop-flip", "rrc"])
@pytest.mark.parametrize("source", ["memory", "folder"])
def test_workers_and_resuming_change_no_bit(source, kind, tmp_path):
    split = SPLIT if source == "memory" else open_data(str(write_folder(tmp_path, images=14))).train
    options = {"split": split, "augment": Augment(kind)}
    torch.manual_seed(1), np.random.seed(1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()
    plain, working = batches(**options), batches(**options, workers=2)
    whole = {epoch: list(plain.epoch(epoch)) for epoch in (0, 1)}
    assert not torch.equal(whole[0][0][0], whole[1][0][0])
    assert_same(working.epoch(0), whole[0])
    abandoned = working.epoch(0)
    next(abandoned)
    abandoned.close()
    assert_same(working.epoch(1, start=2), whole[1][2:])
    assert_same(batches(**options).epoch(1, start=3), whole[1][3:])
    assert not list(working.epoch(1, start=plain.steps))
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state[1]).all()


def test_an_image_is_changed_in_the_same_way_in_any_batch():
    small, large = batches(batch_size=1, shuffle=False), batches(batch_size=50, shuffle=False)
    assert torch.equal(torch.cat([x for x, _ in small.epoch(4)]), next(large.epoch(4))[0])
    for other in (large.epoch(3), batches(batch_size=50, shuffle=False, seed=8).epoch(4)):
        assert not torch.equal(next(large.epoch(4))[0], next(other)[0])


def test_skipped_batches_are_not_loaded(monkeypatch, tmp_path):
    split, loaded = open_data(str(write_folder(tmp_path))).train, []
    decode = type(split).__getitem__
    monkeypatch.setattr(type(split), "__getitem__", lambda self, i: loaded.append(i) or decode(self, i))
    assert len(list(batches(split, batch_size=6, shuffle=False).epoch(0, start=2))) == 1
    assert loaded == list(range(12, 18))


def test_processes_share_a_batch(tmp_path):
    """Also its mixtures are those of one process."""
    parts = [batches(rank=rank, world=2) for rank in (0, 1)]
    single = list(batches().epoch(5))
    for step, ((x0, y0), (x1, y1)) in enumerate(zip(*(part.epoch(5) for part in parts), strict=True)):
        x, y = single[step]
        assert torch.equal(torch.stack((x0, x1), 1).flatten(0, 1), x)
        options = {"num_classes": 5, "mixup": 0.4, "cutmix": 1.0, "smoothing": 0.1, "key": (7, 5, step)}
        together = mix(x, y, **options)
        for rank, own in enumerate((mix(x0, y0, **options), mix(x1, y1, **options))):
            assert all(torch.equal(a[rank::2], b) for a, b in zip(together, own, strict=True))
    for split in (SPLIT, open_data(str(write_folder(tmp_path))).train):
        options = {"split": split, "world": 2, "drop_last": False, "indices": np.arange(9), "img_size": (16, 16)}
        tails = [[len(x) for x, _ in batches(rank=rank, **options).epoch(0)] for rank in (0, 1)]
        assert tails == [[4, 1], [4, 0]]
    with pytest.raises(TrainingError, match="not divisible by 3 processes"):
        batches(world=3)
    with pytest.raises(TrainingError, match="7 images do not fill a batch of 8"):
        batches(indices=np.arange(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(workers, tmp_path):
    split = open_data(str(write_folder(tmp_path))).train
    (tmp_path / "dog/3.png").write_bytes((tmp_path / "dog/3.png").read_bytes()[:-60])
    taken = batches(split, batch_size=3, shuffle=False, workers=workers).epoch(0)
    assert [len(next(taken)[0]) for _ in range(3)] == [3, 3, 3]
    with pytest.raises(TrainingError, match=r"dog/3\.png: .*; repair or remove it") as caught:
        next(taken)
    assert "\n" not in str(caught.value)


class Slow(ArraySplit):
    def pixels(self):
        time.sleep(0.2)
        return super().pixels()


def test_a_worker_does_not_die_silently():
    """Ctrl-C, which goes to a process group, does not reach it. When it is killed, the loop hears of it in `epoch`."""
    before = multiprocessing.active_children()
    taken = batches(Slow(SPLIT.pixels(), SPLIT.labels), workers=1, batch_size=1).epoch(0)
    next(taken)
    (worker,) = set(multiprocessing.active_children()) - set(before)
    assert os.getpgid(worker.pid) != os.getpgid(0)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.5)  # nothing is raised here
    with pytest.raises(TrainingError, match=r"loading stopped: DataLoader worker .*choose fewer workers") as caught:
        list(taken)
    assert "\n" not in str(caught.value)


def test_uniforms():
    """Uniform, uncorrelated, and a function of each part of the key."""
    draws = uniforms((1, 2, 3), np.arange(20_000), 4)
    assert (draws >= 0).all() and (draws < 1).all()
    frequencies = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert (((frequencies - 1000) ** 2 / 1000).sum(1) < 45).all()  # chi-squared of 19 degrees: p = 0.0007
    neighbours = np.stack([*draws.T, *np.roll(draws, 1, 0).T, *uniforms((1, 2, 4), np.arange(20_000), 4).T])
    assert np.abs(np.corrcoef(neighbours) - np.eye(12)).max() < 5 / np.sqrt(20_000)
    assert (uniforms((1, 2, 3), np.array([7, 5]), 2) == draws[[7, 5], :2]).all()
    for other in ((0, 2, 3), (1, 3, 3), (1, 2), (2, 1, 3), (-1, 2, 3)):
        assert not (uniforms(other, np.arange(9), 4) == draws[:9]).any()


@pytest.mark.parametrize("kind", ["flip", "crop", "crop-flip"])
def test_crops(kind):
    """Each result is one of numpy's shifts, flipped or not, and all of them occur."""
    image = RNG.integers(1, 256, (16, 8, 1), np.uint8)
    results = Augment(kind)([image] * 400, (16, 8), (0,), np.arange(400)).numpy()[:, 0]
    padded = np.pad(image[..., 0], ((2, 2), (1, 1)))
    windows = {
        (y, x, flip): padded[y : y + 16, x : x + 8][:, :: -1 if flip else 1]
        for y in (range(5) if "crop" in kind else [2])
        for x in (range(3) if "crop" in kind else [1])
        for flip in ([False, True] if "flip" in kind else [False])
    }
    found = [next(key for key, window in windows.items() if (window == result).all()) for result in results]
    assert set(found) == set(windows)
    assert kind == "crop" or 150 < sum(flip for *_, flip in found) < 250


def test_random_resized_crops():
    """Of a ramp, the corners of the result tell the crop: its area is uniform in 8-100 %, its ratio in 3:4 to 4:3."""
    ramp = np.stack(np.meshgrid(np.arange(200), np.arange(200)), -1).astype(np.uint8)
    ramp = np.concatenate((ramp, ramp[..., :1]), -1)  # channel 0: column, channel 1: row
    results = Augment("rrc")([ramp] * 500, (50, 50), (1,), np.arange(500)).float()
    widths = (results[:, 0, 0, 0] - results[:, 0, 0, -1]).abs() * 50 / 49
    heights = (results[:, 1, -1, 0] - results[:, 1, 0, 0]) * 50 / 49
    areas, ratios = (widths * heights / 200**2).numpy(), (widths / heights).log().numpy()
    assert 0.07 < areas.min() < 0.1 and 0.9 < areas.max() < 1.02 and abs(areas.mean() - 0.5) < 0.05
    assert abs(ratios).max() < np.log(4 / 3) + 0.05 and abs(ratios.mean()) < 0.03 and ratios.std() > 0.1
    flipped = (results[:, 0, 0, 0] > results[:, 0, 0, -1]).float().mean()
    assert 0.4 < flipped < 0.6
    assert augment._crop(10, 100, np.full(24, 0.99)) == (slice(0, 10), slice(43, 56))  # no try fits: torchvision's


def test_sizes_are_fitted_as_by_pillow():
    images = [RNG.integers(0, 256, (*size, 3), np.uint8) for size in ((20, 30), (8, 12), (5, 40))]
    for image, result in zip(images, fit(images, (8, 12)).movedim(1, 3).numpy(), strict=True):
        pillow = np.asarray(Image.fromarray(image).resize((12, 8), Image.Resampling.BILINEAR))
        assert np.abs(result.astype(int) - pillow).max() <= 1
    array = RNG.integers(0, 256, (3, 7, 7, 1), np.uint8)
    assert torch.equal(fit(array, (14, 10)), fit(list(array), (14, 10)))
    assert next(batches(img_size=(20, 24), workers=0).epoch(0))[0].shape == (8, 3, 20, 24)


def test_unknown_kind():
    with pytest.raises(TrainingError, match="unknown augmentation 'mirror'; choose one of none, flip, crop, crop-flip"):
        Augment("mirror")


def fake_torchvision(monkeypatch, transforms):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.transforms", transforms)


def test_randaugment(monkeypatch):
    class RandAugment:
        def __call__(self, image):
            assert image.dtype == torch.uint8 and image.shape == (3, 12, 8)
            return torch.randint(256, image.shape, dtype=torch.uint8)

    fake_torchvision(monkeypatch, types.SimpleNamespace(RandAugment=RandAugment))
    state = torch.get_rng_state()
    random = batches(augment=Augment("randaugment"), shuffle=False)
    whole = list(random.epoch(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(random.epoch(0, start=2), whole[2:])
    assert len(torch.cat([x for x, _ in whole]).unique(dim=0)) == 48

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    fake_torchvision(monkeypatch, Broken("torchvision.transforms"))
    with pytest.raises(TrainingError, match=r"requires torchvision.*nms does not exist.*choose 'crop-flip'"):
        Augment("randaugment")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.transforms")
    with pytest.raises(TrainingError, match="requires torchvision"):
        Augment("randaugment")


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.2, 1.0), (0, 0)])
def test_mix(mixup, cutmix):
    """Images and targets against their definition in numpy, with the λ that the targets tell."""
    x, labels = RNG.normal(size=(6, 2, 9, 7)).astype(np.float32), np.arange(6)
    smooth = np.eye(8)[labels] * 0.8 + 0.2 / 8
    kinds, shares = set(), []
    for step in range(60):
        images, targets = mix(
            torch.tensor(x), torch.tensor(labels), 8, mixup=mixup, cutmix=cutmix, smoothing=0.2, key=(0, 1, step)
        )
        share = (targets[0, 0].item() - 0.2 / 8) / 0.8
        np.testing.assert_allclose(targets, share * smooth + (1 - share) * np.roll(smooth, 3, 0), atol=1e-6)
        other = np.roll(x, 3, 0)
        own, theirs = (images.numpy() == x).all((0, 1)), (images.numpy() == other).all((0, 1))
        if (own | theirs).all():
            rows, columns = theirs.any(1), theirs.any(0)
            assert (theirs == rows[:, None] & columns).all()  # a rectangle
            assert (np.diff(np.flatnonzero(rows)) == 1).all() and (np.diff(np.flatnonzero(columns)) == 1).all()
            assert share == pytest.approx(own.mean(), abs=1e-6)
        else:
            np.testing.assert_allclose(images, share * x + (1 - share) * other, atol=1e-5)
        kinds.add("cut" if (own | theirs).all() and theirs.any() else "mix" if not own.all() else "none")
        shares.append(share)
    assert kinds - {"none"} == {name for name, alpha in (("mix", mixup), ("cut", cutmix)) if alpha}
    assert np.std(shares) > 0.15 or not (mixup or cutmix)
    assert not (mixup or cutmix) or abs(np.mean(shares) - (0.5 if not cutmix else 0.55)) < 0.2
