"""`vit inspect` and `vit.embeddings`: principal components against numpy's SVD, similarities against plain loops."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
import zoo
from torch import nn

import vit
from vit.commands import cli, parity
from vit.commands import inspect as command
from vit.embeddings import embedding_filters, position_similarity
from vit.testing.parity import widen

TINY = {"img_size": (32, 48), "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 1, "num_heads": 2}


def make(**fields) -> vit.VisionTransformer:
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | fields), seed=0).eval()
    widen(model, torch.Generator().manual_seed(1))
    return model


def principal(weight: np.ndarray, count: int) -> np.ndarray:
    """The directions of largest variance of the filters [D, C, PH, PW], from the covariance matrix."""
    filters = weight.astype(np.float64).reshape(len(weight), -1)
    _, vectors = np.linalg.eigh(np.cov(filters.T))
    return vectors.T[::-1][:count].reshape(count, *weight.shape[1:])


def same_up_to_sign(found: torch.Tensor, want: np.ndarray) -> None:
    found = found.numpy()
    assert found.shape == want.shape and found.dtype == np.float64
    for component, wanted in zip(found, want, strict=True):
        assert abs((component * wanted).sum()) == pytest.approx(1, abs=1e-6)
        assert component.flat[abs(component).argmax()] > 0
        assert np.square(component).sum() == pytest.approx(1)


def cosines(table: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """[GH, GW, GH, GW] of position embeddings [GH·GW, D]."""
    table, found = table.astype(np.float64), np.zeros((*grid, *grid))
    for i, a in enumerate(table):
        for j, b in enumerate(table):
            found[i // grid[1], i % grid[1], j // grid[1], j % grid[1]] = a @ b / np.sqrt((a @ a) * (b @ b))
    return found


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"patch_size": (8, 4)}, {"in_chans": 1}, {"img_size": 8}, {"pre_norm": True}])
def test_filters_are_principal_components(fields):
    model = make(**fields)
    with torch.no_grad():
        model.patch_embed.proj.weight.add_(0.5)  # a mean, which is no component
    weight = model.patch_embed.proj.weight.detach().numpy()
    same_up_to_sign(embedding_filters(model, 6), principal(weight, 6))
    filters = weight.reshape(32, -1).astype(np.float64)
    _, _, components = np.linalg.svd(filters - filters.mean(0), full_matrices=False)
    same_up_to_sign(embedding_filters(model, 28), components[:28].reshape(28, *weight.shape[1:]))


def test_the_number_of_filters():
    model = make()
    assert embedding_filters(model).shape == (28, 3, 8, 8) and embedding_filters(model, 32).shape[0] == 32
    for count in (0, 33, -1):
        with pytest.raises(ValueError, match=f"count must be 1 to 32, the number of components, got {count}"):
            embedding_filters(model, count)
    with pytest.raises(ValueError, match="has no patch projection"):
        embedding_filters(nn.Linear(3, 4))


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, 1),
        ({"reg_tokens": 3}, 4),
        ({"reg_tokens": 3, "no_embed_class": True}, 0),
        ({"class_token": False, "global_pool": "avg"}, 0),
        ({"patch_size": (8, 4)}, 1),
    ],
)
def test_similarities_are_cosines_of_patches(fields, prefix):
    model = make(**fields)
    table = model.pos_embed.detach()[0].numpy()
    assert len(table) == prefix + model.config.num_patches
    found = position_similarity(model)
    assert found.dtype is torch.float64 and not found.requires_grad
    np.testing.assert_allclose(found.numpy(), cosines(table[prefix:], model.config.grid_size), atol=1e-12)


def test_a_position_embedding_of_zero_is_similar_to_none():
    model = make()
    with torch.no_grad():
        model.pos_embed[0, 1 + 3] = 0
    found = position_similarity(model)
    assert (found[0, 3] == 0).all() and (found[:, :, 0, 3] == 0).all() and found[0, 2, 0, 2] == pytest.approx(1)


@pytest.mark.peers
@pytest.mark.parametrize(
    ("name", "where", "prefix"),
    [
        ("timm", "pos_embed", 1),
        ("timm DINOv2", "pos_embed", 0),
        ("timm SigLIP", "pos_embed", 0),
        ("timm dynamic size", "pos_embed", 1),
        ("hf ViT", "vit.embeddings.position_embeddings", 1),
        ("hf DeiT", "deit.embeddings.position_embeddings", 2),
        ("hf Dinov2 registers", "embeddings.position_embeddings", 1),
        ("torchvision", "encoder.pos_embedding", 1),
    ],
)
@pytest.mark.parametrize("accelerated", [False, True])
def test_models_of_libraries(name, where, prefix, accelerated):
    model = zoo.build(name)
    if accelerated:
        vit.accelerate(model)
    table = dict(model.named_parameters())[where].detach()[0].numpy()
    assert len(table) == prefix + 9
    np.testing.assert_allclose(position_similarity(model).numpy(), cosines(table[prefix:], (3, 3)), atol=1e-6)
    (conv,) = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3]
    same_up_to_sign(embedding_filters(model, 5), principal(conv.weight.detach().numpy(), 5))


class Rotary(nn.Module):
    """A patch projection and no position embedding."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 32, 4, 4)


class Odd(Rotary):
    """Positions that are no square grid, and no image size."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 99, 8))


def test_models_without_a_known_grid_of_positions():
    with pytest.raises(ValueError, match="Rotary has no position embedding, a parameter named pos_embed or "):
        position_similarity(Rotary())
    with pytest.raises(ValueError, match="99 positions are not prefix tokens and 9 x 9 patches"):
        position_similarity(Odd())
    model = Odd()
    model.pos_embed = nn.Parameter(torch.randn(1, 83, 8))
    assert position_similarity(model).shape == (9, 9, 9, 9)


def test_neighbours_are_means_over_pairs():
    grid = (2, 3)
    similarity = np.random.default_rng(0).random((*grid, *grid))
    places = [(y, x) for y in range(2) for x in range(3)]

    def mean(near):
        return np.mean([similarity[a][b] for a in places for b in places if near(abs(a[0] - b[0]), abs(a[1] - b[1]))])

    assert command.neighbours(similarity) == {
        "neighbours in a row": pytest.approx(mean(lambda dy, dx: (dy, dx) == (0, 1))),
        "neighbours in a column": pytest.approx(mean(lambda dy, dx: (dy, dx) == (1, 0))),
        "all positions of a row": pytest.approx(mean(lambda dy, dx: dy == 0 and dx > 0)),
        "all positions of a column": pytest.approx(mean(lambda dy, dx: dy > 0 and dx == 0)),
        "all pairs": pytest.approx(mean(lambda dy, dx: dy or dx)),
    }
    assert list(command.neighbours(similarity[:1, :, :1])) == [
        "neighbours in a row", "all positions of a row", "all pairs"
    ]  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    vit.save_pretrained(make(), tmp_path / "model.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_saves_and_prints_the_numbers(here, capsys):
    assert cli.main(["inspect", "--weights", "model.npz", "--save", "a.npz"]) == 0
    model = make()
    with np.load("a.npz") as found:
        assert set(found) == {"filters", "variance", "position_similarity"}
        np.testing.assert_array_equal(found["filters"], embedding_filters(model, 28).numpy())
        np.testing.assert_array_equal(found["position_similarity"], position_similarity(model).numpy())
        weight = model.patch_embed.proj.weight.detach().numpy().reshape(32, -1).astype(np.float64)
        values = np.linalg.eigvalsh(np.cov(weight.T))[::-1]
        np.testing.assert_allclose(found["variance"], values[:28] / values.sum(), rtol=1e-6)
        near = found["position_similarity"][:, :-1].reshape(-1)[0]
    out = capsys.readouterr().out
    assert "32 filters of 3 x 8 x 8; the first 28 principal components" in out and near == pytest.approx(1)
    share = 100 * values / values.sum()
    assert f"{share[:28].sum():.1f} % of their variance, the first one {share[0]:.1f} %" in out
    assert "grid of 4 x 6" in out and "neighbours in a column" in out and "Written: a.npz" in out


def test_a_model_without_position_embedding_shows_its_filters(here, monkeypatch, capsys):
    monkeypatch.setitem(parity.MAKERS, "timm", lambda *args: (Rotary(), "a rotary model"))
    assert cli.main(["inspect", "--model", "timm:x", "--save", "a.npz"]) == 0
    assert "position embedding: left out, Rotary has no position embedding" in capsys.readouterr().out
    with np.load("a.npz") as found:
        assert set(found) == {"filters", "variance"} and found["filters"].shape == (28, 3, 4, 4)
    pytest.importorskip("matplotlib")
    assert cli.main(["inspect", "--model", "timm:x", "-o", "out.png"]) == 0
    assert (here / "out.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "give either --weights FILE or --model"),
        ("--weights model.npz --model timm:x", "give either --weights FILE or --model"),
        ("--weights absent", "absent: there is no such file or folder"),
        ("--weights text.npz", "text.npz"),
        ("--model nothing:x", "nothing:x names no library"),
        ("--weights model.npz --save absent/a.npz", "cannot write absent/a.npz"),
        ("--model timm:linear --save a.npz", "Linear has no patch projection"),
    ],
)
def test_errors(words, said, here, monkeypatch, capsys):
    monkeypatch.setitem(parity.MAKERS, "timm", lambda *args: (nn.Linear(2, 2), "no ViT"))
    (here / "text.npz").write_text("no weights")
    before = sorted(here.iterdir())
    assert cli.main(["inspect", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vit inspect: ") and captured.err.count("\n") == 1 and said in captured.err
    assert sorted(here.iterdir()) == before


def test_numbers_need_neither_matplotlib_nor_pillow(here, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name in ("matplotlib", "PIL") else find(name, *args)
    )
    for name in [n for n in sys.modules if n.split(".")[0] in ("matplotlib", "PIL") or n.endswith("commands.figures")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert cli.main(["inspect", "--weights", "model.npz", "-o", "out.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert cli.main(["inspect", "--weights", "model.npz", "--save", "a.npz"]) == 0 and (here / "a.npz").exists()


def test_the_figure_has_each_map_at_its_place():
    pytest.importorskip("matplotlib")
    from vit.commands import figures

    filters = np.random.default_rng(0).normal(size=(9, 3, 4, 6))
    similarity = np.random.default_rng(1).uniform(-1, 1, size=(2, 3, 2, 3))
    figure = figures.inspect(filters, similarity, "a model")
    shown = [ax.get_images()[0].get_array() for ax in figure.axes if ax.get_images()]
    for i, component in enumerate(filters):
        want = (component - component.min()) / np.ptp(component)
        np.testing.assert_allclose(shown[i], want.transpose(1, 2, 0))
    mosaic = shown[9]
    gap = np.ma.getmaskarray(mosaic)[:, 0].sum()
    height, width = (mosaic.shape[0] + gap) // 2, (mosaic.shape[1] + gap) // 3
    zoom = (height - gap) // 2
    assert gap > 0 and width == 3 * zoom + gap
    for y in range(2):
        for x in range(3):
            tile = mosaic[y * height :, x * width :][: 2 * zoom, : 3 * zoom]
            np.testing.assert_array_equal(tile, similarity[y, x].repeat(zoom, 0).repeat(zoom, 1))
    assert figure.axes[14].get_images()[0].get_clim() == (-1, 1)
    one = figures.inspect(filters[:, :1], None, "one channel")
    assert one.axes[0].get_images()[0].get_array().shape == (4, 6) and len(one.axes) == 14
