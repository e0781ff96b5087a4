"""The table of cases: what libraries and their users do with a model.

Each case returns what an accelerated model must give as well. It gets a `Subject` and returns tensors and plain values,
in lists, tuples and dicts. ``only`` names the libraries that it is for, by the first word of a model's name; a
``heavy`` case runs on one model of each library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from subject import Subject


@dataclasses.dataclass(frozen=True)
class Case:
    run: Callable[[Subject], object]
    only: str
    limit: float
    heavy: bool


CASES: dict[str, Case] = {}


def case(only: str = "timm torchvision hf", limit: float = 1e-9, heavy: bool = False):
    """Enters a function into `CASES`; ``limit`` is relative to the largest element (or 1) of each tensor."""

    def enter(run):
        CASES[run.__name__] = Case(run, only, limit, heavy)
        return run

    return enter
