"""`vit train`, `vit finetune` and `vit evaluate`: what they print, write and refuse."""

import dataclasses
import json
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from training_runs import images

import vit
from vit.commands import cli
from vit.kernels import runtime
from vit.training.options import MAY_CHANGE, Options

TINY = ["--set", "embed_dim=32", "depth=1", "num_heads=2", "patch_size=4", "-b", "16", "--val-split", ".2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets, and RUN: a run of 6 steps."""
    top = tmp_path_factory.mktemp("command")
    arrays = images(150)
    np.savez(top / "data.npz", **arrays)
    np.savez(top / "other.npz", **images(150, seed=1))
    np.savez(top / "few.npz", **{name: v % 5 if name[0] == "y" else v for name, v in arrays.items()})
    np.savez(top / "colour.npz", **{n: np.repeat(v, 3, 3) if n[0] == "x" else v for n, v in arrays.items()})
    assert cli.main(["train", str(top / "data.npz"), "-o", str(top / "RUN"), "--steps", "6", *TINY]) == 0
    return top


def call(capsys, *words: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a command."""
    capsys.readouterr()
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def tree(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REFUSED = {
    "existing": (["RUN"], "RUN holds a run; continue it with --resume, or choose another -o$"),
    "lr": (["RUN", "--resume", "--lr", ".1"], "RUN was trained with --lr 0.003, not --lr 0.1; choose another -o for"),
    "seed": (["RUN", "--resume", "--seed", "1"], "RUN was trained with --seed 0, not --seed 1; choose another -o for"),
    "model": (["RUN", "--resume", "--model", "vit_tiny"], "RUN was trained with no --model, not --model vit_tiny;"),
    "set": (["RUN", "--resume", "--set", "depth=2"], "with --set embed_dim=32 .* patch_size=4, not --set depth=2;"),
    "flag": (["RUN", "--resume", "--bce-loss"], "RUN was trained with no --bce-loss, not --bce-loss;"),
    "data": (["RUN", "--resume"], r"trained on \S+/data.npz \(digest \w{12}\), not \S+/other.npz \(digest \w{12}\);"),
    "files": (["."], r"holds \S+ and no run; choose another -o$"),
    "no folder": (["data.npz/RUN"], "args.json cannot be read: Not a directory; choose another -o$"),
    "cannot write": (
        ["/proc/new", "-b", "8"],
        "cannot write /proc/new/args.json: No such file or directory; choose another -o$",
    ),
    "lengths": (["new", "--epochs", "1", "--steps", "2"], "--epochs and --steps exclude each other; give one of them$"),
    "warmups": (["new", "--warmup-epochs", "1", "--warmup-steps", "2"], "--warmup-steps exclude each other; give one"),
    "warmup": (["new", "--steps", "9", "--warmup-steps", "9", "-b", "8"], "9 steps is not shorter than the run of 9;"),
    "range": (["new", "--lr", "nan"], "--lr nan must be above 0$"),
    "rate": (["new", "--drop", "1"], r"--drop 1.0 must be at least 0 and below 1$"),
    "batch": (["new", "-b", "999"], "images do not fill a batch of 999"),
    "accumulation": (["new", "-b", "8", "--grad-accum-steps", "99"], "99 is more than the 14 batches of an epoch;"),
    "field": (["new", "--set", "dept=2"], "ViTConfig has no field 'dept'; did you mean 'depth'"),
    "classes": (["new", "--set", "num_classes=5"], "--set num_classes: the data decides it; leave it out"),
    "pool": (["new", "--set", "global_pool="], "--set global_pool: labels need token, avg or map"),
    "masked": (["new", "--objective", "masked", "--set", "patch_drop_rate=.5"], "masked needs all patches; leave it"),
    "value": (["new", "--set", "depth"], "--set takes NAME=VALUE, got 'depth'"),
    "size": (["new", "--img-size", "30", "--set", "patch_size=4"], "height 30 is not a multiple of patch_size 4"),
    "name": (["new", "--model", "vit_tiny"], "unknown model 'vit_tiny'; did you mean"),
    "device": (["new", "--device", "nonsense"], "--device nonsense: .*; use cpu, or leave it out$"),
    "path": (["new", "-b", "8", "--impl", "triton"], "--impl: impl='triton' cannot run: "),
    "decay": (["new", "--objective", "masked", "--layer-decay", ".5"], "--layer-decay needs a classifier"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(folder, capsys, monkeypatch, case):
    (run, *words), said = REFUSED[case]
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    before, data = tree(folder), "other.npz" if case == "data" else "data.npz"
    code, _out, err = call(capsys, "train", folder / data, "-o", folder / run, *words)
    assert code == 2 and err.startswith("vit train: ") and err.count("\n") == 1
    assert re.search(said, err), err
    assert tree(folder) == before and not (folder / "new").exists()


@pytest.mark.parametrize(("run", "limit", "file"), [("new", 50_000, "last.pt"), ("RUN", 20_000, "best.safetensors")])
def test_full_file_system(folder, capsys, run, limit, file):
    """No file of a new run, or of one that is continued, is half-written. The same command with --resume goes on."""
    words = ["train", folder / "data.npz", "-o", folder / run, "--steps", "6", "--resume", *TINY]
    before = {path.name: path.read_bytes() for path in (folder / run).glob("*")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        code, _out, err = call(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and err.count("\n") == 1
    assert re.search(rf"cannot write \S+/{file}: .*File too large.*; free some space; the files before it are", err)
    after = {path.name: path.read_bytes() for path in (folder / run).glob("*")}
    assert after == before if before else set(after) == {"args.json"}
    code, out, _err = call(capsys, *words)
    if run == "new":
        shutil.rmtree(folder / run)
    assert code == 0 and f"| {last_line(out).split()[-1]} |" in (folder / "RUN/README.md").read_text()


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_options_of_the_machine_may_change(folder, capsys, tmp_path):
    words = [folder / "data.npz", "-o", folder / "RUN", "--resume", "--checkpoint-every", "3", "-j", "1"]
    code, out, _err = call(capsys, "train", *words, "--lr", "3e-3", *TINY)  # the same as before is no difference
    assert code == 0 and "continues after step 6" in out
    assert json.loads((folder / "RUN/args.json").read_text())["options"]["workers"] == 0
    assert {"workers", "device", "checkpoint_every", "tensorboard"} == set(MAY_CHANGE)


def test_every_option_is_in_the_help(capsys):
    texts = {name: call(capsys, name, "--help")[1] for name in ("train", "finetune")}
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        for name, left_out in (("train", "weights"), ("finetune", "objective")):
            assert (re.search(rf"{flag}\b", texts[name]) is None) == (field.name == left_out), (name, flag)
    assert re.search(r"--lr LR\s+learning rate \(default: 0.003\)", texts["train"])
    assert "5 % of the run" in texts["train"]


def test_paper_presets_print_the_papers_figures(folder, capsys, tmp_path):
    words = ["-o", tmp_path / "RUN", "--recipe", "paper-finetune", "--weights", folder / "RUN/best.safetensors"]
    code, out, _err = call(capsys, "finetune", folder / "other.npz", *words, "-b", "16", "--steps", "2")
    assert code == 0 and "SGD with momentum 0.9, batch 512" in out and "recipe paper-finetune: sgd" in out
    options = json.loads((tmp_path / "RUN/args.json").read_text())["options"]
    assert (options["batch_size"], options["steps"], options["model_ema_decay"]) == (16, 2, 0.9999)


def test_evaluate(folder, capsys):
    weights = folder / "RUN/best.safetensors"
    code, out, _err = call(capsys, "evaluate", folder / "data.npz", "--weights", weights, "--per-class")
    card = (folder / "RUN/README.md").read_text()
    accuracy = re.search(r"accuracy ([\d.]+) %", out)[0]
    assert code == 0 and f"| test | {accuracy}" in card
    model = vit.load_pretrained(weights).eval()
    assert f"mean {model.pretrained_cfg['mean'][0]:.4f}" in out and "best.safetensors)" in out
    right = re.findall(r"^  \d\s+([\d.]+) %  (\d+) images", out, re.M)
    total = sum(float(share) * int(count) for share, count in right) / sum(int(count) for _share, count in right)
    assert len(right) == 6 and total == pytest.approx(float(accuracy.split()[1]), abs=0.01)


def test_evaluate_takes_files_of_others(folder, capsys, tmp_path):
    vit.save_pretrained(vit.load_pretrained(folder / "RUN/best.safetensors"), tmp_path / "hf", dialect="hf")
    torch.save(vit.load_pretrained(folder / "RUN/best.safetensors").state_dict(), tmp_path / "plain.pt")
    expected = last_line(call(capsys, "evaluate", folder / "data.npz", "--weights", folder / "RUN/best.safetensors")[1])
    code, out, _err = call(capsys, "evaluate", folder / "data.npz", "--weights", tmp_path / "hf")
    assert code == 0 and last_line(out) == expected
    code, out, err = call(capsys, "evaluate", folder / "data.npz", "--weights", tmp_path / "plain.pt")
    assert code == 2 and "nothing tells how many heads its width of 32 has" in err


@pytest.mark.parametrize(
    ("data", "weights", "said"),
    [
        ("colour.npz", "RUN/best.safetensors", r"best.safetensors takes 1 channels, and \S+ has 3"),
        ("few.npz", "RUN/best.safetensors", r"has 6 classes, and \S+ has 5 classes; vit finetune gives it a new head"),
        ("data.npz", "RUN/none.safetensors", "none.safetensors: there is no such file or folder"),
        ("none.npz", "RUN/best.safetensors", "none.npz"),
    ],
)
def test_evaluate_refuses(folder, capsys, data, weights, said):
    code, _out, err = call(capsys, "evaluate", folder / data, "--weights", folder / weights)
    assert code == 2 and err.count("\n") == 1 and re.search(said, err), err


def test_tensorboard_and_matplotlib_are_optional(folder, capsys, tmp_path, monkeypatch):
    import importlib.util

    own = importlib.util.find_spec
    hidden = ("matplotlib", "safetensors")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else own(name, *a))
    code, out, _err = call(capsys, "train", folder / "data.npz", "-o", tmp_path / "RUN", "--steps", "2", *TINY)
    assert code == 0 and out.count("curves.png needs matplotlib and was left out") == 1
    assert out.count("best.npz is written, because safetensors is missing") == 1
    assert not (tmp_path / "RUN/curves.png").exists()
    code, out, _err = call(capsys, "evaluate", folder / "data.npz", "--weights", tmp_path / "RUN/best.npz")
    assert code == 0 and "best.npz)" in out
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    code, _out, err = call(capsys, "train", folder / "data.npz", "-o", tmp_path / "new", "--tensorboard", *TINY)
    assert code == 2 and "--tensorboard needs tensorboard; pip install tensorboard" in err
    assert not (tmp_path / "new").exists()
