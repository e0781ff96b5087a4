"""Statistics of the runs, and the rule that compares them with a sentence of the article."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

TOLERANCE = 1.0  # points of accuracy
Cell = tuple[str, str]  # (series, x)
RULE = (
    "The figures are accuracies in %, mean ± standard deviation over the seeds (with n − 1). The difference of a claim "
    "is taken for each seed, because runs of a seed have the same images and initial weights where they can. It is "
    "given as its mean, and its standard deviation over the seeds is the spread. A difference is real if it exceeds "
    f"both the spread and {TOLERANCE:g} point. It is none if it and the spread are at most {TOLERANCE:g} point. A "
    "claim agrees if the difference is what it says: real and positive for better, none for as good. It is within the "
    "spread if the difference is neither real nor none, and does not agree otherwise. One seed has no spread and gives "
    "no verdict."
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about cells.

    Attributes:
        said: the sentence of the article.
        means: what it means here.
        factors: the factor of each cell in the difference.
        expected: "better": the difference is positive; "as good": it is 0.
    """

    said: str
    means: str
    factors: Mapping[Cell, float]
    expected: str = "better"


def statistics(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation with n − 1, which is nan for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def verdict(claim: Claim, measured: Mapping[Cell, Sequence[float]]) -> tuple[float, float, str]:
    """(difference, spread, verdict) of a claim, by `RULE`. ``measured`` has the accuracies over seeds of each cell."""
    each = sum(factor * np.asarray(measured[cell], np.float64) for cell, factor in claim.factors.items())
    difference, spread = statistics(each)
    if math.isnan(spread):
        return difference, spread, "no verdict"
    if abs(difference) > max(spread, TOLERANCE):
        found = "better" if difference > 0 else "worse"
    elif max(abs(difference), spread) <= TOLERANCE:
        found = "as good"
    else:
        return difference, spread, "within the spread"
    return difference, spread, "agrees" if found == claim.expected else "does not agree"
