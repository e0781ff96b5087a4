"""Accelerated models of timm and transformers: output and every gradient against the same model in fp64."""

from __future__ import annotations

import torch
from torch import nn

import vit
from benchmarks.gpu_stages import cases
from benchmarks.log import Log, name_of
from vit.commands.parity import CannotStart
from vit.commands.parity import library as import_library
from vit.testing.parity import copies, enough_draws, example, parity, widen

# Library, its name of the model, and name and fields of the same architecture in this package.
MODELS = (
    ("timm", "vit_base_patch16_224", "vit_base_patch16_224", {}),
    ("transformers", "ViT-B/16", "vit_base_patch16_224", {"norm_eps": 1e-12}),
    ("timm", "vit_huge_patch14_224", "vit_huge_patch14_224", {}),
    ("timm", "vit_small_patch14_dinov2", "vit_small_patch14_224", {"img_size": 518, "init_values": 1e-5}),
    ("timm", "vit_large_patch16_224", "vit_large_patch16_224", {}),
    ("timm", "vit_base_patch16_384", "vit_base_patch16_384", {}),
)
TINY = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}


def peers(log: Log, rehearse: bool) -> None:
    """If a library is not installed, this package's own model is compared with its reference instead."""
    device, impl = cases.device(rehearse), "triton" if rehearse else "auto"
    for library, name, *own in MODELS[:1] if rehearse else MODELS:
        for dtype in (torch.float32,) if rehearse else (torch.bfloat16, torch.float16):
            try:
                model, what = _model(library, name, rehearse), f"{library}: {name}"
            except CannotStart as error:
                fields = {"num_classes": 1000} | own[1] | (TINY if rehearse else {})
                model, what = vit.create_model(own[0], **fields), f"this package's {own[0]} ({error})"
            widen(model, torch.Generator().manual_seed(0))
            images = example(model, batch=2).to(device, dtype)
            models = copies(model, images, impl)
            draws = enough_draws(models)
            reports = parity(models, images, draws=draws)
            failed = [report for report in reports if not report.ok]
            worst = max(reports, key=lambda report: report.share)
            log.add(
                ok=not failed, model=what, dtype=name_of(dtype), images=list(images.shape),
                draws=draws, count=len(reports), failed=[str(report) for report in failed[:20]], worst=str(worst),
                tensors=[str(report) for report in reports],
            )  # fmt: skip
            del models, model


def _model(name_of_library: str, name: str, rehearse: bool) -> nn.Module:
    library = import_library(name_of_library)
    if name_of_library == "timm":
        return library.create_model(name, **(TINY if rehearse else {}))
    return library.ViTForImageClassification(library.ViTConfig(num_labels=1000))
