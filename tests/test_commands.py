"""The commands: what each option does, what each exit status means, and what the checks behind them judge."""

import json
import math

import pytest
import torch

import vit
from vit import preprocess
from vit.commands import classify, cli, warmup
from vit.commands import parity as parity_command
from vit.kernels import runtime
from vit.testing import Report, assert_parity, measure, parity

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
    """model.safetensors has what lies beside it; weights of another name in the same folder have nothing."""
    saved(tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors").rename(tmp_path / "folder" / "mine.safetensors")
    shown = classify.classify(photo, tmp_path / "folder" / "mine.safetensors", source="hf")
    assert "name 1" not in shown and "no class names" in shown
    config = tmp_path / "folder" / "config.json"
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
    """The worst of a group, be it a NaN, whose share of a limit compares with nothing."""
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
def test_parity_runs_what_was_asked_for(impl):
    """The copy in eager PyTorch and the one in fp64 call no op."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = vit.VisionTransformer(vit.ViTConfig(**TINY | {"depth": 2}), seed=0).to(device)
    with runtime.record_choices() as choices:
        assert_parity(model, torch.randn(1, 3, 32, 32, device=device), impl=impl)
    assert choices and {choice.path for choice in choices} == {impl}
