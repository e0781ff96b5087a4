"""The masked-image model against transformers'; where that one fails, against the reference and F.fold."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from peers import assert_same, import_transformers, outputs_and_gradients, randomise

import vit
from vit.weights.dialects import write

SMALL = vit.ViTConfig(img_size=(16, 24), patch_size=(8, 4), embed_dim=48, depth=2, num_heads=3, in_chans=2)


def hidden(batch, patches, seed=3):
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)) < 0.5


def loss_and_gradients(model, run, image, names=lambda name: name):
    """`outputs_and_gradients` of a loss and a reconstruction together."""
    shape = image.shape[:1]

    def both(x):
        loss, drawn = run(x)
        return torch.cat([loss.expand(*shape, 1), drawn.flatten(1)], dim=1)

    return outputs_and_gradients(model, both, image, names)


@pytest.mark.peers
def test_matches_transformers():
    transformers = import_transformers()
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    described = transformers.ViTConfig(image_size=32, patch_size=8, encoder_stride=8, **sizes)
    theirs = transformers.ViTForMaskedImageModeling(described).double().eval()
    ours = vit.MaskedImageModel(vit.ViTConfig.from_hf(described)).double().eval()
    randomise(ours)
    config = ours.encoder.config
    state = {f"vit.{k}": t for k, t in write("hf_memory", ours.encoder.state_dict(), 2, config.num_heads).items()}
    state |= {"decoder.0.weight": ours.decoder.weight[:, :, None, None], "decoder.0.bias": ours.decoder.bias}
    theirs.load_state_dict(state)
    image, mask = torch.randn(3, 3, 32, 32, dtype=torch.float64), hidden(3, 16)

    def run_theirs(x):
        out = theirs(x, bool_masked_pos=mask)
        return out.loss, out.reconstruction

    found = loss_and_gradients(ours, lambda x: ours(x, mask), image)
    want = loss_and_gradients(theirs, run_theirs, image)
    for name, other in (
        ("output", "output"), ("image", "image"), ("decoder.bias", "decoder.0.bias"),
        ("encoder.mask_token", "vit.embeddings.mask_token"),
        ("encoder.pos_embed", "vit.embeddings.position_embeddings"),
        ("encoder.blocks.0.mlp.fc1.weight", "vit.layers.0.mlp.fc1.weight"),
    ):  # fmt: skip
        torch.testing.assert_close(found[name], want[other], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["decoder.weight"], want["decoder.0.weight"].flatten(1), rtol=1e-6, atol=1e-8)


def by_hand(model, reference, image, mask, **options):
    """The reference encoder, patches placed by F.fold, and the mean error over hidden pixels."""
    config = model.encoder.config
    tokens = reference.forward_features(image, mask, **options)[:, config.num_prefix_tokens :]
    patches = tokens @ model.decoder.weight.T + model.decoder.bias
    drawn = F.fold(patches.mT, image.shape[2:], config.patch_size, stride=config.patch_size)
    cover = mask[:, None].to(image.dtype).expand(-1, config.in_chans * config.patch_size[0] * config.patch_size[1], -1)
    cover = F.fold(cover, image.shape[2:], config.patch_size, stride=config.patch_size).bool()
    return (image - drawn)[cover].abs().mean(), drawn


def assert_as_by_hand(config, size, device, **options):
    ours = vit.MaskedImageModel(config).to(device)
    randomise(ours)
    reference = vit.reference.VisionTransformer(ours.encoder.config).to(device)
    reference.load_state_dict(ours.encoder.state_dict())
    image = torch.randn(2, config.in_chans, *size, generator=torch.Generator().manual_seed(1)).to(device)
    mask = hidden(2, size[0] * size[1] // (config.patch_size[0] * config.patch_size[1])).to(device)
    loss, drawn = ours(image, mask, **options)
    want_loss, want = by_hand(ours, reference, image, mask, **options)
    torch.testing.assert_close(drawn, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    want_loss.backward()
    found = {name: p.grad for name, p in ours.encoder.named_parameters() if "qkv.bias" not in name}
    assert_same(found, {name: p.grad for name, p in reference.named_parameters() if name in found}, 1e-4)


@pytest.mark.parametrize("fields", [{}, {"reg_tokens": 2, "no_embed_class": True}, {"class_token": False}], ids=str)
def test_grids_and_patches_that_are_not_square(fields):
    fields = {"global_pool": "avg"} | fields if "class_token" in fields else fields
    assert_as_by_hand(dataclasses.replace(SMALL, **fields), (16, 24), "cpu")


def test_another_size_than_the_models():
    assert_as_by_hand(SMALL, (8, 40), "cpu", interpolate_pos_encoding=True)


def test_kernels(device):
    assert_as_by_hand(dataclasses.replace(SMALL, depth=1, impl="triton"), (16, 24), device)


def test_without_a_mask_there_is_no_loss():
    model = vit.MaskedImageModel(SMALL, seed=0)
    image = torch.randn(2, 2, 16, 24)
    loss, drawn = model(image)
    assert loss is None and drawn.shape == image.shape
    assert model(image, torch.zeros(2, 12, dtype=torch.bool))[0] == 0.0


def test_seed_and_dtype():
    a, b = (vit.MaskedImageModel(SMALL, seed=7, dtype=torch.bfloat16) for _ in range(2))
    assert all(
        torch.equal(p, q) and p.dtype is torch.bfloat16 for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )
    loss, drawn = a(torch.randn(2, 2, 16, 24, dtype=torch.bfloat16), hidden(2, 12))
    assert loss.dtype is torch.float32 and drawn.dtype is torch.bfloat16


def test_bad_input():
    model = vit.MaskedImageModel(dataclasses.replace(SMALL, patch_drop_rate=0.5))
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        model(torch.randn(2, 2, 16, 24), hidden(2, 12))
    model.eval()
    with pytest.raises(ValueError, match="bool_masked_pos must have shape"):
        model(torch.randn(2, 2, 16, 24), hidden(2, 11))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 500.0), (torch.bfloat16, 1.0)])
def test_the_loss_of_16_bit_models_is_not_summed_in_16_bits(dtype, size):
    """A sum over all hidden pixels would be rounded to 8 bits in bf16, and overflow in fp16."""
    config = vit.ViTConfig(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    model = vit.MaskedImageModel(config, seed=0, dtype=dtype)
    image = (size * torch.randn(3, 3, 64, 64)).to(dtype)
    mask = torch.rand(3, 64) < 0.6
    loss, drawn = model(image, mask)
    hidden = mask.unflatten(1, (8, 8)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(image)
    want = (image.double() - drawn.double()).abs()[hidden].mean()
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=3e-4, atol=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_classes": 7, "representation_size": 20},
        {"global_pool": "avg", "class_token": False},
        {"fc_norm": True},
        {"global_pool": "avg", "fc_norm": True, "use_mask_token": True},
    ],
    ids=str,
)
def test_the_encoder_has_no_head_and_its_norm_before_pooling(fields):
    config = dataclasses.replace(SMALL, **fields)
    before = dataclasses.replace(config)
    model = vit.MaskedImageModel(config, seed=0)
    names = {name.split(".")[1] for name in model.state_dict() if name.startswith("encoder.")}
    assert {"mask_token", "norm", "pos_embed", "patch_embed", "blocks"} <= names
    assert not names & {"head", "fc_norm", "pre_logits"} and config == before
    encoder = model.encoder.config
    assert (encoder.num_classes, encoder.global_pool, encoder.use_mask_token) == (0, "", True)
    changed = ("num_classes", "global_pool", "use_mask_token", "fc_norm", "representation_size")
    assert dataclasses.replace(encoder, **{name: getattr(config, name) for name in changed}) == config


def test_initial_decoder():
    config = vit.ViTConfig(img_size=32, patch_size=(16, 8), embed_dim=64, depth=1, num_heads=2, in_chans=2)
    decoder = vit.MaskedImageModel(config, seed=0).decoder
    assert decoder.weight.shape == (16 * 8 * 2, 64) and not decoder.bias.any()
    assert decoder.weight.std().item() == pytest.approx(0.02, rel=0.03) and abs(decoder.weight.mean()) < 1e-3
    assert all(p.requires_grad for p in decoder.parameters())


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_another_size_only_where_it_was_asked_for(dynamic):
    model = vit.MaskedImageModel(dataclasses.replace(SMALL, dynamic_img_size=dynamic), seed=0)
    image, mask = torch.randn(2, 2, 8, 40), hidden(2, 10)
    assert model(image, mask, True)[1].shape == model(image, None, True)[1].shape == image.shape
    for refused in (False, None)[: 1 if dynamic else 2]:
        with pytest.raises(ValueError, match=r"\(8\*40\) doesn't match model \(16\*24\)"):
            model(image, mask, interpolate_pos_encoding=refused)
    if dynamic:
        assert all(map(torch.equal, model(image, mask), model(image, mask, True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_mean_over_hidden_pixels_of_the_whole_batch(dtype):
    """Not the mean of the images' means. Visible pixels do not count; if all are hidden, all count."""
    model = vit.MaskedImageModel(dataclasses.replace(SMALL, depth=1), seed=0, dtype=dtype)
    image = torch.randn(3, 2, 16, 24, dtype=dtype)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, 4] = mask[1, 7:11] = True  # patches of 8 * 4 pixels in 2 rows of 6; none of the third image
    loss, drawn = model(image, mask)
    off = (image - drawn).abs()
    shown = [off[0, :, 0:8, 16:20], off[1, :, 8:16, 4:20]]
    want = sum(part.sum() for part in shown) / sum(part.numel() for part in shown)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert loss.dtype is dtype and loss.shape == ()
    whole, drawn = model(image, torch.ones_like(mask))
    torch.testing.assert_close(whole, (image - drawn).abs().mean(), rtol=1e-5, atol=0)
    first, drawn = model(image[:1], mask[:1])
    torch.testing.assert_close(first, (image[:1] - drawn).abs()[0, :, 0:8, 16:20].mean(), rtol=1e-5, atol=0)


def test_the_loss_under_autocast_is_fp32():
    model = vit.MaskedImageModel(SMALL, seed=0)
    image, mask = torch.randn(2, 2, 16, 24), hidden(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        loss, drawn = model(image, mask)
    assert loss.dtype is torch.float32 and drawn.dtype is torch.bfloat16
    torch.testing.assert_close(loss, model(image, mask)[0], rtol=0.02, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
