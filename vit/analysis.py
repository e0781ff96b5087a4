"""Look inside a ViT without storing attention matrices: attention statistics, exact rows, rollout.

Hooks of the model tell when it runs. Meanwhile each attention op hands over its queries and keys. So it works for the
model of this package and for every model that `vit.accelerate` took, and the output of the model keeps its bits.
Shapes: L layers, B images, H heads, N tokens.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import vit.kernels as kernels
from vit.adapters import part_of
from vit.kernels import runtime
from vit.kernels.autocast import autocast_dtype, autocasts
from vit.layers import Block
from vit.plain import class_of
from vit.unchanged import swaps_parameters, unchanged

CONVENTIONS = ("published", "renormalised")
HEAD_FUSIONS = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}
# Parameters [1, count, D] that are prefix tokens, by their names in timm, transformers and torchvision.
CLASS_TOKENS = ("cls_token", "class_token")
PREFIX_TOKENS = (*CLASS_TOKENS, "dist_token", "distillation_token", "reg_token", "register_tokens")


class Tokens(NamedTuple):
    """The tokens of a forward: ``num_prefix_tokens``, then a grid of patches, row by row."""

    num_prefix_tokens: int
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]  # pixels

    def index(self, query: Any, has_class_token: bool) -> int:
        """The token that "cls", an index or (row, column) names."""
        (rows, columns), first = self.grid_size, self.num_prefix_tokens
        if isinstance(query, str):
            if query != "cls":
                raise ValueError(f"{_QUERY}, got {query!r}")
            if not has_class_token:
                raise ValueError('the model has no class token; give query=(row, column) of a patch instead of "cls"')
            return 0
        if isinstance(query, (tuple, list)) and len(query) == 2:
            row, column = (_integer(_QUERY, place) for place in query)
            if not (0 <= row < rows and 0 <= column < columns):
                raise IndexError(f"query {(row, column)} is not in the grid of {rows} x {columns} patches")
            return first + row * columns + column
        index, tokens = _integer(_QUERY, query), first + rows * columns
        if not -tokens <= index < tokens:
            raise IndexError(f"query {index} is not one of the {tokens} tokens")
        return index % tokens


class ModelStatistics:
    """What `attention_statistics` yields: the statistics of the last ``model(...)`` that ended in its ``with`` block.

    Every property raises RuntimeError if there was none, or if the attention of a block was not seen.
    """

    def __init__(self, model: nn.Module, convention: str, per_query: bool, received: bool) -> None:
        self._model, self._convention, self._per_query, self._received = model, convention, per_query, received
        self._last: list[_Forward] = []

    @property
    def distance(self) -> Tensor:
        """Mean attention distance in pixels [L, B, H]: mean over the patch queries, by the ``convention``.

        With ``per_query`` [L, B, H, N]; it is 0 for prefix tokens, which have no place.
        """
        return self._stack("distance")

    @property
    def entropy(self) -> Tensor:
        """Mean over all queries of the entropy −Σ p log p, in nats [L, B, H]; with ``per_query`` [L, B, H, N]."""
        return self._stack("entropy")

    @property
    def max_logit(self) -> Tensor:
        """The largest logit of all queries [L, B, H]; with ``per_query`` of each query [L, B, H, N]."""
        return self._stack("max_logit")

    @property
    def prefix_mass(self) -> Tensor:
        """Mean over the patch queries of what prefix tokens receive [L, B, H]; with ``per_query`` of each token."""
        return self._stack("prefix_mass")

    @property
    def received(self) -> Tensor:
        """What each token receives, the mean over all queries: [L, B, H, N]. Needs ``received=True``."""
        if not self._received:
            raise RuntimeError("received was not asked for; use vit.attention_statistics(model, received=True)")
        return self._stack("received")

    @property
    def tokens(self) -> Tokens:
        """The prefix tokens, the grid and the patch size of the forward."""
        return self._forward.tokens

    @property
    def uniform_distance(self) -> float:
        """What `distance` would be if every query looked at every token equally, in pixels."""
        prefix, grid, patch = self.tokens
        return uniform_distance(grid, patch, prefix if self._convention == "published" else 0)

    def rows(self, layer: int, queries: Iterable[Any]) -> Tensor:
        """Exact attention probabilities of some queries: [B, H, number of queries, N].

        Runs the last ``model(...)`` again, with the same random numbers and under the same autocast. Its inputs are
        kept for that; q and k are not.

        Args:
            layer: index of the layer, negative ones from the end.
            queries: each is "cls", the index of a token, or (row, column) of a patch.

        Raises:
            IndexError: no such layer or query.
            TypeError: not indices.
            ValueError: "cls" of a model without a class token.
            RuntimeError: no attention op was seen, or the model or its inputs have changed since.
        """
        last = self._forward
        layer, count = _integer("layer must be an integer", layer), len(last.layers)
        if not -count <= layer < count:
            raise IndexError(f"layer {layer} is not one of the {count} layers")
        queries = queries.tolist() if isinstance(queries, Tensor) else queries
        if isinstance(queries, str) or not isinstance(queries, Iterable):
            raise TypeError(f"queries must be a list of queries, got {queries!r}")
        queries = [last.tokens.index(query, has_class_token(self._model)) for query in queries]

        def one_layer(again: _Forward, q: Tensor, k: Tensor, scale: float, saved: Any) -> Tensor | None:
            wanted = len(again.layers) == layer % count
            return kernels.attention_probs(q, k, scale=scale, queries=queries) if wanted else None

        return last.again(one_layer).layers[layer]

    def _layer(self, forward: _Forward, q: Tensor, k: Tensor, scale: float, saved: Any) -> dict[str, Tensor]:
        prefix, grid, patch = forward.tokens
        options = {"grid_size": grid, "num_prefix_tokens": prefix, "patch_size": patch, "scale": scale}
        found = kernels.attention_statistics(q, k, saved=saved, received=self._received, **options)
        distance = found.distance
        if self._convention == "renormalised":
            distance = distance / found.patch_mass.clamp_min(torch.finfo(distance.dtype).tiny)
        layer = {"distance": distance, "entropy": found.entropy, "prefix_mass": found.prefix_mass}
        if not self._per_query:
            layer = {name: v[..., 0 if name == "entropy" else prefix :].mean(-1) for name, v in layer.items()}
        layer["max_logit"] = found.max_logit if self._per_query else found.max_logit.amax(-1)
        return layer | ({"received": found.received} if self._received else {})

    @property
    def _forward(self) -> _Forward:
        return _complete(self._model, self._last)

    def _stack(self, name: str) -> Tensor:
        return torch.stack([layer[name] for layer in self._forward.layers])


@contextlib.contextmanager
def attention_statistics(
    model: nn.Module, *, convention: str = "published", per_query: bool = False, received: bool = False
) -> Iterator[ModelStatistics]:
    """``with vit.attention_statistics(model) as stats: model(image)``: statistics of every layer's attention.

    Nothing of size N x N is stored. The output and the gradients of the model keep their bits, so this may stay on in
    training. Each ``model(...)`` replaces the statistics of the one before. Other models, other threads and
    recomputations of gradient checkpointing do not count. The layers are in the order in which they ran.

    Args:
        model: a model of this package, one that `vit.accelerate` took, or a module around one or inside one that takes
            the image.
        convention: of `ModelStatistics.distance`. "published" is the rule of the paper's author: attention to prefix
            tokens counts as distance 0 (https://github.com/google-research/vision_transformer/issues/162).
            "renormalised" divides by the attention to patches.
        per_query: keep the values of each query instead of their mean (of max_logit: instead of the maximum).
        received: also compute what each token receives.

    Yields:
        `ModelStatistics`, also usable after the block.

    Raises:
        ValueError: unknown convention. While the model runs: its tokens are not prefix tokens and a grid of patches,
            for example with patch dropout, or its layers have different sizes.
        TypeError: ``model`` is not a module.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    stats = ModelStatistics(model, convention, per_query, received)
    with _heard(model, stats._layer) as stats._last:
        yield stats


@torch.no_grad()
def rollout(model: nn.Module, *args: Any, query: Any = "cls", head_fusion: str = "mean", **kwargs: Any) -> Tensor:
    """Attention rollout (Abnar & Zuidema, 2020): how much of each input token reaches a query through all layers.

    R <- (A + I) R with normalised rows, from the first layer up; A is the mean over heads of the attention.
    It holds one matrix [N, N] for each image, and a few rows of A at a time. The model, its training mode and random
    states do not change. Convention: https://github.com/google-research/vision_transformer/issues/18

    Args:
        model: as in `attention_statistics`.
        *args: positional arguments of ``model(...)``.
        query: "cls", the index of a token, (row, column) of a patch, or None for all tokens.
        head_fusion: "mean", "max" or "min" over the heads.
        **kwargs: keyword arguments of ``model(...)``.

    Returns:
        [B, N], or [B, N, N] for ``query=None``; the sum over the last dimension is 1. fp32, or fp64 for fp64 models.

    Raises:
        ValueError: no class token for "cls", unknown head_fusion, or as in `attention_statistics`.
        IndexError: no such query.
        TypeError: ``query`` or ``model`` is of a wrong type.
        RuntimeError: the attention of a block was not seen.
    """
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion must be one of {', '.join(map(repr, HEAD_FUSIONS))}, got {head_fusion!r}")
    R = index = None

    def roll(forward: _Forward, q: Tensor, k: Tensor, scale: float, saved: Any) -> None:
        nonlocal R, index
        if R is None:
            index = None if query is None else forward.tokens.index(query, has_class_token(model))
            wide = torch.promote_types(q.dtype, torch.float32)
            R = torch.eye(q.shape[1], dtype=wide, device=q.device).repeat(len(q), 1, 1)
        B, N, HEADS, HEAD_DIM = q.shape
        few = max(1, 3 * B * N // (4 * HEADS * HEAD_DIM + 5 * N))  # images at a time: they take 1.5 times R
        for part in zip(R.split(few), q.split(few), k.split(few), strict=True):
            _roll(*part, scale, HEAD_FUSIONS[head_fusion])

    with _heard(model, roll) as last, unchanged(model, (args, kwargs)):
        model(*args, **kwargs)
    _complete(model, last)
    return R if index is None else R[:, index].clone()


@autocasts("R", "q", "k")  # with autocast off: it would round the product
def _roll(R: Tensor, q: Tensor, k: Tensor, scale: float, fuse: Callable[..., Tensor]) -> None:
    """One layer of the rollout R [B, N, N], in place."""
    N, HEADS = q.shape[1:3]
    step = max(1, N // (2 * HEADS))  # the rows of all heads together are half of [B, N, N]
    rolled = torch.empty_like(R)
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        A = fuse(kernels.attention_probs(q[:, rows], k, scale=scale), dim=1)  # [B, rows, N]
        rolled[:, rows] = (A @ R + R[:, rows]) / (A.sum(-1, keepdim=True) + 1.0)
    R.copy_(rolled)


def uniform_distance(
    grid_size: tuple[int, int], patch_size: tuple[float, float] = (1.0, 1.0), num_prefix_tokens: int = 0
) -> float:
    """The mean attention distance of uniform attention; prefix tokens take their share of it."""
    rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    dy = (rows[:, None] - rows).flatten() * patch_size[0]
    dx = (columns[:, None] - columns).flatten() * patch_size[1]
    patches = math.prod(grid_size)
    return (dy[:, None].square() + dx.square()).sqrt().sum().item() / (patches * (patches + num_prefix_tokens))


# ---- what the tokens are ---------------------------------------------------------------------------------------------


def tokens_of(model: nn.Module, count: int, inputs: Any) -> Tokens:
    """Which of ``count`` tokens are patches, from the patch projection and the first image among the inputs."""
    patch = patch_size_of(model)
    image = next((t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim() == 4), None)
    if image is None:
        raise ValueError(f"no image [B, C, H, W] is among the arguments of {type(model).__name__}")
    pads = any(getattr(module, "dynamic_img_pad", False) for module in model.modules())
    rows, columns = ((n + (side - 1) * pads) // side for n, side in zip(image.shape[2:], patch, strict=True))
    known, prefix = sum(prefix_tokens_of(model).values()), count - rows * columns
    if prefix < 0 or known not in (0, prefix):
        raise ValueError(
            f"the {count} tokens of {type(model).__name__} are not {known} prefix tokens and {rows} x {columns} "
            "patches; set a patch_drop_rate to 0 or call model.eval(), and of a larger model give the ViT alone"
        )
    return Tokens(prefix, (rows, columns), patch)


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) that a model of any of the libraries states as its input size, or None."""
    config, patches = getattr(model, "config", None), getattr(model, "patch_embed", None)
    said = getattr(config, "image_size", None) or getattr(config, "img_size", None)
    said = said or getattr(model, "image_size", None) or getattr(patches, "img_size", None)
    said = said or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if said is None:
        return None
    return (said, said) if isinstance(said, int) else tuple(said[-2:])


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the patch projection, in pixels."""
    return patch_projection_of(model).kernel_size


def patch_projection_of(model: nn.Module) -> nn.Conv2d:
    """The first convolution whose stride is its kernel size; 1 x 1 only if no other is. ValueError if none is."""
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == m.kernel_size]
    if not found:
        name = type(model).__name__
        raise ValueError(f"{name} has no patch projection, a convolution whose stride is its kernel size")
    return next((m for m in found if m.kernel_size != (1, 1)), found[0])


def prefix_tokens_of(model: nn.Module) -> dict[str, int]:
    """Names and numbers of the prefix tokens, of the first module that has any."""
    for module in model.modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if n in PREFIX_TOKENS and p.dim() == 3}
        if own:
            return {name: p.shape[1] for name, p in own.items()}
    return {}


def has_class_token(model: nn.Module) -> bool:
    return any(name in CLASS_TOKENS for name in prefix_tokens_of(model))


# ---- listening -------------------------------------------------------------------------------------------------------


class _Forward:
    """One forward of a model: the listener of its attention ops, and what it takes to run it again."""

    def __init__(self, model: nn.Module, inputs: tuple[tuple, dict], layer: Callable[..., Any]) -> None:
        self.model, self.layer, self.grad = model, layer, torch.is_grad_enabled()
        self.inputs = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), inputs)
        self.tokens: Tokens | None = None
        self.layers: list[Any] = []  # of each layer what ``layer(self, q, k, scale, saved)`` returned
        devices = [torch.device("cpu"), *{p.device for p in model.parameters() if p.is_cuda}]
        dtype = autocast_dtype(devices[-1])
        self.autocast = {"device_type": devices[-1].type, "dtype": dtype, "enabled": dtype is not None}
        self.random = []
        if any(module.training for module in model.modules()):  # evaluation draws nothing
            self.random = [functools.partial(torch.set_rng_state, torch.get_rng_state())]
            for cuda in devices[1:]:
                self.random += [functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(cuda), cuda)]
        self.tensors = [*model.parameters(), *(t for t in tree_leaves(self.inputs) if isinstance(t, Tensor))]
        self.versions = self._versions()

    def __call__(self, q: Tensor, k: Tensor, scale: float, saved: tuple[Tensor, Tensor] | None) -> None:
        if q.shape[1] != k.shape[1]:  # attention pooling
            return
        if self.tokens is None:
            self.tokens, self.shape = tokens_of(self.model, q.shape[1], self.inputs), q.shape[:3]
        if q.shape[:3] != self.shape:
            raise ValueError(
                f"a layer of {type(self.model).__name__} has [B, N, H] = {list(q.shape[:3])}, the first one "
                f"{list(self.shape)}; of a model with several ViTs or image sizes give one ViT, and call it once"
            )
        self.layers.append(self.layer(self, q, k, scale, saved))

    def again(self, layer: Callable[..., Any]) -> _Forward:
        """The same forward with another ``layer``, without effect on the model and on statistics."""
        if self.versions != self._versions():
            raise RuntimeError("the model or its input has changed since the forward; call model(...) again")
        again, (args, kwargs) = _Forward(self.model, self.inputs, layer), self.inputs
        with contextlib.ExitStack() as same:
            same.enter_context(unchanged(self.model, self.inputs))
            same.enter_context(torch.autocast(**self.autocast))
            same.enter_context(torch.set_grad_enabled(self.grad))  # a layer that returns its maps depends on it
            same.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t))  # saves nothing
            for restore in self.random:
                restore()
            same.enter_context(runtime.listen_to_attention(again))
            self.model(*args, **kwargs)
        return again

    def _versions(self) -> list[Any]:
        """Differs if the model or an input has changed."""
        parameters = () if swaps_parameters(self.model) else map(id, self.model.parameters())
        versions = (0 if t.is_inference() else t._version for t in self.tensors)
        return [*parameters, *versions, *(module.training for module in self.model.modules())]


@contextlib.contextmanager
def _heard(model: nn.Module, layer: Callable[..., Any]) -> Iterator[list[_Forward]]:
    """Makes a `_Forward` of each ``model(...)`` in this thread. The list holds the last one that did not raise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    thread, listening, depth = threading.get_ident(), contextlib.ExitStack(), 0
    forward: _Forward | None = None
    last: list[_Forward] = []

    def counts(module: nn.Module) -> bool:
        """Whether this is a call of the model itself, and not of a copy, a recomputation, or `_Forward.again`."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return False
        again = isinstance(runtime.attention_listener(), _Forward)
        return module is model and threading.get_ident() == thread and not again

    def begins(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal depth, forward
        if counts(module):
            depth += 1
            if depth == 1:
                outer, forward = runtime.attention_listener(), _Forward(model, (args, kwargs), layer)
                told = [forward] if outer is None else [outer, forward]
                listening.enter_context(runtime.listen_to_attention(lambda *op: [each(*op) for each in told]))

    def ends(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal depth
        if counts(module) and depth:
            depth -= 1
            if depth == 0:
                listening.close()
                if output is not None:  # the model did not raise
                    last[:] = [forward]

    hooks = [
        model.register_forward_pre_hook(begins, with_kwargs=True, prepend=True),  # before a hook changes the arguments
        model.register_forward_hook(ends, always_call=True),
    ]
    try:
        # After a KeyboardInterrupt in the model nested blocks end in another order than they began to listen.
        with runtime.listen_to_attention(runtime.attention_listener()), listening:
            yield last
    finally:
        for hook in hooks:
            hook.remove()


def _complete(model: nn.Module, last: list[_Forward]) -> _Forward:
    """The last forward. RuntimeError if there was none, or if the attention of a block was not heard in it."""
    layers = len(last[0].layers) if last else 0
    if layers == 0:
        raise RuntimeError(
            "no attention op of vit.kernels was seen: inside the with block call the model itself, not a compiled "
            "form, a vit.graph or another method of it, and a model of another library after vit.accelerate(model)"
        )
    blocks = sum(map(_is_block, model.modules()))
    if layers < blocks:
        raise RuntimeError(
            f"attention ops of vit.kernels ran in only {layers} of the {blocks} blocks of {type(model).__name__}: "
            "accelerate all of them, compile none, and of a larger model give the ViT that runs"
        )
    return last[0]


def _is_block(module: nn.Module) -> bool:
    part = part_of(class_of(module))
    return isinstance(module, Block) or (part is not None and part.kind == "block")


_QUERY = 'query must be "cls", the index of a token or (row, column) of a patch'


def _integer(message: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{message}, got {value!r}")
    return value.__index__()
