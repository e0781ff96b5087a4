"""The figures of `vit attention` and `vit inspect`, on matplotlib; the same numbers give the same bytes.

Shapes: L layers, H heads, GH x GW patches.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from vit.commands.attention import Look, percent
from vit.commands.overlay import colours, enlarged, levels, overlay

PANELS = ("photograph", "attention", "rollout", "distance", "heads")
DPI = 110
SIDE = 2.9  # inches; the square root of the area of a picture in the first row
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "vit",
    "axes.axisbelow": True,
}  # fmt: skip
COLOURS = ListedColormap(colours(np.linspace(0, 1, 256)) / 255)


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in this module's style, whatever the user's settings are."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return drawn


def encoded(figure: Figure, suffix: str) -> bytes:
    """The file's content, without a date or a version in it."""
    FigureCanvasAgg(figure)
    kind, file = suffix.lower().removeprefix("."), io.BytesIO()
    options = {
        "png": {"metadata": {"Software": None}},
        "jpg": {"pil_kwargs": {"quality": 85}},
        "pdf": {"metadata": {"CreationDate": None}},
        "svg": {"metadata": {"Date": None}},
    }[kind]
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "vit"}):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the name of a file in another script
        figure.savefig(file, format=kind, dpi=DPI, **options)
    return file.getvalue()


@styled
def attention(
    seen: Look, what: str, panels: Sequence[str], layers: Sequence[int], heads: Sequence[int] | None, percentile: float
) -> Figure:
    """The figure of one photograph.

    Args:
        seen: what the model looks at.
        what: a description of the model.
        panels: which of `PANELS`.
        layers: layers of the head maps, a row or more each.
        heads: heads of the head maps; None means all.
        percentile: of the patches of a map, from which on it is bright.
    """
    photo = enlarged(seen.photo)
    aspect = min(max(photo.width / photo.height, 0.5), 2.5)
    pictures = {} if panels == ["distance"] else {"what the model sees": photo}
    aspect = aspect if pictures else 1.0
    if "attention" in panels:
        row = seen.rows[seen.depth - 1].mean(0)
        pictures[f"attention in layer {seen.depth - 1},\nmean over heads"] = _over(photo, seen, row, percentile)
    if "rollout" in panels:
        pictures["attention rollout,\nall layers"] = _over(photo, seen, seen.rollout, percentile)
    widths = [SIDE * aspect**0.5 + 0.1] * len(pictures) + [3.9] * ("distance" in panels)
    width = max(sum(widths), 4.0)

    heads = list(range(len(seen.rows[seen.depth - 1]))) if heads is None else heads
    columns = math.ceil(len(heads) / math.ceil(len(heads) / max(1, int(width / (1.5 * aspect)))))
    rows = math.ceil(len(heads) / columns) * len(layers) if "heads" in panels else 0
    cell = min(width / columns / aspect, 2.0) + 0.25
    caption = textwrap.wrap(_caption(seen, panels, percentile), int(15 * width))
    title = textwrap.wrap(f"{seen.name} · {what}", int(12 * width))
    heights = [max(SIDE / aspect**0.5, 2.4) + 0.4] + [rows * cell] * (rows > 0)
    figure = Figure(figsize=(width, sum(heights) + 0.17 * (len(caption) + len(title)) + 0.2), layout="constrained")
    figure.suptitle("\n".join(title), fontsize=10, parse_math=False)
    figure.supxlabel("\n".join(caption), fontsize=8, x=0.01, ha="left", parse_math=False)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    axes = list(parts[0].subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])
    for title, picture in pictures.items():
        ax = axes.pop(0)
        ax.imshow(np.asarray(picture), extent=(0, seen.photo.width, seen.photo.height, 0))
        ax.set_title(title)
        _bare(ax, seen)
    if "distance" in panels:
        _distance(axes.pop(0), seen)
    if rows:
        _heads(parts[1].subplots(rows, columns, squeeze=False), seen, layers, heads, percentile)
    return figure


def _caption(seen: Look, panels: Sequence[str], percentile: float) -> str:
    said = []
    if "attention" in panels:
        sentence = seen.sentence
        said.append(f"{sentence[0].upper()}{sentence[1:]}.")
    if {"attention", "rollout", "heads"}.intersection(panels):
        said.append(
            f"Each map is dark at its smallest patch and bright from percentile {percentile:g} of its patches on."
        )
    if "heads" in panels:
        said.append(f"Above a head's map: the share of {seen.query_name}'s attention that goes to patches.")
    return " ".join(said)


def _over(photo: Image.Image, seen: Look, row: np.ndarray, percentile: float) -> Image.Image:
    scale = photo.height / seen.photo.height
    height, width = (side * scale for side in seen.tokens.patch_size)
    return overlay(photo, levels(seen.grid(row), percentile), (height, width))


def _heads(axes: np.ndarray, seen: Look, layers: Sequence[int], heads: Sequence[int], percentile: float) -> None:
    """A map for each head; each layer starts a row of ``axes``."""
    for ax in axes.flat:
        ax.set_axis_off()
    (rows, columns), (height, width) = seen.tokens.grid_size, seen.tokens.patch_size
    extent = (0, columns * width, rows * height, 0)
    for layer, mine in zip(layers, np.split(axes, len(layers)), strict=True):
        maps = seen.grid(seen.rows[layer])
        for ax, head in zip(mine.flat, heads, strict=False):
            level = levels(maps[head], percentile)
            ax.imshow(level, cmap=COLOURS, vmin=0, vmax=1, interpolation="nearest", extent=extent)
            ax.set_title(f"layer {layer}, head {head % len(maps)}: {percent(maps[head].sum())}", fontsize=8)
            _bare(ax, seen)


def _bare(ax: Axes, seen: Look) -> None:
    """No ticks, the size of the photograph, and a frame around the query if it is a patch."""
    ax.set_axis_off()
    ax.set(xlim=(0, seen.photo.width), ylim=(seen.photo.height, 0))
    if seen.place is not None:
        (row, column), (height, width) = seen.place, seen.tokens.patch_size
        frame = {"fill": False, "edgecolor": "#00e5ff", "linewidth": 1.5}
        ax.add_patch(Rectangle((column * width, row * height), width, height, **frame))


def _distance(ax: Axes, seen: Look) -> None:
    """The paper's Fig. 11: a dot for each head of each layer."""
    distance = seen.statistics["distance"]
    layers = np.repeat(np.arange(seen.depth), distance.shape[1])
    ax.plot(layers, distance.flatten(), "o", color=COLOURS(0.45), markersize=4, alpha=0.7, markeredgewidth=0)
    ax.axhline(seen.uniform_distance, color="black", linestyle="--", linewidth=1)
    ax.grid(axis="y", color="#e5e5e5")
    ax.set(xlabel="layer", ylabel="pixels", xlim=(-0.6, seen.depth - 0.4))
    ax.set_title("mean attention distance of each head\n(dashed: of uniform attention)")
    ax.set_ylim(0, 1.12 * max(distance.max(), seen.uniform_distance))
    ax.xaxis.get_major_locator().set_params(integer=True)


@styled
def inspect(filters: np.ndarray, similarity: np.ndarray | None, what: str) -> Figure:
    """The paper's Fig. 7: filters [count, C, PH, PW], and similarities [GH, GW, GH, GW] or None."""
    count, channels = filters.shape[:2]
    columns = min(7, count)
    widths, side = [max(0.9 * columns, 4.5)], 4.2
    if similarity is not None:
        longer = max(size * (size + 1) for size in similarity.shape[:2])  # a pixel for each number, at least
        widths.append(max(4.9, longer / DPI + 1.3))
        side = widths[1] - 0.6
    figure = Figure(figsize=(sum(widths), side), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(what, int(12 * sum(widths)))), fontsize=10, parse_math=False)
    parts = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for ax, component in zip(
        parts[0].subplots(math.ceil(count / columns), columns, squeeze=False).flat,
        [*filters, *[None] * (-count % columns)], strict=True,
    ):  # fmt: skip
        ax.set_axis_off()
        if component is not None:
            picture = component.transpose(1, 2, 0) if channels == 3 else component.mean(0)
            low, high = picture.min(), picture.max()
            ax.imshow((picture - low) / (high - low or 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    parts[0].suptitle(f"first {count} principal components of the embedding filters", fontsize=9)
    if similarity is not None:
        _mosaic(parts[1].subplots(), similarity)
    return figure


def _mosaic(ax: Axes, similarity: np.ndarray) -> None:
    """At each patch a small map: the similarity of its position embedding with those of all patches."""
    rows, columns = similarity.shape[:2]
    zoom = max(1, 1200 // max(rows, columns) ** 2)  # so that the white lines between the maps are thin
    gap = max(1, zoom // 2)
    tiles = np.full((rows, columns, rows * zoom + gap, columns * zoom + gap), np.nan)
    tiles[:, :, :-gap, :-gap] = similarity.repeat(zoom, 2).repeat(zoom, 3)
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(rows * tiles.shape[2], columns * tiles.shape[3])[:-gap, :-gap]
    shown = ax.imshow(mosaic, cmap="viridis", vmin=-1, vmax=1, interpolation_stage="rgba",
                      extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), aspect="equal")  # fmt: skip
    ax.set(xlabel="column of the patch", ylabel="row of the patch", title="similarity of position embeddings")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(shown, ax=ax, label="cosine similarity", shrink=0.8)
