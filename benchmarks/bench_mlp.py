"""The MLP of a block with exact GELU. "cublas" is eager PyTorch: two products of cuBLAS and a pass for GELU."""

import torch.nn.functional as F

from benchmarks.harness import Bench, Work
from vit import kernels
from vit.kernels import reference


def inputs(s, rand):
    return {
        "x": rand(s.batch, s.tokens, s.width),
        "fc1_weight": rand(s.hidden, s.width, scale=s.width**-0.5),
        "fc1_bias": rand(s.hidden),
        "fc2_weight": rand(s.width, s.hidden, scale=s.hidden**-0.5),
        "fc2_bias": rand(s.width),
    }


def work(s, e):
    x, params = s.rows * s.width, 2 * s.width * s.hidden + s.width + s.hidden
    products = 4 * s.rows * s.width * s.hidden
    # fwd: x, parameters -> y. bwd: dy, x, all but fc2's bias -> dx and the parameters' gradients. The hidden activation
    # does not count, because an implementation could recompute it instead of saving it.
    bwd = 3 * x + 2 * params - s.width
    return {"fwd": Work(products, (2 * x + params) * e), "bwd": Work(2 * products, bwd * e)}


def cublas(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    return F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)


def triton(**tensors):
    return kernels.mlp(**tensors, impl="triton")


BENCHES = [
    Bench(
        "mlp", "mlp", inputs, work, reference.mlp,
        {"ours": kernels.mlp, "triton": triton, "cublas": cublas}, compiles="cublas",
    )
]  # fmt: skip
