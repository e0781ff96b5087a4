"""The reference model against timm, transformers and the article's formulas, and the configuration."""

from __future__ import annotations

import math
import types

import peers
import pytest
import torch
import torch.nn.functional as F
from peers import assert_same, outputs_and_gradients, randomise, timm_twin

from vit.config import ViTConfig, get_config, list_models
from vit.init import init_weights
from vit.reference import VisionTransformer, interpolate_pos_embed

pytestmark = pytest.mark.peers

SMALL = dict(img_size=24, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
CASES = {
    "token": {},
    "avg": dict(global_pool="avg"),
    "all tokens": dict(global_pool=""),
    "map": dict(global_pool="map", class_token=False),
    "map, fc_norm, class token": dict(global_pool="map", fc_norm=True, qkv_bias=False, qk_norm=True, reg_tokens=1),
    "all tokens, fc_norm": dict(global_pool="", fc_norm=True),
    "avg, norm before": dict(global_pool="avg", fc_norm=False),
    "token, fc_norm": dict(fc_norm=True),
    "no head": dict(num_classes=0),
    "registers": dict(reg_tokens=3),
    "registers, avg": dict(reg_tokens=3, global_pool="avg"),
    "registers, no_embed_class": dict(reg_tokens=3, no_embed_class=True),
    "no_embed_class": dict(no_embed_class=True),
    "LayerScale": dict(init_values=0.3),
    "LayerScale 0": dict(init_values=0.0),
    "no class token": dict(class_token=False, global_pool="avg"),
    "registers only": dict(class_token=False, reg_tokens=2, global_pool="avg"),
    "no qkv bias": dict(qkv_bias=False),
    "rectangular image": dict(img_size=(16, 40)),
    "tuple patch": dict(img_size=(24, 20), patch_size=(8, 4)),
    "tanh GELU": dict(act_layer="gelu_tanh"),
    "one channel": dict(in_chans=1),
    "odd MLP": dict(mlp_ratio=2.7),
    "pre_norm": dict(pre_norm=True),
    "no final norm": dict(final_norm=False),
    "no final norm, avg": dict(final_norm=False, global_pool="avg"),
    "qk_norm": dict(qk_norm=True),
    "qk_norm, no qkv bias": dict(qk_norm=True, qkv_bias=False),
    "quick GELU": dict(act_layer="quick_gelu"),
    "patch drop": dict(patch_drop_rate=0.4, reg_tokens=2),
    "nearly all patches dropped": dict(patch_drop_rate=0.95, class_token=False, global_pool="avg"),
    "dynamic size": dict(dynamic_img_size=True),
}
# Largest difference of a tensor, over its largest element.
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_timm(case, dtype):
    config = ViTConfig(**(SMALL | CASES[case]))
    theirs = timm_twin(config).to(dtype)
    randomise(theirs)
    ours = VisionTransformer(config).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.randn(2, config.in_chans, *config.img_size, generator=torch.Generator().manual_seed(1)).to(dtype)

    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)  # for patch dropout
        found.append(outputs_and_gradients(model, model, image))
    assert_same(*found, LIMIT[dtype])

    ours.eval(), theirs.eval()
    features = ours.forward_features(image)
    assert_same({"features": features}, {"features": theirs.forward_features(image)}, LIMIT[dtype])
    assert features.shape == (2, config.num_tokens, config.embed_dim)
    a, b = (m.forward_head(features, pre_logits=True) for m in (ours, theirs))
    assert_same({"pre-logits": a}, {"pre-logits": b}, LIMIT[dtype])


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_norm_eps_reaches_every_norm(eps):
    config = ViTConfig(**SMALL, norm_eps=eps)
    theirs = timm_twin(config).double()
    randomise(theirs)
    ours = VisionTransformer(config).double()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    assert_same(*({"logits": m(image)} for m in (ours, theirs)), 1e-12)


HF_NAMES = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks": "layers",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "norm": "layernorm",
    "head": "classifier",
}


def hf_key(name: str) -> str:
    """The transformers 5 name, in memory, of one of our parameters other than qkv."""
    parts, start = name.split("."), 0
    while start < len(parts):
        for length in (2, 1):
            word = ".".join(parts[start : start + length])
            if word in HF_NAMES:
                parts[start : start + length] = [HF_NAMES[word]]
                break
        start += 1
    return ".".join(parts)


def from_hf(tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    """Parameters or gradients of a transformers model under our names."""
    tensors = {k.removeprefix("vit."): v for k, v in tensors.items()}

    def pick(name: str) -> torch.Tensor:
        if ".attn.qkv." not in name:
            return tensors[hf_key(name)]
        block, leaf = hf_key(name).split(".attn.qkv.")
        return torch.cat([tensors[f"{block}.attention.{x}_proj.{leaf}"] for x in "qkv"])

    return {name: pick(name) for name in names}


def hf_pair(head: bool, mask_token: bool = False, **words):
    """A transformers model and ours with the same weights, in fp64."""
    transformers = peers.import_transformers()
    words = (
        dict(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=80,
            image_size=24,
            patch_size=8,
        )
        | words
    )
    hf_config = transformers.ViTConfig(**words, num_labels=5)
    if head:
        theirs = transformers.ViTForImageClassification(hf_config)
        ours = VisionTransformer(ViTConfig.from_hf(hf_config))
    else:
        theirs = transformers.ViTModel(hf_config, add_pooling_layer=False, use_mask_token=mask_token)
        ours = VisionTransformer(ViTConfig.from_hf(hf_config, num_classes=0, use_mask_token=mask_token))
    theirs, ours = theirs.double().eval(), ours.double()
    randomise(theirs)
    ours.load_state_dict(from_hf(theirs.state_dict(), list(ours.state_dict())))
    return theirs, ours


@pytest.mark.parametrize("head", [True, False], ids=["classification", "features"])
@pytest.mark.parametrize(
    ("words", "size"),
    [
        ({}, (24, 24)),
        ({}, (40, 16)),
        ({}, (32, 32)),
        (dict(hidden_act="gelu_new", qkv_bias=False, num_channels=1), (24, 24)),
        (dict(layer_norm_eps=1e-3, image_size=(16, 24)), (16, 24)),
    ],
    ids=["native", "interpolated to non-square", "interpolated", "tanh, no qkv bias, grey", "eps, non-square grid"],
)
def test_matches_transformers(head, words, size):
    theirs, ours = hf_pair(head, **words)
    image = torch.randn(2, ours.config.in_chans, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    resized = size != ours.config.img_size

    def run_theirs(x):
        out = theirs(x, interpolate_pos_encoding=resized)
        return out.logits if head else out.last_hidden_state

    def run_ours(x):
        return ours(x, interpolate_pos_encoding=resized) if head else ours.forward_features(x, None, resized)

    b = outputs_and_gradients(theirs, run_theirs, image)
    b = {k: b.pop(k) for k in ("output", "image")} | from_hf(b, [name for name, _ in ours.named_parameters()])
    assert_same(outputs_and_gradients(ours, run_ours, image), b, 1e-12)


@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_masked_patches_match_transformers(size):
    theirs, ours = hf_pair(False, mask_token=True)
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(2, size[0] * size[1] // 64, generator=torch.Generator().manual_seed(2)) < 0.5
    options = {"bool_masked_pos": mask, "interpolate_pos_encoding": size != (24, 24)}
    b = outputs_and_gradients(theirs, lambda x: theirs(x, **options).last_hidden_state, image)
    b = {k: b.pop(k) for k in ("output", "image")} | from_hf(b, [name for name, _ in ours.named_parameters()])
    assert_same(outputs_and_gradients(ours, lambda x: ours.forward_features(x, **options), image), b, 1e-12)


def test_from_hf_words():
    theirs = dict(
        hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=200, image_size=[32, 64]
    )
    config = ViTConfig.from_hf(theirs | dict(patch_size=8, num_channels=1, layer_norm_eps=1e-5, hidden_act="gelu_new"))
    assert config == ViTConfig(
        img_size=(32, 64), patch_size=8, in_chans=1, num_classes=2, embed_dim=96, depth=3, num_heads=4,
        mlp_ratio=200 / 96, act_layer="gelu_tanh", norm_eps=1e-5, interpolation="bicubic",
    )  # fmt: skip
    assert ViTConfig.from_hf({}).norm_eps == 1e-12
    assert ViTConfig.from_hf({"id2label": {0: "a", 1: "b", 2: "c"}}).num_classes == 3
    assert ViTConfig.from_hf({}, interpolation="bicubic_offset", num_classes=0).interpolation == "bicubic_offset"
    for dim in (48, 112, 192, 768, 1152):  # the hidden width survives conversion to a ratio
        for hidden in (*range(1, 3000, 7), 976, 4304):  # 112 · (976 / 112) rounds to less than 976
            words = dict(hidden_size=dim, intermediate_size=hidden, num_attention_heads=4)
            assert ViTConfig.from_hf(words).mlp_hidden_dim == hidden
    for words, text in [
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported"),
        (dict(model_type="deit"), "model_type='deit' is not a plain ViT"),
        (dict(num_attention_heads=7), "num_heads=7 does not divide embed_dim=768"),
    ]:
        with pytest.raises(ValueError, match=text):
            ViTConfig.from_hf(words)
    with pytest.raises(TypeError, match="no field 'num_clases'; did you mean 'num_classes'"):
        ViTConfig.from_hf({}, num_clases=3)


def article_interpolation(pos: torch.Tensor, h0: int, w0: int) -> torch.Tensor:
    """The article's `interpolate_pos_encoding`, line by line, for a square native grid."""
    n, dim = pos.shape[1] - 1, pos.shape[-1]
    h, w = h0 + 0.1, w0 + 0.1
    patch_pos = F.interpolate(
        pos[:, 1:].reshape(1, int(math.sqrt(n)), int(math.sqrt(n)), dim).permute(0, 3, 1, 2),
        scale_factor=(h / math.sqrt(n), w / math.sqrt(n)),
        mode="bicubic",
        align_corners=False,
    )
    assert (int(h), int(w)) == patch_pos.shape[-2:]
    return torch.cat((pos[:, 0].unsqueeze(0), patch_pos.permute(0, 2, 3, 1).reshape(1, -1, dim)), dim=1)


# 14→61, 14→115 and 7→122 give the wrong grid without the 0.1.
@pytest.mark.parametrize(
    ("native", "new"),
    [(14, (24, 24)), (14, (61, 14)), (14, (115, 3)), (7, (122, 9)), (4, (2, 8)), (4, (1, 16)), (3, (1, 1))],
)
def test_interpolation_is_the_articles(native, new):
    pos = torch.randn(1, native**2 + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, want = interpolate_pos_embed(pos, (native, native), new), article_interpolation(pos, *new)
    assert torch.equal(got, want)
    by_size = interpolate_pos_embed(pos, (native, native), new, "bicubic")
    assert by_size.shape == got.shape and (by_size - got).abs().max() > 1e-3


@pytest.mark.parametrize("interpolation", ["bicubic_offset", "bicubic"])
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_interpolation_of_a_non_square_grid(prefix, interpolation):
    grid, new = (3, 5), (7, 4)
    pos = torch.randn(1, prefix + 15, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = interpolate_pos_embed(pos, grid, new, interpolation)
    assert torch.equal(got[:, :prefix], pos[:, :prefix])
    # Exchanging the axes before or after is the same.

    def turn(x, shape):
        return x.reshape(*shape, 6).transpose(0, 1).reshape(1, -1, 6)

    turned = interpolate_pos_embed(turn(pos[0, prefix:], grid), grid[::-1], new[::-1], interpolation)
    torch.testing.assert_close(turn(turned[0], new[::-1]), got[:, prefix:], rtol=0, atol=1e-14)
    assert interpolate_pos_embed(pos, grid, grid, interpolation) is pos
    leaf = pos.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: interpolate_pos_embed(p, grid, new, interpolation), (leaf,))
    for dtype in (torch.float16, torch.bfloat16):
        low = interpolate_pos_embed(pos.to(dtype), grid, new, interpolation)
        assert low.dtype is dtype
        exact = interpolate_pos_embed(pos.to(dtype).double(), grid, new, interpolation)
        torch.testing.assert_close(low.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)


def test_interpolation_rejects_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"pos has 8 rows, fewer than its grid 3\*3"):
        interpolate_pos_embed(torch.zeros(1, 8, 4), (3, 3), (4, 4))
    with pytest.raises(ValueError, match="interpolation='linear' is unknown"):
        interpolate_pos_embed(torch.zeros(1, 9, 4), (3, 3), (4, 4), "linear")


@pytest.mark.parametrize("size", [(24, 24), (40, 16), (16, 16), (56, 64)])
@pytest.mark.parametrize("prefix", [dict(), dict(reg_tokens=3, no_embed_class=True)])
def test_dynamic_img_size_matches_timm(size, prefix):
    config = ViTConfig(**SMALL, **prefix, dynamic_img_size=True, interpolation="bicubic_antialias")
    theirs = timm_twin(config)
    randomise(theirs)
    ours = VisionTransformer(config)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    assert_same(*(outputs_and_gradients(m, m, image) for m in (ours, theirs)), LIMIT[torch.float32])
    if size != (24, 24):
        with pytest.raises(ValueError, match="doesn't match model"):
            ours(image, interpolate_pos_encoding=False)


@pytest.mark.parametrize("head", [dict(), dict(num_classes=0)])
def test_pre_training_head(head):
    config = ViTConfig(**(SMALL | head), representation_size=20)
    ours = VisionTransformer(config).double()
    randomise(ours)
    state = ours.state_dict()
    body = timm_twin(ViTConfig(**(SMALL | dict(num_classes=0)))).double()
    body.load_state_dict({k: v for k, v in state.items() if not k.startswith(("head.", "pre_logits."))})
    image = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    hidden = torch.tanh(body(image) @ state["pre_logits.fc.weight"].T + state["pre_logits.fc.bias"])
    logits = hidden @ state["head.weight"].T + state["head.bias"] if config.num_classes else hidden
    assert_same({"logits": ours(image)}, {"logits": logits}, 1e-12)
    features = ours.forward_features(image)
    assert_same({"hidden": ours.forward_head(features, pre_logits=True)}, {"hidden": hidden}, 1e-12)
    ours.reset_classifier(4)
    assert not any(k.startswith("pre_logits") for k in ours.state_dict()) and ours.head.weight.shape == (4, 48)
    assert ours.config.representation_size is None and not ours(image).any()


@pytest.mark.parametrize("case", ["token", "registers", "registers, no_embed_class", "no class token", "tuple patch"])
def test_interpolating_model_equals_a_model_built_for_the_size(case):
    config = ViTConfig(**(SMALL | CASES[case]))
    model = VisionTransformer(config).double()
    randomise(model)
    size = (2 * config.img_size[0], config.img_size[1] + config.patch_size[1])
    larger = VisionTransformer(ViTConfig(**(SMALL | CASES[case] | dict(img_size=size)))).double()
    pos = interpolate_pos_embed(model.pos_embed, config.grid_size, larger.config.grid_size)
    larger.load_state_dict(model.state_dict() | {"pos_embed": pos})
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    assert torch.equal(model(image, interpolate_pos_encoding=True), larger(image))
    native = image[..., : config.img_size[0], : config.img_size[1]]
    assert torch.equal(model(native, interpolate_pos_encoding=True), model(native))


RESIZES = "Pass interpolate_pos_encoding=True, or make the model with dynamic_img_size=True."


@pytest.mark.parametrize(
    ("shape", "dtype", "interpolate", "error", "text"),
    [
        ((1, 3, 32, 24), None, False, ValueError, f"Input image size (32*24) doesn't match model (24*40). {RESIZES}"),
        ((1, 3, 40, 24), None, False, ValueError, f"Input image size (40*24) doesn't match model (24*40). {RESIZES}"),
        ((1, 4, 24, 40), None, False, ValueError, "image has 4 channels, the model takes in_chans=3"),
        ((1, 1, 24, 40), None, True, ValueError, "image has 1 channels, the model takes in_chans=3"),
        ((3, 24, 40), None, False, ValueError, "image must be [B, 3, H, W], got shape (3, 24, 40)"),
        ((1, 3, 24, 40), torch.uint8, False, TypeError,
         "image must be floating point, got torch.uint8; convert it and scale it first"),
        ((1, 3, 45, 48), None, True, ValueError,
         "image size 45*48 is not a multiple of the patch 8*8; pad or crop it"),
        ((1, 3, 48, 50), None, True, ValueError,
         "image size 48*50 is not a multiple of the patch 8*8; pad or crop it"),
        ((1, 3, 0, 48), None, True, ValueError,
         "image size 0*48 is not a multiple of the patch 8*8; pad or crop it"),
    ],
)  # fmt: skip
def test_bad_images(shape, dtype, interpolate, error, text):
    model = VisionTransformer(ViTConfig(**(SMALL | dict(img_size=(24, 40)))))
    model.patch_embed.register_forward_pre_hook(lambda *_: pytest.fail("the projection ran before the check"))
    with pytest.raises(error) as caught:
        model(torch.zeros(shape, dtype=dtype), interpolate_pos_encoding=interpolate)
    assert str(caught.value) == text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_near_fp64(dtype):
    model = VisionTransformer(ViTConfig(**SMALL, reg_tokens=1, init_values=0.5))
    randomise(model)
    model.to(dtype)
    exact = VisionTransformer(model.config).double()
    exact.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    low, want = model(image, None, True), exact(image.double(), None, True)
    assert low.dtype is dtype
    assert (low - want).square().mean().sqrt() < 4 * torch.finfo(dtype).eps * want.square().mean().sqrt()


def test_empty_batch():
    assert VisionTransformer(ViTConfig(**SMALL))(torch.zeros(0, 3, 24, 24)).shape == (0, 7)


@pytest.mark.parametrize("mode", ["", "zeros", "jax", "jax_nlhb"])
def test_initial_weights_have_timms_distributions(mode):
    words = dict(img_size=64, patch_size=8, embed_dim=192, depth=1, num_heads=3, init_values=1e-5, reg_tokens=16)
    config = ViTConfig(**words, weight_init=mode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs, ours = (
            timm_twin(ViTConfig(**words, weight_init=mode.replace("zeros", ""))),
            VisionTransformer(config, 0),
        )
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if mode == "zeros" and name in ("cls_token", "reg_token", "pos_embed"):
            assert not a.any(), name
        elif b.unique().numel() == 1:
            assert torch.equal(a, b), name
        else:
            b = b[b.abs() < 1]  # without timm's rare outlier of -2
            torch.testing.assert_close(a.std(), b.std(), rtol=4 * a.numel() ** -0.5, atol=0.0, msg=name)
            assert a.mean().abs() < 5 * a.std() * a.numel() ** -0.5, name
            # The fourth moment tells normal (3), cut-off normal (2.4) and uniform (1.8) apart.
            a, b = (t.double() / t.double().std() for t in (a.detach(), b.detach()))
            assert abs(a.pow(4).mean() - b.pow(4).mean()) < 12 * a.numel() ** -0.5, name
    if mode == "":
        bound = (3 * 8 * 8) ** -0.5  # uniform, not normal
        assert 0.98 * bound < ours.patch_embed.proj.weight.abs().max() <= bound
    # Not in timm; the jax modes follow google-research/vision_transformer.
    hidden = VisionTransformer(ViTConfig(**words, weight_init=mode, representation_size=256), 0).pre_logits.fc
    assert hidden.weight.std().item() == pytest.approx(192**-0.5 if "jax" in mode else 0.02, rel=0.02)
    assert not hidden.bias.any()


def test_seeded_weights():
    config, state = ViTConfig(**SMALL), torch.get_rng_state()
    a = VisionTransformer(config, seed=1)
    half = VisionTransformer(config).half()
    torch.set_rng_state(state)
    init_weights(half, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, p), q in zip(a.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(p.half(), q), name
    other = VisionTransformer(config, seed=2)
    assert not torch.equal(other.pos_embed, a.pos_embed)
    a.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"no initialisation is known for parameter 'scale' of shape \(2,\)"):
        init_weights(a)


def test_reset_classifier():
    model = VisionTransformer(ViTConfig(**SMALL)).half().eval()
    body = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head.")}
    model.reset_classifier(11)
    assert model.config.num_classes == 11 and model.head.weight.shape == (11, 48)
    assert model.head.weight.dtype is torch.float16 and not model.head.training
    assert not any(p.any() for p in model.head.parameters()) and all(p.requires_grad for p in model.head.parameters())
    image = torch.randn(2, 3, 24, 24).half()
    assert torch.equal(model(image), torch.zeros(2, 11).half())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in body.items())
    model.reset_classifier(0)
    assert torch.equal(model(image), model.forward_head(model.forward_features(image), pre_logits=True))
    assert not any(k.startswith("head") for k in model.state_dict())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(embed_dim=100, num_heads=12), "num_heads=12 does not divide embed_dim=100; use num_heads=4"),
        (dict(img_size=225), "img_size: height 225 is not a multiple of patch_size 16; use 224 or 240"),
        (dict(img_size=(224, 10)), "img_size: width 10 is not a multiple of patch_size 16; use 16 or 32"),
        (dict(patch_size=(16, 15)), "img_size: width 224 is not a multiple of patch_size 15; use 210 or 225"),
        (dict(img_size=(224, 224, 3)), r"img_size=\(224, 224, 3\) must be one integer or \(height, width\)"),
        (dict(img_size=0), "img_size=0 must be an integer of at least 1"),
        (dict(patch_size=16.0), "patch_size=16.0 must be an integer of at least 1"),
        (dict(depth=0), "depth=0 must be an integer of at least 1"),
        (dict(depth=-1), "depth=-1 must be"),
        (dict(depth=True), "depth=True must be"),
        (dict(embed_dim=0), "embed_dim=0 must be"),
        (dict(num_heads=0), "num_heads=0 must be"),
        (dict(in_chans=0), "in_chans=0 must be"),
        (dict(num_classes=-1), "num_classes=-1 must be an integer of at least 0"),
        (dict(reg_tokens=-1), "reg_tokens=-1 must be"),
        (dict(norm_eps=0.0), "norm_eps=0.0 must be a number above 0 and below"),
        (dict(norm_eps=-1e-6), "norm_eps=-1e-06 must be"),
        (dict(norm_eps=math.nan), "norm_eps=nan must be"),
        (dict(mlp_ratio=0), "mlp_ratio=0 must be"),
        (dict(mlp_ratio=1e-4), "mlp_ratio=0.0001 of embed_dim=768 is no hidden unit"),
        (dict(init_values=-0.1), "init_values=-0.1 must be above 0 and below"),
        (dict(global_pool="max"), r"global_pool='max' is unknown; use one of \('token', 'avg', 'map', ''\)"),
        (dict(representation_size=0), "representation_size=0 must be an integer of at least 1"),
        (dict(patch_drop_rate=1.0), "patch_drop_rate=1.0 must be at least 0 and below 1"),
        (dict(patch_drop_rate=-0.1), "patch_drop_rate=-0.1 must be"),
        (dict(weight_init="moco"), "weight_init='moco' is unknown; use one of"),
        (dict(act_layer="relu"), "act_layer='relu' is unknown"),
        (dict(interpolation="nearest"), "interpolation='nearest' is unknown"),
        (dict(impl="cuda"), "impl='cuda' is unknown"),
        (dict(class_token=False), 'global_pool="token" needs class_token=True; use global_pool="avg" or "map"'),
        (dict(impl="triton", num_heads=96), "num_heads=96 makes head_dim=8; the kernels take 16 to 128"),
        (dict(impl="triton", num_heads=4), "num_heads=4 makes head_dim=192"),
    ],
    ids=str,
)
def test_bad_configurations(fields, text):
    with pytest.raises(ValueError, match=text):
        ViTConfig(**fields)


def test_config_properties():
    config = ViTConfig(img_size=[32, 48], patch_size=(8, 16), reg_tokens=2, embed_dim=96, num_heads=4, mlp_ratio=2.7)
    assert hash(config) == hash(ViTConfig(img_size=(32, 48), patch_size=(8, 16), reg_tokens=2, embed_dim=96,
                                          num_heads=4, mlp_ratio=2.7))  # fmt: skip
    assert (config.img_size, config.patch_size, config.grid_size) == ((32, 48), (8, 16), (4, 3))
    assert (config.num_patches, config.num_prefix_tokens, config.num_tokens, config.pos_embed_len) == (12, 3, 15, 15)
    assert (config.head_dim, config.mlp_hidden_dim, config.use_fc_norm) == (24, 259, False)
    assert ViTConfig(no_embed_class=True).pos_embed_len == 196
    assert ViTConfig(global_pool="avg").use_fc_norm and not ViTConfig(global_pool="avg", fc_norm=False).use_fc_norm


def test_named_variants():
    names = list_models()
    assert len(names) == len(set(names)) == 80 and "vit_base_patch14_384" not in names
    assert get_config("vit_base_patch16_224") == ViTConfig()
    head_dims = dict(tiny=64, base=64, so400m=72, huge=80, giant=88, gigantic=104, enormous=112)
    assert head_dims == {size: get_config(f"vit_{size}_patch14_224").head_dim for size in head_dims}
    assert get_config("vit_so400m_patch14_224").mlp_hidden_dim == 4304
    small = get_config("vit_tiny_patch16_224", img_size=(96, 80), depth=1, impl="reference")
    assert (small.grid_size, small.depth, small.embed_dim) == ((6, 5), 1, 192)
    for name, millions in {"base": 86, "large": 307, "huge": 632}.items():  # table 1 of the paper
        with torch.device("meta"):
            model = VisionTransformer(get_config(f"vit_{name}_patch{14 if name == 'huge' else 16}_224", num_classes=0))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.015)
    with pytest.raises(ValueError, match="unknown model 'vit_bas_patch16_224'; did you mean 'vit_base_patch16_224'"):
        get_config("vit_bas_patch16_224")
    with pytest.raises(TypeError, match="ViTConfig has no field 'image_size'; did you mean 'img_size'"):
        get_config("vit_base_patch16_224", image_size=64)


def test_named_variants_have_timms_shapes():
    timm = peers.import_timm()
    common = [name for name in list_models() if timm.is_model(name)]
    assert len(common) >= 27, common
    for name in common:
        with torch.device("meta"):  # 1000 classes: some of timm's configs have none
            ours, theirs = VisionTransformer(get_config(name)), timm.create_model(name, num_classes=1000)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
        assert shapes[0] == shapes[1], name
        assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads, name
        assert ours.config.norm_eps == theirs.norm.eps, name


DEFAULTS = {  # of timm and the paper: ViT-B/16
    "img_size": (224, 224), "patch_size": (16, 16), "in_chans": 3, "num_classes": 1000, "global_pool": "token",
    "embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "qk_norm": False,
    "init_values": None, "class_token": True, "no_embed_class": False, "reg_tokens": 0, "pre_norm": False,
    "final_norm": True, "fc_norm": None, "act_layer": "gelu", "norm_eps": 1e-6, "use_mask_token": False,
    "representation_size": None, "dynamic_img_size": False, "interpolation": "bicubic_offset", "drop_rate": 0.0,
    "pos_drop_rate": 0.0, "proj_drop_rate": 0.0, "act_drop_rate": None, "attn_drop_rate": 0.0, "drop_path_rate": 0.0,
    "patch_drop_rate": 0.0, "weight_init": "", "impl": "auto",
}  # fmt: skip


def test_default_of_every_field():
    assert vars(ViTConfig()) == DEFAULTS and list(vars(ViTConfig())) == list(DEFAULTS)


def test_every_word_that_a_field_takes():
    for field, words in {
        "global_pool": ("token", "avg", "map", ""),
        "act_layer": ("gelu", "gelu_tanh", "quick_gelu"),
        "interpolation": ("bicubic_offset", "bicubic", "bicubic_antialias"),
        "weight_init": ("", "zeros", "jax", "jax_nlhb"),
        "impl": ("auto", "fused", "triton", "reference"),
    }.items():
        for word in words:
            assert getattr(ViTConfig(**{field: word}), field) == word
        with pytest.raises(ValueError) as caught:
            ViTConfig(**{field: "GELU"})
        assert str(caught.value) == f"{field}='GELU' is unknown; use one of {words}"


RATES = [name for name in DEFAULTS if name.endswith("_rate")]


@pytest.mark.parametrize("rate", RATES)
def test_range_of_every_rate(rate):
    """From 0 to below 1; only those of dropout and stochastic depth need a seed."""
    assert len(RATES) == 7
    for value in (0, 0.0, 0.5, 0.999):
        config = ViTConfig(**{rate: value})
        assert getattr(config, rate) == value
        assert config.drops == (value > 0 and rate != "patch_drop_rate")
    for value in (1, 1.0, 1.5, -1e-9, math.nan):
        with pytest.raises(ValueError, match=f"^{rate}={value} must be at least 0 and below 1$"):
            ViTConfig(**{rate: value})


@pytest.mark.parametrize("field", ["img_size", "patch_size"])
@pytest.mark.parametrize("value", [(0, 16), (16, 0), (16, -1), (16, True), (16, 16.0), (16, "16"), (16,), (16, 16, 16)])
def test_both_sides_of_a_size_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"^{field}="):
        ViTConfig(**{"patch_size": 16, "img_size": 16} | {field: value})


def test_smallest_and_largest_sizes():
    least = dict(
        img_size=1, patch_size=1, in_chans=1, num_classes=0, embed_dim=1, depth=1, num_heads=1, reg_tokens=0,
        mlp_ratio=1, representation_size=1,
    )  # fmt: skip
    assert ViTConfig(**least).num_tokens == 2
    assert ViTConfig(**least | dict(depth=10_000)).depth == 10_000
    with pytest.raises(ValueError, match=r"^depth=10001 must be at most 10000$"):
        ViTConfig(**least | dict(depth=10_001))
    with pytest.raises(ValueError, match=r"^mlp_ratio=0.9 of embed_dim=1 is no hidden unit"):
        ViTConfig(**least | dict(mlp_ratio=0.9))


@pytest.mark.parametrize("impl", ["auto", "fused", "triton", "reference"])
@pytest.mark.parametrize("head_dim", [8, 12, 16, 20, 24, 64, 72, 124, 128, 136])
def test_head_dims_that_an_impl_takes(head_dim, impl):
    words = dict(embed_dim=3 * head_dim, num_heads=3, impl=impl)
    if impl in ("auto", "reference") or head_dim in (16, 24, 64, 72, 128):
        assert ViTConfig(**words).head_dim == head_dim
    else:
        with pytest.raises(ValueError, match=f"^num_heads=3 makes head_dim={head_dim}; the kernels take 16 to 128"):
            ViTConfig(**words)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (dict(embed_dim=12 * 10**5), "embed_dim=1200000, depth=12, mlp_ratio=4.0"),
        (dict(mlp_ratio=1e7), "embed_dim=768, depth=12, mlp_ratio=10000000.0"),
        (dict(img_size=(160_000, 1_600_000)), r"embed_dim=768, img_size=\(160000, 1600000\), patch_size=\(16, 16\)"),
        (dict(in_chans=10**6), r"embed_dim=768, patch_size=\(16, 16\), in_chans=1000000"),
        (dict(reg_tokens=10**9), "embed_dim=768, reg_tokens=1000000000"),
        (dict(num_classes=10**9), "embed_dim=768, representation_size=None, num_classes=1000000000"),
        (dict(representation_size=10**9), "embed_dim=768, representation_size=1000000000, num_classes=1000"),
    ],
)
def test_sizes_that_no_memory_holds_are_named(fields, names):
    with pytest.raises(ValueError, match=f"^{names} make .* parameters, more than 1e.11; make one of them smaller$"):
        ViTConfig(**fields)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_stochastic_depth_grows_linearly_from_0(depth):
    config = ViTConfig(depth=depth, drop_path_rate=0.4)
    want = [0.0] if depth == 1 else [0.4 * i / (depth - 1) for i in range(depth)]
    assert [config.block_drop_path_rate(i) for i in range(depth)] == pytest.approx(want)


def test_dropout_after_the_activation():
    """None: proj_drop_rate; 0: no dropout."""
    for act, want in ((None, 0.3), (0.0, 0.0), (0, 0), (0.2, 0.2)):
        assert ViTConfig(proj_drop_rate=0.3, act_drop_rate=act).hidden_drop_rate == want
    assert ViTConfig(act_drop_rate=0.2).hidden_drop_rate == 0.2 and ViTConfig(act_drop_rate=0.2).drops


def test_numbers_of_a_grid_that_is_not_square():
    for cls, reg, bare in [(True, 0, False), (True, 3, True), (False, 2, False), (False, 0, True)]:
        config = ViTConfig(
            img_size=(24, 80), patch_size=(8, 16), class_token=cls, reg_tokens=reg, no_embed_class=bare,
            global_pool="avg",
        )  # fmt: skip
        prefix = cls + reg
        assert config.grid_size == (3, 5) and config.num_patches == 15 and config.num_prefix_tokens == prefix
        assert config.num_tokens == 15 + prefix and config.pos_embed_len == (15 if bare else 15 + prefix)


@pytest.mark.parametrize("patch", [(8, 4), (4, 8)])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (28, 24), (24, 28), (24, 0), (0, 24), (8, 8), (26, 24), (24, 26)])
def test_patch_that_is_not_square_divides_each_side(size, patch):
    config = ViTConfig(img_size=(24, 40), patch_size=patch)
    image = torch.zeros(2, 3, *size)
    fits = size[0] and size[1] and not size[0] % patch[0] and not size[1] % patch[1]
    if fits:
        assert config.check_image(image, True) == (size[0] // patch[0], size[1] // patch[1])
    else:
        text = rf"^image size {size[0]}\*{size[1]} is not a multiple of the patch {patch[0]}\*{patch[1]}; pad or crop"
        with pytest.raises(ValueError, match=text):
            config.check_image(image, True)


def test_interpolation_is_asked_of_the_call_before_the_model():
    for dynamic in (False, True):
        config = ViTConfig(img_size=(24, 40), patch_size=8, dynamic_img_size=dynamic)
        assert config.check_image(torch.zeros(0, 3, 24, 40)) == (3, 5)
        for asked in (None, False, True):
            if asked or (asked is None and dynamic):
                assert config.check_image(torch.zeros(1, 3, 40, 24).half(), asked) == (5, 3)
            else:
                with pytest.raises(ValueError, match="doesn't match"):
                    config.check_image(torch.zeros(1, 3, 40, 24), asked)


def test_masks_of_patches():
    config = ViTConfig(use_mask_token=True)
    config.check_mask(None, 2, (3, 5))
    config.check_mask(torch.ones(2, 15, dtype=torch.bool), 2, (3, 5))
    ViTConfig().check_mask(None, 2, (3, 5))
    for shape in [(15, 2), (2, 3, 5), (1, 15), (2, 16), (15,), (2, 14)]:
        with pytest.raises(ValueError) as caught:
            config.check_mask(torch.ones(shape, dtype=torch.bool), 2, (3, 5))
        assert str(caught.value) == (
            f"bool_masked_pos must have shape [2, 15] for the 3*5 patches of each image, got {shape}"
        )
    for mask, kind in ((torch.ones(2, 15), "torch.float32"), ([[True] * 15] * 2, "list")):
        with pytest.raises(TypeError) as caught:
            config.check_mask(mask, 2, (3, 5))
        assert str(caught.value) == f"bool_masked_pos must be a bool tensor, got {kind}; pass bool_masked_pos.bool()"
    with pytest.raises(ValueError, match="needs a mask token; make the model with use_mask_token=True"):
        ViTConfig().check_mask(torch.ones(2, 15, dtype=torch.bool), 2, (3, 5))


HF_DEFAULTS = DEFAULTS | {"num_classes": 2, "norm_eps": 1e-12, "interpolation": "bicubic"}


def test_from_hf_takes_every_word():
    """From an object or a mapping. A missing key gets Hugging Face's default, and an override wins."""

    assert vars(ViTConfig.from_hf({})) == HF_DEFAULTS == vars(ViTConfig.from_hf(types.SimpleNamespace()))
    for words, fields in [
        ({"image_size": [64, 32]}, {"img_size": (64, 32)}),
        ({"patch_size": (8, 4)}, {"patch_size": (8, 4)}),
        ({"num_channels": 1}, {"in_chans": 1}),
        ({"hidden_size": 384, "intermediate_size": 768}, {"embed_dim": 384, "mlp_ratio": 2.0}),
        ({"num_hidden_layers": 3}, {"depth": 3}),
        ({"num_attention_heads": 6}, {"num_heads": 6}),
        ({"qkv_bias": False}, {"qkv_bias": False}),
        ({"layer_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
        ({"attention_probs_dropout_prob": 0.1}, {"attn_drop_rate": 0.1}),
        ({"hidden_dropout_prob": 0.2}, {"pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "act_drop_rate": 0.0}),
        ({"hidden_dropout_prob": 0.0}, {}),
        ({"num_labels": 0, "id2label": {0: "a"}}, {"num_classes": 0}),
        ({"num_labels": 5, "id2label": {0: "a"}}, {"num_classes": 5}),
        ({"id2label": {0: "a"}}, {"num_classes": 1}),
        ({"hidden_act": "gelu"}, {"act_layer": "gelu"}),
        ({"hidden_act": "gelu_new"}, {"act_layer": "gelu_tanh"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"act_layer": "gelu_tanh"}),
        ({"hidden_act": "quick_gelu"}, {"act_layer": "quick_gelu"}),
        ({"model_type": "vit"}, {}),
        ({"model_type": ""}, {}),
    ]:
        for given in (words, types.SimpleNamespace(**words)):
            assert vars(ViTConfig.from_hf(given)) == HF_DEFAULTS | fields, words
    told = {"hidden_dropout_prob": 0.2, "hidden_act": "quick_gelu", "num_labels": 5, "layer_norm_eps": 1e-3}
    asked = {"proj_drop_rate": 0.1, "act_drop_rate": None, "act_layer": "gelu", "num_classes": 0, "norm_eps": 1e-5}
    assert vars(ViTConfig.from_hf(told, **asked)) == HF_DEFAULTS | {"pos_drop_rate": 0.2} | asked


WIDTHS = {  # embed_dim, depth, num_heads, MLP width: the papers' tables, and timm's names
    "tiny": (192, 12, 3, 768), "small": (384, 12, 6, 1536), "medium": (512, 12, 8, 2048), "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096), "so400m": (1152, 27, 16, 4304), "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144), "gigantic": (1664, 48, 16, 8192), "enormous": (1792, 56, 16, 15360),
}  # fmt: skip


def test_sizes_and_order_of_the_named_variants():
    """Plain ones by width, then SigLIP's and CLIP's; their other fields are as in the papers."""
    plain = [
        f"vit_{size}_patch{patch}_{img}"
        for size in WIDTHS
        for patch, img in [(8, 224), (8, 384), (14, 224), (16, 224), (16, 384), (32, 224), (32, 384)]
    ]
    clip = dict(pre_norm=True, norm_eps=1e-5)
    gap = dict(class_token=False, global_pool="avg", fc_norm=False)
    pool = dict(class_token=False, global_pool="map")
    others = {
        "vit_base_patch16_siglip_224": ("base", 16, 224, pool),
        "vit_base_patch16_siglip_384": ("base", 16, 384, pool),
        "vit_large_patch16_siglip_384": ("large", 16, 384, pool),
        "vit_so400m_patch14_siglip_224": ("so400m", 14, 224, pool),
        "vit_so400m_patch16_siglip_384": ("so400m", 16, 384, pool | dict(act_layer="gelu_tanh")),
        "vit_so400m_patch14_siglip_gap_224": ("so400m", 14, 224, gap),
        "vit_so400m_patch16_siglip_gap_384": ("so400m", 16, 384, gap),
        "vit_base_patch16_clip_224": ("base", 16, 224, clip),
        "vit_large_patch14_clip_224": ("large", 14, 224, clip),
        "vit_large_patch14_clip_quickgelu_224": ("large", 14, 224, clip | dict(act_layer="quick_gelu")),
    }
    assert list_models() == [*plain, *others]
    table = {
        name: (name.split("_")[1], *(int(x) for x in name.replace("patch", "").split("_")[2:]), {}) for name in plain
    }
    for name, (size, patch, img, fields) in (table | others).items():
        config = get_config(name)
        dim, depth, heads, _hidden = WIDTHS[size]
        assert (config.embed_dim, config.depth, config.num_heads, config.mlp_hidden_dim) == WIDTHS[size], name
        want = dict(img_size=(img, img), patch_size=(patch, patch), embed_dim=dim, depth=depth, num_heads=heads)
        assert vars(config) == DEFAULTS | want | {"mlp_ratio": config.mlp_ratio} | fields, name


def test_named_variants_are_not_changed_from_outside():
    list_models().clear()
    asked = {"depth": 1, "num_classes": 0}
    assert get_config("vit_base_patch16_224", **asked).num_classes == 0 and asked == {"depth": 1, "num_classes": 0}
    assert len(list_models()) == 80 and get_config("vit_base_patch16_224") == ViTConfig()
