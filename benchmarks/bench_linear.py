"""The linear layers of a block, each alone, fc1 with its GELU.

"ours" is impl="auto", which takes cuBLAS except for fc1. "triton" is our own kernel. "cublas" is cuBLAS and, after fc1,
a pass for GELU.
"""

import functools

import torch.nn.functional as F

from benchmarks.harness import Bench, Work
from vit import kernels
from vit.kernels import reference

LAYERS = {  # op: inputs and outputs
    "qkv": lambda s: (s.width, 3 * s.width),
    "proj": lambda s: (s.width, s.width),
    "fc1": lambda s: (s.width, s.hidden),
    "fc2": lambda s: (s.hidden, s.width),
}


def inputs(op, s, rand):
    k, n = LAYERS[op](s)
    return {"x": rand(s.batch, s.tokens, k), "weight": rand(n, k, scale=k**-0.5), "bias": rand(n)}


def work(op, s, e):
    k, n = LAYERS[op](s)
    x, y, w = s.rows * k, s.rows * n, n * k
    product = 2 * s.rows * k * n
    # fwd: x, weight, bias -> y. bwd: dy, x, weight -> dx, dweight, dbias two products. A GELU needs the bias, too.
    bwd = y + 2 * x + 2 * w + (2 if op == "fc1" else 1) * n
    return {"fwd": Work(product, (x + y + w + n) * e), "bwd": Work(2 * product, bwd * e)}


def cublas(activation, x, weight, bias):
    y = F.linear(x, weight, bias)
    return y if activation is None else F.gelu(y)


def bench(op):
    activation = {"activation": "gelu" if op == "fc1" else None}
    providers = {
        "ours": functools.partial(kernels.linear, **activation),
        "triton": functools.partial(kernels.linear, **activation, impl="triton"),
        "cublas": functools.partial(cublas, activation["activation"]),
    }
    right = functools.partial(reference.linear, **activation)
    about = functools.partial(inputs, op), functools.partial(work, op), right, providers
    return Bench("linear", op, *about, compiles="cublas" if op == "fc1" else None)


BENCHES = [bench(op) for op in LAYERS]
