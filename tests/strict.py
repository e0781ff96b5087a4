"""Makes Triton's CPU interpreter strict: an interpreted kernel computes what a GPU would, or raises `StrictError`.

Plain ``TRITON_INTERPRET=1`` accepts kernels that are wrong on a GPU: it adds bfloat16 values as integers, reads and
writes anywhere in the process, returns 0 for masked-off lanes, wraps integers, and runs programs one after another, so
two of them may write to one output. ``install()`` replaces the parts of `triton.runtime.interpreter` that do so, and
``uninstall()`` restores them.

Pointers are plain integers in the interpreter. So each tensor argument has a `Span`. The handle of a pointer keeps its
span through pointer arithmetic, and every access is checked against that span. A pointer without a span, for example
from ``tl.where``, is checked against all spans.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as interp
from triton.runtime.errors import InterpreterError

MIN_DOT = 16
MAX_GRID = {"x": 2**31 - 1, "y": 65_535, "z": 65_535}
_SPAN = "strict.span"  # key in TensorHandle.attr
_NAN_BF16 = 0x7FFF  # the result of cvt.rn.bf16 for any NaN


class StrictError(InterpreterError):
    """An interpreted kernel does something that fails or gives another result on a GPU."""


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Bit patterns of fp32 values rounded to the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32)
    # Adds just under half of the last kept bit, or exactly half if that bit is 1. A carry rounds up.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(_NAN_BF16), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bfloat16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bf16(handle: interp.TensorHandle) -> bool:
    # A comparison's boolean result has the dtype of its operands in the interpreter, so that dtype is not enough.
    return handle.data.dtype.char == "H" and handle.dtype.scalar == tl.bfloat16


def _refuse_bf16(what: str, *handles: interp.TensorHandle) -> None:
    if any(map(_is_bf16, handles)):
        raise StrictError(f"{what} on bfloat16 values: cast to fp32 first")


def _check_range(what: str, ty: tl.dtype, op: Callable[..., np.ndarray], *operands: np.ndarray) -> None:
    """Raises if the result of ``op`` does not fit the signed integer type ``ty``. Unsigned integers may wrap."""
    if not (ty.is_int() and ty.is_int_signed() and ty.int_bitwidth > 1 and operands[0].size):
        return
    wide = np.int64
    if ty.int_bitwidth == 64:
        if np.abs(op(*(x.astype(np.float64) for x in operands))).max() < 2**62:
            return
        wide = object  # Python's integers
    exact = np.asarray(op(*(x.astype(wide) for x in operands)))
    for value in (exact.min(), exact.max()):
        if not ty.get_int_min_value() <= value <= ty.get_int_max_value():
            raise StrictError(f"{ty} overflow in {what}: {value} does not fit")


def _check_binary_overflow(lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable[..., tl.tensor]) -> None:
    op = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
    _check_range(binary_op.__name__, lhs.type.scalar, op, lhs.handle.data, rhs.handle.data)


def _check_reduction(self: interp.ReduceScanOpInterface, inputs: tuple[tl.tensor, ...]) -> None:
    """Runs before every tl.reduce and tl.associative_scan."""
    _plain_check_tensor(self, inputs)
    name = self.combine_fn.__name__
    for x in inputs:
        ty = x.type.scalar
        if ty.is_bf16() or (ty.is_fp16() and not any(word in name for word in ("max", "min"))):
            raise StrictError(f"reduction or scan ({name}) of {ty} values: cast to fp32 first")
        if self.combine_fn is tl.standard._sum_combine:
            op = np.sum if isinstance(self, interp.ReduceOps) else np.cumsum
            _check_range(op.__name__, ty, functools.partial(op, axis=self.axis), x.handle.data)


@dataclasses.dataclass
class Span:
    """The bytes of one tensor argument, without the rest of its storage and the gaps between its rows."""

    name: str
    base: int
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    storage: int  # its address
    nbytes: int  # of the storage

    def __post_init__(self) -> None:
        extent = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        self.elements = 0 if 0 in self.shape else extent
        self.end = self.base + self.elements * self.itemsize

    @functools.cached_property
    def filled(self) -> np.ndarray | None:
        """A mask of the elements between first and last that belong to the tensor, or None if all do."""
        if math.prod(n for n, s in zip(self.shape, self.strides, strict=True) if s) == self.elements:
            return None
        filled = np.zeros(self.elements, dtype=bool)
        np.lib.stride_tricks.as_strided(filled, self.shape, self.strides)[...] = True
        return filled

    def inside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        end = np.uint64(self.end)
        inside = (addresses >= np.uint64(self.base)) & (addresses < end) & (end - addresses >= np.uint64(size))
        if self.filled is not None:
            first = (addresses[inside] - np.uint64(self.base)).astype(np.int64)
            inside[inside] = self.filled[first // self.itemsize] & self.filled[(first + size - 1) // self.itemsize]
        return inside

    def distance(self, address: int) -> int:
        return max(self.base - address, address + 1 - self.end, 0)

    def describe(self, address: int) -> str:
        gap = ", in a gap between its rows" if self.filled is not None and not self.distance(address) else ""
        return (
            f"{self.name}[{(address - self.base) // self.itemsize}] (byte offset {address - self.base}){gap}; "
            f"{self.name} has shape {self.shape}, strides {self.strides}, elements 0 to {self.elements - 1}"
        )


def _tensors(name: str, arg: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(arg, tuple):
        for i, item in enumerate(arg):
            yield from _tensors(f"{name}[{i}]", item)
    elif isinstance(arg, interp.TensorDescriptor):
        yield name, arg.base
    elif hasattr(arg, "data_ptr"):
        yield name, arg


def _spans(args: list[tuple[str, Any]]) -> dict[int, Span]:
    """The span of each tensor argument, by the id of the tensor."""
    spans = {}
    for name, arg in (pair for named in args for pair in _tensors(*named)):
        t = interp._unwrap_tensor(arg)
        memory = t.untyped_storage()
        layout = t.element_size(), tuple(t.shape), t.stride()
        spans[id(arg)] = Span(name, t.data_ptr(), *layout, memory.data_ptr(), memory.nbytes())
    return spans


def _implicit_cvt(arg: Any) -> Any:
    """Adds its span to each pointer argument."""
    out = _plain_implicit_cvt(arg)
    if hasattr(arg, "data_ptr"):
        out.handle.attr[_SPAN] = interp.interpreter_builder.spans[id(arg)]
    return out


def _set_attr(self: interp.TensorHandle, key: str, value: Any) -> None:
    """Checks a promise to the compiler, such as ``tl.multiple_of``."""
    if key == "tt.divisibility" and np.any(self.data % math.gcd(*value)):
        raise StrictError(f"multiple_of({value}) of {self.data[self.data % math.gcd(*value) != 0].flat[0]}")
    _plain_set_attr(self, key, value)


def _patch_lang(fn: Callable[..., Any]) -> Any:
    """Patches tl once per launch instead of at every call of a device function, which took a third of the time."""
    langs = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    patched = interp.interpreter_builder.patched
    if langs and langs <= patched:
        return None
    patched |= langs
    return _plain_patch_lang(fn)


def _keep_span(name: str) -> Callable[..., interp.TensorHandle]:
    """A builder method whose result keeps the span of its pointer argument."""

    def method(self: StrictBuilder, *args: Any) -> interp.TensorHandle:
        out = getattr(super(StrictBuilder, self), name)(*args)
        source = args[1] if name == "create_splat" else args[0]
        if _SPAN in source.attr:
            out.attr[_SPAN] = source.attr[_SPAN]
        return out

    return method


def _poison(ptrs: interp.TensorHandle) -> interp.TensorHandle:
    """The values of masked-off lanes without ``other``. They are undefined on a GPU, and NaN or the maximum here."""
    ty = ptrs.get_element_ty()
    dtype = interp._get_np_dtype(ty)
    value = _NAN_BF16 if ty == tl.bfloat16 else np.nan if dtype.kind == "f" else np.iinfo(dtype).max
    return interp.TensorHandle(np.full(ptrs.data.shape, value, dtype=dtype), ty)


class StrictDescriptor(interp.TensorDescHandle):
    """A tensor descriptor that checks the rules of the hardware and keeps the span of its tensor."""

    def validate(self) -> None:
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        if self.base.data.item() % 16:
            raise StrictError("descriptor: the base address must be a multiple of 16 bytes")
        for dim, stride in enumerate(self.strides[:-1]):
            if stride.data.item() * itemsize % 16:
                bytes_ = f"{stride.data.item()} elements of {itemsize} bytes"
                raise StrictError(
                    f"descriptor: the stride of dimension {dim} must be a multiple of 16 bytes, not {bytes_}"
                )
        if self.strides[-1].data.item() != 1:
            raise StrictError(f"descriptor: the last stride must be 1, not {self.strides[-1].data.item()}")
        super().validate()

    def materialize_pointers(self, offsets: list[interp.TensorHandle]) -> tuple[interp.TensorHandle, Any]:
        itemsize = self.base.dtype.element_ty.primitive_bitwidth // 8
        if offsets[-1].data.item() * itemsize % 16:
            raise StrictError("descriptor: a block's offset in the last dimension must be a multiple of 16 bytes")
        ptrs, mask = super().materialize_pointers(offsets)
        if _SPAN in self.base.attr:
            ptrs.attr[_SPAN] = self.base.attr[_SPAN]
        return ptrs, interp.TensorHandle(mask, tl.int1)


class StrictBuilder(interp.InterpreterBuilder):
    """Executes the operations of a kernel. `install` makes it the class of the interpreter's only builder."""

    spans: dict[int, Span]
    patched: set[int]  # ids of tl and tl.core if patched
    owners: dict[int, np.ndarray]  # by storage: for each byte, 1 + the program that wrote it in this launch, or 0

    for _name in ("reshape", "trans", "expand_dims", "broadcast", "splat", "unsplat", "bitcast", "addptr"):
        locals()[f"create_{_name}"] = _keep_span(f"create_{_name}")

    def set_grid_dim(self, *grid: int) -> None:
        for n, (axis, limit) in zip(grid, MAX_GRID.items(), strict=True):
            if n > limit:
                raise StrictError(f"grid {axis} is {n}, more than the {limit} that CUDA can launch")
        super().set_grid_dim(*grid)

    # Memory.

    def _split_by_span(self, access: str, ptrs: Any, addresses: np.ndarray, size: int) -> list[tuple[Span, np.ndarray]]:
        spans = [ptrs.attr[_SPAN]] if _SPAN in ptrs.attr else list(self.spans.values())
        low, high = int(addresses.min()), int(addresses.max()) + size
        for span in spans:
            if span.base <= low and high <= span.end and span.filled is None:
                return [(span, addresses)]
        parts = []
        for span in spans:
            inside = span.inside(addresses, size)
            parts.append((span, addresses[inside]))
            addresses = addresses[~inside]
        if addresses.size:
            bad = int(addresses[0])
            nearest = min(spans, key=lambda span: span.distance(bad), default=None)
            where = nearest.describe(bad) if nearest else "an address, and no argument is a tensor"
            raise StrictError(f"{access} out of bounds at {where}")
        return parts

    def _check_access(self, access: str, ptrs: interp.TensorHandle, mask: interp.TensorHandle) -> None:
        """Checks that each address is in bounds and not written by another program. Records stores."""
        lanes = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool, copy=False)
        addresses = ptrs.data.ravel() if lanes.all() else ptrs.data[lanes]
        if not addresses.size:
            return
        size = max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)
        (x, y, z), (_, ny, nz) = self.grid_idx, self.grid_dim
        program = 1 + (x * ny + y) * nz + z
        for span, part in self._split_by_span(access, ptrs, addresses, size):
            owner = self.owners.get(span.storage)
            if owner is None and access == "load":
                continue
            if owner is None:
                # MAP_NORESERVE (no name in Python 3.11), because most of a long tensor is never touched.
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
                owner = np.frombuffer(mmap.mmap(-1, 4 * span.nbytes, flags=flags), dtype=np.int32)
                self.owners[span.storage] = owner
            cells = (part - np.uint64(span.storage)).astype(np.int64)[:, None] + np.arange(size)
            foreign = (owner[cells] != 0) & (owner[cells] != program)
            if foreign.any():
                lane, byte = np.argwhere(foreign)[0]
                x, rest = divmod(int(owner[cells[lane, byte]]) - 1, ny * nz)
                where = span.describe(int(part[lane]))
                raise StrictError(f"{access} where program {(x, *divmod(rest, nz))} wrote in this launch: {where}")
            if access == "store":
                owner[cells] = program

    def create_masked_load(self, ptrs, mask, other, *hints):
        self._check_access("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, _poison(ptrs) if other is None else other, *hints)

    def create_masked_store(self, ptrs, value, mask, *hints):
        if value.data.itemsize != interp._get_np_dtype(ptrs.get_element_ty()).itemsize:
            raise StrictError(f"store of {value.data.dtype} through a pointer to {ptrs.get_element_ty()}")
        self._check_access("store", ptrs, mask)
        super().create_masked_store(ptrs, value, mask, *hints)
        written = interp._interpreter.load(ptrs.data, mask.data, value.data, value.data.dtype)
        if written.tobytes() != value.data.tobytes():
            raise StrictError("store of different values to one address by several lanes")

    def create_descriptor_load(self, desc, indices, *hints):
        ptrs, mask = desc.materialize_pointers(indices)
        other = _poison(ptrs)
        if desc.padding != interp._ir.PADDING_OPTION.PAD_NAN:
            other.data[...] = 0
        return self.create_masked_load(ptrs, mask, other, *hints, False)

    def create_atomic_rmw(self, *_: Any) -> None:
        raise StrictError("atomics: their order is not defined, and what they share is not checked")

    create_atomic_cas = create_atomic_rmw

    # Casts and arithmetic.

    def cast_impl(self, src, dst_type):
        if _is_bf16(src):
            src = interp.TensorHandle(from_bf16(src.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:  # via fp32, as in PyTorch
            return interp.TensorHandle(to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return interp.TensorHandle(src.data.astype(interp._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            raise StrictError("casts of bfloat16 to or from fp8, or not to nearest, are not exact here")
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def get_bf16(self, value: float) -> interp.TensorHandle:
        return interp.TensorHandle(to_bf16(np.array([value], dtype=np.float32)), tl.bfloat16)

    def binary_op(self, lhs, rhs, op):
        _refuse_bf16(op.__name__, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def unary_op(self, arg, op):
        _refuse_bf16(op.__name__, arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        _refuse_bf16("fma", x, y, z)
        return super().create_fma(x, y, z)

    def create_dot(self, a, b, d, *precision):
        m, k, n = *a.data.shape[-2:], b.data.shape[-1]
        if min(m, n, k) < MIN_DOT:
            raise StrictError(f"tl.dot with M={m}, N={n}, K={k}: each must be at least {MIN_DOT}")
        if not all(h.dtype.scalar.is_floating() and h.dtype.scalar.primitive_bitwidth >= 16 for h in (a, b)):
            return super().create_dot(a, b, d, *precision)
        wide = np.float64 if d.data.dtype == np.float64 else np.float32
        x, y = ((from_bf16(h.data) if _is_bf16(h) else h.data).astype(wide, copy=False) for h in (a, b))
        return interp.TensorHandle((np.matmul(x, y) + d.data).astype(d.data.dtype, copy=False), d.dtype.scalar)

    def create_assert(self, condition, message):
        if not np.all(condition.data):
            raise StrictError(f"device_assert failed: {message}")


class StrictGridExecutor(interp.GridExecutor):
    """Runs one launch. A failure is a `StrictError` with kernel, program and source line."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        interp.interpreter_builder.spans = _spans([*zip(self.arg_names, args, strict=False), *kwargs.items()])
        return args, kwargs

    def __call__(self, *args_dev: Any, **kwargs: Any) -> None:
        builder = interp.interpreter_builder
        builder.grid_idx, builder.owners, builder.patched = None, {}, set()
        try:
            with np.errstate(all="ignore"):  # a GPU does not warn about inf and NaN
                super().__call__(*args_dev, **kwargs)
        except Exception as error:
            chain: list[BaseException] = [error]  # each jitted function wraps the error again
            while chain[-1].__cause__ is not None:
                chain.append(chain[-1].__cause__)
            if not isinstance(chain[-1], StrictError):
                raise
            message = f"{self.fn.__name__}, program {builder.grid_idx}: {chain[-1]}{_source_line(chain)}"
            raise StrictError(message) from error
        finally:
            builder.spans, builder.owners = {}, {}


def _source_line(chain: list[BaseException]) -> str:
    """The innermost source line outside of Triton and this file."""
    not_here = (os.path.dirname(triton.__file__) + os.sep, __file__)
    frames = [f for e in chain for f in traceback.extract_tb(e.__traceback__) if not f.filename.startswith(not_here)]
    return f"\n  {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


# Short cuts to the same results. Triton's interpreter builds and compares the same types for every operation.

_np_dtypes: dict[str, np.dtype] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}  # their attributes
_tensor_parts: dict[str, dict[str, Any]] = {}  # the attributes of a tensor, by the name of its type


def _get_np_dtype(ty: tl.dtype) -> np.dtype:
    if ty.name not in _np_dtypes:
        _np_dtypes[ty.name] = _plain_get_np_dtype(ty)
    return _np_dtypes[ty.name]


def _dtype_eq(self: tl.dtype, other: Any) -> bool:
    return self is other or _plain_dtype_eq(self, other)


def _block_type_init(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
    key = (element_ty.name, *(size.value if type(size) is tl.constexpr else size for size in shape))
    if key not in _block_types:
        _plain_block_type_init(self, element_ty, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])


def _tensor_init(self: tl.tensor, handle: interp.TensorHandle, type: tl.dtype) -> None:
    if type.name not in _tensor_parts:
        _plain_tensor_init(self, handle, type)
        _tensor_parts[type.name] = dict(vars(self))
    vars(self).update(_tensor_parts[type.name], handle=handle, type=type)


def _broadcast(lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    shapes = [x.type.shape.values if x.type.is_block() else None for x in (lhs, rhs)]
    return (lhs, rhs) if shapes[0] == shapes[1] else _plain_broadcast(lhs, rhs)


_plain_get_np_dtype = interp._get_np_dtype
_plain_dtype_eq = tl.dtype.__eq__
_plain_broadcast = interp.interpreter_semantic.broadcast_impl_value
_plain_block_type_init = tl.block_type.__init__
_plain_tensor_init = tl.tensor.__init__
_plain_implicit_cvt = interp._implicit_cvt
_plain_patch_lang = interp._patch_lang
_plain_set_attr = interp.TensorHandle.set_attr
_plain_check_tensor = interp.ReduceScanOpInterface.check_tensor
_saved: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Makes the interpreter of this process strict, if it is not.

    Raises:
        StrictError: this version of Triton does not have a part to be replaced.
    """
    if active():
        return
    builder = interp.interpreter_builder
    replacements = [
        (builder, "__class__", StrictBuilder),
        (builder, "options", dataclasses.replace(builder.options, debug=True)),  # otherwise device_assert is skipped
        (interp.interpreter_semantic, "binary_op_sanitize_overflow_impl", _check_binary_overflow),
        (interp.ReduceScanOpInterface, "check_tensor", _check_reduction),
        (interp, "TensorDescHandle", StrictDescriptor),
        (interp, "GridExecutor", StrictGridExecutor),
        (interp, "_implicit_cvt", _implicit_cvt),
        (interp, "_patch_lang", _patch_lang),
        (interp.TensorHandle, "set_attr", _set_attr),
        (interp, "_get_np_dtype", _get_np_dtype),
        (interp.interpreter_semantic, "broadcast_impl_value", _broadcast),
        (tl.dtype, "__eq__", _dtype_eq),
        (tl.block_type, "__init__", _block_type_init),
        (tl.tensor, "__init__", _tensor_init),
    ]
    new = {"get_bf16", "_split_by_span", "_check_access"}
    for cls in (StrictBuilder, StrictDescriptor, StrictGridExecutor):
        for name in (name for name, value in vars(cls).items() if callable(value) and name not in new):
            if not hasattr(cls.__base__, name):
                raise StrictError(
                    f"cannot be strict: {cls.__base__.__name__}.{name} is not in the interpreter of Triton "
                    f"{triton.__version__}; this is written for 3.7.1"
                )
    for owner, name, value in replacements:
        _saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)
    interp.bf16_is_exact = True


def uninstall() -> None:
    """Restores Triton's own interpreter."""
    while _saved:
        setattr(*_saved.pop())
    if active():
        del interp.bf16_is_exact


def active() -> bool:
    """Whether interpreted kernels run strictly."""
    return getattr(interp, "bf16_is_exact", False)
