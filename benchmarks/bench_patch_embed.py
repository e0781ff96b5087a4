"""Patches, projection, position embedding and class token in one pass, which reads the image once."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, Work
from vit import kernels
from vit.kernels import reference


def inputs(s, rand):
    c = s.config
    pixels = c.in_chans * c.patch_size[0] * c.patch_size[1]
    return {
        "image": rand(s.batch, c.in_chans, *c.img_size),
        "weight": rand(s.width, c.in_chans, *c.patch_size, scale=pixels**-0.5),
        "bias": rand(s.width),
        "pos_embed": rand(1, s.tokens, s.width),
        "prefix": rand(1, c.num_prefix_tokens, s.width),
    }


def work(s, e):
    c = s.config
    pixels = c.in_chans * c.patch_size[0] * c.patch_size[1]
    image, y, weight = s.batch * c.num_patches * pixels, s.rows * s.width, s.width * pixels
    tables = (1 + s.tokens + c.num_prefix_tokens) * s.width
    product = 2 * s.batch * c.num_patches * pixels * s.width
    # fwd: image, weight, tables -> tokens. bwd: dtokens, image, weight -> the gradients of image, weight and tables.
    return {
        "fwd": Work(product, (image + weight + tables + y) * e),
        "bwd": Work(2 * product, (y + 2 * image + 2 * weight + tables) * e),
    }


def eager(image, weight, bias, pos_embed, prefix):
    patches = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return torch.cat([prefix.expand(len(image), -1, -1), patches], dim=1) + pos_embed


BENCHES = [
    Bench(
        "patch_embed", "patch_embed", inputs, work, reference.patch_embed,
        {"ours": kernels.patch_embed, "eager": eager},
    )
]  # fmt: skip
