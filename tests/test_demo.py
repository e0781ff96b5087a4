"""`vit demo` as a person runs it, and that what it checks can fail; the rest of the command line."""

import os
import subprocess
import sys

import pytest
import torch

from vit import ViTConfig, kernels
from vit.commands import cli
from vit.testing.parity import group_of, make_models, parity, table

Image = pytest.importorskip("PIL.Image")
demo = pytest.importorskip("vit.commands.demo")
OPS = ("patch_embed", "layer_norm", "linear", "attention_qkvpacked", "residual_layer_norm", "mlp")
TINY = ViTConfig(img_size=32, patch_size=16, num_classes=10, embed_dim=32, depth=1, num_heads=2, reg_tokens=1)


def test_demo(tmp_path):
    command = [sys.executable, "-m", "vit", "demo", "--out", "cat.png"]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and "FAIL" not in done.stdout and "PASS" in done.stdout

    parts = done.stdout.split("== ")
    models = [part for part in parts if "Path of each op" in part]
    assert len(models) == (1 if torch.cuda.is_available() else 2)
    for part in models:
        paths = [line.split()[:2] for line in part.splitlines() if line.endswith(("reference", "interpreted", "GPU"))]
        path = "reference" if "on the CPU: " in part else "triton"
        assert sorted(paths) == sorted([op, path] for op in OPS)
        assert "Parity: pass" in part and "gradient of attn.qkv" in part
    assert done.stdout.count("Parity: ") == len(models)
    assert torch.cuda.is_available() or "No kernel was compiled or ran on a GPU" in done.stdout
    assert torch.cuda.is_available() or "ours not measured, eager not measured" in done.stdout

    assert os.listdir(tmp_path) == ["cat.png"]
    picture = torch.frombuffer(bytearray(Image.open(tmp_path / "cat.png").tobytes()), dtype=torch.uint8)
    photo, overlay = picture.reshape(448, 904, 3).float().tensor_split([448], dim=1)
    assert photo.std() > 20 and overlay.std() > 20
    assert (photo - overlay[:, 8:]).abs().mean() > 10


@pytest.mark.parametrize("what", ["weight", "gradient", "nan"])
def test_parity_fails_on_a_small_error(what):
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = make_models(TINY, image)
    reports = parity(models, image)
    assert all(report.ok for report in reports) and "Parity: pass" in table(reports)
    fc1 = models.fast.blocks[0].mlp.fc1
    if what == "weight":
        with torch.no_grad():
            fc1.weight[3, 5] += 1e-3
    else:  # the logits stay right
        fc1.weight.register_hook(lambda grad: grad * (1 + 1e-4 if what == "gradient" else float("nan")))
    reports = parity(models, image)
    failed = {report.name for report in reports if not report.ok}
    assert "logits" in failed if what == "weight" else failed == {"blocks.0.mlp.fc1.weight"}
    assert "Parity: FAIL" in table(reports)
    (row,) = [line for line in table(reports).splitlines() if "gradient of mlp.fc1" in line]
    assert row.endswith("FAIL")


def test_key_bias_is_judged():
    """Its gradient is zero but for rounding, so a hundredth of the query's is far too much."""
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = make_models(TINY, image)

    def disturb(grad):
        grad = grad.clone()
        grad[32:64] += 1e-2 * grad[:32]
        return grad

    models.fast.blocks[0].attn.qkv.bias.register_hook(disturb)
    assert [r.name for r in parity(models, image) if not r.ok] == ["blocks.0.attn.qkv.bias"]


def test_every_parameter_has_a_group():
    config = ViTConfig(32, 16, num_classes=10, embed_dim=32, depth=1, num_heads=2, init_values=0.1, fc_norm=True)
    models = make_models(config, torch.zeros(1, 3, 32, 32))
    groups = [group_of(name) for name, _ in models.fast.named_parameters()]
    assert len(set(groups)) == 9 and groups[-1] == "head" and "LayerScale" in groups


@pytest.mark.parametrize(("passed", "child", "expected"), [(True, 0, 0), (False, 0, 1), (True, 1, 1), (True, -9, 1)])
def test_exit_code_follows_the_checks(passed, child, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_gpu", lambda: (None, "No GPU"))
    monkeypatch.setattr(demo, "check_model", lambda config, images: (make_models(TINY, images), passed))
    monkeypatch.setattr(demo, "show_times", lambda *args: None)
    monkeypatch.setattr(demo, "show_attention", lambda *args: None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, child))
    assert cli.main(["demo", "--out", str(tmp_path / "x.png")]) == expected


@pytest.mark.interpreted
def test_interpreted_part_fails_with_a_wrong_kernel(monkeypatch):
    monkeypatch.setattr(demo, "SMALL", TINY)
    monkeypatch.setattr(demo, "EYE", (138, 91, 170, 123))
    linear = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *args, **kwargs: linear(*args, **kwargs) * (1 + 1e-4))
    assert cli.main(["demo", "--interpreted"]) == 1


def test_interpreted_needs_the_variable(monkeypatch, capsys):
    monkeypatch.setattr("vit.kernels.runtime.INTERPRETED", False)
    assert cli.main(["demo", "--interpreted"]) == 2
    captured = capsys.readouterr()
    assert "TRITON_INTERPRET=1" in captured.err and captured.out == ""


@pytest.mark.parametrize("out", ["missing/cat.png", "."])
def test_unwritable_picture(out, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", "--out", out]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and f"cannot write {out}" in captured.err


def test_missing_pillow(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "pip install Pillow" in capsys.readouterr().err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"torch     {torch.__version__}" in text and "vit_base_patch16_224" in text
    assert torch.cuda.is_available() or "none: CPU tensors run" in text


@pytest.mark.parametrize(
    ("args", "shown"), [([], ["demo", "info"]), (["demo"], ["--out PATH", "exit code"]), (["info"], ["models"])]
)
def test_help(args, shown, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*args, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(word in text for word in shown) and "--interpreted" not in text


@pytest.mark.parametrize("args", [[], ["bench"], ["demo", "--nonsense"], ["info", "extra"]])
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2 and "usage: vit" in capsys.readouterr().err
