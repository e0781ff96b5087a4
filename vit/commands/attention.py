"""`vit attention`: what a ViT looks at in photographs, as a table, as arrays, and as a figure of each photograph.

The numbers need no matplotlib. Shapes: L layers, B photographs, H heads, N tokens, GH x GW patches.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import vit
from vit import preprocess
from vit.analysis import Tokens, has_class_token, image_size
from vit.commands import classify, inside, parity
from vit.commands.console import say, step

STATISTICS = ("distance", "entropy", "max_logit", "prefix_mass")


@dataclasses.dataclass
class Look:
    """What the model looks at in one photograph."""

    name: str
    photo: Image.Image  # as the model sees it
    tokens: Tokens
    query: int  # index of the token
    has_class_token: bool
    statistics: dict[str, np.ndarray]  # each of `STATISTICS`: [L, H]
    uniform_distance: float  # pixels
    rows: dict[int, np.ndarray]  # layer -> attention of the query, [H, N]
    rollout: np.ndarray | None  # [N]

    @property
    def depth(self) -> int:
        return len(self.statistics["distance"])

    @property
    def place(self) -> tuple[int, int] | None:
        """(row, column) of the query, or None if it is a prefix token."""
        patch = self.query - self.tokens.num_prefix_tokens
        return None if patch < 0 else divmod(patch, self.tokens.grid_size[1])

    @property
    def query_name(self) -> str:
        return "the class token" if self.place is None else f"patch {self.place}"

    def grid(self, row: np.ndarray) -> np.ndarray:
        """The patches among tokens: [..., N] -> [..., GH, GW]."""
        return row[..., self.tokens.num_prefix_tokens :].reshape(*row.shape[:-1], *self.tokens.grid_size)

    @property
    def sentence(self) -> str:
        """Which patch takes most of the query's attention in the last layer, and what prefix tokens take."""
        row = self.rows[self.depth - 1].mean(0)
        patches = self.grid(row)
        where = tuple(int(i) for i in np.unravel_index(patches.argmax(), patches.shape))
        said = f"patch {where} takes {percent(patches.max())} of {self.query_name}'s attention"
        said += f" in layer {self.depth - 1}, {patches.max() * len(row):.1f} times an equal share"
        names, count = self._prefix_names()
        return said + (f"; {names} take{'s' * (count == 1)} {percent(1 - patches.sum())}" if count else "")

    def _prefix_names(self) -> tuple[str, int]:
        count = self.tokens.num_prefix_tokens
        others = count - self.has_class_token
        names = ["the class token"] if self.has_class_token else []
        names += [f"{others} other prefix token{'s' * (others > 1)}"] if others else []
        return " and ".join(names), count


def attention(args: argparse.Namespace) -> None:
    """Runs the command. Nothing is written before everything is known.

    Raises:
        CannotStart: an option is wrong, or the model cannot be built or run.
        ValueError: a photograph or a checkpoint cannot be read, or the tokens are not a grid of patches.
        IndexError: the model has no such layer, head or query.
        OSError: a file cannot be read or written.
    """
    if not 0 < args.clip_percentile <= 100:
        raise parity.CannotStart(f"--clip-percentile must be above 0 and at most 100, got {args.clip_percentile:g}")
    pictures = picture_paths(args.out, len(args.images))
    inside.check_outputs(pictures, args.save, args.images)
    photos = [preprocess.open_photo(path) for path in args.images]
    model, what = inside.load(args.weights, args.model, args.img_size)
    prepare = preparation(model, args)
    if len({prepare.view(photo).size for photo in photos}) > 1:
        raise parity.CannotStart("the model sees these photographs in different sizes; give them one at a time")
    if not isinstance(model, vit.VisionTransformer):
        with parity.explained("cannot accelerate the model"), parity.collected_notes() as notes:
            vit.accelerate(model)
        for note in notes:
            say(f"  Note: {note}")
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    looks = []
    for path, photo in zip(args.images, photos, strict=True):
        with step(f"looking at {path.name}"):
            looks.append(look(model, path.name, photo, prepare, args))
    say(f"{what}\n{prepare}")
    say(table(looks))
    for seen in looks:
        say(f"{seen.name}: {seen.sentence}.")
    contents = {}
    if pictures:
        from vit.commands import figures

        panels = [name for name in ("rollout", "distance") if getattr(args, name)] or list(figures.PANELS)
        layers = _chosen(args.layers, [-1], looks[0].depth)
        for path, seen in zip(pictures, looks, strict=True):
            figure = figures.attention(seen, what, panels, layers, args.heads, args.clip_percentile)
            contents[path] = figures.encoded(figure, path.suffix)
    if args.save:
        contents[args.save] = inside.npz(arrays(looks, args.convention))
    inside.write(contents)


def picture_paths(out: Path | None, count: int) -> list[Path]:
    """out.png for one photograph, else out-1.png, out-2.png, …"""
    if out is None:
        return []
    return [out] if count == 1 else [out.with_name(f"{out.stem}-{i + 1}{out.suffix}") for i in range(count)]


def preparation(model: nn.Module, args: argparse.Namespace) -> preprocess.Preprocessing:
    """The preprocessing of the checkpoint or of the library, or what --preprocess says."""
    if args.weights is not None:
        prepare = classify.preparation(model, args.weights, args.preprocess)
    else:
        size = args.img_size or image_size(model)
        if size is None:
            raise parity.CannotStart("the model does not tell the size of its images; give --img-size")
        library, _, name = args.model.partition(":")
        if args.preprocess:
            prepare = preprocess.preprocessing(args.preprocess, size)
        elif library == "timm" or not name:
            prepare = preprocess.of_timm(model.pretrained_cfg, size, "the model's pretrained_cfg")
        else:
            prepare = preprocess.of_folder(Path(name), size) if library == "hf" else None
            prepare = prepare or preprocess.preprocessing(library, size)
    if args.img_size and args.img_size != (prepare.crop or prepare.resize):  # a file of transformers has its own size
        prepare = dataclasses.replace(prepare, resize=args.img_size, crop=None)
    return prepare


@torch.no_grad()
def look(
    model: nn.Module, name: str, photo: Image.Image, prepare: preprocess.Preprocessing, args: argparse.Namespace
) -> Look:
    """Runs the model on one photograph, and again as far as each layer whose rows are asked for."""
    pixels = prepare(photo).to(next(model.parameters()))
    with parity.explained("cannot run the model"):
        options = parity.call_options(model, pixels)
        with vit.attention_statistics(model, convention=args.convention) as stats:
            model(pixels, **options)
        statistics = {name: getattr(stats, name)[:, 0].cpu().numpy() for name in STATISTICS}
    depth, heads = statistics["distance"].shape
    chosen = _chosen(args.layers, [-1], depth)
    layers = range(depth) if args.save else {depth - 1, *chosen}
    _in_range("head", args.heads or [], heads)
    has_class = has_class_token(model)
    if args.query == "cls" and not has_class:
        raise parity.CannotStart("the model has no class token; give --query ROW,COLUMN of a patch")
    query = stats.tokens.index(args.query, has_class)
    rows = {layer: stats.rows(layer, [query])[0, :, 0].cpu().numpy() for layer in layers}
    rollout = None
    if args.save or (args.out and (args.rollout or not args.distance)):
        rollout = vit.rollout(model, pixels, query=query, **options)[0].cpu().numpy()
    view = prepare.view(photo).convert("RGB")
    return Look(name, view, stats.tokens, query, has_class, statistics, stats.uniform_distance, rows, rollout)


def _chosen(layers: list[int] | None, default: list[int], depth: int) -> list[int]:
    """Indices of layers from 0; negative ones count from the end."""
    return [layer % depth for layer in _in_range("layer", layers or default, depth)]


def _in_range(what: str, indices: list[int], count: int) -> list[int]:
    for index in indices:
        if not -count <= index < count:
            raise IndexError(f"there is no {what} {index}: the model has {what}s 0 to {count - 1}")
    return indices


def table(looks: list[Look]) -> str:
    """A row for each layer, the mean over the photographs; the last row is uniform attention."""
    found = {name: np.stack([seen.statistics[name] for seen in looks]) for name in STATISTICS}  # [B, L, H]
    first, tokens = looks[0], looks[0].rows[looks[0].depth - 1].shape[1]
    distance = found["distance"].mean(0)
    over = f"mean over {len(looks)} photographs, then " if len(looks) > 1 else ""
    lines = [
        f"Over the heads ({over}smallest, mean and largest distance; mean entropy and mass; largest logit):",
        "  layer    distance, pixels       entropy, nats   mass of prefix   max logit",
        "             min   mean    max",
    ]
    for layer in range(first.depth):
        row = distance[layer]
        entropy, mass, logit = (found[name][:, layer] for name in ("entropy", "prefix_mass", "max_logit"))
        lines.append(
            f"  {layer:>5}  {row.min():>7.1f}{row.mean():>7.1f}{row.max():>7.1f}{entropy.mean():>16.2f}"
            f"{percent(mass.mean()):>17}{logit.max():>12.2f}"
        )
    uniform = percent(first.tokens.num_prefix_tokens / tokens)
    lines.append(f"uniform  {first.uniform_distance:>14.1f}{math.log(tokens):>23.2f}{uniform:>17}")
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.2g} %"


def arrays(looks: list[Look], convention: str) -> dict[str, np.ndarray]:
    """What --save writes."""
    first = looks[0]
    found = {name: np.stack([seen.statistics[name] for seen in looks], axis=1) for name in STATISTICS}  # [L, B, H]
    found["rows"] = np.stack([[seen.rows[layer] for seen in looks] for layer in range(first.depth)])  # [L, B, H, N]
    found["rollout"] = np.stack([seen.rollout for seen in looks])  # [B, N]
    found["rollout_grid"] = first.grid(found["rollout"])  # [B, GH, GW]
    told = {
        "query": first.query, "num_prefix_tokens": first.tokens.num_prefix_tokens, "grid_size": first.tokens.grid_size,
        "patch_size": first.tokens.patch_size, "uniform_distance": first.uniform_distance, "convention": convention,
        "images": [seen.name for seen in looks],
    }  # fmt: skip
    return found | {name: np.array(value) for name, value in told.items()}
