"""Runs that are killed or stopped continue exactly, and two processes follow one. `training_runs.py` makes the runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ci, pytest.mark.xdist_group("runs")]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("runs")
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, str(ROOT / "tests/training_runs.py"), str(folder)]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {record["case"]: record for record in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_continue_with_the_same_bits(records, workers):
    found = records[f"killed, -j {workers}"]
    assert found["same"], found
    assert found["half_written"] == 1 and found["left"] == []  # the first kill was in the middle of a save
    assert all(0 < step <= 30 for step in found["steps"])


def test_bits_depend_on_the_state_of_the_generator(records):
    assert records["killed, -j 0"]["same_without_generator"] is False


def test_signals_save_and_give_their_exit_code(records):
    found = records["stopped"]
    assert found["same"], found
    assert found["codes"] == [143, 130]
    for name, line in zip(("SIGTERM", "SIGINT"), found["said"], strict=True):
        assert line.startswith(f"{name}: stopped after step ") and line.endswith("--resume continues")


@pytest.mark.parametrize("objective", ["labels", "masked"])
def test_two_processes_follow_one(records, objective):
    """Also with Mixup and CutMix, and with patches that are corrupted at random."""
    found = records[f"distributed, {objective}"]
    assert found["steps"] == 20 and found["learnt"] > 0.01
    assert max(found["losses"], found["rows"], found["weights"]) < 1e-5, found
    assert found["second_wrote"] is False


def test_two_processes_stop_and_continue_together(records):
    whole, stopped, continued = records["distributed, stopped"]["runs"]
    assert [whole[0], stopped[0], continued[0]] == [[0, 0], [143, 143], [0, 0]]
    assert len(stopped[1]) == 1 and len(whole[1]) == 1  # the first process alone prints
    assert continued[1][-1] == whole[1][-1]
