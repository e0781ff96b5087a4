"""What a wheel installs, and what the folder ``kernels`` means to others."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(*args: str, cwd: Path, **env: str) -> str:
    """Standard output of this interpreter; fails the test on a non-zero exit."""
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="64")
    source = tmp_path_factory.mktemp("source")  # setuptools leaves build/lib behind, and would pack what is stale in it
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vit", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    python("-m", "pip", "wheel", *options, "--wheel-dir", str(source / "dist"), str(source), cwd=source)
    (path,) = (source / "dist").glob("fused_vit-*.whl")
    return path


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"vit"}
    assert "vit/kernels/attention.py" in names and "vit/model.py" in names
    assert "vit/weights/dialects.py" in names
    assert any(n.startswith("vit/assets/") and n.endswith((".png", ".jpg")) for n in names)
    assert "vit/assets/LICENSE.txt" in names


def test_wheel_runs_from_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import importlib.util, vit, vit.kernels, torch; print(vit.__file__)\n"
        "assert importlib.util.find_spec('kernels') is None\n"
        "print(vit.create_model('vit_tiny_patch16_224', depth=1)(torch.zeros(1, 3, 224, 224)).shape)"
    )
    out = python("-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert str(tmp_path / "site") in out and "1000" in out


def test_import_is_quiet_and_touches_no_gpu():
    code = (
        "import torch, vit; assert not torch.cuda.is_initialized()\n"
        "from triton.runtime import driver; assert driver._active is None and driver._default is None"
    )
    assert python("-W", "error", "-c", code, cwd=ROOT, TRITON_INTERPRET="0") == ""


def test_the_name_kernels_stays_empty_here():
    """From the root, ``import kernels`` finds this folder: it must neither raise nor register the ops again."""
    code = "import kernels, vit; assert not hasattr(kernels, 'attention'); assert vit.kernels is not kernels"
    python("-c", code, cwd=ROOT)


@pytest.mark.peers
def test_transformers_imports_from_the_root():
    pytest.importorskip("transformers")
    code = "import peers; peers.import_transformers(); import vit; from transformers import ViTModel"
    python("-c", code, cwd=ROOT, PYTHONPATH=str(ROOT / "tests"))
