"""What PyTorch's counter, `torch.utils.flop_counter.FlopCounterMode`, counts of each op.

The counter sees an op as one call, and nothing that runs inside, neither our kernels nor cuBLAS. So these formulas
count the products, each once. They count what the counter finds in `reference`: two FLOPs for each multiply-add of a
matrix product, and none for the rest. Gradients that are not needed do not count.

A formula gets the arguments of its op, with shapes instead of tensors. `benchmarks.trace` counts what the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import (  # noqa: F401 (they declare the ops)
    attention,
    attention_statistics,
    dropout,
    layer_norm,
    linear,
    mlp,
    patch_embed,
)

Shape = Sequence[int]


def _formula_of(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers a formula for these ops, also when the package is imported a second time."""
    ops = [getattr(torch.ops.vit, name) for name in names]
    for op in ops:
        flop_registry.pop(op, None)
    return register_flop_formula(ops)


@_formula_of("linear_fwd")
def _linear_fwd(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * prod(weight)


@_formula_of("linear_bwd")
def _linear_bwd(dy: Shape, x: Shape | None, weight: Shape | None, *_: Any, **__: Any) -> int:
    """dx needs weight, and dw needs x."""
    dx = 0 if weight is None else 2 * prod(dy) * weight[1]
    dw = 0 if x is None else 2 * prod(dy) * x[-1]
    return dx + dw


@_formula_of("mlp_fwd")
def _mlp_fwd(x: Shape, fc1_weight: Shape, fc1_bias: Shape | None, fc2_weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(fc1_weight) + prod(fc2_weight))


@_formula_of("mlp_bwd")
def _mlp_bwd(
    dy: Shape, x: Shape | None, preact: Shape | None, fc1_weight: Shape | None, fc2_weight: Shape | None,
    seed: Shape | None, activation: str, dropout_p: float, offset: int, need_db1: bool, need_dw2: bool,
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """dx needs fc1_weight, and dw1 needs x; the gradient of the hidden units, which both read, needs fc2_weight."""
    rows = prod(dy[:-1])
    dhidden = 0 if fc2_weight is None else 2 * rows * prod(fc2_weight)
    dx = 0 if fc1_weight is None else 2 * rows * prod(fc1_weight)
    dw1 = 0 if x is None else 2 * rows * preact[-1] * x[-1]
    dw2 = 2 * rows * dy[-1] * preact[-1] if need_dw2 else 0
    return dhidden + dx + dw1 + dw2


def _product(q: Shape, keys: int) -> int:
    """One product of attention, queries [B, NQ, H, E] with so many keys."""
    return 2 * prod(q) * keys


@_formula_of("attention_fwd")
def _attention_fwd(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 2 * _product(q, k[1])


@_formula_of("attention_bwd")
def _attention_bwd(
    do: Shape, q: Shape, k: Shape, v: Shape, o: Shape, m: Shape, log_l: Shape,
    scale: float, need_dq: bool, need_dkv: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """The gradient of the probabilities, dq, and dk with dv: one kernel makes both of these, and both count.

    The logits, which the kernels compute again, do not count, as in PyTorch's own attention.
    """
    return (1 + need_dq + 2 * need_dkv) * _product(q, k[1])


@_formula_of("attention_qkvpacked_fwd")
def _attention_qkvpacked_fwd(qkv: Shape, *_: Any, **__: Any) -> int:
    B, N, _, H, E = qkv
    return 2 * _product((B, N, H, E), N)


@_formula_of("attention_qkvpacked_bwd")
def _attention_qkvpacked_bwd(do: Shape, qkv: Shape, *_: Any, **__: Any) -> int:
    B, N, _, H, E = qkv
    return 4 * _product((B, N, H, E), N)


@_formula_of("attention_statistics")
def _attention_statistics(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    """The logits. What each key receives needs them again, transposed, which does not count."""
    return _product(q, k[1])


@_formula_of("patch_embed_fwd")
def _patch_embed_fwd(image: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Every pixel is in one patch. Masked patches count, too."""
    return 2 * prod(image) * weight[0]


@_formula_of("patch_embed_bwd")
def _patch_embed_bwd(
    dy: Shape, image: Shape | None, weight: Shape | None, masked: Shape | None, image_shape: Shape, *_: Any, **__: Any
) -> int:
    """dimage needs weight, and dw needs image."""
    products = (weight is not None) + (image is not None)
    return products * 2 * prod(image_shape) * dy[-1]


@_formula_of("layer_norm_fwd", "layer_norm_bwd", "dropout", "dropout_bwd", "dropout_seed")
def _no_product(*_: Any, **__: Any) -> int:
    return 0
