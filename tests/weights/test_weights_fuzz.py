"""Random configurations, through every dialect and kind of file: the model comes back, or nothing is saved.

THOROUGH=1 (as in CI) draws 600 instead of 100.
"""

import dataclasses
import os
import random
import warnings

import pytest
import torch
from peers import randomise
from test_weights import bits, image

import vit
from vit.weights.dialects import DIALECTS

DRAWS = 600 if os.environ.get("THOROUGH") else 100
KINDS = (".safetensors", ".pt", ".npz", "folder")
PLAIN = {"qk_norm": False, "qkv_bias": True, "pre_norm": False, "init_values": None, "reg_tokens": 0, "fc_norm": None}
PLAIN |= {"final_norm": True, "use_mask_token": False, "representation_size": None, "no_embed_class": False}

FITS = {  # what a dialect needs, besides `PLAIN`
    "dinov2": {"num_classes": 0, "init_values": 0.1},
    "hf_deit": {"reg_tokens": 1, "no_embed_class": False},
    "hf_dinov2": {"num_classes": 0, "init_values": 0.1},
    "hf_dinov2_reg": {"num_classes": 0, "init_values": 0.1, "reg_tokens": 2, "no_embed_class": False},
    "hf_clip": {"num_classes": 0, "pre_norm": True},
    "open_clip": {"num_classes": 0, "pre_norm": True},
    "hf_siglip": {"num_classes": 0, "class_token": False, "global_pool": "map", "no_embed_class": True},
    "big_vision": {"class_token": False, "global_pool": "map", "no_embed_class": True},
}


def draw(rng: random.Random) -> vit.ViTConfig:
    """Any configuration; about half of them fit most dialects."""
    pick, patch = rng.choice, (rng.choice([2, 4]), rng.choice([2, 4]))
    rate = lambda: pick([0.0, 0.0, 0.1, 0.25])  # noqa: E731
    heads, cls, classes = pick([1, 2, 3, 4]), rng.random() < 0.8, pick([0, 2, 5])
    fields = dict(
        img_size=(patch[0] * rng.randint(1, 5), patch[1] * rng.randint(1, 5)),
        patch_size=patch,
        in_chans=pick([1, 3, 4]),
        num_classes=classes,
        global_pool=pick(["token", "avg", "map", ""] if cls else ["avg", "map", ""]),
        embed_dim=heads * pick([4, 6]),
        depth=rng.randint(1, 2),
        num_heads=heads,
        mlp_ratio=pick([0.3, 1.0, 2.0, 7 / 3]),
        qkv_bias=pick([True, False]),
        qk_norm=pick([True, False]),
        init_values=pick([None, 1e-5, 0.1]),
        class_token=cls,
        no_embed_class=pick([True, False]),
        reg_tokens=pick([0, 1, 4]),
        pre_norm=pick([True, False]),
        final_norm=pick([True, True, False]),
        fc_norm=pick([None, True, False]),
        act_layer=pick(["gelu", "gelu_tanh", "quick_gelu"]),
        norm_eps=pick([1e-6, 1e-12, 1e-5, 3e-3]),
        use_mask_token=pick([True, False]),
        representation_size=pick([None, 3, 8]),
        dynamic_img_size=pick([True, False]),
        interpolation=pick(["bicubic_offset", "bicubic", "bicubic_antialias"]),
        drop_rate=rate(),
        pos_drop_rate=rate(),
        proj_drop_rate=rate(),
        act_drop_rate=pick([None, 0.0, 0.3]),
        attn_drop_rate=rate(),
        drop_path_rate=rate(),
        patch_drop_rate=rate(),
        weight_init=pick(["", "zeros", "jax"]),
        impl=pick(["auto", "reference"]),
    )
    assert fields.keys() == vit.ViTConfig.__dataclass_fields__.keys()
    if rng.random() < 0.5:
        fields |= PLAIN | {"global_pool": "token" if cls else "avg", "fc_norm": None if cls else False}
    return vit.ViTConfig(**fields)


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.filterwarnings("ignore:.*models of dialect")
@pytest.mark.parametrize("part", range(4))
def test_configurations_come_back(part, tmp_path):
    pytest.importorskip("safetensors")
    saved = dict.fromkeys(DIALECTS, 0)
    for seed in range(part, DRAWS, 4):
        rng = random.Random(seed)
        config, dialect = draw(rng), rng.choice([*DIALECTS, *["timm"] * 6])
        if rng.random() < 0.5:
            config = dataclasses.replace(config, **PLAIN | FITS.get(dialect, {}))
        model = vit.VisionTransformer(config, seed=0)
        randomise(model, seed)
        if config.reg_tokens == 0 and not config.no_embed_class and rng.random() < 0.5:
            with torch.no_grad():  # so that it fits big_vision
                model.pos_embed[:, : config.num_prefix_tokens] = 0
        model.eval()
        x = image(model, seed)
        where = tmp_path / str(seed)
        where.mkdir()
        path = where / ("folder" if (kind := rng.choice(KINDS)) == "folder" else f"model{kind}")
        try:
            vit.save_pretrained(model, path, dialect)
        except ValueError:
            assert names(where) == [], f"seed {seed}"
            assert dialect != "timm" or kind == "folder"
            continue
        saved[dialect] += 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = vit.load_pretrained(path)
        assert found.config == config, f"seed {seed}"
        with torch.no_grad():
            want = model(x)
            assert torch.equal(found.eval()(x), want), f"seed {seed}"

            start = dataclasses.replace(
                config, norm_eps=0.1, act_layer="gelu", interpolation="bicubic", act_drop_rate=0.0
            )
            live = vit.VisionTransformer(start, seed=1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                vit.load_pretrained(live, path)
            assert live.config == config and bits(live) == bits(found), f"seed {seed}"
            assert torch.equal(live.eval()(x), want), f"seed {seed}"

            sizes = {field: getattr(config, field) for field in vit.weights.fit.NAMED}
            named = vit.load_pretrained("vit_tiny_patch16_224", path, **sizes)
            extra = {"use_mask_token": named.config.use_mask_token} if "dinov2" in dialect else {}
            assert named.config == dataclasses.replace(config, **extra), f"seed {seed}"
            assert torch.equal(named.eval()(x), want), f"seed {seed}"
    assert saved["timm"] > DRAWS / 40 and sum(saved.values()) > DRAWS / 16  # of the quarter that is drawn here
