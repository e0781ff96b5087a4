"""How far the logits and every gradient of the fast model are from fp64, beside eager PyTorch: `vit demo`'s table.

Shapes: B images, D = embed_dim.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vit.config import ViTConfig
from vit.model import VisionTransformer
from vit.reference import VisionTransformer as Reference
from vit.testing import Report, measure

Progress = Callable[[str], contextlib.AbstractContextManager[Any]]

# The groups of the table, and how the names in each begin, after "blocks.<i>." where there is one.
GROUPS = {
    "patch_embed": ("patch_embed.",),
    "class, register and position tokens": ("cls_token", "reg_token", "pos_embed", "mask_token"),
    "attn.qkv": ("attn.qkv.",),
    "attn.proj": ("attn.proj.",),
    "mlp.fc1": ("mlp.fc1.",),
    "mlp.fc2": ("mlp.fc2.",),
    "norms": ("norm1.", "norm2.", "norm.", "fc_norm.", "norm_pre.", "attn.q_norm.", "attn.k_norm."),
    "LayerScale": ("ls1.", "ls2."),
    "head": ("head.", "pre_logits."),
}


@dataclasses.dataclass
class Models:
    """Three models with the same weights, and the direction in which the logits are differentiated."""

    fast: nn.Module
    eager: nn.Module
    exact: nn.Module | None
    direction: Tensor  # [B, num_classes]


def make_models(config: ViTConfig, images: Tensor) -> Models:
    """Random weights with none left at 0 or 1, so that no bias, norm or token can be wrong unseen.

    The noise also widens the usual normal initialisation from 0.02 to 0.054; with 0.02, attention is nearly uniform.
    """
    like, generator = {"device": images.device, "dtype": images.dtype}, torch.Generator().manual_seed(0)
    eager = Reference(config, seed=0)
    with torch.no_grad():
        for param in eager.parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.05)
    eager.to(**like)
    fast = VisionTransformer(config, seed=0, **like)
    fast.load_state_dict(eager.state_dict())
    direction = torch.randn(len(images), config.num_classes, generator=generator).to(**like)
    return Models(fast, eager, copy.deepcopy(eager).double(), direction)


def results(model: nn.Module, images: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """The logits, and the gradient of (logits · direction).sum() for the images and every parameter.

    A fixed direction instead of a loss: every logit counts, and each model's backward starts from the same numbers.
    """
    params = dict(model.named_parameters())
    dtype = params["pos_embed"].dtype
    images = images.detach().to(dtype, copy=True).requires_grad_()
    logits = model(images)
    grads = torch.autograd.grad(logits, [images, *params.values()], direction.to(dtype))
    return {"logits": logits.detach()} | dict(zip(["image", *params], grads, strict=True))


def parity(models: Models, images: Tensor, progress: Progress = contextlib.nullcontext) -> list[Report]:
    """The errors of the logits and of every gradient; ``progress(text)`` is entered around each model's work.

    The key bias has no gradient (softmax ignores what all keys of a row share), so what is computed for it is rounding
    noise. It stays a third of qkv.bias, judged as one tensor: the error of the other two thirds says how much noise is
    fair, and a key bias with a gradient of its own would fail.
    """
    found = []
    for label, model in (("this package", models.fast), ("eager PyTorch", models.eager), ("fp64", models.exact)):
        with progress(f"forward and backward, {label}"):
            found.append(results(model, images, models.direction))
            if images.is_cuda:
                torch.cuda.synchronize()
    return [measure(*(result[name] for result in found), scope="model", name=name) for name in found[2]]


def group_of(name: str) -> str:
    leaf = name.split(".", 2)[2] if name.startswith("blocks.") else name
    return next((group for group, starts in GROUPS.items() if leaf.startswith(starts)), leaf)


def table(reports: list[Report]) -> str:
    """A row for each group, of its tensor nearest to a limit, then the tensors that failed, then the verdict."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(group_of(report.name), []).append(report)
    lines = [
        "Error against fp64 (root mean square) of the worst tensor of each group, and eager PyTorch's of the same:",
        f"  {'':<48}{'tensors':>8}{'ours':>11}{'eager':>11}{'limit':>11}  verdict",
    ]
    for group, members in groups.items():
        worst = max(members, key=lambda r: (not r.ok, r.share))
        label = group if group == "logits" else f"gradient of {group}"
        figures = "".join(f"{figure:>11.2e}" for figure in (worst.rms, worst.rms_eager, worst.rms_limit))
        lines.append(f"  {label:<48}{len(members):>8}{figures}  {'pass' if worst.ok else 'FAIL'}")
    failed = [report for report in reports if not report.ok]
    lines += [f"  FAIL {report}" for report in failed[:5]]
    verdict = "FAIL" if failed else "pass"
    lines.append(f"Parity: {verdict}, {len(reports) - len(failed)} of {len(reports)} tensors within all limits")
    return "\n".join(lines)
