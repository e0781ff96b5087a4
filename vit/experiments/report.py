"""The report of an experiment: DIR/NAME.csv, DIR/NAME.png and DIR/NAME.md."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
from pathlib import Path
from typing import Any

import vit
from vit.experiments import tables
from vit.experiments.runs import Runs
from vit.experiments.tables import EXPERIMENTS, VAL_SPLIT
from vit.experiments.verdict import RULE, Cell, statistics, verdict
from vit.training import run as folders
from vit.weights import files


@dataclasses.dataclass
class Row:
    """A cell at one learning rate, over the seeds."""

    cell: Cell
    lr: float
    test: list[float]  # in %
    validation: list[float]  # empty for a probe
    told: dict[str, Any]  # of a run
    chosen: bool = False

    mean = property(lambda self: statistics(self.test)[0])
    std = property(lambda self: statistics(self.test)[1])


def rows(results: list[dict[str, Any]]) -> list[Row]:
    """A row for each cell and learning rate. Of each cell the best mean validation accuracy is the chosen one."""
    found: dict[tuple[Cell, float], Row] = {}
    for result in results:
        run = result["run"]
        if run["task"] == "pretrain":
            continue
        cell = run["series"], run["x"]
        row = found.setdefault((cell, run["lr"]), Row(cell, run["lr"], [], [], result))
        row.test.append(result["test"])
        row.validation += [] if result["validation"] is None else [result["validation"]]
    for cell in {row.cell for row in found.values()}:
        mine = [row for row in found.values() if row.cell == cell]
        max(mine, key=lambda row: statistics(row.validation)[0] if row.validation else 0.0).chosen = True
    return list(found.values())


def write(runs: Runs, command: str) -> list[Path]:
    """Writes the report of finished runs. Returns its files; the plot needs matplotlib."""
    every, name = rows(runs.results()), runs.settings.name
    paths = [runs.folder / f"{name}{suffix}" for suffix in (".csv", ".md", ".png")]
    texts = _csv(every), _markdown(runs, every, command)
    for path, text in zip(paths, texts, strict=False):
        with folders.writing(path, "choose another -o"), files.replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        return paths[:2]
    with folders.writing(paths[2], "choose another -o"), files.replacing(paths[2]) as temporary:
        _figure(runs, every).savefig(temporary, format="png", dpi=120)
    return paths


def _csv(every: list[Row]) -> str:
    text = io.StringIO()
    put = csv.writer(text, lineterminator="\n").writerow
    put(["series", "x", "lr", "chosen", "n", "test_mean", "test_std", "validation_mean", "validation_std",
         "train_images", "images_seen", "parameters", "training_gflops", "test_of_each_seed"])  # fmt: skip
    for row in every:
        run, validation = row.told["run"], statistics(row.validation) if row.validation else ("", "")
        figures = [f"{v:.4f}" if isinstance(v, float) else v for v in (row.mean, row.std, *validation)]
        cost = [row.told.get("parameters", ""), row.told.get("training_gflops", "")]
        seen = run["steps"] * run["batch_size"]
        put([*row.cell, row.lr or "", int(row.chosen), len(row.test), *figures, run["size"], seen or "", *cost,
             " ".join(f"{value:.4f}" for value in row.test)])  # fmt: skip
    return text.getvalue()


def _markdown(runs: Runs, every: list[Row], command: str) -> str:
    s, data, experiment = runs.settings, runs.data, EXPERIMENTS[runs.settings.name]
    chosen = {row.cell: row for row in every if row.chosen}
    lines = [f"# {s.name}", "", experiment.title, ""]
    if s.quick:
        lines += ["**A rehearsal (--quick): few images and steps. Its figures mean nothing.**", ""]
    lines += [f"    {command}", "", f"- Equal at what: {experiment.equal}", f"- Data: {_about(data)}"]
    if runs.pretrain is not None:
        lines.append(f"- Pre-training: {_about(runs.pretrain)}")
    made = {
        name: " and ".join(sorted({str(row.told[name] or "unknown") for row in every})) for name in ("torch", "commit")
    }
    sizes, patches = (
        " and ".join(dict.fromkeys("{} x {}".format(*getattr(run.model, name)) for run in runs.table))
        for name in ("img_size", "patch_size")
    )
    own = "{} x {}".format(*data.image_size) if data.image_size else "of several sizes"
    chooses = "chose the learning rate where there are several" if len(s.lrs) > 1 else "chose nothing"
    lines += [
        f"- Images of {sizes} pixels, resized from the data's ({own}); patches of {patches} pixels.",
        f"- Test images measure, and choose nothing. The validation images, {100 * VAL_SPLIT:g} % of the training "
        f"images, {chooses}. The weights are those of the last step.",
        f"- Training: AdamW, learning rate {', '.join(f'{lr:g}' for lr in s.lrs)} with cosine decay after 5 % warm-up, "
        f"weight decay 0.05, gradients clipped at norm 1, label smoothing 0.1, {s.amp_dtype or 'float32'}, "
        f"--impl {s.impl}, no augmentation.",
        f"- Seeds {', '.join(map(str, s.seeds))}: of weights, subsets, batches and permutations.",
        f"- torch {made['torch']}, fused-vit {vit.__version__}, commit {made['commit']}.",
        "",
        "| model | at | test accuracy, % | learning rate | training images | images seen | parameters | GFLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (series, x), row in chosen.items():
        run, told = row.told["run"], row.told
        seen, gflops = run["steps"] * run["batch_size"], told.get("training_gflops")
        cost = [f"{seen:,}", f"{told['parameters']:,}", f"{gflops:,.0f}"] if gflops else ["", "", ""]
        figures = f"{row.mean:.2f} ± {row.std:.2f} (n = {len(row.test)})"
        cells = [series, x, figures, f"{row.lr:g}" if row.lr else "", f"{run['size']:,}", *cost]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "GFLOPs of the training, as PyTorch's counter counts forward and backward of the products."]
    measured, said = {cell: row.test for cell, row in chosen.items()}, ""
    for claim in tables.claims(s.name, chosen):
        if claim.said != said:
            said = claim.said
            lines += ["", f"The article, {said}", "", "| here | difference | spread | verdict |", "|---|---|---|---|"]
        difference, spread, result = verdict(claim, measured)
        result = "none: a rehearsal" if s.quick else f"**{result}**"
        lines.append(f"| {claim.means} | {difference:+.2f} | {spread:.2f} | {result} |")
    return "\n".join([*lines, "", RULE, "", f"What it cannot show: {experiment.limits}", ""])


def _about(data: Any) -> str:
    licence = f", licence {data.licence}" if data.licence else ""
    tests = f"{len(data.test):,} test images" if data.test else "no test images"
    classes = ", ".join(data.classes)
    return f"{data.name} ({classes}): {len(data.train):,} training and {tests}{licence}, SHA-256 {data.digest}."


def _figure(runs: Runs, every: list[Row]) -> Any:
    """Lines over the size of the training set or the learning rate, or a list of the cells."""
    from matplotlib.figure import Figure

    axis = EXPERIMENTS[runs.settings.name].axis
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    shown = every if axis == "lr" else [row for row in every if row.chosen]
    series = list(dict.fromkeys(row.cell[0] for row in shown))
    title = runs.settings.name + (" (rehearsal)" if runs.settings.quick else "")
    if axis:
        for name in series:
            mine = [row for row in shown if row.cell[0] == name]
            x = [row.lr if axis == "lr" else row.told["run"]["size"] for row in mine]
            ax.errorbar(x, [row.mean for row in mine], _bars(mine), marker="o", capsize=3, label=name)
        x_label = "learning rate" if axis == "lr" else "training images"
        ax.set(title=title, xscale="log", xlabel=x_label, ylabel="test accuracy in %")
        ax.legend()
    else:
        for place, row in enumerate(shown):
            color = f"C{series.index(row.cell[0])}"
            ax.errorbar(row.mean, place, xerr=_bars([row]), fmt="o", capsize=3, color=color)
        ax.set_yticks(range(len(shown)), ["\n".join(filter(None, row.cell)) for row in shown], fontsize=8)
        ax.set(title=title, xlabel="test accuracy in %")
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.4)
    return figure


def _bars(some: list[Row]) -> list[float] | None:
    return [row.std for row in some] if all(len(row.test) > 1 for row in some) else None
