"""Uses of a model that could easily go wrong silently."""

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


@pytest.mark.parametrize("indices", [[1.5], "2", 1.0, True, [True], [0, 1.5], [0, True], [0, 1, "2"], (0, None)])
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
    """Refused before memory is allocated; the message names the field, even for a huge integer."""
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
        if cls is vit.VisionTransformer and rate != "patch_drop_rate":  # patches are drawn from PyTorch's generator
            first, second, other = (model(image, dropout_seed=torch.tensor([s])) for s in (3, 3, 4))
            assert torch.equal(first, second) and not torch.equal(first, other)
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
    """A layer's scale is 0.75 to the power of the layers above it, frozen or not."""
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


def ways(model):
    """Each method that takes indices of blocks."""
    return {
        "forward_intermediates": model.forward_intermediates,
        "get_intermediate_layers": model.get_intermediate_layers,
        "attention_maps": model.attention_maps,
        "prune_intermediate_layers": lambda image, indices: model.prune_intermediate_layers(indices),
    }


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (0, "the last 0 blocks of 3 cannot be taken; use 1 to 3"),
        (-1, "the last -1 blocks of 3 cannot be taken"),
        (4, "the last 4 blocks of 3 cannot be taken"),
        ([3], "block index 3 is out of range; use -3 to 2"),
        ([-4], "block index -4 is out of range"),
        ([0, 3], "block index 3 is out of range"),
        ([2, 1, -4], "block index -4 is out of range"),
        (torch.tensor([0, 5]), "block index 5 is out of range"),
        ((), "no block index given; use None for all"),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["forward_intermediates", "get_intermediate_layers", "attention_maps", "prune_inter"])
def test_block_indices_out_of_range(way, indices, message):
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL), seed=0).eval()
    (call,) = (call for name, call in ways(model).items() if name.startswith(way))
    with pytest.raises(ValueError, match=message):
        call(torch.randn(1, 3, 16, 16), indices)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("rates", [{}, DROPS], ids=["", "drops"])
@pytest.mark.parametrize("seed", [7, "a", True, torch.tensor([7], dtype=torch.int32), torch.tensor([7.0])], ids=str)
def test_dropout_seed_is_checked_in_every_call(seed, rates, mode):
    model = vit.VisionTransformer(vit.ViTConfig(**SMALL, **rates), seed=0).train(mode)
    for call, x in (
        (model, torch.zeros(1, 3, 16, 16)),
        (model.forward_features, torch.zeros(1, 3, 16, 16)),
        (model.forward_head, torch.zeros(1, 5, 32)),
    ):
        with pytest.raises(TypeError, match=r"dropout_seed must be an int64 tensor, as .* returns it, got"):
            call(x, dropout_seed=seed)


@pytest.mark.parametrize(
    ("image", "mask", "error"),
    [
        (torch.zeros(2, 3, 16), None, ValueError),
        (torch.zeros(2, 4, 16, 16), None, ValueError),
        (torch.zeros(2, 3, 16, 24), None, ValueError),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int32), None, TypeError),
        (None, None, TypeError),
        (torch.zeros(2, 3, 16, 16), torch.zeros(1, 4, dtype=torch.bool), ValueError),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 5, dtype=torch.bool), ValueError),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 4), TypeError),
    ],
)
def test_every_way_through_the_model_checks_image_and_mask(image, mask, error):
    config = vit.ViTConfig(**SMALL, use_mask_token=True)
    model, masked = vit.VisionTransformer(config, seed=0), vit.MaskedImageModel(config, seed=0)
    options = {} if mask is None else {"bool_masked_pos": mask}
    for call in (model, model.forward_features, model.attention_maps, masked):
        with pytest.raises(error, match=r"image|bool_masked_pos"):
            call(image, **options)
    if mask is None:
        with pytest.raises(error, match="image"):
            model.forward_intermediates(image)


def test_no_way_through_the_model_takes_a_mask_without_its_token():
    model, mask = vit.VisionTransformer(vit.ViTConfig(**SMALL), seed=0), torch.zeros(1, 4, dtype=torch.bool)
    for call in (model, model.forward_features, model.attention_maps):
        with pytest.raises(ValueError, match="make the model with use_mask_token=True"):
            call(torch.zeros(1, 3, 16, 16), bool_masked_pos=mask)


@pytest.mark.parametrize("cls", [vit.VisionTransformer, vit.MaskedImageModel])
def test_seeded_weights_are_the_seeds_and_others_are_drawn_from_pytorch(cls):
    config = vit.ViTConfig(**SMALL)

    def weights(*args, **words):
        return torch.cat([p.detach().flatten() for p in cls(config, *args, **words).parameters()])

    first = weights(3)
    assert torch.equal(first, weights(seed=3)) and not torch.equal(first, weights(4)) and first.isfinite().all()
    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), first)
    half = weights(3, dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16 and torch.equal(half, first.bfloat16())  # drawn in fp32, then rounded
    torch.manual_seed(5)
    assert torch.equal(weights(3), first)  # PyTorch's own seed is not used
    torch.manual_seed(5)
    drawn = weights()
    assert not torch.equal(weights(), drawn)
    torch.manual_seed(5)
    assert torch.equal(weights(None), drawn)


@pytest.mark.parametrize("mode", ["", "zeros", "jax", "jax_nlhb"])
@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference])
def test_a_seed_determines_every_initial_weight(cls, mode):
    """PyTorch's own generator has no part in any of them."""
    config = vit.ViTConfig(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4, reg_tokens=1, init_values=0.5,
        use_mask_token=True, representation_size=24, qk_norm=True, weight_init=mode,
    )  # fmt: skip
    states = []
    for state in (1, 2):
        torch.manual_seed(state)
        states.append(cls(config, seed=0).state_dict())
    differ = [name for name, t in states[0].items() if not torch.equal(t, states[1][name])]
    assert differ == []


@pytest.mark.parametrize("mode", ["", "zeros", "jax", "jax_nlhb"])
@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference])
def test_initial_weights_by_hand(cls, mode):
    """With a patch that is not square and an image with five channels."""
    config = vit.ViTConfig(
        img_size=(8, 32), patch_size=(2, 16), in_chans=5, embed_dim=64, depth=2, num_heads=2, num_classes=40,
        reg_tokens=9, use_mask_token=True, init_values=0.25, representation_size=96, qk_norm=True,
        pre_norm=cls is Reference, weight_init=mode,
    )  # fmt: skip
    state = cls(config, seed=0).state_dict()
    jax, fan_in = mode.startswith("jax"), 5 * 2 * 16

    def std(name, want):
        t = state[name]
        assert t.std().item() == pytest.approx(want, rel=4 * t.numel() ** -0.5), name
        assert abs(t.mean().item()) < 5 * want * t.numel() ** -0.5, name

    patch = state["patch_embed.proj.weight"]
    if jax:  # LeCun's truncated normal
        std("patch_embed.proj.weight", fan_in**-0.5)
        assert patch.abs().max() <= 2 * fan_in**-0.5 / 0.87962566103423978
    else:
        assert 0.98 * fan_in**-0.5 < patch.abs().max() <= fan_in**-0.5
    if cls is vit.VisionTransformer:
        bias = state["patch_embed.proj.bias"]
        assert not bias.any() if jax else 0.8 * fan_in**-0.5 < bias.abs().max() <= fan_in**-0.5
    for name in ("cls_token", "reg_token"):
        std(name, 1e-6) if mode != "zeros" else None
        assert bool(state[name].any()) is (mode != "zeros")
    std("pos_embed", 0.02) if mode != "zeros" else None
    assert bool(state["pos_embed"].any()) is (mode != "zeros") and not state["mask_token"].any()
    std("pre_logits.fc.weight", 64**-0.5 if jax else 0.02)
    assert not state["pre_logits.fc.bias"].any()
    assert bool(state["head.weight"].any()) is not jax
    want = -3.6888794541139363 if mode == "jax_nlhb" else 0.0  # -log(40)
    assert torch.equal(state["head.bias"], torch.full((40,), want))
    for block in ("blocks.0.", "blocks.1."):
        for part, (rows, columns) in {"attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.fc1": (256, 64)}.items():
            std(f"{block}{part}.weight", (2 / (rows + columns)) ** 0.5 if jax else 0.02)
            mlp_bias = jax and "mlp" in part
            std(f"{block}{part}.bias", 1e-6) if mlp_bias else None
            assert bool(state[f"{block}{part}.bias"].any()) is mlp_bias
        for part in ("norm1", "norm2", "attn.q_norm", "attn.k_norm"):
            assert (state[f"{block}{part}.weight"] == 1).all() and not state[f"{block}{part}.bias"].any()
        assert (state[f"{block}ls1.gamma"] == 0.25).all() and (state[f"{block}ls2.gamma"] == 0.25).all()


def test_where_a_model_is_made():
    """On PyTorch's default device, unless ``device`` is given."""
    config = vit.ViTConfig(**SMALL)
    with torch.device("meta"):
        models = {"meta": vit.VisionTransformer(config), "cpu": vit.VisionTransformer(config, device="cpu")}
    models["cpu, too"] = vit.VisionTransformer(config)
    for name, model in models.items():
        assert {t.device.type for t in model.parameters()} == {name.split(",")[0]}
    assert not any(t.is_meta for t in vit.create_model("vit_tiny_patch16_224", depth=1, img_size=32).parameters())
    for cls in (vit.VisionTransformer, vit.MaskedImageModel):
        model = cls(config, device="meta", dtype=torch.float16)
        assert {(t.device.type, t.dtype) for t in model.parameters()} == {("meta", torch.float16)}


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("make", [vit.VisionTransformer, vit.MaskedImageModel])
def test_where_weights_are_drawn_does_not_depend_on_pytorchs_defaults(make, seed):
    config = vit.ViTConfig(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with torch.device("meta"):
        model = make(config, seed=seed, device="cpu")
    assert all(p.device.type == "cpu" for p in model.parameters())
    if seed is None:
        return
    want = make(config, seed=seed)
    torch.set_default_dtype(torch.float64)
    try:
        wide = make(config, seed=seed, dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    for found in (model, wide):
        assert all(map(torch.equal, found.parameters(), want.parameters()))
