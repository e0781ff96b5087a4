"""Dropout and stochastic depth of the whole model, with known masks: where each acts, and that its mask repeats."""

import dataclasses

import pytest
import torch
from peers import assert_same, import_transformers, outputs_and_gradients, randomise, timm_twin
from torch.utils.checkpoint import checkpoint

import vit
from vit.kernels import dropout_seed
from vit.kernels.reference import dropout_scale
from vit.layers import DropPath
from vit.reference import Drop
from vit.reference import VisionTransformer as Reference
from vit.weights.dialects import write

SMALL = vit.ViTConfig(img_size=(16, 24), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
RATES = {
    "drop_rate": 0.15,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.25,
    "drop_path_rate": 0.5,
}
SEED = torch.tensor([1234567890123456789])
MODELS = {rate: {rate: value} for rate, value in RATES.items()} | {
    "all": RATES,
    "LayerScale": RATES | {"init_values": 0.3},
    "avg pool": RATES | {"global_pool": "avg"},
    "qk_norm": RATES | {"qk_norm": True},
    "pre-training head": RATES | {"representation_size": 24},
    "pre_norm": RATES | {"pre_norm": True},
    "registers": RATES | {"reg_tokens": 2, "no_embed_class": True},
    "no prefix": RATES | {"class_token": False, "global_pool": "avg"},
}


def known(x, p, offset):
    return x * dropout_scale(SEED.to(x.device), offset, x.shape, p).to(x.dtype)


class Known(torch.nn.Module):
    """Replaces a dropout of timm's model, at the rate that timm gave it."""

    def __init__(self, theirs: torch.nn.Module, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.rate = getattr(theirs, "p", getattr(theirs, "drop_prob", 0.0))

    def forward(self, x):
        return known(x, self.rate, self.offset) if self.rate else x


class KnownPath(Known):
    def forward(self, x):
        return x * super().forward(x.new_ones(len(x), 1))[:, :, None]


def reference(config: vit.ViTConfig, device="cpu") -> Reference:
    model = Reference(config).to(device)
    randomise(model)
    for module in model.modules():
        if isinstance(module, Drop):
            module.function = known
    return model


@pytest.mark.peers
@pytest.mark.parametrize("options", [o for o in MODELS if o != "pre-training head"])
def test_reference_drops_where_timm_does(options):
    config = dataclasses.replace(SMALL, **MODELS[options])
    ours, theirs = reference(config).double(), timm_twin(config).double()
    theirs.load_state_dict(ours.state_dict())
    theirs.pos_drop, theirs.head_drop = Known(theirs.pos_drop, 6), Known(theirs.head_drop, 7)
    for i, block in enumerate(theirs.blocks):
        block.attn.attn_drop = Known(block.attn.attn_drop, 8 * i)
        block.attn.proj_drop = Known(block.attn.proj_drop, 8 * i + 1)
        block.mlp.drop1, block.mlp.drop2 = Known(block.mlp.drop1, 8 * i + 2), Known(block.mlp.drop2, 8 * i + 3)
        block.drop_path1 = KnownPath(block.drop_path1, 8 * i + 4)
        block.drop_path2 = KnownPath(block.drop_path2, 8 * i + 5)
    image = torch.randn(8, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_same(*(outputs_and_gradients(m, m, image) for m in (ours, theirs)), 1e-6)  # timm's linspace is fp32


class KnownInTurn(torch.nn.Module):
    """Replaces a dropout that a layer calls in two places."""

    def __init__(self, p: float, offsets: tuple[int, int]) -> None:
        super().__init__()
        self.p, self.offsets = p, offsets

    def forward(self, x):
        offset, *_ = self.offsets
        self.offsets = self.offsets[::-1]
        return known(x, self.p, offset)


@pytest.mark.peers
def test_reference_drops_where_transformers_does():
    """Unlike timm, not after the activation, as the configuration says."""
    transformers = import_transformers()
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    described = transformers.ViTConfig(image_size=(16, 24), patch_size=8, hidden_dropout_prob=0.3, **sizes)
    config = vit.ViTConfig.from_hf(described)
    assert config.hidden_drop_rate == 0.0 and config.proj_drop_rate == config.pos_drop_rate == 0.3
    ours, theirs = reference(config).double(), transformers.ViTForImageClassification(described).double().train()
    theirs.load_state_dict(write("hf_memory", ours.state_dict(), config.depth, config.num_heads))
    theirs.vit.embeddings.dropout = KnownInTurn(theirs.vit.embeddings.dropout.p, (6, 6))
    for i, layer in enumerate(theirs.vit.layers):
        layer.dropout = KnownInTurn(layer.dropout.p, (8 * i + 1, 8 * i + 3))
    image = torch.randn(8, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = outputs_and_gradients(ours, ours, image)
    want = outputs_and_gradients(theirs, lambda x: theirs(x).logits, image)
    for name in ("output", "image"):
        torch.testing.assert_close(found[name], want[name], rtol=1e-6, atol=1e-8)
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    assert vit.ViTConfig.from_hf(rates).attn_drop_rate == 0.2
    assert_like_reference(vit.ViTConfig.from_hf(described, num_classes=7, img_size=(16, 24)), "cpu")


def assert_like_reference(config, device):
    theirs = reference(config, device)
    ours = vit.VisionTransformer(config).to(device)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(6, 3, 16, 24, generator=torch.Generator().manual_seed(1)).to(device)
    found = outputs_and_gradients(ours, lambda x: ours(x, dropout_seed=SEED.to(device)), image)
    assert_same(found, outputs_and_gradients(theirs, theirs, image), 2e-5)
    with torch.no_grad():
        plain = theirs.eval()(image)
        assert (found["output"] - plain).abs().max() > 0.05 * plain.abs().max()
        assert_same({"eval": ours.eval()(image)}, {"eval": plain}, 2e-5)


@pytest.mark.parametrize("options", MODELS)
def test_fast_model_drops_where_the_reference_does(options):
    assert_like_reference(dataclasses.replace(SMALL, **MODELS[options]), "cpu")


CI = pytest.mark.ci


@pytest.mark.parametrize("options", ["all", pytest.param("avg pool", marks=CI), pytest.param("qk_norm", marks=CI)])
def test_kernels_drop_where_the_reference_does(options, device):
    assert_like_reference(dataclasses.replace(SMALL, depth=2, impl="triton", **MODELS[options]), device)


@pytest.mark.peers
def test_stochastic_depth_is_linear_in_the_block():
    config = dataclasses.replace(SMALL, drop_path_rate=0.3)
    theirs = [getattr(b.drop_path1, "drop_prob", 0.0) for b in timm_twin(config).blocks]
    assert theirs == pytest.approx([0.0, 0.15, 0.3])
    for path in ("drop_path1", "drop_path2"):
        assert [getattr(b, path).p for b in vit.VisionTransformer(config).blocks] == pytest.approx(theirs)
        assert [getattr(b, path).rate for b in Reference(config).blocks] == pytest.approx(theirs)
    assert vit.VisionTransformer(dataclasses.replace(config, depth=1)).blocks[0].drop_path1.p == 0.0


@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference], ids=["fast", "reference"])
def test_evaluation_and_rate_0_draw_nothing(cls):
    image = torch.randn(2, 3, 16, 24)
    dropping, plain = cls(dataclasses.replace(SMALL, patch_drop_rate=0.5, **RATES), 0).eval(), cls(SMALL, 0)
    state = torch.get_rng_state()
    assert_same({"eval": dropping(image)}, {"eval": plain(image)}, 1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    first, again = (dropping.train()(image) for _ in range(2))
    assert not torch.equal(first, again) and not torch.equal(torch.get_rng_state(), state)


def test_one_seed_for_a_forward(monkeypatch):
    drawn = []
    monkeypatch.setattr(vit.kernels, "dropout_seed", lambda x: drawn.append(dropout_seed(x)) or drawn[-1])
    model, image = vit.VisionTransformer(dataclasses.replace(SMALL, **RATES), 0), torch.randn(2, 3, 16, 24)
    out = model(image)
    assert len(drawn) == 1
    assert torch.equal(model(image, dropout_seed=drawn[0]), out) and len(drawn) == 1
    features = model.forward_features(image, dropout_seed=drawn[0])
    assert torch.equal(model.forward_head(features, dropout_seed=drawn[0]), out) and len(drawn) == 1


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=CI)])
def test_checkpointing_and_compilation_drop_the_same(impl, device):
    config = dataclasses.replace(SMALL, depth=2, impl=impl, patch_drop_rate=0.3, **RATES)
    model = vit.VisionTransformer(config, 0).to(device if impl == "triton" else "cpu")
    randomise(model)
    image = torch.randn(2, 3, 16, 24).to(model.pos_embed.device)

    def run(f):
        torch.manual_seed(0)
        return outputs_and_gradients(model, f, image)

    direct = run(model)
    found = {"whole model": run(lambda x: checkpoint(model, x, use_reentrant=False))}
    if impl == "triton":  # the reference's many small integer ops take a minute to trace
        found["compiled"] = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    model.set_grad_checkpointing()
    found["blocks"] = run(model)
    for way, other in found.items():
        assert all(torch.equal(direct[k], other[k]) for k in direct), way


def test_every_way_through_the_model_drops_alike():
    """One seed per call, from PyTorch's generator: features, intermediates and maps equal the forward's."""
    config = dataclasses.replace(SMALL, **RATES)
    model = vit.VisionTransformer(config).train()
    randomise(model)
    image = torch.randn(3, 3, 16, 24)

    def drawn(call):
        torch.manual_seed(5)
        return call(model)

    logits = drawn(lambda m: m(image))
    assert not torch.equal(logits, model(image))
    assert torch.equal(drawn(lambda m: m.attention_maps(image)[0]), logits)
    features = drawn(lambda m: m.forward_features(image))
    for call in (
        lambda m: m.forward_intermediates(image, [0], output_fmt="NLC")[0],
        lambda m: m.forward_intermediates(image, [1], return_prefix_tokens=False, norm=True, output_fmt="NLC")[0],
    ):
        assert torch.equal(drawn(call), features)
    tokens = drawn(lambda m: m.forward_intermediates(image, 1, norm=True, output_fmt="NLC", intermediates_only=True))[0]
    torch.testing.assert_close(tokens, features[:, config.num_prefix_tokens :])
    seed = torch.tensor([9])
    whole = model(image, dropout_seed=seed)
    parts = model.forward_head(model.forward_features(image, dropout_seed=seed), dropout_seed=seed)
    assert torch.equal(whole, parts)


PARTS = ["blocks.1.attn", "blocks.1.mlp", "blocks.1.drop_path1", "blocks.2.drop_path2", "blocks.1", "blocks"]


@pytest.mark.parametrize("watched", [None, "blocks.1", "blocks"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_trains_alone_is_recomputed_with_its_own_mask(part, watched):
    """The model is in evaluation, so there is no seed: the part draws one, and recomputation draws the same."""
    model = vit.VisionTransformer(dataclasses.replace(SMALL, **RATES), 0).eval()
    randomise(model)
    model.get_submodule(part).train()
    if watched:
        model.get_submodule(watched).register_forward_hook(lambda *_: None)
    image = torch.randn(8, 3, 16, 24, generator=torch.Generator().manual_seed(1))

    def run():
        torch.manual_seed(0)
        return outputs_and_gradients(model, model, image)

    direct = run()
    assert not torch.equal(direct["output"], model(image))
    model.set_grad_checkpointing()
    again = run()
    assert all(torch.equal(direct[k], again[k]) for k in direct)


class Foreign(torch.nn.Module):
    """A block of another library, with PyTorch's dropout."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop = torch.nn.Linear(32, 32), torch.nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.fc(x).relu())


@pytest.mark.parametrize("part", ["blocks.0", "blocks.0.attn", "blocks.1.mlp.fc2", "blocks.1.norm2", "blocks"])
def test_a_hook_that_draws_draws_the_same_when_recomputed(part):
    model = vit.VisionTransformer(SMALL, 0).eval()
    randomise(model)
    model.get_submodule(part).register_forward_hook(lambda module, args, out: torch.dropout(out, 0.5, True))
    image = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))

    def run():
        torch.manual_seed(0)
        return outputs_and_gradients(model, model, image)

    direct = run()
    assert not torch.equal(direct["output"], model(image))
    model.set_grad_checkpointing()
    again = run()
    assert all(torch.equal(direct[k], again[k]) for k in direct)


@pytest.mark.parametrize("rates", [{}, RATES], ids=["", "drops"])
def test_a_foreign_block_is_recomputed_with_its_own_mask(rates):
    model = vit.VisionTransformer(dataclasses.replace(SMALL, **rates), 0)
    model.blocks[1] = Foreign()
    randomise(model)
    image = torch.randn(4, 3, 16, 24)

    def run():
        torch.manual_seed(0)
        return outputs_and_gradients(model, model, image)

    direct = run()
    model.set_grad_checkpointing()
    again = run()
    assert all(torch.equal(direct[k], again[k]) for k in direct)


@pytest.mark.parametrize("watched", [None, "blocks", "blocks.0", "foreign"])
def test_checkpointing_saves_memory_in_every_block(watched):
    """Backward recomputes each block, whether blocks, or the row of them, are called or chained."""
    config = vit.ViTConfig(img_size=(64, 32), patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    model = vit.VisionTransformer(config, 0)
    if watched == "foreign":
        model.blocks[0] = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()),) * 9)
        model.blocks[1] = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()),) * 9)
    elif watched:
        model.get_submodule(watched).register_forward_hook(lambda *_: None)
    image, saved = torch.randn(3, 3, 64, 32), []

    def kept() -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            model(image)
        return sum(saved)

    stream = 3 * 33 * 32  # each block keeps its input and at most a few tensors of this size
    without = kept()
    model.set_grad_checkpointing()
    assert kept() < 10 * stream < without
    model.set_grad_checkpointing(False)
    assert kept() == without


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (9, 3, 4), (9, 2, 3, 4)], ids=str)
def test_stochastic_depth_scales_whole_samples(shape, dtype):
    x = torch.randn(shape).to(dtype)
    path = DropPath(SMALL, 0.3, 12).train()
    scale = dropout_scale(SEED, 12, torch.Size([9, 1]), 0.3)[:, 0]  # fp64
    assert 0 < scale.count_nonzero() < 9
    out = path(x, SEED)
    want = torch.stack([sample * factor.to(dtype) for sample, factor in zip(x, scale, strict=True)])
    assert out.dtype is dtype and torch.equal(out, want)
    wide = torch.promote_types(dtype, torch.float32)
    assert path.scale(x, SEED).dtype is wide
    torch.testing.assert_close(path.scale(x, SEED).double(), (scale > 0).double() / 0.7, rtol=1e-7, atol=0)
    assert DropPath(SMALL, 0.0, 12).train()(x, SEED) is x and path.eval()(x, SEED) is x
    assert path.scale(x, SEED) is None


GROUPED = {
    "": {},
    "pooled": {"global_pool": "avg", "pre_norm": True, "init_values": 0.1},
    "pre-training": {"representation_size": 8, "reg_tokens": 2, "use_mask_token": True, "qk_norm": True},
    "no head": {"num_classes": 0, "reg_tokens": 1, "class_token": False, "global_pool": ""},
}


@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference], ids=["fast", "reference"])
@pytest.mark.parametrize("options", GROUPED)
def test_parameter_groups_by_hand(options, cls):
    """More than ten blocks, all defaults, and every parameter once, in the order of the model."""
    config = vit.ViTConfig(
        img_size=(16, 8), patch_size=8, embed_dim=16, depth=12, num_heads=1, **{"num_classes": 3} | GROUPED[options]
    )
    model = cls(config, 0)
    stem = ("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre")

    def want(name, param):
        first, *rest = name.split(".")
        layer = 0 if first in stem else int(rest[0]) + 1 if first == "blocks" else 12 if first == "norm" else 13
        top = 12 if options == "no head" else 13
        plain = param.ndim == 1 or name in ("cls_token", "reg_token", "mask_token", "pos_embed")
        return round(0.75 ** (top - layer), 12), 0.0 if plain else 0.05

    groups = vit.param_groups_layer_decay(model)
    found = [(id(p), (round(g["lr_scale"], 12), g["weight_decay"])) for g in groups for p in g["params"]]
    wanted = {id(p): want(name, p) for name, p in model.named_parameters()}
    assert len(found) == len(wanted) and dict(found) == wanted
    assert len({(g["lr_scale"], g["weight_decay"]) for g in groups}) == len(groups)
    place = {id(p): i for i, p in enumerate(model.parameters())}
    for group in groups:
        assert [place[id(p)] for p in group["params"]] == sorted(place[id(p)] for p in group["params"])
    assert [place[id(g["params"][0])] for g in groups] == sorted(place[id(g["params"][0])] for g in groups)


@pytest.mark.parametrize("decay", [0, 0.0, -0.5, 1.0001, 2, float("nan"), float("inf")])
def test_layer_decay_outside_its_range(decay):
    model = vit.VisionTransformer(SMALL, 0)
    with pytest.raises(ValueError, match=f"layer_decay={decay} must be above 0 and at most 1"):
        vit.param_groups_layer_decay(model, layer_decay=decay)
    for taken in (1, 1.0, 1e-6):
        vit.param_groups_layer_decay(model, layer_decay=taken)


@pytest.mark.parametrize("rates", [{}, RATES], ids=["", "rates"])
def test_a_wrapped_layer_that_drops_out_is_recomputed_with_its_own_mask(rates):
    """Like LoRA's dropout: PyTorch's generator is restored, whether or not the model has a seed."""

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.drop = inner, torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(self.inner(x))

    model = vit.VisionTransformer(dataclasses.replace(SMALL, **rates)).train()
    randomise(model)
    model.blocks[1].attn.qkv, model.blocks[2].mlp.fc2 = map(
        Wrapped, (model.blocks[1].attn.qkv, model.blocks[2].mlp.fc2)
    )
    image = torch.randn(3, 3, 16, 24)

    def run(recompute):
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(6)
        return torch.autograd.grad(model(image).square().sum(), list(model.parameters()))

    assert all(map(torch.equal, run(True), run(False)))


@pytest.mark.parametrize("rates", [{}, RATES], ids=["", "rates"])
def test_plain_blocks_are_recomputed_without_reading_the_generator(rates, monkeypatch):
    """A CUDA graph does not allow that."""
    model = vit.VisionTransformer(dataclasses.replace(SMALL, **rates)).train()
    model.set_grad_checkpointing()
    seed = SEED if rates else None
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the generator was read"))
    model(torch.randn(3, 3, 16, 24), dropout_seed=seed).sum().backward()
