"""How fast: the card's own ceilings, then ViT-B/16, ours beside the eager reference."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch

from benchmarks.gpu_stages import cases
from benchmarks.gpu_stages.record import Log


def timing(log: Log, rehearse: bool) -> None:
    """ViT-B/16 in bf16, ours and eager in turn, after a check of the logits; the card's ceilings first."""
    device, batch = cases.device(rehearse), 2 if rehearse else 256
    name = cases.large_model(rehearse)
    size = 256 if rehearse else 8192
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    ms = _median(functools.partial(torch.mm, x, x), device)[1]
    ceiling = 2 * size**3 / ms / 1e9
    log.add(ok=True, bench="ceiling", op="matmul", shape=f"{size}^3", dtype="bfloat16", ms_p50=ms, tflops=ceiling)
    source = torch.empty(2**20 if rehearse else 2**30, device=device, dtype=torch.int32).random_()
    target = torch.empty_like(source)
    ms = _median(functools.partial(target.copy_, source), device)[1]
    log.add(ok=True, bench="ceiling", op="copy", ms_p50=ms, gbps=2 * source.numel() * 4 / ms / 1e6)
    del x, source, target

    ours, eager = cases.pair(name, device, torch.bfloat16, rehearse)
    image = torch.randn(batch, 3, *ours.config.img_size, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        error = cases.relative_error(ours(image[:2]), eager(image[:2]))
    if not error < 0.03:
        log.add(ok=False, bench="vit", shape=name, error_rms=error, error="logits differ from eager: not timed")
        return
    for mode in ("fwd", "full"):
        for provider, model in [("ours", ours), ("reference", eager)] * (1 if rehearse else 2):

            def step(model: torch.nn.Module = model, mode: str = mode) -> None:
                if mode == "fwd":
                    with torch.no_grad():
                        model(image)
                else:
                    model.zero_grad()
                    model(image).float().square().mean().backward()

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            p20, p50, p80 = _median(step, device)
            flops = _forward_flops(ours.config) * batch * (1 if mode == "fwd" else 3)
            log.add(
                ok=True, bench="vit", op="vit", shape=f"{name}/b{batch}", dtype="bfloat16", mode=mode,
                provider=provider, ms_p20=p20, ms_p50=p50, ms_p80=p80, img_s=1e3 * batch / p50,
                tflops=flops / p50 / 1e9, sol_fraction=flops / p50 / 1e9 / ceiling, error_rms=error,
                peak_mem_mb=torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
            )  # fmt: skip


def _forward_flops(config: Any) -> float:
    """2 per multiply-add: per block 24·N·D² (at mlp_ratio 4) + 4·N²·D, patches and head."""
    n, d, hidden = config.num_tokens, config.embed_dim, config.mlp_hidden_dim
    patch = config.in_chans * config.patch_size[0] * config.patch_size[1]
    block = 2 * n * (4 * d * d + 2 * d * hidden) + 4 * n * n * d
    return config.depth * block + 2 * config.num_patches * patch * d + 2 * d * config.num_classes


def _median(fn: Callable[[], Any], device: Any) -> tuple[float, float, float]:
    """Milliseconds at the 20th, 50th and 80th percentile."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(fn, warmup=200, rep=1000, quantiles=[0.2, 0.5, 0.8]))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    cuts = quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]
