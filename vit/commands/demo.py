"""`vit demo`: runs a ViT on a photograph, forward and backward, and compares it with plain PyTorch.

With an NVIDIA GPU: ViT-B/16 in bf16 on compiled kernels. Without one: ViT-S/16 on the CPU, and a small ViT on
interpreted kernels in a separate process. Then a trained ViT names real images.
Shapes: B images, N tokens, D = embed_dim.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from vit.analysis import rollout
from vit.commands import trained
from vit.commands.console import say, step
from vit.commands.overlay import beside, levels, overlay
from vit.config import ViTConfig, get_config
from vit.explanation import explain
from vit.kernels import runtime
from vit.testing.parity import Models, enough_draws, make_models, parity, results, table

CPU = torch.device("cpu")
# Small enough for the interpreter. 17 tokens leave a partly filled tile.
SMALL = ViTConfig((48, 64), 16, num_classes=10, embed_dim=64, depth=2, num_heads=2, reg_tokens=4, init_values=0.5)
EYE = (138, 91, 202, 139)  # left, upper, right, lower pixel of a crop with the image size of SMALL
PANEL = 448  # pixels, side of each half of the picture

SHOWN_GPU = """\
Shown: each op of ViT-B/16 took the path listed above on this GPU, and the logits and every gradient are judged by how
near they are to fp64 beside eager PyTorch in bf16 (the policy is in vit/testing/policy.py). Times are of one call at a
time, launch cost included, against vit.reference with PyTorch's own fused attention.
The weights of ViT-B/16 are random, so the photograph shows where the class token looks, not what it knows. The ViT
for 28 x 28 pixels is trained: it names images that it has not seen."""
SHOWN_CPU = """\
Shown: on the CPU this package computes what plain PyTorch computes; and the Triton kernels' own code, interpreted in
fp32, is judged on the logits and every gradient of a small ViT beside eager PyTorch (vit/testing/policy.py).
Not shown: anything compiled. No kernel was compiled or ran on a GPU, bf16 was not tried, and nothing was timed. To see
the rest, run `make demo` on a machine with an NVIDIA GPU of compute capability 8.0 or newer.
The weights of ViT-S/16 are random, so the photograph shows where the class token looks, not what it knows. The ViT
for 28 x 28 pixels is trained: it names images that it has not seen."""


def demo(out: Path) -> bool:
    """Runs and prints everything, and writes the picture to ``out``. Returns whether every check passed."""
    gpu, why_not = find_gpu()
    if gpu is None:
        say(f"{why_not}: ViT-S/16 runs on the CPU, then a small ViT on interpreted kernels.")
        say("\n== ViT-S/16, 224 x 224 pixels, fp32, on the CPU: PyTorch's own operators ==")
        name, batch, dtype = "vit_small_patch16_224", 1, torch.float32
    else:
        say(f"{torch.cuda.get_device_name(gpu)}: ViT-B/16 runs on the compiled Triton kernels.")
        say("\n== ViT-B/16, 224 x 224 pixels, bf16, compiled kernels; the first call of each kernel compiles it ==")
        name, batch, dtype = "vit_base_patch16_224", 8, torch.bfloat16
    images = load_batch(224, batch).to(gpu or CPU, dtype)
    models, passed = check_model(get_config(name), images)
    models.exact = None  # frees its memory
    if gpu is not None:
        show_times(models, images)
    picture = draw_rollout(models.fast, images[:1])
    say("\n== A trained ViT, patch 4, 28 x 28 pixels, fp32 ==")
    strip, right = trained.show(gpu or CPU)
    beside(picture, strip, down=True).save(out, format="PNG")
    say(f"  The picture has {trained.DRAWN} of these images over their attention rollout. Written to {out}")
    passed = passed and right
    if gpu is None:
        say("\n== The Triton kernels, interpreted: their code runs on the CPU, one program after another ==")
        command = [sys.executable, "-m", "vit", "demo", "--interpreted"]
        code = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
        if code not in (0, 1):
            say(f"  the interpreted part stopped with exit code {code}")
        passed = passed and code == 0
    say(f"\n== What this showed ==\n{SHOWN_CPU if gpu is None else SHOWN_GPU}")
    say(f"\n{'PASS: every check passed' if passed else 'FAIL: see the lines marked FAIL above'}. Picture: {out}")
    return passed


def demo_interpreted() -> bool:
    """The part with interpreted kernels. TRITON_INTERPRET=1 must be set when the process starts."""
    say("  2 blocks, 64 wide, 2 heads, registers, LayerScale; 64 x 48 pixels of the photograph, patch 16, fp32")
    eye = load_photo().crop(EYE)
    return check_model(dataclasses.replace(SMALL, impl="triton"), to_tensor([eye, ImageOps.mirror(eye)]))[1]


def find_gpu() -> tuple[torch.device | None, str]:
    """(GPU for compiled kernels, ""), or (None, reason)."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None, "No NVIDIA GPU was found"
    if runtime.INTERPRETED:
        return None, "TRITON_INTERPRET is set, so no kernel can be compiled here"
    if torch.cuda.get_device_capability() < (8, 0):
        return None, f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which the kernels need"
    return torch.device("cuda"), ""


def load_photo() -> Image.Image:
    with resources.files("vit").joinpath("assets/chelsea.jpg").open("rb") as file:
        return Image.open(file).convert("RGB")


def to_tensor(photos: list[Image.Image]) -> Tensor:
    """[B, 3, H, W], normalised with mean and standard deviation 0.5."""
    return torch.from_numpy(np.stack([np.array(p) for p in photos])).movedim(3, 1) / 127.5 - 1.0


def load_batch(size: int, batch: int) -> Tensor:
    """[batch, 3, size, size]: crops of the photograph's centre. Odd ones are mirrored; each pair zooms in further."""
    crops = [ImageOps.fit(load_photo(), (size, size), bleed=0.02 * (i // 2)) for i in range(batch)]
    return to_tensor([ImageOps.mirror(crop) if i % 2 else crop for i, crop in enumerate(crops)])


def check_model(config: ViTConfig, images: Tensor) -> tuple[Models, bool]:
    """Prints the path of each op and the parity table. Returns the models, and whether parity holds."""
    with step("making random weights"):
        models = make_models(config, images)
    with step("a first forward, to see which path each op takes"):
        paths = str(explain(models.fast, images))
    say("  Path of each op, and why (the backward of an op takes the path of its forward):")
    say("    " + paths.replace("\n", "\n    "))
    reports = parity(models, images, progress=step, draws=1 if runtime.INTERPRETED else enough_draws(models))
    say("  " + table(reports).replace("\n", "\n  "))
    return models, all(report.ok for report in reports)


def seconds(call: Callable[[], object]) -> float:
    """The time of a call on the current GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """The peak of GPU memory that a call adds, in MiB."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def show_times(models: Models, images: Tensor) -> None:
    """Prints the median times of alternating runs of both models, and the peak memory of each."""
    device, batch = images.device, len(images)
    calls: dict[str, list[Callable[[], object]]] = {"forward": [], "forward and backward": []}
    for model in (models.fast, models.eager):
        calls["forward"].append(torch.no_grad()(lambda m=model: m(images)))
        calls["forward and backward"].append(lambda m=model: results(m, images, models.direction))
    runs: dict[str, list[list[float]]] = {label: [] for label in calls}
    stop = time.perf_counter() + 8  # seconds; slow machines make fewer rounds
    with step("timing"):
        for _ in range(20):
            for label, both in calls.items():
                runs[label].append([seconds(call) for call in both])
            if time.perf_counter() > stop:
                break
    say(f"  Time per image in batches of {batch}, median of {len(runs['forward'])} rounds:")
    for label, rounds in runs.items():
        ours, eager = (1000 * statistics.median(column) / batch for column in zip(*rounds, strict=True))
        say(f"    {label:<22}ours {ours:8.2f} ms    eager {eager:8.2f} ms    eager/ours {eager / ours:.2f}")
    ours, eager = (peak_memory(call, device) for call in calls["forward and backward"])
    say(f"  Peak memory of forward and backward, weights not counted: ours {ours:.0f} MiB, eager {eager:.0f} MiB")


def draw_rollout(model: nn.Module, image: Tensor) -> Image.Image:
    """A picture: left the photograph, right the same with the attention rollout of the class token."""
    config = model.config
    with step("drawing where the class token looks"):
        share = rollout(model, image)[0, config.num_prefix_tokens :].cpu().numpy()  # [num_patches]
        photo = ImageOps.fit(load_photo(), (PANEL, PANEL))
        patch_size = PANEL / config.grid_size[0], PANEL / config.grid_size[1]
        over = overlay(photo, levels(share.reshape(config.grid_size)), patch_size)
        picture = beside(photo, over)
    low, high = share.min() * config.num_tokens, share.max() * config.num_tokens
    say(f"  Attention rollout of the class token: a patch gets {low:.2f} to {high:.2f} times an equal share.")
    say("  The picture goes from dark, the least share, to bright, the 99th percentile.")
    return picture
