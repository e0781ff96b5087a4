"""The plain products of a block, and the head. "ours" is what impl="auto" takes, cuBLAS; "triton" is our own kernel."""

import functools

import torch.nn.functional as F

from benchmarks.harness import Bench, Work
from vit import kernels
from vit.kernels import reference

LAYERS = {  # op: inputs, outputs
    "qkv": lambda s: (s.width, 3 * s.width),
    "proj": lambda s: (s.width, s.width),
    "fc2": lambda s: (s.hidden, s.width),
}


def inputs(layer, s, rand):
    k, n = layer(s)
    return {"x": rand(s.batch, s.tokens, k), "weight": rand(n, k, scale=k**-0.5), "bias": rand(n)}


def work(layer, s, e):
    k, n = layer(s)
    x, y, w = s.rows * k, s.rows * n, n * k
    product = 2 * s.rows * k * n
    # fwd: x, weight, bias -> y. bwd: dy, x, weight -> dx, dweight, dbias by two products.
    return {"fwd": Work(product, (x + y + w + n) * e), "bwd": Work(2 * product, (y + 2 * x + 2 * w + n) * e)}


def triton(x, weight, bias):
    return kernels.linear(x, weight, bias, impl="triton")


BENCHES = [
    Bench(
        "linear", op, functools.partial(inputs, layer), functools.partial(work, layer), reference.linear,
        {"ours": kernels.linear, "triton": triton, "cublas": F.linear}, compiles=None,
    )
    for op, layer in LAYERS.items()
]  # fmt: skip
