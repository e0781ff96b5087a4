"""1,000 steps of training, ours beside eager PyTorch: do the loss curves agree.

The task is made on the device: noisy gratings, whose orientation is the class. AdamW on fp32 copies of the weights; the
model computes in fp32, and in bf16.

Two right trainings drift apart: a rounding difference grows from step to step. How far is measured, not guessed: eager
PyTorch trains twice, the second time on every batch in reversed order, which is the same mean in another order of
sums. Our curve may differ from eager's by `FACTOR` times as much, or by `FLOOR` of the first loss, whichever is more.
Compared are means over windows of steps, the root mean square over all windows, because one step's loss is the noise of
its batch. The factor leaves room because each distance is a single draw of chance; a training with a wrong gradient is
another curve altogether: the tests see one that is beyond the limit (`tests/test_gpu_script.py`).
"""

from __future__ import annotations

import functools
import math
import time
from statistics import fmean

import torch
import torch.nn.functional as F

import vit
from benchmarks.gpu_stages import cases
from benchmarks.gpu_stages.record import Log

FACTOR, FLOOR = 3.0, 0.02
CLASSES = 10


def training(log: Log, rehearse: bool) -> None:
    device = cases.device(rehearse)
    for dtype in (torch.bfloat16,) if rehearse else (torch.bfloat16, torch.float32):
        log.attempt(functools.partial(_compare, device, dtype, rehearse), dtype=cases.name_of(dtype))


def _compare(device: torch.device, dtype: torch.dtype, rehearse: bool) -> dict:
    steps, batch, window = (2, 2, 1) if rehearse else (1000, 128, 50)
    config = vit.ViTConfig(
        img_size=16 if rehearse else 32, patch_size=8 if rehearse else 4, embed_dim=32 if rehearse else 192,
        depth=1 if rehearse else 4, num_heads=2 if rehearse else 3, mlp_ratio=2.0, num_classes=CLASSES,
        init_values=0.5, impl="triton",
    )  # fmt: skip
    curves, seconds = {}, {}
    for name in ("ours", "eager", "reversed"):
        model = (vit.VisionTransformer if name == "ours" else vit.reference.VisionTransformer)(config, seed=0)
        start = time.perf_counter()
        losses = train(model.to(device, dtype), steps, batch, flip=name == "reversed")
        seconds[name] = time.perf_counter() - start
        curves[name] = [fmean(losses[i : i + window]) for i in range(0, steps, window)]
    record = verdict(**curves, initial=math.log(CLASSES))
    learned = rehearse or curves["ours"][-1] < 0.7 * curves["ours"][0]
    return record | {
        "ok": record["ok"] and learned, "learned": learned, "steps": steps, "batch": batch, "window": window,
        "loss": curves, "run_s": seconds,
    }  # fmt: skip


def verdict(ours: list[float], eager: list[float], reversed: list[float], initial: float) -> dict:
    """Whether ours is as near to eager as chance explains; NaN fails."""
    distance, chance = _distance(ours, eager), _distance(reversed, eager)
    limit = max(FACTOR * chance, FLOOR * initial)
    return {"ok": distance <= limit, "distance": distance, "chance": chance, "limit": limit, "final": ours[-1]}


def _distance(a: list[float], b: list[float]) -> float:
    return math.sqrt(fmean((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def train(model: torch.nn.Module, steps: int, batch: int, flip: bool = False) -> list[float]:
    """The loss of every step; the batches depend on the step alone."""
    params = list(model.parameters())
    device = params[0].device
    masters = [p.detach().float().clone() for p in params]
    optimizer = torch.optim.AdamW(masters, lr=5e-4, weight_decay=0.05)
    losses = []
    for step in range(steps):
        image, label = gratings(batch, model.config.img_size[0], step, device)
        if flip:
            image, label = image.flip(0), label.flip(0)
        loss = F.cross_entropy(model(image.to(params[0].dtype)).float(), label)
        for master, grad in zip(masters, torch.autograd.grad(loss, params), strict=True):
            master.grad = grad.float()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def gratings(batch: int, size: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [batch, 3, size, size] of waves of any phase and length under noise, and the class of their direction."""
    generator = torch.Generator(device).manual_seed(seed)
    label = torch.randint(CLASSES, (batch,), generator=generator, device=device)
    phase, length = torch.rand(2, batch, 1, 1, generator=generator, device=device)
    angle = label[:, None, None] * (math.pi / CLASSES)
    y, x = torch.meshgrid(*[torch.arange(size, device=device, dtype=torch.float32)] * 2, indexing="ij")
    along = (x * angle.cos() + y * angle.sin()) / (4 + 8 * length) + phase
    noise = torch.randn(batch, 3, size, size, generator=generator, device=device)
    return (2 * math.pi * along).sin()[:, None] + noise, label
