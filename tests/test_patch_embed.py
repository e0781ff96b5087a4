"""patch_embed: accuracy and gradients, any strides and any patch, determinism."""

import dataclasses

import numpy as np
import pytest
import torch
from views import nan_padded

from vit.kernels import configs, patch_embed, reference
from vit.kernels.patch_embed import _layout, patch_embed_bwd, patch_embed_fwd
from vit.testing import check_op


def ours(**inputs):
    return patch_embed(**inputs, impl="triton")


def make(randn, B=2, C=3, patch=(8, 8), grid=(2, 3), D=40, R=1, pos="all", bias=True):
    """Inputs of one call. ``pos`` is "all", "patches" (the prefix tokens get none) or None."""
    (PH, PW), (rows, columns) = patch, grid
    N = rows * columns
    return {
        "image": randn(B, C, rows * PH, columns * PW),
        "weight": randn(D, C, PH, PW) * (C * PH * PW) ** -0.5,
        "bias": randn(D) if bias else None,
        "pos_embed": None if pos is None else randn(1, N + (R if pos == "all" else 0), D),
        "prefix": randn(1, R, D) if R else None,
    }


CASES = {
    "plain": {},
    "one channel": {"C": 1},
    "four channels": {"C": 4, "patch": (4, 4)},
    "patch 16": {"patch": (16, 16), "grid": (2, 2)},
    "patch 14": {"patch": (14, 14), "grid": (1, 3)},
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


def test_agrees_with_conv2d(randn):
    inputs = make(randn, patch=(4, 6), grid=(5, 3), R=0, pos=None)
    theirs = torch.nn.functional.conv2d(inputs["image"], inputs["weight"], inputs["bias"], stride=(4, 6))
    torch.testing.assert_close(ours(**inputs), theirs.flatten(2).mT, rtol=1e-5, atol=1e-5)


def test_sums_over_many_rows(randn, monkeypatch):
    """dW, db and the position embedding's gradient over 16k patches: bf16 accumulation would be far off eager."""
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
@pytest.mark.parametrize("case", ["five prefix tokens", "position embedding of patches only", "no prefix"])
def test_gradcheck(randn, case):
    inputs = make(randn, **(CASES[case] | {"patch": (2, 3), "grid": (2, 2), "D": 5, "C": 2}))
    present = {k: t.double().requires_grad_() for k, t in inputs.items() if t is not None}
    assert torch.autograd.gradcheck(
        lambda *args: ours(**dict(zip(present, args, strict=True))), tuple(present.values()), fast_mode=True
    )


def test_opcheck(randn):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, R=2)
    leaves = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(patch_embed_fwd, tuple(leaves))
    image, weight = inputs["image"].detach(), inputs["weight"].detach()
    sizes = (list(image.shape), [4, 4], 2)
    torch.library.opcheck(patch_embed_bwd, (randn(2, 6, 16), image, weight, *sizes, 6, True, True))
    torch.library.opcheck(patch_embed_bwd, (randn(2, 6, 16), None, weight, *sizes, 0, False, True))


def grads(inputs, cotangent):
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items() if t is not None}
    out = ours(**leaves)
    return [out, *torch.autograd.grad(out, list(leaves.values()), cotangent)]


def test_same_bits(randn, dtype):
    """Run to run, for any strides of the image, with NaN around the buffers, for incoming gradients of any strides."""
    inputs = {k: t.to(dtype) for k, t in make(randn, B=5, patch=(4, 4), grid=(3, 2), D=24, R=2).items()}
    dy = randn(5, 8, 24).to(dtype)
    first = grads(inputs, dy)
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
        for i, (a, b) in enumerate(zip(first, grads(inputs | change, cotangent), strict=True)):
            assert torch.equal(a, b), f"{name}, tensor {i}"
    one = torch.ones((), dtype=dtype, device=image.device).expand(5, 8, 24)  # what .sum().backward() hands over
    for a, b in zip(grads(inputs, one.contiguous()), grads(inputs, one), strict=True):
        assert torch.equal(a, b)


def test_expanded_image(randn):
    inputs = make(randn, B=1, patch=(4, 4), grid=(2, 2), D=16)
    expanded = inputs | {"image": inputs["image"].expand(3, -1, -1, -1)}
    copied = inputs | {"image": inputs["image"].repeat(3, 1, 1, 1)}
    assert torch.equal(ours(**expanded), ours(**copied))


@pytest.mark.parametrize("dim", range(4))
def test_offsets_beyond_32_bits(randn, device, dim):
    """Strides that fit 32 bits, offsets that do not. The memory between the pixels is never touched."""
    inputs = {k: t.half() for k, t in make(randn, B=3, patch=(4, 4), grid=(2, 2), D=16).items()}
    image, dy = inputs["image"], randn(3, 5, 16).half()
    strides = list(torch.empty(image.shape, device="meta").stride())
    strides[dim] = 2**31 // (image.shape[dim] - 1) + 8
    elements = 1 + sum((n - 1) * stride for n, stride in zip(image.shape, strides, strict=True))
    if device.type == "cuda":
        memory = torch.zeros(elements, dtype=torch.float16, device=device)
    else:
        memory = torch.from_numpy(np.zeros(elements, dtype=np.float16))  # unlike torch's zeros, not resident
    far = memory.as_strided(image.shape, strides)
    far.copy_(image)
    assert all(map(torch.equal, grads(inputs, dy), grads(inputs | {"image": far}, dy)))


@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 12), (7, 7)])
def test_promised_alignment(patch):
    """What the kernels promise the compiler: a broken promise is a misaligned load, which only a GPU would show."""
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
    """The position embedding's gradient contains the prefix tokens': clipping one in place must not scale the other."""
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, R=2)
    storages = [t.untyped_storage().data_ptr() for t in grads(inputs, randn(2, 6, 16))]
    assert len(set(storages)) == len(storages)


def test_empty_batch(randn):
    inputs = make(randn, B=0, patch=(4, 4), grid=(2, 2), D=16)
    assert reference.patch_embed(**inputs).shape == (0, 5, 16)
    out, dimage, *parameters = grads(inputs, randn(0, 5, 16))
    assert out.shape == (0, 5, 16) and dimage.shape == inputs["image"].shape
    assert all(g.shape == inputs[k].shape and not g.any() for k, g in zip(list(inputs)[1:], parameters, strict=True))


@pytest.mark.parametrize("wanted", ["image", "weight", "bias", "pos_embed", "prefix"])
def test_frozen_inputs(randn, wanted):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16, R=2)
    everything = dict(zip(inputs, grads(inputs, torch.ones(2, 6, 16, device=inputs["image"].device))[1:], strict=True))
    leaf = inputs[wanted].detach().requires_grad_()
    ours(**(inputs | {wanted: leaf})).sum().backward()
    assert torch.equal(leaf.grad, everything[wanted])


def test_prefix_alone_saves_no_image(randn):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16)
    inputs["prefix"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(**inputs)
    assert not saved


def test_compile_fullgraph(randn):
    inputs = make(randn, patch=(4, 4), grid=(2, 2), D=16)
    leaves = [t.requires_grad_() for t in inputs.values()]
    direct = patch_embed(*leaves, impl="triton")
    compiled = torch.compile(lambda *a: patch_embed(*a, impl="triton"), fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.equal(direct, compiled)
    dy = randn(2, 5, 16)
    assert all(map(torch.equal, torch.autograd.grad(direct, leaves, dy), torch.autograd.grad(compiled, leaves, dy)))


def test_double_backward_raises(randn):
    inputs = make(randn, patch=(4, 4), grid=(1, 1), D=16)
    image = inputs["image"].requires_grad_()
    (dimage,) = torch.autograd.grad(ours(**inputs).square().sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dimage.sum().backward()


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
    ],
)
def test_bad_input(change, error, message):
    inputs = {
        "image": torch.ones(2, 3, 16, 24), "weight": torch.ones(40, 3, 8, 8), "bias": torch.ones(40),
        "pos_embed": torch.ones(1, 7, 40), "prefix": torch.ones(1, 1, 40),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        patch_embed(**(inputs | change))
