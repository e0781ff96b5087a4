"""PyTorch's FLOP counter gives the same for the fused ops as for the eager formulas and by hand."""

import dataclasses
import importlib
import itertools

import pytest
import torch
import zoo
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torch.utils.module_tracker import ModuleTracker

import vit
from vit import kernels
from vit.kernels import flops
from vit.kernels.dry_run import dry_run
from vit.layers import Block


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---- which ops there are ---------------------------------------------------------------------------------------------


def without_formula():
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vit::"))
    packets = {name: getattr(torch.ops.vit, name.removeprefix("vit::").partition(".")[0]) for name in names}
    assert "vit::linear_fwd" in packets
    return {name for name, packet in packets.items() if packet not in flop_registry}


def test_every_op_has_a_formula():
    assert without_formula() == set()


def test_an_op_without_a_formula_is_noticed():
    with torch.library._scoped_library("vit", "FRAGMENT") as library:
        library.define("uncounted(Tensor x) -> Tensor")
        assert without_formula() == {"vit::uncounted"}
    assert without_formula() == set()


def test_the_package_can_be_imported_anew():
    importlib.reload(flops)
    assert without_formula() == set()


# ---- one op ----------------------------------------------------------------------------------------------------------

DROP = {"dropout_p": 0.4, "seed": torch.tensor([7])}
MLP = {"x": (2, 5, 24), "fc1_weight": (40, 24), "fc1_bias": (40,), "fc2_weight": (17, 40), "fc2_bias": (17,)}
IMAGE = {"image": (3, 2, 10, 21), "weight": (19, 2, 5, 7)}  # 2 x 3 patches
TOKENS = {**IMAGE, "bias": (19,), "pos_embed": (1, 8, 19), "prefix": (1, 2, 19)}
MASK = {"bool_masked_pos": torch.arange(18).reshape(3, 6) % 3 > 0}
# The op, the shapes of its tensors (None: an argument that is left out) and its options.
CALLS = {
    "linear": ("linear", {"x": (3, 5, 23), "weight": (17, 23), "bias": (17,)}, {}),
    "linear, no bias": ("linear", {"x": (7, 23), "weight": (17, 23), "bias": None}, {}),
    "linear, four dimensions": ("linear", {"x": (2, 3, 1, 23), "weight": (1, 23), "bias": (1,)}, {}),
    "linear, a vector": ("linear", {"x": (23,), "weight": (17, 23), "bias": None}, {}),
    "linear, no rows": ("linear", {"x": (0, 23), "weight": (17, 23), "bias": (17,)}, {}),
    "linear, gelu": ("linear", {"x": (3, 5, 23), "weight": (17, 23), "bias": (17,)}, {"activation": "gelu"}),
    "mlp": ("mlp", MLP, {}),
    "mlp, dropout": ("mlp", MLP, DROP),
    "mlp, no biases": ("mlp", MLP | {"fc1_bias": None, "fc2_bias": None}, {"activation": "quick_gelu"}),
    "attention_qkvpacked": ("attention_qkvpacked", {"qkv": (2, 5, 3, 3, 16)}, {}),
    "attention_qkvpacked, dropout": ("attention_qkvpacked", {"qkv": (1, 7, 3, 2, 24)}, {"return_lse": True, **DROP}),
    "attention_qkvpacked, two tokens": ("attention_qkvpacked", {"qkv": (1, 2, 3, 1, 16)}, {}),
    "attention": ("attention", {"q": (2, 5, 3, 16), "k": (2, 7, 3, 16), "v": (2, 7, 3, 16)}, {}),
    "attention, dropout": ("attention", {"q": (2, 1, 3, 16), "k": (2, 4, 3, 16), "v": (2, 4, 3, 16)}, DROP),
    "patch_embed": ("patch_embed", IMAGE, {}),
    "patch_embed, prefix": ("patch_embed", TOKENS, {}),
    "patch_embed, mask": ("patch_embed", TOKENS | {"mask_token": (1, 1, 19)}, MASK),
    "layer_norm": ("layer_norm", {"x": (2, 5, 24), "weight": (24,), "bias": (24,)}, {}),
    "residual_layer_norm": (
        "residual_layer_norm",
        {"residual": (2, 5, 24), "branch": (2, 5, 24), "weight": (24,), "branch_bias": (24,), "gamma": (24,)}, DROP,
    ),
    "dropout": ("dropout", {"x": (2, 5, 24)}, {"p": 0.4}),
}  # fmt: skip


def count(function, *args, **kwargs):
    """FLOPs of the call, and of the backward to the inputs that require grad."""
    with counter() as found:
        outs = function(*args, **kwargs)
        forward = found.get_total_flops()
        out = next(o for o in (outs if isinstance(outs, tuple) else (outs,))[::-1] if o.requires_grad)
        out.sum().backward()
    return forward, found.get_total_flops() - forward


def counter():
    return FlopCounterMode(display=False)


def as_on_a_gpu():
    return dry_run(90, on_launch=lambda *launch: None)


@pytest.fixture(autouse=True)
def all_tokens(monkeypatch):
    """The last block computes all tokens, as it does with the hooks of a counter; see test_first_token.py."""
    monkeypatch.setattr(Block, "separates", lambda self: False)


def subsets(names):
    return [set(some) for n in range(1, len(names) + 1) for some in itertools.combinations(names, n)]


def count_call(call, wanted, impl):
    op, shapes, options = CALLS[call]
    inputs = {name: shape and randn(*shape).requires_grad_(name in wanted) for name, shape in shapes.items()}
    return count(getattr(kernels, op), **inputs, **options, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("call", CALLS)
def test_an_op_counts_as_its_formula(call, impl):
    """The counts agree for every set of inputs that require grad, with cuBLAS and with our kernel."""
    for wanted in subsets([name for name, shape in CALLS[call][1].items() if shape]):
        if len(wanted & {"k", "v"}) == 1:
            continue  # see the next test
        expected = count_call(call, wanted, "reference")
        with as_on_a_gpu():
            assert count_call(call, wanted, impl) == expected, wanted


def test_gradients_of_keys_and_values_are_one_kernel():
    """It computes both gradients even if one is needed, and the count includes both."""
    for wanted in ({"k"}, {"v"}, {"k", "v"}):
        with as_on_a_gpu():
            assert count_call("attention", wanted, "triton")[1] == 3 * (2 * 2 * 5 * 7 * 3 * 16)


def test_an_op_by_hand(device):
    """Here the kernels run. With ``impl="auto"`` the op calls PyTorch's products, which must not count again."""
    rows, product = 2 * 5, 2 * 3 * 2 * 10 * 21 * 19
    for impl, context in (("triton", torch.enable_grad), ("auto", as_on_a_gpu)):
        where = device if impl == "triton" else "cpu"
        x, fc1, fc2 = (randn(*MLP[n]).to(where).requires_grad_() for n in ("x", "fc1_weight", "fc2_weight"))
        with context(), counter() as found:
            kernels.mlp(x, fc1, None, fc2, None, impl=impl).sum().backward()
        ops = {str(op): n for op, n in found.get_flop_counts()["Global"].items()}
        forward = 2 * rows * (24 * 40 + 40 * 17)
        assert ops == {"vit.mlp_fwd": forward, "vit.mlp_bwd": 2 * forward}
    image, weight = (randn(*IMAGE[n]).to(device).requires_grad_() for n in IMAGE)
    assert count(kernels.patch_embed, image, weight, impl="triton") == (product, 2 * product)
    assert count(kernels.patch_embed, image.detach(), weight, impl="triton") == (product, product)


@pytest.mark.parametrize("received", [False, True])
def test_statistics_of_attention(received):
    """One product, the logits; without what a forward saved, that forward too, which has two. Nothing learns."""
    from benchmarks.trace import trace  # here, because copies of the tests have no benchmarks

    q, k = randn(2, 7, 3, 16), randn(2, 7, 3, 16)
    options = {"grid_size": (2, 3), "num_prefix_tokens": 1, "received": received}
    product, found = 2 * 2 * 7 * 7 * 3 * 16, []
    saved = randn(2, 3, 7), randn(2, 3, 7)
    for given, context in (
        ({"impl": "reference"}, torch.enable_grad),
        ({"saved": saved}, as_on_a_gpu),
        ({}, as_on_a_gpu),
    ):
        with context(), counter() as counted:
            kernels.attention_statistics(q, k, **options, **given)
        found.append(counted.get_total_flops())
    assert found == [product, product, 3 * product]
    q, k = q.to("meta"), k.to("meta")
    launched = trace(lambda: kernels.attention_statistics(q, k, **options))
    flops = {launch.name: launch.flops for launch in launched if launch.kernel is not None}
    statistics = (2 if received else 1) * product  # what a key receives needs the logits again
    assert flops == {"_attention_fwd_kernel": 2 * product, "_attention_statistics_kernel": statistics}


# ---- models ----------------------------------------------------------------------------------------------------------


class NoHooks(ModuleTracker):
    """Without hooks, because with the hooks of PyTorch's tracker a model calls its parts and fuses less."""

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


def unhooked_counter():
    found = counter()
    found.mod_tracker = NoHooks()
    return found


COUNTERS = {"hooks": counter, "no hooks": unhooked_counter}
every_counter = pytest.mark.parametrize("hooks", COUNTERS)


def steps(model, image, hooks, **options):
    """FLOPs of a forward, and of the backward to all that requires grad. no_grad does not change the forward."""
    image = image.clone().requires_grad_(image.requires_grad)
    with COUNTERS[hooks]() as found:
        out = model(image, **options)
        forward = found.get_total_flops()
        out.sum().backward()
    with COUNTERS[hooks]() as inference, torch.no_grad():
        model(image, **options)
    assert inference.get_total_flops() == forward
    return forward, found.get_total_flops() - forward


BASE = vit.ViTConfig(img_size=(24, 40), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
ODD = {
    "img_size": (15, 14), "patch_size": (5, 7), "in_chans": 1, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 2.5,
    "reg_tokens": 3, "no_embed_class": True, "num_classes": 7,
}  # fmt: skip
CONFIGS = {
    "class token": {},
    "odd sizes": ODD,
    "masks": ODD | {"use_mask_token": True},
    "no biases": {"qkv_bias": False, "pre_norm": True, "class_token": False, "global_pool": "avg"},
    "qk_norm, LayerScale": {"qk_norm": True, "init_values": 0.5},
    "dropout": {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2, "drop_rate": 0.2},
    "patch drop": {"patch_drop_rate": 0.4},
    "pre-training head": {"representation_size": 24},
    "all tokens": {"global_pool": ""},
    "attention pool": {"global_pool": "map", "reg_tokens": 1},
}


def by_hand(config, batch):
    """The FLOPs of a forward, and of its patch projection alone."""
    patches, D, L = config.num_patches, config.embed_dim, config.depth
    N = config.num_prefix_tokens + int(patches * (1 - config.patch_drop_rate))
    embed = 2 * patches * D * config.in_chans * config.patch_size[0] * config.patch_size[1]
    blocks = L * (8 * N * D**2 + 4 * N * D * config.mlp_hidden_dim + 4 * N**2 * D)
    if config.mlp_ratio == 4:
        assert blocks == L * (24 * N * D**2 + 4 * N**2 * D)
    wide = config.representation_size
    head = 2 * (D * wide + wide * config.num_classes if wide else D * config.num_classes)
    head *= N if config.global_pool == "" else 1
    if config.global_pool == "map":  # one query, which does not depend on the image: its projection is counted once
        kept = N - config.num_prefix_tokens
        head += 4 * kept * D**2 + 4 * kept * D + 2 * D**2 + 4 * D * config.mlp_hidden_dim + 2 * D**2 / batch
    return batch * (embed + blocks + head), batch * embed


def made(config, impl, device="cpu", learns=lambda name: True):
    """A model in training mode, its image, and the options of its forward."""
    model = vit.VisionTransformer(dataclasses.replace(config, impl=impl), seed=0).train().to(device)
    for name, param in model.named_parameters():
        param.requires_grad_(learns(name))
    image = randn(2, config.in_chans, *config.img_size).to(device).requires_grad_(learns("image"))
    masked = torch.arange(2 * config.num_patches, device=device).reshape(2, -1) % 4 > 0  # three of four, as in MAE
    return model, image, {"bool_masked_pos": masked} if config.use_mask_token else {}


def on_every_path(config, hooks, learns):
    """FLOPs of the eager code on a CPU, and of the fused ops as on a GPU."""
    for impl, context in (("reference", torch.enable_grad), ("auto", torch.enable_grad), ("auto", as_on_a_gpu)):
        model, image, options = made(config, impl, learns=learns)
        with context():
            yield steps(model, image, hooks, **options)


@every_counter
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_by_hand(name, hooks):
    config = dataclasses.replace(BASE, **CONFIGS[name])
    forward, patches = by_hand(config, batch=2)
    for image_learns in (False, True):
        found = on_every_path(config, hooks, lambda name, learns=image_learns: learns or name != "image")
        assert set(found) == {(forward, 2 * forward - (0 if image_learns else patches))}


@every_counter
@pytest.mark.parametrize("name", ["odd sizes", "masks"])
def test_a_model_whose_kernels_run(name, hooks, device):
    config = dataclasses.replace(BASE, **CONFIGS[name])
    model, image, options = made(config, "triton", device)
    forward, _ = by_hand(config, batch=2)
    assert steps(model, image, hooks, **options) == (forward, 2 * forward)


LEARNING = {
    "head": lambda name: name.startswith("head"),
    "biases": lambda name: name.endswith("bias"),
    "norms": lambda name: "norm" in name,
    "second block": lambda name: name.startswith("blocks.1."),
    "a layer of the MLP": lambda name: "blocks.0.mlp.fc2" in name,
    "image": lambda name: name == "image",
    "position embedding": lambda name: name == "pos_embed",
    "all but the patches": lambda name: not name.startswith("patch_embed"),
    "all but queries, keys and values": lambda name: "qkv" not in name,
}


@every_counter
@pytest.mark.parametrize("what", LEARNING)
def test_only_some_of_a_model_learns(what, hooks):
    found = set(on_every_path(BASE, hooks, LEARNING[what]))
    assert len(found) == 1
    (_, backward), (forward, patches) = found.pop(), by_hand(BASE, batch=2)
    inputs = forward + 2 * 2 * 4 * 16**2 * 32  # products for the inputs alone; in attention both operands are inputs
    hand = {"head": 2 * 2 * 32 * 5, "image": inputs, "position embedding": inputs - patches}
    assert backward == hand.get(what, backward)


@pytest.mark.peers
@every_counter
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_an_accelerated_model(impl, hooks, device):
    """timm's attention is not fused here, because the counter does not support PyTorch's fused attention on a CPU."""
    config = vit.ViTConfig(img_size=24, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, reg_tokens=2)
    image, (forward, _) = zoo.images("timm").requires_grad_(), by_hand(config, batch=2)
    model = zoo.timm_model(reg_tokens=2)
    for block in model.blocks:
        block.attn.fused_attn = False
    before = steps(model, image, hooks)
    model = vit.accelerate(model, impl=impl)
    with as_on_a_gpu() if impl == "auto" else torch.enable_grad():
        where = "cpu" if impl == "auto" else device
        assert before == steps(model.to(where), image.to(where), hooks) == (forward, 2 * forward)
