"""What the machine is, which path an op takes on it, and the launcher.

No other file asks about the machine, and no other file launches a kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.autograd.forward_ad as forward_ad
import triton
import triton.language as tl

#: "auto": Triton and cuBLAS where the kernels run, else plain PyTorch. "fused": Triton and cuBLAS, or an error.
#: "triton": Triton for every product, too, or an error. "reference": plain PyTorch.
Impl = Literal["auto", "fused", "triton", "reference"]
IMPLS: tuple[str, ...] = get_args(Impl)

#: Fixed at import, because the kernels are decorated then: set ``TRITON_INTERPRET=1`` before it.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

HALF = (torch.float16, torch.bfloat16)
_ACC_TYPES = {
    torch.float16: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


# ---- what the machine is ---------------------------------------------------------------------------------------------


OnLaunch = Callable[[Any, tuple[int, ...], dict[str, Any], dict[str, Any]], None]


@dataclasses.dataclass
class DryRun:
    """A GPU that is not there, and what is called instead of each launch; see `vit.kernels.dry_run`."""

    arch: int
    on_launch: OnLaunch
    num_sms: int


current_dry_run: DryRun | None = None  # set by `vit.kernels.dry_run` alone


@functools.cache
def _capability(index: int) -> int:
    if not torch.cuda.is_available():  # a fake CUDA tensor on a machine without a GPU counts as a recent GPU
        return 90
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _num_sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 132


@torch.compiler.assume_constant_result
def arch(device: torch.device) -> int:
    """Compute capability times ten (80, 89, 90 …) of the target; 0 when the kernels are interpreted."""
    if current_dry_run is not None:
        return current_dry_run.arch
    if INTERPRETED:
        return 0
    return _capability(device.index or 0)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of the target. Few when interpreted, so that the loops of a program run several times."""
    if current_dry_run is not None:
        return current_dry_run.num_sms
    return 3 if INTERPRETED else _num_sms(device.index or 0)


def allow_descriptors(device: torch.device) -> None:
    """Lets this thread's next kernels make tensor descriptors, which a GPU with TMA keeps in memory from here."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """Accumulator and statistics type of a kernel: fp32, or fp64 for fp64 tensors (interpreted only)."""
    return _ACC_TYPES[dtype]


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of every dot: tf32 for fp32 tensors if PyTorch's own products use it, else IEEE.

    PyTorch reads ``fp32_precision``, whichever of its two APIs was used. ``allow_tf32`` raises after a use of both.
    """
    return "tf32" if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# ---- which path an op takes ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """The path one call of an op took, and why."""

    op: str
    path: str
    reason: str
    shape: tuple[int, ...]
    dtype: torch.dtype


AttentionListener = Callable[[torch.Tensor, torch.Tensor, float, tuple[torch.Tensor, torch.Tensor] | None], None]
_recorder: list[Choice] | None = None


@contextlib.contextmanager
def record_choices() -> Iterator[list[Choice]]:
    """Collects a `Choice` for every op called inside the ``with`` block."""
    global _recorder
    previous, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = previous


class _Listener(threading.local):
    call: AttentionListener | None = None


_listener = _Listener()


@contextlib.contextmanager
def listen_to_attention(call: AttentionListener | None) -> Iterator[None]:
    """Inside the ``with`` block, calls of attention ops in this thread also call ``call(q, k, scale, saved)``.

    q and k are [B, N, H, E], detached. saved is (m, log l) of the forward, or None where plain PyTorch ran. None
    switches an outer listener off.
    """
    previous, _listener.call = _listener.call, call
    try:
        yield
    finally:
        _listener.call = previous


def unheard() -> contextlib.AbstractContextManager:
    """A context without a listener, for attention that is not a layer's."""
    return contextlib.nullcontext() if attention_listener() is None else listen_to_attention(None)


def attention_listener() -> AttentionListener | None:
    """What listens in this thread. Not while a graph is traced, nor while a backward computes a forward again."""
    if torch.compiler.is_compiling() or _listener.call is None or torch._C._current_graph_task_id() != -1:
        return None
    return _listener.call


def _why_not_triton(tensors: Sequence[torch.Tensor]) -> str | None:
    x = tensors[0]
    if forward_ad._current_level >= 0:
        return "forward-mode AD is not defined for the Triton kernels; use impl='reference'"
    if not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return "torch.func transforms are not defined for the Triton kernels; use impl='reference'"
    interpreted = arch(x.device) == 0
    if x.dtype not in _ACC_TYPES or (x.dtype is torch.float64 and not interpreted):
        return f"dtype {x.dtype} is not supported by the Triton kernels; use float32, float16 or bfloat16"
    if interpreted:
        if any(t.dtype is torch.bfloat16 for t in tensors) and not _interpreter_has_bf16():
            return (
                "Triton's interpreter computes wrong bfloat16 results; use float32, or the strict interpreter of tests/"
            )
        return None
    if x.device.type != "cuda" and current_dry_run is None:
        return (
            f"Triton kernels need CUDA tensors, got {x.device.type}; move the tensors to an NVIDIA GPU, use "
            "impl='reference', or set TRITON_INTERPRET=1 before importing vit to interpret the kernels on the CPU"
        )
    if arch(x.device) < 80:
        return f"Triton kernels need compute capability 8.0 or newer, this GPU has {arch(x.device) / 10:.1f}"
    return None


def _interpreter_has_bf16() -> bool:
    from triton.runtime import interpreter

    return getattr(interpreter, "bf16_is_exact", False)


def use_triton(op: str, impl: str, tensors: Sequence[torch.Tensor | None], unsupported: str | None = None) -> bool:
    """Whether this call of ``op`` runs its Triton kernels, or else PyTorch's operators. See `choose_path`."""
    return choose_path(op, impl, tensors, unsupported) == "triton"


def choose_path(
    op: str,
    impl: str,
    tensors: Sequence[torch.Tensor | None],
    unsupported: str | None = None,
    *,
    cublas: bool = False,
) -> Literal["triton", "cublas", "pytorch", "reference"]:
    """Decides what this call of ``op`` runs: Triton kernels, cuBLAS, or, for two reasons, PyTorch's operators.

    Args:
        op: public name of the op, for messages and `vit.explain`.
        impl: one of `IMPLS`.
        tensors: tensor arguments, the main one first; ``None`` entries are skipped.
        unsupported: why the op's kernels cannot take these shapes, if they cannot.
        cublas: the call is a plain product, and cuBLAS runs it instead of a Triton kernel.

    Raises:
        ValueError: unknown ``impl``, or tensors on different devices.
        RuntimeError: ``impl="fused"`` or ``"triton"`` where the kernels cannot run, because an explicit request never
            falls back; or DTensors and plain tensors are mixed.
    """
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(map(repr, IMPLS))}, got {impl!r}")
    present = [t for t in tensors if t is not None]
    x = present[0]
    for t in present[1:]:
        if t.device != x.device:
            raise ValueError(f"{op}: all tensors must be on one device, got {x.device} and {t.device}")
    sharded = [type(t).__name__ for t in present].count("DTensor")
    if 0 < sharded < len(present):
        raise RuntimeError(
            f"{op}: some of its tensors are sharded (DTensor) and some are not; give fully_shard whole blocks and the "
            "model, call the model itself, and name its other methods to register_fsdp_forward_method"
        )

    if impl == "reference":
        path, reason = "reference", "asked for with impl='reference'"
    elif impl == "auto" and x.device.type != "cuda" and current_dry_run is None:
        path, reason = "pytorch", f"auto: a {x.device.type} tensor runs PyTorch's operators"
    elif why_not := _why_not_triton(present) or unsupported or (sharded and "the kernels do not take DTensors"):
        if impl != "auto":
            raise RuntimeError(f"{op}: impl={impl!r} cannot run: {why_not}")
        path, reason = "pytorch", f"auto: {why_not}"
    else:
        path, reason = "triton", "auto: supported on this GPU" if impl == "auto" else f"asked for with impl={impl!r}"
        if cublas:
            path, reason = "cublas", f"{impl}: cuBLAS runs plain products"
        elif impl != "auto" and INTERPRETED:
            reason += ", interpreted"
    if _recorder is not None:
        _recorder.append(Choice(op, path, reason, tuple(x.shape), x.dtype))
    return path


def rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., D] as [M, D] with unit stride inside a row. Copies only where no view has these strides."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def refuse_second_derivative(op: str, backward: torch.library.CustomOpDef) -> None:
    """Makes the second derivative of ``op`` an error: the gradient of ``backward`` raises, and says what to do."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{op}: the Triton kernels have no second derivative; use impl='reference', an option of every op, of "
            "vit.create_model and of vit.accelerate"
        )

    backward.register_autograd(refuse)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether any of these requires grad, so that the forward must save tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- the launcher ----------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: int | tuple[int, ...], *, num_warps: int, num_stages: int, **args: Any) -> None:
    """Launches a Triton kernel on the device of its first tensor argument; the grid may be empty.

    Raises:
        ValueError: the grid exceeds what CUDA can launch (2³¹−1 on x, 65,535 on y and z).
    """
    grid = (grid,) if isinstance(grid, int) else grid
    if 0 in grid:
        return
    if not INTERPRETED:
        _fix_cache_keys()
    if grid[0] > 2**31 - 1 or any(g > 65_535 for g in grid[1:]):
        raise ValueError(f"{kernel.__name__}: a grid of {grid} exceeds what CUDA can launch")
    # Explicit, because Triton's default has changed between versions and it changes results.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    if current_dry_run is not None:
        current_dry_run.on_launch(kernel, grid, args, options)
        return
    device = next(a.device for a in map(_tensor_of, args.values()) if a is not None)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**args, **options)


@functools.cache
def _fix_cache_keys() -> None:
    """Computes the cache keys of all kernels in one fixed order.

    Triton computes a key on first use, and the order of first uses changes the keys. In a fixed order every process
    finds a kernel in Triton's cache under the same key.
    """
    package = __name__.rpartition(".")[0]
    for name in sorted(name for name in sys.modules if name.startswith(f"{package}.")):
        for value in vars(sys.modules[name]).values():
            if isinstance(value, triton.JITFunction):
                value.cache_key  # noqa: B018 (kept once it is known)


def _tensor_of(arg: Any) -> torch.Tensor | None:
    arg = getattr(arg, "base", arg)  # a TensorDescriptor carries its tensor
    return arg if isinstance(arg, torch.Tensor) else None
