"""What somebody puts on a part of the model counts: hooks, wrappers, pruning, parametrisations, another module.

The fused ops read the weights of a part without calling it, so each case is done to the reference, whose parts are all
called, and to the fast model.
"""

import pytest
import torch
from peers import assert_same, outputs_and_gradients, randomise
from torch import nn
from torch.nn.utils import parametrizations, prune

import vit

CONFIG = vit.ViTConfig(
    img_size=(24, 16), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, init_values=0.5
)
LINEARS = [
    "patch_embed.proj",
    "blocks.0.attn.qkv",
    "blocks.1.attn.proj",
    "blocks.0.mlp.fc1",
    "blocks.1.mlp.fc2",
    "head",
]
NORMS = ["blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "norm"]


class LoRA(nn.Module):
    """A low-rank update beside a frozen layer; like peft's, it shows the weight of what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.linspace(-1, 1, 2 * base.in_features).reshape(2, -1))
        self.up = nn.Parameter(torch.linspace(-1, 1, 2 * base.out_features).reshape(-1, 2))

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T / x.shape[-1]


def replace(model, name, made):
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, made)


def wrap(model, name):
    replace(model, name, LoRA(model.get_submodule(name)))


def other_norm(model, name):
    old = model.get_submodule(name)
    new = nn.RMSNorm(old.normalized_shape, eps=1e-3)
    new.weight = old.weight
    replace(model, name, new)


def on(what):
    return lambda model, name: what(model.get_submodule(name))


CHANGES = {
    "forward hook": on(lambda m: m.register_forward_hook(lambda _m, _args, out: out * 1.5)),
    "forward pre-hook": on(lambda m: m.register_forward_pre_hook(lambda _m, args: (args[0].square(),))),
    "backward hook": on(lambda m: m.register_full_backward_hook(lambda _m, grads, _outs: (grads[0] * 2,))),
    "backward pre-hook": on(lambda m: m.register_full_backward_pre_hook(lambda _m, grads: (grads[0] * 2,))),
    "other input": on(
        lambda m: m.register_forward_pre_hook(lambda _m, args: (args[0] + args[0].roll(1, -1), *args[1:]))
    ),
    "LoRA": wrap,
    "pruned": on(lambda m: prune.l1_unstructured(m, "weight", 0.5)),
    "weight_norm": on(parametrizations.weight_norm),
    "RMSNorm": other_norm,
}
CASES = [(change, part) for change in ("forward hook", "backward hook") for part in LINEARS + NORMS]
CASES += [("backward pre-hook", part) for part in LINEARS + NORMS]
CASES += [("other input", part) for part in ("blocks.0", "blocks.1", "blocks.1.attn", "blocks.0.mlp", "norm", "head")]
CASES += [("forward pre-hook", part) for part in ("blocks.1.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.norm2")]
CASES += [(change, part) for change in ("LoRA", "pruned", "weight_norm") for part in LINEARS[1:]]
CASES += [(change, "patch_embed.proj") for change in ("pruned", "weight_norm")]
CASES += [("RMSNorm", part) for part in NORMS]


def twins(impl="auto"):
    reference = vit.reference.VisionTransformer(CONFIG)
    randomise(reference)
    fast = vit.VisionTransformer(vit.ViTConfig(**{**vars(CONFIG), "impl": impl}))
    fast.load_state_dict(reference.state_dict())
    return fast, reference


def assert_alike(fast, reference, device):
    image = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for model in (fast.to(device), reference.to(device)):
        for name, param in model.named_parameters():
            if name.endswith("base.weight") or name.endswith("base.bias"):
                param.requires_grad_(True)
        found.append(outputs_and_gradients(model, model, image))
    assert_same(*found, 2e-5)


@pytest.mark.parametrize(("change", "part"), CASES)
def test_counts(change, part):
    fast, reference = twins()
    plain = reference(torch.ones(1, 3, 24, 16))
    for model in (fast, reference):
        CHANGES[change](model, part)
    if change not in ("backward hook", "backward pre-hook", "weight_norm"):  # those show in the gradients
        assert not torch.allclose(reference(torch.ones(1, 3, 24, 16)), plain)  # or the case shows nothing
    assert_alike(fast, reference, "cpu")


@pytest.mark.parametrize("act_layer", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": True, "pre_norm": True, "reg_tokens": 2}], ids=["plain", "options"])
def test_a_hook_that_does_nothing_changes_nothing(fields, act_layer):
    """On one part after the other: a part that is called, and what is around it, compute what the fused op does."""
    model = vit.VisionTransformer(vit.ViTConfig(**vars(CONFIG) | fields | {"act_layer": act_layer}))
    randomise(model)
    image = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    want = outputs_and_gradients(model, model, image)
    hooked = [name for name, _ in model.named_modules()]
    for name in hooked:
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: None)
        assert_same(outputs_and_gradients(model, model, image), want, 2e-5)
        handle.remove()


@pytest.mark.parametrize(("change", "part"), [("LoRA", "blocks.0.attn.qkv"), ("forward hook", "blocks.0.norm2")])
def test_counts_beside_kernels(change, part, device):
    fast, reference = twins("triton")
    for model in (fast, reference):
        CHANGES[change](model, part)
    assert_alike(fast, reference, device)


def test_dropout_of_a_wrapped_mlp():
    """The activation's dropout draws the same mask whether or not the layers around it are plain."""
    config = vit.ViTConfig(**{**vars(CONFIG), "proj_drop_rate": 0.4})
    model = vit.VisionTransformer(config, seed=0).train()
    image, seed = torch.randn(2, 3, 24, 16), torch.tensor([5])
    plain = model(image, dropout_seed=seed)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _args, out: out)
    torch.testing.assert_close(model(image, dropout_seed=seed), plain, rtol=1e-5, atol=1e-5)
