"""Mistakes of a user with the model or with any op: each gives one clear error.

Wrong shapes are tested in the file of each op.
"""

import os
import subprocess
import sys

import pytest
import torch

import vit
from vit.kernels import (
    attention,
    attention_qkvpacked,
    layer_norm,
    linear,
    mlp,
    patch_embed,
    residual_layer_norm,
    runtime,
)
from vit.kernels.dry_run import dry_run

SMALL = vit.ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=3)


@pytest.fixture(scope="module", params=["fast", "reference"])
def model(request):
    return vit.VisionTransformer(SMALL, 0) if request.param == "fast" else vit.reference.VisionTransformer(SMALL, 0)


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        (torch.ones(3, 32, 32), {}, ValueError, r"must be \[B, 3, H, W\], got shape \(3, 32, 32\)"),
        (torch.ones(1, 4, 32, 32), {}, ValueError, "4 channels, the model takes in_chans=3"),
        (
            torch.ones(1, 3, 32, 40),
            {},
            ValueError,
            r"^Input image size \(32\*40\) doesn't match model \(32\*32\)\. Pass interp.*dynamic",
        ),
        (
            torch.ones(1, 3, 32, 45),
            {"interpolate_pos_encoding": True},
            ValueError,
            "32\\*45 is not a multiple of the patch",
        ),
        (torch.ones(1, 3, 32, 32, dtype=torch.uint8), {}, TypeError, "must be floating point, got torch.uint8"),
    ],
    ids=["rank", "channels", "size", "not a multiple", "integer"],
)
def test_image(model, image, options, error, message):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model(image, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_image_of_another_dtype_than_the_model():
    with pytest.raises(TypeError, match=r"weight is torch.float32 but image is torch.float16; give both the same"):
        vit.VisionTransformer(SMALL)(torch.ones(1, 3, 32, 32, dtype=torch.float16))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide embed_dim=32"),
        ({"img_size": 30}, "height 30 is not a multiple of patch_size 8; use 24 or 32"),
        ({"global_pool": "max"}, "global_pool='max' is unknown"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0 must be"),
        ({"class_token": False}, "needs class_token=True"),
        ({"impl": "cuda"}, "impl='cuda' is unknown"),
        ({"depth": 0}, "depth=0 must be an integer of at least 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_configuration(fields, message):
    with pytest.raises(ValueError, match=message):
        vit.ViTConfig(**({"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2} | fields))


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'vit_base_patch16_224'"):
        vit.create_model("vit_bse_patch16_224")


def test_state_dict_that_does_not_fit_lists_everything():
    model = vit.VisionTransformer(SMALL)
    state = model.state_dict()
    state["blocks.0.attn.extra"] = state.pop("head.bias")
    state["cls_token"] = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state)
    for part in ("head.bias", "blocks.0.attn.extra", "cls_token", "torch.Size([1, 1, 8])"):
        assert part in str(raised.value)


def calls(dtype=torch.float32, other=None, **options):
    """One small call of every op; ``other`` is the device of the second argument."""
    x, second = torch.ones(2, 4, 32, dtype=dtype), torch.ones(32, dtype=dtype, device=other)
    image, square = torch.ones(1, 3, 16, 16, dtype=dtype), torch.ones(32, 32, dtype=dtype, device=other)
    heads = torch.ones(1, 4, 2, 16, dtype=dtype)
    return {
        "layer_norm": lambda: layer_norm(x, second, **options),
        "residual_layer_norm": lambda: residual_layer_norm(x, x, second, **options),
        "linear": lambda: linear(x, square, **options),
        "mlp": lambda: mlp(x, square, None, square, None, **options),
        "attention_qkvpacked": lambda: attention_qkvpacked(torch.ones(1, 4, 3, 2, 16, dtype=dtype), **options),
        "attention": lambda: attention(heads, heads.to(other or "cpu"), heads, **options),
        "patch_embed": lambda: patch_embed(image, torch.ones(32, 3, 8, 8, dtype=dtype, device=other), **options),
    }


OPS = list(calls())


@pytest.mark.parametrize("op", OPS)
def test_unknown_impl(op):
    known = "'auto', 'fused', 'triton', 'reference'"
    with pytest.raises(ValueError, match=f"{op}: impl must be one of {known}, got 'fast'"):
        calls(impl="fast")[op]()


@pytest.mark.parametrize("op", OPS)
def test_integer_tensors(op):
    with pytest.raises(TypeError, match=r"must be a floating-point tensor, got torch.int32"):
        calls(dtype=torch.int32)[op]()


@pytest.mark.parametrize("op", [op for op in OPS if op != "attention_qkvpacked"])
def test_tensors_on_two_devices(op):
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu and meta"):
        calls(other="meta")[op]()


@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_a_dtype_it_does_not_have(op):
    with pytest.raises(RuntimeError, match=rf"{op}: impl=.triton. cannot run: dtype torch\.float8_e4m3fn"):
        calls(dtype=torch.float8_e4m3fn, impl="triton")[op]()


@pytest.mark.interpreted
@pytest.mark.parametrize("op", [*OPS, "fp32 and bf16"])
def test_tritons_own_interpreter_refuses_bf16(op, monkeypatch):
    """Its bf16 results are wrong, also where only a later argument is bf16."""
    monkeypatch.setattr(runtime, "_interpreter_has_bf16", lambda: False)
    x, weight = torch.ones(2, 4, 32), torch.ones(32)
    mixed = {"fp32 and bf16": lambda: residual_layer_norm(x, x.bfloat16(), weight, impl="triton")}
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: Triton's interpreter computes wrong bfloat16"):
        (calls(dtype=torch.bfloat16, impl="triton") | mixed)[op]()


@pytest.mark.parametrize("impl", ["fused", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_kernels_without_a_gpu_and_not_interpreted(op, impl, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(
        RuntimeError, match=rf"{op}: impl=.{impl}. cannot run: .*CUDA tensors, got cpu.*TRITON_INTERPRET"
    ):
        calls(impl=impl)[op]()


@pytest.mark.parametrize("op", OPS)
def test_gpu_that_is_too_old(op, monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with (
        dry_run(75, lambda *_: None),
        pytest.raises(RuntimeError, match=r"need compute capability 8\.0 or newer, this GPU has 7\.5"),
    ):
        calls(impl="triton")[op]()


@pytest.mark.parametrize("op", OPS)
def test_forward_mode(op, device):
    leaf = torch.ones(2, 4, 32)
    with torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(leaf, leaf)
        with pytest.raises(RuntimeError, match="forward-mode AD is not defined for the Triton kernels"):
            calls(impl="triton")[op]()
        calls()[op]()  # auto runs the reference instead


def test_interpreted_bf16_without_the_strict_interpreter():
    code = (
        "import torch; from vit.kernels import layer_norm\n"
        "layer_norm(torch.ones(4, 16, dtype=torch.bfloat16), impl='triton')"
    )
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Triton's interpreter computes wrong bfloat16 results" in done.stderr


def test_saved_tensor_changed_in_place(device):
    x = torch.ones(2, 32, device=device, requires_grad=True)
    inner = x * 2
    y = layer_norm(inner, impl="triton")
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_grid_beyond_cuda():
    with pytest.raises(ValueError, match="exceeds what CUDA can launch"):
        runtime.launch(_Kernel(), (1, 65_536), num_warps=4, num_stages=1)


class _Kernel:
    __name__ = "kernel"
