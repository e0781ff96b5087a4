"""1,000 steps of training: our loss curve must agree with that of eager PyTorch.

The images are generated on the device: noisy gratings, whose orientation is the class. AdamW updates fp32 copies of the
weights. The model computes in bf16, and in fp32.

As in `vit.testing`, the limit is a multiple of eager PyTorch's error against fp64. Eager also trains in fp64. The
distance of our curve from that one may be `FACTOR` times that of eager in the same dtype, or `FLOOR` of the first loss
if that is more. The factor is 2, as for an fp32 op, times 2 for chance, because rounding errors grow with the steps and
each distance is a single draw. The distance is the rms of differences between means over windows of steps, because the
loss of one step depends on its batch. In fp32 this detects a LayerScale with the wrong sign in its gradient
(`tests/benchmarks/test_gpu_script.py`).
"""

from __future__ import annotations

import math
from statistics import fmean

import torch
import torch.nn.functional as F

import vit
from benchmarks.gpu_stages import cases
from benchmarks.log import Log, name_of

FACTOR, FLOOR = 4.0, 2e-5
CLASSES = 10


def training(log: Log, rehearse: bool) -> None:
    device, (steps, batch, window) = cases.device(rehearse), (2, 2, 1) if rehearse else (1000, 128, 50)
    config = vit.ViTConfig(
        img_size=16 if rehearse else 32, patch_size=8 if rehearse else 4, embed_dim=32 if rehearse else 192,
        depth=1 if rehearse else 4, num_heads=2 if rehearse else 3, mlp_ratio=2.0, num_classes=CLASSES,
        init_values=0.5, impl="triton",
    )  # fmt: skip

    def curve(model_class: type, dtype: torch.dtype) -> list[float]:
        losses = train(model_class(config, seed=0).to(device), dtype, steps, batch)
        return [fmean(losses[i : i + window]) for i in range(0, steps, window)]

    exact = curve(vit.reference.VisionTransformer, torch.float64)
    for dtype in (torch.float32,) if rehearse else (torch.bfloat16, torch.float32):

        def compare(dtype: torch.dtype = dtype) -> dict:
            ours, eager = (curve(m, dtype) for m in (vit.VisionTransformer, vit.reference.VisionTransformer))
            learned = rehearse or ours[-1] < 0.7 * ours[0]
            record = verdict(ours, eager, exact)
            loss = {"ours": ours, "eager": eager, "exact": exact}
            return record | {"ok": record["ok"] and learned, "learned": learned, "window": window, "loss": loss}

        log.attempt(compare, dtype=name_of(dtype), steps=steps, batch=batch)


def verdict(ours: list[float], eager: list[float], exact: list[float]) -> dict:
    """Whether ours is about as close to exact as eager is. NaN fails."""
    distance, distance_eager = _distance(ours, exact), _distance(eager, exact)
    limit = max(FACTOR * distance_eager, FLOOR * exact[0])
    return {"ok": distance <= limit, "distance": distance, "distance_eager": distance_eager, "limit": limit}


def _distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def train(model: torch.nn.Module, dtype: torch.dtype, steps: int, batch: int) -> list[float]:
    """The loss of every step of ``model``, which computes in ``dtype``. The batch depends only on the step."""
    wide = torch.promote_types(dtype, torch.float32)
    masters = [p.detach().to(wide, copy=True) for p in model.parameters()]
    params = list(model.to(dtype).parameters())
    optimizer = torch.optim.AdamW(masters, lr=5e-4, weight_decay=0.05)
    losses = []
    for step in range(steps):
        image, label = gratings(batch, model.config.img_size[0], step, params[0].device)
        loss = F.cross_entropy(model(image.to(dtype)).to(wide), label)
        for master, grad in zip(masters, torch.autograd.grad(loss, params), strict=True):
            master.grad = grad.to(wide)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def gratings(batch: int, size: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [batch, 3, size, size] of noisy waves of any phase and length, and the class of their direction."""
    generator = torch.Generator(device).manual_seed(seed)
    label = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    phase, length = torch.rand(2, batch, 1, 1, generator=generator, device=device)
    angle = label[:, None, None] * (math.pi / CLASSES)
    y, x = torch.meshgrid(*[torch.arange(size, device=device, dtype=torch.float32)] * 2, indexing="ij")
    along = (x * angle.cos() + y * angle.sin()) / (4 + 8 * length) + phase
    noise = torch.randn(batch, 3, size, size, generator=generator, device=device)
    return (2 * math.pi * along).sin()[:, None] + noise, label
