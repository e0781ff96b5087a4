"""transformers models with our attention from its registry, against their eager attention."""

import sys
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
    """The output, and the gradients of the image and of the parameters it uses.

    Key biases are left out: softmax ignores them, so their gradients are rounding noise.
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
@pytest.mark.parametrize("causal", ["by argument", "by module", "by neither", "argument over module", "by default"])
def test_the_registered_function_and_all_that_it_takes(causal, heads, scaling):
    import_transformers()
    from transformers import AttentionInterface

    attend = AttentionInterface()[vit.register_attention()]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 16, generator=generator)
    k, v = (torch.randn(2, heads, 6, 16, generator=generator) for _ in range(2))
    module = torch.nn.Module().eval()
    module.is_causal, module.num_key_value_groups = causal in ("by module", "argument over module"), 4 // heads
    if causal == "by default":  # transformers' default, if the module has none
        del module.is_causal
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


def attend_with(p: float, tensors, mask=None, **options):
    """The registered function in training, from a fixed random state."""
    import_transformers()
    from transformers import AttentionInterface

    module = torch.nn.Module().train()
    module.is_causal, module.num_key_value_groups = False, tensors[0].shape[1] // tensors[1].shape[1]
    torch.manual_seed(5)
    return AttentionInterface()[vit.register_attention()](module, *tensors, mask, dropout=p, **options)


def heads_first(*heads: int, tokens=(6, 6, 6), seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, h, n, 16, generator=generator) for h, n in zip(heads, tokens, strict=True)]


def test_names_and_paths_of_backends():
    """The name is returned and has a default, and each name keeps its own ``impl``."""
    transformers = import_transformers()
    assert vit.register_attention() == "vit_kernels"
    assert vit.register_attention(impl="auto", name="vit_a") == "vit_a"
    assert vit.register_attention("vit_b", "reference") == "vit_b"
    assert vit.register_attention("vit_c", "triton") == "vit_c"
    reasons = {}
    for name in ("vit_kernels", "vit_a", "vit_b", "vit_c"):
        model, _, size = vit_model(transformers, attn_implementation=name)
        (row,) = vit.explain(model.eval(), torch.zeros(1, 3, *size))
        assert row.calls == 2 and row.op == "attention"
        reasons[name] = (row.path, row.reason.split(":")[0])
    assert reasons["vit_kernels"] == reasons["vit_a"] == (reasons["vit_a"][0], "auto")
    assert reasons["vit_b"] == ("reference", "asked for") or reasons["vit_b"][1].startswith("asked for")
    assert reasons["vit_c"][0] == "triton"


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^register_attention needs transformers 5: pip install 'transformers>=5'$"):
        vit.register_attention()


def test_fewer_queries_than_keys():
    """As in a pooling head: one query for each image."""
    q, k, v = heads_first(4, 4, 4, tokens=(1, 6, 6))
    found, weights = attend_with(0.0, (q, k, v), output_attentions=True)
    probs = torch.softmax(q @ k.mT / 4, -1)
    torch.testing.assert_close(found, (probs @ v).transpose(1, 2))
    torch.testing.assert_close(weights, probs)


@pytest.mark.parametrize("grad", [False, True])
def test_weights_under_dropout_are_those_of_the_output(grad):
    q, k, v = heads_first(4, 4, 4)
    q.requires_grad_(grad)
    found, weights = attend_with(0.4, (q, k, v), output_attentions=True, scaling=0.7)
    torch.testing.assert_close(found, (weights @ v).transpose(1, 2))
    kept = weights != 0
    assert 0.4 < kept.float().mean() < 0.8
    torch.testing.assert_close(weights, torch.where(kept, torch.softmax(0.7 * q @ k.mT, -1) / 0.6, 0))
    again, nothing = attend_with(0.4, (q, k, v), scaling=0.7)
    assert nothing is None
    torch.testing.assert_close(again, found)  # asking for the weights does not change what is dropped


def test_a_dropout_of_everything_is_sdpas():
    q, k, v = heads_first(4, 4, 4)
    found, weights = attend_with(1.0, (q, k, v))
    torch.manual_seed(5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0).transpose(1, 2)
    torch.testing.assert_close(found, want, equal_nan=True)
    assert weights is None


@pytest.mark.parametrize("case", ["mask", "causal", "shared keys"])
def test_sdpa_gets_the_dropout_and_the_scale(case):
    """Over 2,000 draws of one row, the mean is the row without dropout, and a share p of the weights is 0."""
    q, k, v = heads_first(4, 2 if case == "shared keys" else 4, 2 if case == "shared keys" else 4)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None] if case == "mask" else None
    groups = 4 // k.shape[1]
    k, v = (t[:1].expand(2000, -1, -1, -1) for t in (k, torch.eye(6, 16).expand_as(v)))
    q = q[:1].expand(2000, -1, -1, -1)
    found, _ = attend_with(0.25, (q, k, v), mask, scaling=0.7, is_causal=case == "causal")
    weights = found[..., :6].transpose(1, 2)  # the values are unit vectors, so the output shows the weights
    logits = 0.7 * q[:1] @ k[:1].repeat_interleave(groups, 1).mT
    if case != "shared keys":
        logits = logits.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
    probs = logits.softmax(-1)[0]
    assert ((weights.mean(0) - probs).abs() <= 0.02 + 0.1 * probs).all()
    dropped = (weights == 0).float().mean(0)[probs > 0]
    assert ((dropped - 0.25).abs() < 0.06).all()


@pytest.mark.parametrize("case", ["mask", "causal", "shared keys"])
def test_sdpa_draws_what_it_draws_alone(case):
    """The op draws no random number before it."""
    import_transformers()
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = heads_first(4, 2 if case == "shared keys" else 4, 2 if case == "shared keys" else 4)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None] if case == "mask" else None
    found, _ = attend_with(0.5, (q, k, v), mask, is_causal=case == "causal")
    torch.manual_seed(5)
    module = types.SimpleNamespace(num_key_value_groups=4 // k.shape[1], is_causal=False)
    want, _ = sdpa_attention_forward(module, q, k, v, mask, 0.5, None, case == "causal")
    torch.testing.assert_close(found, want)
