"""The part of `vit demo` with a trained ViT: real test images, and where the model looks in them.

The weights, their model card and 500 images lie in vit/assets. The images are the first 500 of Fashion-MNIST's 10,000
test images. Shapes: B images of H x W pixels.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import torch
from PIL import Image
from torch import nn

import vit
from vit.analysis import attention_statistics, rollout
from vit.commands.console import say
from vit.commands.overlay import beside, levels, overlay

WEIGHTS, IMAGES = "fashion-mnist.npz", "fashion-mnist-test-500.npz"
COUNT = 48  # images that the demo classifies
DRAWN, SIDE = 8, 106  # images in the picture, and their height and width in pixels


def load(device: torch.device) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """The trained model, the images uint8 [500, H, W] and their labels [500]."""
    assets = resources.files("vit") / "assets"
    with resources.as_file(assets / WEIGHTS) as weights, resources.as_file(assets / IMAGES) as images:
        model = vit.load_pretrained(weights).eval().to(device)
        with np.load(images, allow_pickle=False) as arrays:
            return model, arrays["images"], arrays["labels"]


def show(device: torch.device) -> tuple[Image.Image, bool]:
    """Classifies the images and prints the result. Returns a picture, and whether four of five are right."""
    model, images, labels = load(device)
    images, labels, cfg = images[:COUNT], labels[:COUNT], model.pretrained_cfg
    pixels = (torch.from_numpy(images)[:, None].to(device) / 255 - cfg["mean"][0]) / cfg["std"][0]
    with torch.no_grad(), attention_statistics(model) as stats:
        found = model(pixels).argmax(1).cpu().numpy()
    right, names, told = int((found == labels).sum()), cfg["label_names"], cfg["training"]
    say(
        f"  {COUNT} real test images of Fashion-MNIST, not seen in training: {right} right, {100 * right / COUNT:.0f} %"
    )
    wrong = [f"{names[labels[i]]} taken for {names[found[i]]}" for i in np.flatnonzero(found != labels)]
    say(f"  wrong: {'; '.join(wrong) or 'none'}")
    say(f"  on all {told['test_images']:,} test images {told['test_top1']:.2f} %, as the model card says; to train it:")
    say(f"    {told['command']}")
    distances = stats.distance.mean((1, 2)).tolist()  # a layer each
    say(f"  mean attention distance of its layers, in pixels: {' '.join(f'{d:.1f}' for d in distances)}")
    maps = rollout(model, pixels[:DRAWN])[:, model.config.num_prefix_tokens :].cpu().numpy()
    photos = [Image.fromarray(image).resize((SIDE, SIDE), Image.NEAREST).convert("RGB") for image in images[:DRAWN]]
    grid = model.config.grid_size
    over = [
        overlay(photo, levels(share.reshape(grid)), (SIDE / grid[0], SIDE / grid[1]))
        for photo, share in zip(photos, maps, strict=True)
    ]
    return beside(beside(*photos), beside(*over), down=True), right >= 0.8 * COUNT
