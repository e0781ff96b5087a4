"""With token pooling, the last block of `forward` computes the class token alone, and only if nothing sees the others.

That the logits and all gradients stay right is shown by every other test of a model with token pooling.
"""

import dataclasses

import pytest
import torch
from peers import assert_same, outputs_and_gradients, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import vit
from vit.kernels import runtime

SMALL = vit.ViTConfig(
    img_size=(16, 24), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, init_values=0.5, reg_tokens=1
)
TOKENS = 8  # 6 patches, the class token and a register


def make(**options):
    model = vit.VisionTransformer(dataclasses.replace(SMALL, **options), seed=0).eval()
    randomise(model)
    return model, torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def queries(call) -> list[int]:
    """How many queries each attention of ``call()`` has."""
    with runtime.record_choices() as choices:
        call()
    return [c.shape[1] for c in choices if c.op.startswith("attention")]


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1}, {"qk_norm": True}, {"qkv_bias": False}, {"final_norm": False}], ids=str
)
def test_the_last_block_computes_one_row(options):
    model, image = make(**options)
    depth = model.config.depth
    with runtime.record_choices() as choices:
        model(image)
    assert [c.shape[1] for c in choices if c.op.startswith("attention")] == [TOKENS] * (depth - 1) + [1]
    assert [c.shape[1] for c in choices if c.op == "mlp"] == [TOKENS] * (depth - 1) + [1]
    found, want = outputs_and_gradients(model, model, image), outputs_and_gradients(model, through_all(model), image)
    assert_same(found, want, 1e-5)


def through_all(model):
    return lambda image: model.forward_head(model.forward_features(image))


def test_kernels_of_one_row(device):
    model, image = make(impl="triton", depth=1)
    model, image = model.to(device), image[:2].to(device)
    reference = vit.reference.VisionTransformer(model.config).to(device)
    reference.load_state_dict(model.state_dict())
    assert queries(lambda: model(image)) == [1]
    found, want = outputs_and_gradients(model, model, image), outputs_and_gradients(reference, reference, image)
    assert_same(found, want, 2e-5)


def test_one_row_does_not_save_all_rows(device):
    """Of the norm's output, which linear layers read whole and in one row, autograd saves that row."""
    model, image = make(impl="fused", depth=1)
    model, saved, rows = model.to(device), set(), []

    def keep(t):
        saved.add(t.untyped_storage()._cdata)
        return t

    attn = model.blocks[0].attn
    first = attn.first
    attn.first = lambda y: rows.append(y) or first(y)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(image[:2].to(device))
    assert rows[0].shape == (2, TOKENS, 32) and rows[0].untyped_storage()._cdata not in saved


def test_recomputation_gives_the_same_bits():
    model, image = make()
    want = outputs_and_gradients(model, model, image)
    model.set_grad_checkpointing()
    assert queries(lambda: model(image)) == [TOKENS, 1]
    assert_same(outputs_and_gradients(model, model, image), want, 0.0)


def test_stochastic_depth_draws_the_same():
    model, image = make(drop_path_rate=0.5)
    model.train()
    seed = torch.tensor([5])
    assert queries(lambda: model(image, dropout_seed=seed)) == [TOKENS, 1]
    features = model.forward_features(image, dropout_seed=seed)
    want = model.forward_head(features, dropout_seed=seed)
    torch.testing.assert_close(model(image, dropout_seed=seed), want)
    assert not torch.allclose(model.eval()(image), want)


@pytest.mark.parametrize("rate", ["attn_drop_rate", "proj_drop_rate", "act_drop_rate"])
def test_dropout_needs_all_rows_in_training(rate):
    model, image = make(**{rate: 0.5})
    seed = torch.tensor([5])
    assert queries(lambda: model(image)) == [TOKENS, 1]
    model.train()
    assert queries(lambda: model(image, dropout_seed=seed)) == [TOKENS, TOKENS]
    want = model.forward_head(model.forward_features(image, dropout_seed=seed), dropout_seed=seed)
    assert torch.equal(model(image, dropout_seed=seed), want)


@pytest.mark.parametrize("pool", ["avg", ""])
def test_other_pooling_needs_all_rows(pool):
    model, image = make(global_pool=pool)
    assert queries(lambda: model(image)) == [TOKENS, TOKENS]


def test_features_are_those_of_all_tokens():
    model, image = make()
    assert model.forward_features(image).shape == (3, TOKENS, 32)
    assert queries(lambda: model.forward_features(image)) == [TOKENS, TOKENS]
    _, maps = model.forward_intermediates(image, [-1], return_prefix_tokens=True)
    assert maps[0][0].shape == (3, 32, 2, 3) and maps[0][1].shape == (3, 2, 32)
    logits, maps = model.attention_maps(image)
    assert maps[1].shape == (3, 2, TOKENS, TOKENS) and torch.equal(logits, model(image))


LAST = [
    name
    for name, _ in vit.VisionTransformer(dataclasses.replace(SMALL, qk_norm=True)).named_modules()
    if "blocks.1" in name
]


@pytest.mark.parametrize("name", [*LAST, "blocks", "norm"])
def test_a_hook_sees_all_tokens(name):
    """Anywhere in the last block, and on the norm after it."""
    model, image = make(qk_norm=True)
    want, seen = model(image), []
    model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(model(image), want)
    assert seen == [TOKENS]


def test_a_replaced_part_gets_all_tokens():
    model, image = make()
    seen = []

    class Mixer(nn.Module):
        def forward(self, x, seed=None):
            seen.append(x.shape[1])
            return x.flip(1)

    model.blocks[1].mlp = Mixer()
    assert torch.equal(model(image), through_all(model)(image)) and seen == [TOKENS, TOKENS]


def test_overridden_methods_are_called():
    class Doubled(vit.VisionTransformer):
        def forward_features(self, *args, **options):
            return 2 * super().forward_features(*args, **options)

    class Summed(vit.VisionTransformer):
        def forward_head(self, x, *args, **options):
            return super().forward_head(x.sum(1, keepdim=True), *args, **options)

    model, image = make()
    for cls in (Doubled, Summed):
        other = cls(SMALL).eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(image), through_all(other)(image)) and queries(lambda: other(image)) == [TOKENS] * 2  # noqa: B023
    head = model.forward_head
    model.forward_head = lambda x, **options: head(x.sum(1, keepdim=True), **options)
    assert torch.equal(model(image), model.forward_head(model.forward_features(image)))


def test_the_work_saved_is_that_of_the_other_rows():
    """In FLOPs of the products, counted without hooks: q, the logits, proj and the MLP of all rows but one."""
    model, image = make(depth=1)
    width, hidden, rows = 32, model.config.mlp_hidden_dim, TOKENS - 1
    saved = 2 * 3 * rows * (2 * width * width + 2 * width * hidden) + 2 * 2 * 3 * rows * TOKENS * width
    with torch.no_grad():
        assert flops(lambda: through_all(model)(image)) - flops(lambda: model(image)) == saved


def flops(call) -> int:
    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            formula = flop_registry.get(func._overloadpacket)
            self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            return out

    with Counter() as counter:
        call()
    return counter.total
