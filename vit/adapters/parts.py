"""Parts that the blocks of all libraries have. They run on the ops of `vit.kernels` if `vit.plain` allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vit.kernels as kernels
from vit.kernels import runtime
from vit.kernels.autocast import autocast_dtype
from vit.plain import absent, class_of, is_linear, linear, plain


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def is_layer_norm(module: nn.Module) -> bool:
    """Whether the module is a `plain` LayerNorm over the last dimension, PyTorch's or timm's."""
    cls = class_of(module)
    known = cls is nn.LayerNorm or path_of(cls) == "timm.layers.norm.LayerNorm"
    return known and len(module.normalized_shape) == 1 and plain(module)


def layer_norm(module: nn.Module, x: Tensor, impl: str) -> Tensor:
    """``module(x)``. Under autocast the result has autocast's dtype, to which the next matrix product would cast it."""
    if not is_layer_norm(module) or not _fit(x, x, module.weight, module.bias):
        return module(x)
    return kernels.layer_norm(x, module.weight, module.bias, module.eps, recompute=True, impl=impl)


def kept(y: Tensor) -> Tensor:
    """y for several projections. They save it, because each would compute it again (see `kernels.recompute`)."""
    return y.view_as(y)


def add_norm(
    x: Tensor,
    branch: Tensor,
    norm: nn.Module | None,
    impl: str,
    layer_scale: nn.Module | Tensor | None = None,
    drop_path: nn.Module | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x + drop_path(layer_scale(branch)), and ``norm`` of that, or None without a norm."""
    gamma = row_scale = None
    if not absent(layer_scale):
        gamma = _layer_scale(layer_scale)
        branch = layer_scale(branch) if gamma is None else branch
    if not absent(drop_path):
        if path_of(type(drop_path)) not in DROP_PATHS or not plain(drop_path):
            branch, gamma = drop_path(branch if gamma is None else branch * gamma), None
        elif drop_path.training and drop_path.drop_prob:
            # The library draws the mask, in the dtype of its input, so a seed gives the same mask as the library's.
            dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
            row_scale = drop_path(branch.new_ones(len(branch), *[1] * (branch.dim() - 1), dtype=dtype)).flatten()
    if norm is not None and is_layer_norm(norm) and _fit(x, branch, norm.weight, norm.bias, gamma):
        options = {"gamma": gamma, "row_scale": row_scale, "recompute": True, "impl": impl}
        return kernels.residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, **options)
    if gamma is not None:
        branch = branch * gamma
    if row_scale is not None:
        branch = branch * row_scale.reshape(-1, *[1] * (branch.dim() - 1))
    x = x + branch
    return x, None if norm is None else layer_norm(norm, x, impl)


def activation_of(module: nn.Module) -> str | None:
    """The op's name of an activation, or None if the kernels do not have it."""
    if type(module) is nn.GELU:
        known = {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    else:
        known = _ACTIVATIONS.get(path_of(type(module)))
    return known if known is not None and plain(module) else None


def mlp(fc1: nn.Module, act: nn.Module, drop: nn.Module | None, fc2: nn.Module, x: Tensor, impl: str) -> Tensor:
    """fc2(drop(act(fc1(x)))), as one op if all four modules are `plain`."""
    activation, options = activation_of(act), dropping(drop, x)
    if activation is None or options is None or not (is_linear(fc1) and is_linear(fc2)):
        hidden = act(linear(fc1, x, impl))
        return linear(fc2, hidden if drop is None else drop(hidden), impl)
    return kernels.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation, impl=impl, **options)


def attention_and_maps(q: Tensor, k: Tensor, v: Tensor, wanted: bool, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Attention of q, k, v [B, N, HEADS, HEAD_DIM] -> [B, N, D], and the probabilities [B, HEADS, N, N] if ``wanted``.

    If the probabilities require grad, the result is computed from them, as in eager attention.
    """
    if not wanted:
        return kernels.attention(q, k, v, **options), None
    maps = kernels.attention_probs(q, k, scale=options["scale"]).to(v.dtype)
    if "seed" in options:
        maps = kernels.dropout(maps, options["dropout_p"], options["seed"])  # the same mask as in the op
    if maps.requires_grad:
        if (listener := runtime.attention_listener()) is not None:
            listener(q.detach(), k.detach(), options["scale"] or q.shape[-1] ** -0.5, None)
        return (maps @ v.transpose(1, 2)).transpose(1, 2).flatten(2), maps
    return kernels.attention(q, k, v, **options), maps


def drops_in_ops(module: nn.Module | None) -> bool:
    """Whether the ops can compute this dropout. Then `dropping` returns its arguments."""
    return absent(module) or (
        type(module) is nn.Dropout and plain(module) and not (module.training and module.p >= 1.0)
    )


def dropping(module: nn.Module | None, x: Tensor) -> dict[str, Any] | None:
    """The dropout arguments of an op for this module, or None if the module must be called."""
    if not drops_in_ops(module):
        return None
    return {} if absent(module) else draw(module.p if module.training else 0.0, x)


def draw(p: float, x: Tensor) -> dict[str, Any] | None:
    """The dropout arguments of an op for probability ``p``, with a new seed; None for 1, which the ops do not take."""
    if p >= 1.0:
        return None
    return {"dropout_p": p, "seed": kernels.dropout_seed(x)} if p > 0.0 else {}


def _layer_scale(module: nn.Module | Tensor) -> Tensor | None:
    if isinstance(module, Tensor):
        return module
    name = LAYER_SCALES.get(path_of(type(module)))
    return None if name is None or not plain(module) else getattr(module, name)


def is_channels_last(x: Tensor) -> bool:
    """Whether a convolution of x returns channels_last."""
    channels = x.shape[1]
    return channels > 1 and x.stride(1) == 1 and x.stride(3) == channels  # is_contiguous does not work inside vmap


def _fit(x: Tensor, branch: Tensor, *params: Tensor | None) -> bool:
    """Whether the fused op returns the same dtypes as the separate ops."""
    if autocast_dtype(x.device) is not None:
        return x.dtype is torch.float32 or x.dtype is torch.float64
    same = all(t is None or t.dtype is branch.dtype for t in params)
    return same and (x.dtype is branch.dtype or x.dtype is torch.float32)


_ACTIVATIONS = {
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",  # its constant has ten digits
    "transformers.activations.QuickGELUActivation": "quick_gelu",
}
LAYER_SCALES = {  # an adapter may add to these two
    "timm.layers.layer_scale.LayerScale": "gamma",
    "timm.models.vision_transformer.LayerScale": "gamma",
}
DROP_PATHS = {"timm.layers.drop.DropPath"}
