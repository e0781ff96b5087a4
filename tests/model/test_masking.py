"""Masked patches: the mask token replaces the patch completely."""

import dataclasses

import pytest
import torch
from peers import assert_same, outputs_and_gradients, randomise
from test_vit import SMALL, assert_parity

import vit
from vit.reference import VisionTransformer as Reference

MASKED = dataclasses.replace(SMALL, use_mask_token=True)
MASK = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) < 0.5


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"pre_norm": True}], ids=str)
def test_masked_model(options):
    assert_parity(dataclasses.replace(MASKED, **options), torch.float32, "cpu", bool_masked_pos=MASK)


def test_masked_model_with_kernels(device):
    config = dataclasses.replace(MASKED, depth=1, impl="triton")
    assert_parity(config, torch.float32, device, bool_masked_pos=MASK.to(device))


def test_mask_of_another_grid():
    mask = torch.rand(2, 6 * 3, generator=torch.Generator().manual_seed(0)) < 0.5
    options = {"bool_masked_pos": mask, "interpolate_pos_encoding": True}
    assert_parity(MASKED, torch.float32, "cpu", size=(48, 24), **options)


@pytest.mark.parametrize("kind", ["fast", "reference", "kernels"])
def test_hidden_pixels_do_not_matter(kind, device):
    if kind == "reference":
        model = Reference(dataclasses.replace(MASKED, depth=1))
    else:
        model = vit.VisionTransformer(
            dataclasses.replace(MASKED, depth=1, impl="triton" if kind == "kernels" else "auto")
        )
    where = device if kind == "kernels" else "cpu"
    model = model.to(where)
    randomise(model)
    mask = MASK.to(where)
    image = torch.randn(2, 3, 32, 48).to(where)
    pixels = mask.reshape(2, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(image)
    found = []
    for hidden in (0.0, float("nan"), float("inf")):
        found.append(outputs_and_gradients(model, lambda x: model(x, mask), torch.where(pixels, hidden, image)))
        assert not found[-1]["image"][pixels].any() and found[-1]["image"][~pixels].any()
    for other in found[1:]:
        assert all(torch.equal(found[0][k], other[k]) for k in found[0])
    all_hidden = outputs_and_gradients(model, lambda x: model(x, torch.ones_like(mask)), image)
    assert not all_hidden["patch_embed.proj.weight"].any() and all_hidden["mask_token"].any()


@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference], ids=["fast", "reference"])
def test_without_a_mask(cls):
    model = cls(MASKED, 0)
    plain = cls(SMALL, 0)
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == ["mask_token"] and not missing.missing_keys and not model.mask_token.any()
    randomise(plain)
    model.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(2, 3, 32, 48)
    want = outputs_and_gradients(plain, plain, image)
    params = {name: p for name, p in model.named_parameters() if name != "mask_token"}
    model.named_parameters = params.items  # autograd raises for the unused token
    assert_same(outputs_and_gradients(model, model, image), want, 0.0)
    nothing = torch.zeros_like(MASK)
    assert_same({"output": model(image, nothing)}, {"output": want["output"]}, 1e-6)


@pytest.mark.parametrize("cls", [vit.VisionTransformer, Reference], ids=["fast", "reference"])
@pytest.mark.parametrize(
    ("config", "mask", "error", "message"),
    [
        (SMALL, MASK, ValueError, "bool_masked_pos needs a mask token; make the model with use_mask_token=True"),
        (MASKED, MASK.float(), TypeError, r"must be a bool tensor, got torch.float32; pass bool_masked_pos.bool\(\)"),
        (MASKED, MASK[:1], ValueError, r"must have shape \[2, 24\] for the 4\*6 patches of each image, got \(1, 24\)"),
        (MASKED, MASK.reshape(2, 4, 6), ValueError, r"must have shape \[2, 24\].*got \(2, 4, 6\)"),
    ],
)
def test_bad_masks(cls, config, mask, error, message):
    with pytest.raises(error, match=message):
        cls(config)(torch.ones(2, 3, 32, 48), mask)
