"""The compile-only lock (lock.py), and proof that it can fail. Both run in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from lock_cases import CASES

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "lock.json"


@pytest.fixture(autouse=True)
def _needs_ptxas():
    try:
        triton.knobs.nvidia.ptxas  # noqa: B018 - looks for the binary
    except RuntimeError:
        pytest.skip("this build of Triton ships no ptxas, so nothing compiles for NVIDIA GPUs")


def _python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=1800)


def test_every_kernel_compiles_as_locked():
    """One test, so that parallel workers do not compile everything twice."""
    REPORT.unlink(missing_ok=True)
    some = ["--arch", "90", "--dtype", "bf16", *(f"--case={name}" for name in CASES if name.endswith("_b"))]  # ViT-B
    some = [] if os.environ.get("THOROUGH") else some  # CI compiles all
    done = _python("tests/lock.py", "--json", str(REPORT), *some)
    assert REPORT.exists(), done.stdout + done.stderr
    failures = json.loads(REPORT.read_text())["failures"]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.ci
def test_bad_kernels_are_refused():
    done = _python("tests/bad_kernels.py")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("good") == said.pop("good on sm_100") == []
    expected = {
        "spills": "spills",
        "adds atomically": "1 atomic",
        "half a warp group": "not wgmma",
        "nine stages": "shared memory",
        "serialised": "C7510",
        "half a warp group on sm_100": "not tcgen05",
        "accumulators beyond tensor memory": "1024 of 512 columns",
        "broken": "does not compile",
    }
    assert said.keys() == expected.keys()
    for name, words in expected.items():
        assert len(said[name]) == 1 and words in said[name][0], (name, said[name])


def test_difference_from_the_lock_file_is_reported():
    code = (
        "import json, sys; sys.path.insert(0, 'tests'); import lock; old = {'a': {'registers': 40}, 'b': {}};"
        "print(json.dumps(lock.compare({'a': {'registers': 42}, 'c': {}}, old))); assert not lock.compare(old, old)"
    )
    done = _python("-c", code)
    assert done.returncode == 0, done.stderr
    changed, gone, new, advice = json.loads(done.stdout)
    assert "registers 40 -> 42" in changed and "b: only in" in gone and "c: not in" in new and "--update" in advice
