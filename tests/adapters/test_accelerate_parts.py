"""`vit.accelerate` reads what a module holds: each attribute with an unusual value, against the library."""

import copy
import io
import itertools
import sys
import types
import warnings

import pytest
import torch
import zoo
from peers import import_timm, import_transformers, randomise
from test_accelerate import LIBRARIES, assert_close, fused_modules
from test_accelerate_semantics import seeded
from torch import nn

import vit
from vit.adapters import fused, parts
from vit.kernels import runtime

pytestmark = pytest.mark.peers


def compare(name: str, original: nn.Module, change=lambda model: None, image=None) -> nn.Module:
    """Compares an accelerated copy with the original, both after ``change`` and from one random seed."""
    change(original)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name) if image is None else image
    assert_close(seeded(name, model, image), seeded(name, original, image))
    return model


def of_type(model: nn.Module, *types) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, types)]


# ---- attributes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LIBRARIES, "timm scale_norm", "timm CLIP"])
def test_every_norm_has_its_own_eps(name):
    def change(model):
        for index, norm in enumerate(of_type(model, nn.LayerNorm)):
            norm.eps = 0.03 * (index + 1)

    compare(name, zoo.build(name), change)


@pytest.mark.parametrize("affine", [{"elementwise_affine": False}, {"bias": False}], ids=["no weight", "no bias"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_norms_without_parameters(name, affine):
    def change(model):
        for owner in list(model.modules()):
            for child, norm in owner.named_children():
                if isinstance(norm, nn.LayerNorm):
                    setattr(owner, child, nn.LayerNorm(norm.normalized_shape, norm.eps, **affine))
        randomise(model)

    compare(name, zoo.build(name), change)


@pytest.mark.parametrize("name", LIBRARIES)
def test_linears_without_bias(name):
    def change(model):
        for linear in of_type(model, nn.Linear):
            linear.bias = None

    compare(name, zoo.build(name), change)


@pytest.mark.parametrize("p", [1.0, 0.0])
@pytest.mark.parametrize("name", LIBRARIES)
def test_dropout_of_everything_or_nothing(name, p):
    def change(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            for attribute in ("drop_prob", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, p)
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = p

    compare(name, zoo.build(name, train=True), change)


def dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place that can drop: (module, name of its rate)."""
    names = {nn.Dropout: "p", nn.MultiheadAttention: "dropout"}
    found = [(m, next((a for kind, a in names.items() if isinstance(m, kind)), "drop_prob")) for m in model.modules()]
    found += [(m, "attention_dropout") for m in model.modules()]
    return [(m, a) for m, a in found if isinstance(getattr(m, a, None), (int, float))]


@pytest.mark.parametrize("name", ["timm", "timm DeiT", "torchvision", "hf ViT", "hf Dinov2"])
def test_each_dropout_alone_drops(name):
    options = {"drop_path_rate": 0.1} if name == "hf Dinov2" else {}
    original = zoo.hf_model("Dinov2Model", "Dinov2Config", **options) if options else zoo.build(name)
    randomise(original.train())
    model, image, drops = vit.accelerate(copy.deepcopy(original)), zoo.images(name), []
    for of in (original, model):
        places = dropouts(of)
        for place in places:
            setattr(*place, 0.0)
        with torch.no_grad():
            still, seen = zoo.outputs("", of, image), []
            for place in places:
                setattr(*place, 0.5)
                torch.manual_seed(0)
                found = [zoo.outputs("", of, image) for _ in range(3)]
                seen.append(any(not torch.allclose(f[k], still[k], rtol=1e-3) for f in found for k in still))
                setattr(*place, 0.0)
        drops.append(seen)
    assert drops[0] == drops[1] and sum(drops[0]) >= 4


@pytest.mark.parametrize("name", ["timm", "torchvision", "hf ViT", "hf Dinov2"])
def test_parts_in_evaluation_within_a_model_in_training(name):
    """Each module's own ``training`` decides whether it drops out."""

    def change(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.5
            if hasattr(module, "attention_dropout") or isinstance(module, nn.MultiheadAttention):
                setattr(module, "dropout" if isinstance(module, nn.MultiheadAttention) else "attention_dropout", 0.5)
            module.training = not (isinstance(module, nn.Dropout) or "Attention" in type(module).__name__)

    compare(name, zoo.build(name, train=True), change)


def test_every_activation_of_transformers():
    transformers = import_transformers()
    for act in [
        "gelu",
        "gelu_new",
        "gelu_fast",
        "gelu_python",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "relu",
        "silu",
        "tanh",
    ]:
        assert act in transformers.activations.ACT2FN
        name = "hf ViT"
        compare(name, zoo.hf_model("ViTForImageClassification", "ViTConfig", hidden_act=act).eval(), randomise)


def test_every_activation_of_timm():
    for act in ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "mish", "hard_swish"]:
        compare("timm", zoo.timm_model(act_layer=act).eval(), randomise)
    for act in (nn.GELU, lambda: nn.GELU("tanh"), import_timm().layers.GELUTanh, import_timm().layers.GELU):
        compare("timm", zoo.timm_model(act_layer=act).eval(), randomise)


# ---- calls -----------------------------------------------------------------------------------------------------------

MULTIHEAD = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "bias of k and v": {"add_bias_kv": True},
    "a key of zeros": {"add_zero_attn": True},
    "other widths": {"kdim": 24, "vdim": 40},
    "all dropped": {"dropout": 1.0},
}


@pytest.mark.parametrize("made", MULTIHEAD)
def test_multihead_attention_and_all_that_it_takes(made):
    options = MULTIHEAD[made]
    original = nn.ModuleList([zoo.torchvision_model(), nn.MultiheadAttention(32, 2, **{"batch_first": True} | options)])
    randomise(original.train(made == "all dropped"))
    model = vit.accelerate(copy.deepcopy(original))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 5, options.get(w, 32), generator=generator) for w in ("qdim", "kdim", "vdim"))
    sequence = torch.randn(5, 3, 32, generator=generator) if made == "sequence first" else q
    length = sequence.shape[0] if made == "sequence first" else 5
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    padding = torch.zeros(sequence.shape[1 if made == "sequence first" else 0], length, dtype=torch.bool)
    padding[1, 2:] = True
    calls = {
        "self": ((sequence, sequence, sequence), {"need_weights": False}),
        "weights": ((sequence, sequence, sequence), {}),
        "weights of heads": ((sequence, sequence, sequence), {"average_attn_weights": False}),
        "causal": ((sequence, sequence, sequence), {"need_weights": False, "attn_mask": causal, "is_causal": True}),
        "mask": ((sequence, sequence, sequence), {"need_weights": False, "attn_mask": causal}),
        "padding": ((sequence, sequence, sequence), {"need_weights": False, "key_padding_mask": padding}),
        "cross": ((q, 2 * k, v), {"need_weights": False}),
        "other values": ((sequence, sequence, 2 * sequence), {"need_weights": False}),
        "other keys": ((sequence, 2 * sequence, sequence), {"need_weights": False}),
        "other queries": ((2 * sequence, sequence, sequence), {"need_weights": False}),
        "equal values": ((sequence, sequence.clone(), sequence), {"need_weights": False}),
        "one sequence": ((sequence[0], sequence[0], sequence[0]), {"need_weights": False}),
    }
    for label, (args, kwargs) in calls.items():
        if made == "other widths" and label != "cross":
            continue
        if made == "sequence first" and label in ("cross", "one sequence"):
            continue
        found = []
        for of in (model[1], original[1]):
            out, weights = of(*args, **kwargs)
            found.append({"out": out.detach()} | ({} if weights is None else {"weights": weights.detach()}))
        try:
            assert_close(*found)
        except AssertionError as error:
            raise AssertionError(label) from error


CONVOLUTIONS = {
    "padded": {"kernel_size": 8, "stride": 8, "padding": 4},
    "dilated": {"kernel_size": 4, "stride": 4, "dilation": 2},
    "grouped": {"kernel_size": 8, "stride": 8, "groups": 3},
    "overlapping": {"kernel_size": 8, "stride": 4},
    "rectangular": {"kernel_size": (4, 8), "stride": (4, 8)},
    "exchanged": {"kernel_size": (4, 8), "stride": (8, 4)},
    "no bias": {"kernel_size": 8, "stride": 8, "bias": False},
    "valid": {"kernel_size": 8, "stride": 8, "padding": "valid"},
    "reflecting": {"kernel_size": 4, "stride": 4, "padding": 2, "padding_mode": "reflect"},
    "padded in height": {"kernel_size": 8, "stride": 8, "padding": (4, 0)},
    "padded in width": {"kernel_size": 8, "stride": 8, "padding": (0, 4)},
    "dilated in height": {"kernel_size": 4, "stride": 4, "dilation": (2, 1)},
    "dilated in width": {"kernel_size": 4, "stride": 4, "dilation": (1, 2)},
    "overlapping in height": {"kernel_size": 8, "stride": (4, 8)},
    "overlapping in width": {"kernel_size": 8, "stride": (8, 4)},
    "with gaps": {"kernel_size": 4, "stride": (4, 6)},
    "one pixel": {"kernel_size": 1, "stride": 1},
    "one row": {"kernel_size": (1, 8), "stride": (1, 8)},
    "one column": {"kernel_size": (8, 1), "stride": (8, 1)},
}


FUSED_CONVOLUTIONS = ("rectangular", "no bias", "valid", "one row", "one column")


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_other_convolutions_than_a_patch_projection(kind):
    original = zoo.timm_model()
    original.patch_embed.proj = nn.Conv2d(3, 48, **CONVOLUTIONS[kind])
    randomise(original)
    model = vit.accelerate(copy.deepcopy(original))
    image = zoo.images("timm").requires_grad_()
    ours, theirs = model.patch_embed.proj, original.patch_embed.proj
    found = [
        {"out": of(image), "grad": torch.autograd.grad(of(image).square().sum(), image)[0]} for of in (ours, theirs)
    ]
    assert_close(*found)
    assert ours(image).stride() == theirs(image).stride()
    assert ("patch_embed.proj" in fused_modules(model)) == (kind in FUSED_CONVOLUTIONS)


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_beside_the_model_are_left_alone(batch):
    """A stem whose kernel equals its stride, before a BatchNorm2d, whose backward reads the strides."""
    stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.BatchNorm2d(32), nn.GELU(), nn.Conv2d(32, 8, 2, 2), nn.Flatten(1))
    original = nn.ModuleDict({"vit": zoo.timm_model(), "stem": stem})
    randomise(original)
    model = vit.accelerate(copy.deepcopy(original))
    assert not fused_modules(model.stem)
    image, found = zoo.images("timm", batch=batch), []
    for of in (model, original):
        out = of.stem(image)
        of.stem[0](image).view(batch, -1)
        grads = torch.autograd.grad(out.square().sum(), list(of.stem.parameters()))
        found.append({"out": out.detach()} | dict(enumerate(grads)))
    assert_close(*found)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", LIBRARIES)
def test_strides_of_what_fused_modules_return(name, batch, memory):
    """Those of the library, except torchvision's attention: PyTorch's is transposed, ours is contiguous."""
    original = zoo.build(name)
    model = vit.accelerate(copy.deepcopy(original))
    image, seen = zoo.images(name, batch=batch).contiguous(memory_format=memory), []
    for of in (model, original):
        outs = {}

        def keep(part, outs=outs):
            return lambda module, args, out: outs.update({part: out[0] if isinstance(out, tuple) else out})

        for part in fused_modules(model):
            of.get_submodule(part).register_forward_hook(keep(part))
        zoo.outputs(name, of, image)
        seen.append(outs)
    for part, theirs in seen[1].items():
        ours = seen[0][part]
        assert ours.stride() == theirs.stride() or (name == "torchvision" and ours.is_contiguous()), part


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 16), (4, 24), (4, 8), (12, 8)], ids=str)
@pytest.mark.parametrize(("channels", "batch"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_patches_of_grey_images_and_grids_of_one_row_or_column(channels, batch, size, memory):
    """Values, gradients and strides of the convolution, for patches and images that are not square."""
    original = zoo.timm_model(in_chans=channels)
    original.patch_embed.proj = nn.Conv2d(channels, 7, (4, 8), (4, 8))
    randomise(original)
    model, found = vit.accelerate(copy.deepcopy(original)), []
    assert "patch_embed.proj" in fused_modules(model)
    image = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))
    image = image.contiguous(memory_format=memory).requires_grad_()
    for of in (model, original):
        conv = of.patch_embed.proj
        out = conv(image)
        grads = torch.autograd.grad(out.square().sum(), [image, conv.weight, conv.bias])
        found.append({"out": out.detach()} | dict(enumerate(grads)))
    assert_close(*found)
    assert found[0]["out"].stride() == found[1]["out"].stride()


@pytest.mark.parametrize("name", [name for name in LIBRARIES if "hf" not in name])  # transformers refuses one
def test_an_empty_batch(name):
    original = zoo.build(name)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)[:0]
    ours, theirs = zoo.outputs(name, model, image), zoo.outputs(name, original, image)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"gated": True, "qk_norm": True, "scale_norm": True}], ids=str
)
def test_heads_that_are_wider_or_narrower_than_their_share_of_the_width(options):
    """Batch 2, 10 tokens, 3 heads of 16 and 24 elements, in a width of 32 that 3 does not divide."""
    layers = import_timm().layers
    for head_dim in (16, 24):
        original = zoo.timm_model()
        for block in original.blocks:
            sizes = {"num_heads": 3, "attn_head_dim": head_dim, "norm_layer": nn.LayerNorm}
            block.attn = layers.Attention(32, qkv_bias=True, **sizes, **options)
        compare("timm", original.eval(), randomise)


OTHER_NORMS = {
    "none": nn.Identity,
    "RMSNorm": lambda: nn.RMSNorm(16),
    "over the tokens, too": lambda: nn.LayerNorm((10, 16), bias=False),
}


@pytest.mark.parametrize("other", OTHER_NORMS)
@pytest.mark.parametrize("which", ["q_norm", "k_norm"])
def test_queries_and_keys_with_different_norms(which, other):
    """One of the two is no LayerNorm of the last dimension, so the library's attention runs."""
    original = zoo.timm_model(qk_norm=True)
    attention = original.blocks[0].attn
    attention.q_norm, attention.k_norm = nn.LayerNorm(16, bias=False), nn.LayerNorm(16, 0.1, bias=False)
    setattr(attention, which, OTHER_NORMS[other]())
    compare("timm", original.eval(), randomise)


def test_dropouts_around_the_norm_of_the_hidden_units_are_the_librarys():
    """That norm splits the MLP: its two dropouts draw as in the library."""

    def change(model):
        for block in model.blocks:
            block.mlp.drop1.p, block.mlp.drop2.p, block.attn.proj_drop.p = 0.4, 0.2, 0.3

    compare("timm scale_norm", zoo.build("timm scale_norm", train=True), change)


@pytest.mark.parametrize("layer_scale", [None, 0.7])
def test_drop_path_that_does_not_scale_what_it_keeps(layer_scale):
    original = zoo.timm_model(drop_path_rate=0.6, depth=3, init_values=layer_scale).train()
    for path in of_type(original, import_timm().layers.DropPath):
        path.scale_by_keep = False
    compare("timm", original, randomise, zoo.images("timm", batch=5))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_a_drop_path_drops_when_it_trains_whatever_the_block_does(training, p):
    original = zoo.timm_model(drop_path_rate=0.5, init_values=0.7).train(not training)
    for path in of_type(original, import_timm().layers.DropPath):
        path.train(training).drop_prob = p
    compare("timm", original, randomise, zoo.images("timm", batch=5))


@pytest.mark.parametrize("hooked", ["norm2", "norm1", "ls1", "ls2", "drop_path1", "drop_path2", "attn", "mlp"])
def test_drop_path_and_layer_scale_around_a_part_that_is_called(hooked):
    """In the first or the second block: the unfused ops scale and drop the same paths."""
    for index in (0, 1):
        original = zoo.timm_model(drop_path_rate=0.5, init_values=0.7).train()
        original.blocks[0].drop_path1 = import_timm().layers.DropPath(0.3)
        original.blocks[0].drop_path2 = import_timm().layers.DropPath(0.4)

        def change(model, index=index):
            getattr(model.blocks[index], hooked).register_forward_hook(lambda module, args, out: 1.25 * out)
            randomise(model)

        compare("timm", original, change, zoo.images("timm", batch=5))


@pytest.mark.parametrize("hooked", ["norm1", "norm2", "layer_scale1", "layer_scale2", "drop_path", "mlp"])
def test_drop_path_and_layer_scale_of_dinov2_around_a_part_that_is_called(hooked):
    for index in (0, 1):
        original = zoo.hf_model("Dinov2Model", "Dinov2Config", drop_path_rate=0.5).train()

        def change(model, index=index):
            layer = model.encoder.layer[index]
            getattr(layer, hooked).register_forward_hook(lambda module, args, out: 1.25 * out)
            randomise(model)

        compare("", original, change, zoo.images("", batch=5))


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("kinds", list(itertools.product(DTYPES[:3], repeat=2)), ids=str)
def test_dtypes_of_an_add_and_its_norm_are_those_of_the_separate_ops(kinds, with_gamma):
    """For all combinations of the dtypes of stream, branch, weight, bias and LayerScale."""
    timm = import_timm()
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(3, 5, 16, generator=generator).to(kind) for kind in kinds)
    done = 0
    for weight, bias, gamma in itertools.product(DTYPES[:2], DTYPES[:2], DTYPES[:2] if with_gamma else [None]):
        norm, scale = nn.LayerNorm(16), None
        randomise(norm)
        norm.weight.data, norm.bias.data = norm.weight.data.to(weight), norm.bias.data.to(bias)
        if with_gamma:
            scale = timm.layers.LayerScale(16, init_values=0.7)
            scale.gamma.data = scale.gamma.data.to(gamma)
        total = x + (branch if scale is None else scale(branch))
        try:
            want = norm(total)
        except RuntimeError:  # a mix that PyTorch refuses
            continue
        ours = parts.add_norm(x, branch, norm, "auto", scale)
        limit = 1e-5 if {total.dtype, want.dtype, *kinds} == {torch.float32} else 4e-2
        for a, b in zip(ours, (total, want), strict=True):
            torch.testing.assert_close(a, b, rtol=limit, atol=limit)
        done += 1
    assert done


NORMS = {
    "torch": lambda **affine: nn.LayerNorm(16, 1e-3, **affine),
    "timm": lambda **affine: import_timm().layers.LayerNorm(16, 1e-3, **affine),
    "timm fast": lambda **affine: import_timm().layers.LayerNorm(16, 1e-3, **affine),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [{}, {"elementwise_affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_alone_and_its_dtypes(name, affine, autocast):
    """Result, gradient and dtype, or an error, of every mix of dtypes, with and without autocast."""
    if name != "torch" and "elementwise_affine" in affine:
        affine = {"affine": False}
    generator, taken = torch.Generator().manual_seed(0), 0
    kinds = DTYPES[:3] if name == "timm fast" and autocast else DTYPES
    for kind, weight, bias in itertools.product(kinds, DTYPES[:2], DTYPES[:2]):
        original = nn.ModuleList([zoo.timm_model(depth=1), NORMS[name](**affine)])
        randomise(original)
        norm = original[1]
        if name == "timm fast":
            norm._fast_norm = True
        for parameter, dtype in ((norm.weight, weight), (norm.bias, bias)):
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
        model = vit.accelerate(copy.deepcopy(original))
        assert "1" in fused_modules(model)
        (x, direction), found = torch.randn(2, 3, 5, 16, generator=generator).to(kind), []
        for of in (model, original):
            leaf = x.clone().requires_grad_()
            try:
                with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                    out = of[1](leaf)
                found.append({"out": out.detach(), "grad": torch.autograd.grad(out, leaf, direction.to(out.dtype))[0]})
            except RuntimeError:
                found.append(None)
        assert (found[0] is None) == (found[1] is None), (kind, weight, bias)
        if found[0] is not None:
            exact = {found[1]["out"].dtype, kind} <= {torch.float32, torch.float64}
            assert_close(*found, limit=1e-5 if exact else 4e-2)
            taken += 1
    assert taken >= 4


# ---- changes after accelerate ----------------------------------------------------------------------------------------

CLASSES = {
    "timm DINOv2": ["Block", "Attention", "Mlp", "LayerNorm", "LayerScale", "Linear", "Conv2d", "GELU", "Sequential"],
    "torchvision": ["EncoderBlock", "MultiheadAttention", "LayerNorm", "Linear", "Conv2d", "GELU"],
    "hf ViT": ["ViTLayer", "ViTAttention", "ViTMLP", "LayerNorm", "Linear", "GELUActivation", "Conv2d"],
    "hf Dinov2": ["Dinov2LayerScale", "Dinov2Attention"],
}


@pytest.mark.parametrize(("name", "cls"), [(name, cls) for name, classes in CLASSES.items() for cls in classes])
def test_a_class_whose_forward_is_replaced_afterwards_runs_it(name, cls, monkeypatch):
    original = zoo.build(name)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)
    owner = next(type(module) for module in original.modules() if type(module).__name__ == cls)
    before, library = zoo.results(name, model, image), owner.forward

    def doubled(self, *args, **kwargs):
        out = library(self, *args, **kwargs)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out

    with monkeypatch.context() as patch:
        patch.setattr(owner, "forward", doubled)
        assert_close(zoo.results(name, model, image), zoo.results(name, original, image))
    assert_close(before, zoo.results(name, model, image), 0.0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("part", ["mlp.fc1", "mlp.fc2", "attn.proj", "norm2", "mlp", "attn"])
def test_a_forward_borrowed_from_another_module_is_called(part, after):
    """It is a method of the same class, but it computes with the other module's parameters."""
    original = zoo.build("timm")
    model, image = copy.deepcopy(original), zoo.images("timm")
    if after:
        vit.accelerate(model)
    for of in (model, original):
        of.blocks[1].get_submodule(part).forward = of.blocks[0].get_submodule(part).forward
    if not after:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            vit.accelerate(model)
    assert_close(zoo.outputs("timm", model, image), zoo.outputs("timm", original, image))


def test_linears_and_activations_of_our_own_model_count_likewise(monkeypatch):
    model = vit.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5, seed=0).eval()
    image, library = torch.randn(1, 3, 32, 32), nn.Linear.forward
    before = model(image)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * library(self, x))
    assert not torch.allclose(model(image), before, rtol=1e-2)


def test_a_class_exchanged_afterwards_runs_its_own_forward():
    """As token merging does it: ``block.__class__ = ToMeBlock``."""
    timm = import_timm()

    class Halved(timm.models.vision_transformer.Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 0.5 * super().forward(x)

    original = zoo.build("timm DINOv2")
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images("timm DINOv2")
    for of in (model, original):
        for block in of_type(of, timm.models.vision_transformer.Block):
            block.__class__ = Halved
    assert_close(zoo.results("timm DINOv2", model, image), zoo.results("timm DINOv2", original, image))
    assert "blocks.0.attn" in fused_modules(model) and "blocks.0" not in fused_modules(model)


def test_restore_under_a_class_that_somebody_put_on_top():
    """As FSDP2 and parametrisations do."""
    original = zoo.build("timm")
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images("timm")
    for of in (model, original):
        for block in of.blocks:
            block.__class__ = type("On", (type(block),), {"mark": 3})
    assert_close(zoo.results("timm", model, image), zoo.results("timm", original, image))
    vit.restore(model)
    assert not fused_modules(model) and model.blocks[0].mark == 3 and type(model.blocks[0]).__name__ == "On"


class OnTop:
    """A class that a tool puts on top. As with FSDP2, the derived class cannot be imported by name."""

    mark = 3


@pytest.mark.parametrize("name", ["timm", "torchvision", "hf ViT"])
def test_a_copy_under_a_class_that_somebody_put_on_top(name):
    """The copy has that class too, and computes with its own parameters."""
    original = zoo.build(name)
    model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)
    parts_on_top = [part for part in fused_modules(model) if part]
    for part in parts_on_top:
        module = model.get_submodule(part)
        module.__class__ = type("On", (OnTop, type(module)), {})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(type(twin.get_submodule(part)) is type(model.get_submodule(part)) for part in parts_on_top)
    assert_close(zoo.results(name, twin, image), zoo.results(name, original, image))
    vit.restore(twin)
    assert all(twin.get_submodule(part).mark == 3 for part in parts_on_top) and not fused_modules(twin)
    assert_close(zoo.results(name, twin, image), zoo.results(name, original, image))


def test_a_saved_model_is_loaded_without_what_was_patched_meanwhile(monkeypatch):
    """Modules whose class has another forward by then load as the library's, with a warning."""
    timm = import_timm()
    model, image, file = vit.accelerate(zoo.build("timm")), zoo.images("timm"), io.BytesIO()
    torch.save(model, file)
    library = timm.layers.Mlp.forward
    monkeypatch.setattr(timm.layers.Mlp, "forward", lambda self, x: 1.5 * library(self, x))
    with pytest.warns(UserWarning) as caught:
        loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert {str(w.message) for w in caught} == {"timm.layers.mlp.Mlp is not accelerated: call vit.accelerate(model)"}
    assert set(fused_modules(model)) - set(fused_modules(loaded)) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert type(loaded.blocks[0].mlp) is timm.layers.Mlp
    assert_close(zoo.outputs("timm", loaded, image), zoo.outputs("timm", zoo.build("timm"), image))


def test_a_saved_module_of_a_class_that_is_not_known_is_the_librarys():
    with pytest.warns(UserWarning, match=r"^torch\.nn\.modules\.linear\.Linear is not accelerated"):
        assert type(fused.rebuild(nn.Linear, "auto")) is nn.Linear


class Saved(nn.Module):
    """A wrapper like PEFT's ``modules_to_save``: it calls the trained copy, not the original."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.copy = copy.deepcopy(module)

    def forward(self, *args, **kwargs):
        return self.copy(*args, **kwargs)


@pytest.mark.parametrize("part", ["norm1", "attn", "norm2", "mlp"])
@pytest.mark.parametrize("after", [False, True])
def test_a_part_that_is_wrapped_is_called(part, after):
    original = zoo.build("timm")
    model = vit.accelerate(copy.deepcopy(original)) if after else copy.deepcopy(original)
    for of in (model, original):
        wrapped = Saved(getattr(of.blocks[0], part))
        with torch.no_grad():
            for parameter in wrapped.copy.parameters():
                parameter *= 1.5
        setattr(of.blocks[0], part, wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model if after else vit.accelerate(model)
    assert "blocks.0" in fused_modules(model)
    image = zoo.images("timm")
    assert_close(zoo.outputs("timm", model, image), zoo.outputs("timm", original, image))


# ---- versions of the libraries ---------------------------------------------------------------------------------------


def older(cls: type, forward) -> type:
    """The class as in another version of the library."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names | {"forward": forward})


def of_library(function, module: str):
    """The function, as if defined in a module of the library."""
    variables = sys.modules[module].__dict__
    return types.FunctionType(function.__code__, variables, "forward", function.__defaults__, function.__closure__)


@pytest.mark.parametrize("attention", [True, False])
def test_timm_before_its_masks(attention):
    """timm 0.9 to 1.0.24 pass fewer arguments to attention; checked with the real 0.9.16 and 1.0.24."""
    timm = import_timm()
    Block, Attention = timm.models.vision_transformer.Block, timm.layers.Attention
    attend = Attention.forward

    def block(self, x):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def attention_of_then(self, x):
        return attend(self, x)

    forwards = {Block: block, Attention: attention_of_then}
    original = zoo.build("timm")
    for module in original.modules():
        if cls := next((cls for cls in forwards if type(module) is cls), None):
            module.__class__ = older(cls, of_library(forwards[cls], cls.__module__))
    model, image = vit.accelerate(copy.deepcopy(original), attention=attention), zoo.images("timm")
    assert "blocks.0" in fused_modules(model)
    assert_close(zoo.results("timm", model, image), zoo.results("timm", original, image))


def test_timm_before_its_gates_and_its_norms_of_heads_and_hidden_units():
    """There the attention has neither ``norm`` nor ``gate``, and the MLP no ``norm``."""
    timm = import_timm()

    def attention(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = (self.scale * self.q_norm(q) @ self.k_norm(k).mT).softmax(-1) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def mlp(self, x):
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))

    forwards = {timm.layers.Attention: attention, timm.layers.Mlp: mlp}
    for name in ("timm", "timm qk_norm"):
        original = zoo.build(name)
        for module in list(original.modules()):
            if type(module) in forwards:
                cls = type(module)
                module.__class__ = older(cls, of_library(forwards[cls], cls.__module__))
                for later in ("norm", "gate"):
                    if hasattr(module, later):
                        delattr(module, later)
        model, image = vit.accelerate(copy.deepcopy(original)), zoo.images(name)
        assert {"blocks.0.attn", "blocks.1.mlp"} <= set(fused_modules(model))
        assert_close(zoo.results(name, model, image), zoo.results(name, original, image))


@pytest.mark.parametrize("name", ["hf ViT", "hf Dinov2"])
def test_transformers_of_another_version_is_refused(name):
    """transformers 4 and early 5 had layers of the same names; checked with the real 4.46.3 and 5.16.0."""
    model = zoo.build(name)

    def forward(self, hidden_states, head_mask=None, output_attentions=False):
        return (hidden_states,)

    for module in model.modules():
        if type(module).__name__.endswith("Layer"):
            module.__class__ = older(type(module), of_library(forward, type(module).__module__))
    with pytest.raises(ValueError, match=r"its forward is not that of transformers 5\.17 to"):
        vit.accelerate(model)
    assert not fused_modules(model)


# ---- tools that read the operators -----------------------------------------------------------------------------------


def ops(name: str, model: nn.Module) -> list[str]:
    with runtime.record_choices() as choices:
        zoo.outputs(name, model, zoo.images(name))
    return [choice.op for choice in choices]


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_legacy_onnx_exporter_sees_the_library(name, monkeypatch):
    model = vit.accelerate(zoo.build(name))
    assert ops(name, model)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert not ops(name, model)


def test_structural_pruning_sees_the_library(monkeypatch):
    """Torch-Pruning hooks the layers and walks the autograd graph, whose operators it must know."""
    model = vit.accelerate(zoo.build("timm"))
    monkeypatch.setitem(sys.modules, "torch_pruning", types.ModuleType("torch_pruning"))

    def hook(module, args, out):
        pass

    hook.__module__ = "torch_pruning.dependency.graph"
    for module in of_type(model, nn.Linear, nn.LayerNorm, nn.Conv2d):
        module.register_forward_hook(hook)
    assert set(ops("timm", model)) <= {"layer_norm", "patch_embed"}  # modules whose output has its own grad_fn


def test_structural_pruning_sees_the_library_behind_one_hook_among_others(monkeypatch):
    """Its hook is the second one, on one child only."""
    model = vit.accelerate(zoo.build("timm"))
    monkeypatch.setitem(sys.modules, "torch_pruning", types.ModuleType("torch_pruning"))

    def hook(module, args, out):
        pass

    hook.__module__ = "torch_pruning.dependency.graph"
    for child in ("fc2", "drop2"):
        mlp = vit.accelerate(zoo.build("timm")).blocks[0].mlp
        getattr(mlp, child).register_forward_hook(lambda module, args, out: None)
        with runtime.record_choices() as before:
            mlp(torch.ones(1, 3, 32))
        getattr(mlp, child).register_forward_hook(hook)
        with runtime.record_choices() as after:
            mlp(torch.ones(1, 3, 32))
        assert before and not after
    assert ops("timm", model)


class Keywords(nn.Module):
    """Passes its input by keyword."""

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, image):
        return self.module(**{self.name: image})


@pytest.mark.parametrize(
    ("name", "part", "keyword"),
    [
        ("timm", "blocks.0", "x"),
        ("timm", "blocks.0.attn", "x"),
        ("timm", "blocks.0.mlp", "x"),
        ("torchvision", "encoder.layers.encoder_layer_0", "input"),
        ("torchvision", "encoder.layers.encoder_layer_0.mlp", "input"),
    ],
)
def test_fx_sees_the_library_where_the_input_is_a_keyword(name, part, keyword):
    original = zoo.build(name).get_submodule(part)
    model = vit.accelerate(zoo.build(name)).get_submodule(part)
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    graphs = [torch.fx.symbolic_trace(Keywords(of, keyword)) for of in (model, original)]
    assert [str(node.target) for node in graphs[0].graph.nodes] == [str(node.target) for node in graphs[1].graph.nodes]
    assert_close(*({"out": graph(x)} for graph in graphs))


@pytest.mark.parametrize("name", ["timm DINOv2", "timm qk_norm", "torchvision"])
def test_torchscript_and_fx(name):
    """Both read the library's own forward, and the library still works afterwards."""
    original, image = zoo.build(name), zoo.images(name)
    model, want = vit.accelerate(copy.deepcopy(original)), original(image)
    for how in (torch.jit.script, torch.fx.symbolic_trace, lambda m: torch.jit.script(torch.fx.symbolic_trace(m))):
        assert_close({"out": how(model)(image)}, {"out": want})
    assert fused_modules(model)
    assert_close({"out": torch.jit.script(original)(image)}, {"out": want})
    assert_close({"out": torch.jit.script(vit.restore(model))(image)}, {"out": want})


@pytest.mark.parametrize("name", ["hf ViT", "hf Dinov2"])
def test_the_attention_maps_that_are_returned_are_in_the_graph(name):
    original = zoo.build(name, eager=True)
    found = []
    for of in (vit.accelerate(copy.deepcopy(original)), original):
        out = of(zoo.images(name), output_attentions=True)
        for maps in out.attentions:
            maps.retain_grad()
        out.logits.square().sum().backward()
        found.append({str(i): maps.grad for i, maps in enumerate(out.attentions)} | {"logits": out.logits.detach()})
    assert_close(*found, limit=1e-4)
