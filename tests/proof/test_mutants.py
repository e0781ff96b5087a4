"""Tests catch the seeded bugs of `mutate.py` that name them: every fortieth, and with THOROUGH=1 (in CI) every one."""

import os
from unittest.mock import patch

import mutate
import peers
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests; make mutate runs them")
CHOSEN = mutate.MUTANTS[:: 1 if os.environ.get("THOROUGH") else 40]


def marked(mutants):
    """Mutants whose tests compare with other libraries are marked `peers`."""
    return [pytest.param(m, id=m.name, marks=[pytest.mark.peers] if mutate.compares(m) else []) for m in mutants]


@pytest.fixture(autouse=True)
def libraries(request):
    if request.node.get_closest_marker("peers"):
        peers.import_timm()


@pytest.mark.parametrize("mutant", marked(CHOSEN))
def test_caught(mutant):
    ok, output = mutate.caught(mutant)
    assert ok, f"{mutant.name} survived:\n{output[-3000:]}"


@pytest.mark.parametrize("control", marked(mutate.controls(CHOSEN)))
def test_without_a_bug_the_tests_pass(control):
    code, output = mutate.run(control)
    assert code == 0 and " passed" in output, output[-3000:]


def test_a_control_that_fails_ends_the_run(capsys):
    with patch.object(mutate, "run", return_value=(1, "1 failed")) as run, patch("sys.argv", ["mutate.py", "gelu"]):
        assert mutate.main() == 1
    assert run.call_count == 1 and "control of kernels: its tests do not pass without a bug" in capsys.readouterr().out
