"""The plots of ``make report``, as PNG files beside the records. The same records give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.records import DTYPES, Record, ceilings, dtypes_of, label, model_shapes, number
from benchmarks.shapes import LATENCY, parse

MODES = {"fwd": "forward", "bwd": "backward", "full": "forward + backward"}
#: Ours are dark and come first. All providers are in this order, each with its own colour and marker.
COLOURS = {
    "ours": "#b2182b", "triton": "#ef8a62", "reference": "#969696", "eager": "#636363", "timm": "#2c7fb8",
    "hf": "#41b6c4", "compile": "#253494", "compile-max": "#081d58", "cublas": "#76b900", "sdpa-flash": "#54278f",
    "sdpa-cudnn": "#8856a7", "sdpa-efficient": "#bc9fd6", "liger": "#d9a400", "flash-attn": "#006d2c",
    "xformers": "#66c2a4", "accelerated": "#f4a582", "reference-cudnn": "#bdbdbd", "compile-cudnn": "#4a6fb5",
    "compile-max-cudnn": "#3f51b5", "accelerated-hf": "#fddbc7",
}  # fmt: skip
MARKERS = dict(zip(COLOURS, "oD1+xsv^d<>pPX*H2348", strict=True))
OP_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#1f78b4", "#66a61e", "#e6ab02", "#a6761d", "#444444")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def draw(records: list[Record], folder: Path) -> list[str]:
    """Draws all possible plots into ``folder``. Returns a line for each file, or the reason why it is left out."""
    told = []
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        for dtype in dtypes_of(records):
            for plot in (roofline, models, ops, sides):
                path = folder / f"{plot.__name__}{'' if dtype == 'bfloat16' else '-' + dtype}.png"
                figure = plot(records, dtype)
                if isinstance(figure, str):
                    told.append(f"{path.name} left out: {figure}")
                else:
                    figure.suptitle(f"{records[0].about['gpu']}, {DTYPES.get(dtype, dtype)}", fontsize=11)
                    told.append(f"{path}: {_save(figure, path)}")
    return told


def roofline(records: list[Record], dtype: str) -> Figure | str:
    """Speed by intensity of every op and provider, and the ceilings of the run. Ours have filled marks.

    Whole models are left out, because the bytes of their work are not counted.
    """
    rate, speed = ceilings(records, dtype)
    found = [r for r in _of(records, dtype) if r.timed and r.tflops and r.gbps and r.point.bench != "vit"]
    if not rate or not speed or not found:
        return f"no ceilings of {dtype} in these files" if found else "no op has both tflops and gbps"
    present = [mode for mode in MODES if any(r.point.mode == mode for r in found)]
    names = list(dict.fromkeys(r.point.op for r in found))
    colours = {op: OP_COLOURS[i % len(OP_COLOURS)] for i, op in enumerate(names)}
    x = [1e3 * r.tflops / r.gbps for r in found]
    ridge = 1e3 * rate / speed
    low, high = min(*x, ridge) / 2, max(*x, ridge) * 3
    figure = Figure(figsize=(4.6 * len(present) + 2.2, 5.2), layout="constrained")
    axes = figure.subplots(1, len(present), sharex=True, sharey=True, squeeze=False)[0]
    for ax, mode in zip(axes, present, strict=True):
        for r in sorted((r for r in found if r.point.mode == mode), key=lambda r: r.ours):
            style = _point(r.point.provider, colours[r.point.op])
            ax.plot(1e3 * r.tflops / r.gbps, r.tflops, markersize=6.5 if r.ours else 5, **style)
        ax.plot([low, ridge, high], [low * speed / 1e3, rate, rate], color="black", linewidth=1.2, zorder=1)
        ax.set(xscale="log", yscale="log", title=MODES[mode], xlabel="intensity, FLOP/byte")
        ax.set(xlim=(low, high), ylim=(min(r.tflops for r in found) / 2, rate * 1.8))
        ax.text(high, rate * 1.06, f"{number(rate)} TFLOP/s ", ha="right", va="bottom", fontsize=8)
        ax.text(ridge * 0.8, rate * 1.06, f"{number(speed)} GB/s", ha="right", va="bottom", fontsize=8)
        _plain_ticks(ax)
    axes[0].set_ylabel("TFLOP/s")
    keys = [Line2D([], [], marker="s", linestyle="", color=colours[op], label=op) for op in names]
    keys += [Line2D([], [], label=name, **_point(name, "black")) for name in _providers(found)]
    _legend(figure, keys, [])
    return figure


def _point(provider: str, colour: str) -> dict[str, Any]:
    face = colour if provider in ("ours", "triton") else "none"
    return {"marker": MARKERS.get(provider, "h"), "linestyle": "", "color": colour, "markerfacecolor": face}


def models(records: list[Record], dtype: str) -> Figure | str:
    """Images/s of whole models, with a panel and a scale for each. The dashed line is the speed at the floor."""
    found = [r for r in _of(records, dtype) if r.point[:2] == ("vit", "vit")]
    shapes = model_shapes(records, dtype)
    if not any(r.timed and r.point.shape in shapes for r in found):
        return "no whole model was timed"
    modes = [mode for mode in ("fwd", "full") if any(r.point.mode == mode for r in found)]
    providers = _providers(found)
    size = (2.1 * len(shapes) + 2.4, 2.7 * len(modes) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    for ax, (mode, shape) in zip(
        figure.subplots(len(modes), len(shapes), squeeze=False).flat,
        [(mode, shape) for mode in modes for shape in shapes], strict=True,
    ):  # fmt: skip
        here = {r.point.provider: r for r in found if r.point.mode in (mode, "") and r.point.shape == shape}
        _bars(ax, providers, here, lambda r: r.img_s, written=True)
        floors = [r.img_s / r.sol_fraction for r in here.values() if r.timed and r.sol_fraction]
        if floors:
            ax.axhline(floors[0], color="black", linestyle="--", linewidth=1)
            ax.set_ylim(0, floors[0] * 1.12)
        ax.set(xticks=[], xlim=(-0.7, len(providers) - 0.3))
        ax.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        if mode == modes[0]:
            ax.set_title(label(shape), fontsize=9)
        if shape == shapes[0]:
            ax.set_ylabel(f"{MODES[mode]}, img/s")
    _legend(figure, _bar_keys(providers), found)
    return figure


def ops(records: list[Record], dtype: str) -> Figure | str:
    """Share of the floor of every op, with a row per op, a column per mode and a group of bars per shape."""
    found = [r for r in _of(records, dtype) if r.point.bench != "vit"]
    names = list(dict.fromkeys(r.point.op for r in found if r.point.op))
    if not any(r.timed and r.sol_fraction for r in found):
        return "no op has a share of the floor"
    modes = [mode for mode in MODES if any(r.point.mode == mode for r in found)]
    providers = _providers(found)
    shapes = {op: list(dict.fromkeys(r.point.shape for r in found if r.point.op == op)) for op in names}
    most = max(map(len, shapes.values()))
    size = (max(3.4, 1.1 * most) * len(modes) + 2.2, 1.9 * len(names) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(names), len(modes), squeeze=False, sharey=True)
    for ax, (op, mode) in zip(grid.flat, [(op, mode) for op in names for mode in modes], strict=True):
        mine = [p for p in providers if any(r.point.op == op and r.point.provider == p for r in found)]
        step = len(mine) + 1.5
        for group, shape in enumerate(shapes[op]):
            places = ((op, shape, dtype, mode), (op, shape, dtype, ""))  # a failed gate has no mode
            here = {r.point.provider: r for r in found if r.point[1:5] in places}
            _bars(ax, mine, here, lambda r: r.sol_fraction and 100 * r.sol_fraction, start=group * step)
        ticks = [group * step + (len(mine) - 1) / 2 for group in range(len(shapes[op]))]
        ax.set_xticks(ticks, [label(s).replace(", batch ", "\nbatch ") for s in shapes[op]], fontsize=7.5)
        ax.set_xlim(-1.2, len(shapes[op]) * step - 1.3)
        ax.axhline(100, color="black", linestyle="--", linewidth=1)
        ax.set_ylim(0, 108)
        if op == names[0]:
            ax.set_title(MODES[mode])
        if mode == modes[0]:
            ax.set_ylabel(f"{op}\n% of floor")
    _legend(figure, _bar_keys(providers), found)
    return figure


def sides(records: list[Record], dtype: str) -> Figure | str:
    """Best forward speed of all batches, and the largest batch of a training step, as in Fig. 12 of the ViT paper.

    A mark at the bottom means that there is no result.
    """
    family = _family(LATENCY.model)
    found = [r for r in _of(records, dtype) if r.point.bench == "vit" and _family(r.point.shape) == family]
    panels = {}
    for title, op, mode, field in (
        ("forward, img/s", "vit", "fwd", "img_s"),
        ("forward + backward, largest batch", "largest_batch", "full", "largest_batch"),
    ):
        mine = [r for r in found if r.point.op == op and r.point.mode in (mode, "")]
        if len({_side(r) for r in mine if getattr(r, field)}) > 1:
            panels[title] = mine, field
    if not panels:
        return "fewer than two image sizes of one model"
    providers = [p for p in _providers(found) if any(r.point.provider == p and "@" in r.point.shape for r in found)]
    styles = {p: {"color": _colour(p), "marker": MARKERS.get(p, "h")} for p in providers}
    figure = Figure(figsize=(4.4 * len(panels) + 1.8, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, (mine, field)) in zip(axes, panels.items(), strict=True):
        for place, (name, style) in reversed(list(enumerate(styles.items()))):
            values = sorted((_side(r), getattr(r, field) or 0) for r in mine if r.point.provider == name)
            best = {side: value for side, value in values if value}  # the largest value is last
            ax.plot(list(best), list(best.values()), linewidth=2 if name == "ours" else 1, **style)
            for r in (r for r in mine if r.point.provider == name and r.missing is not None and _side(r) not in best):
                where = {"transform": ax.get_xaxis_transform(), "ha": "center", "fontweight": "bold"}
                ax.text(_side(r), 0.01 + 0.05 * place, _mark(r)[0], color=style["color"], **where)
        ax.margins(y=0.15)
        ax.set(ylabel=title, xlabel=f"side of the image, pixels ({label(str(LATENCY)).split(',')[0]})", yscale="log")
        _plain_ticks(ax)
        ax.set_xticks(sorted({_side(r) for r in found if "@" in r.point.shape}))
    keys = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    _legend(figure, keys, [r for mine, _ in panels.values() for r in mine if r.point.provider in providers])
    return figure


def _plain_ticks(ax: Axes) -> None:
    """A logarithmic axis with 1, 2 and 5 of each decade as plain numbers, and a grid."""
    ax.grid(which="major", color="#e5e5e5")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    ax.yaxis.set_minor_locator(NullLocator())


def _bars(
    ax: Axes, providers: list[str], here: dict[str, Record], value, start: float = 0, written: bool = False
) -> None:
    """A bar for each provider at a fixed place, or a cross if it failed, or a dash if it was skipped."""
    for place, name in enumerate(providers, start=0):
        r = here.get(name)
        if r is None:
            continue
        if r.missing is not None:
            mark, colour = _mark(r)
            ax.text(start + place, 0, mark, ha="center", va="bottom", color=colour, fontsize=10, fontweight="bold")
        elif (height := value(r)) is not None:
            ax.bar(start + place, height, width=0.9, color=_colour(name))
            if written:
                ax.text(start + place, height, " " + number(height), ha="center", va="bottom", fontsize=7, rotation=90)


def _legend(figure: Figure, keys: list[Line2D], found: list[Record]) -> None:
    """A legend of ``keys`` and of the marks of missing points."""
    marks = {"failed" if r.error is not None else "skipped": _mark(r) for r in found if r.missing is not None}
    for word, (mark, colour) in sorted(marks.items()):
        keys.append(Line2D([], [], marker=f"${mark}$", color=colour, label=word, linestyle="", markersize=7))
    figure.legend(handles=keys, loc="outside right center", frameon=False)


def _bar_keys(providers: list[str]) -> list[Line2D]:
    keys = [Line2D([], [], marker="s", linestyle="", markersize=8, color=_colour(p), label=p) for p in providers]
    return [*keys, Line2D([], [], color="black", linestyle="--", linewidth=1, label="floor")]


def _mark(r: Record) -> tuple[str, str]:
    return ("×", "#b2182b") if r.error is not None else ("–", "#333333")


def _of(records: Iterable[Record], dtype: str) -> list[Record]:
    return [r for r in records if r.point.dtype == dtype and r.point.bench != "ceiling"]


def _providers(records: list[Record]) -> list[str]:
    found = {r.point.provider for r in records}
    return [p for p in COLOURS if p in found] + sorted(p for p in found if p and p not in COLOURS)


def _colour(provider: str) -> str:
    return COLOURS.get(provider, "#c7b299")


def _family(shape: str) -> str:
    """The name of the model without its image size."""
    return re.sub(r"_\d+$", "", re.split("[@/]", shape)[0])


def _side(r: Record) -> int:
    return parse(r.point.shape).config.img_size[0]


def _save(figure: Figure, path: Path) -> str:
    """Writes the file without a date or version, and only if it changed."""
    FigureCanvasAgg(figure)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
    if path.exists() and path.read_bytes() == image.getvalue():
        return "unchanged"
    path.write_bytes(image.getvalue())
    return "written"
