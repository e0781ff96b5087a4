"""The whole model against the independent reference: outputs, every gradient, training, options."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import vit
from vit.kernels import runtime
from vit.reference import VisionTransformer as Reference
from vit.testing import check_draws
from vit.tokens import PatchDrop, resize_pos_embed

SMALL = vit.ViTConfig(img_size=(32, 48), patch_size=8, num_classes=10, embed_dim=64, depth=2, num_heads=2)

# Single options, and options that interact.
VARIANTS = {
    "plain": {},
    "avg pool": {"global_pool": "avg"},
    "avg pool, norm before": {"global_pool": "avg", "fc_norm": False},
    "token pool, fc_norm": {"fc_norm": True},
    "no pool": {"global_pool": ""},
    "attention pool": {"global_pool": "map", "class_token": False},
    "registers, attention pool, fc_norm": {"global_pool": "map", "reg_tokens": 2, "fc_norm": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers": {"reg_tokens": 4},
    "registers, avg pool": {"reg_tokens": 4, "global_pool": "avg"},
    "registers, patches embedded only": {"reg_tokens": 4, "no_embed_class": True},
    "LayerScale": {"init_values": 0.1},
    "LayerScale, avg pool": {"init_values": 0.1, "global_pool": "avg"},
    "norm_eps": {"norm_eps": 1e-2},
    "no qkv bias": {"qkv_bias": False},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "quick GELU": {"act_layer": "quick_gelu"},
    "rectangular patch": {"patch_size": (8, 16), "img_size": (40, 32)},
    "four channels": {"in_chans": 4},
    "head_dim 80": {"embed_dim": 160},
    "wide MLP of odd width": {"mlp_ratio": 2.7},
    "no head": {"num_classes": 0},
    "pre_norm": {"pre_norm": True},
    "no final norm": {"final_norm": False},
    "no final norm, avg pool": {"final_norm": False, "global_pool": "avg", "init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "pre-training head": {"representation_size": 24},
    "patch drop": {"patch_drop_rate": 0.5, "reg_tokens": 2},
}


def three_models(config: vit.ViTConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0):
    """Ours, the reference in the same dtype, the reference in fp64: one set of weights, all of them non-trivial."""
    torch.manual_seed(seed)
    exact = Reference(config).double()
    with torch.no_grad():
        for name, p in exact.named_parameters():
            p.copy_(p + torch.randn_like(p) * (0.2 if "bias" in name or "token" in name else 0.05))
    eager = copy.deepcopy(exact).to(device, dtype)
    ours = vit.VisionTransformer(config).to(device, dtype)
    ours.load_state_dict(eager.state_dict(), strict=True)
    return ours, eager, copy.deepcopy(eager).double()


def gradients(model, image, cotangent, **kwargs):
    image = image.detach().to(next(model.parameters()).dtype).requires_grad_()
    torch.manual_seed(0)  # for the dropout
    out = model(image, **kwargs)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(out, [image, *params.values()], cotangent.to(out.dtype))
    return {"logits": out.detach(), "image": grads[0]} | dict(zip(params, grads[1:], strict=True))


def assert_parity(config, dtype, device, *, batch=2, size=None, **kwargs):
    """The policy of `vit.testing` for a model; each draw has its own weights, image and cotangent."""
    results = []
    for seed in range(2 if config.impl == "triton" and runtime.INTERPRETED else 8):
        models = three_models(config, dtype, device, seed)
        image = torch.randn(batch, config.in_chans, *(size or config.img_size)).to(device, dtype)
        cotangent = torch.randn(models[2](image.double(), **kwargs).shape).to(device, dtype)
        results.append(tuple(gradients(model, image, cotangent, **kwargs) for model in models))
    check_draws(results)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cpu_path(variant):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    assert_parity(config, torch.float32, "cpu")


# The ops do the same in these as in others.
ALIKE = {
    "avg pool, norm before", "token pool, fc_norm", "no pool", "no class token", "registers, avg pool",
    "registers, patches embedded only", "LayerScale, avg pool", "norm_eps", "no head", "no final norm, avg pool",
    "pre-training head",
}  # fmt: skip


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.ci) if v in ALIKE else v for v in VARIANTS])
def test_kernels_fp32(variant, device):
    small = {"depth": 1} | VARIANTS[variant]
    assert_parity(dataclasses.replace(SMALL, impl="triton", **small), torch.float32, device)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["plain", "LayerScale", "head_dim 80"])
def test_kernels_16_bit(variant, half, device):
    wide = {"num_classes": 80}  # the errors of 20 logits vary too much
    assert_parity(dataclasses.replace(SMALL, impl="triton", **VARIANTS[variant] | wide), half, device)


@pytest.mark.parametrize("size", [(48, 32), (56, 24), (32, 56)])
@pytest.mark.parametrize("change", [{}, {"interpolation": "bicubic"}, {"reg_tokens": 2, "no_embed_class": True}])
def test_position_embedding_is_resized(size, change):
    config = dataclasses.replace(SMALL, **change)
    assert_parity(config, torch.float32, "cpu", size=size, interpolate_pos_encoding=True)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_position_embedding_is_rounded_once(half):
    """Resized in fp32: every element is the 16-bit number nearest to the exact one."""
    config = dataclasses.replace(SMALL, interpolation="bicubic")
    pos = torch.randn(1, config.pos_embed_len, 64, generator=torch.Generator().manual_seed(0)).to(half)
    grid = pos[:, 1:].double().unflatten(1, config.grid_size).permute(0, 3, 1, 2)
    exact = F.interpolate(grid, (7, 9), mode="bicubic").flatten(2).mT
    error = (resize_pos_embed(pos, config, (7, 9))[:, 1:].double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(half).eps * 0.501 + 1e-6).all()


@pytest.mark.parametrize("mode", ["bicubic", "bicubic_antialias"])
def test_fp64_position_embedding_is_resized_in_fp64(mode):
    config = dataclasses.replace(SMALL, interpolation=mode)
    pos = torch.randn(1, config.pos_embed_len, 64, generator=torch.Generator().manual_seed(0)).double()
    grid = pos[:, 1:].unflatten(1, config.grid_size).permute(0, 3, 1, 2)
    exact = F.interpolate(grid, (7, 9), mode="bicubic", antialias="antialias" in mode).flatten(2).mT
    torch.testing.assert_close(resize_pos_embed(pos, config, (7, 9))[:, 1:], exact, rtol=1e-14, atol=1e-14)


def test_position_embedding_is_resized_with_kernels(device):
    config = dataclasses.replace(SMALL, depth=1, impl="triton")
    assert_parity(config, torch.float32, device, size=(48, 24), interpolate_pos_encoding=True)


def train(model, images, labels, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for i in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images[i].to(next(model.parameters()).dtype)), labels[i])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_three_training_steps(impl, device):
    where = device if impl == "triton" else "cpu"
    config = dataclasses.replace(SMALL, impl=impl, init_values=0.1)
    ours, eager, exact = three_models(config, torch.float32, where)
    images, labels = torch.randn(3, 2, 3, 32, 48).to(where), torch.randint(10, (3, 2)).to(where)
    losses = [train(m, images, labels) for m in (ours, eager, exact)]
    assert losses[2][0] != losses[2][2]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=1e-5)
    # Adam divides by the gradient's size, so where the true gradient is zero (the key bias) its sign is noise.
    dim = config.embed_dim
    for (name, a), b, c in zip(ours.named_parameters(), eager.parameters(), exact.parameters(), strict=True):
        a, b, c = (t.detach() for t in (a, b, c))
        if name.endswith("qkv.bias"):
            a, b, c = (torch.cat([t[:dim], t[2 * dim :]]) for t in (a, b, c))
        error, error_eager = ((t.double() - c).abs().max().item() for t in (a, b))
        assert error <= 4 * error_eager + 1e-6, f"{name}: {error:.2e}, eager {error_eager:.2e}"


def test_model_runs_to_the_same_bits(device):
    ours, _, _ = three_models(dataclasses.replace(SMALL, depth=1, impl="triton"), torch.float32, device)
    image, cotangent = torch.randn(2, 3, 32, 48).to(device), torch.randn(2, 10).to(device)
    first = gradients(ours, image, cotangent)
    again = gradients(ours, image.to(memory_format=torch.channels_last), cotangent)
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_explain_names_every_op(device):
    model = vit.create_model("vit_tiny_patch16_224", img_size=32, depth=2, impl="triton").to(device)
    paths = vit.explain(model, torch.randn(1, 3, 32, 32).to(device))
    assert {p.op: (p.path, p.calls) for p in paths} == {
        "patch_embed": ("triton", 1),
        "layer_norm": ("triton", 1),
        "linear": ("triton", 6),
        "attention_qkvpacked": ("triton", 1),
        "residual_layer_norm": ("triton", 4),
        "mlp": ("triton", 2),
        "attention": ("triton", 1),  # of the last block, whose queries are the class tokens alone
    }
    # In the order of first use, not of the counts.
    assert [p.op for p in paths] == [
        "patch_embed", "layer_norm", "linear", "attention_qkvpacked", "residual_layer_norm", "mlp", "attention"
    ]  # fmt: skip
    cpu = vit.explain(vit.create_model("vit_tiny_patch16_224", img_size=32, depth=1), torch.randn(1, 3, 32, 32))
    assert all(p.path == "pytorch" and "cpu tensor" in p.reason for p in cpu)
    assert "layer_norm" in str(cpu)


def test_features_head_and_reset_classifier():
    model = vit.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7, seed=0)
    image = torch.randn(2, 3, 32, 32)
    features = model.forward_features(image)
    torch.testing.assert_close(model.forward_head(features), model(image))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0], rtol=0, atol=0)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    assert not model(image).any(), "the fine-tuning head starts at zero"
    assert model.config.num_classes == 3 and model.get_classifier() is model.head
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), features[:, 0])
    model = vit.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7, representation_size=20, seed=0
    )
    assert model.forward_head(features, pre_logits=True).shape == (2, 20)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3) and not [k for k in model.state_dict() if "pre_logits" in k]


def test_dynamic_img_size():
    config = dataclasses.replace(SMALL, dynamic_img_size=True, interpolation="bicubic_antialias")
    assert_parity(config, torch.float32, "cpu", size=(48, 24))
    with pytest.raises(ValueError, match="doesn't match model"):
        vit.VisionTransformer(config)(torch.ones(1, 3, 48, 24), interpolate_pos_encoding=False)


def test_dropped_patches():
    x, drop = torch.arange(2 * 23 * 4.0).reshape(2, 23, 4), PatchDrop(vit.ViTConfig(patch_drop_rate=0.4, reg_tokens=2))
    kept = drop(x)
    assert torch.equal(kept[:, :3], x[:, :3]) and kept.shape == (2, 3 + 12, 4)
    rows = kept[:, :, 0].sub(x[:, :1, 0]).div(4).long()
    assert all(len(set(r.tolist())) == 15 for r in rows) and not torch.equal(rows[0], rows[1])
    assert torch.equal(x.gather(1, rows[:, :, None].expand(-1, -1, 4)), kept)
    counts = torch.zeros(23)
    for _ in range(400):
        counts[drop(torch.arange(23.0).reshape(1, 23, 1)).flatten().long()] += 1
    assert (counts[3:] / 400 - 0.6).abs().max() < 0.1  # 4 standard deviations
    assert drop.eval()(x) is x


def test_create_model():
    assert sum(p.numel() for p in vit.create_model("vit_base_patch16_224", device="meta").parameters()) == 86_567_656
    a, b = (vit.create_model("vit_tiny_patch16_224", depth=1, seed=3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    model = vit.create_model("vit_tiny_patch16_224", depth=1, img_size=(96, 80), dtype=torch.bfloat16)
    assert model.config.grid_size == (6, 5) and model.head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="did you mean 'vit_base_patch16_224'"):
        vit.create_model("vit_base_patch16_225")
    with pytest.raises(TypeError, match="did you mean 'embed_dim'"):
        vit.create_model("vit_base_patch16_224", embed_dims=3)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compile_fullgraph(impl, device):
    config = dataclasses.replace(SMALL, depth=1, impl=impl)
    ours, _, _ = three_models(config, torch.float32, device if impl == "triton" else "cpu")
    image = torch.randn(2, 3, 32, 48).to(next(ours.parameters()).device)
    cotangent = torch.randn(2, 10).to(image.device)
    direct = gradients(ours, image, cotangent)
    compiled = gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), image, cotangent)
    for name, value in direct.items():
        assert torch.equal(value, compiled[name if name in compiled else f"_orig_mod.{name}"]), name
