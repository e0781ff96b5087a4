"""transformers models with our attention from its registry, beside its own eager attention."""

import types

import pytest
import torch
from peers import assert_same, import_transformers, randomise

import vit

pytestmark = pytest.mark.peers

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 64, "patch_size": 8}


def vit_model(transformers, **options):
    config = transformers.ViTConfig(image_size=(24, 16), num_labels=5, **SIZES, **options)
    return transformers.ViTForImageClassification(config), lambda out: out.logits, (24, 16)


def dinov2(transformers, **options):
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = transformers.Dinov2WithRegistersConfig(image_size=24, mlp_ratio=2, **sizes, **options)
    return transformers.Dinov2WithRegistersModel(config), lambda out: out.last_hidden_state, (24, 24)


def siglip(transformers, **options):
    config = transformers.SiglipVisionConfig(image_size=24, **SIZES, **options)
    return transformers.SiglipVisionModel(config), lambda out: out.last_hidden_state, (24, 24)


def clip(transformers, **options):
    config = transformers.CLIPVisionConfig(image_size=24, **SIZES, **options)
    return transformers.CLIPVisionModel(config), lambda out: out.pooler_output, (24, 24)


def pair(make, impl="auto", **options):
    transformers = import_transformers()
    name = vit.register_attention("vit_kernels_" + impl, impl)
    theirs, output, size = make(transformers, attn_implementation="eager", **options)
    ours, _, _ = make(transformers, attn_implementation=name, **options)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    return ours.eval(), theirs.eval(), output, image


def results(model, output, image):
    """The output, and the gradients of the image and of what the output depends on.

    Without the biases of the keys: softmax ignores them, so what is computed for them is rounding noise.
    """
    image = image.clone().requires_grad_()
    out = output(model(image))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.device)
    params = {name: p for name, p in model.named_parameters() if "k_proj.bias" not in name}
    grads = torch.autograd.grad(out, [image, *params.values()], cotangent, allow_unused=True)
    return {"output": out} | {n: g for n, g in zip(["image", *params], grads, strict=True) if g is not None}


def compare(ours, theirs, output, image):
    found, want = (results(model, output, image) for model in (ours, theirs))
    assert sum(name.endswith("q_proj.weight") for name in want) == 2
    assert_same(found, want, 2e-5)


@pytest.mark.parametrize("make", [vit_model, dinov2, siglip])
def test_matches_eager(make):
    compare(*pair(make))


@pytest.mark.parametrize("make", [vit_model])
def test_kernels_match_eager(make, device):
    ours, theirs, output, image = pair(make, "triton")
    compare(ours.to(device), theirs.to(device), output, image.to(device))


@pytest.mark.parametrize("make", [vit_model, clip])
def test_weights_on_request(make):
    ours, theirs, _, image = pair(make)
    with torch.no_grad():
        found, want = (m(image, output_attentions=True) for m in (ours, theirs))
        quiet = ours(image)
    assert len(found.attentions) == 2 and quiet.get("attentions") is None
    for a, b in zip(found.attentions, want.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [vit_model, dinov2, siglip, clip])
def test_it_is_what_runs(make):
    ours, _, _, image = pair(make)
    assert [row.op for row in vit.explain(ours, image)] == ["attention"]


def test_masks_take_sdpa():
    ours, theirs, _, image = pair(vit_model)
    mask = torch.ones(2, 7)
    mask[0, 3:] = 0
    with torch.no_grad():
        found, want = (m.vit(image, attention_mask=mask).last_hidden_state for m in (ours, theirs))
        other = theirs.vit(image).last_hidden_state
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other, want, rtol=1e-2)


def test_dropout_drops():
    ours, _, output, image = pair(vit_model, attention_probs_dropout_prob=0.5)
    ours.train()
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = output(ours(image)), output(ours(image))
        torch.manual_seed(1)
        again = output(ours(image))
        assert torch.equal(again, first) and not torch.allclose(first, second)


def test_causal_text_attention_is_not_ours():
    transformers = import_transformers()
    name = vit.register_attention()
    config = transformers.CLIPTextConfig(vocab_size=50, hidden_size=48, num_hidden_layers=1, num_attention_heads=3)
    config.intermediate_size = 64
    models = []
    for implementation in (name, "eager"):
        torch.manual_seed(0)
        models.append(transformers.CLIPTextModel._from_config(config, attn_implementation=implementation).eval())
    tokens = torch.randint(3, 50, (2, 9))
    with torch.no_grad():
        found, want = (m(tokens).last_hidden_state for m in models)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("heads", [4, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("causal", ["by argument", "by module", "by neither", "argument over module"])
def test_the_registered_function_and_all_that_it_takes(causal, heads, scaling):
    import_transformers()
    from transformers import AttentionInterface

    attend = AttentionInterface()[vit.register_attention()]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 16, generator=generator)
    k, v = (torch.randn(2, heads, 6, 16, generator=generator) for _ in range(2))
    module = torch.nn.Module().eval()
    module.is_causal, module.num_key_value_groups = causal in ("by module", "argument over module"), 4 // heads
    is_causal = {"by argument": True, "argument over module": False}.get(causal)
    options = {"is_causal": causal.startswith("by") and "neither" not in causal, "enable_gqa": True, "scale": scaling}
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    found, weights = attend(module, q, k, v, None, scaling=scaling, is_causal=is_causal)
    torch.testing.assert_close(found, want)
    assert weights is None
    if options["is_causal"] is False and heads == 4:
        probs = torch.softmax((scaling or 0.25) * q @ k.mT, -1)
        for asked in ({"output_attentions": True}, {}):  # the keyword, or the configuration
            module.config = types.SimpleNamespace(output_attentions=not asked)
            weights = attend(module, q, k, v, None, scaling=scaling, is_causal=is_causal, **asked)[1]
            torch.testing.assert_close(weights, probs)
        assert attend(module, q, k, v, None, scaling=scaling, is_causal=is_causal, output_attentions=False)[1] is None
    mask = torch.ones(6, 6, dtype=torch.bool).tril(2)[None, None]
    options = {"attn_mask": mask, "enable_gqa": True, "scale": scaling}
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    torch.testing.assert_close(attend(module, q, k, v, mask, scaling=scaling, is_causal=is_causal)[0], want)
