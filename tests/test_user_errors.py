"""What a user may do to a model or ask of it that is easy to get silently wrong."""

import dataclasses
import pickle

import pytest
import torch

import vit
from vit.reference import VisionTransformer as Reference

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
DROPS = {"pos_drop_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.3, "drop_rate": 0.3}


@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference])
def test_parts_in_evaluation_do_not_drop(cls):
    """A frozen backbone is set to eval() while the model around it trains."""
    model = cls(vit.ViTConfig(**SMALL, **DROPS), seed=0).train()
    image = torch.randn(4, 3, 16, 16)
    assert not torch.equal(model(image), model(image))
    for child in model.children():
        child.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference])
def test_models_can_be_pickled(cls, act_layer):
    model = cls(vit.ViTConfig(**SMALL, **DROPS, act_layer=act_layer), seed=0).eval()
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(pickle.loads(pickle.dumps(model))(image), model(image))


def test_parameter_groups_of_a_wrapped_model():
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL), seed=0)
    want, got = (vit.param_groups_layer_decay(m) for m in (model, torch.compile(model, backend="eager")))
    assert [g["lr_scale"] for g in got] == [g["lr_scale"] for g in want] and len(got) > 5
    for a, b in zip(got, want, strict=True):
        assert all(p is q for p, q in zip(a["params"], b["params"], strict=True))
    with pytest.raises(TypeError, match="needs a VisionTransformer of this package, got Linear"):
        vit.param_groups_layer_decay(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("indices", [[1.5], "2", 1.0, True, [True]])
def test_block_indices_must_be_integers(indices):
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL), seed=0).eval()
    for call in (model.forward_intermediates, model.attention_maps):
        with pytest.raises(TypeError, match="block indices must be integers"):
            call(torch.randn(1, 3, 16, 16), indices)


def test_block_indices_of_any_kind():
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL), seed=0).eval()
    image = torch.randn(1, 3, 16, 16)
    for indices in (torch.tensor([0, 2]), (i for i in (0, 2)), [0, torch.tensor(2)], {0, 2}):
        assert sorted(model.attention_maps(image, indices)[1]) == [0, 2]
    assert sorted(model.attention_maps(image, torch.tensor(2))[1]) == [1, 2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qkv_bias", "False"),
        ("class_token", "no"),
        ("fc_norm", 1),
        ("dynamic_img_size", "False"),
        ("drop_rate", None),
        ("drop_rate", "0.1"),
        ("mlp_ratio", "4"),
        ("norm_eps", None),
        ("init_values", "1e-5"),
        ("init_values", True),
    ],
)
def test_options_of_the_wrong_type(field, value):
    with pytest.raises(TypeError, match=rf"{field}=.* must be"):
        vit.ViTConfig(**SMALL | {"global_pool": "avg", field: value})


WRONG = [
    "abc",
    None,
    float("nan"),
    True,
    float("inf"),
    -1,
    1e308,
    10**30,
    10**6000,
    10**9,
    (10**6, 10**6),
    [1],
    object(),
]
FITS = {
    "bool": [True],
    "float": [10**9],
    "float | None": [None, 10**9],
    "bool | None": [None, True],
    "int | None": [None],
}

WHY = "must be|is unknown|make .* parameters|not a multiple|does not divide"


@pytest.mark.parametrize("field", dataclasses.fields(vit.ViTConfig), ids=lambda field: field.name)
def test_values_that_no_field_takes(field):
    """Before memory is allocated; the message names the field, and a huge integer does not break the message."""
    for value in WRONG:
        fits = FITS.get(field.type, [])
        if field.name == "mlp_ratio" or (field.name.endswith("_rate") and value is not None):
            fits = []
        if any(value is v or (value == v and type(value) is type(v)) for v in fits):
            vit.create_model("vit_tiny_patch16_224", device="meta", **{field.name: value})
            continue
        with pytest.raises((TypeError, ValueError), match=f"(?=.*{field.name}).*({WHY})"):
            vit.create_model("vit_tiny_patch16_224", **{field.name: value})


def test_head_dim_that_the_kernels_do_not_take():
    with pytest.raises(ValueError, match=r"head_dim=20; the kernels take 16 to 128 in steps of 8"):
        vit.ViTConfig(embed_dim=40, num_heads=2, impl="triton")


@pytest.mark.parametrize("image", [torch.zeros(1, 3, 16, 16).numpy(), None, [[1.0]]])
@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference])
def test_image_that_is_no_tensor(cls, image):
    with pytest.raises(TypeError, match=r"image must be a torch.Tensor"):
        cls(vit.ViTConfig(**SMALL), seed=0)(image)


def test_mask_that_is_no_tensor():
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL, use_mask_token=True), seed=0)
    with pytest.raises(TypeError, match="bool_masked_pos must be a bool tensor, got bool"):
        model(torch.zeros(1, 3, 16, 16), True)


def test_dropout_seed_is_checked_without_dropout():
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL), seed=0)
    with pytest.raises(TypeError, match="dropout_seed must be an int64 tensor"):
        model(torch.zeros(1, 3, 16, 16), dropout_seed="a")


def test_explain_draws_no_random_numbers():
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL, **DROPS), seed=0).train()
    before = torch.get_rng_state()
    vit.explain(model, torch.zeros(1, 3, 16, 16))
    assert torch.equal(torch.get_rng_state(), before)


RATES = [field.name for field in dataclasses.fields(vit.ViTConfig) if field.name.endswith(("drop_rate", "path_rate"))]


@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference])
@pytest.mark.parametrize("rate", RATES)
def test_each_rate_alone_drops_in_training_and_only_there(rate, cls):
    config = vit.ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5, **{rate: 0.5})
    model, image = cls(config, seed=0), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        still = model.eval()(image)
        assert torch.equal(model(image), still)
        torch.manual_seed(0)
        drops = [model.train()(image) for _ in range(2)]
    assert not any(torch.allclose(drop, still, rtol=1e-3) for drop in drops) and not torch.equal(*drops)
    for wrong in (1.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=rate):
            dataclasses.replace(config, **{rate: wrong})


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 16), (0.1, 14), (0.5, 8), (0.9, 1), (0.95, 1), (0.99, 1)])
@pytest.mark.parametrize("prefix", [0, 3])
def test_patch_dropout_keeps_as_many_as_timm(rate, kept, prefix):
    """int(16 · (1 − rate)) patches, at least one, and all prefix tokens."""
    tokens = {"class_token": prefix > 0, "reg_tokens": max(prefix - 1, 0), "global_pool": "avg"}
    config = vit.ViTConfig(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, patch_drop_rate=rate, **tokens
    )
    model, image = vit.VisionTransformer(config, seed=0), torch.randn(2, 3, 32, 32)
    assert model.train().forward_features(image).shape == (2, prefix + kept, 32)
    assert model.eval().forward_features(image).shape == (2, prefix + 16, 32)


def test_frozen_parameters_do_not_move_the_learning_rates():
    """A layer's scale is 0.75 to the power of the layers above it, whatever of them learns."""
    config = vit.ViTConfig(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    model = vit.VisionTransformer(config, seed=0)

    def scales():
        groups = vit.param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.75)
        names = {param: name for name, param in model.named_parameters()}
        return {names[param]: group["lr_scale"] for group in groups for param in group["params"]}

    every = scales()
    assert every["head.weight"] == 1.0 and every["blocks.2.mlp.fc1.weight"] == 0.75 and len(set(every.values())) == 5
    for frozen in ("head.", "blocks.1.", "patch_embed."):
        for name, param in model.named_parameters():
            param.requires_grad_(not name.startswith(frozen))
        found = scales()
        assert found and found == {name: every[name] for name in found}
        assert not any(name.startswith(frozen) for name in found)
