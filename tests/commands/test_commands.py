"""The commands: what each option does, what each exit status means, and what their checks judge."""

import contextlib
import json
import math
import re
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vit
from vit import preprocess
from vit.commands import classify, cli, warmup
from vit.commands import parity as parity_command
from vit.kernels import runtime
from vit.testing import Report, assert_parity, measure, parity
from vit.training.options import assignment

TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 7}


def parsed(*args: str):
    return cli._parser().parse_args(args)


# ---- options and exit statuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "want"),
    [
        (["--set", "depth=2"], ["depth=2"]),
        (["--set", "depth=2", "num_heads=2"], ["depth=2", "num_heads=2"]),
        (
            ["--set", "depth=2", "--set", "num_heads=2", "--set", "img_size=32"],
            ["depth=2", "num_heads=2", "img_size=32"],
        ),
        ([], []),
    ],
)
def test_settings_add_up(args, want):
    assert parsed("parity", "--model", "timm:x", *args).set == want


def test_defaults_of_the_options():
    told = {
        ("parity", "--model", "x"): {
            "dtype": "float32",
            "batch_size": 2,
            "impl": "auto",
            "img_size": None,
            "image": None,
        },
        ("classify", "a.jpg", "--weights", "w"): {"top": 5, "model": None, "preprocess": None},
        ("warmup", "m"): {"dtype": "bf16", "batch_size": 1, "train": False, "autocast": False, "device": "cuda"},
    }
    for args, want in told.items():
        assert {k: v for k, v in vars(parsed(*args)).items() if k in want} == want


@pytest.mark.parametrize(
    ("text", "want"), [("224", (224, 224)), ("224x160", (224, 160)), ("1x999999999", (1, 999999999))]
)
def test_sizes_are_height_and_width(text, want):
    assert parsed("parity", "--model", "x", "--img-size", text).img_size == want


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "x2", "2x0", "2x3x4", "1e3", " 3", "9" * 10])
def test_sizes_that_are_none(text, capsys):
    for args in (["parity", "--model", "x", "--img-size", text], ["warmup", "m", "--img-size", text]):
        with pytest.raises(SystemExit) as stopped:
            parsed(*args)
        assert stopped.value.code == 2


@pytest.mark.parametrize(("found", "status"), [(True, 0), (False, 1), (parity_command.CannotStart("no"), 2)])
def test_exit_status_of_parity(found, status, monkeypatch, capsys):
    def check(args):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(parity_command, "check", check)
    assert cli.main(["parity", "--model", "timm:x"]) == status


@pytest.mark.parametrize(
    "args", [["classify", "no.jpg", "--weights", "no.pt"], ["warmup", "no_model", "--arch", "sm_90"]]
)
def test_exit_status_of_what_cannot_start(args, capsys):
    pytest.importorskip("PIL")
    assert cli.main(args) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "arch"), [("sm_80", 80), ("sm_89", 89), ("sm_90", 90), ("sm_100", 100), ("sm_120", 120)]
)
def test_architectures(text, arch):
    assert warmup._arch(text) == arch and warmup._arch(None) is None


@pytest.mark.parametrize("text", ["sm_75", "sm_79", "sm_8", "sm_09", "90", "sm90", "sm_9.0", "sm_1000", ""])
def test_architectures_that_are_none(text):
    with pytest.raises(ValueError, match=r"--arch .*(is not understood|need compute capability 8\.0)"):
        warmup._arch(text)


# ---- classify --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "photo.png"
    generator = torch.Generator().manual_seed(0)
    image.fromarray(torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)
    return path


def saved(folder, **fields):
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | fields), seed=0).eval()
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(3))
    model.pretrained_cfg = {
        "source": "hf", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "label_names": [f"name {i}" for i in range(7)]
    }  # fmt: skip
    vit.save_pretrained(model, folder, "hf")
    return model


def test_classify_computes_what_the_model_does(photo, tmp_path):
    """In evaluation, prepared as the folder says; each line is a class and its probability, the largest first."""
    model = saved(tmp_path / "folder", attn_drop_rate=0.5, proj_drop_rate=0.5, pos_drop_rate=0.5, act_drop_rate=0.0)
    lines = classify.classify(photo, tmp_path / "folder", top=3).splitlines()
    assert lines == classify.classify(photo, tmp_path / "folder", top=3).splitlines()
    pixels = preprocess.of_folder(tmp_path / "folder", (32, 32))(preprocess.open_photo(photo))
    probs = model(pixels)[0].softmax(0)
    want = [f"  {100 * probs[i]:6.2f} %  name {i} ({i})" for i in probs.argsort(descending=True)[:3].tolist()]
    assert lines[1:] == want
    assert len(classify.classify(photo, tmp_path / "folder", top=99).splitlines()) == 8


@pytest.mark.parametrize("dynamic", [False, True])
def test_classify_takes_another_size_if_the_model_does(dynamic, photo, tmp_path):
    model = saved(tmp_path / "folder", dynamic_img_size=dynamic)
    (tmp_path / "folder/preprocessor_config.json").write_text('{"size": {"height": 64, "width": 48}}')
    if not dynamic:
        with pytest.raises(ValueError, match="makes 48 x 64 pixels, but the model takes 32 x 32"):
            classify.classify(photo, tmp_path / "folder")
        return
    pixels = preprocess.of_folder(tmp_path / "folder", (32, 32))(preprocess.open_photo(photo))
    probs = model(pixels)[0].softmax(0)
    assert pixels.shape[2:] == (64, 48)
    assert f"{100 * probs.max():.2f} %" in classify.classify(photo, tmp_path / "folder").splitlines()[1]


def test_classify_prepares_as_it_is_told(photo, tmp_path):
    saved(tmp_path / "folder")
    of_folder = classify.classify(photo, tmp_path / "folder")
    asked = classify.classify(photo, tmp_path / "folder", source="timm-imagenet")
    assert "preprocessor_config.json" in of_folder and "timm, deit" in asked and of_folder != asked
    alone = tmp_path / "weights.pt"
    model = torch.nn.Module()
    for source, name in {"torchvision_old": "torchvision", "hf_memory": "hf", "google": "google"}.items():
        model.pretrained_cfg = {"source": source}
        assert classify._source(model, alone) == name
    model.pretrained_cfg = {"source": "timm"}
    with pytest.raises(ValueError, match=r"nothing beside .* tells how a picture is prepared"):
        classify._source(model, alone)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00001.safetensors"])
def test_a_file_that_transformers_names_has_what_lies_beside_it(name, photo, tmp_path):
    saved(tmp_path / "folder")
    weights = tmp_path / "folder" / name
    model = vit.load_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").unlink()
    vit.save_pretrained(model, weights, "hf")
    shown = classify.classify(photo, weights)
    assert "preprocessor_config.json" in shown and "name 1" in shown


def test_names_beside_a_file_of_another_name_are_not_its(photo, tmp_path):
    """model.safetensors uses the files next to it; weights of another name in the same folder use their own note."""
    saved(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "folder" / "mine.safetensors")
    config = tmp_path / "folder" / "config.json"
    config.write_text(config.read_text().replace("name ", "other "))
    assert preprocess.class_names(tmp_path / "folder")[1] == "other 1"
    shown = classify.classify(photo, tmp_path / "folder" / "mine.safetensors", source="hf")
    assert "other" not in shown and "  name 1 (1)" in shown
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"id2label": {str(i): f"LABEL_{i}" for i in range(7)}})
    )
    assert preprocess.class_names(tmp_path / "folder") == {}


# ---- what the checks judge -------------------------------------------------------------------------------------------


def test_signed_bias_is_towards_or_away_from_zero():
    """Errors that shrink or grow all values are a bias; errors of one sign on values of both signs are not."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, 100, generator=generator, dtype=torch.float64)
    exact = torch.cat([exact, -exact])
    eager = exact + 0.5 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    for scope in ("op", "model"):
        for bias in (-0.5, 0.5):
            report = measure((exact + bias * exact.sign()).bfloat16(), eager.bfloat16(), exact, scope=scope)
            assert not report.ok, (scope, bias)
        assert measure((exact + 0.5).bfloat16(), eager.bfloat16(), exact, scope=scope).ok, scope


def test_the_table_shows_a_tensor_that_failed_before_one_that_passed():
    """The worst of a group, even NaN, whose share of a limit cannot be compared."""
    good = Report("blocks.0.attn.qkv.weight", 0.9, 1.0, 1.1, 0.9, 1.0, 1.5, 0.0, 1.0)
    nan = Report("blocks.1.attn.qkv.weight", *[math.nan, 1.0, 1.1], *[math.nan, 1.0, 1.5], math.nan, 1.0)
    large = Report("blocks.2.attn.qkv.weight", 1.2, 1.0, 1.1, 0.9, 1.0, 1.5, 0.0, 1.0)
    for bad in (nan, large):
        for reports in ([good, bad], [bad, good]):
            (row,) = [line for line in parity.table(reports).splitlines() if line.startswith("  gradient of")]
            assert row.endswith("FAIL") and f"{bad.rms:.2e}" in row
            assert "Parity: FAIL, 1 of 2 tensors" in parity.table(reports)
    assert "Parity: pass, 1 of 1 tensors" in parity.table([good])


@pytest.mark.skipif(not runtime.INTERPRETED and not torch.cuda.is_available(), reason="needs kernels")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_parity_runs_what_was_asked_for(impl, monkeypatch):
    """The copy in eager PyTorch and the one in fp64 call no op."""
    monkeypatch.setattr(parity, "enough_draws", lambda models: 2)  # 32 interpreted ones take minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"depth": 2}), seed=0).to(device)
    with runtime.record_choices() as choices:
        assert_parity(model, torch.randn(1, 3, 32, 32, device=device), impl=impl)
    assert choices and {choice.path for choice in choices} == {impl}


@pytest.mark.parametrize(("parameters", "draws"), [(10_000_000, 8), (9_999_999, 32)])
def test_small_models_take_more_draws(parameters, draws):
    """Below ten million parameters in the eager copy, frozen ones included."""
    eager = torch.nn.Module()
    eager.a = torch.nn.Parameter(torch.empty(parameters - 1, device="meta"), requires_grad=False)
    eager.b = torch.nn.Parameter(torch.empty(1, device="meta"))
    assert parity.enough_draws(parity.Models(torch.nn.Module(), eager, None, torch.ones(1))) == draws


class Taps(torch.nn.Module):
    """Returns five pixels of each image, scaled; records its arguments and its gradient."""

    def __init__(self, told):
        super().__init__()
        self.told, self.scale = told, torch.nn.Parameter(torch.ones(5))
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, images, **options):
        out = images.flatten(1)[:, :5] * self.scale * self.frozen
        out.register_hook(lambda grad: self.told.append((images.detach().clone(), grad.clone(), options)))
        return out


def test_each_draw_shifts_the_images_and_the_cotangent():
    """All three models of a draw get the same, and the options of the call; ``images`` stays as it is."""
    told, images, direction = [], torch.randn(3, 2, 4, 7), torch.randn(3, 5)
    before = images.clone()
    models = parity.Models(Taps(told), Taps(told), Taps(told).double(), direction, {"word": 1})
    steps = []

    @contextlib.contextmanager
    def progress(text):
        steps.append(text)
        yield

    assert all(report.ok for report in parity.parity(models, images, progress, draws=3))
    assert len(told) == 9 and torch.equal(images, before) and not images.requires_grad
    for i, (seen, grad, options) in enumerate(told):
        assert seen.dtype == grad.dtype == (torch.float64 if i % 3 == 2 else torch.float32)
        columns = [(column - 5 * (i // 3)) % 7 for column in range(7)]
        assert torch.equal(seen.float(), images[..., columns]) and options == {"word": 1}
        flat = [(k - i // 3) % 15 for k in range(15)]
        assert torch.equal(grad.float(), direction.flatten()[flat].view(3, 5))
    assert steps == [f"forward and backward of all three, draw {i} of 3" for i in (1, 2, 3)]
    steps.clear()
    reports = parity.parity(models, images, progress)
    assert steps == [f"forward and backward, {name}" for name in ("this package", "eager PyTorch", "fp64")]
    assert [report.name for report in reports] == ["logits", "image", "scale"]


def test_results_are_the_output_and_the_gradients_of_what_requires_one():
    model, images, direction = Taps([]), torch.randn(3, 2, 4, 7), torch.randn(3, 5)
    found = parity.results(model, images, direction)
    assert list(found) == ["logits", "image", "scale"] and not found["logits"].requires_grad
    five = images.flatten(1)[:, :5]
    assert torch.equal(found["logits"], five) and torch.allclose(found["scale"], (five * direction).sum(0))
    want = torch.zeros(3, 56)
    want[:, :5] = direction
    assert torch.equal(found["image"], want.view(3, 2, 4, 7)) and model.scale.grad is None and images.grad is None


@pytest.mark.parametrize("enabled", [True, False])
def test_convolutions_have_their_setting_back_even_after_an_error(enabled, monkeypatch):
    """cuDNN is off for fp32 alone, and never switched on."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", enabled)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ZeroDivisionError), parity._ieee_convolutions(dtype):
            assert torch.backends.cudnn.enabled is (enabled and dtype is not torch.float32)
            raise ZeroDivisionError
        assert torch.backends.cudnn.enabled is enabled


@pytest.mark.parametrize(
    ("returned", "name", "index"),
    [
        ({"loss": torch.tensor(1.0), "logits": torch.ones(2), "hidden": torch.ones(3)}, "logits", 2),
        ({"states": None, "last_hidden_state": torch.ones(2), "logits": torch.ones(3)}, "last_hidden_state", 2),
        ({"reconstruction": torch.ones(2)}, "output", 2),
        ((torch.ones(2), torch.ones(3)), "logits", 2),
        (torch.ones(2), "logits", 2),
    ],
)
def test_the_output_is_the_first_tensor_with_dimensions(returned, name, index):
    found, tensor = parity.output_of(returned)
    assert found == name and tensor.shape == (index,)


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ({"config": SimpleNamespace(image_size=(32, 48))}, (32, 48)),
        ({"config": SimpleNamespace(image_size=32)}, (32, 32)),
        ({"config": SimpleNamespace(img_size=[32, 48])}, (32, 48)),
        ({"config": SimpleNamespace(), "image_size": 64}, (64, 64)),
        ({"patch_embed": SimpleNamespace(img_size=(32, 48))}, (32, 48)),
        ({"patch_embed": SimpleNamespace(img_size=None), "pretrained_cfg": {"input_size": (3, 32, 48)}}, (32, 48)),
        ({"pretrained_cfg": None}, None),
        ({}, None),
    ],
)
def test_the_image_size_that_each_library_states(said, size):
    """(height, width), a tuple."""
    assert parity.image_size(SimpleNamespace(**said)) == size


def test_example_images_are_of_the_models_size_and_dtype():
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"img_size": (32, 48), "in_chans": 2}), seed=0).bfloat16()
    state = torch.get_rng_state()
    images = parity.example(model)
    assert images.shape == (2, 2, 32, 48) and images.dtype is torch.bfloat16
    assert torch.equal(images, parity.example(model)) and images.float().std().item() == pytest.approx(1, abs=0.1)
    assert parity.example(model, 3, (64, 16)).shape == (3, 2, 64, 16)
    assert torch.equal(torch.get_rng_state(), state)
    other = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 1))  # a model that says its channels and not its size
    assert parity.example(other, 1, (8, 6)).shape == (1, 5, 8, 6)
    with pytest.raises(ValueError, match=r"^Sequential does not say which images it takes"):
        parity.example(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_copies_have_the_same_rounded_weights(dtype):
    """Of a model in training, with every dropout: the copies are in eval(), in the images' dtype, and in fp64."""
    rates = dict.fromkeys(("pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.5)
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"img_size": (32, 48), "depth": 2}, **rates), seed=0).train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    images = torch.randn(3, 3, 32, 48, dtype=dtype)
    models = parity.copies(model, images, interpolate_pos_encoding=True)
    assert model.training and all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert type(models.fast) is vit.VisionTransformer and type(models.eager) is vit.reference.VisionTransformer
    for copied, kind in ((models.fast, dtype), (models.eager, dtype), (models.exact, torch.float64)):
        assert not any(module.training for module in copied.modules())
        for name, p in copied.state_dict().items():
            assert p.dtype is kind and torch.equal(p.double(), before[name].to(dtype).double()), name
            assert p.data_ptr() != model.state_dict()[name].data_ptr()
    assert models.direction.shape == (3, 7) and models.direction.dtype is dtype
    assert models.options == {"interpolate_pos_encoding": True}
    with torch.no_grad():
        assert torch.equal(models.fast(images), models.fast(images))


def test_copies_call_the_model_with_the_options(monkeypatch):
    """Also the call that finds the shape of the output."""
    asked = []

    class Options(torch.nn.Linear):
        def forward(self, images, **options):
            asked.append(options)
            return super().forward(images)

    monkeypatch.setattr(parity, "accelerate", lambda model, impl: asked.append(impl) or model)
    models = parity.copies(Options(4, 6), torch.ones(3, 4), "reference", word=1)
    assert asked == ["reference", {"word": 1}] and models.direction.shape == (3, 6)


def test_made_models_are_the_same_and_no_parameter_is_left_at_its_start():
    config, images = vit.ViTConfig(**TINY | {"init_values": 1.0}), torch.zeros(4, 3, 32, 32, dtype=torch.bfloat16)
    models, again = parity.make_models(config, images), parity.make_models(config, images)
    assert models.direction.shape == (4, 7)
    assert models.direction.dtype is torch.bfloat16 and torch.equal(models.direction, again.direction)
    exact = dict(models.exact.named_parameters())
    for name, p in models.fast.named_parameters():
        assert p.dtype is torch.bfloat16 and exact[name].dtype is torch.float64
        assert torch.equal(p.double(), exact[name]) and torch.equal(p, dict(models.eager.named_parameters())[name])
        assert torch.equal(p, dict(again.fast.named_parameters())[name])
        assert p.float().std() > 0.03 and not (p == 1).all() and not (p == 0).any(), name


def test_widening_adds_noise_of_a_twentieth():
    model = torch.nn.Linear(300, 100)
    before = model.weight.detach().clone()
    parity.widen(model, torch.Generator().manual_seed(0))
    noise = (model.weight - before).detach()
    assert noise.std().item() == pytest.approx(0.05, rel=0.02) and abs(noise.mean().item()) < 0.001
    assert model.weight.requires_grad and model.weight.grad_fn is None


def test_the_table_by_hand():
    """Groups in the order of their first tensor, each with its worst; at most five of the failures."""
    bad = [Report(f"blocks.{i}.norm1.weight", 2.0 + i, 1.0, 1.5, 1.0, 1.0, 1.5, 0.0, 1.0) for i in range(7)]
    fine = [Report(name, 1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 0.0, 1.0) for name in ("logits", "image", "head.weight")]
    worse = Report("head.bias", 1.0, 2.0, 4.0, 3.0, 2.0, 4.0, 0.0, 1.0)
    lines = parity.table([*fine, worse, *bad]).splitlines()
    assert lines[1].split() == ["tensors", "ours", "eager", "limit", "verdict"]
    numbers = ["1.00e+00", "2.00e+00", "4.00e+00", "pass"]
    assert [line.split() for line in lines[2:6]] == [
        ["logits", "1", *numbers],
        ["gradient", "of", "image", "1", *numbers],
        ["gradient", "of", "head", "2", *numbers],
        ["gradient", "of", "norms", "7", "8.00e+00", "1.00e+00", "1.50e+00", "FAIL"],
    ]
    assert lines[6:11] == [f"  FAIL {report}" for report in bad[:5]]
    assert lines[11:] == ["Parity: FAIL, 4 of 11 tensors within all limits"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_assert_parity_passes_on_what_it_was_given(dtype, monkeypatch):
    """The dtype, the path and enough draws; the error counts the failures, with a line for each."""
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"img_size": (32, 48)}), seed=0).half()
    asked, reports = [], [Report(name, 1.0, 1.0, limit, *[0.0] * 5) for name, limit in (("a", 2), ("b", 0.5), ("c", 0))]
    copies = parity.copies

    def copied(model, images, impl):
        asked.append((images.dtype, tuple(images.shape), impl))
        return copies(model, images, impl)

    monkeypatch.setattr(parity, "copies", copied)
    monkeypatch.setattr(parity, "parity", lambda models, images, draws: asked.append((images.dtype, draws)) or reports)
    with pytest.raises(AssertionError) as failure:
        assert_parity(model, dtype=dtype, impl="reference")
    dtype = dtype or torch.float16
    assert asked == [(dtype, (2, 3, 32, 48), "reference"), (dtype, 32)]
    assert str(failure.value).splitlines() == ["2 of 3 tensors exceed a limit:", str(reports[1]), str(reports[2])]
    del reports[1:]
    assert assert_parity(model, torch.zeros(1, 3, 32, 48)) == reports and asked[2][:2] == (
        torch.float16,
        (1, 3, 32, 48),
    )
    for wrong in (torch.float64, torch.int64):
        with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16"):
            assert_parity(model, dtype=wrong)


# ---- vit parity, without another library -----------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch):
    """Replaces timm by a model of this package; records what was asked for and compared."""
    told = SimpleNamespace(asked=[], drawn=[], states=[], compared=[], reports=[Report("logits", *[0.0] * 8)])

    def make(name, img_size, overrides):
        told.asked.append((name, img_size, overrides))
        told.drawn.append(torch.randn(3))
        return vit.VisionTransformer(vit.ViTConfig(**TINY | {"img_size": img_size or (32, 48)}), seed=0), "a stand-in"

    def compare(models, images, progress, draws):
        told.compared.append((models, images, draws))
        return told.reports

    def copied(*args, **kwargs):
        told.states.append(torch.get_rng_state())
        return parity.copies(*args, **kwargs)

    monkeypatch.setitem(parity_command.MAKERS, "timm", make)
    monkeypatch.setattr(parity_command, "copies", copied)
    monkeypatch.setattr(parity_command, "parity", compare)
    return told


def test_parity_uses_every_option(made, capsys):
    """No option is lost. The weights are those of seed 0, and use no random numbers of the caller."""
    torch.manual_seed(7)
    state = torch.get_rng_state()
    words = "parity --model timm:some.name --dtype float16 --batch-size 3 --img-size 48x32 --impl reference"
    words += " --device cpu --set depth=2 word=a=b drop_rate=0.5"
    assert cli.main(words.split()) == 0 and torch.equal(made.states[0], state)
    assert torch.equal(made.drawn[0], torch.randn(3, generator=torch.Generator().manual_seed(0)))
    assert made.asked == [("some.name", (48, 32), {"depth": 2, "word": "a=b", "drop_rate": 0.5})]
    ((models, images, draws),) = made.compared
    assert images.shape == (3, 3, 48, 32) and images.dtype is torch.float16 and images.device.type == "cpu"
    assert models.fast.config.impl == "reference" and models.fast.pos_embed.dtype is torch.float16 and draws == 32
    out = capsys.readouterr().out
    assert "a stand-in, 0.0 M parameters; float16 on cpu, images [3, 3, 48, 32]" in out
    assert "No kernel ran, so this judged the adapter and not the kernels." in out and "Parity: pass, 1 of 1" in out


def test_parity_has_defaults(made, capsys):
    assert cli.main(["parity", "--model", "timm:x", "--device", "cpu"]) == 0
    ((models, images, _),) = made.compared
    assert made.asked == [("x", None, {})] and models.fast.config.impl == "auto"
    assert images.shape == (2, 3, 32, 48) and images.dtype is torch.float32


@pytest.mark.parametrize("oks", [(True, True), (False, True), (True, False)])
def test_parity_holds_if_every_tensor_is_within_its_limits(oks, made, capsys):
    made.reports = [Report(f"blocks.{i}.norm1.weight", 1.0, 1.0, 2.0 * ok, *[0.0] * 5) for i, ok in enumerate(oks)]
    assert cli.main(["parity", "--model", "timm:x", "--device", "cpu"]) == (0 if all(oks) else 1)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("depth=2", ("depth", 2)),
        ("rate=0.5", ("rate", 0.5)),
        ("act=gelu", ("act", "gelu")),
        ("flag=False", ("flag", False)),
        ("nothing=None", ("nothing", None)),
        ("size=(32, 48)", ("size", (32, 48))),
        ("a=b=c", ("a", "b=c")),
        ("text='2'", ("text", "2")),
        ("empty=", ("empty", "")),
    ],
)
def test_values_of_settings(text, want):
    assert assignment(text) == want


@pytest.mark.parametrize("text", ["depth", "=2", "", "a b=2", "2x=3", "--dtype=float16"])
def test_settings_that_are_none(text):
    with pytest.raises(parity_command.CannotStart, match="--set takes NAME=VALUE, got "):
        assignment(text, parity_command.CannotStart)


def test_names_of_each_library_are_checked_as_the_field_they_stand_for(made, capsys):
    """A wrong value is refused before the library sees it, under the library's own name. Tuples are passed on."""
    wrong = {"timm:x": "embed_dim", "hf:x": "hidden_size", "torchvision:x": "hidden_dim"}
    for model, word in wrong.items():
        assert cli.main(["parity", "--model", model, "--set", f"{word}=-1"]) == 2
        assert f"cannot build the model: {word}=-1 must be" in capsys.readouterr().err
    assert cli.main(["parity", "--model", "timm:x", "--device", "cpu", "--set", "num_heads=(2,3)", "other=-1"]) == 0
    assert made.asked == [("x", None, {"num_heads": (2, 3), "other": -1})]


def test_only_this_packages_warnings_become_notes():
    with pytest.warns(UserWarning) as others, parity_command.collected_notes() as notes:
        for _ in range(2):
            warnings.warn("accelerate: a part is left alone", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert notes == ["accelerate: a part is left alone"] * 2
    assert [str(warning.message) for warning in others] == ["something else"]


@pytest.mark.parametrize(
    "kind", [ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError, OSError, ZeroDivisionError]
)
def test_which_errors_are_explained(kind):
    expected = kind if kind is ZeroDivisionError else parity_command.CannotStart
    with (
        pytest.raises(expected, match="" if kind is ZeroDivisionError else "^cannot do it: .*why"),
        parity_command.explained("cannot do it"),
    ):
        raise kind("why")


def test_a_library_that_lacks_another_or_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "fvt_lacks.py").write_text("import fvt_needed")
    (tmp_path / "fvt_raises.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in {
        "fvt_absent": "fvt_absent is missing; pip install fvt_absent",
        "fvt_lacks": "fvt_needed is missing; pip install fvt_needed",
        "fvt_raises": "fvt_raises is installed but cannot be imported: built for another torch",
    }.items():
        with pytest.raises(parity_command.CannotStart, match=f"^{message}$"):
            parity_command.library(name)


def test_crops_of_a_photograph_are_upright_mirrored_and_nearer(tmp_path):
    """[B, 3, H, W] of a picture with another shape: odd crops are mirrored, and each pair zooms in by 2 % more."""
    image, ops = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    pixels = torch.randint(0, 255, (60, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    photo = image.fromarray(pixels.numpy())
    photo.save(tmp_path / "photo.png")
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"img_size": (32, 48)}), seed=0)
    args = parsed("parity", "--model", "x", "--image", str(tmp_path / "photo.png"), "--batch-size", "5")
    found = parity_command._images(model, args)
    assert found.shape == (5, 3, 32, 48)
    for i in range(5):
        crop = ops.fit(photo, (48, 32), bleed=0.02 * (i // 2))
        crop = torch.tensor(list((ops.mirror(crop) if i % 2 else crop).tobytes())).view(32, 48, 3).movedim(2, 0)
        want = (crop.double() - crop.double().mean()) / crop.double().std()  # for any mean and std of a library
        assert torch.allclose((found[i].double() - found[i].mean()) / found[i].std(), want, atol=1e-3)
    one = vit.VisionTransformer(vit.ViTConfig(**TINY | {"in_chans": 1}), seed=0)
    with pytest.raises(parity_command.CannotStart, match="takes 1 channels; a photograph has 3"):
        parity_command._images(one, args)
    without = parsed("parity", "--model", "x", "--batch-size", "5", "--img-size", "16x64")
    assert parity_command._images(one, without).shape == (5, 1, 16, 64)


def test_only_a_model_that_can_interpolate_is_asked_to_and_only_for_another_size():
    class Interpolates(torch.nn.Module):
        config = SimpleNamespace(image_size=(32, 48))

        def forward(self, pixel_values, interpolate_pos_encoding=False):
            return pixel_values

    class Square(torch.nn.Module):
        config = SimpleNamespace(image_size=(32, 48))

        def forward(self, pixel_values):
            return pixel_values

    for size, want in (((32, 48), {}), ((48, 32), {"interpolate_pos_encoding": True})):
        assert parity_command.call_options(Interpolates(), torch.ones(1, 3, *size)) == want
        assert parity_command.call_options(Square(), torch.ones(1, 3, *size)) == {}


# ---- classify, warmup, all commands ----------------------------------------------------------------------------------


def test_classify_names_width_and_height(tmp_path):
    """With a picture and a model that are not square; only the top two classes."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (50, 40), (200, 10, 90)).save(tmp_path / "wide.png")
    saved(tmp_path / "folder", img_size=(32, 48))
    said = classify.classify(tmp_path / "wide.png", tmp_path / "folder", top=2, source="timm-imagenet")
    assert said.startswith(f"{tmp_path / 'wide.png'}, 50 x 40 pixels: ") and len(said.splitlines()) == 3
    (tmp_path / "headless").mkdir()
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"num_classes": 0}), seed=0)
    vit.save_pretrained(model, tmp_path / "headless" / "weights.safetensors", "timm")
    with pytest.raises(ValueError, match=r"weights\.safetensors has no classification head"):
        classify.classify(tmp_path / "wide.png", tmp_path / "headless" / "weights.safetensors")


def test_classify_passes_its_options_on(monkeypatch, capsys):
    pytest.importorskip("PIL")
    asked = []
    monkeypatch.setattr(classify, "classify", lambda *args: asked.append(args) or "said")
    words = "classify a.jpg --weights w.pt --model m --top 3 --preprocess hf"
    assert cli.main(words.split()) == 0 and cli.main(words.split()[:4]) == 0
    assert asked == [(Path("a.jpg"), Path("w.pt"), "m", 3, "hf"), (Path("a.jpg"), Path("w.pt"), None, 5, None)]
    assert capsys.readouterr().out == "said\nsaid\n"


@pytest.mark.parametrize("words", [["classify", "a.jpg", "--weights", "w"], ["parity", "--model", "x", "--image", "a"]])
def test_without_pillow_the_command_says_so(words, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert err == f"vit {words[0]}: Pillow is missing, which reads pictures; pip install Pillow\n" and out == ""


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_what_warmup_raises_is_one_line(error, monkeypatch, capsys):
    def fails(args):
        raise error("not here")

    monkeypatch.setattr(warmup, "command", fails)
    assert cli.main(["warmup", "m"]) == 2 and capsys.readouterr().err == "vit warmup: not here\n"


def test_a_reader_that_has_enough_is_no_error_of_ours(monkeypatch):
    """As in `vit info | head`: exit status 1, and nothing else is raised."""
    told = []

    def closed(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr(cli.os, "dup2", lambda *fds: told.append(fds))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1, write=closed, flush=closed))
    assert cli.main(["info"]) == 1 and [target for _, target in told] == [1]


def test_info_and_version(capsys):
    import numpy
    import triton

    assert cli.main(["info"]) == 0
    rows = capsys.readouterr().out.splitlines()
    said = {row[:10].strip(): row[10:] for row in rows if row[:10].strip()}
    assert said["fused-vit"] == vit.__version__ and said["torch"] == torch.__version__
    assert said["triton"] == triton.__version__ and said["numpy"] == numpy.__version__
    assert [row[10:] for row in rows[-len(vit.list_models()) :]] == vit.list_models()
    if not torch.cuda.is_available():
        assert said["kernels"].startswith("interpreted on the CPU" if runtime.INTERPRETED else "cannot run here")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"fused-vit {vit.__version__}\n"


@pytest.mark.parametrize("raises", [False, True])
def test_compilations_are_counted_and_the_listener_comes_back(raises):
    knobs = warmup.triton.knobs.compilation
    before, mine = knobs.listener, lambda **_: None
    knobs.listener = mine
    try:
        with pytest.raises(KeyError) if raises else contextlib.nullcontext(), warmup.counting() as found:
            for hit in (True, False, True, True, False):
                knobs.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
            time.sleep(0.01)
            if raises:
                raise KeyError
        assert knobs.listener is mine and (found.compiled, found.cached) == (2, 3) and 0.01 <= found.seconds < 5
    finally:
        knobs.listener = before


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_warmup_compiles_what_it_is_told(dtype, autocast, monkeypatch):
    """Batch, height, width, dtype, autocast, training and the architecture reach the call, and the text names them."""
    asked = []

    def warm_up(model, image, *, train, arch):
        wide = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        asked.append((tuple(image.shape), image.dtype, model.pos_embed.dtype, wide, train, arch))
        return warmup.Compilations(3, 4, 5.06)

    monkeypatch.setattr(warmup, "warm_up", warm_up)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    if autocast and dtype == "fp32":
        return
    words = f"warmup vit_tiny_patch16_224 --arch sm_89 --img-size 32x48 --batch-size 3 --dtype {dtype}".split()
    for train in ([], ["--train"]):
        said = warmup.command(parsed(*words, *train, *["--autocast"] * autocast)).splitlines()
        held = torch.float32 if autocast else kind
        assert asked.pop() == ((3, 3, 32, 48), held, held, kind if autocast else False, bool(train), 89)
        passes = "inference and training" if train else "inference"
        how = f"{dtype}{' autocast' if autocast else ''}"
        assert said[0] == f"vit_tiny_patch16_224, 3 x 32 x 48 pixels, {how}, {passes}, for sm_89, from here"
        assert said[1] == "3 kernels compiled, 4 were in the cache, 5.1 s"


def test_a_step_says_how_long_it_took_even_if_it_fails(capsys):
    from vit.commands.console import step

    threads = threading.active_count()
    with step("one"):
        pass
    with pytest.raises(KeyError), step("two"):
        raise KeyError
    assert threading.active_count() == threads
    assert re.fullmatch(r"  one \.\.\. 0\.\d s\n  two \.\.\. 0\.\d s\n", capsys.readouterr().out)


def test_copies_of_an_own_model_leave_the_callers_random_numbers():
    model = vit.VisionTransformer(vit.ViTConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2))
    before = torch.get_rng_state()
    parity.copies(model, torch.zeros(1, 3, 16, 16))
    assert torch.equal(torch.get_rng_state(), before)
