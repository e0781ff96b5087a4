"""The fast model against timm: logits and every gradient from one state dict, on the CPU and through the kernels."""

import dataclasses

import pytest
import torch
from peers import assert_same, outputs_and_gradients, randomise, timm_twin

import vit

pytestmark = pytest.mark.peers

SMALL = vit.ViTConfig(img_size=(24, 40), patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7)
CASES = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "all tokens": {"global_pool": ""},
    "registers, no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "LayerScale": {"init_values": 0.3},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no qkv bias": {"qkv_bias": False},
    "tuple patch": {"img_size": (24, 20), "patch_size": (8, 4)},
    "tanh GELU": {"act_layer": "gelu_tanh"},
    "quick GELU": {"act_layer": "quick_gelu"},
    "CLIP": {"pre_norm": True, "norm_eps": 1e-5},
    "no final norm": {"final_norm": False},
    "qk_norm": {"qk_norm": True},
    "patch drop": {"patch_drop_rate": 0.4},
}


def assert_matches_timm(config: vit.ViTConfig, device, limit: float) -> None:
    theirs = timm_twin(config).to(device)
    randomise(theirs)
    ours = vit.VisionTransformer(config).to(device)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.randn(2, config.in_chans, *config.img_size, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)  # of the patches that are dropped
        found.append(outputs_and_gradients(model, model, image))
    assert_same(*found, limit)


@pytest.mark.parametrize("case", CASES)
def test_cpu_path_matches_timm(case):
    assert_matches_timm(dataclasses.replace(SMALL, **CASES[case]), "cpu", 2e-5)


@pytest.mark.parametrize("case", ["token", "registers, no_embed_class", "LayerScale", "tanh GELU", "CLIP", "qk_norm"])
def test_kernels_match_timm(case, device):
    config = dataclasses.replace(SMALL, depth=1, impl="triton", **CASES[case])
    assert_matches_timm(config, device, 2e-5)
