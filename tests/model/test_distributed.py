"""DDP and FSDP2 in two processes on the CPU: `distributed.py`, which also runs on GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import distributed
import pytest

pytestmark = pytest.mark.xdist_group("distributed")  # the processes are started once


@pytest.fixture(scope="module")
def records():
    script = Path(distributed.__file__)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={k: v for k, v in os.environ.items() if k != "RANK"} | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == (0 if lines and all(r["ok"] for r in lines) else 1), done.stdout + done.stderr
    return {record["case"]: record for record in lines}, done.stderr


@pytest.mark.parametrize("case", [*distributed.CASES, "other methods"])
def test_two_processes(records, case):
    found, errors = records
    assert case in found, errors
    assert found[case]["ok"], found[case]
