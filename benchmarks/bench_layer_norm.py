"""LayerNorm, alone and after the residual add. It is bound by bytes. A row has `width` elements."""

import torch.nn.functional as F

from benchmarks.harness import Bench, Work
from vit import kernels
from vit.kernels import reference


def inputs(s, rand):
    return {"x": rand(s.batch, s.tokens, s.width), "weight": rand(s.width), "bias": rand(s.width)}


def work(s, e):
    x, params, stats = s.rows * s.width * e, 2 * s.width * e, 2 * s.rows * 4
    # fwd: x -> y. bwd: dy, x, mean and rstd -> dx, and the gradients of weight and bias.
    return {"fwd": Work(0, 2 * x + params), "bwd": Work(0, 3 * x + stats + 1.5 * params)}


def eager(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def liger(x, weight, bias):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-6)


def residual_inputs(s, rand):
    return {"residual": rand(s.batch, s.tokens, s.width), "branch": rand(s.batch, s.tokens, s.width)} | {
        k: t for k, t in inputs(s, rand).items() if k != "x"
    }


def residual_work(s, e):
    x, params, stats = s.rows * s.width * e, 2 * s.width * e, 2 * s.rows * 4
    # fwd: residual, branch -> stream, y. bwd: dy, dstream, stream, mean and rstd -> one gradient for both.
    return {"fwd": Work(0, 4 * x + params), "bwd": Work(0, 4 * x + stats + 1.5 * params)}


def residual_eager(residual, branch, weight, bias):
    stream = residual + branch
    return stream, F.layer_norm(stream, stream.shape[-1:], weight, bias, 1e-6)


BENCHES = [
    Bench(
        "layer_norm", "layer_norm", inputs, work, reference.layer_norm,
        {"ours": kernels.layer_norm, "eager": eager, "liger": liger},
    ),
    Bench(
        "layer_norm", "residual_layer_norm", residual_inputs, residual_work, reference.residual_layer_norm,
        {"ours": kernels.residual_layer_norm, "eager": residual_eager},
    ),
]  # fmt: skip
