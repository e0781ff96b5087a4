"""Seeded bugs of `mutate.py` are caught by the tests they name: every tenth, and with THOROUGH=1 (in CI) every one."""

import dataclasses
import os

import mutate
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests; make mutate runs them")


@pytest.mark.parametrize("mutant", mutate.MUTANTS[:: 1 if os.environ.get("THOROUGH") else 10], ids=lambda m: m.name)
def test_caught(mutant):
    ok, output = mutate.caught(mutant)
    assert ok, f"{mutant.name} survived:\n{output[-3000:]}"


def test_without_a_bug_the_tests_pass():
    first = mutate.MUTANTS[0]
    ok, output = mutate.caught(dataclasses.replace(first, name="no bug", new=first.old))
    assert not ok and " passed" in output, output[-3000:]
