"""`vit attention`: its numbers against a dense softmax, how its pictures lie, and what it refuses."""

import io
import math
import sys

import numpy as np
import pytest
import torch
from peers import import_timm, import_transformers

import vit
from vit.analysis import Tokens
from vit.commands import cli
from vit.testing.parity import widen

pytest.importorskip("PIL.Image")

from PIL import Image

from vit import preprocess
from vit.commands import attention, parity
from vit.commands.overlay import SIDE, STOPS, beside, colours, enlarged, levels, overlay

TINY = {"img_size": (32, 48), "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}
GRID, TOKENS = (4, 6), 26  # with a class token and a register


def make(**fields) -> vit.VisionTransformer:
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"reg_tokens": 1} | fields), seed=0).eval()
    widen(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)  # else attention is nearly uniform
    return model


def picture(seed: int = 0, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with photo.png and a checkpoint, model.npz, as the current one."""
    vit.save_pretrained(make(), tmp_path / "model.npz")
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str, weights: str = "model.npz") -> int:
    """The exit code. Prepares as Hugging Face does, which resizes to the model's size."""
    options = ["--weights", weights] if weights else []
    return cli.main(["attention", *words, *options, "--preprocess", "hf"])


def saved(*words: str, **options) -> dict[str, np.ndarray]:
    assert run(*words, "--save", "a.npz", **options) == 0
    with np.load("a.npz") as file:
        return dict(file)


def dense(model: vit.VisionTransformer, image: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """(logits, probabilities) of each layer [H, N, N] in fp64, from the inputs of the reference's attention."""
    exact = vit.reference.VisionTransformer(model.config, seed=0).double().eval()
    exact.load_state_dict(model.state_dict())
    found = []

    def keep(module, args):
        qkv = module.qkv(args[0])[0].unflatten(1, (3, module.num_heads, -1))  # [N, 3, H, E]
        q, k, _ = qkv.permute(1, 2, 0, 3)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        found.append((logits.detach().numpy(), logits.softmax(-1).detach().numpy()))

    for block in exact.blocks:
        block.attn.register_forward_pre_hook(keep)
    with torch.no_grad():
        exact(image.double())
    assert len(found) == model.config.depth
    return found


def by_hand(layers, grid, side, prefix) -> dict[str, np.ndarray]:
    """The statistics [L, H] with plain loops."""
    places = [(side * y, side * x) for y in range(grid[0]) for x in range(grid[1])]
    apart = np.array([[math.dist(a, b) for b in places] for a in places])
    found = {name: [] for name in ("distance", "renormalised", "entropy", "max_logit", "prefix_mass")}
    for logits, probs in layers:
        patches = probs[:, prefix:, prefix:]
        far = (patches * apart).sum(-1)  # [H, queries]
        found["distance"].append(far.mean(1))
        found["renormalised"].append((far / patches.sum(-1)).mean(1))
        found["entropy"].append(-(probs * np.log(probs)).sum(-1).mean(-1))
        found["max_logit"].append(logits.max((1, 2)))
        found["prefix_mass"].append(probs[:, prefix:, :prefix].sum(-1).mean(-1))
    return {name: np.array(values) for name, values in found.items()}


def rolled(layers) -> np.ndarray:
    together = np.eye(layers[0][1].shape[1])
    for _, probs in layers:
        mixed = probs.mean(0) + np.eye(len(together))
        together = mixed / mixed.sum(-1, keepdims=True) @ together
    return together


# ---- numbers ---------------------------------------------------------------------------------------------------------


def close(found, want):
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * abs(want).max())


def test_saved_arrays_are_those_of_a_dense_softmax(here):
    second = Image.fromarray(picture(1))
    second.save("second.png")
    found = saved("photo.png", "second.png", "--query", "2,5")
    prepare, model = preprocess.preprocessing("hf", (32, 48)), vit.load_pretrained("model.npz")
    query = 2 + 2 * 6 + 5
    for i, name in enumerate(("photo.png", "second.png")):
        layers = dense(model, prepare(preprocess.open_photo(here / name)))
        want = by_hand(layers, GRID, 8, prefix=2)
        for statistic in attention.STATISTICS:
            close(found[statistic][:, i], want[statistic])
        close(found["rows"][:, i], np.stack([probs[:, query] for _, probs in layers]))
        close(found["rollout"][i], rolled(layers)[query])
        close(found["rollout_grid"][i], rolled(layers)[query, 2:].reshape(GRID))
    assert found["rows"].shape == (2, 2, 2, TOKENS) and np.ptp(found["rows"]) > 0.1
    assert found["query"] == query and found["num_prefix_tokens"] == 2 and tuple(found["grid_size"]) == GRID
    assert tuple(found["patch_size"]) == (8, 8) and found["convention"] == "published"
    assert found["images"].tolist() == ["photo.png", "second.png"]
    uniform = np.full((1, TOKENS, TOKENS), 1 / TOKENS)
    assert found["uniform_distance"] == pytest.approx(by_hand([(uniform, uniform)], GRID, 8, 2)["distance"][0, 0])


def test_the_other_convention_divides_by_the_mass_of_patches(here):
    found = saved("photo.png", "--convention", "renormalised")
    image = preprocess.preprocessing("hf", (32, 48))(preprocess.open_photo(here / "photo.png"))
    layers = dense(vit.load_pretrained("model.npz"), image)
    close(found["distance"][:, 0], by_hand(layers, GRID, 8, prefix=2)["renormalised"])
    close(found["rows"][:, 0], np.stack([probs[:, 0] for _, probs in layers]))  # of the class token
    assert found["convention"] == "renormalised" and found["query"] == 0


def look(rows, *, prefix=1, grid=(2, 3), has_class_token=True, query=0, statistics=None, name="p.png"):
    statistics = statistics or {name: np.ones((len(rows), rows[0].shape[0])) for name in attention.STATISTICS}
    tokens, photo = Tokens(prefix, grid, (8, 8)), Image.fromarray(picture(size=(8 * grid[0], 8 * grid[1])))
    rollout = rows[-1].mean(0)
    return attention.Look(
        name, photo, tokens, query, has_class_token, statistics, 9.0, dict(enumerate(rows)), rollout
    )  # fmt: skip


def test_the_sentence_names_the_patch_with_most_of_the_mean_over_heads():
    first, last = np.full((2, 10), 0.1), np.zeros((2, 10))
    last[0, [0, 4 + 5]] = 0.1, 0.22  # (1, 2)
    last[1, 4 + 1] = 0.2  # most of one head
    last[0, 4 + 1] = 0.0
    seen = look([first, last], prefix=4, query=4 + 3)
    last[:, 1] = 0.2
    last[1, 9] = 0.02
    assert seen.sentence == (
        "patch (1, 2) takes 12 % of patch (1, 0)'s attention in layer 1, 1.2 times an equal share; the class token and "
        "3 other prefix tokens take 78 %"
    )
    alone = look([np.full((3, 7), 1 / 7)])
    assert alone.sentence.startswith("patch (0, 0) takes 14 % of the class token's attention in layer 0, 1.0 times")
    assert alone.sentence.endswith("; the class token takes 14 %")
    none = look([np.full((3, 6), 1 / 6)], prefix=0, has_class_token=False, query=2)
    assert none.sentence.endswith("1.0 times an equal share") and none.query_name == "patch (0, 2)"
    register = look([np.full((3, 7), 1 / 7)], has_class_token=False, query=3)
    assert register.sentence.endswith("; 1 other prefix token takes 14 %")


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.0996, "10 %"), (0.094, "9.4 %"), (0.00123, "0.12 %")]
)
def test_percent(share, text):
    assert attention.percent(share) == text


def test_the_table_is_over_heads_and_photographs():
    values = np.array([[1.0, 3.0], [5.0, 9.0]])  # [L, H]
    statistics = {"distance": values, "entropy": values / 10, "max_logit": -values, "prefix_mass": values / 100}
    other = {name: value * 3 for name, value in statistics.items()}
    rows = [np.full((2, 7), 1 / 7)] * 2
    one = attention.table([look(rows, statistics=statistics)]).splitlines()
    assert one[3].split() == ["0", "1.0", "2.0", "3.0", "0.20", "2", "%", "-1.00"]
    assert one[4].split() == ["1", "5.0", "7.0", "9.0", "0.70", "7", "%", "-5.00"]
    assert one[5].split() == ["uniform", "9.0", f"{math.log(7):.2f}", "14", "%"] and len(one) == 6
    assert one[1].index("distance") < one[3].index("2.0") < one[1].index("entropy") and "photographs" not in one[0]
    assert one[3].index("2.0") == one[5].index("9.0") and one[3].index("0.20") == one[5].index("1.95")
    both = attention.table([look(rows, statistics=s) for s in (statistics, other)]).splitlines()
    assert both[3].split() == ["0", "2.0", "4.0", "6.0", "0.40", "4", "%", "-1.00"] and "2 photographs" in both[0]


def test_it_prints_the_table_and_a_sentence_for_each_photograph(here, capsys):
    Image.fromarray(picture(1)).save("second.png")
    before = sorted(here.iterdir())
    assert run("photo.png", "second.png") == 0
    out = capsys.readouterr().out
    assert "resized to 48 x 32" in out and "uniform " in out and "2 photographs" in out
    assert [line.split(":")[0] for line in out.splitlines() if " times an equal share" in line] == [
        "photo.png", "second.png"
    ]  # fmt: skip
    assert sorted(here.iterdir()) == before


# ---- models of other libraries ---------------------------------------------------------------------------------------


@pytest.mark.peers
def test_a_folder_of_transformers_gives_the_numbers_of_its_weights(here):
    import_transformers()
    model = make(reg_tokens=0, img_size=(32, 32), qkv_bias=True, norm_eps=1e-12)
    vit.save_pretrained(model, here / "folder", "hf")
    ours = saved("photo.png", weights="folder")
    theirs = saved("photo.png", "--model", "hf:folder", weights="")
    assert set(ours) == set(theirs) and len(ours) >= 10
    for name, value in ours.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(theirs[name], value, atol=1e-4 * abs(value).max(), err_msg=name)
    wide = saved("photo.png", "--model", "hf:folder", "--img-size", "16x40", weights="")
    assert tuple(wide["grid_size"]) == (2, 5) and wide["rows"].shape == (2, 1, 2, 11)


def test_a_model_of_this_package_by_its_name(here, capsys):
    name = "vit_tiny_patch16_224"
    assert cli.main(["attention", "photo.png", "--model", name, "--img-size", "32x48", "--save", "a.npz"]) == 0
    out = capsys.readouterr().out
    assert f"{name}, random weights" in out and "bicubic" in out and "mean 0.5, std 0.5" in out
    model = vit.create_model(name, seed=0, img_size=(32, 48)).eval()
    widen(model, torch.Generator().manual_seed(0))
    prepare = preprocess.of_timm(model.pretrained_cfg, (32, 48), "")
    want = by_hand(dense(model, prepare(preprocess.open_photo(here / "photo.png"))), (2, 3), 16, prefix=1)
    with np.load("a.npz") as found:
        for statistic in attention.STATISTICS:
            close(found[statistic][:, 0], want[statistic])


@pytest.mark.peers
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_models_of_libraries_are_accelerated_and_see_photographs_as_there(library, here, monkeypatch, capsys):
    timm = import_timm()

    def build(name, img_size, overrides):
        if library == "torchvision":
            from torchvision.models.vision_transformer import VisionTransformer

            return VisionTransformer(24, 8, 2, 2, 32, 64, num_classes=5), "a model"
        options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": img_size or 24}
        return timm.create_model("vit_tiny_patch16_224", **options), "a model"

    monkeypatch.setitem(parity.MAKERS, library, build)
    words = ["attention", "photo.png", "--model", f"{library}:x", "--save", "a.npz"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert ("mean 0.5, std 0.5" in out) if library == "timm" else ("mean 0.485 0.456 0.406" in out)
    with np.load("a.npz") as found:
        assert found["rows"].shape == (2, 1, 2, 10) and tuple(found["grid_size"]) == (3, 3)
        np.testing.assert_allclose(found["rows"].sum(-1), 1, atol=1e-5)
    if library == "timm":
        assert cli.main([*words, "--img-size", "16x32"]) == 0
        with np.load("a.npz") as found:
            assert tuple(found["grid_size"]) == (2, 4)


# ---- photographs -----------------------------------------------------------------------------------------------------


def test_modes_of_photographs(here):
    """Grey, 16 bits, a palette and transparency, which becomes white, give the numbers of the same RGB picture."""
    grey = picture()[..., 0]
    Image.fromarray(grey).convert("RGB").save("want.png")
    Image.fromarray(grey).save("grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save("sixteen.png")
    want = saved("want.png")
    for name in ("grey.png", "sixteen.png"):
        np.testing.assert_array_equal(saved(name)["rows"], want["rows"], err_msg=name)

    clear = np.zeros((64, 96), dtype=bool)
    clear[10:30, 20:50] = True
    flat = np.where(clear[..., None], 255, picture())
    Image.fromarray(flat.astype(np.uint8)).save("white.png")
    Image.fromarray(np.dstack([picture(), np.where(clear, 0, 255).astype(np.uint8)])).save("rgba.png")
    want = saved("white.png")
    np.testing.assert_array_equal(saved("rgba.png")["rows"], want["rows"])

    few = Image.fromarray(picture() // 128 * 255).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    few.convert("RGB").save("eight.png")
    few.save("palette.png")
    assert Image.open("palette.png").mode == "P"
    np.testing.assert_array_equal(saved("palette.png")["rows"], saved("eight.png")["rows"])
    few.save("clear.png", transparency=0)
    pixels = np.array(few.convert("RGB"))
    pixels[np.array(few) == 0] = 255
    assert np.array_equal(np.array(preprocess.open_photo(here / "clear.png")), pixels)


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 51)).save(tmp_path / "p.png")  # a fifth
    assert preprocess.open_photo(tmp_path / "p.png").getpixel((1, 1)) == (244, 224, 204)
    Image.new("LA", (4, 4), (100, 51)).save(tmp_path / "p.png")
    assert preprocess.open_photo(tmp_path / "p.png").getpixel((1, 1)) == (224, 224, 224)


def test_every_orientation_of_a_file_gives_the_same_figure(here):
    """EXIF's orientation n says where row 0 and column 0 of the file are (TIFF 6.0, tag 274)."""
    pytest.importorskip("matplotlib")
    pixels = np.full((64, 96, 3), 40, dtype=np.uint8)
    pixels[:24, :24] = 0, 250, 0  # the upper left corner
    stored = {
        1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.swapaxes(0, 1),
        6: np.rot90(pixels), 7: pixels[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(pixels, -1),
    }  # fmt: skip
    figures = []
    for orientation, array in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(np.ascontiguousarray(array)).save("turned.png", exif=exif)
        assert run("turned.png", "-o", "out.png", "--rollout") == 0
        figures.append((here / "out.png").read_bytes())
    assert len(figures) == 8 and len(set(figures)) == 1
    figure = np.array(Image.open(io.BytesIO(figures[0])).convert("RGB"))
    corner, rest = (np.argwhere((figure == colour).all(-1)) for colour in ((0, 250, 0), (40, 40, 40)))
    assert len(corner) > 1000 and (corner.mean(0) < rest.mean(0) - 50).all()


def test_larger_than_the_screen_is_drawn_as_the_model_sees_it(here):
    pytest.importorskip("matplotlib")
    Image.fromarray(picture(size=(300, 4000))).save("large.png")
    assert run("large.png", "-o", "out.png") == 0
    assert max(Image.open("out.png").size) < 2500


# ---- the overlay, without matplotlib ---------------------------------------------------------------------------------


def test_levels_go_from_the_smallest_to_the_percentile():
    values = np.arange(200.0).reshape(10, 20) / 2 + 7
    values[0, 3] = 1e6  # takes nearly all
    found = levels(values, 99)
    high = np.sort(values.flatten())[[197, 198]] @ [0.99, 0.01]  # numpy's linear rule: place 0.99 · 199
    np.testing.assert_allclose(found, np.clip((values - 7) / (high - 7), 0, 1))
    assert found.min() == 0 and 0.45 < np.median(found) < 0.55
    assert np.median(levels(values, 100)) < 1e-4
    assert (levels(np.full((3, 3), 0.1)) == 0).all()
    spike = np.zeros((20, 20))
    spike[3, 4] = 1
    assert (levels(spike, 99) == spike).all()


def test_colours_become_brighter_with_the_level():
    found = colours(np.linspace(0, 1, 50))
    assert np.array_equal(found[0], STOPS[0]) and np.array_equal(found[-1], STOPS[-1])
    assert (np.diff(found @ [0.299, 0.587, 0.114]) > 0).all()


@pytest.mark.parametrize("corner", [(0, 0), (0, 5), (3, 0), (3, 5)])
def test_the_overlay_is_bright_where_the_level_is(corner):
    """Also where the last patches stick out of the photograph."""
    level = np.zeros((4, 6))
    level[corner] = 1
    photo = Image.new("RGB", (44, 29), (100, 100, 100))
    over = np.array(overlay(photo, level, (8, 8))).astype(float)
    assert over.shape == (29, 44, 3)
    (row, column), inside = corner, np.zeros((29, 44), dtype=bool)
    inside[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
    assert over[inside].mean() > over[~inside].mean() + 60
    middle = over[min(8 * row + 4, 28), min(8 * column + 4, 43)]
    assert abs(middle - (0.2 * 100 + 0.8 * STOPS[-1])).max() < 40
    far = over[28 if row == 0 else 0, 43 if column == 0 else 0]
    assert abs(far - (0.55 * 100 + 0.45 * STOPS[0])).max() <= 1


def test_small_photographs_are_enlarged_and_large_ones_kept():
    assert enlarged(Image.new("RGB", (48, 32))).size == (SIDE, round(SIDE * 32 / 48))
    large = Image.new("RGB", (SIDE + 1, 10))
    assert enlarged(large) is large


def test_beside():
    red, blue = Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("RGB", (7, 4), (0, 0, 255))
    row = np.array(beside(red, blue))
    assert row.shape == (4, 20, 3) and (row[:, 5:13] == 255).all()
    assert (row[:, :5] == (255, 0, 0)).all() and (row[:, 13:] == (0, 0, 255)).all()
    column = np.array(beside(red, blue, down=True))
    assert column.shape == (16, 7, 3) and (column[4:12] == 255).all() and (column[:4, 5:] == 255).all()
    assert (column[:4, :5] == (255, 0, 0)).all() and (column[12:] == (0, 0, 255)).all()


# ---- the figure ------------------------------------------------------------------------------------------------------


def titles(figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes if ax.get_title()]


def drawn(seen, panels=None, layers=(1,), heads=None):
    pytest.importorskip("matplotlib")
    from vit.commands import figures

    return figures.attention(seen, "a $model_", panels or list(figures.PANELS), list(layers), heads, 99.0)


@pytest.fixture
def seen():
    generator = np.random.default_rng(3)
    rows = [row / row.sum(-1, keepdims=True) for row in generator.random((2, 3, 7))]
    distance = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 20.0]])
    return look(rows, statistics={name: distance for name in attention.STATISTICS})


def test_the_figure_has_every_panel_and_the_numbers(seen):
    figure = drawn(seen)
    assert titles(figure)[:4] == [
        "what the model sees", "attention in layer 1,\nmean over heads", "attention rollout,\nall layers",
        "mean attention distance of each head\n(dashed: of uniform attention)",
    ]  # fmt: skip
    share = [attention.percent(seen.rows[1][head, 1:].sum()) for head in range(3)]
    assert titles(figure)[4:] == [f"layer 1, head {head}: {share[head]}" for head in range(3)]
    dots, line = figure.axes[3].get_lines()
    assert list(zip(*dots.get_data(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 4), (1, 5), (1, 20)]
    assert set(line.get_ydata()) == {9.0} and figure.axes[3].get_ylim()[1] > 20
    shown = figure.axes[4].get_images()[0]
    np.testing.assert_allclose(shown.get_array(), levels(seen.grid(seen.rows[1][0]), 99))
    assert tuple(shown.get_extent()) == (0, 24, 16, 0) and shown.origin == "upper"
    assert "Patch (" in figure.get_supxlabel() and figure.get_suptitle() == "p.png · a $model_"


def test_layers_heads_and_panels_choose(seen):
    figure = drawn(seen, ["heads"], [1, 0], [2, -3])
    chosen = [(1, 2), (1, 0), (0, 2), (0, 0)]
    assert [title.split(":")[0] for title in titles(figure)[1:]] == [f"layer {i}, head {h}" for i, h in chosen]
    for ax, (layer, head) in zip(figure.axes[1:], chosen, strict=True):
        np.testing.assert_allclose(ax.get_images()[0].get_array(), levels(seen.grid(seen.rows[layer][head]), 99))
    assert titles(drawn(seen, ["rollout"])) == ["what the model sees", "attention rollout,\nall layers"]
    assert [title[:23] for title in titles(drawn(seen, ["distance"]))] == ["mean attention distance"]
    assert len(titles(drawn(seen, ["rollout", "distance"]))) == 3


def test_a_patch_that_looks_has_a_frame(seen):
    assert not drawn(seen).axes[0].patches
    seen.query = 1 + 3 + 2
    for ax in (figure := drawn(seen)).axes[:3]:
        (frame,) = ax.patches
        assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == (16, 8, 8, 8)
    assert not [p for p in figure.axes[3].patches if p.get_width() == 8]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".pdf", ".svg", ".PNG"])
def test_the_same_numbers_give_the_same_file(seen, suffix):
    first, second = drawn(seen, ["distance"]), drawn(seen, ["distance"])
    from vit.commands import figures

    content = figures.encoded(first, suffix)
    assert content == figures.encoded(second, suffix) and len(content) > 3000
    assert content[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"%PDF", b"<?xm")


def test_several_photographs_make_several_files(here, capsys):
    pytest.importorskip("matplotlib")
    Image.fromarray(picture(1)).save("second.png")
    assert run("photo.png", "second.png", "-o", "out.png", "--distance", "--save", "numbers") == 0
    assert {"out-1.png", "out-2.png", "numbers"} == {p.name for p in here.iterdir()} - {
        "photo.png", "second.png", "model.npz"
    }  # fmt: skip
    assert (here / "out-1.png").read_bytes() != (here / "out-2.png").read_bytes()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("Written")] == [
        "Written: out-1.png", "Written: out-2.png", "Written: numbers"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "panels"),
    [
        ("", ["photograph", "attention", "rollout", "distance", "heads"]),
        ("--rollout", ["rollout"]),
        ("--distance", ["distance"]),
        ("--distance --rollout", ["rollout", "distance"]),
    ],
)
def test_what_the_command_draws(words, panels, here, monkeypatch):
    pytest.importorskip("matplotlib")
    from vit.commands import figures

    asked = []
    monkeypatch.setattr(figures, "attention", lambda *args: asked.append(args))
    monkeypatch.setattr(figures, "encoded", lambda figure, suffix: b"drawn")
    options = ["--layers=-1,0", "--heads", "1", "--clip-percentile", "95", "-o", "out.png"]
    assert run("photo.png", *words.split(), *options) == 0
    ((seen, what, *rest),) = asked
    assert (rest, what) == ([panels, [1, 0], [1], 95.0], "model.npz") and (here / "out.png").read_bytes() == b"drawn"
    assert sorted(seen.rows) == [0, 1] and (seen.rollout is None) is (panels == ["distance"])


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("photo.png --layers 2", "there is no layer 2: the model has layers 0 to 1"),
        ("photo.png --layers=0,-3", "there is no layer -3"),
        ("photo.png --heads 0,2", "there is no head 2: the model has heads 0 to 1"),
        ("photo.png --query 4,0", "query (4, 0) is not in the grid of 4 x 6 patches"),
        ("photo.png --clip-percentile 0", "--clip-percentile must be above 0 and at most 100, got 0"),
        ("photo.png --clip-percentile 101", "got 101"),
        ("photo.png --clip-percentile nan", "got nan"),
        ("absent.png", "vit attention: absent.png: No such file or directory"),
        ("broken.png", "broken.png"),
        ("cut.png", "truncated"),
        ("photo.png broken.png", "broken.png"),
        ("photo.png --save absent/a.npz", "cannot write absent/a.npz: No such file or directory"),
        ("photo.png --save .", "cannot write .: Is a directory"),
        ("photo.png --save photo.png", "photo.png would be replaced"),
        ("photo.png --model timm:x", "give either --weights FILE or --model"),
        ("photo.png --img-size 30x48", "30"),
    ],
)
def test_errors(words, said, here, capsys):
    (here / "broken.png").write_text("no picture")
    (here / "cut.png").write_bytes((here / "photo.png").read_bytes()[:3000])
    before = {path: path.read_bytes() for path in here.iterdir()}
    assert run("--save", "a.npz", *words.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vit attention: ") and captured.err.count("\n") == 1 and said in captured.err
    assert {path: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-o absent/out.png", "cannot write absent/out.png: No such file or directory"),
        ("-o out.bmp", "-o out.bmp must end in .png, .jpg, .pdf, .svg"),
        ("-o photo.png", "photo.png would be replaced"),
        ("-o out.png --save out.png", "out.png would be replaced"),
    ],
)
def test_pictures_that_cannot_be_written(words, said, here, capsys):
    pytest.importorskip("matplotlib")
    before = sorted(here.iterdir())
    assert run("photo.png", *words.split()) == 2
    assert said in capsys.readouterr().err and sorted(here.iterdir()) == before


def test_errors_of_models(here, capsys):
    for weights, words, said in (
        ("", [], "give either --weights FILE or --model"),
        ("absent.npz", [], "absent.npz: there is no such file or folder"),
        ("photo.png", [], "photo.png"),
        ("", ["--model", "vit_tiny"], "vit_tiny names no library; did you mean timm:vit_tiny?"),
        ("", ["--model", "hf:absent"], "hf:absent must name a folder with a config.json"),
    ):
        if "hf:absent" in words and "transformers" not in sys.modules:
            continue
        assert run("photo.png", *words, weights=weights) == 2
        captured = capsys.readouterr()
        assert said in captured.err and captured.err.count("\n") == 1


def test_a_model_that_does_not_tell_its_image_size(here, monkeypatch, capsys):
    monkeypatch.setitem(parity.MAKERS, "timm", lambda *args: (torch.nn.Linear(2, 2), "a model"))
    assert cli.main(["attention", "photo.png", "--model", "timm:x"]) == 2
    assert "does not tell the size of its images; give --img-size" in capsys.readouterr().err


def test_a_model_without_class_token_needs_a_patch(here, capsys):
    vit.save_pretrained(make(class_token=False, reg_tokens=0, global_pool="avg"), "pooled.npz")
    assert run("photo.png", "--save", "a.npz", weights="pooled.npz") == 2
    assert "the model has no class token; give --query ROW,COLUMN of a patch" in capsys.readouterr().err
    assert not (here / "a.npz").exists()
    found = saved("photo.png", "--query", "3,5", weights="pooled.npz")
    assert found["query"] == 23 and found["rows"].shape[-1] == 24
    assert "prefix" not in next(line for line in capsys.readouterr().out.splitlines() if "equal share" in line)


def test_photographs_that_the_model_sees_in_different_sizes(here, capsys, monkeypatch):
    Image.fromarray(picture(size=(64, 120))).save("second.png")
    whole = preprocess.Preprocessing("me", 32, None, 3, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setattr(attention, "preparation", lambda model, args: whole)
    assert run("photo.png", "second.png") == 2
    assert "in different sizes; give them one at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", ["--query 1", "--query a,b", "--query -1,0", "--layers x", "--heads 1,", "--img-size 0"]
)
def test_arguments_that_cannot_be_read(words, here, capsys):
    with pytest.raises(SystemExit) as stop:
        run("photo.png", *words.split())
    assert stop.value.code == 2 and "vit attention: error: argument" in capsys.readouterr().err


def test_without_matplotlib_there_are_numbers_and_no_picture(here, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "matplotlib" else find(name, *args)
    )
    for name in [
        name for name in sys.modules if name.split(".")[0] == "matplotlib" or name.endswith("commands.figures")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    assert run("photo.png", "-o", "out.png", "--save", "a.npz") == 2
    error = capsys.readouterr().err
    assert "pip install matplotlib" in error and error.count("\n") == 1 and not (here / "a.npz").exists()
    assert "distance" in saved("photo.png")


def test_without_pillow_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["attention", "p.png", "--weights", "w"]) == 2
    assert "pip install Pillow" in capsys.readouterr().err
