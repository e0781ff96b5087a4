"""Every Python block of the README runs as it stands."""

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.peers
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
# timm imports torchvision, which may not fit the installed torch.
RUN = "import sys, runpy, peers; peers._make_torchvision_importable(); runpy.run_path(sys.argv[1], run_name='__main__')"


def run(block: str, folder: Path) -> str:
    """Standard output; fails the test on a non-zero exit or a warning."""
    for name in re.findall(r"^(?:import|from) (\w+)", block, re.M):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    (folder / "block.py").write_text(block, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), env.get("PYTHONPATH")]))
    command = [sys.executable, "-c", RUN, "block.py"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return done.stdout


def test_there_are_blocks():
    assert len(BLOCKS) >= 2 and sum("AdamW" in block for block in BLOCKS) == 1


@pytest.mark.parametrize("index", [i for i, block in enumerate(BLOCKS) if "AdamW" not in block])
def test_block_runs(index, tmp_path):
    run(BLOCKS[index], tmp_path)


def test_training_script(tmp_path):
    (block,) = [block for block in BLOCKS if "AdamW" in block]
    assert len(block.splitlines()) < 40 and "vit.accelerate" in block and "autocast" in block
    start = time.perf_counter()
    out = run(block, tmp_path)
    seconds = time.perf_counter() - start
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) >= 5 and losses[-1] < 0.3 * losses[0]
    assert float(re.search(r"accuracy ([\d.]+)", out)[1]) > 0.9
    assert seconds < 60  # 20 on one idle core


def test_a_broken_block_fails(tmp_path):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("import torch\n1 / 0\n", tmp_path)
