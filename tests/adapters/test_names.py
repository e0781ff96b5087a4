"""Every name of timm that has a known block: what `vit.accelerate` takes whole, and what with parts that are called."""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from peers import import_timm

import vit
from vit.adapters import timm as rows

pytestmark = pytest.mark.peers
ROOT = Path(__file__).resolve().parents[2]
HOMES = {path.rpartition(".")[0] for path, part in rows.MODULES.items() if part.kind == "block"}


def names(timm) -> dict[str, str]:
    """The names of models whose file contains a class from a file with a known block, and these files."""
    found = {}
    for module in timm.list_modules():
        classes = [thing for thing in vars(sys.modules[f"timm.models.{module}"]).values() if isinstance(thing, type)]
        if any(cls.__module__ in HOMES for cls in classes):
            found |= dict.fromkeys(timm.list_models(module=module), module)
    return found


def build(timm, name: str) -> torch.nn.Module:
    """The model on the meta device, with one block where that can be chosen."""
    with torch.device("meta"):
        try:
            return timm.create_model(name, depth=1)
        except (AssertionError, TypeError, ValueError):  # it has no depth, or one for each stage
            return timm.create_model(name)


def test_names(record_property):
    timm = import_timm()
    counts, refused = {"whole": Counter(), "with parts that are called": Counter()}, Counter()
    for name, module in names(timm).items():
        model = build(timm, name)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                vit.accelerate(model)
        except ValueError as error:
            assert "has no block that the fused ops can run" in str(error)
            refused[module] += 1
        else:
            left = any("these stay as they are" in str(warning.message) for warning in caught)
            counts["with parts that are called" if left else "whole"][module] += 1
    whole, partly = (counter.total() for counter in counts.values())
    rows = [f"{'timm ' + timm.__version__:<32}{'whole':>7}{'parts':>7}{'refused':>9}"]
    for module in sorted({*names(timm).values()}):
        cells = *(counter[module] for counter in counts.values()), refused[module]
        rows.append(f"{module:<32}{cells[0]:>7}{cells[1]:>7}{cells[2]:>9}")
    rows.append(f"{'all':<32}{whole:>7}{partly:>7}{refused.total():>9}")
    record_property("table", "\n".join(rows))
    assert whole + partly >= 285
    if timm.__version__ == re.search(r"timm==(.*)", (ROOT / "constraints.txt").read_text())[1]:
        assert f"{whole} of timm's names are fused whole, and {partly} with parts" in (ROOT / "README.md").read_text()
