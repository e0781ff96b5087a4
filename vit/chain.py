"""Blocks in a row: the add at the end of one and the LayerNorm at the start of the next are one op.

The residual stream x and its normalised copy y travel together. y is None where the next block normalises for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Link(NamedTuple):
    """A block of the chain.

    run: (x, y, next_norm) -> (x after the block, ``next_norm`` of it). y is ``norm`` of x, or None: not known yet.
    norm: the norm that the block applies first, if the block before it may apply it instead.
    """

    run: Callable[[Tensor, Tensor | None, nn.Module | None], tuple[Tensor, Tensor | None]]
    norm: nn.Module | None = None


def called(block: Callable[[Tensor], Tensor]) -> Link:
    """A block that is only called: it shares no norm with its neighbours."""
    return Link(lambda x, y, next_norm: (block(x), None))


def chain(
    x: Tensor, links: Sequence[Link], last_norm: nn.Module | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Runs the blocks one after the other on x [B, N, D].

    Yields the stream and its next normalisation, before the first block and after each. ``last_norm`` is the one after
    the last block.
    """
    y = None
    yield x, y
    for link, next_norm in zip(links, [*(link.norm for link in links[1:]), last_norm], strict=True):
        x, y = link.run(x, y, next_norm)
        yield x, y
