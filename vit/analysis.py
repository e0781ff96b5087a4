"""Look inside a ViT without storing attention matrices: attention statistics, exact rows, rollout, embeddings.

It listens to the attention ops while ``model(...)`` runs. So it works for the model of this package and for every model
that `vit.accelerate` took. The output of the model keeps its bits. Shapes: L layers, B images, H heads, N tokens, GH x
GW patches.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vit.kernels as kernels
from vit.kernels import runtime
from vit.unchanged import unchanged

CONVENTIONS = ("published", "renormalised")
HEAD_FUSIONS = ("mean", "max", "min")


class Tokens(NamedTuple):
    """Where the tokens of a forward come from: ``num_prefix_tokens``, then a grid of patches, row by row."""

    num_prefix_tokens: int
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]  # pixels

    def index(self, query: Any, has_class_token: bool) -> int:
        """The token that "cls", an index or (row, column) names."""
        tokens = self.num_prefix_tokens + math.prod(self.grid_size)
        if isinstance(query, str):
            if query != "cls":
                raise ValueError(f'query must be "cls", the index of a token or (row, column), got {query!r}')
            if not has_class_token:
                raise ValueError('the model has no class token; give query=(row, column) of a patch instead of "cls"')
            return 0
        if isinstance(query, Sequence):
            row, column = query
            if not (0 <= row < self.grid_size[0] and 0 <= column < self.grid_size[1]):
                raise IndexError(f"query {tuple(query)} is not in the grid of {_x(self.grid_size)} patches")
            return self.num_prefix_tokens + row * self.grid_size[1] + column
        if not -tokens <= query < tokens:
            raise IndexError(f"query {query} is not one of the {tokens} tokens")
        return query % tokens


class ModelStatistics:
    """What `attention_statistics` yields: the statistics of the last ``model(...)`` in its ``with`` block.

    Every property raises RuntimeError if no attention op was seen.
    """

    def __init__(self, model: nn.Module, convention: str, per_query: bool, received: bool) -> None:
        self._model, self._convention, self._per_query, self._received = model, convention, per_query, received
        self._layers: list[dict[str, Tensor]] = []
        self._call: tuple | None = None
        self._tokens: Tokens | None = None

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
        self._seen()
        return self._tokens

    @property
    def uniform_distance(self) -> float:
        """What `distance` would be if every query looked at every token equally, in pixels."""
        prefix, grid, patch = self.tokens
        return uniform_distance(grid, patch, prefix if self._convention == "published" else 0)

    def rows(self, layer: int, queries: Sequence[int] | Tensor) -> Tensor:
        """Exact attention probabilities of some queries: [B, H, len(queries), N].

        Runs the last ``model(...)`` again as far as this layer, with the same random numbers. The inputs are kept for
        it, q and k are not.

        Raises:
            IndexError: no such layer or query.
            RuntimeError: no attention op was seen, or the weights have changed since.
        """
        self._seen()
        count = len(self._layers)
        if not -count <= layer < count:
            raise IndexError(f"layer {layer}: the model has {count} layers")
        args, kwargs, random, versions = self._call
        if versions != _versions(self._model):
            raise RuntimeError("the weights have changed since the forward; run model(...) again before rows")
        left = [layer % count]

        def listen(q: Tensor, k: Tensor, scale: float, saved: Any) -> None:
            if _is_layer(q, k):
                if left[0] == 0:
                    raise _Found(kernels.attention_probs(q, k, scale=scale, queries=queries))
                left[0] -= 1

        with unchanged(self._model, (args, kwargs)), torch.no_grad(), _paused(self):
            _set_random_states(random)
            try:
                with runtime.listen_to_attention(listen):
                    self._model(*args, **kwargs)
            except _Found as found:
                return found.probs
        raise RuntimeError(f"layer {layer} was not reached when the model ran again")

    # ---- what the hooks call ----

    def _start(self, args: tuple, kwargs: dict) -> None:
        self._layers, self._tokens = [], None
        self._call = args, kwargs, _random_states(self._model), _versions(self._model)

    def _listen(self, q: Tensor, k: Tensor, scale: float, saved: tuple[Tensor, Tensor] | None) -> None:
        if not _is_layer(q, k):
            return
        if self._tokens is None:
            self._tokens = tokens_of(self._model, q.shape[1], *self._call[:2])
        prefix, grid, patch = self._tokens
        options = {"grid_size": grid, "num_prefix_tokens": prefix, "patch_size": patch, "scale": scale}
        found = kernels.attention_statistics(q, k, saved=saved, received=self._received, **options)
        distance = found.distance
        if self._convention == "renormalised":
            distance = distance / found.patch_mass.clamp_min(torch.finfo(distance.dtype).tiny)
        layer = {"distance": distance, "entropy": found.entropy, "prefix_mass": found.prefix_mass}
        if not self._per_query:
            layer = {k: v[..., 0 if k == "entropy" else prefix :].mean(-1) for k, v in layer.items()}
        layer["max_logit"] = found.max_logit if self._per_query else found.max_logit.amax(-1)
        self._layers.append(layer | ({"received": found.received} if self._received else {}))

    def _seen(self) -> None:
        if not self._layers:
            raise RuntimeError(
                "no attention op of vit.kernels ran inside the with block: call the model itself there, not a compiled "
                "form or another method of it, and a model of another library after vit.accelerate(model)"
            )

    def _stack(self, name: str) -> Tensor:
        self._seen()
        return torch.stack([layer[name] for layer in self._layers])


@contextlib.contextmanager
def attention_statistics(
    model: nn.Module, *, convention: str = "published", per_query: bool = False, received: bool = False
) -> Iterator[ModelStatistics]:
    """``with vit.attention_statistics(model) as stats: model(image)``: statistics of every layer's attention.

    Nothing of size N x N is stored. The output and the gradients of the model keep their bits, so this may stay on in
    training. Each ``model(...)`` replaces the statistics of the one before. Other models, other threads and
    recomputations of gradient checkpointing do not count.

    Args:
        model: a model of this package, or one that `vit.accelerate` took.
        convention: of `ModelStatistics.distance`. "published" is the rule of the paper's author: attention to prefix
            tokens counts as distance 0 (https://github.com/google-research/vision_transformer/issues/162).
            "renormalised" divides by the attention to patches.
        per_query: keep the values of each query instead of their mean (of max_logit: instead of the maximum).
        received: also compute what each token receives.

    Yields:
        `ModelStatistics`, also usable after the block.

    Raises:
        ValueError: unknown convention. While the model runs: its tokens are not prefix tokens and a grid of patches,
            for example with patch dropout.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    stats = ModelStatistics(model, convention, per_query, received)
    with _heard(model, stats._listen, stats._start, stats):
        yield stats


@torch.no_grad()
def rollout(model: nn.Module, *args: Any, query: Any = "cls", head_fusion: str = "mean", **kwargs: Any) -> Tensor:
    """Attention rollout (Abnar & Zuidema, 2020): how much of each input token reaches a query through all layers.

    R <- (A + I) R with normalised rows, from the first layer up; A is the mean over heads of the attention.
    It holds one matrix [N, N] for each image, and a few rows of A at a time. Convention:
    https://github.com/google-research/vision_transformer/issues/18

    Args:
        model: as in `attention_statistics`.
        *args: positional arguments of ``model(...)``.
        query: "cls", the index of a token, (row, column) of a patch, or None for all tokens.
        head_fusion: "mean", "max" or "min" over the heads.
        **kwargs: keyword arguments of ``model(...)``.

    Returns:
        [B, N], or [B, N, N] for ``query=None``; the sum over the last dimension is 1. fp32, or fp64 for fp64 models.

    Raises:
        ValueError: no class token for "cls", unknown head_fusion, or the tokens are not a grid. IndexError: no such
            query. RuntimeError: no attention op was seen.
    """
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion must be one of {', '.join(map(repr, HEAD_FUSIONS))}, got {head_fusion!r}")
    state: dict[str, Any] = {}

    def listen(q: Tensor, k: Tensor, scale: float, saved: Any) -> None:
        if not _is_layer(q, k):
            return
        if "R" not in state:
            tokens = tokens_of(model, q.shape[1], args, kwargs)
            state["index"] = None if query is None else tokens.index(query, has_class_token(model))
            wide = torch.promote_types(q.dtype, torch.float32)
            state["R"] = torch.eye(q.shape[1], dtype=wide, device=q.device).repeat(len(q), 1, 1)
        for image, R in enumerate(state["R"]):
            _roll(R, q[image : image + 1], k[image : image + 1], scale, head_fusion)

    with _heard(model, listen):
        model(*args, **kwargs)
    if "R" not in state:
        ModelStatistics(model, "published", False, False)._seen()
    R, index = state["R"], state["index"]
    return R if index is None else R[:, index].clone()


def _roll(R: Tensor, q: Tensor, k: Tensor, scale: float, head_fusion: str) -> None:
    """One layer of the rollout R [N, N] of one image, in place."""
    N, HEADS = q.shape[1:3]
    step = max(1, N // (4 * HEADS))  # the rows of all heads together are a quarter of [N, N]
    rolled = torch.empty_like(R)
    for start in range(0, N, step):
        queries = range(start, min(start + step, N))
        fused = getattr(torch, {"mean": "mean", "max": "amax", "min": "amin"}[head_fusion])(
            kernels.attention_probs(q, k, scale=scale, queries=queries)[0], dim=0
        )  # [queries, N]
        rolled[start : start + step] = (fused @ R + R[start : start + step]) / (fused.sum(-1, keepdim=True) + 1.0)
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


def tokens_of(model: nn.Module, count: int, args: tuple, kwargs: dict) -> Tokens:
    """Which of ``count`` tokens are patches, from the patch projection and the image among the arguments."""
    patch = patch_size_of(model)
    images = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4]
    if not images:
        raise ValueError("no image [B, C, H, W] is among the arguments of the model")
    grid = tuple(-(-size // side) for size, side in zip(images[0].shape[2:], patch, strict=True))
    prefix = count - math.prod(grid)
    known = next((m.num_prefix_tokens for m in model.modules() if hasattr(m, "num_prefix_tokens")), None)
    if prefix < 0 or known not in (None, prefix):
        raise ValueError(
            f"{count} tokens are not {'the' if known is None else known} prefix tokens and {_x(grid)} patches; a model "
            "that drops patches has no places for them: set its patch_drop_rate to 0, or call model.eval()"
        )
    return Tokens(prefix, grid, patch)


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """(height, width) of the patch projection, the first convolution whose stride is its kernel."""
    return patch_projection_of(model).kernel_size


def patch_projection_of(model: nn.Module) -> nn.Conv2d:
    """The first convolution whose stride is its kernel size. ValueError if there is none."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
            return module
    raise ValueError(f"{type(model).__name__} has no patch projection, a convolution whose stride is its kernel size")


def has_class_token(model: nn.Module) -> bool:
    """Whether a parameter has the name of a class token in timm, transformers or torchvision."""
    return any(name.rpartition(".")[2] in ("cls_token", "class_token") for name, _ in model.named_parameters())


# ---- listening -------------------------------------------------------------------------------------------------------


class _Found(Exception):
    """Ends a forward as soon as the wanted rows are known."""

    def __init__(self, probs: Tensor) -> None:
        self.probs = probs


def _is_layer(q: Tensor, k: Tensor) -> bool:
    """Whether a call is self-attention, and not for example attention pooling."""
    return q.shape[1] == k.shape[1]


_pauses = threading.local()


@contextlib.contextmanager
def _paused(owner: ModelStatistics) -> Iterator[None]:
    """The hooks of ``owner`` do nothing inside, in this thread."""
    paused = _pauses.__dict__.setdefault("owners", [])
    paused.append(owner)
    try:
        yield
    finally:
        paused.pop()


@contextlib.contextmanager
def _heard(
    model: nn.Module,
    listen: Callable[[Tensor, Tensor, float, Any], None],
    start: Callable[[tuple, dict], None] = lambda args, kwargs: None,
    owner: ModelStatistics | None = None,
) -> Iterator[None]:
    """While ``model(...)`` runs in this thread, attention ops call ``listen``; ``start`` gets its arguments first."""
    thread, depth, listening = threading.get_ident(), [0], contextlib.ExitStack()

    def mine() -> bool:
        if torch.compiler.is_compiling() or threading.get_ident() != thread:
            return False
        return owner not in getattr(_pauses, "owners", ())

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if mine():
            depth[0] += 1
            if depth[0] == 1:
                start(args, kwargs)
                listening.enter_context(runtime.listen_to_attention(listen))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if mine() and depth[0]:
            depth[0] -= 1
            if depth[0] == 0:
                listening.close()

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        listening.close()


def _versions(model: nn.Module) -> list[int]:
    return [p._version for p in model.parameters() if not p.is_inference()]


def _random_states(model: nn.Module) -> dict[torch.device, Tensor]:
    """The states of the generators of the CPU and of the model's GPUs; empty in evaluation, which draws nothing."""
    if not any(m.training for m in model.modules()):
        return {}
    cpu = torch.device("cpu")
    devices = {p.device for p in model.parameters() if p.is_cuda}
    return {cpu: torch.get_rng_state()} | {d: torch.cuda.get_rng_state(d) for d in devices}


def _set_random_states(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _x(size: tuple[int, int]) -> str:
    return " x ".join(map(str, size))
