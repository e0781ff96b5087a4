"""patch_embed: accuracy and gradients, any strides and any patch, mask token, determinism."""

import dataclasses

import numpy as np
import peers
import pytest
import torch
from views import nan_padded

from vit.kernels import configs, patch_embed, reference
from vit.kernels.patch_embed import _layout, patch_embed_bwd, patch_embed_fwd
from vit.testing import as_good, check, check_mirror, check_op


def ours(**inputs):
    return patch_embed(**inputs, impl="triton")


def make(randn, B=2, C=3, patch=(8, 8), grid=(2, 3), D=40, R=1, pos="all", bias=True, token=False):
    """Inputs of one call. ``pos`` is "all", "patches" (the prefix tokens get none) or None."""
    (PH, PW), (rows, columns) = patch, grid
    N = rows * columns
    return {
        "image": randn(B, C, rows * PH, columns * PW),
        "weight": randn(D, C, PH, PW) * (C * PH * PW) ** -0.5,
        "bias": randn(D) if bias else None,
        "pos_embed": None if pos is None else randn(1, N + (R if pos == "all" else 0), D),
        "prefix": randn(1, R, D) if R else None,
    } | ({"mask_token": randn(1, 1, D)} if token else {})


def hide(inputs, share=0.5):
    """A mask for these inputs that hides about ``share`` of the patches, in any order."""
    (B, _, height, width), (_, _, PH, PW) = inputs["image"].shape, inputs["weight"].shape
    draw = torch.rand(B, (height // PH) * (width // PW), generator=torch.Generator().manual_seed(3))
    return (draw < share).to(inputs["image"].device)


def pixels_of(masked, inputs):
    """The mask [B, N] for each pixel, in the shape of the image."""
    (B, C, height, width), (_, _, PH, PW) = inputs["image"].shape, inputs["weight"].shape
    grid = masked.reshape(B, 1, height // PH, width // PW)
    return grid.repeat_interleave(PH, 2).repeat_interleave(PW, 3).expand(-1, C, -1, -1)


CASES = {
    "plain": {},
    "one channel": {"C": 1},
    "four channels": {"C": 4, "patch": (4, 4)},
    "patch 16": {"patch": (16, 16), "grid": (1, 2), "D": 24},
    "patch 14": {"patch": (14, 14), "grid": (1, 2), "D": 24},
    "rectangular patch": {"patch": (4, 6), "grid": (5, 3)},
    "odd patch": {"patch": (7, 5), "grid": (2, 4)},
    "no prefix": {"R": 0},
    "five prefix tokens": {"R": 5},
    "position embedding of patches only": {"R": 5, "pos": "patches"},
    "no position embedding": {"pos": None},
    "weight alone": {"R": 0, "pos": None, "bias": False},
    "odd width": {"D": 100, "B": 1},
    "one patch": {"grid": (1, 1), "B": 3},
    "many tiles": {"B": 3, "grid": (5, 5), "patch": (4, 4), "D": 72},
}


@pytest.mark.parametrize("case", CASES)
def test_patch_embed(randn, dtype, case):
    check_op(ours, reference.patch_embed, make(randn, **CASES[case]), dtype)


MASKED = [
    "plain",
    "odd patch",
    "five prefix tokens",
    "position embedding of patches only",
    "weight alone",
    "many tiles",
]


@pytest.mark.parametrize("case", MASKED)
def test_mask_token(randn, dtype, case):
    inputs = make(randn, **CASES[case], token=True)
    masked = hide(inputs)
    assert 0 < masked.sum() < masked.numel()
    check_op(
        lambda **a: ours(**a, bool_masked_pos=masked),
        lambda **a: reference.patch_embed(**a, bool_masked_pos=masked),
        inputs,
        dtype,
    )


@pytest.mark.peers
@pytest.mark.parametrize("fn", [ours, reference.patch_embed], ids=["triton", "reference"])
def test_mask_token_agrees_with_transformers(randn, fn):
    """The grid is not square. transformers' own masked-image model fails there."""
    transformers = peers.import_transformers()
    from transformers.models.vit.modeling_vit import ViTEmbeddings

    config = transformers.ViTConfig(hidden_size=24, image_size=(8, 12), patch_size=4, hidden_dropout_prob=0.0)
    theirs = ViTEmbeddings(config, use_mask_token=True).double()
    inputs = make(randn, patch=(4, 4), grid=(2, 3), D=24, token=True)
    leaves = {k: t.requires_grad_() for k, t in inputs.items()}
    copies = {k: t.detach().cpu().double().requires_grad_() for k, t in inputs.items()}
    names = {
        "patch_embeddings.projection.weight": "weight", "patch_embeddings.projection.bias": "bias",
        "position_embeddings": "pos_embed", "cls_token": "prefix", "mask_token": "mask_token",
    }  # fmt: skip
    assert {name for name, _ in theirs.named_parameters()} == set(names)
    masked = hide(inputs)
    theirs_out = torch.func.functional_call(
        theirs, {name: copies[k] for name, k in names.items()}, (copies["image"], masked.cpu())
    )
    out, dy = fn(**leaves, bool_masked_pos=masked), randn(2, 7, 24)
    torch.testing.assert_close(out.cpu().double(), theirs_out, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(theirs_out, list(copies.values()), dy.cpu().double())
    for name, a, b in zip(leaves, torch.autograd.grad(out, list(leaves.values()), dy), wanted, strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("fn", [ours, reference.patch_embed], ids=["triton", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_pixels_do_not_matter(randn, dtype, fn, bad):
    """Result and gradients are those of zeros in the masked patches."""
    inputs = {k: t.to(dtype) for k, t in make(randn, patch=(4, 6), grid=(3, 5), D=24, R=2, token=True).items()}
    masked, dy = hide(inputs), randn(2, 17, 24).to(dtype)
    pixels = pixels_of(masked, inputs)
    clean, dirty = (inputs | {"image": inputs["image"].masked_fill(pixels, value)} for value in (0.0, bad))
    expected, got = (grads(i, dy, fn, bool_masked_pos=masked) for i in (clean, dirty))
    for name, a, b in zip(["output", *inputs], expected, got, strict=True):
        assert torch.isfinite(b).all() and torch.equal(a, b), name
    assert not got[1][pixels].any() and got[1][~pixels].any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_none_or_all_masked(randn, dtype, share):
    inputs = {k: t.to(dtype) for k, t in make(randn, patch=(4, 4), D=24, R=2, token=True).items()}
    token, dy = inputs["mask_token"], randn(2, 8, 24).to(dtype)
    masked = hide(inputs, share)
    out, *gradients = grads(inputs, dy, bool_masked_pos=masked)
    gradients = dict(zip(inputs, gradients, strict=True))
    if share == 0.0:  # the same bits as without a mask
        without = {k: t for k, t in inputs.items() if k != "mask_token"}
        for a, b in zip([out, *gradients.values()], grads(without, dy), strict=False):
            assert torch.equal(a, b)
        assert not gradients["mask_token"].any()
    else:
        assert torch.equal(out[:, 2:], (token.float() + inputs["pos_embed"][:, 2:].float()).to(dtype).expand(2, -1, -1))
        assert not any(gradients[k].any() for k in ("image", "weight", "bias"))
        total = dy[:, 2:].double().sum(dim=(0, 1), keepdim=True)
        torch.testing.assert_close(gradients["mask_token"].double(), total, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_unused_mask_token(randn):
    """As in transformers, a call with a mask token does not need a mask."""
    inputs = make(randn, patch=(4, 4), D=24, token=True)
    with_token = ours(**{k: t.requires_grad_() for k, t in inputs.items()})
    without = ours(**(inputs | {"mask_token": None}))
    assert torch.equal(with_token, without)
    with_token.sum().backward()
    assert inputs["mask_token"].grad is None


HALF = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
IMPL = pytest.mark.parametrize("impl", ["triton", "reference"])


def fp32_tokens(inputs, half):
    """The inputs as under autocast: image, weight and bias in 16 bits, the others fp32."""
    return {k: t.to(half) if k in ("image", "weight", "bias") and t is not None else t for k, t in inputs.items()}


@HALF
@pytest.mark.parametrize("case", ["plain", "five prefix tokens", "position embedding of patches only"])
@pytest.mark.parametrize("token", [False, True])
def test_fp32_tokens(randn, half, case, token):
    """An fp32 position embedding and 16-bit pixels give fp32 tokens, without a rounding to 16 bits in between."""
    inputs = fp32_tokens(make(randn, **CASES[case], token=token), half)
    mask = {"bool_masked_pos": hide(inputs)} if token else {}
    dy = randn(*reference.patch_embed(**inputs, **mask).shape)
    got, eager = grads(inputs, dy, **mask), grads(inputs, dy, reference.patch_embed, **mask)
    exact = grads({k: t.double() for k, t in inputs.items()}, dy.double(), reference.patch_embed, **mask)
    assert [t.dtype for t in got] == [torch.float32, *(t.dtype for t in inputs.values())]
    reports = [check(a, b, c, name=n) for n, a, b, c in zip(["output", *inputs], got, eager, exact, strict=True)]
    assert reports[0].rms < 0.02 * reports[0].rms_eager


def mirror(image, weight, bias, pos_embed, prefix, mask_token=None, bool_masked_pos=None):
    """The algorithm of the kernels in PyTorch: fp32, and rounded once. fp32 gradients are rounded for products."""
    projected = torch.nn.functional.conv2d(image.float(), weight.float(), stride=weight.shape[2:]).flatten(2).mT
    projected.register_hook(lambda g: g.to(image.dtype).float())
    tokens = projected if bias is None else projected + bias.float()
    if bool_masked_pos is not None:
        tokens = torch.where(bool_masked_pos[..., None], mask_token.float(), tokens)
    if prefix is not None:
        tokens = torch.cat([prefix.float().expand(len(image), -1, -1), tokens], dim=1)
    if pos_embed is not None:
        tokens = tokens + torch.nn.functional.pad(pos_embed.float(), (0, 0, tokens.shape[1] - pos_embed.shape[1], 0))
    added = next((t for t in (pos_embed, prefix, mask_token) if t is not None), image)
    return tokens.to(added.dtype)


@HALF
@pytest.mark.parametrize("case", MASKED)
def test_as_good_as_its_mirror(randn, half, case):
    """The position embedding is as small as in a model. So a rounding of the projection before the sum would show."""
    inputs = make(randn, **CASES[case], token=True)
    if inputs["pos_embed"] is not None:
        inputs["pos_embed"] *= 0.1
    masked = hide(inputs, 0.1)
    check_mirror(
        lambda **a: ours(**a, bool_masked_pos=masked),
        lambda **a: mirror(**a, bool_masked_pos=masked),
        lambda **a: reference.patch_embed(**a, bool_masked_pos=masked),
        inputs,
        half,
    )


@HALF
def test_fp32_tokens_as_good_as_their_mirror(randn, half):
    inputs = fp32_tokens(make(randn, **CASES["many tiles"], R=2, token=True), half)
    masked, dy = hide(inputs), randn(3, 27, 72)
    mine, mirrors = (grads(inputs, dy, fn, bool_masked_pos=masked) for fn in (ours, mirror))
    wide = {k: t.double() for k, t in inputs.items()}
    exact = grads(wide, dy.double(), reference.patch_embed, bool_masked_pos=masked)
    for name, *tensors in zip(["output", *inputs], mine, mirrors, exact, strict=True):
        as_good(*tensors, name=name)


@HALF
@IMPL
@pytest.mark.parametrize("token", [False, True])
def test_autocast_takes_the_projection_in_16_bits(randn, half, impl, token):
    """The bits are those of a call with image, weight and bias cast. Gradients have the leaves' dtypes."""
    inputs = make(randn, patch=(4, 4), D=24, R=2, token=token)
    mask = {"bool_masked_pos": hide(inputs)} if token else {}
    dy = randn(2, 8, 24)

    def under_autocast(**kwargs):
        with torch.autocast(dy.device.type, half):
            return patch_embed(**kwargs, impl=impl)

    got = grads(inputs, dy, under_autocast, **mask)
    by_hand = grads(fp32_tokens(inputs, half), dy, lambda **kwargs: patch_embed(**kwargs, impl=impl), **mask)
    for name, a, b in zip(["output", *inputs], got, by_hand, strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b.float()), name
    alone = under_autocast(**{k: inputs[k] for k in ("image", "weight", "bias")})
    assert alone.dtype is half  # as for PyTorch's convolution
    with torch.autocast(dy.device.type, half):
        kept = patch_embed(**{k: t.double() for k, t in inputs.items()}, **mask, impl="reference")
    assert kept.dtype is torch.float64


@pytest.mark.peers
@HALF
@IMPL
def test_autocast_agrees_with_timm(randn, half, impl):
    """Dtype and values are those of timm's PatchEmbed, cat and the sum with the position embedding."""
    peers.import_timm()
    from timm.layers import PatchEmbed

    inputs = make(randn, patch=(4, 4), grid=(3, 3), D=24, R=2)
    dy = randn(2, 11, 24)

    def theirs(image, weight, bias, pos_embed, prefix):
        module = PatchEmbed(img_size=12, patch_size=4, in_chans=3, embed_dim=24)
        tokens = torch.func.functional_call(module, {"proj.weight": weight, "proj.bias": bias}, (image,))
        return torch.cat([prefix.expand(2, -1, -1), tokens], dim=1) + pos_embed

    def run(fn, **inputs):
        with torch.autocast(dy.device.type, half):
            return fn(**inputs)

    got = grads(inputs, dy, lambda **a: run(patch_embed, **a, impl=impl))
    eager = grads(inputs, dy, lambda **a: run(theirs, **a))
    exact = grads({k: t.double() for k, t in fp32_tokens(inputs, half).items()}, dy.double(), theirs)
    for name, a, b, c in zip(["output", *inputs], got, eager, exact, strict=True):
        assert a.dtype is b.dtype is torch.float32
        check(a, b, c, name=name)


@HALF
def test_autocast_compile_fullgraph(randn, half):
    inputs = make(randn, patch=(4, 4), D=24, token=True)
    masked, dy = hide(inputs), randn(2, 7, 24)

    def fn(**kwargs):
        with torch.autocast(dy.device.type, half):
            return patch_embed(**kwargs, bool_masked_pos=masked, impl="triton")

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, grads(inputs, dy, fn), grads(inputs, dy, compiled)))


def test_agrees_with_conv2d(randn):
    inputs = make(randn, patch=(4, 6), grid=(5, 3), R=0, pos=None)
    theirs = torch.nn.functional.conv2d(inputs["image"], inputs["weight"], inputs["bias"], stride=(4, 6))
    torch.testing.assert_close(ours(**inputs), theirs.flatten(2).mT, rtol=1e-5, atol=1e-5)


def test_sums_over_many_rows(randn, monkeypatch):
    """dW, db and dpos over 16k patches: sums in bf16 would have a far larger error than eager."""
    plain = configs.patch_embed
    monkeypatch.setattr(
        configs, "patch_embed", lambda *args: dataclasses.replace(plain(*args), block_m=256, block_n=16, block_k=16)
    )
    inputs = make(randn, B=1030, C=1, patch=(4, 4), grid=(4, 4), D=16)
    check_op(ours, reference.patch_embed, inputs, torch.bfloat16)


SHIPPED = sorted(
    {
        (role, dataclasses.astuple(configs.patch_embed(arch, role, dtype, precision))[:4])
        for arch in (80, 89, 90)
        for role in ("fwd", "dw", "dimage")
        for dtype, precision in [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
    }
)


@pytest.mark.parametrize(("role", "blocks"), SHIPPED, ids=str)
def test_shipped_tiles(randn, monkeypatch, role, blocks):
    plain = configs.patch_embed

    def pinned(arch, wanted, dtype, precision):
        return configs.Config(*blocks) if wanted == role else plain(arch, wanted, dtype, precision)

    monkeypatch.setattr(configs, "patch_embed", pinned)
    check_op(ours, reference.patch_embed, make(randn, grid=(3, 3), D=72, patch=(4, 4)), torch.float16)


@pytest.mark.interpreted
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("case", ["five prefix tokens", "position embedding of patches only", "no prefix"])
def test_gradcheck(randn, case, token):
    inputs = make(randn, **(CASES[case] | {"patch": (2, 3), "grid": (2, 2), "D": 5, "C": 2}), token=token)
    masked = hide(inputs) if token else None
    present = {k: t.double().requires_grad_() for k, t in inputs.items() if t is not None}
    assert torch.autograd.gradcheck(
        lambda *args: ours(**dict(zip(present, args, strict=True)), bool_masked_pos=masked),
        tuple(present.values()),
        fast_mode=True,
    )


@pytest.mark.parametrize("token", [False, True])
def test_opcheck(randn, token):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, R=2, token=token)
    masked = hide(inputs) if token else None
    leaves = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(patch_embed_fwd, (*leaves, *([] if token else [None]), masked))
    image, weight = inputs["image"].detach(), inputs["weight"].detach()
    sizes = (list(image.shape), [4, 4], torch.float32, 2)
    torch.library.opcheck(patch_embed_bwd, (randn(2, 6, 16), image, weight, masked, *sizes, 6, True, True, token))
    torch.library.opcheck(patch_embed_bwd, (randn(2, 6, 16), None, weight, masked, *sizes, 0, False, True, False))


def grads(inputs, cotangent, fn=ours, **options):
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    out = fn(**leaves, **options)
    return [out, *torch.autograd.grad(out, list(leaves.values()), cotangent)]


@pytest.mark.parametrize("token", [False, True])
def test_same_bits(randn, dtype, token):
    """A second run, other strides of image and gradient and NaN around the buffers change no bit."""
    inputs = {k: t.to(dtype) for k, t in make(randn, B=5, patch=(4, 4), grid=(3, 2), D=24, R=2, token=token).items()}
    dy = randn(5, 8, 24).to(dtype)
    mask = {"bool_masked_pos": hide(inputs)} if token else {}
    first = grads(inputs, dy, **mask)
    image = inputs["image"]
    wide = torch.full((5, 3, 12, 20), float("nan"), dtype=dtype, device=image.device)
    wide[..., 3:11] = image
    longer = torch.cat([torch.full_like(dy[:, :3], float("nan")), dy], dim=1)
    variants = {
        "again": ({}, dy),
        "channels_last": ({"image": image.contiguous(memory_format=torch.channels_last)}, dy),
        "sliced": ({"image": wide[..., 3:11]}, dy),
        "transposed": ({"image": image.mT.contiguous().mT}, dy),
        "padded": ({k: nan_padded(t) for k, t in inputs.items()}, nan_padded(dy)),
        "offset gradient": ({}, longer[:, 3:]),
        "gradient with another last stride": ({}, dy.mT.contiguous().mT),
        "gradient with the batch last in memory": ({}, dy.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    }
    for name, (change, cotangent) in variants.items():
        for i, (a, b) in enumerate(zip(first, grads(inputs | change, cotangent, **mask), strict=True)):
            assert torch.equal(a, b), f"{name}, tensor {i}"
    if token:
        strided = mask["bool_masked_pos"].mT.contiguous().mT
        assert all(map(torch.equal, first, grads(inputs, dy, bool_masked_pos=strided)))
    one = torch.ones((), dtype=dtype, device=image.device).expand(5, 8, 24)  # the gradient of .sum().backward()
    for a, b in zip(grads(inputs, one.contiguous(), **mask), grads(inputs, one, **mask), strict=True):
        assert torch.equal(a, b)


def test_expanded_image(randn):
    inputs = make(randn, B=1, patch=(4, 4), grid=(2, 2), D=16)
    expanded = inputs | {"image": inputs["image"].expand(3, -1, -1, -1)}
    copied = inputs | {"image": inputs["image"].repeat(3, 1, 1, 1)}
    assert torch.equal(ours(**expanded), ours(**copied))


@pytest.mark.parametrize("dim", range(4))
def test_offsets_beyond_32_bits(randn, device, dim):
    """Strides fit 32 bits, but offsets do not. The memory between the pixels is never touched."""
    inputs = {k: t.half() for k, t in make(randn, B=3, patch=(4, 4), grid=(2, 2), D=16).items()}
    image, dy = inputs["image"], randn(3, 5, 16).half()
    strides = list(torch.empty(image.shape, device="meta").stride())
    strides[dim] = 2**31 // (image.shape[dim] - 1) + 8
    elements = 1 + sum((n - 1) * stride for n, stride in zip(image.shape, strides, strict=True))
    if device.type == "cuda":
        memory = torch.zeros(elements, dtype=torch.float16, device=device)
    else:
        memory = torch.from_numpy(np.zeros(elements, dtype=np.float16))  # unlike torch.zeros, it allocates no pages yet
    far = memory.as_strided(image.shape, strides)
    far.copy_(image)
    assert all(map(torch.equal, grads(inputs, dy), grads(inputs | {"image": far}, dy)))


@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 12), (7, 7)])
def test_promised_alignment(patch):
    """The alignment that the compiler may assume must be true. Otherwise loads fail, but only on a GPU."""
    PH, PW = patch
    image = torch.empty(2, 3, 2 * PH, 3 * PW, device="meta")
    layouts = [
        image,
        image.contiguous(memory_format=torch.channels_last),
        image.mT.contiguous().mT,
        image[:1].expand(2, -1, -1, -1),
    ]
    layouts += [torch.empty(2, 3, 2 * PH, 3 * PW + pad, device="meta")[..., : 3 * PW] for pad in (1, 2, 4, 8)]
    for view in layouts:
        layout = _layout(view, PH, PW)
        starts = torch.tensor(0)
        for n, stride in zip((2, 3, 2 * PH, 3), (*view.stride()[:3], PW * view.stride(3)), strict=True):
            starts = starts[..., None] + torch.arange(n) * stride
        assert not (starts % layout["ALIGN"]).any()
    assert _layout(image, PH, PW)["ALIGN"] == {16: 8, 14: 2, 12: 4, 7: 1}[PW]


def test_gradients_share_no_memory(randn):
    """dpos contains the values of the prefix gradient. Clipping one in place must not scale the other."""
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, R=2)
    storages = [t.untyped_storage().data_ptr() for t in grads(inputs, randn(2, 6, 16))]
    assert len(set(storages)) == len(storages)


def test_empty_batch(randn):
    inputs = make(randn, B=0, patch=(4, 4), grid=(2, 2), D=16, token=True)
    mask = {"bool_masked_pos": hide(inputs)}
    assert reference.patch_embed(**inputs, **mask).shape == (0, 5, 16)
    out, dimage, *parameters = grads(inputs, randn(0, 5, 16), **mask)
    assert out.shape == (0, 5, 16) and dimage.shape == inputs["image"].shape
    assert all(g.shape == inputs[k].shape and not g.any() for k, g in zip(list(inputs)[1:], parameters, strict=True))


@pytest.mark.parametrize("wanted", ["image", "weight", "bias", "pos_embed", "prefix", "mask_token"])
def test_frozen_inputs(randn, wanted):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, R=2, token=True)
    mask, ones = {"bool_masked_pos": hide(inputs)}, torch.ones(2, 6, 16, device=inputs["image"].device)
    everything = dict(zip(inputs, grads(inputs, ones, **mask)[1:], strict=True))
    leaf = inputs[wanted].detach().requires_grad_()
    ours(**(inputs | {wanted: leaf}), **mask).sum().backward()
    assert torch.equal(leaf.grad, everything[wanted])


def test_prefix_alone_saves_no_image(randn):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16)
    inputs["prefix"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(**inputs)
    assert not saved


def test_compile_fullgraph(randn):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, token=True)
    masked = hide(inputs)
    leaves = [t.requires_grad_() for t in inputs.values()]

    def fn(*args):
        return patch_embed(*args[:5], mask_token=args[5], bool_masked_pos=masked, impl="triton")

    direct, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(direct, compiled)
    dy = randn(2, 5, 16)
    assert all(map(torch.equal, torch.autograd.grad(direct, leaves, dy), torch.autograd.grad(compiled, leaves, dy)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.ones(3, 16, 24)}, ValueError, r"image must have shape \[B, C, H, W\], got \(3, 16, 24\)"),
        ({"image": torch.ones(2, 4, 16, 24)}, ValueError, "image has 4 channels"),
        ({"image": torch.ones(2, 3, 16, 23)}, ValueError, "width 23 must be positive multiples of the patch 8 x 8"),
        ({"image": torch.ones(2, 3, 16, 24, dtype=torch.uint8)}, TypeError, r"image must be a floating-point tensor"),
        ({"weight": torch.ones(40, 3, 64)}, ValueError, "weight must have shape"),
        ({"bias": torch.ones(39)}, ValueError, r"bias must have shape \(40,\), got \(39,\)"),
        ({"pos_embed": torch.ones(1, 9, 40)}, ValueError, r"pos_embed must have shape \(1, 7, 40\) or.* \(1, 6, 40\)"),
        ({"prefix": torch.ones(2, 1, 40)}, ValueError, r"prefix must have shape \(1, R, 40\)"),
        ({"bias": torch.ones(40, dtype=torch.float16)}, TypeError, "bias is torch.float16 but image is torch.float32"),
        ({"prefix": torch.ones(1, 1, 40).half()}, TypeError, "prefix is torch.float16 but pos_embed is torch.float32"),
        (
            {"pos_embed": torch.ones(1, 7, 40).half(), "prefix": None, "mask_token": None},
            TypeError,
            "pos_embed is torch",
        ),
        ({"mask_token": torch.ones(1, 40)}, ValueError, r"mask_token must have shape \(1, 1, 40\), got \(1, 40\)"),
        ({"mask_token": None}, ValueError, "bool_masked_pos needs a mask_token"),
        ({"bool_masked_pos": torch.ones(2, 7).bool()}, ValueError, r"must have shape \(2, 6\).* 2 x 3 grid.*\(2, 7\)"),
        ({"bool_masked_pos": torch.ones(6).bool()}, ValueError, r"bool_masked_pos must have shape \(2, 6\)"),
        ({"bool_masked_pos": torch.ones(2, 6)}, TypeError, r"a bool tensor, got torch.float32; .*\.bool\(\)"),
        ({"bool_masked_pos": [True] * 6}, TypeError, "bool_masked_pos must be a bool tensor, got list"),
    ],
)
def test_bad_input(change, error, message):
    inputs = {
        "image": torch.ones(2, 3, 16, 24), "weight": torch.ones(40, 3, 8, 8), "bias": torch.ones(40),
        "pos_embed": torch.ones(1, 7, 40), "prefix": torch.ones(1, 1, 40), "mask_token": torch.ones(1, 1, 40),
        "bool_masked_pos": torch.ones(2, 6).bool(),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        patch_embed(**(inputs | change))


@IMPL
@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (15, 24, "height 15 and width 24"), (16, 20, "height 16 and width 20"), (0, 24, "height 0 and width 24"),
        (16, 0, "height 16 and width 0"), (12, 16, "height 12 and width 16"),
        (16, 16, "height 16 and width 16"), (12, 24, "height 12 and width 24"), (4, 6, "height 4 and width 6"),
    ],
)  # fmt: skip
def test_images_that_are_no_whole_patches(impl, height, width, said):
    """The patch has 8 x 12 pixels. Some sides are multiples of the wrong one."""
    with pytest.raises(ValueError, match=f"^patch_embed: image {said} must be positive multiples of the patch 8 x 12;"):
        patch_embed(torch.ones(2, 3, height, width), torch.ones(5, 3, 8, 12), impl=impl)


@pytest.mark.parametrize("dim", range(4))
def test_a_weight_without_elements(dim):
    shape = [5, 3, 8, 12]
    shape[dim] = 0
    image = torch.ones(2, shape[1], 16, 24)
    with pytest.raises(ValueError, match=r"^patch_embed: weight must have shape \[D, C, PH, PW\], none of them 0"):
        patch_embed(image, torch.ones(shape))


@IMPL
def test_no_prefix_tokens_and_an_empty_prefix_are_one(randn, impl):
    inputs = make(randn, patch=(4, 6), grid=(2, 3), D=16, R=0)
    empty = inputs | {"prefix": randn(1, 0, 16)}
    plain = torch.nn.functional.conv2d(inputs["image"], inputs["weight"], inputs["bias"], stride=(4, 6))
    for given in (inputs, empty):
        found = patch_embed(**given, impl=impl)
        torch.testing.assert_close(found, plain.flatten(2).mT + inputs["pos_embed"], rtol=1e-5, atol=1e-5)


def test_gradients_beside_an_empty_prefix(randn):
    inputs = make(randn, patch=(4, 6), grid=(2, 3), D=16, R=0)
    dy = randn(2, 6, 16)
    found, want = grads(inputs | {"prefix": dy[:1, :0]}, dy), grads(inputs, dy)
    assert found.pop().shape == (1, 0, 16)
    assert all(map(torch.equal, found, want))


@IMPL
def test_a_position_embedding_of_patches_leaves_the_prefix_as_it_is(randn, impl):
    """There are fewer prefix tokens than patches, as many, and more."""
    for R in (1, 6, 7):
        inputs = make(randn, patch=(4, 6), grid=(2, 3), D=16, R=R, pos="patches")
        tokens = patch_embed(**inputs, impl=impl)
        assert torch.equal(tokens[:, :R], inputs["prefix"].expand(2, -1, -1))
        plain = torch.nn.functional.conv2d(inputs["image"], inputs["weight"], inputs["bias"], stride=(4, 6))
        torch.testing.assert_close(tokens[:, R:], plain.flatten(2).mT + inputs["pos_embed"], rtol=1e-5, atol=1e-5)


KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("pixels", KINDS, ids=str)
@pytest.mark.parametrize("added", KINDS, ids=str)
def test_dtypes_that_go_together(pixels, added):
    """All addends have the dtype of the pixels, or fp32 if that has 16 bits. Each alone, too."""
    every = {"pos_embed": (1, 3, 8), "prefix": (1, 1, 8), "mask_token": (1, 1, 8)}
    image, weight = torch.ones(2, 3, 4, 8, dtype=pixels), torch.ones(8, 3, 4, 4, dtype=pixels)
    for names in (list(every), ["pos_embed"], ["prefix"], ["mask_token"]):
        some = {
            n: torch.ones(every[n] if n != "pos_embed" or len(names) > 1 else (1, 2, 8), dtype=added) for n in names
        }
        mask = {"bool_masked_pos": torch.ones(2, 2, dtype=torch.bool)} if "mask_token" in some else {}
        if added is pixels or (added is torch.float32 and pixels in (torch.float16, torch.bfloat16)):
            assert patch_embed(image, weight, **some, **mask).dtype is added
        else:
            with pytest.raises(TypeError, match=f"^patch_embed: {names[0]} is {added} but image is {pixels}"):
                patch_embed(image, weight, **some, **mask)
