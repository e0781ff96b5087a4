"""Small models of timm, Hugging Face and torchvision, and functions to call them."""

from __future__ import annotations

import functools
import importlib

import torch
from peers import import_timm, import_transformers, randomise
from torch import Tensor, nn


def timm_model(**options) -> nn.Module:
    timm = import_timm()
    small = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.VisionTransformer(**small | options)


def _quick_gelu(**options) -> nn.Module:
    return timm_model(act_layer=import_timm().layers.QuickGELU, **options)


def _gated() -> nn.Module:
    model = timm_model()
    for block in model.blocks:
        block.attn = import_timm().layers.Attention(32, num_heads=2, qkv_bias=True, gated=True)
    return model


def _pooling(**options) -> nn.Module:
    model = timm_model(global_pool="map")
    model.attn_pool = import_timm().layers.AttentionPoolLatent(32, num_heads=2, **options)
    return model


def _naflex(**options) -> nn.Module:
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "pos_embed_grid_size": (3, 3)} | options
    return import_timm().models.naflexvit.NaFlexVit(import_timm().models.naflexvit.NaFlexVitCfg(**small), num_classes=5)


def blocks(cls: str, part: dict | None = None, **options) -> nn.Module:
    block = getattr(import_timm().models.vision_transformer, cls)
    return timm_model(block_fn=functools.partial(block, **part or {}), **options)


def _parts(**parts: str) -> nn.Module:
    return timm_model(**{name: getattr(import_timm().layers, cls) for name, cls in parts.items()})


def _module(name: str):
    import_timm()
    return importlib.import_module(f"timm.models.{name}")


def _of(module: str, model: str, **options) -> nn.Module:
    small = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return getattr(_module(module), model)(**small | options)


def _eva(**options) -> nn.Module:
    return _of("eva", "Eva", **{"num_classes": 5, "use_rot_pos_emb": True, "head_init_scale": 1.0} | options)


def _timm_name(name: str, **options) -> nn.Module:
    return import_timm().create_model(name, pretrained=False, depth=1, num_classes=5, **options)


def hf_model(model: str, config: str, **options) -> nn.Module:
    import_transformers()
    small = {
        "image_size": 24, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "num_labels": 5, "encoder_stride": 8, "layerscale_value": 0.5, "mlp_ratio": 2,
        "pooler_output_size": 32, "projection_dim": 16,
    }  # fmt: skip
    made = _find(config)(**small | options)
    return _find(model)(made)


def _find(path: str) -> type:
    """A class of transformers, by its name or by folder, file and name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"transformers.models.{module}") if module else import_transformers(), name)


def torchvision_model(**options) -> nn.Module:
    import_timm()  # makes torchvision importable
    from torchvision.models.vision_transformer import VisionTransformer

    small = {"image_size": 24, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return VisionTransformer(**small | {"num_classes": 5} | options)


def _vit_b_16() -> nn.Module:
    import_timm()
    from torchvision.models import vit_b_16

    model = vit_b_16(image_size=32, num_classes=5)
    model.encoder.layers = model.encoder.layers[:1]
    return model


MODELS = {
    "timm": timm_model,
    "timm DeiT": lambda: timm_model(class_token=True, qkv_bias=True, drop_path_rate=0.1),
    "timm DINOv2": lambda: timm_model(init_values=0.5, reg_tokens=2, no_embed_class=True),
    "timm CLIP": lambda: _quick_gelu(pre_norm=True, norm_layer=nn.LayerNorm),
    "timm SigLIP": lambda: timm_model(class_token=False, global_pool="map", act_layer="gelu_tanh"),
    "timm MAP": lambda: _pooling(
        latent_len=3,
        latent_dim=24,
        pool_type="avg",
        qk_norm=True,
        pos_embed="abs",
        feat_size=9,
        norm_layer=nn.LayerNorm,
    ),
    "timm MAP, bare": lambda: _pooling(out_features=0, q_proj=False, pool_type=""),
    "timm avg": lambda: timm_model(global_pool="avg", fc_norm=True, qkv_bias=False),
    "timm qk_norm": lambda: timm_model(qk_norm=True),
    "timm scale_norm": lambda: timm_model(scale_attn_norm=True, scale_mlp_norm=True),
    "timm gated": _gated,
    "timm dynamic size": lambda: timm_model(dynamic_img_size=True),
    "timm relu": lambda: timm_model(act_layer="relu"),
    "timm NaFlex": _naflex,
    "timm ResPost": lambda: blocks("ResPostBlock", drop_path_rate=0.1),
    "timm ParallelThings": lambda **options: blocks("ParallelThingsBlock", init_values=0.5, **options),
    "timm ParallelScaling": lambda **options: blocks(
        "ParallelScalingBlock", init_values=0.5, qk_norm=True, qkv_bias=False, **options
    ),
    "timm ParallelScaling, one output": lambda: blocks("ParallelScalingBlock", {"fuse_out_proj": True}),
    "timm EVA": lambda **options: _eva(qkv_fused=False, init_values=0.5, **options),
    "timm EVA, post-norm": lambda: _eva(use_post_norm=True, use_rot_pos_emb=False, qkv_bias=False),
    "timm EVA, mixed RoPE": lambda: _eva(rope_type="mixed", class_token=False, init_values=0.5),
    "timm DINOv3": lambda: _eva(
        rope_type="dinov3", rope_rotate_half=True, use_abs_pos_emb=False, num_reg_tokens=2, init_values=0.5
    ),
    "timm PE": lambda: _eva(
        attn_type="rope", rope_grid_offset=1.0, rope_grid_indexing="xy", use_pre_transformer_norm=True
    ),
    "timm RoPE, grouped": lambda: _eva(
        attn_type="rope", embed_dim=64, num_heads=4, num_kv_heads=2, qkv_fused=False, qk_norm=True
    ),
    "timm NaFlex RoPE": lambda: _naflex(rope_type="axial"),
    "torchvision": torchvision_model,
    "hf ViT": lambda: hf_model("ViTForImageClassification", "ViTConfig"),
    "hf ViTModel": lambda: hf_model("ViTModel", "ViTConfig", hidden_act="gelu_pytorch_tanh", qkv_bias=False),
    "hf masked": lambda: hf_model("ViTForMaskedImageModeling", "ViTConfig"),
    "hf DeiT": lambda: hf_model("DeiTForImageClassification", "DeiTConfig"),
    "hf Dinov2": lambda: hf_model("Dinov2ForImageClassification", "Dinov2Config"),
    "hf Dinov2 registers": lambda: hf_model("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
}
# Some parts of each block have no kernel.
PARTIAL = {
    "timm SwiGLU": lambda: _parts(mlp_layer="SwiGLU"),
    "timm RMSNorm": lambda: _parts(norm_layer="RmsNorm"),
    "timm AIMv2": lambda: _parts(norm_layer="RmsNorm", mlp_layer="SwiGLU"),
    "timm ParallelScaling RMSNorm": lambda: MODELS["timm ParallelScaling"](norm_layer=import_timm().layers.RmsNorm),
    "timm diff": lambda: timm_model(attn_layer="diff"),
    "timm EVA-02": lambda: _eva(swiglu_mlp=True, scale_mlp=True, qkv_fused=False, scale_attn_inner=True),
    "timm EVA, packed SwiGLU": lambda: _eva(swiglu_mlp=True, init_values=0.5, attn_only_layer_scale=True),
    "timm RMSNorm of heads": lambda: _eva(attn_type="rope", qk_norm=True, norm_layer=import_timm().layers.RmsNorm),
    "timm BEiT": lambda: _of("beit", "Beit", init_values=0.5, use_rel_pos_bias=True),
    "timm BEiT, one bias": lambda: _of("beit", "Beit", use_shared_rel_pos_bias=True),
    "timm RelPos": lambda: _of("vision_transformer_relpos", "VisionTransformerRelPos", init_values=0.5),
    "timm RelPos, post-norm": lambda: _of(
        "vision_transformer_relpos",
        "VisionTransformerRelPos",
        block_fn=_module("vision_transformer_relpos").ResPostRelPosBlock,
    ),
    "timm DeepSeek": lambda: _of("deepseek_vit", "DeepseekVitEncoder", global_pool="avg"),
    "hf DINOv3 SwiGLU": lambda: hf_model("DINOv3ViTModel", "DINOv3ViTConfig", use_gated_mlp=True, hidden_act="silu"),
    "hf Dinov2 SwiGLU": lambda: hf_model("Dinov2Model", "Dinov2Config", use_swiglu_ffn=True),
}
_VIDEO = {"num_frames": 2, "tubelet_size": 2}
_MAE = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
_KOSMOS2, _IDEFICS2 = "kosmos2.{}_kosmos2.Kosmos2Vision{}", "idefics2.{}_idefics2.Idefics2Vision{}"
_IDEFICS3, _SMOLVLM = "idefics3.{}_idefics3.Idefics3Vision{}", "smolvlm.{}_smolvlm.SmolVLMVision{}"
# Rows of `vit.adapters.huggingface`: a model, its configuration, and options besides those of `hf_model`.
TOWERS = {
    "hf MAE": ("ViTMAEForPreTraining", "ViTMAEConfig", _MAE | {"decoder_intermediate_size": 32}),
    "hf MSN": ("ViTMSNForImageClassification", "ViTMSNConfig"),
    "hf I-JEPA": ("IJepaModel", "IJepaConfig"),
    "hf AST": (
        "ASTForAudioClassification",
        "ASTConfig",
        {"max_length": 24, "num_mel_bins": 24, "frequency_stride": 8, "time_stride": 8},
    ),
    "hf ViViT": ("VivitForVideoClassification", "VivitConfig", _VIDEO | {"tubelet_size": (2, 8, 8)}),
    "hf Pixio": ("PixioModel", "PixioConfig"),
    "hf TIPSv2": ("Tipsv2VisionModel", "Tipsv2VisionConfig"),
    "hf RADIO": ("RadioModel", "RadioConfig", {"max_img_size": 24, "mlp_ratio": 2.0}),
    "hf DINOv3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 2, "proj_bias": True}),
    "hf CLIP": ("CLIPVisionModelWithProjection", "CLIPVisionConfig"),
    "hf MetaCLIP 2": ("MetaClip2VisionModel", "MetaClip2VisionConfig"),
    "hf AltCLIP": ("AltCLIPVisionModel", "AltCLIPVisionConfig"),
    "hf Chinese-CLIP": ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    "hf CLIPSeg": ("CLIPSegVisionModel", "CLIPSegVisionConfig"),
    "hf OWL-ViT": ("OwlViTVisionModel", "OwlViTVisionConfig"),
    "hf OWLv2": ("Owlv2VisionModel", "Owlv2VisionConfig"),
    "hf GIT": ("GitVisionModel", "GitVisionConfig"),
    "hf Kosmos-2": (_KOSMOS2.format("modeling", "Model"), _KOSMOS2.format("configuration", "Config")),
    "hf SigLIP": ("SiglipVisionModel", "SiglipVisionConfig"),
    "hf SigLIP 2": ("Siglip2VisionModel", "Siglip2VisionConfig", {"num_patches": 9}),
    "hf Idefics2": (_IDEFICS2.format("modeling", "Transformer"), _IDEFICS2.format("configuration", "Config")),
    "hf Idefics3": (_IDEFICS3.format("modeling", "Transformer"), _IDEFICS3.format("configuration", "Config")),
    "hf SmolVLM": (_SMOLVLM.format("modeling", "Transformer"), _SMOLVLM.format("configuration", "Config")),
    "hf BLIP": ("BlipVisionModel", "BlipVisionConfig"),
    "hf BLIP-2": ("Blip2VisionModel", "Blip2VisionConfig"),
    "hf InstructBLIP": ("InstructBlipVisionModel", "InstructBlipVisionConfig"),
    "hf InstructBLIP video": ("InstructBlipVideoVisionModel", "InstructBlipVideoVisionConfig"),
    "hf YOLOS": ("YolosForObjectDetection", "YolosConfig", {"image_size": [24, 24], "num_detection_tokens": 3}),
    "hf DPT": ("DPTModel", "DPTConfig", {"backbone_out_indices": [0, 1], "neck_hidden_sizes": [8] * 4}),
    "hf VideoMAE": ("VideoMAEForVideoClassification", "VideoMAEConfig", _VIDEO),
    "hf ViTPose": ("VitPoseBackbone", "VitPoseBackboneConfig", {"image_size": [24, 24], "patch_size": [8, 8]}),
}
TOWERS = {
    name: functools.partial(hf_model, model, config, **dict(*options))
    for name, (model, config, *options) in TOWERS.items()
}
REAL = {
    "vit_base_patch16_224": lambda: _timm_name("vit_base_patch16_224", img_size=32),
    "vit_small_patch14_reg4_dinov2": lambda: _timm_name("vit_small_patch14_reg4_dinov2", img_size=28),
    "vit_base_patch16_clip_quickgelu_224": lambda: _timm_name("vit_base_patch16_clip_quickgelu_224", img_size=32),
    "vit_base_patch16_siglip_224": lambda: _timm_name("vit_base_patch16_siglip_224", img_size=32),
    "deit3_small_patch16_224": lambda: _timm_name("deit3_small_patch16_224", img_size=32),
    "vit_b_16": _vit_b_16,
}


def build(name: str, *, train: bool = False, eager: bool = False) -> nn.Module:
    """A model in eval() unless ``train``. With ``eager`` the library's attention does not use SDPA."""
    torch.manual_seed(0)
    model = (MODELS | REAL | TOWERS | PARTIAL)[name]()
    randomise(model)
    for module in model.modules():
        if eager and hasattr(module, "fused_attn"):
            module.fused_attn = False
    if eager and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    return model.train(train)


def images(name: str, batch: int = 2, seed: int = 1) -> Tensor:
    height, width = {"timm dynamic size": (16, 40), "vit_small_patch14_reg4_dinov2": (28, 28)}.get(name, (24, 24))
    if name in REAL and height == 24:
        height = width = 32
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def arguments(name: str, image: Tensor) -> dict[str, Tensor]:
    """The keyword arguments of a call of transformers, made from images [B, 3, 24, 24] of 3 × 3 patches."""
    some = (torch.arange(9) % 3 == 0).expand(len(image), 9)
    if name == "hf masked":
        return {"pixel_values": image, "bool_masked_pos": some}
    if name == "hf MAE":
        return {"pixel_values": image, "noise": torch.linspace(0, 7, 9).sin().expand(len(image), 9).to(image)}
    if name == "hf AST":
        return {"input_values": image[:, 0]}
    if name in ("hf ViViT", "hf VideoMAE"):
        return {"pixel_values": torch.stack([image, 0.5 * image.flip(2)], dim=1)}
    if name == "hf SigLIP 2":
        patches, shapes = nn.functional.unfold(image, 8, stride=8).mT, torch.tensor([[3, 3]]).expand(len(image), 2)
        return {"pixel_values": patches, "pixel_attention_mask": torch.ones_like(some), "spatial_shapes": shapes}
    return {"pixel_values": image} if name.startswith("hf") else {}


def outputs(name: str, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """The floating-point tensors that a call returns, by name."""
    call = arguments(name, image)
    out = model(**call) if call else model(image)
    if isinstance(out, Tensor):
        return {"logits": out}
    lists = {f"{k}.{i}": t for k, v in out.items() if isinstance(v, tuple) for i, t in enumerate(v)}
    tensors = {k: v for k, v in (dict(out) | lists).items() if isinstance(v, Tensor) and v.dim() > 0 and k != "mask"}
    return {k: v for k, v in tensors.items() if v.is_floating_point()}


def results(name: str, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs, and gradients of the image and of every parameter for a random gradient of the outputs."""
    image = image.to(next(model.parameters()).dtype).detach().requires_grad_()
    out = outputs(name, model, image)
    generator = torch.Generator().manual_seed(9)
    directed = [o for o in out.values() if o.requires_grad]
    directions = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in directed]
    wanted = {"image": image} | {k: p for k, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(directed, list(wanted.values()), directions, allow_unused=True)
    found = {k: v.detach() for k, v in out.items()}
    return found | {f"grad {k}": g for k, g in zip(wanted, grads, strict=True) if g is not None}
