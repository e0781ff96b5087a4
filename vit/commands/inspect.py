"""`vit inspect`: the filters of the patch projection and the similarity of the position embeddings (paper, Fig. 7).

The numbers need neither matplotlib nor Pillow.
"""

from __future__ import annotations

import argparse

import numpy as np
from torch import nn

from vit.analysis import patch_projection_of
from vit.commands import inside
from vit.commands.console import say
from vit.embeddings import embedding_filters, position_similarity

COUNT = 28  # components, as in the paper


def inspect(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        CannotStart: an option is wrong, or the model cannot be built.
        ValueError: the checkpoint cannot be loaded, or the model has no patch projection.
        OSError: a file cannot be read or written.
    """
    inside.check_outputs([args.out] if args.out else [], args.save)
    model, what = inside.load(args.weights, args.model, None)
    weight = patch_projection_of(model).weight.detach().cpu().double().flatten(1).numpy()  # [D, C·PH·PW]
    filters = embedding_filters(model, min(COUNT, *weight.shape)).cpu().numpy()
    centred = weight - weight.mean(0)
    variance = np.square(centred @ filters.reshape(len(filters), -1).T).sum(0) / np.square(centred).sum()
    similarity, why = _similarity(model)
    say(what)
    shape = " x ".join(map(str, filters.shape[1:]))
    say(f"patch projection: {len(weight)} filters of {shape}; the first {len(filters)} principal components hold")
    say(f"  {100 * variance.sum():.1f} % of their variance, the first one {100 * variance[0]:.1f} %")
    if similarity is None:
        say(f"position embedding: left out, {why}")
    else:
        grid = " x ".join(map(str, similarity.shape[:2]))
        say(f"position embedding: grid of {grid}; mean cosine similarity of")
        for name, value in neighbours(similarity).items():
            say(f"  {name:<36}{value:>7.3f}")
    arrays = {"filters": filters, "variance": variance}
    arrays |= {} if similarity is None else {"position_similarity": similarity}
    contents = {}
    if args.out:
        from vit.commands import figures

        contents[args.out] = figures.encoded(figures.inspect(filters, similarity, what), args.out.suffix)
    if args.save:
        contents[args.save] = inside.npz(arrays)
    inside.write(contents)


def _similarity(model: nn.Module) -> tuple[np.ndarray | None, str]:
    try:
        return position_similarity(model).cpu().numpy(), ""
    except ValueError as error:
        return None, str(error)


def neighbours(similarity: np.ndarray) -> dict[str, float]:
    """Mean similarity of pairs of positions that a picture of [GH, GW, GH, GW] should show as near or far."""
    rows, columns = similarity.shape[:2]
    y, x = np.divmod(np.arange(rows * columns), columns)
    dy, dx = abs(y[:, None] - y), abs(x[:, None] - x)
    pairs = {
        "neighbours in a row": (dy == 0) & (dx == 1),
        "neighbours in a column": (dy == 1) & (dx == 0),
        "all positions of a row": (dy == 0) & (dx > 0),
        "all positions of a column": (dy > 0) & (dx == 0),
        "all pairs": dy + dx > 0,
    }
    flat = similarity.reshape(rows * columns, rows * columns)
    return {name: float(flat[which].mean()) for name, which in pairs.items() if which.any()}
