"""Attention statistics and rollout from whole attention matrices: the oracle for `vit.analysis`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import vit


def maps_of(model: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Attention probabilities and logits [L, B, H, N, N] of our model in evaluation, by the reference in fp64."""
    config = dataclasses.replace(model.config, dynamic_img_size=True)
    reference = vit.reference.VisionTransformer(config).double().eval()
    reference.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    found = []

    def attend(attn: nn.Module, args: tuple) -> None:
        qkv = attn.qkv(args[0]).unflatten(2, (3, attn.num_heads, -1))
        q, k = attn.q_norm(qkv[:, :, 0]), attn.k_norm(qkv[:, :, 1])
        logits = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
        found.append((logits, logits.softmax(-1)))

    for block in reference.blocks:
        block.attn.register_forward_pre_hook(attend)
    with torch.no_grad():
        reference(image.double())
    return torch.stack([p for _, p in found]), torch.stack([logits for logits, _ in found])


def statistics(p: Tensor, prefix: int, grid: tuple[int, int], patch: tuple[int, int]) -> dict[str, Tensor]:
    """From probabilities [L, B, H, N, N]: [L, B, H, N] of each query, and of each key what it receives."""
    places = torch.tensor([[y * patch[0], x * patch[1]] for y in range(grid[0]) for x in range(grid[1])]).double()
    apart = torch.zeros(p.shape[-2:]).double()
    apart[prefix:, prefix:] = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    distance = (p * apart).sum(-1)
    return {
        "distance": distance,
        "renormalised": distance / p[..., prefix:].sum(-1),
        "entropy": torch.special.entr(p).sum(-1),
        "prefix_mass": p[..., :prefix].sum(-1),
        "received": p.mean(-2),
    }


def means(found: dict[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """Means over the queries, [L, B, H]: over those of patches, and of the entropy over all."""
    return {k: v[..., 0 if k == "entropy" else prefix :].mean(-1) for k, v in found.items() if k != "received"}


def rollout(p: Tensor, fusion: str = "mean") -> Tensor:
    """(A_L + I) … (A_1 + I) with rows that sum to 1: [B, N, N]."""
    A = {"mean": p.mean(2), "max": p.amax(2), "min": p.amin(2)}[fusion]  # [L, B, N, N]
    rolled = torch.eye(p.shape[-1]).double().expand(A.shape[1:])
    for layer in A:
        step = layer + torch.eye(p.shape[-1])
        rolled = step / step.sum(-1, keepdim=True) @ rolled
    return rolled


def error(got: Tensor, want: Tensor) -> float:
    """The largest error as a share of the largest value."""
    assert got.shape == want.shape, (got.shape, want.shape)
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()
