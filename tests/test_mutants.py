"""Every seeded bug of `mutate.py` is caught by the tests it names."""

import mutate
import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests; make mutate runs them")
@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda m: m.name)
def test_caught(mutant):
    ok, output = mutate.caught(mutant)
    assert ok, f"{mutant.name} survived:\n{output[-3000:]}"
