"""What timm's users call on a model besides forward: intermediates, checkpointing, parameter groups."""

import dataclasses

import pytest
import torch
from peers import assert_same, import_timm, outputs_and_gradients, randomise, timm_twin

import vit
from vit import param_groups_layer_decay

pytestmark = pytest.mark.peers

SMALL = vit.ViTConfig(img_size=(16, 24), patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
TOKENS = {
    "class token": {},
    "registers": {"reg_tokens": 2},
    "no prefix": {"class_token": False, "global_pool": "avg"},
    "dynamic size": {"dynamic_img_size": True, "interpolation": "bicubic_antialias"},
}


def twins(config: vit.ViTConfig, device="cpu"):
    theirs = timm_twin(config).to(device).eval()
    randomise(theirs)
    ours = vit.VisionTransformer(config).to(device).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def flat(nested) -> dict[str, torch.Tensor]:
    """Tensors of nested lists and tuples by their path, so that the structure is compared, too."""
    if isinstance(nested, torch.Tensor):
        return {type(nested).__name__: nested}
    return {f"{type(nested).__name__} {i} {k}": t for i, part in enumerate(nested) for k, t in flat(part).items()}


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": (-2, 0, -3), "output_fmt": "NLC"},
        {"indices": [1], "stop_early": True, "return_prefix_tokens": True},
        {"indices": [0, 1], "stop_early": True, "intermediates_only": True, "norm": True},
        {"return_prefix_tokens": True, "intermediates_only": True, "output_fmt": "NLC"},
    ],
    ids=str,
)
def test_intermediates_are_timms(tokens, options):
    ours, theirs = twins(dataclasses.replace(SMALL, **TOKENS[tokens]))
    image = torch.randn(2, 3, *((24, 32) if ours.config.dynamic_img_size else (16, 24)))
    with torch.no_grad():
        assert_same(*(flat(m.forward_intermediates(image, **options)) for m in (ours, theirs)), 1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"n": 2, "reshape": True, "norm": True}, {"n": [0, 2], "return_prefix_tokens": True}],
    ids=str,
)
def test_get_intermediate_layers_is_timms(options):
    ours, theirs = twins(dataclasses.replace(SMALL, reg_tokens=1))
    image = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        assert_same(*(flat(m.get_intermediate_layers(image, **options)) for m in (ours, theirs)), 1e-5)


def test_intermediates_have_gradients():
    ours, theirs = twins(SMALL)
    image = torch.randn(2, 3, 16, 24)
    for model in (ours, theirs):  # later parts get no gradient
        del model.blocks[2], model.norm, model.head
        model.norm = torch.nn.Identity()
    ours.config = dataclasses.replace(SMALL, depth=2)
    assert_same(
        *(outputs_and_gradients(m, lambda x, m=m: m.forward_intermediates(x, 1)[1][0], image) for m in (ours, theirs)),
        2e-5,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 4}, "the last 4 blocks of 3 cannot be taken; use 1 to 3"),
        ({"indices": 0}, "the last 0 blocks of 3"),
        ({"indices": [3]}, "block index 3 is out of range; use -3 to 2"),
        ({"indices": [-4]}, "block index -4 is out of range"),
        ({"indices": []}, "no block index given"),
        ({"output_fmt": "NHWC"}, "output_fmt='NHWC' is unknown"),
    ],
    ids=str,
)
def test_bad_intermediates(options, message):
    with pytest.raises(ValueError, match=message):
        vit.VisionTransformer(SMALL).forward_intermediates(torch.ones(1, 3, 16, 24), **options)


def test_no_map_of_dropped_patches():
    model = vit.VisionTransformer(dataclasses.replace(SMALL, patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="needs all patches"):
        model.forward_intermediates(torch.ones(1, 3, 16, 24))
    assert model.forward_intermediates(torch.ones(1, 3, 16, 24), 1, output_fmt="NLC")[1][0].shape == (1, 3, 32)
    assert model.eval().forward_intermediates(torch.ones(1, 3, 16, 24), 1)[1][0].shape == (1, 32, 2, 3)


def everything(model, image) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # for patch dropout
    return outputs_and_gradients(model, model, image)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "patch_drop_rate": 0.5}], ids=str)
def test_checkpointing_changes_no_bit(impl, options, device):
    config = dataclasses.replace(SMALL, impl=impl, depth=2 if impl == "reference" else 1, **options)
    model = vit.VisionTransformer(config, seed=0).to(device)
    randomise(model)
    image = torch.randn(2, 3, 16, 24).to(device)
    direct = everything(model, image)
    saved = []

    def count(t):
        saved.append(t.numel())
        return t

    def kept() -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            model(image)
        return sum(saved)

    without = kept()
    model.set_grad_checkpointing()
    assert kept() < without
    again = everything(model, image)
    assert all(torch.equal(direct[k], again[k]) for k in direct)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    assert torch.equal(compiled(image), direct["output"])
    model.set_grad_checkpointing(False)
    assert kept() == without


@pytest.mark.parametrize(
    "options", [{}, {"global_pool": "avg"}, {"reg_tokens": 2, "num_classes": 0}, {"pre_norm": True}]
)
@pytest.mark.parametrize("layer_decay", [0.75, 1.0])
def test_layer_decay_groups_are_timms(options, layer_decay):
    import_timm()
    from timm.optim import param_groups_layer_decay as timms

    ours, theirs = twins(dataclasses.replace(SMALL, **options))
    theirs.blocks[0].requires_grad_(False)
    ours.blocks[0].requires_grad_(False)

    def named(model, groups):
        names = {id(p): name for name, p in model.named_parameters()}
        return {
            frozenset(names[id(p)] for p in g["params"]): (pytest.approx(g["lr_scale"]), g["weight_decay"])
            for g in groups
        }

    words = dict(weight_decay=0.1, layer_decay=layer_decay)
    want = named(theirs, timms(theirs, no_weight_decay_list=theirs.no_weight_decay(), **words))
    assert named(ours, timms(ours, no_weight_decay_list=ours.no_weight_decay(), **words)) == want
    assert named(ours, param_groups_layer_decay(ours, **words)) == want
    torch.optim.AdamW(param_groups_layer_decay(ours))


def test_bad_layer_decay():
    with pytest.raises(ValueError, match="layer_decay=0 must be above 0 and at most 1"):
        param_groups_layer_decay(vit.VisionTransformer(SMALL), layer_decay=0)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "reg_tokens": 1}], ids=str)
def test_attention_maps_are_timms(options):
    ours, theirs = twins(dataclasses.replace(SMALL, **options))
    image = torch.randn(2, 3, 16, 24)
    want = {}
    for i, block in enumerate(theirs.blocks):  # the input of dropout is the map
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, out, i=i: want.setdefault(i, inputs[0]))
    with torch.no_grad():
        theirs(image)
        logits, maps = ours.attention_maps(image)
    assert_same({str(i): m for i, m in maps.items()}, {str(i): m for i, m in want.items()}, 1e-5)
    assert torch.equal(logits, ours(image))
    assert list(ours.attention_maps(image, [-1, 0])[1]) == [0, 2] and list(ours.attention_maps(image, 1)[1]) == [2]
    with pytest.raises(ValueError, match="block index 7 is out of range"):
        ours.attention_maps(image, [7])


def test_attention_maps_leave_the_kernels_alone(device):
    config = dataclasses.replace(SMALL, depth=2, impl="triton", use_mask_token=True, attn_drop_rate=0.2)
    model = vit.VisionTransformer(config, 0).to(device)
    randomise(model)
    image, mask = torch.randn(2, 3, 16, 24).to(device), torch.eye(6, dtype=torch.bool)[:2].to(device)
    for mode in (True, False):
        model.train(mode)
        torch.manual_seed(0)
        plain = model(image, mask)
        torch.manual_seed(0)
        logits, maps = model.attention_maps(image, bool_masked_pos=mask)
        assert torch.equal(logits, plain)
        assert {i: m.shape for i, m in maps.items()} == {0: (2, 2, 7, 7), 1: (2, 2, 7, 7)}
        torch.testing.assert_close(maps[1].sum(-1), torch.ones(2, 2, 7, device=device))


@pytest.mark.parametrize("options", [{}, {"prune_norm": True}, {"prune_head": False}, {"indices": [0, -2]}], ids=str)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_prune_intermediate_layers_is_timms(options, pool):
    ours, theirs = twins(dataclasses.replace(SMALL, global_pool=pool))
    assert ours.prune_intermediate_layers(**options) == theirs.prune_intermediate_layers(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert list(vit.VisionTransformer(ours.config).state_dict()) == list(ours.state_dict())
    image = torch.randn(2, 3, 16, 24)
    assert_same(*(outputs_and_gradients(m, m, image) for m in (ours, theirs)), 2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_pruning_keeps_the_mode_and_the_hooks(training):
    model, calls = vit.VisionTransformer(SMALL).train(training), []
    model.blocks.register_forward_hook(lambda *_: calls.append(1))
    model.prune_intermediate_layers([0], prune_norm=True)
    assert {name: m.training for name, m in model.named_modules() if m.training is not training} == {}
    model(torch.randn(1, 3, 16, 24))
    assert calls == [1]


def test_reset_classifier_changes_the_pooling_as_timm():
    ours, theirs = twins(SMALL)
    for model in (ours, theirs):
        model.reset_classifier(4, "avg")
        torch.nn.init.constant_(model.head.weight, 0.1)
        torch.nn.init.zeros_(model.head.bias)
    image = torch.randn(2, 3, 16, 24)
    assert_same(*(outputs_and_gradients(m, m, image) for m in (ours, theirs)), 2e-5)
