"""For a wrong argument, every command of `benchmarks/` prints one line and exits with status 2 before it runs."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import arguments

ROOT = Path(__file__).resolve().parents[2]
UNWRITABLE = "setup.py/x"
WRONG = {
    "benchmarks.__main__ --op nope": "no op 'nope'; there are attention,",
    "benchmarks.__main__ --shape vit_base": "shape 'vit_base' is not understood",
    "benchmarks.__main__ --budget 0": "must be positive, got 0",
    "benchmarks.__main__ --budget nan": "must be positive, got nan",
    "benchmarks.__main__ --op mlp --provider sdpa-flash": "nothing to measure; providers of mlp: compile,",
    "benchmarks.__main__ --op largest_batch --quick": "nothing to measure",
    f"benchmarks.__main__ --rehearse --out {UNWRITABLE}": f"cannot write to {UNWRITABLE}: Not a directory",
    "benchmarks.gpu --stage nope": "no stage nope; there are smoke,",
    "benchmarks.gpu --budget -1": "must be positive, got -1",
    f"benchmarks.gpu --rehearse --out {UNWRITABLE}": "cannot write to",
    "benchmarks.memory --shape vit_base": "not understood",
    "benchmarks.memory --provider them": "invalid choice",
    "benchmarks.memory --largest -1": "must be positive, got -1",
    f"benchmarks.memory --out {UNWRITABLE}": "cannot write to",
    "benchmarks.roofline --shape vit_base_patch16_225/b2": "unknown model",
    "benchmarks.roofline --arch 90,70": "no architecture 70; there are 80, 89, 90, 100",
    "benchmarks.roofline --arch sm_90": "no architecture sm_90",
    "benchmarks.roofline --out tests": "cannot write to tests: it is a folder",
    "benchmarks.cycles --shape vit_base": "not understood",
    "benchmarks.cycles --arch 80": "no cycle model of sm_80; there is one of sm_90",
    "benchmarks.cycles --shape vit_tiny_patch16_224@64/b2 --kernel nope": "has 'nope' in its name",
    "benchmarks.cycles --out tests": "cannot write to tests: it is a folder",
    "benchmarks.profile --top 0": "must be at least 1, got 0",
    "benchmarks.profile --shape b256": "not understood",
    "benchmarks.profile --provider nobody": "no provider 'nobody'; there are ours",
    f"benchmarks.profile --out {UNWRITABLE}": "cannot write to",
    "benchmarks.tune": "required: op",
    "benchmarks.tune nope": "invalid choice: 'nope'",
    "benchmarks.tune mlp --budget 0": "must be positive",
    "benchmarks.tune mlp --limit 0": "must be at least 1",
    "benchmarks.tune mlp --arch 70": "invalid choice",
    "benchmarks.tune mlp --shape vit_base/b2": "unknown model 'vit_base'; did you mean",
    "benchmarks.tune mlp --dtype int8": "invalid choice",
    "benchmarks.report --nope": "unrecognized arguments: --nope",
}
SCRIPT = """
import contextlib, importlib, io, json, sys
import benchmarks.roofline  # first, so that kernels are compiled and not interpreted
said = {}
for command in json.loads(sys.argv[1]):
    module, *sys.argv[1:] = command.split()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(module).main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    said[command] = code, out.getvalue(), err.getvalue().splitlines()[-1:]
print(json.dumps(said))
"""


pytestmark = pytest.mark.xdist_group("arguments")  # one worker makes what they share


@pytest.fixture(scope="module")
def said():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT, json.dumps([*WRONG])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("command", WRONG)
def test_wrong_argument(said, command):
    code, out, last = said[command]
    assert code == 2 and not out and "error:" in last[0] and WRONG[command] in last[0], said[command]


# ---- what an argument becomes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "want"), [("0.5", 0.5), ("1e-9", 1e-9), ("600", 600.0)])
def test_positive_numbers(text, want):
    assert arguments.positive(text) == want


@pytest.mark.parametrize("text", ["0", "-0.1", "inf", "nan", "-inf", "x", ""])
def test_numbers_that_are_not_positive(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        arguments.positive(text)


def test_counts():
    assert arguments.count("1") == 1 and arguments.count("12") == 12
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            arguments.count(text)


def test_shapes():
    shape = arguments.shape("vit_base_patch16_224@64/b7")
    assert (shape.model, shape.batch, shape.img_size) == ("vit_base_patch16_224", 7, 64)
    assert (shape.tokens, shape.rows, shape.width, shape.hidden, shape.heads, shape.head_dim) == (
        17,
        119,
        768,
        3072,
        12,
        64,
    )
    for text in ("vit_base_patch16_224@64/b0", "vit_base_patch16_224/7", "vit_base_patch16_224@65/b7"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.shape(text)


def test_folders_are_made_and_files_are_not(tmp_path):
    assert arguments.folder(str(tmp_path / "a/b")) == tmp_path / "a/b" and (tmp_path / "a/b").is_dir()
    assert arguments.folder(str(tmp_path / "a")) == tmp_path / "a"  # already exists
    found = arguments.file(str(tmp_path / "c/d.json"))
    assert found == tmp_path / "c/d.json" and found.parent.is_dir() and not found.exists()
    found.write_text("old")
    assert arguments.file(str(found)) == found and found.read_text() == "old"
    for kind, path in ((arguments.file, tmp_path / "a"), (arguments.folder, found), (arguments.file, found / "x")):
        with pytest.raises(argparse.ArgumentTypeError, match="cannot write to "):
            kind(str(path))
