"""LayerNorm outputs that are computed again in the backward instead of being saved.

y = layer_norm(s) is the input of `linear` or `mlp`, which need it for the gradient of their weight. The LayerNorm's own
backward needs s. So these ops save s, which is in memory anyway, and compute y again: one pass, and the same bits.

A LayerNorm called with ``recompute=True`` notes the source of y, which is s, weight, bias and eps. Any other tensor,
such as a cast or a view of y, has no source and is saved as it is. So is y if it or its source was changed in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Source = tuple[Tensor, Tensor | None, Tensor | None, float | None]  # s, weight, bias, eps
_sources = WeakTensorKeyDictionary()  # y -> its source, and the versions of these tensors


def note_source(y: Tensor, *source: *Source) -> None:
    """Allows ops that read y to save its source instead."""
    _sources[y] = source, _versions(y, source)


def has_source(y: Tensor) -> bool:
    """Whether y has a source. False while `torch.compile` traces Python, because notes are made later, by autograd."""
    return not torch.compiler.is_compiling() and y in _sources


def source_of(y: Tensor) -> Source:
    """What an op saves if its backward needs y: the source of y, or (y, None, None, None)."""
    source, versions = _sources.get(y, (None, None))
    return (y, None, None, None) if source is None or versions != _versions(y, source) else source


def again(s: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, dtype: torch.dtype) -> Tensor:
    """The y of `source_of`, which had this dtype."""
    if eps is None:
        return s
    args = None, None, None, None, weight, bias, None, eps, 0.0, 0, dtype, False
    return torch.ops.vit.layer_norm_fwd(s, *args)[1]


def _versions(y: Tensor, source: Source) -> list[int]:
    return [t._version for t in (y, *source[:3]) if t is not None]
