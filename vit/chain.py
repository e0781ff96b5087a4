"""A sequence of blocks. One op computes the residual add of a block and the first LayerNorm of the next block.

So blocks pass on two tensors: the residual stream x, and y, the next block's LayerNorm of x. y is None if the next
block must compute it itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Link(NamedTuple):
    """A block of the chain.

    Attributes:
        run: (x, y, next_norm) -> (x after the block, ``next_norm`` of that). The input y is ``norm(x)`` or None.
        norm: the block's first LayerNorm, if the previous block may compute it; else None.
    """

    run: Callable[[Tensor, Tensor | None, nn.Module | None], tuple[Tensor, Tensor | None]]
    norm: nn.Module | None = None


def called(block: Callable[[Tensor], Tensor]) -> Link:
    """The link of a block that is called as ``block(x)``, with no fusion across its borders."""
    return Link(lambda x, y, next_norm: (block(x), None))


def chain(
    x: Tensor, links: Sequence[Link], last_norm: nn.Module | None = None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Runs the blocks one after the other on x [B, N, D].

    Yields (x, y) before the first block and after each block. After the last block, y is ``last_norm(x)`` or None.
    """
    y = None
    yield x, y
    norms = [*(link.norm for link in links), last_norm]
    for link, next_norm in zip(links, norms[1:], strict=True):
        x, y = link.run(x, y, next_norm)
        yield x, y
