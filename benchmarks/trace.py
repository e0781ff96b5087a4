"""Counts all GPU work of a module, forward and backward, without a GPU.

The module runs on tensors of device "meta", which have shapes and no contents. A `Launch` is an operation of PyTorch
that moves data, or a kernel that the host code of our ops launches. It counts:

bytes: the memory of its operands and outputs, each region once. If the cache is too small, a kernel that reads an
    operand several times moves more. An operation of PyTorch counts as one kernel, as most of them are.
FLOPs: two per multiply-add of matrix products and attention, and nothing else. For PyTorch's operations they are those
    of `torch.utils.flop_counter`, for ours those of FLOPS below. Attention's backward has five products, of which one
    recomputes the logits.

`F.scaled_dot_product_attention` counts as flash attention for 16-bit tensors and as the memory-efficient kernel for
fp32, as PyTorch chooses on a GPU for ViTs. Workspaces of cuBLAS and cuDNN are not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vit.kernels import runtime
from vit.kernels.dry_run import dry_run


@dataclasses.dataclass
class Launch:
    """One kernel, or one operation of PyTorch that moves data. ``grid`` and later fields are for our kernels only."""

    name: str
    phase: str  # "fwd" or "bwd"
    flops: int
    bytes: int
    shapes: tuple[tuple[int, ...], ...]  # of its tensors with two dimensions or more
    grid: tuple[int, ...] | None = None
    kernel: Any = None
    args: dict[str, Any] | None = None
    options: dict[str, Any] | None = None


def _attention(products: int) -> Callable[[dict[str, Any]], int]:
    def flops(a: dict[str, Any]) -> int:
        batch, queries, heads, head_dim = a["q_ptr"].shape
        return 2 * products * batch * heads * queries * a["NK"] * head_dim

    return flops


def _attention_statistics(a: dict[str, Any]) -> int:
    products = 1 if a["received_ptr"] is None else 2
    return 2 * products * a["q_ptr"].numel() * a["N"]


def _patches(image: str) -> Callable[[dict[str, Any]], int]:
    return lambda a: 2 * a[image].numel() * a["D"]  # every pixel is in one patch


#: FLOPs of our kernels from their arguments. A missing kernel is an error.
FLOPS: dict[str, Callable[[dict[str, Any]], int]] = {
    **dict.fromkeys(("_gemm_kernel", "_gemm_pingpong_kernel"), lambda a: 2 * a["M"] * a["N"] * a["K"]),
    "_attention_fwd_kernel": _attention(2),
    "_attention_bwd_kernel": _attention(5),
    "_attention_statistics_kernel": _attention_statistics,
    "_patch_embed_fwd_kernel": _patches("image_ptr"),
    "_patch_embed_dw_kernel": _patches("image_ptr"),
    "_patch_embed_dimage_kernel": _patches("dimage_ptr"),
    **{
        f"_{name}_kernel": lambda a: 0
        for name in ("layer_norm_fwd", "layer_norm_bwd", "attention_delta", "partial_sums", "activation", "dropout")
    },
}


def moved(reads: Iterable[Tensor], writes: Iterable[Tensor] = ()) -> int:
    """Bytes of the regions of the tensors, each once. A region that is read and written counts twice.

    Two views are one region if they have the same first element, shape and strides. An expanded dimension counts as one
    element. All regions of a storage together are at most the storage.
    """
    total = 0
    for tensors in (reads, writes):
        storages: dict[int, tuple[int, dict[Any, int]]] = {}
        for t in tensors:
            sizes = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if s != 0 and n != 1]
            count = math.prod(n for n, _ in sizes) if t.numel() else 0
            storage = t.untyped_storage()
            regions = storages.setdefault(storage._cdata, (storage.nbytes(), {}))[1]
            regions[(t.storage_offset(), tuple(sorted(sizes)), t.dtype)] = count * t.element_size()
        total += sum(min(size, sum(regions.values())) for size, regions in storages.values())
    return total


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


class FusedAttention(TorchFunctionMode):
    """Calls the fused kernel that a GPU would use for attention. PyTorch does not use one for meta tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return _fused_attention(*args, **kwargs) if func is F.scaled_dot_product_attention else func(*args, **kwargs)


def _fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if attn_mask is None and q.dtype in runtime.HALF:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal, scale=scale)[0]


class HostCode(TorchDispatchMode):
    """Runs the host code of our custom ops for meta tensors, and calls ``called`` for every operation of PyTorch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vit":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        with self:  # an operation that is composed of others
            out = func.decompose(*args, **kwargs) if func._overloadpacket not in flop_registry else NotImplemented
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        self.called(func, args, kwargs, out)
        return out

    def called(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        raise NotImplementedError


class _Recorder(HostCode):
    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    @property
    def phase(self) -> str:
        return "fwd" if torch._C._current_graph_task_id() == -1 else "bwd"

    def called(self, func, args, kwargs, out):
        given, outputs = tensors_in((args, kwargs)), tensors_in(out)
        schema = func._schema
        written = [(i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        changed = tensors_in([args[i] if i < len(args) else kwargs.get(name) for i, name in written])
        storages = {t.untyped_storage()._cdata for t in given}
        views = all(t.untyped_storage()._cdata in storages for t in outputs)
        name = func._overloadpacket.__name__
        if (views and not changed) or name.startswith(("empty", "new_empty")):
            return
        # fill_ and copy_ do not read their target, and an operation does not read its out=.
        unread = changed[:1] if name in ("fill_", "zero_", "copy_") or schema.overload_name == "out" else []
        reads = [t for t in given if not any(t is u for u in unread)]
        if name.endswith(("zeros", "ones", "full", "zeros_like", "ones_like", "full_like")) or name == "new_full":
            reads = []  # they use only the shape
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        self.launches.append(Launch(name, self.phase, flops, moved(reads, changed or outputs), _shapes(given)))

    def launched(self, kernel, grid, args, options):
        if kernel.__name__ not in FLOPS:
            raise KeyError(f"{kernel.__name__} has no count of its FLOPs; add one to FLOPS in benchmarks/trace.py")
        flops = FLOPS[kernel.__name__](args)
        tensors = [getattr(a, "base", a) for a in args.values()]  # the tensor of a descriptor
        tensors = [t for t in tensors if isinstance(t, Tensor)]
        counts = flops, moved(tensors), _shapes(tensors)
        self.launches.append(Launch(kernel.__name__, self.phase, *counts, grid, kernel, args, options))


def _shapes(tensors: list[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in tensors if t.dim() > 1)


@contextlib.contextmanager
def recording(arch: int = 90, num_sms: int = 132) -> Iterator[list[Launch]]:
    """Collects every `Launch` inside for tensors of device "meta", as on a GPU of this architecture."""
    recorder = _Recorder()
    with dry_run(arch, recorder.launched, num_sms), FusedAttention(), recorder:
        yield recorder.launches


def step(function: Callable[..., Any], *inputs: Tensor, train: bool) -> Any:
    """A forward without gradients, or with ``train`` a forward and the backward to all parameters and inputs.

    Returns:
        The outputs; with ``train`` (outputs, gradients). Nothing is accumulated into ``.grad``.
    """
    if not train:
        with torch.no_grad():
            return function(*inputs)
    parameters = list(function.parameters()) if isinstance(function, torch.nn.Module) else []
    wanted = [t for t in [*parameters, *inputs] if t.requires_grad]
    outputs = function(*inputs)
    out = [t for t in tensors_in(outputs) if t.requires_grad]
    return outputs, torch.autograd.grad(out, wanted, [torch.empty_like(t) for t in out], allow_unused=True)


def trace(
    function: Callable[..., Any], *inputs: Tensor, train: bool = False, arch: int = 90, num_sms: int = 132
) -> list[Launch]:
    """The launches of `step`: forward, and with ``train`` also backward.

    Args:
        function: a module with its parameters on device "meta", or any function of tensors.
        *inputs: tensors on device "meta".
    """
    with recording(arch, num_sms) as launches:
        step(function, *inputs, train=train)
    return launches
