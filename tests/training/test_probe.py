"""The probe against numpy's least squares, and `vit probe` against a probe by hand."""

import csv

import numpy as np
import pytest
import torch

import vit
from vit.commands import cli
from vit.testing.parity import widen
from vit.training import probe as probes
from vit.training.data import open_data, subset
from vit.training.errors import TrainingError

TINY = vit.ViTConfig(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, in_chans=1, num_classes=3)


def by_numpy(x: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """(W, b): least squares of the rows of x and one more row √l2 for each weight, but not for the bias."""
    targets = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    more = np.hstack([np.sqrt(l2) * np.eye(x.shape[1]), np.zeros((x.shape[1], 1))])
    both = np.vstack([np.hstack([x, np.ones((len(x), 1))]), more])
    found, *_ = np.linalg.lstsq(both, np.vstack([targets, np.zeros((x.shape[1], classes))]), rcond=None)
    return found[:-1], found[-1]


def points(n: int, d: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    return rng.normal(size=(classes, d))[labels] + 2 * rng.normal(size=(n, d)) + 5 * rng.normal(size=d), labels


# ---- least squares ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.01, 1.0, 300.0])
@pytest.mark.parametrize(("n", "d"), [(60, 7), (12, 40), (20, 20), (1, 5)])
def test_least_squares_are_numpys(n, d, l2):
    x, labels = points(n, d, 4)
    weight, bias = probes.least_squares(torch.from_numpy(x), torch.from_numpy(labels), 4, l2)
    want, want_bias = by_numpy(x, labels, 4, l2)
    assert weight.dtype is bias.dtype is torch.float64
    np.testing.assert_allclose(weight.numpy(), want, rtol=0, atol=1e-8)
    np.testing.assert_allclose(bias.numpy(), want_bias, rtol=0, atol=1e-8)
    narrow = probes.least_squares(torch.from_numpy(x).float(), torch.from_numpy(labels), 4, l2)[0]
    assert narrow.dtype is torch.float64 and abs(narrow.numpy() - want).max() < 1e-5


def test_linearly_dependent_and_constant_features():
    x, labels = points(30, 4, 3)
    x = np.hstack([x, x[:, :2], np.full((30, 1), 7.0)])
    weight, bias = probes.least_squares(torch.from_numpy(x), torch.from_numpy(labels), 3, 0.1)
    want, want_bias = by_numpy(x, labels, 3, 0.1)
    np.testing.assert_allclose(x @ weight.numpy() + bias.numpy(), x @ want + want_bias, atol=1e-8)
    assert abs(weight[6]).max() < 1e-8  # what does not vary says nothing


def standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, divisor) of the columns."""
    std = np.sqrt(((x - x.mean(0)) ** 2).mean(0))
    return x.mean(0), np.maximum(std, 0.1 * std.mean())


def test_fit_standardises_features():
    """Scores of raw features are those of standardised ones; a feature that hardly varies is not blown up."""
    x, labels = points(50, 6, 3)
    x = np.hstack([x * [1e-3, 1, 10, 1, 1, 1], np.full((50, 1), 3.0)])
    x[0, 6] += 1e-6
    weight, bias, l2 = probes.fit(torch.from_numpy(x), torch.from_numpy(labels), 3, 4.0)
    mean, std = standardised(x)
    want, want_bias = by_numpy((x - mean) / std, labels, 3, 4.0)
    other = np.random.default_rng(1).normal(size=(9, 7)) * 10
    np.testing.assert_allclose(
        (other @ weight.numpy() + bias.numpy()), (other - mean) / std @ want + want_bias, rtol=1e-7, atol=1e-8
    )
    assert l2 == 4.0 and abs(weight[6]).max() < 0.1
    same = probes.fit(torch.ones(6, 2), torch.arange(6) % 3, 3, 1.0)  # nothing varies
    assert torch.isfinite(same[0]).all() and torch.allclose(same[1], torch.full((3,), -1 / 3, dtype=torch.float64))


@pytest.mark.parametrize("n", [12, 30])
def test_the_regularisation_has_the_most_correct_folds(n):
    x, labels = points(n, 20, 3)
    order = np.random.default_rng(4).permutation(n)
    x, labels = x[order], labels[order]
    *_, found = probes.fit(torch.from_numpy(x), torch.from_numpy(labels), 3)
    mean, std = standardised(x)
    x, folds, correct = (x - mean) / std, min(5, n // 3), {}
    place = np.array([(labels[:i] == labels[i]).sum() for i in range(n)])
    for l2 in probes.L2:
        correct[l2] = 0
        for fold in range(folds):
            held = place % folds == fold
            weight, bias = by_numpy(x[~held], labels[~held], 3, l2)
            correct[l2] += ((x[held] @ weight + bias).argmax(1) == labels[held]).sum()
    assert min(correct.values()) < max(correct.values())
    assert found == max(l2 for l2 in probes.L2 if correct[l2] == max(correct.values()))


def test_one_image_of_each_class_has_no_folds():
    x, labels = points(3, 5, 3)
    assert probes.fit(torch.from_numpy(x), torch.from_numpy(labels), 3)[2] == 1024


# ---- images ----------------------------------------------------------------------------------------------------------


def test_shots_are_nested_and_of_each_class():
    labels = np.array([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 0, 0])
    indices = np.array([0, 1, 2, 3, 4, 6, 7, 8, 9, 10])
    few, more = (probes.shots_of(indices, labels, "abc", shots, 3) for shots in (1, 2))
    assert set(few) < set(more) <= set(indices) and np.bincount(labels[more]).tolist() == [2, 2, 2]
    assert len({tuple(probes.shots_of(indices, labels, "abc", 2, seed)) for seed in range(9)}) > 3
    with pytest.raises(TrainingError, match="class 'c' has 2 training images, so --shots 3 is too many"):
        probes.shots_of(indices, labels, "abc", 3, 0)


def test_features_are_what_the_head_reads():
    image = torch.randn(5, 1, 8, 8)
    for fields in ({}, {"global_pool": "avg", "fc_norm": True}, {"representation_size": 6}):
        model = vit.VisionTransformer(vit.ViTConfig(**vars(TINY) | fields), seed=0).eval()
        widen(model, torch.Generator().manual_seed(1))
        features = probes.features_of(model)(image)
        assert features.shape == (5, 6 if "representation_size" in fields else 16)
        torch.testing.assert_close(model.head(features), model(image))
    model = vit.VisionTransformer(vit.ViTConfig(**vars(TINY) | {"global_pool": "", "num_classes": 0}), seed=0).eval()
    torch.testing.assert_close(probes.features_of(model)(image), model(image)[:, 1:].mean(1))


def test_raw_pixels():
    image = torch.randn(2, 3, 8, 6)
    assert torch.equal(probes.raw_pixels(image), image.reshape(2, -1))
    large = torch.randn(2, 1, 128, 8)
    want = (large[:, :, 0::2] + large[:, :, 1::2]) / 2
    torch.testing.assert_close(probes.raw_pixels(large), want.reshape(2, -1))


# ---- the command -----------------------------------------------------------------------------------------------------


def stripes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [n, 8, 8] of three classes of dim stripes in noise."""
    rng, labels = np.random.default_rng(seed), np.arange(n) % 3
    base = np.indices((8, 8)) // 2 % 2
    pattern = np.stack([base[0], base[1], base[0] ^ base[1]])[labels]
    return (40 * pattern + rng.integers(0, 180, (n, 8, 8))).astype(np.uint8), labels


@pytest.fixture
def here(tmp_path, monkeypatch):
    """data.npz of 90 training and 75 test images, and model.npz with another mean and std than the data's."""
    (x, y), (x_test, y_test) = stripes(90, 0), stripes(75, 1)
    np.savez(tmp_path / "data.npz", images=x, labels=y, x_test=x_test, y_test=y_test)
    model = vit.VisionTransformer(TINY, seed=5).eval()
    widen(model, torch.Generator().manual_seed(1))
    model.pretrained_cfg = {"mean": (0.3,), "std": (0.4,)}
    vit.save_pretrained(model, tmp_path / "model.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_hand(features, images, choice, l2) -> float:
    """The accuracy on the test images; ``features`` of an array [n, 8, 8] that is normalised."""
    (x, y), (x_test, y_test) = images
    train, test = (features((part / 255 - 0.3) / 0.4) for part in (x[choice], x_test))
    mean, std = standardised(train)
    weight, bias = by_numpy((train - mean) / std, y[choice], 3, l2)
    return ((((test - mean) / std) @ weight + bias).argmax(1) == y_test).mean()


def with_reference(config, state):
    exact = vit.reference.VisionTransformer(config, seed=0).double().eval()
    exact.load_state_dict(state)
    run = lambda x: exact.forward_head(exact.forward_features(torch.from_numpy(x)[:, None]), pre_logits=True)  # noqa: E731
    return lambda x: run(x).detach().numpy()


@pytest.mark.parametrize("mode", ["--shots", "--max-train-samples"])
def test_the_command_is_a_probe_by_hand(mode, here, capsys):
    """Each number of the CSV, and the table of their means; weights, choices of images and test images are right."""
    amounts = ["4", "9"] if mode == "--shots" else ["14", "50"]
    words = ["probe", "data.npz", "--weights", "model.npz", mode, *amounts, "--seed", "0", "6", "--save", "out.csv"]
    assert cli.main([*words, "-b", "20"]) == 0
    out = capsys.readouterr().out.splitlines()
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    images, labels, accuracies, off = (stripes(90, 0), stripes(75, 1)), stripes(90, 0)[1], {}, []
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        seed, amount = int(row["seed"]), int(row["shots" if mode == "--shots" else "max_train_samples"])
        if mode == "--shots":
            choice = probes.shots_of(np.arange(90), labels, "abc", amount, seed)
        else:
            choice = subset(np.arange(90), labels, amount, seed)
        state = (
            vit.load_pretrained("model.npz")
            if row["features"] == "frozen features"
            else vit.VisionTransformer(TINY, seed)
        )
        flat = row["features"] == "raw pixels"
        encode = (lambda x: x.reshape(len(x), -1)) if flat else with_reference(TINY, state.state_dict())
        off.append(abs(float(row["accuracy"]) - by_hand(encode, images, choice, float(row["l2"]))))
        assert int(row["samples"]) == len(choice) and int(row["dimensions"]) == (64 if flat else 16)
        accuracies.setdefault((row["features"], str(amount)), []).append(100 * float(row["accuracy"]))
    assert max(off) < 1.1 / 75 and sum(o > 1e-9 for o in off) < 2  # fp32 may decide one tie otherwise
    assert len({a for found in accuracies.values() for a in found}) > 6
    assert any("images of 8 x 8, 75 test images, 3 classes" in line for line in out)
    header = next(i for i, line in enumerate(out) if line.startswith("features"))
    assert out[header].split() == ["features", "numbers", *amounts] and "seeds 0, 6" in out[header - 1]
    for line, name in zip(out[header + 1 :], ("frozen features", "random weights", "raw pixels"), strict=False):
        cells = [accuracies[name, amount] for amount in amounts]
        want = [f"{np.mean(c):.1f} ± {np.std(c, ddof=1):.1f}" for c in cells]
        assert line.split() == [*name.split(), "64" if name == "raw pixels" else "16", *" ".join(want).split()]


def test_without_test_images_and_with_one_seed(here, capsys):
    x, y = stripes(90, 0)
    np.savez("train.npz", images=x, labels=y)
    vit.save_pretrained(vit.VisionTransformer(TINY, seed=5), "plain.npz")  # the data's mean and std
    words = ["probe", "train.npz", "--weights", "plain.npz", "--shots", "24", "--seed", "1", "-j", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "images of 8 x 8, 18 held-out training images\n" in out and "; seed 1:\n" in out and "±" not in out
    assert cli.main([*words[:5], "25"]) == 2  # 6 of 30 are held out
    assert "class '0' has 24 training images, so --shots 25 is too many" in capsys.readouterr().err


def test_held_out_images_are_no_training_images(here):
    np.savez("train.npz", images=stripes(90, 0)[0], labels=stripes(90, 0)[1])
    data = open_data("train.npz")
    train, split, tested = probes.held_out(data)
    assert split is data.train and not set(train) & set(tested) and len({*train, *tested}) == 90
    whole = open_data("data.npz")
    train, split, tested = probes.held_out(whole)
    assert split is whole.test and train.tolist() == list(range(90)) and tested.tolist() == list(range(75))


def test_what_is_refused(here, capsys):
    def error(*words) -> str:
        assert cli.main(["probe", *words]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and "±" not in out and not (here / "out.csv").exists()
        return err.removeprefix("vit probe: ").strip()

    weights = ["--weights", "model.npz", "--save", "out.csv"]
    assert error("nowhere", *weights) == "nowhere: no such data set; name a folder, an .npz file, or fashion-mnist"
    assert error("data.npz", "--weights", "x.npz") == "x.npz: there is no such file or folder"
    assert (
        error("data.npz", *weights[:2], "--save", "no/out.csv") == "cannot write no/out.csv: No such file or directory"
    )
    assert error("data.npz", *weights, "--shots", "5", "31") == (
        "class '0' has 30 training images, so --shots 31 is too many"
    )
    assert error("data.npz", *weights, "--max-train-samples", "91") == (
        "91 training images are not possible: there are 90"
    )
    assert error("data.npz", *weights, "--device", "x").startswith("cannot use --device x: ")
    vit.save_pretrained(vit.VisionTransformer(vit.ViTConfig(**vars(TINY) | {"in_chans": 3}), seed=0), "three.npz")
    assert error("data.npz", "--weights", "three.npz") == (
        "three.npz takes images with 3 channels, but data.npz has 1; choose other data or another checkpoint"
    )
    (here / "bad.npz").write_bytes(b"PK")
    assert "bad.npz" in error("data.npz", "--weights", "bad.npz")
    for words in (["--shots", "0"], ["--seed", "-1"], ["-j", "x"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["probe", "data.npz", *weights, *words])
        assert stopped.value.code == 2
