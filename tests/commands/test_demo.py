"""`vit demo` as users run it, and that its checks can fail; the rest of the command line."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from vit import ViTConfig, kernels
from vit.commands import cli
from vit.testing.parity import group_of, make_models, parity, table

Image = pytest.importorskip("PIL.Image")
demo = pytest.importorskip("vit.commands.demo")
OPS = ("patch_embed", "layer_norm", "linear", "attention_qkvpacked", "residual_layer_norm", "mlp", "attention")
TINY = ViTConfig(img_size=32, patch_size=16, num_classes=10, embed_dim=32, depth=1, num_heads=2, reg_tokens=1)


@pytest.mark.ci
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
        paths = [line.split()[:2] for line in part.splitlines() if line.endswith(("operators", "interpreted", "GPU"))]
        path = "pytorch" if "on the CPU: " in part else "triton"
        assert sorted(paths) == sorted([op, path] for op in OPS)
        assert "Parity: pass" in part and "gradient of attn.qkv" in part
    assert done.stdout.count("Parity: ") == len(models)
    assert torch.cuda.is_available() or "No kernel was compiled or ran on a GPU" in done.stdout

    assert os.listdir(tmp_path) == ["cat.png"]
    picture = torch.frombuffer(bytearray(Image.open(tmp_path / "cat.png").tobytes()), dtype=torch.uint8)
    picture = picture.reshape(448 + 8 + 2 * 106 + 8, 904, 3).float()
    photo, overlay = picture[:448].tensor_split([448], dim=1)
    images, maps = picture[456:562], picture[570:]
    assert images[:, -106:].std() > 20 and maps[:, -106:].std() > 10 and (images - maps).abs().mean() > 10
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
    """Its gradient is only rounding noise, so a hundredth of the query's is far too much."""
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


@pytest.mark.parametrize(
    ("passed", "named", "child", "expected"),
    [(True, True, 0, 0), (False, True, 0, 1), (True, False, 0, 1), (True, True, 1, 1), (True, True, -9, 1)],
)
def test_exit_code_follows_the_checks(passed, named, child, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_gpu", lambda: (None, "No GPU"))
    monkeypatch.setattr(demo, "check_model", lambda config, images: (make_models(TINY, images), passed))
    monkeypatch.setattr(demo, "show_times", lambda *args: None)
    monkeypatch.setattr(demo, "draw_rollout", lambda *args: Image.new("RGB", (8, 8)))
    monkeypatch.setattr(demo.trained, "show", lambda *args: (Image.new("RGB", (8, 8)), named))
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


# ---- the parts of the demo -------------------------------------------------------------------------------------------


def test_pictures_become_tensors_from_minus_one_to_one():
    """[B, 3, H, W] of pictures that are wider than high, in fp32."""
    red, grey = Image.new("RGB", (5, 3), (255, 0, 51)), Image.new("RGB", (5, 3), (102, 102, 102))
    red.putpixel((4, 1), (0, 255, 0))
    found = demo.to_tensor([red, grey])
    assert found.shape == (2, 3, 3, 5) and found.dtype is torch.float32
    assert found[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6]) and found[0, :, 1, 4].tolist() == [-1, 1, -1]
    assert torch.allclose(found[1], torch.tensor(-0.2))


def test_a_batch_is_crops_that_are_mirrored_and_zoom_in():
    from PIL import ImageOps

    found, photo = demo.load_batch(40, 5), demo.load_photo()
    assert found.shape == (5, 3, 40, 40)
    for i in range(5):
        crop = ImageOps.fit(photo, (40, 40), bleed=0.02 * (i // 2))
        want = demo.to_tensor([crop])[0]
        assert torch.equal(found[i], want.flip(2) if i % 2 else want)
    left, upper, right, lower = demo.EYE
    assert (lower - upper, right - left) == demo.SMALL.img_size  # the interpreted model's (height, width)


def test_the_interpreted_part_is_the_eye_and_its_mirror_image(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(demo, "check_model", lambda config, images: asked.append((config, images)) or (None, False))
    assert demo.demo_interpreted() is False
    ((config, images),) = asked
    assert config.impl == "triton" and images.shape == (2, 3, *demo.SMALL.img_size)
    left, upper, right, lower = demo.EYE
    whole = demo.to_tensor([demo.load_photo()])[0]
    assert torch.equal(images[0], whole[:, upper:lower, left:right]) and torch.equal(images[1], images[0].flip(2))


@pytest.mark.parametrize(
    ("available", "cuda", "interpreted", "capability", "why"),
    [
        (True, "12.8", False, (8, 0), ""),
        (True, "12.8", False, (10, 0), ""),
        (True, "12.8", False, (7, 5), "a card is older than compute capability 8.0"),
        (True, "12.8", True, (9, 0), "TRITON_INTERPRET is set"),
        (True, None, False, (9, 0), "No NVIDIA GPU was found"),
        (False, "12.8", False, (9, 0), "No NVIDIA GPU was found"),
    ],
)
def test_which_gpu_the_demo_takes(available, cuda, interpreted, capability, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(demo.runtime, "INTERPRETED", interpreted)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    gpu, said = demo.find_gpu()
    assert (gpu == torch.device("cuda")) if not why else (gpu is None and said.startswith(why))


class Timed(torch.nn.Module):
    """Records its calls, and if gradients were on."""

    def __init__(self, name, told):
        super().__init__()
        self.name, self.told, self.scale = name, told, torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        self.told.append((self.name, torch.is_grad_enabled()))
        return images.flatten(1)[:, :5] * self.scale


def test_times_are_medians_per_image_of_runs_in_turn(monkeypatch, capsys):
    """Forward without gradients; ours first; eager/ours is how many times faster ours is."""
    told, seconds = [], {("ours", False): 2, ("eager", False): 3, ("ours", True): 8, ("eager", True): 6}
    models = demo.Models(Timed("ours", told), Timed("eager", told), None, torch.ones(4, 5))
    rounds = iter([100.0] * 4 + [1.0] * 76)  # the median drops the slow first round

    def clock(call):
        call()
        return 1e-3 * seconds[told[-1]] * next(rounds)

    monkeypatch.setattr(demo, "seconds", clock)
    monkeypatch.setattr(demo, "peak_memory", lambda call, device: (call(), 3.4 if told[-1][0] == "ours" else 5.0)[1])
    demo.show_times(models, torch.ones(4, 3, 4, 4))
    assert told == [("ours", False), ("eager", False), ("ours", True), ("eager", True)] * 20 + [
        ("ours", True), ("eager", True)]  # fmt: skip
    out = capsys.readouterr().out
    assert "Time per image in batches of 4, median of 20 rounds" in out
    rows = [" ".join(line.split()) for line in out.splitlines() if "eager/ours" in line]
    assert rows[0] == "forward ours 0.50 ms eager 0.75 ms eager/ours 1.50"
    assert rows[1] == "forward and backward ours 2.00 ms eager 1.50 ms eager/ours 0.75"
    assert "weights not counted: ours 3 MiB, eager 5 MiB" in out


def test_the_picture_is_bright_where_the_class_token_looks(capsys, monkeypatch):
    """The rollout of the class token, without class and register tokens."""
    config = ViTConfig(
        img_size=(32, 64), patch_size=16, num_classes=10, embed_dim=32, depth=2, num_heads=2, reg_tokens=1
    )
    assert config.grid_size == (2, 4) and config.num_prefix_tokens == 2
    row = torch.zeros(1, 10)
    row[0, :2] = 0.4  # prefix tokens
    row[0, 2 + 3] = 0.2  # the upper right patch
    model, images, asked = SimpleNamespace(config=config), torch.zeros(1, 3, 32, 64), []
    monkeypatch.setattr(demo, "rollout", lambda *args: asked.append(args) or row)
    picture = demo.draw_rollout(model, images)
    assert asked == [(model, images)]
    said = capsys.readouterr().out
    assert "a patch gets 0.00 to 2.00 times an equal share" in said  # 0.2 of 1 / 10
    picture = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(448, 904, 3).float()
    photo, gap, overlay = picture.split([448, 8, 448], dim=1)
    assert (gap == 255).all()
    # 0.45 to 0.8 of the colour over the photo in grey: from (10, 6, 40) to (252, 255, 164).
    photo = (photo @ torch.tensor([0.299, 0.587, 0.114]))[..., None]
    dark, bright = (
        (0.55 * photo + 0.45 * torch.tensor([10.0, 6, 40])),
        0.2 * photo + 0.8 * torch.tensor([252.0, 255, 164]),
    )
    assert (overlay - dark)[300:, :100].abs().max() <= 1.5  # lower left
    assert (overlay - bright)[:50, 410:].abs().max() <= 8  # the upper right corner
    assert overlay[:224, 336:].mean() > 1.3 * overlay[:224, :112].mean()


def test_model_that_fails_is_told_and_draws_are_enough(monkeypatch, capsys):
    from vit.testing import Report

    asked, good = [], Report("logits", *[0.0] * 8)
    reports = [good, Report("head.weight", 1.0, *[0.0] * 7)]
    monkeypatch.setattr(demo, "parity", lambda *args, **kw: asked.append(kw["draws"]) or reports)
    images = torch.zeros(1, 3, 32, 32)
    assert demo.check_model(TINY, images)[1] is False and asked == [1 if demo.runtime.INTERPRETED else 32]
    reports.reverse()
    assert demo.check_model(TINY, images)[1] is False
    reports.remove(good), reports.clear(), reports.append(good)
    models, passed = demo.check_model(TINY, images)
    assert passed and models.fast.config == TINY and "residual_layer_norm" in capsys.readouterr().out


@pytest.mark.parametrize("there", [False, True])
def test_a_picture_that_is_there_stays_until_the_new_one(there, tmp_path, monkeypatch):
    """A first test that it can be written leaves no file and loses none."""
    path, seen = tmp_path / "cat.png", []
    if there:
        path.write_bytes(b"old")
    monkeypatch.setattr(demo, "demo", lambda out: seen.append((out, out.exists() and out.read_bytes())) or False)
    assert cli.main(["demo", "--out", str(path)]) == 1
    assert seen == [(path, b"old" if there else False)]
    monkeypatch.setattr(demo, "demo_interpreted", lambda: True)
    monkeypatch.setattr("vit.kernels.runtime.INTERPRETED", True)
    assert cli.main(["demo", "--interpreted"]) == 0 and len(seen) == 1
