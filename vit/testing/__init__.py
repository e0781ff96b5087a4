"""The tolerance policy for ops, and parity checks of whole models."""

from vit.testing.parity import assert_parity
from vit.testing.policy import (
    FACTORS,
    Report,
    Tally,
    as_good,
    check,
    check_all,
    check_draws,
    check_mirror,
    check_op,
    measure,
    relative_error,
    require,
    rounding_floor,
)

__all__ = [
    "FACTORS",
    "Report",
    "Tally",
    "as_good",
    "assert_parity",
    "check",
    "check_all",
    "check_draws",
    "check_mirror",
    "check_op",
    "measure",
    "relative_error",
    "require",
    "rounding_floor",
]
