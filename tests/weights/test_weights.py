"""Checkpoints: round trips of every dialect, the layouts of flax, and files that must not load."""

import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import randomise

import vit
from vit.config import ViTConfig

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "mlp_ratio": 2.0,
}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
CASES = [
    ("timm", {}),
    ("timm", {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True, "use_mask_token": True}),
    ("timm", {"reg_tokens": 3, "no_embed_class": True, "representation_size": 24, "global_pool": "avg"}),
    ("timm", {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5, "img_size": (16, 48)}),
    ("hf", {"use_mask_token": True}),
    ("hf", {"num_classes": 0, "representation_size": 24}),
    ("hf_memory", {"qkv_bias": False}),
    ("hf_memory", {"num_classes": 0, "no_embed_class": True}),
    ("torchvision", {"representation_size": 24}),
    ("torchvision_old", {"img_size": (16, 48)}),
    ("google", {"representation_size": 24}),
    ("google", {"num_classes": 0} | GAP),
    ("big_vision", {"no_embed_class": True}),
    ("big_vision", GAP),
    ("dinov2", {"num_classes": 0, "init_values": 0.1}),
    ("dinov2", {"num_classes": 0, "reg_tokens": 3, "no_embed_class": True, "use_mask_token": True}),
]
IDS = [f"{dialect}-{','.join(fields)}" for dialect, fields in CASES]
SUFFIXES = [".safetensors", ".pt", ".npz"]


def make(dtype=torch.float32, seed=0, **fields) -> vit.VisionTransformer:
    model = vit.VisionTransformer(ViTConfig(**SMALL | fields), seed=0)
    randomise(model, seed)
    return model.to(dtype).eval()


def bits(model) -> dict[str, bytes]:
    return {k: t.detach().view(torch.uint8).numpy().tobytes() for k, t in model.state_dict().items()}


def save(model, path, dialect="timm"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about numerics; test_numerics_* check them
        vit.save_pretrained(model, path, dialect)
    return path


def foreign(model, path, dialect="timm"):
    """As `save`, but the file has no note of its origin or configuration."""
    save(model, path, dialect)
    if path.suffix == ".npz":
        np.savez(path, **np.load(path))
    else:
        torch.save(dict(torch.load(path, weights_only=True)), path)
    return path


def load(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vit.load_pretrained(*args, **options)


def image(model, seed=1):
    c = model.config
    return torch.randn(2, c.in_chans, *c.img_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("dialect", "fields"), CASES, ids=IDS)
def test_round_trip_keeps_bits(dialect, fields, dtype, suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    model, other = make(dtype, **fields), make(dtype, seed=1, **fields)
    path = save(model, tmp_path / f"model{suffix}", dialect)
    before = bits(model)
    optimizer_sees = list(other.parameters())
    assert load(other, path) is other
    assert bits(other) == before == bits(model)
    assert all(a is b for a, b in zip(optimizer_sees, other.parameters(), strict=True))
    assert os.listdir(tmp_path) == [path.name]

    sizes = {k: v for k, v in (SMALL | fields).items() if k in SMALL}
    del sizes["num_classes"]
    if dialect in ("hf", "hf_memory") and "representation_size" in fields:
        sizes["representation_size"] = fields["representation_size"]  # a pooler is left out unless asked for
    named = load("vit_tiny_patch16_224", path, **sizes, dtype=dtype)
    want = model.state_dict() | ({"mask_token": model.pos_embed[:, :1] * 0} if dialect == "dinov2" else {})
    assert named.state_dict().keys() == want.keys() | model.state_dict().keys()
    if dtype is torch.float32:
        x = image(model)
        assert torch.equal(named(x), model(x)) if fields.get("no_embed_class") is None else True
        assert {k: getattr(named.config, k) for k in ("norm_eps", "act_layer")} == {
            k: getattr(model.config, k) for k in ("norm_eps", "act_layer")
        }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_convert(dtype, tmp_path):
    model = make(dtype)
    other = load(make(seed=1), save(model, tmp_path / "m.npz"))
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert bits(other) == bits(make(dtype).float())


def test_model_keeps_what_it_is(tmp_path):
    """Frozen parameters, an optimiser made before, the compiled wrapper and the dtype."""
    path = save(make(), tmp_path / "m.pt")
    model = make(torch.bfloat16, seed=1)
    model.blocks[0].requires_grad_(False)
    frozen = [p.requires_grad for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    load(torch.compile(model, backend="eager"), path)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert bits(model) == bits(make().bfloat16())
    model(image(model).bfloat16()).sum().backward()
    before = bits(model)
    optimizer.step()
    assert bits(model) != before


@pytest.mark.parametrize("dialect", ["timm", "dinov2"])
def test_special_values_are_data(dialect, tmp_path):
    fields = {"num_classes": 0, "no_embed_class": True}
    model = make(**fields)
    with torch.no_grad():
        model.norm.weight[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
        model.cls_token[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    assert bits(load(make(seed=1, **fields), save(model, tmp_path / "m.npz", dialect))) == bits(model)


# The layouts of flax, written out from google-research/vision_transformer and big_vision; D, H and K = D / H.


def flax_params(big_vision: bool, cls=True, hidden=0, side=4, seed=0, depth=2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    D, H, K, M, P = 32, 2, 16, 64, 8
    a, n, m = ("0", "1", "0") if big_vision else ("1", "2", "3")
    shapes = {"embedding/kernel": (P, P, 3, D), "embedding/bias": (D,)}
    if cls:
        shapes["cls"] = (1, 1, D)
    if big_vision:
        shapes["pos_embedding"] = (1, side**2, D)
    else:
        shapes["Transformer/posembed_input/pos_embedding"] = (1, side**2 + cls, D)
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for norm in ("0", n):
            shapes |= {f"{block}/LayerNorm_{norm}/{leaf}": (D,) for leaf in ("scale", "bias")}
        for part in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_{a}/{part}/kernel"] = (D, H, K)
            shapes[f"{block}/MultiHeadDotProductAttention_{a}/{part}/bias"] = (H, K)
        shapes[f"{block}/MultiHeadDotProductAttention_{a}/out/kernel"] = (H, K, D)
        shapes[f"{block}/MultiHeadDotProductAttention_{a}/out/bias"] = (D,)
        shapes |= {f"{block}/MlpBlock_{m}/Dense_0/kernel": (D, M), f"{block}/MlpBlock_{m}/Dense_0/bias": (M,)}
        shapes |= {f"{block}/MlpBlock_{m}/Dense_1/kernel": (M, D), f"{block}/MlpBlock_{m}/Dense_1/bias": (D,)}
    shapes |= {"Transformer/encoder_norm/scale": (D,), "Transformer/encoder_norm/bias": (D,)}
    if hidden:
        shapes |= {"pre_logits/kernel": (D, hidden), "pre_logits/bias": (hidden,)}
    shapes |= {"head/kernel": (hidden or D, 5), "head/bias": (5,)}
    return {k: (rng.standard_normal(s) * 0.3).astype(np.float32) for k, s in shapes.items()}


def flax_forward(params: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """vit_jax's and big_vision's model in flax's own layouts: x [B, 3, IMG, IMG] -> logits."""
    p = {k: torch.from_numpy(v).double() for k, v in params.items()}
    big = "pos_embedding" in p
    a, n, m = ("0", "1", "0") if big else ("1", "2", "3")

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}/scale"] + p[f"{name}/bias"]
        )

    B, grid = len(x), x.shape[2] // 8
    patches = x.double().reshape(B, 3, grid, 8, grid, 8)
    x = torch.einsum("bcyixj,ijcd->byxd", patches, p["embedding/kernel"]).flatten(1, 2) + p["embedding/bias"]
    cls = [p["cls"].expand(B, -1, -1)] if "cls" in p else []
    if big:
        x = torch.cat([*cls, x + p["pos_embedding"]], 1)
    else:
        x = torch.cat([*cls, x], 1) + p["Transformer/posembed_input/pos_embedding"]
    for i in range(2):
        block = f"Transformer/encoderblock_{i}"
        attn, y = f"{block}/MultiHeadDotProductAttention_{a}", norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            torch.einsum("bnd,dhk->bnhk", y, p[f"{attn}/{w}/kernel"]) + p[f"{attn}/{w}/bias"]
            for w in ("query", "key", "value")
        )
        weights = torch.einsum("bqhk,bnhk->bhqn", q / 4.0, k).softmax(-1)  # √16
        o = torch.einsum("bhqn,bnhk->bqhk", weights, v)
        x = x + torch.einsum("bqhk,hkd->bqd", o, p[f"{attn}/out/kernel"]) + p[f"{attn}/out/bias"]
        mlp, y = f"{block}/MlpBlock_{m}", norm(x, f"{block}/LayerNorm_{n}")
        y = F.gelu(y @ p[f"{mlp}/Dense_0/kernel"] + p[f"{mlp}/Dense_0/bias"], approximate="tanh")
        x = x + y @ p[f"{mlp}/Dense_1/kernel"] + p[f"{mlp}/Dense_1/bias"]
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in p else x.mean(1)
    if "pre_logits/kernel" in p:
        x = (x @ p["pre_logits/kernel"] + p["pre_logits/bias"]).tanh()
    return x @ p["head/kernel"] + p["head/bias"]


def stacked(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """scan=True: the blocks along a new first axis."""
    out = {}
    for k, v in params.items():
        if "encoderblock_0" in k:
            v = np.stack([v, params[k.replace("encoderblock_0", "encoderblock_1")]])
        if "encoderblock_1" not in k:
            out[k.replace("encoderblock_0", "encoderblock")] = v
    return out


def prefixed(params, prefix, **others):
    return {prefix + k: v for k, v in params.items()} | others


FLAX = {
    "google": flax_params(False),
    "google, opt/target": prefixed(flax_params(False), "opt/target/", **{"opt/state/step": np.int32(3)}),
    "google, hidden layer": flax_params(False, hidden=24),
    "google, no class token": flax_params(False, cls=False),
    "big_vision": prefixed(flax_params(True), "params/"),
    "big_vision, scan": prefixed(stacked(flax_params(True)), "params/"),
    "big_vision, two towers": prefixed(flax_params(True), "params/img/", **{"params/txt/head/bias": np.ones(3)}),
    "big_vision, GAP": prefixed(flax_params(True, cls=False), "params/"),
    "big_vision, hidden layer": flax_params(True, hidden=24),
}


@pytest.mark.parametrize("live", [False, True], ids=["named", "live"])
@pytest.mark.parametrize("case", FLAX)
def test_flax_checkpoints(case, live, tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **FLAX[case])
    hidden = {"representation_size": 24} if "hidden" in case else {}
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    fields = hidden | (GAP if "GAP" in case or "no class" in case else {})
    model = load(make(**fields) if live else "vit_tiny_patch16_224", path, **{} if live else sizes).eval()
    plain = {"cls": False} if "GAP" in case or "no class" in case else {}
    params = flax_params(case.startswith("big"), hidden=hidden.get("representation_size", 0), **plain)
    x = image(model)
    want = flax_forward(params, x)
    assert (model(x).double() - want).abs().max() < 2e-5 * want.abs().max()
    assert (model.config.act_layer, model.config.norm_eps) == ("gelu_tanh", 1e-6)
    assert model.pretrained_cfg["source"] == case.split(",")[0] and model.pretrained_cfg["mean"] == (0.5,) * 3


@pytest.mark.parametrize("grid", [(7, 5), (1, 17), (3, 5), (2, 8)])  # 1*17: also 16 patches and a class token
@pytest.mark.parametrize("big_vision", [False, True])
def test_flax_position_embedding_is_resized_as_scipy_zoom(big_vision, grid, tmp_path):
    params = flax_params(big_vision, side=4)
    np.savez(tmp_path / "w.npz", **params)
    size = (8 * grid[0], 8 * grid[1])
    told = {"grid_size": (4, 4)} if grid == (2, 8) else {}  # nothing else reveals it
    live = load(make(img_size=size), tmp_path / "w.npz", **told)
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"} | {"img_size": size}
    named = load("vit_tiny_patch16_224", tmp_path / "w.npz", **sizes, **told)
    pos = params["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"]
    table = pos[0, 0 if big_vision else 1 :].reshape(4, 4, 32)
    for axis, side in enumerate(grid):
        at = np.linspace(0, 3, side)
        table = np.apply_along_axis(lambda v, at=at: np.interp(at, np.arange(4), v), axis, table)
    for model in (live, named):
        got, patches = model.pos_embed.detach().numpy(), grid[0] * grid[1]
        assert np.abs(got[0, -patches:] - table.reshape(patches, 32)).max() < 1e-6
        row = got[0, 0] if got.shape[1] > patches else 0
        want = params["cls"][0, 0] + (0 if big_vision else pos[0, 0])
        assert np.abs(model.cls_token.detach().numpy()[0, 0] + row - want).max() < 1e-6
    assert np.array_equal(live.pos_embed.detach().numpy()[0, :1], np.zeros((1, 32)) if big_vision else pos[0, :1])


# Which grid a position embedding has. The source has 4*4 patches of 56 pixels, since its name says 224. With or without
# a class token, its 17 or 16 rows also fit models of 1*17, 3*5 or 2*8 patches.
READINGS = [
    (row, own, grid)
    for row in (True, False)
    for own in (True, False)
    for grid in [(4, 4), (1, 17), (3, 5), (2, 8), (1, 16), (5, 5), (3, 4)]
]
COARSE = {"patch_size": 56, "img_size": 224}


def load_readings(path, row, own, grid):
    """Loads a foreign file, with or without a class token row, into models of layout ``own`` and this grid."""
    size, rows = {"img_size": (56 * grid[0], 56 * grid[1])}, 16 + row
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"} | COARSE | size
    yield load("vit_tiny_patch16_224", path, **sizes)
    yield load("vit_tiny_patch16_224", path, **sizes, no_embed_class=not own)
    live = make(seed=1, **COARSE | size, no_embed_class=not own)
    if live.pos_embed.shape[1] == rows and grid != (4, 4):  # the rows fit this grid, too
        with pytest.raises(vit.CheckpointError, match=r"patches .* or .* patches .*; pass grid_size="):
            vit.load_pretrained(live, path)
        asis = load(make(seed=1, **COARSE | size, no_embed_class=not own), path, grid_size=grid)
        assert torch.equal(asis.pos_embed, torch.load(path, weights_only=True)["pos_embed"])
    else:
        yield load(make(seed=1, **COARSE | size, no_embed_class=not own), path)
    yield load(live, path, grid_size=(4, 4))


@pytest.mark.parametrize(("row", "own", "grid"), READINGS)
def test_a_grid_is_not_guessed(row, own, grid, tmp_path):
    source = make(**COARSE, no_embed_class=not row)
    torch.save(dict(source.state_dict()), tmp_path / "m.pt")
    patches = source.pos_embed[:, -16:]
    if grid != (4, 4):
        patches = vit.reference.interpolate_pos_embed(patches, (4, 4), grid, "bicubic_antialias")
    token = source.cls_token + (source.pos_embed[:, :1] if row else 0)
    for model in load_readings(tmp_path / "m.pt", row, own, grid):
        count = grid[0] * grid[1]
        torch.testing.assert_close(model.pos_embed[:, -count:], patches, rtol=0, atol=1e-5)
        rest = model.pos_embed[:, :-count]
        torch.testing.assert_close(model.cls_token + (rest if rest.shape[1] else 0), token, rtol=0, atol=1e-6)


def test_a_reading_that_the_name_decides_is_said(tmp_path):
    torch.save(dict(make(**COARSE).state_dict()), tmp_path / "m.pt")
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"} | COARSE
    with pytest.warns(
        UserWarning, match=r"17 rows is 4\*4 patches and 1 prefix tokens or 1\*17 patches alone: the first"
    ):
        vit.load_pretrained("vit_tiny_patch16_224", tmp_path / "m.pt", **sizes | {"img_size": (56, 952)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.load_pretrained("vit_tiny_patch16_224", tmp_path / "m.pt", **sizes | {"img_size": (56, 56)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dialect", ["timm", "torchvision", "google", "dinov2"])
def test_16_bits_are_resized_in_32(dialect, dtype, tmp_path):
    """And rounded once, on load and in forward."""
    fields = {"num_classes": 0, "act_layer": "gelu_tanh" if dialect == "google" else "gelu"}
    narrow = make(dtype, **fields)
    wide = make(**fields)
    wide.load_state_dict(narrow.state_dict())
    got, want = (
        load(make(d, img_size=(56, 40), **fields), foreign(m, tmp_path / f"{d}.npz", dialect)).pos_embed
        for m, d in ((narrow, dtype), (wide, torch.float32))
    )
    assert torch.equal(got, want.to(dtype)) and not torch.equal(got.float(), want)
    for name in ("bicubic_offset", "bicubic", "bicubic_antialias"):
        config = ViTConfig(**SMALL, interpolation=name)
        got, want = (vit.tokens.resize_pos_embed(m.pos_embed, config, (7, 5)) for m in (narrow, wide))
        assert torch.equal(got, want.to(dtype))


# Numerics


@pytest.mark.parametrize("dialect", ["google", "hf", "torchvision", "dinov2"])
def test_numerics_of_the_source_reach_every_module(dialect, tmp_path):
    heads = {"num_classes": 0} if dialect == "dinov2" else {}
    path = foreign(make(**heads), tmp_path / "m.npz", dialect)
    model = load(make(norm_eps=1e-3, act_layer="quick_gelu", **heads), path)
    eps, act, interpolation = {
        "google": (1e-6, "gelu_tanh", "bicubic"),
        "hf": (1e-12, "gelu", "bicubic"),
        "torchvision": (1e-6, "gelu", "bicubic"),
        "dinov2": (1e-6, "gelu", "bicubic_offset"),
    }[dialect]
    numerics = {"norm_eps": eps, "act_layer": act, "interpolation": interpolation}
    numerics["act_drop_rate"] = 0.0 if dialect == "hf" else None
    fresh = vit.VisionTransformer(ViTConfig(**SMALL | heads | numerics)).eval()
    assert model.config == fresh.config
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(model(x, None, True), fresh(x, None, True))
    changed = load(model, path, norm_eps=2e-4, act_layer="gelu_tanh", interpolation="bicubic_antialias")
    assert changed.norm.eps == changed.blocks[1].norm2.eps == changed.config.norm_eps == 2e-4
    assert changed.blocks[0].mlp.activation == "gelu_tanh" and changed.config.interpolation == "bicubic_antialias"


HALF, IMAGENET = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MEANS = {  # norm_eps, act_layer, interpolation, act_drop_rate; mean and std: as the libraries' sources say
    "hf": (1e-12, "gelu", "bicubic", 0.0, HALF),
    "hf_memory": (1e-12, "gelu", "bicubic", 0.0, HALF),
    "torchvision": (1e-6, "gelu", "bicubic", None, IMAGENET),
    "torchvision_old": (1e-6, "gelu", "bicubic", None, IMAGENET),
    "google": (1e-6, "gelu_tanh", "bicubic", None, HALF),
    "big_vision": (1e-6, "gelu_tanh", "bicubic", None, HALF),
    "dinov2": (1e-6, "gelu", "bicubic_offset", None, IMAGENET),
}


@pytest.mark.parametrize("dialect", MEANS)
def test_what_a_dialect_means_by_its_weights(dialect, tmp_path):
    fields = {"num_classes": 0, "init_values": 0.1, "no_embed_class": True} if dialect == "dinov2" else {}
    fields |= {"no_embed_class": True} if dialect == "big_vision" else {}
    path = foreign(make(**fields), tmp_path / "model.npz", dialect)
    config = {"norm_eps": 1e-3, "act_layer": "quick_gelu", "interpolation": "bicubic_antialias", "act_drop_rate": 0.3}
    for target in (make(proj_drop_rate=0.5, **fields | config), "vit_tiny_patch16_224"):
        sizes = {} if target != "vit_tiny_patch16_224" else {k: v for k, v in SMALL.items() if k != "num_classes"}
        model = load(target, path, **sizes, dialect=dialect)
        found = tuple(getattr(model.config, name) for name in config)
        cfg = model.pretrained_cfg
        assert (*found, (tuple(cfg["mean"]), tuple(cfg["std"]))) == MEANS[dialect]
        rate = model.config.proj_drop_rate if MEANS[dialect][3] is None else MEANS[dialect][3]
        norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert {(b.mlp.activation, b.mlp.drop_rate) for b in model.blocks} == {(MEANS[dialect][1], rate)}
        assert {norm.eps for norm in norms} == {MEANS[dialect][0]}


def test_timm_numerics(tmp_path):
    """A named variant and CLIP keep theirs, another live model gets the usual ones and a warning."""
    torch.save(make().state_dict(), tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"norm_eps is 1e-06 now.*act_layer is 'gelu' now"):
        model = vit.load_pretrained(make(norm_eps=1e-3, act_layer="quick_gelu"), tmp_path / "m.pt")
    assert (model.config.norm_eps, model.config.act_layer) == (1e-6, "gelu")
    assert model.config.interpolation == "bicubic_antialias"
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    named = vit.load_pretrained("vit_tiny_patch16_224", tmp_path / "m.pt", **sizes, act_layer="quick_gelu")
    assert named.config.act_layer == "quick_gelu"
    clip = {"pre_norm": True, "norm_eps": 1e-5, "act_layer": "quick_gelu"}
    torch.save(make(**clip).state_dict(), tmp_path / "clip.pt")
    model = vit.load_pretrained(make(**clip), tmp_path / "clip.pt")
    assert (model.norm.eps, model.blocks[0].mlp.activation) == (1e-5, "quick_gelu")


def test_numerics_that_a_dialect_cannot_say_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"compute with act_layer='gelu_tanh' \(the model: 'gelu'\)"):
        vit.save_pretrained(make(), tmp_path / "m.npz", "google")


def test_compiled_model_computes_with_the_new_numerics(tmp_path):
    model, path = make(act_layer="quick_gelu"), tmp_path / "w.npz"
    np.savez(path, **FLAX["google"])
    compiled = torch.compile(model, backend="eager")
    compiled(image(model))
    vit.load_pretrained(compiled, path)
    assert torch.equal(compiled(image(model)), model(image(model)))
    want = flax_forward(FLAX["google"], image(model))
    assert (compiled(image(model)) - want).abs().max() < 2e-5 * want.abs().max()


# Head, channels, position embedding


def test_new_head(tmp_path):
    path, want = save(make(), tmp_path / "m.pt"), bits(make())
    model = make(seed=1, num_classes=7)
    head = model.head.weight
    with pytest.warns(UserWarning, match=r"a head of 5 classes, the model num_classes=7"):
        vit.load_pretrained(model, path)
    assert model.head.weight is head and not model.head.weight.any() and not model.head.bias.any()
    assert all(v == want[k] for k, v in bits(model).items() if not k.startswith("head"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = vit.load_pretrained(make(seed=1), path, num_classes=9, **{})
        assert model.config.num_classes == 9 and model.head.weight.shape == (9, 32) and not model.head.weight.any()
        model = vit.load_pretrained(model, path, num_classes=5)
        assert bits(model) == want and model(image(model)).shape == (2, 5)
        model = vit.load_pretrained(model, path, num_classes=0)
        assert model(image(model)).shape == (2, 32)
    with pytest.warns(UserWarning, match=r"no head, the model num_classes=5"):
        vit.load_pretrained(make(), save(model, tmp_path / "n.pt"))


def test_head_with_a_hidden_layer(tmp_path):
    path = save(make(representation_size=24), tmp_path / "m.npz", "google")
    with pytest.raises(vit.CheckpointError, match=r"representation_size=24"):
        vit.load_pretrained(make(), path)
    model = vit.load_pretrained(make(), path, num_classes=3)
    assert not model.head.weight.any() and model.head.weight.shape == (3, 32)
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    named = vit.load_pretrained("vit_tiny_patch16_224", path, num_classes=3, **sizes)
    assert bits(named) == bits(model) and named.config.representation_size is None
    assert vit.load_pretrained("vit_tiny_patch16_224", path, **sizes).config.representation_size == 24


@pytest.mark.parametrize("saved", [0, 32], ids=["no hidden layer", "hidden layer"])
def test_a_new_head_of_a_live_model_goes_with_its_hidden_layer(saved, tmp_path):
    """Afterwards the configuration fits the model: a model made from it loads the state dict."""
    file = foreign(make(num_classes=7, representation_size=saved or None), tmp_path / "model.pt")
    model = load(make(representation_size=32), file, num_classes=3)
    assert model.config.representation_size is None and model.config.num_classes == 3
    vit.VisionTransformer(model.config).load_state_dict(model.state_dict())


def test_a_classifier_of_hugging_face_does_not_read_a_pooler(tmp_path):
    state = torch.load(save(make(), tmp_path / "m.pt", "hf"), weights_only=True)
    state |= {"vit.pooler.dense.weight": torch.ones(32, 32), "vit.pooler.dense.bias": torch.ones(32)}
    torch.save(state, tmp_path / "m.pt")
    assert bits(load(make(seed=1), tmp_path / "m.pt")) == bits(make())
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    assert bits(load("vit_tiny_patch16_224", tmp_path / "m.pt", **sizes)) == bits(make())


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_input_channels(channels, tmp_path):
    model = make()
    path = save(model, tmp_path / "m.pt")
    got = load(make(in_chans=channels), path).patch_embed.proj.weight
    w = model.patch_embed.proj.weight
    for c in range(channels):
        want = w.sum(1) if channels == 1 else w[:, c % 3] * (3 / channels)
        torch.testing.assert_close(got[:, c], want)
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    named = vit.load_pretrained("vit_tiny_patch16_224", path, in_chans=channels, **sizes)
    assert torch.equal(named.patch_embed.proj.weight, got)
    with pytest.raises(ValueError, match=r"cannot be changed in a live model"):
        vit.load_pretrained(make(), path, in_chans=channels)


def test_channels_that_nothing_is_known_of(tmp_path):
    path = save(make(in_chans=4), tmp_path / "m.pt")
    with pytest.raises(vit.CheckpointError, match=r"4 input channels cannot become in_chans=3"):
        vit.load_pretrained(make(), path)


@pytest.mark.parametrize(
    ("dialect", "interpolation"),
    [("timm", "bicubic_antialias"), ("hf", "bicubic"), ("dinov2", "bicubic_offset"), ("torchvision", None)],
)
def test_position_embedding_is_resized(dialect, interpolation, tmp_path):
    fields = {"num_classes": 0} if dialect == "dinov2" else {}
    source = make(**fields)
    model = load(make(img_size=(56, 40), **fields), foreign(source, tmp_path / "m.npz", dialect))
    table = source.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    if interpolation is None:
        want = F.interpolate(table, size=(7, 5), mode="bicubic", align_corners=True)
        want = torch.cat([source.pos_embed[:, :1], want.flatten(2).mT], 1)
    else:
        want = vit.reference.interpolate_pos_embed(source.pos_embed, (4, 4), (7, 5), interpolation)
    torch.testing.assert_close(model.pos_embed, want, rtol=0, atol=1e-5)
    if dialect == "timm":  # our own file states its model's interpolation
        ours = load(make(img_size=(56, 40)), save(source, tmp_path / "m.pt"))
        want = vit.reference.interpolate_pos_embed(source.pos_embed, (4, 4), (7, 5), "bicubic_offset")
        torch.testing.assert_close(ours.pos_embed, want, rtol=0, atol=1e-5)
        assert "mean" not in model.pretrained_cfg
    own = load(make(img_size=(56, 40), **fields), tmp_path / "m.npz", interpolation="bicubic_offset")
    want = vit.reference.interpolate_pos_embed(source.pos_embed, (4, 4), (7, 5), "bicubic_offset")
    torch.testing.assert_close(own.pos_embed, want, rtol=0, atol=1e-5)


def test_rows_of_the_prefix_tokens_move(tmp_path):
    """Only the sum of a token and its row counts, so models with and without rows compute the same."""
    sources = {
        "timm": make(reg_tokens=3),
        "dinov2": make(num_classes=0),
        "google": make(act_layer="gelu_tanh"),
    }
    for dialect, source in sources.items():
        for twin in (False, True):
            fields = {"num_classes": source.config.num_classes, "reg_tokens": source.config.reg_tokens}
            path = save(source, tmp_path / f"{dialect}.npz", dialect)
            model = load(make(no_embed_class=twin, **fields), path)
            torch.testing.assert_close(model(image(model)), source(image(model)), rtol=1e-5, atol=1e-5)


def test_registers_of_dinov2_have_no_rows(tmp_path):
    fields = {"num_classes": 0, "reg_tokens": 3}
    source = make(**fields, no_embed_class=True)
    path = save(source, tmp_path / "m.pt", "dinov2")
    state = torch.load(path, weights_only=True)
    state["pos_embed"][:, 0] = 1.5
    torch.save(state, path)
    with torch.no_grad():
        source.cls_token += 1.5
    for twin in (False, True):
        model = load(make(**fields, no_embed_class=twin), path)
        torch.testing.assert_close(model(image(model)), source(image(model)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"no position embedding for class or register tokens"):
        vit.save_pretrained(make(**fields), tmp_path / "n.pt", "dinov2")


def test_grid_of_a_position_embedding_that_is_not_known(tmp_path):
    path = foreign(make(img_size=(16, 48)), tmp_path / "m.pt")
    with pytest.raises(vit.CheckpointError, match=r"13 rows"):
        vit.load_pretrained(make(), path)


@pytest.mark.parametrize("dialect", ["timm", "hf", "torchvision", "google", "dinov2"])
def test_64_bits_are_resized_and_adapted_in_64(dialect, tmp_path):
    """And a 64-bit model receives them: sums and products are not in fp32."""
    fields = {"num_classes": 0, "act_layer": "gelu_tanh" if dialect == "google" else "gelu"}
    source = make(torch.float64, **fields)
    with torch.no_grad():
        for param in source.parameters():
            param += 1e-9 * torch.arange(param.numel()).reshape(param.shape)
    path = foreign(source, tmp_path / "m.npz", dialect)
    model = load(make(torch.float64, img_size=(56, 40), in_chans=4, **fields), path)
    w = source.patch_embed.proj.weight
    torch.testing.assert_close(model.patch_embed.proj.weight, 0.75 * w[:, [0, 1, 2, 0]], rtol=1e-14, atol=0)
    grey = load(make(torch.float64, in_chans=1, **fields), path).patch_embed.proj.weight
    torch.testing.assert_close(grey, w[:, :1] + w[:, 1:2] + w[:, 2:], rtol=1e-12, atol=1e-15)
    table = source.pos_embed[:, 1:].reshape(1, 4, 4, 32).permute(0, 3, 1, 2)
    if dialect in ("torchvision", "google"):
        mode = "bilinear" if dialect == "google" else "bicubic"
        want = F.interpolate(table, size=(7, 5), mode=mode, align_corners=True).flatten(2).mT
    else:
        how = {"timm": "bicubic_antialias", "hf": "bicubic", "dinov2": "bicubic_offset"}[dialect]
        want = vit.reference.interpolate_pos_embed(source.pos_embed, (4, 4), (7, 5), how)[:, 1:]
    assert model.pos_embed.dtype is torch.float64
    torch.testing.assert_close(model.pos_embed[:, 1:], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("saved", "asked"), [(2, 1), (4, 1), (4, 4), (1, 1), (1, 3), (4, 2), (2, 3), (1, 4)])
def test_channels_of_files_that_have_not_three(saved, asked, tmp_path):
    """Any number can become 1, nothing else, in named and live models."""
    source = make(in_chans=saved)
    path = foreign(source, tmp_path / "m.pt")
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    for target, options in ((make(in_chans=asked), {}), ("vit_tiny_patch16_224", sizes | {"in_chans": asked})):
        if asked not in (1, saved):
            with pytest.raises(
                vit.CheckpointError, match=f"{saved} input channels cannot become in_chans={asked}; only"
            ):
                vit.load_pretrained(target, path, **options)
            continue
        got, w = load(target, path, **options).patch_embed.proj.weight, source.patch_embed.proj.weight
        want = w if asked == saved else torch.stack([w[:, c] for c in range(saved)]).sum(0).unsqueeze(1)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_channels_of_16_bits_are_added_in_32(dtype, tmp_path):
    source = make(dtype)
    path = foreign(source, tmp_path / "m.npz")
    for channels in (1, 4, 7):
        got = load(make(dtype, in_chans=channels), path).patch_embed.proj.weight
        w = source.patch_embed.proj.weight.double()
        want = w.sum(1, True) if channels == 1 else w[:, [c % 3 for c in range(channels)]] * (3 / channels)
        assert (got.double() - want).abs().max() <= torch.finfo(dtype).eps / 2 * 1.001 * want.abs().max()


@pytest.mark.parametrize("patch", [(56, 28), (28, 56)])
def test_usual_grid_of_a_name_where_patches_are_not_square(patch, tmp_path):
    """224 pixels are 4*8 or 8*4 such patches, (height, width); both have the same number of rows."""
    usual = (224 // patch[0], 224 // patch[1])
    fields = COARSE | {"patch_size": patch, "depth": 1}
    source = make(**fields)
    path = foreign(source, tmp_path / "m.npz")
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"} | fields | {"img_size": (3 * patch[0], 2 * patch[1])}
    model = load("vit_tiny_patch16_224", path, **sizes)
    want = vit.reference.interpolate_pos_embed(source.pos_embed, usual, (3, 2), "bicubic_antialias")
    torch.testing.assert_close(model.pos_embed, want, rtol=0, atol=1e-5)
    turned = load("vit_tiny_patch16_224", path, **sizes, grid_size=usual[::-1])
    want = vit.reference.interpolate_pos_embed(source.pos_embed, usual[::-1], (3, 2), "bicubic_antialias")
    torch.testing.assert_close(turned.pos_embed, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("hidden", [0, 24])
@pytest.mark.parametrize("target", ["live", "named"])
@pytest.mark.parametrize("classes", [0, 3, 5])
def test_what_a_head_of_another_size_takes_with_it(classes, target, hidden, tmp_path):
    """A new head removes the hidden layer, the same head keeps it; requested changes do not warn."""
    path = foreign(make(representation_size=hidden or None), tmp_path / "m.pt")
    sizes = {k: v for k, v in SMALL.items() if k != "num_classes"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if target == "live":
            model = vit.load_pretrained(make(seed=1, representation_size=hidden or None), path, num_classes=classes)
        else:
            model = vit.load_pretrained("vit_tiny_patch16_224", path, num_classes=classes, **sizes)
    assert model.config.num_classes == classes
    assert model.config.representation_size == ((hidden or None) if classes == 5 else None)
    want = bits(make(representation_size=hidden or None))
    for name, value in bits(model).items():
        new = name.startswith("head.") and classes != 5
        assert (not any(value)) if new else value == want[name], name
