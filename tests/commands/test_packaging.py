"""What a wheel installs, and that the name ``kernels`` stays free."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vit.commands import cli

ROOT = Path(__file__).resolve().parents[2]


def python(*args: str, cwd: Path, **env: str) -> str:
    """Standard output of this interpreter; fails the test on a non-zero exit."""
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, out: Path) -> Path:
    """The wheel of a folder or an archive of sources."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    python("-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(source), cwd=out.parent)
    (path,) = out.glob("fused_vit-*.whl")
    return path


@pytest.fixture
def clone(tmp_path) -> Path:
    return copy(tmp_path / "clone")


def copy(folder: Path) -> Path:
    """A copy of the sources without build/lib, whose stale files setuptools would pack."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("vit", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", minversion="64")
    folder = tmp_path_factory.mktemp("wheel")
    return build(copy(folder / "source"), folder / "dist")


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"vit"}
    folders = ["vit", *(f"vit/{path.parent.name}" for path in (ROOT / "vit").glob("*/__init__.py"))]
    assert len(folders) > 5
    for folder, package in [("kernels", "vit/kernels"), *zip(folders, folders, strict=True)]:
        sources = sorted(f"{package}/{path.name}" for path in (ROOT / folder).glob("*.py"))
        assert sorted(n for n in names if n.endswith(".py") and n.rpartition("/")[0] == package) == sources
    assert len(names) == len(set(names)) and "vit/py.typed" in names
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


def test_wheel_of_a_source_archive(wheel, clone, tmp_path):
    code = "import setuptools.build_meta as build; build.build_sdist('../sdist')"
    python("-c", code, cwd=clone)
    (archive,) = (tmp_path / "sdist").glob("fused_vit-*.tar.gz")
    names = zipfile.ZipFile(build(archive, tmp_path / "dist")).namelist()
    assert sorted(names) == sorted(zipfile.ZipFile(wheel).namelist())


def test_metadata(wheel, capsys):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    lines = archive.read(name).decode().splitlines()
    licence = "Classifier: License :: OSI Approved :: MIT License"
    assert {"Author: fused-vit developers", "Classifier: Typing :: Typed", licence} <= set(lines)
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    (version,) = (line.removeprefix("Version: ") for line in lines if line.startswith("Version: "))
    assert end.value.code == 0 and capsys.readouterr().out == f"fused-vit {version}\n"


def test_a_clone_runs_uninstalled(clone, tmp_path):
    """Its ``vit.kernels`` is its own, even if another clone is an editable install."""
    code = "import vit.kernels; print(vit.__file__, vit.kernels.__file__)"
    out = python("-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(clone))
    assert out.split() == [f"{clone}/vit/__init__.py", f"{clone}/vit/kernels/__init__.py"]


def test_mypy_finds_every_module(clone, wheel, tmp_path):
    """Also those of ``vit.kernels``, in a clone and in an installed wheel."""
    pytest.importorskip("mypy")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "user.py").write_text("from vit.kernels import linear\nimport vit\nreveal_type(vit.create_model)\n")
    for path in (clone, tmp_path / "site"):
        options = ["--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
        out = python("-m", "mypy", *options, "user.py", cwd=tmp_path, MYPYPATH=str(path))
        assert "VisionTransformer" in out


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
