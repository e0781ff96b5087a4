"""`vit parity` and `vit.testing.assert_parity`: a model of each library passes, and a wrong op is seen."""

import copy
import sys

import pytest
import torch
import zoo
from peers import _import, import_timm, import_transformers

import vit
from vit import kernels
from vit.commands import cli
from vit.testing import assert_parity
from vit.testing.parity import Models, copies, example, group_of, parity, widen

pytestmark = pytest.mark.peers

TINY = ["--set", "depth=1", "embed_dim=32", "num_heads=2", "num_classes=10", "--img-size", "32"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SMALL |= {"image_size": 32, "patch_size": 16}


def timm_model(name: str = "vit_tiny_patch16_224", **options) -> torch.nn.Module:
    options = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "num_classes": 10} | options
    torch.manual_seed(0)
    model = import_timm().create_model(name, **options)
    widen(model, torch.Generator().manual_seed(0))
    return model


def hf_model(kind: str, **options) -> torch.nn.Module:
    transformers = import_transformers()
    config = getattr(transformers, kind.split("For")[0].removesuffix("Model") + "Config")(**SMALL, **options)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    widen(model, torch.Generator().manual_seed(0))
    return model


def torchvision_model() -> torch.nn.Module:
    module = _import("torchvision").models.vision_transformer
    torch.manual_seed(0)
    model = module.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=10)
    widen(model, torch.Generator().manual_seed(0))
    return model


MODELS = {
    "timm": timm_model,
    "timm, options": lambda: timm_model(qk_norm=True, reg_tokens=2, init_values=0.1, pre_norm=True, global_pool="avg"),
    "timm, attention pool": lambda: timm_model(global_pool="map", class_token=False),
    "ViT": lambda: hf_model("ViTForImageClassification", num_labels=10),
    "ViTModel": lambda: hf_model("ViTModel"),
    "DINOv2": lambda: hf_model("Dinov2WithRegistersModel"),
    "masked images": lambda: hf_model("ViTForMaskedImageModeling"),
    "torchvision": torchvision_model,
    "this package": lambda: vit.VisionTransformer(
        vit.ViTConfig(32, 16, num_classes=10, embed_dim=32, depth=1, num_heads=2), seed=0
    ),
}


def run(capsys, *args: str) -> tuple[int, str, str]:
    code = cli.main(["parity", "--model", *args])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_assert_parity(name, dtype):
    model = MODELS[name]()
    before, mode = copy.deepcopy(model.state_dict()), model.training
    reports = assert_parity(model, dtype=getattr(torch, dtype))
    names = {report.name for report in reports}
    assert "image" in names and reports[0].name in vit.testing.parity.OUTPUTS
    assert not any("k_proj.bias" in n or "k_norm.bias" in n.split(" and ")[0] for n in names)
    unused = {"vit.embeddings.mask_token", "embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"}
    joined = {n for n, _ in model.named_parameters()} - names - unused
    assert all(n.endswith(("_proj.bias", "_norm.bias")) for n in joined)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) and model.training is mode
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ["timm, options", "DINOv2"])
def test_kernels(name, device):
    model = MODELS[name]().to(device)
    images = example(model)
    reports = parity(copies(model, images, "triton"), images, draws=2)  # 8 take ten seconds, interpreted
    assert [str(report) for report in reports if not report.ok] == []


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_group(name):
    groups = {group_of(parameter) for parameter, _ in MODELS[name]().named_parameters()}
    assert groups <= vit.testing.parity.GROUPS.keys() and len(groups) >= 7


def test_grouping():
    tensors = {
        "vit.layers.0.attention.q_proj.bias": "attn.qkv",
        "encoder.layers.encoder_layer_0.self_attention.in_proj_weight": "attn.qkv",
        "encoder.layers.encoder_layer_0.self_attention.out_proj.weight": "attn.proj",
        "encoder.layers.encoder_layer_0.mlp.3.bias": "mlp.fc2",
        "encoder.layers.encoder_layer_0.ln_1.bias": "norms",
        "encoder.ln.weight": "norms",
        "encoder.layer.0.layer_scale1.lambda1": "LayerScale",
        "heads.head.weight": "head",
        "conv_proj.weight": "patch_embed",
        "blocks.0.attn.k_norm.weight": "norms",
        "attn_pool.mlp.fc1.weight": "attention pool",
        "stages.3.blocks.12.gamma": "stages.*.blocks.*.gamma",
    }
    assert {name: group_of(name) for name in tensors} == tensors


@pytest.mark.parametrize("op", ["linear", "attention", "residual_layer_norm", "mlp"])
def test_a_wrong_op_fails(op, monkeypatch, capsys):
    """In every library that runs it; here Hugging Face's, whose attention is not packed."""
    right = getattr(kernels, op)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return (out[0], out[1] * (1 + 3e-5)) if isinstance(out, tuple) else out * (1 + 3e-5)

    model = MODELS["ViT"]()
    assert_parity(model)
    monkeypatch.setattr(kernels, op, wrong)
    with pytest.raises(AssertionError, match=r"of \d+ tensors exceed a limit:\nlogits: rms") as failure:
        assert_parity(model)
    assert len(str(failure.value).splitlines()) > 5


@pytest.mark.parametrize("what", ["gradient", "missing", "key bias", "nan"])
def test_a_wrong_gradient_fails(what):
    """The output stays right."""
    model = MODELS["ViT"]()
    images = example(model)
    models = copies(model, images)
    attention, name = models.fast.vit.layers[0].attention, "vit.layers.0.mlp.fc1.weight"
    fc1 = models.fast.vit.layers[0].mlp.fc1
    if what == "key bias":  # its gradient is only rounding noise, so a hundredth of another's is far too much
        attention.k_proj.bias.register_hook(lambda grad: grad + 1e-2 * attention.q_proj.bias.detach().abs().max())
        name = "vit.layers.0.attention.qkv.bias"
    else:
        factor = {"gradient": 1 + 1e-4, "missing": 0.0, "nan": float("nan")}[what]
        fc1.weight.register_hook(lambda grad: grad * factor)
    assert {report.name for report in parity(models, images, draws=8) if not report.ok} == {name}


class Scaled(torch.nn.Module):
    """Uses its second parameter, uses it times zero, or does not use it."""

    def __init__(self, use: str):
        super().__init__()
        self.use, self.first, self.second = use, torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))

    def forward(self, images):
        x = images.flatten(1)[:, :5] * self.first
        return {"used": lambda: x + self.second, "zero": lambda: x + self.second * 0, "unused": lambda: x}[self.use]()


@pytest.mark.parametrize("ours", ["used", "zero", "unused"])
@pytest.mark.parametrize("theirs", ["used", "zero", "unused"])
def test_a_gradient_that_is_zero_or_missing_on_one_side_fails(ours, theirs):
    """An optimizer with momentum or weight decay moves a parameter with a zero gradient, not one without any."""
    models = Models(Scaled(ours), Scaled(theirs), Scaled(theirs).double(), torch.randn(2, 5))
    reports = {r.name: r.ok for r in parity(models, torch.randn(2, 1, 4, 4), draws=2)}
    assert reports.pop("image") and reports.pop("first")
    if (ours, theirs) == ("used", "used"):
        assert reports.pop("output" if "output" in reports else "logits") and reports == {"second": True}
    elif ours == theirs:
        assert "second" not in reports  # no model has one
    else:
        assert reports["second"] is False


def test_parity_changes_no_setting():
    """For each API that sets the precision; inherited settings stay inherited."""
    model, backends = MODELS["ViT"](), torch.backends
    for n, precision in enumerate(["none", "ieee", "tf32"]):
        backends.cudnn.conv.fp32_precision, backends.fp32_precision = precision, "tf32"
        try:
            state = torch.get_rng_state()
            assert_parity(model)
            assert torch.equal(torch.get_rng_state(), state) and backends.cudnn.enabled
            backends.fp32_precision = "ieee"
            assert backends.cudnn.conv.fp32_precision == ["ieee", "ieee", "tf32"][n]
        finally:
            backends.cudnn.allow_tf32, backends.fp32_precision = False, "none"
    seen = []

    def hook(module, *_):
        seen.append(backends.cudnn.enabled)

    models = copies(model, example(model))
    models.eager.vit.embeddings.patch_embeddings.projection.register_forward_hook(hook)
    parity(models, example(model))
    parity(copies(model.bfloat16(), example(model)), example(model))
    assert seen == [False]  # IEEE, without a precision setting


def test_frozen_parameters_are_left_out():
    model = timm_model()
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    names = [report.name for report in assert_parity(model)]
    assert "patch_embed.proj.weight" in names and not any(name.startswith("blocks.") for name in names)


def test_assert_parity_takes_images_and_says_what_it_cannot():
    model = timm_model(img_size=(32, 48), in_chans=1)
    assert example(model).shape == (2, 1, 32, 48)
    assert_parity(vit.accelerate(model), torch.rand(3, 1, 32, 48))  # an accelerated one is compared with the original
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        assert_parity(model, dtype=torch.float64)
    with pytest.raises(ValueError, match="no block"):
        assert_parity(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="pass an image"):
        assert_parity(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)))


def test_command_on_timm(capsys):
    import_timm()
    code, out, err = run(capsys, "timm:vit_tiny_patch16_224.augreg_in21k", *TINY, "--dtype", "bfloat16")
    assert code == 0 and err == ""
    assert "Parity: pass" in out and "gradient of attn.qkv" in out and "draw 32 of 32" in out
    assert "bfloat16 on " in out and "images [2, 3, 32, 32]" in out and "random weights" in out
    assert torch.cuda.is_available() or ("attention_qkvpacked  pytorch" in out and "No kernel ran" in out)


def test_command_on_torchvision(capsys, device, monkeypatch):
    monkeypatch.setattr("vit.commands.parity.enough_draws", lambda *args: 2)
    _import("torchvision")
    sizes = ["num_layers=1", "hidden_dim=32", "num_heads=2", "mlp_dim=64", "num_classes=10"]
    command = ["torchvision:vit_b_16", "--set", *sizes, "--img-size", "32", "--impl", "triton", "--batch-size", "1"]
    code, out, err = run(capsys, *command)
    assert code == 0 and err == ""
    assert "attention_qkvpacked  triton" in out and "No kernel ran" not in out and "images [1, 3, 32, 32]" in out


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_command_on_a_folder_of_hugging_face(kind, capsys, tmp_path):
    model = hf_model(kind)
    model.save_pretrained(tmp_path)
    code, out, _ = run(capsys, f"hf:{tmp_path}", "--img-size", "48x32")  # interpolates
    output = "logits" if "For" in kind else "last_hidden_state"
    assert code == 0 and f"    {output} " in out and f"{kind}, the weights of {tmp_path}" in out
    assert "images [2, 3, 48, 32]" in out


def test_command_on_a_file(capsys, tmp_path, monkeypatch):
    pytest.importorskip("PIL.Image")
    from vit.commands.demo import load_photo

    load_photo().save(tmp_path / "cat.png")
    (tmp_path / "weights.pth").touch()
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return MODELS["this package"]()

    monkeypatch.setattr(vit, "load_pretrained", load, raising=False)
    file = str(tmp_path / "weights.pth")
    code, out, _ = run(capsys, file, "--image", str(tmp_path / "cat.png"), "--batch-size", "3", "--set", "x=1")
    assert code == 0 and "this package's plain PyTorch model" in out and asked == [(file, {"x": 1})]


def test_a_failing_command(capsys, monkeypatch):
    import_timm()
    attention = kernels.attention_qkvpacked
    monkeypatch.setattr(kernels, "attention_qkvpacked", lambda *args, **kwargs: attention(*args, **kwargs) * (1 + 1e-4))
    code, out, _ = run(capsys, "timm:vit_tiny_patch16_224", *TINY)
    assert code == 1 and "Parity: FAIL" in out and "  FAIL logits: rms" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["timm:vit_tiny_patch16_24"], "did you mean vit_tiny_patch16_224"),
        (["vit_tiny_patch16_224"], "did you mean timm:vit_tiny_patch16_224?"),
        (["tim:vit_tiny_patch16_224"], "--model takes timm:..., torchvision:..., hf:..."),
        (["timm:resnet18"], "ResNet has no block"),
        (["timm:vit_tiny_patch16_224", "--set", "depht=2"], "depht"),
        (["timm:vit_tiny_patch16_224", "--set", "depth"], "--set takes NAME=VALUE, got 'depth'"),
        (["timm:vit_tiny_patch16_224", "--set", "depth=abc"], "depth='abc' must be an integer of at least 1"),
        (["timm:vit_tiny_patch16_224", "--set", "depth=1e9"], "depth=1000000000.0 must be an integer"),
        (["timm:vit_tiny_patch16_224", "--set", "depth=1000000000"], "depth=1000000000 must be at most 10000"),
        (["timm:vit_tiny_patch16_224", "--set", "qkv_bias=2"], "qkv_bias=2 must be True or False"),
        (["timm:vit_tiny_patch16_224", "--set", "mlp_ratio=abc"], "mlp_ratio='abc' must be a number"),
        (["torchvision:vit_b_16", "--set", "num_layers=1000000000"], "num_layers=1000000000 must be at most 10000"),
        (["torchvision:vit_b_16", "--set", "dropout=1e9"], "dropout=1000000000.0 must be at least 0 and below 1"),
        (["hf:missing", "--set", "hidden_size=None"], "hidden_size=None must be an integer"),
        (["timm:vit_tiny_patch16_224", *TINY, "--device", "nonsense"], "nonsense"),
        (["timm:vit_tiny_patch16_224", *TINY, "--image", "missing.png"], "missing.png"),
        (["timm:vit_tiny_patch16_224", *TINY, "--set", "in_chans=1", "--image", __file__], "1 channels"),
        (["torchvision:vit_b16"], "did you mean vit_b_16"),
        (["hf:missing"], "must name a folder with a config.json"),
    ],
)
def test_cannot_start(args, message, capsys):
    import_timm(), import_transformers()
    code, _, err = run(capsys, *args)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_a_missing_library_is_named(library, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = run(capsys, {"transformers": "hf"}.get(library, library) + ":vit")
    assert code == 2 and f"pip install {library}" in err


def test_triton_without_a_gpu(capsys, monkeypatch):
    import_timm()
    monkeypatch.setattr("vit.kernels.runtime.INTERPRETED", False)
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, err = run(capsys, "timm:vit_tiny_patch16_224", *TINY, "--impl", "triton")
    assert code == 2 and "impl='triton' cannot run" in err and "TRITON_INTERPRET=1" in err


@pytest.mark.parametrize(
    "args",
    [
        ["--dtype", "float64"],
        ["--batch-size", "0"],
        ["--batch-size", "9" * 5000],
        ["--img-size", "axb"],
        ["--impl", "x"],
    ],
)
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["parity", "--model", "timm:x", *args])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "usage: vit parity" in said and len(said) < 1500


@pytest.mark.peers
@pytest.mark.parametrize("accelerated", [False, True])
def test_only_one_of_the_three_copies_is_accelerated(accelerated):
    """Also for an accelerated model: the other copies run the library's own modules."""
    model, image = zoo.build("timm"), zoo.images("timm")
    if accelerated:
        vit.accelerate(model)
    models = copies(model, image)
    assert vit.explain(models.fast, image)
    assert not vit.explain(models.eager, image) and not vit.explain(models.exact, image.double())
    assert bool(vit.explain(model, image)) == accelerated
