"""Seeded bugs of `mutate.py` are caught by the tests they name: every tenth, and with THOROUGH=1 (in CI) every one."""

import os
from unittest.mock import patch

import mutate
import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's tests; make mutate runs them")
CHOSEN = mutate.MUTANTS[:: 1 if os.environ.get("THOROUGH") else 10]


@pytest.mark.parametrize("mutant", CHOSEN, ids=lambda m: m.name)
def test_caught(mutant):
    ok, output = mutate.caught(mutant)
    assert ok, f"{mutant.name} survived:\n{output[-3000:]}"


@pytest.mark.parametrize("control", mutate.controls(CHOSEN), ids=lambda m: m.name)
def test_without_a_bug_the_tests_pass(control):
    code, output = mutate.run(control)
    assert code == 0 and " passed" in output, output[-3000:]


def test_a_control_that_fails_ends_the_run(capsys):
    with patch.object(mutate, "run", return_value=(1, "1 failed")) as run, patch("sys.argv", ["mutate.py", "gelu"]):
        assert mutate.main() == 1
    assert run.call_count == 1 and "control of kernels: its tests do not pass without a bug" in capsys.readouterr().out
