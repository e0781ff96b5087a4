"""The model under PyTorch's own tools and in code that was written for timm's models."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peers import assert_same, import_timm, outputs_and_gradients, randomise
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import vit

FIELDS = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
DROPS = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.2, "drop_path_rate": 0.3, "drop_rate": 0.2}


def make(**fields):
    model = vit.VisionTransformer(vit.ViTConfig(**FIELDS | fields), seed=0)
    randomise(model)
    return model, torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))


# ---- under PyTorch's tools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields", [{}, {"init_values": 0.5, "reg_tokens": 2, "qk_norm": True, "pre_norm": True}], ids=str
)
def test_a_hook_on_every_module_sees_every_module(fields):
    """Hooks as torchinfo and captum set them."""
    model, image = make(**fields)
    want, seen = model(image), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, out.shape)))
    torch.testing.assert_close(model(image), want)
    assert {name for name, _ in seen} == {name for name, _ in model.named_modules()} and len(seen) == len(set(seen))
    shapes = dict(seen)
    assert shapes["patch_embed.proj"] == (2, 48, 3, 2) and shapes["patch_embed"] == (2, model.config.num_tokens, 48)
    assert {shapes[f"blocks.{i}"] for i in range(3)} == {shapes["blocks"]} == {(2, model.config.num_tokens, 48)}


def test_tools_that_watch_modules():
    model, image = make()

    def run():  # ModuleTracker fails with torch.autograd.grad
        model.zero_grad()
        out = model(image)
        out.square().sum().backward()
        return {"output": out} | {name: param.grad for name, param in model.named_parameters()}

    want = run()
    tracker = ModuleTracker()
    inside = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: inside.append(set(tracker.parents)))
    for tool in (tracker, FlopCounterMode(display=False)):
        with tool:
            found = run()
        assert_same(found, want, 2e-5)
    assert any(name.endswith("blocks.1.attn") for name in inside[0])


def test_explain_names_a_global_hook():
    model, image = make()
    assert "called" not in {row.path for row in vit.explain(model, image)}

    def watch(module, args, out):
        return None

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        rows = vit.explain(model, image)
    finally:
        handle.remove()
    assert rows[-1].path == "called" and "watch" in rows[-1].reason and "watch" in str(rows)
    assert {row.path for row in vit.explain(model, image)} == {"pytorch"}


@pytest.mark.parametrize("fields", [{}, {"use_mask_token": True, "reg_tokens": 1, "no_embed_class": True}], ids=str)
def test_a_watched_patch_projection(fields):
    """Mask token, prefix tokens and position embedding are applied, also if the projection is called."""
    model, image = make(**fields)
    mask = {"bool_masked_pos": torch.tensor([[True, False, False] * 2] * 2)} if "use_mask_token" in fields else {}
    want = outputs_and_gradients(model, lambda x: model(x, **mask), image)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    assert_same(outputs_and_gradients(model, lambda x: model(x, **mask), image), want, 2e-5)
    if mask:  # hidden pixels do not count
        image[:, :, :8, :8] = torch.nan
        loss = model(image[1:], mask["bool_masked_pos"][1:]).sum()
        assert torch.autograd.grad(loss, model.patch_embed.proj.weight)[0].isfinite().all()


# ---- timm's protocol -------------------------------------------------------------------------------------------------


def by_hand(model, image):
    """As written in MAE, DINO and prompt tuning."""
    x = model.patch_embed(image)
    x = x + model.pos_embed[:, 1:, :]
    cls = model.cls_token + model.pos_embed[:, :1, :]
    x = model.pos_drop(torch.cat((cls.expand(x.shape[0], -1, -1), x), dim=1))
    for block in model.blocks:
        x = block(x)
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_parts_are_called_as_timms(impl, device):
    model, image = make(impl=impl, init_values=0.5)
    if impl == "triton":
        model, image = model.to(device), image.to(device)
    assert_same(
        outputs_and_gradients(model, lambda x: by_hand(model, x), image),
        outputs_and_gradients(model, model, image),
        2e-5,
    )
    x = torch.randn(2, 7, 48).to(image)
    one_by_one = model.blocks[2](model.blocks[1](model.blocks[0](x)))
    torch.testing.assert_close(model.blocks(x), one_by_one, rtol=1e-4, atol=1e-5)
    assert model.patch_embed(image).shape == (2, model.patch_embed.num_patches, 48)


def test_parts_that_are_called_alone_drop_out():
    """In training without a seed, each draws its own from PyTorch's generator. In evaluation nothing drops."""
    model, image = make(**DROPS)

    def run():
        torch.manual_seed(4)
        return by_hand(model, image), by_hand(model, image)

    first, second = run()
    assert not torch.equal(first, second) and all(map(torch.equal, (first, second), run()))
    model.eval()
    assert torch.equal(*run())
    torch.testing.assert_close(run()[0], model(image))
    image = image.repeat(8, 1, 1, 1)
    # A part in training drops out even in a model in evaluation, as in PyTorch.
    for part in (
        model.pos_drop,
        model.blocks[2].mlp,
        model.blocks[1].attn,
        model.blocks[2].drop_path1,
        model.head_drop,
    ):
        part.train()
        torch.manual_seed(4)
        assert not torch.equal(model(image), model(image)), type(part)
        part.eval()


@pytest.mark.parametrize("watched", ["blocks", "blocks.1"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_watched_row_drops_the_same(watched, recompute):
    """A hook on a block, or on the row of them, changes neither the masks nor the gradients of a seed."""
    model, image = make(**DROPS)
    model.set_grad_checkpointing(recompute)
    seed = torch.tensor([11])
    want = outputs_and_gradients(model, lambda x: model(x, dropout_seed=seed), image)
    calls = []
    model.get_submodule(watched).register_forward_hook(lambda *_: calls.append(1))
    found = outputs_and_gradients(model, lambda x: model(x, dropout_seed=seed), image)
    assert_same(found, want, 2e-5)
    assert calls


def test_a_block_of_somebody_else():
    """Any module from tokens to tokens can replace a block or a part of a block, also in training."""

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model, image = make()
    reference = vit.reference.VisionTransformer(model.config)
    reference.load_state_dict(model.state_dict())
    for one in (model, reference):
        one.blocks[1] = Twice(one.blocks[1])
        one.blocks[2].attn = Twice(one.blocks[2].attn)
        one.blocks[0].mlp = nn.Sequential(nn.Linear(48, 7), nn.Tanh(), nn.Linear(7, 48))
    reference.blocks[0].mlp.load_state_dict(model.blocks[0].mlp.state_dict())
    assert_same(outputs_and_gradients(model, model, image), outputs_and_gradients(reference, reference, image), 2e-5)
    model, image = make(**DROPS)
    model.blocks[1] = Twice(model.blocks[1])
    assert model(image).isfinite().all()


ATTRIBUTES = [
    "num_features", "embed_dim", "head_hidden_size", "num_classes", "num_prefix_tokens", "global_pool", "feature_info",
    "patch_embed.num_patches", "patch_embed.grid_size", "patch_embed.img_size", "patch_embed.patch_size",
]  # fmt: skip


@pytest.mark.peers
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"global_pool": "avg", "class_token": False, "patch_size": (8, 4)},
        {"reg_tokens": 3, "num_classes": 0, "patch_size": (4, 8)},
    ],
)
def test_attributes_are_timms(change):
    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    ours, theirs = make(**change)[0], VisionTransformer(**FIELDS | change)
    for name in ATTRIBUTES:
        owner, _, leaf = name.rpartition(".")
        found, want = (getattr(model.get_submodule(owner), leaf) for model in (ours, theirs))
        assert found == want, name


@pytest.mark.peers
def test_timm_prepares_images_for_the_model():
    import_timm()
    from timm.data import resolve_model_data_config

    model, _ = make(in_chans=1, img_size=32)
    want = {"input_size": (1, 32, 32), "interpolation": "bicubic"}
    assert want.items() <= resolve_model_data_config(model).items()
    model.pretrained_cfg = {"source": "timm", "mean": (0.1,), "std": (0.2,)}
    assert want | {"mean": (0.1,), "std": (0.2,)} == {
        key: value for key, value in resolve_model_data_config(model).items() if not key.startswith("crop")
    }
    assert model.default_cfg == model.pretrained_cfg and model.default_cfg["source"] == "timm"
    model.reset_classifier(7)
    assert model.pretrained_cfg["num_classes"] == model.num_classes == 7
    assert copy.deepcopy(model).pretrained_cfg == model.pretrained_cfg


def test_what_the_model_says_of_its_images_and_its_head():
    model, _ = make(in_chans=2, img_size=(24, 16), representation_size=20)
    said = {
        "input_size": (2, 24, 16),
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "num_classes": 5,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    assert model.pretrained_cfg == said
    assert (model.head_hidden_size, model.num_features, model.embed_dim) == (20, 48, 48)
    assert make(dynamic_img_size=True)[0].pretrained_cfg["fixed_input_size"] is False
    # Fields of the configuration cannot be set here, and each new description replaces the last one.
    own = {"source": "timm", "std": (0.2,), "label_names": ["a"]}
    model.pretrained_cfg = {"source": "hf", "mean": (0.1,)}
    model.pretrained_cfg = own | {"num_classes": 1000, "input_size": (3, 7, 7), "classifier": "fc", "first_conv": "x"}
    assert model.pretrained_cfg == said | own
    model.pretrained_cfg["source"] = model.pretrained_cfg["mean"] = "another"
    assert model.pretrained_cfg == said | own == pickle.loads(pickle.dumps(model)).pretrained_cfg
    assert own == {"source": "timm", "std": (0.2,), "label_names": ["a"]}


def test_what_the_model_says_to_optimisers_is_a_copy():
    model, _ = make()
    tokens = {"cls_token", "reg_token", "mask_token", "pos_embed"}
    assert model.no_weight_decay() == tokens
    model.no_weight_decay().clear()
    matcher = model.group_matcher()
    assert list(matcher) == ["stem", "blocks"] and model.group_matcher(coarse=True) == matcher
    model.group_matcher().clear()
    assert model.no_weight_decay() == make()[0].no_weight_decay() == tokens
    assert model.group_matcher() == make()[0].group_matcher() == matcher


@pytest.mark.parametrize("dynamic", [False, True], ids=["asked for", "dynamic_img_size"])
@pytest.mark.parametrize("fields", [{}, {"reg_tokens": 2, "no_embed_class": True, "patch_size": (8, 4)}], ids=str)
def test_every_way_through_the_model_takes_another_size(fields, dynamic):
    """Compared with hooks in the reference: streams as maps on the image's grid, attention, logits."""
    model, _ = make(dynamic_img_size=dynamic, **fields)
    config, image = model.config, torch.randn(2, 3, 16, 40)
    options = {} if dynamic else {"interpolate_pos_encoding": True}
    reference = vit.reference.VisionTransformer(config)
    reference.load_state_dict(model.state_dict())
    streams, qkvs = [], []
    for block in reference.blocks:
        block.register_forward_hook(lambda module, args, out: streams.append(out))
        block.attn.qkv.register_forward_hook(lambda module, args, out: qkvs.append(out))
    logits = reference(image, **options)
    features = reference.norm(streams[2])
    prefix, grid = config.num_prefix_tokens, (2, 40 // config.patch_size[1])
    maps = [x[:, prefix:].mT.reshape(2, 48, *grid) for x in streams]

    same = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(model(image, **options), logits, **same)
    torch.testing.assert_close(model.forward_features(image, **options), features, **same)
    found, kept = model.forward_intermediates(image, **options)
    torch.testing.assert_close([found, *kept], [features, *maps], **same)
    assert all(t.is_contiguous() for t in kept)
    found, probs = model.attention_maps(image, **options)
    torch.testing.assert_close(found, logits, **same)
    for i, qkv in enumerate(qkvs):
        q, k, _ = qkv.reshape(2, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(probs[i], (q @ k.mT / 4).softmax(-1), **same)
    if dynamic:
        torch.testing.assert_close(model.get_intermediate_layers(image, 2, reshape=True), maps[1:], **same)

    refused = {"interpolate_pos_encoding": False} if dynamic else {}
    for call in (model, model.forward_features, model.forward_intermediates, model.attention_maps):
        with pytest.raises(ValueError, match=r"\(16\*40\) doesn't match model \(24\*16\)"):
            call(image, **refused)


@pytest.mark.parametrize("size", [(24, 16), (16, 40)])
@pytest.mark.parametrize("patch", [(8, 4), (4, 8)])
def test_a_watched_projection_hides_rectangular_patches(patch, size):
    """NaN in hidden pixels reaches neither the output nor a gradient; the grid is the image's."""
    model, _ = make(patch_size=patch, use_mask_token=True)
    grid = size[0] // patch[0], size[1] // patch[1]
    image = torch.randn(2, 3, *size)
    mask = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(2)) < 0.5
    pixels = torch.from_numpy(np.kron(mask.reshape(2, *grid).numpy(), np.ones(patch))).bool()
    reference = vit.reference.VisionTransformer(model.config)
    reference.load_state_dict(model.state_dict())
    want = outputs_and_gradients(reference, lambda x: reference(x, mask, True), image)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    nan = image.masked_fill(pixels[:, None], torch.nan)
    found = outputs_and_gradients(model, lambda x: model(x, mask, True), nan)
    assert_same(found, want, 2e-5)
    hidden = pixels[:, None].expand_as(image)
    assert not found["image"][hidden].any() and found["image"][~hidden].any()


IMPLS = {
    "plain": ({}, []),
    "options": ({"qk_norm": True, "pre_norm": True, "representation_size": 20, "init_values": 0.5}, []),
    "pooled": ({"global_pool": "avg", "reg_tokens": 2}, []),
    "dropout": (DROPS, []),
    "dropout, called": (DROPS | {"init_values": 0.5}, ["blocks.0.mlp.fc1", "blocks.1.norm2", "blocks.2.attn.qkv"]),
    "one part called": ({}, ["blocks.1.mlp.fc2", "blocks.0.attn.proj", "blocks.2"]),
    "the row called": ({"qk_norm": True}, ["blocks", "norm"]),
}


@pytest.mark.parametrize("case", IMPLS)
def test_impl_reaches_every_op(case):
    """No op chooses its own path."""
    fields, watched = IMPLS[case]
    model, image = make(**fields, impl="reference")
    for name in watched:
        model.get_submodule(name).register_forward_hook(lambda *_: None)
    rows = vit.explain(model, image)
    assert {row.reason for row in rows} == {"asked for with impl='reference'"}, str(rows)
    ops = {"patch_embed", "layer_norm", "residual_layer_norm", "linear", "mlp"}
    ops.add("attention" if "qk_norm" in fields else "attention_qkvpacked")
    ops |= {"attention"} if case == "plain" else set()  # of the class token alone
    assert {row.op for row in rows} == ops | ({"dropout"} if "drop" in case else set())
    assert {row.reason for row in vit.explain(make(**fields)[0], image)} == {
        "auto: a cpu tensor runs PyTorch's operators"
    }


def test_impl_reaches_every_op_of_a_masked_image_model():
    config = vit.ViTConfig(**FIELDS, impl="reference")
    image, mask = torch.randn(2, 3, 24, 16), torch.rand(2, 6) < 0.5
    rows = vit.explain(vit.MaskedImageModel(config, seed=0), image, mask)
    assert {row.reason for row in rows} == {"asked for with impl='reference'"}, str(rows)
    assert sum(row.calls for row in rows if row.op == "linear") == 2 * 3 + 1  # qkv and proj of three blocks, decoder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_of_a_models_results(dtype):
    model, image = make(qk_norm=True, init_values=0.5, representation_size=20, **DROPS)
    model.to(dtype)
    for training in (True, False):
        model.train(training)
        logits, maps = model.attention_maps(image.to(dtype), [1])
        features, kept = model.forward_intermediates(image.to(dtype), norm=True)
        assert {t.dtype for t in (logits, features, *kept, model(image.to(dtype)))} == {dtype}
        assert maps[1].dtype is torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(maps[1].double().sum(-1), torch.ones(2, 3, 7, dtype=torch.float64))


def test_a_new_head_is_like_the_model():
    """Zero, trainable, with the model's dtype, mode and device; the old head goes, nothing else changes."""
    for training in (True, False):
        model, image = make(representation_size=20)
        model.to(torch.float64).train(training)
        model.blocks[1].train(not training)
        modes = {name: module.training for name, module in model.named_modules() if name.startswith("blocks")}
        body = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith(("head", "pre_logits"))}
        model.reset_classifier(7)
        assert model.head.training is training and model.head.weight.dtype is torch.float64
        assert model.head.weight.shape == (7, 48) and all(p.requires_grad for p in model.head.parameters())
        assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
        assert torch.equal(model(image.double()), torch.zeros(2, 7, dtype=torch.float64))
        assert model.state_dict().keys() == body.keys() | {"head.weight", "head.bias"}
        assert all(torch.equal(model.state_dict()[k], v) for k, v in body.items())
        assert (model.config.num_classes, model.config.representation_size) == (7, None)
    meta = vit.VisionTransformer(model.config, device="meta")
    meta.reset_classifier(3)
    assert meta.head.weight.is_meta and meta.head.weight.shape == (3, 48)


@pytest.mark.parametrize("fc_norm", [None, False, True])
@pytest.mark.parametrize("change", ["token to avg", "avg to token", "token to ", "avg to ", "avg to None"])
def test_a_new_head_pools_as_asked_and_moves_no_norm(change, fc_norm):
    old, new = (None if word == "None" else word for word in change.split(" to "))
    model, image = make(global_pool=old, fc_norm=fc_norm)
    norms = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("norm.", "fc_norm."))}
    features = model.forward_features(image)
    model.reset_classifier(4, new)
    assert model.global_pool == model.config.global_pool == (old if new is None else new)
    assert {k for k in model.state_dict() if k.startswith(("norm.", "fc_norm."))} == norms.keys()
    assert vit.VisionTransformer(model.config).state_dict().keys() == model.state_dict().keys()
    pooled = {"token": features[:, 0], "avg": features[:, 1:].mean(1), "": features}[model.global_pool]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), model.fc_norm(pooled))
    assert model(image).shape == ((2, 7, 4) if new == "" else (2, 4))


def test_attention_pooling_is_removed_but_not_added():
    model, image = make(global_pool="map")
    features, pool = model.forward_features(image), model.attn_pool
    model.reset_classifier(4)
    assert model.attn_pool is pool and torch.equal(model.forward_head(features, True), pool(features[:, 1:]))
    model.reset_classifier(4, "avg")
    assert (
        model.attn_pool is None and vit.VisionTransformer(model.config).state_dict().keys() == model.state_dict().keys()
    )
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 1:].mean(1))
    with pytest.raises(ValueError, match=r'global_pool="map" has weights, which the model does not have'):
        model.reset_classifier(4, "map")
    assert model.global_pool == "avg"


@pytest.mark.parametrize("indices", [[0, 3], [0, -4], [1, 0, 7], 0, 4, -1])
def test_pruning_that_is_refused_changes_nothing(indices):
    model, image = make()
    want, config = model(image), model.config
    with pytest.raises(ValueError, match=r"out of range|cannot be taken"):
        model.prune_intermediate_layers(indices)
    assert model.config == config and torch.equal(model(image), want)


@pytest.mark.parametrize(
    ("indices", "want"), [(2, [1, 2]), (1, [2]), ([0], [0]), ([1, 0], [0, 1]), ([-2], [1]), (None, [0, 1, 2])], ids=str
)
@pytest.mark.parametrize("norm", [False, True])
def test_a_pruned_model_gives_the_same_intermediates(norm, indices, want):
    model, image = make(reg_tokens=1)
    words = {"output_fmt": "NLC", "intermediates_only": True, "norm": norm}
    before = model.forward_intermediates(image, indices, **words)
    pruned = copy.deepcopy(model)
    taken = pruned.prune_intermediate_layers(indices)
    assert taken == want
    found = pruned.forward_intermediates(image, taken, **words)
    assert len(found) == len(before) and all(map(torch.equal, found, before))
    assert len(pruned.blocks) == pruned.config.depth == len(pruned.feature_info) == max(taken) + 1
    assert pruned.num_classes == 0 and pruned.global_pool == "" and len(model.blocks) == 3
    assert vit.VisionTransformer(pruned.config).state_dict().keys() == pruned.state_dict().keys()
