"""The model under PyTorch's own tools and in code that was written for timm's models."""

import copy

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
    """As torchinfo and captum put them, and in the order in which timm's model calls the same parts."""
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

    def run():  # ModuleTracker does not take torch.autograd.grad
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
    assert {row.path for row in vit.explain(model, image)} == {"reference"}


@pytest.mark.parametrize("fields", [{}, {"use_mask_token": True, "reg_tokens": 1, "no_embed_class": True}], ids=str)
def test_a_watched_patch_projection(fields):
    """Mask token, prefix tokens and position embedding come to what the projection gives, whoever calls it."""
    model, image = make(**fields)
    mask = {"bool_masked_pos": torch.tensor([[True, False, False] * 2] * 2)} if "use_mask_token" in fields else {}
    want = outputs_and_gradients(model, lambda x: model(x, **mask), image)
    model.patch_embed.proj.register_forward_hook(lambda *_: None)
    assert_same(outputs_and_gradients(model, lambda x: model(x, **mask), image), want, 2e-5)
    if mask:  # hidden pixels reach nothing
        image[:, :, :8, :8] = torch.nan
        loss = model(image[1:], mask["bool_masked_pos"][1:]).sum()
        assert torch.autograd.grad(loss, model.patch_embed.proj.weight)[0].isfinite().all()


# ---- timm's protocol -------------------------------------------------------------------------------------------------


def by_hand(model, image):
    """As MAE, DINO and prompt tuning write it down."""
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
    """In training and without a seed each draws its own, from PyTorch's generator; in evaluation nothing drops."""
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
    # A part in training drops out in a model in evaluation, as with PyTorch's modules.
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
    """Any module from tokens to tokens can take the place of a block, or of a block's part, in training as well."""

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
    "change", [{}, {"global_pool": "avg", "class_token": False}, {"reg_tokens": 3, "num_classes": 0}]
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
