"""`vit.attention_statistics` and `vit.rollout` on accelerated models, compared with the library's own attention."""

import copy
import dataclasses

import dense
import pytest
import torch
import zoo
from peers import import_timm, import_transformers, randomise
from torch import nn

import vit
from vit.kernels import runtime

pytestmark = pytest.mark.peers


def distilled():
    small = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    import_timm()
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**small)


@dataclasses.dataclass
class Case:
    make: object
    prefix: int
    size: tuple[int, int] = (24, 24)
    grid: tuple[int, int] = (3, 3)
    options: dict = dataclasses.field(default_factory=dict)


def timm_case(prefix, size=(24, 24), grid=(3, 3), **options):
    return Case(lambda: zoo.timm_model(**options), prefix, size, grid)


def hf_case(name, prefix, size=(24, 24), grid=(3, 3), **options):
    return Case(zoo.MODELS[name], prefix, size, grid, options)


CASES = {
    "timm": timm_case(1, (16, 40), (2, 5), img_size=(16, 40)),
    "timm qk_norm": timm_case(1, qk_norm=True),
    "timm registers": timm_case(5, reg_tokens=4, no_embed_class=True, init_values=0.5),
    "timm map pooling": timm_case(0, class_token=False, global_pool="map"),
    "timm average": timm_case(0, class_token=False, global_pool="avg"),
    "timm dynamic": timm_case(1, (16, 40), (2, 5), dynamic_img_size=True),
    "timm padded": timm_case(1, (20, 37), (3, 5), dynamic_img_size=True, dynamic_img_pad=True),
    "timm patch of two sides": timm_case(1, grid=(6, 3), patch_size=(4, 8)),
    "timm distilled": Case(distilled, 2),
    "hf ViT": hf_case("hf ViT", 1),
    "hf ViT resized": hf_case("hf ViT", 1, (16, 40), (2, 5), interpolate_pos_encoding=True),
    "hf DeiT": hf_case("hf DeiT", 2),
    "hf Dinov2": hf_case("hf Dinov2", 1, (16, 40), (2, 5)),
    "hf Dinov2 cut": hf_case("hf Dinov2 registers", 5, (23, 23), (2, 2)),  # as many tokens as 3 x 3 patches alone
    "torchvision": Case(zoo.torchvision_model, 1),
}


def build(case):
    """A model, and images for it."""
    torch.manual_seed(0)
    model = case.make().eval()
    randomise(model)
    return model, torch.randn(2, 3, *case.size, generator=torch.Generator().manual_seed(1))


def library_maps(model, image, options):
    """The probabilities [L, B, H, N, N] of a model as its library computes them, in fp64 (HF's softmax: fp32)."""
    model, image, found = copy.deepcopy(model).double(), image.double(), []

    def multihead(module, args, kwargs):
        qkv = args[0] @ module.in_proj_weight.T + module.in_proj_bias
        q, k, _ = qkv.unflatten(2, (3, module.num_heads, -1)).unbind(2)
        found.append((torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5).softmax(-1))

    for module in model.modules():
        if hasattr(module, "fused_attn") and hasattr(module, "attn_drop") and hasattr(module, "qkv"):
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(multihead, with_kwargs=True)
    with torch.no_grad():
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
            found = model(image, output_attentions=True, **options).attentions
        else:
            model(image, **options)
    return torch.stack(tuple(found))


def logits(out):
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    case = CASES[name]
    model, image = build(case)
    p = library_maps(model, image, case.options)
    each = dense.statistics(p, case.prefix, case.grid, [a // b for a, b in zip((24, 24), (3, 3), strict=True)])
    if "two sides" in name:
        each = dense.statistics(p, case.prefix, case.grid, (4, 8))
    vit.accelerate(model)
    with torch.no_grad():
        plain = logits(model(image, **case.options))
        with vit.attention_statistics(model, received=True) as stats:
            assert torch.equal(logits(model(image, **case.options)), plain)
        with torch.autocast("cpu", torch.bfloat16):
            plain = logits(model(image, **case.options))
            with vit.attention_statistics(model):
                assert torch.equal(logits(model(image, **case.options)), plain)
    assert stats.tokens[:2] == (case.prefix, case.grid)
    mean = dense.means(each, case.prefix)
    for key in ("distance", "entropy", "prefix_mass"):
        assert dense.error(getattr(stats, key), mean[key]) <= 1e-5, key
    assert dense.error(stats.received, each["received"]) <= 1e-5
    assert dense.error(stats.rows(-1, [(1, 1), 0]), p[-1][:, :, [case.prefix + case.grid[1] + 1, 0]]) <= 1e-5
    want = dense.rollout(p)
    assert dense.error(vit.rollout(model, image, query=None, **case.options), want) <= 2e-6
    if case.prefix:
        assert dense.error(vit.rollout(model, image, **case.options), want[:, 0]) <= 2e-6
    else:
        with pytest.raises(ValueError, match="no class token"):
            vit.rollout(model, image)
    assert not model._forward_hooks and not model._forward_pre_hooks and runtime.attention_listener() is None


@pytest.mark.parametrize("name", ["timm", "hf ViT", "hf Dinov2", "torchvision"])
def test_a_training_step_keeps_its_bits(name):
    options = {"timm": {"attn_drop_rate": 0.2, "drop_path_rate": 0.2}, "torchvision": {"attention_dropout": 0.2}}
    makers = {"timm": zoo.timm_model, "torchvision": zoo.torchvision_model}
    torch.manual_seed(0)
    model = makers[name](**options[name]) if name in makers else zoo.MODELS[name]()
    for config in filter(None, [getattr(model, "config", None)]):
        config.attention_probs_dropout_prob = config.hidden_dropout_prob = 0.2
    randomise(model)
    vit.accelerate(model.train())

    def step():
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = logits(model(torch.ones(2, 3, 24, 24))).float().square().sum()
        grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        return [loss.detach(), *(g for g in grads if g is not None), torch.get_rng_state()]

    want = step()
    with vit.attention_statistics(model) as stats:
        found = step()
    assert len(found) == len(want) and all(map(torch.equal, found, want))
    state, mean = torch.get_rng_state(), stats.entropy
    rows = stats.rows(1, range(10)).double()
    assert dense.error(torch.special.entr(rows).sum(-1).mean(-1), mean[1]) <= 1e-5  # of the same dropout masks
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("grad", [False, True])
def test_attention_maps_of_transformers(grad):
    """With maps that require grad, the layer computes its result from them."""
    model = vit.accelerate(zoo.build("hf ViT"))
    image = zoo.images("hf ViT")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        want = model(image, output_attentions=True)
        with vit.attention_statistics(model, received=True) as stats:
            out = model(pixel_values=image, output_attentions=True)
        rolled = vit.rollout(model, pixel_values=image, output_attentions=True, query=None)
        seen = torch.stack([stats.rows(layer, range(10)) for layer in range(2)])
    assert torch.equal(out.logits, want.logits) and all(map(torch.equal, out.attentions, want.attentions))
    assert dense.error(stats.received, seen.mean(-2)) <= 1e-6
    assert dense.error(rolled, dense.rollout(seen.double())) <= (0.01 if grad else 1e-6)  # it needs no gradient


def test_the_attention_backend():
    """`vit.register_attention` without `vit.accelerate`."""
    import_transformers()
    model, image = build(CASES["hf ViT"])
    p = library_maps(model, image, {})
    vit.register_attention()
    model.set_attn_implementation("vit_kernels")
    with vit.attention_statistics(model) as stats:
        model(image)
    assert dense.error(stats.entropy, dense.means(dense.statistics(p, 1, (3, 3), (8, 8)), 1)["entropy"]) <= 1e-5


@pytest.mark.parametrize("name", ["timm", "hf ViT", "torchvision"])
def test_a_model_that_is_not_accelerated(name):
    model, image = zoo.build(name), zoo.images(name)
    with vit.attention_statistics(model) as stats:
        model(image)
    for call in (lambda: stats.distance, lambda: vit.rollout(model, image), lambda: stats.rows(0, [0])):
        with pytest.raises(RuntimeError, match=r"no attention op .* after vit.accelerate\(model\)"):
            call()
    vit.accelerate(model, attention=False)
    with pytest.raises(RuntimeError, match="no attention op"):
        vit.rollout(model, image)


def test_a_block_that_is_not_accelerated():
    model, image = zoo.build("timm"), zoo.images("timm")
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda module, args, out: None)  # the library's attention
    vit.accelerate(model)
    with vit.attention_statistics(model) as stats:
        model(image)
    with pytest.raises(RuntimeError, match="in only 1 of the 2 blocks of VisionTransformer"):
        _ = stats.distance


def test_patch_drop():
    model = vit.accelerate(zoo.timm_model(patch_drop_rate=0.5)).train()
    with (
        pytest.raises(ValueError, match=r"5 tokens .* are not 1 prefix tokens and 3 x 3 patches.*patch_drop_rate"),
        vit.attention_statistics(model),
    ):
        model(zoo.images("timm"))
    assert not model._forward_hooks and runtime.attention_listener() is None
