"""Masked patch prediction against loops in numpy, and against the reference with embeddings swapped by hand."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peers import assert_same, randomise

import vit
from vit.masked import MaskedPatchModel, corrupt, mean_colour

SMALL = vit.ViTConfig(img_size=(16, 24), patch_size=(8, 4), embed_dim=48, depth=2, num_heads=3, in_chans=2)
B, N = 3, 12


def batch(config=SMALL, size=(16, 24), seed=1):
    """(image, colours, selected, masked, swap) with all four fates."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(B, config.in_chans, *size, generator=generator)
    count = size[0] * size[1] // (config.patch_size[0] * config.patch_size[1])
    colours = torch.randint(0, 8**config.in_chans, (B, count), generator=generator)
    selected = torch.rand(B, count, generator=generator) < 0.7
    masked = selected & (torch.rand(B, count, generator=generator) < 0.5)
    swap = torch.arange(count).repeat(B, 1)
    for b, i in (selected & ~masked).nonzero()[::2].tolist():
        swap[b, i] = (i + 5) % count
    assert masked.any() and (selected & ~masked).any() and (swap != torch.arange(count)).any() and not selected.all()
    return image, colours, selected, masked, swap


# ---- the choice of patches -------------------------------------------------------------------------------------------


def test_half_of_each_image_is_selected_and_fares_80_10_10():
    selected, masked, swap = (t.numpy() for t in corrupt(500, 49, (0, 1, 2)))
    assert (selected.dtype, masked.dtype, swap.dtype) == (bool, bool, np.int64)
    fates, hits, froms = {"masked": 0, "swapped": 0, "kept": 0}, np.zeros(49), np.zeros(49)
    for b in range(500):
        assert selected[b].sum() == 24
        for i in range(49):
            hits[i] += selected[b, i]
            moved = swap[b, i] != i
            if not selected[b, i]:
                assert not masked[b, i] and not moved
                continue
            assert not (masked[b, i] and moved) and 0 <= swap[b, i] < 49
            fates["masked" if masked[b, i] else "swapped" if moved else "kept"] += 1
            froms[(swap[b, i] - i) % 49] += moved
    total = 500 * 24  # five standard deviations of a share of 12,000 are 1.8 and 1.4 points
    assert fates["masked"] / total == pytest.approx(0.8, abs=0.019)
    assert fates["swapped"] / total == pytest.approx(0.1, abs=0.014)
    assert fates["kept"] / total == pytest.approx(0.1, abs=0.014)
    assert abs(hits / 500 - 24 / 49).max() < 0.12  # every place; five standard deviations
    assert froms[0] == 0 and froms[1:].min() > 0 and froms.max() < 70  # every distance, 25 on average


def test_the_key_alone_decides():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = corrupt(40, 9, (3, 0, 7))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])
    torch.rand(5)
    assert all(map(torch.equal, first, corrupt(40, 9, (3, 0, 7))))
    assert all(torch.equal(a[:11], b) for a, b in zip(first, corrupt(11, 9, (3, 0, 7)), strict=True))
    for key in ((4, 0, 7), (3, 1, 7), (3, 0, 8), (7, 0, 3)):
        assert not any(map(torch.equal, first, corrupt(40, 9, key)))
    assert len({tuple(row) for row in first[0].tolist()}) > 20  # each image has its own choice


@pytest.mark.parametrize(("patches", "share", "count"), [(1, 0.5, 1), (2, 0.5, 1), (7, 0.5, 3), (10, 0.25, 2)])
def test_few_patches(patches, share, count):
    selected, _, swap = corrupt(300, patches, (0,), share=share)
    assert (selected.sum(1) == count).all() and swap.min() >= 0 and swap.max() < patches
    assert (swap != torch.arange(patches)).any() == (patches > 1)


# ---- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_colours_are_those_of_whole_numbers(channels):
    """⌊8 · Σ v / (255 · pixels)⌋ in integers; also for means on a limit, after normalising and back."""
    levels = np.random.default_rng(0).integers(0, 256, (4, channels, 16, 12))
    levels[:, :, :8, :4] = 255
    levels[1, :, :8, :4] = 0
    for k in range(8):  # a patch whose mean is k/8 exactly: 255 · 32 · k / 8 = 1020 · k in 32 pixels
        levels[k // 2, 0, 8:, 4 * (k % 2) : 4 * (k % 2) + 4] = 0
        patch = levels[k // 2, 0, 8:, 4 * (k % 2) : 4 * (k % 2) + 4].reshape(-1)
        patch[: 4 * k] = 255
        levels[k // 2, 0, 8:, 4 * (k % 2) : 4 * (k % 2) + 4] = patch.reshape(8, 4)
    want = np.zeros((4, 2 * 3), dtype=np.int64)
    for b in range(4):
        for row in range(2):
            for column in range(3):
                for c in range(channels):
                    total = int(levels[b, c, 8 * row : 8 * row + 8, 4 * column : 4 * column + 4].sum())
                    want[b, 3 * row + column] += 8**c * min(8 * total // (255 * 32), 7)
    pixels = torch.tensor(levels, dtype=torch.float32) / 255
    found = mean_colour(pixels, (8, 4))
    assert found.dtype is torch.int64 and np.array_equal(found.numpy(), want) and want.max() == 8**channels - 1
    mean, std = (
        torch.tensor([0.286, 0.5, 0.4])[:channels, None, None],
        torch.tensor([0.353, 0.2, 0.3])[:channels, None, None],
    )
    assert np.array_equal(mean_colour((pixels - mean) / std * std + mean, (8, 4)).numpy(), want)
    assert np.array_equal(mean_colour(pixels.double(), (8, 4)).numpy(), want)


def test_means_on_a_limit_are_in_the_upper_level():
    """Of 700 patches whose mean is k/8 exactly; without tolerance, rounding puts some of them below."""
    rng, patches, want = np.random.default_rng(0), [], []
    for k in range(1, 8):
        for _ in range(100):
            patch = rng.integers(max(0, 64 * k - 256), min(256, 64 * k), 32)
            while (rest := 1020 * k - patch.sum()) != 0:  # 255 · 32 · k / 8
                i = rng.integers(32)
                patch[i] = np.clip(patch[i] + np.sign(rest), 0, 255)
            patches.append(patch.reshape(8, 4))
            want.append(k)
    pixels = torch.tensor(np.hstack(patches), dtype=torch.float32)[None, None] / 255
    again = (pixels - 0.286) / 0.353 * 0.353 + 0.286
    for image in (pixels, again):
        assert mean_colour(image, (8, 4))[0].tolist() == want


# ---- the model -------------------------------------------------------------------------------------------------------


def by_hand(reference, head, image, colours, selected, masked, swap, **options):
    """The reference with its embeddings swapped and masked before the position embedding, and the loss with a loop."""
    config, rows = reference.config, []
    x = reference.patch_embed(image)  # [B, N, D]
    for b in range(len(x)):
        for i in range(x.shape[1]):
            rows.append(reference.mask_token[0, 0] if masked[b, i] else x[b, swap[b, i]])
    x = torch.stack(rows).view_as(x)
    grid = tuple(side // patch for side, patch in zip(image.shape[2:], config.patch_size, strict=True))
    pos = vit.reference.interpolate_pos_embed(reference.pos_embed, config.grid_size, grid, config.interpolation)
    prefix = [t.expand(len(x), -1, -1) for t in (reference.cls_token, reference.reg_token) if t is not None]
    x = torch.cat([*prefix, x + pos], dim=1) if config.no_embed_class else torch.cat([*prefix, x], dim=1) + pos
    x = reference.norm(reference.blocks(reference.norm_pre(x)))
    logits = x[:, config.num_prefix_tokens :] @ head.weight.T + head.bias
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    losses = [-log_p[b, i, colours[b, i]] for b, i in selected.nonzero().tolist()]
    return sum(losses) / len(losses), logits


def assert_as_by_hand(config, size, device, **options):
    model = MaskedPatchModel(config)
    randomise(model)
    reference = vit.reference.VisionTransformer(model.encoder.config)
    reference.load_state_dict(model.encoder.state_dict())
    head = torch.nn.Linear(config.embed_dim, 8**config.in_chans)
    head.load_state_dict(model.head.state_dict())
    inputs = batch(config, size)
    want, want_logits = by_hand(reference.double(), head.double(), inputs[0].double(), *inputs[1:])
    loss, logits = model.to(device)(*(t.to(device) for t in inputs), **options)
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(logits.cpu().double(), want_logits, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(want, [*reference.parameters(), *head.parameters()])
    names = [name.removeprefix("encoder.") for name, _ in model.named_parameters()]
    keep = [i for i, name in enumerate(names) if "qkv.bias" not in name]  # the part of the keys is exactly 0
    assert names == [n for n, _ in reference.named_parameters()] + ["head.weight", "head.bias"]
    assert_same({names[i]: found[i].cpu().double() for i in keep}, {names[i]: wanted[i] for i in keep}, 1e-4)


@pytest.mark.parametrize(
    "fields",
    [{}, {"in_chans": 1, "reg_tokens": 2, "no_embed_class": True}, {"class_token": False, "in_chans": 3}],
    ids=str,
)
def test_loss_and_gradients(fields):
    fields = {"global_pool": "avg"} | fields if "class_token" in fields else fields
    assert_as_by_hand(dataclasses.replace(SMALL, **fields), (16, 24), "cpu")


def test_another_size_than_the_models():
    assert_as_by_hand(SMALL, (8, 40), "cpu", interpolate_pos_encoding=True)


def test_kernels(device):
    assert_as_by_hand(dataclasses.replace(SMALL, depth=1, impl="triton"), (16, 24), device)


def test_what_is_left_out_means_all_patches_and_no_corruption():
    model = MaskedPatchModel(SMALL, seed=0)
    image, colours, selected, masked, swap = batch()
    loss, logits = model(image, colours)
    torch.testing.assert_close(loss, F.cross_entropy(logits.mT, colours))
    own = torch.arange(N).repeat(B, 1)
    none = torch.zeros_like(masked)
    assert torch.equal(model(image, colours, ~none, none, own)[0], loss)
    assert model(image, colours, none)[0] == 0.0
    hidden = image.clone()
    hidden[:, :, :8, :4] = 1e4  # the first patch, masked and not swapped to another place, has no effect
    masked[:, 0] = selected[:, 0] = True
    swap[swap == 0] = 1
    found, want = (model(x, colours, selected, masked, swap)[0] for x in (hidden, image))
    assert torch.equal(found, want)


def test_it_learns_the_colours_of_hidden_patches():
    """Images of one colour: 30 steps bring the loss of the masked patches far below that of a guess."""
    config = vit.ViTConfig(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, in_chans=1, weight_init="jax")
    model = MaskedPatchModel(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels = torch.rand(64, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 16, 16)
    for step in range(30):
        loss, logits = model(2 * pixels - 1, mean_colour(pixels, (4, 4)), *corrupt(64, 16, (0, 0, step)))
        if step == 0:
            assert logits.shape == (64, 16, 8) and loss.item() == pytest.approx(np.log(8), abs=0.15)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.2


def test_initial_head_seed_and_dtype():
    config = dataclasses.replace(SMALL, in_chans=3, num_classes=7, global_pool="avg", fc_norm=True)
    a, b = (MaskedPatchModel(config, seed=7, dtype=torch.bfloat16) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.head.weight.shape == (512, 48) and not a.head.bias.any() and a.head.weight.dtype is torch.bfloat16
    assert a.head.weight.float().std().item() == pytest.approx(0.02, rel=0.03)
    assert (a.encoder.config.num_classes, a.encoder.config.global_pool) == (0, "") and a.encoder.mask_token is not None
    image, *others = batch(config)
    loss, logits = a(image.bfloat16(), *others)
    assert loss.dtype is torch.float32 and logits.dtype is torch.bfloat16
    want = F.cross_entropy(logits.double()[others[1]], others[0][others[1]])
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"in_chans=5 has 8\^5 colours; use at most 4 channels"):
        MaskedPatchModel(dataclasses.replace(SMALL, in_chans=5))
    model = MaskedPatchModel(dataclasses.replace(SMALL, patch_drop_rate=0.5), seed=0)
    image, colours, selected, masked, swap = batch()
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        model(image, colours)
    model.eval()
    for wrong, kind, message in (
        ((colours[:, 1:],), ValueError, r"colours must have shape \[3, 12\], images and patches, got \(3, 11\)"),
        ((colours.float(),), TypeError, r"colours must be torch.int64, got torch.float32"),
        ((colours, selected.long()), TypeError, "selected must be torch.bool, got torch.int64"),
        ((colours, selected[:2]), ValueError, "selected must have shape"),
        ((colours, selected, masked[:2]), ValueError, "bool_masked_pos must have shape"),
        ((colours, selected, masked, swap[0]), ValueError, "swap must have shape"),
        ((colours, selected, masked, swap.int()), TypeError, "swap must be torch.int64, got torch.int32"),
    ):
        with pytest.raises(kind, match=message):
            model(image, *wrong)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(image[:, :, :8], colours)
