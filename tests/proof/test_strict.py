"""The strict interpreter on kernels with one error each, and on their correct twins.

Every wrong kernel is first run on Triton's own interpreter, which must let it pass: a check that stock Triton already
makes would prove nothing here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # where there is a GPU, the other tests of this process need compiled kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

import strict
import triton
import triton.language as tl
from triton.runtime import interpreter as interp
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="Triton was imported without TRITON_INTERPRET=1"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's checks are for machines without a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, from the runs on the plain interpreter
]


@pytest.fixture(autouse=True)
def strict_interpreter() -> Iterator[None]:
    was_active = strict.active()
    strict.install()
    yield
    strict.uninstall()
    if was_active:
        strict.install()


@contextlib.contextmanager
def plain_interpreter() -> Iterator[None]:
    strict.uninstall()
    try:
        yield
    finally:
        strict.install()


def assert_caught(message: str, launch: Callable[[], object]) -> strict.StrictError:
    with plain_interpreter():
        launch()
    with pytest.raises(strict.StrictError, match=message) as caught:
        launch()
    return caught.value


def all_bf16() -> torch.Tensor:
    return torch.arange(65_536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-equal, except that a NaN may be any NaN: PyTorch's own pattern depends on the CPU's vector unit."""
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(bits(actual)[number], bits(expected)[number])


# bfloat16


@triton.jit
def _cast_kernel(x_ptr, y_ptr, VIA: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(VIA)
    tl.store(y_ptr + offs, x)


def _cast(x: torch.Tensor, dtype: torch.dtype, via: tl.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(x.numel() // 2048,)](x, y, VIA=via, BLOCK=2048)
    return y


@pytest.mark.parametrize("via", [tl.float32, tl.float64], ids=str)
def test_every_bf16_value_survives_the_way_through_wider_types(via: tl.dtype) -> None:
    x = all_bf16()
    assert_same_bits(_cast(x, torch.bfloat16, via), x)
    assert torch.equal(_cast(x, torch.float32, via).nan_to_num(7.0), x.float().nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64], ids=str)
def test_casts_to_bf16_round_like_pytorch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31 - 1, (65_536,), generator=generator, dtype=torch.int32)
    halves = (torch.arange(65_536, dtype=torch.int32) << 16) + 0x8000  # every tie
    near = torch.cat([halves, halves - 1, halves + 1])
    x = torch.cat([patterns, near]).view(torch.float32)
    x = torch.cat([patterns, near]).to(dtype) if not dtype.is_floating_point else x.to(dtype)
    via = {torch.float16: tl.float16, torch.float64: tl.float64}.get(dtype, tl.bfloat16)
    assert_same_bits(_cast(x, torch.bfloat16, via), x.to(torch.bfloat16))
    with plain_interpreter():
        wrong = _cast(x, torch.bfloat16, via)
    assert not torch.equal(bits(wrong), bits(x.to(torch.bfloat16)))


@triton.jit
def _full_bf16_kernel(y_ptr):
    tl.store(y_ptr + tl.arange(0, 16), tl.full((16,), 1.1, tl.bfloat16))


def test_bf16_constants() -> None:
    y = torch.zeros(16, dtype=torch.bfloat16)
    _full_bf16_kernel[(1,)](y)
    assert torch.equal(y, torch.full((16,), 1.1, dtype=torch.bfloat16))


@triton.jit
def _bf16_shapes_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 64)
    x = tl.load(x_ptr + offs, mask=offs < 60, other=0.0)
    x = tl.trans(tl.reshape(x, (4, 16)))
    x = tl.where(x.to(tl.float32) > 0, x, 0.0)
    tl.store(y_ptr + tl.arange(0, 16)[:, None] * 4 + tl.arange(0, 4)[None, :], x)


def test_bf16_where_reshape_trans() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.empty(16, 4, dtype=torch.bfloat16)
    _bf16_shapes_kernel[(1,)](x, y)
    x[60:] = 0
    assert torch.equal(y, x.view(4, 16).T.relu())


@triton.jit
def _arith_kernel(x_ptr, y_ptr, OP: tl.constexpr):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs)
    if OP == "add":
        y = x + x
    elif OP == "sub":
        y = x - x
    elif OP == "mul":
        y = x * x
    elif OP == "div":
        y = x / x
    elif OP == "neg":
        y = -x
    elif OP == "less":
        y = tl.where(x < x, 1.0, 0.0)
    elif OP == "fma":
        y = tl.fma(x, x, x)
    elif OP == "clamp":
        y = tl.clamp(x, x, x)
    elif OP == "sum":
        y = tl.sum(x, axis=0)
    elif OP == "cumsum":
        y = tl.cumsum(x, axis=0)
    elif OP == "max":
        y = tl.max(x, axis=0)
    elif OP == "maximum":
        y = tl.maximum(x, x)
    tl.store(y_ptr + offs, y)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "neg", "less", "fma", "sum"])
def test_bf16_arithmetic_is_refused(op: str) -> None:
    x = torch.randn(16).bfloat16()
    assert_caught("cast to fp32 first", lambda: _arith_kernel[(1,)](x, torch.empty(16), OP=op))


@pytest.mark.parametrize("op", ["sum", "cumsum"])
def test_fp16_sums_are_refused(op: str) -> None:
    x = torch.randn(16).half()
    assert_caught("cast to fp32 first", lambda: _arith_kernel[(1,)](x, torch.empty(16), OP=op))


@pytest.mark.parametrize(
    "op, expected",
    [
        ("max", lambda x: x.max().expand(16)),
        ("maximum", lambda x: x),
        ("clamp", lambda x: x),
        ("div", torch.ones_like),
        ("cumsum", lambda x: x.cumsum(0)),
    ],
)
def test_bf16_operations_that_triton_widens_are_right(op: str, expected: Callable) -> None:
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.empty(16)
    _arith_kernel[(1,)](x, y, OP=op)
    torch.testing.assert_close(y, expected(x.float()), rtol=1e-6, atol=1e-6)


# Dot products


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    acc = tl.full((M, N), 1.0, ACC)
    acc = tl.dot(tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n), acc, out_dtype=ACC)
    tl.store(c_ptr + m * N + n, acc)


def _dot(m: int, n: int, k: int, dtype: torch.dtype, acc: torch.dtype = torch.float32) -> float:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator).to(dtype)
    b = torch.randn(k, n, generator=generator).to(dtype)
    c = torch.empty(m, n, dtype=acc)
    _dot_kernel[(1,)](a, b, c, M=m, N=n, K=k, ACC=tl.float64 if acc is torch.float64 else tl.float32)
    return float((c - (a.double() @ b.double() + 1)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    assert _dot(16, 32, 256, dtype) < 1e-4


def test_dot_of_bf16_is_wrong_without() -> None:
    with plain_interpreter():
        assert _dot(16, 32, 256, torch.bfloat16) > 1e3


def test_dot_of_fp64() -> None:
    assert _dot(16, 32, 64, torch.float64, torch.float64) < 1e-13


@pytest.mark.parametrize("shape", [(8, 16, 16), (16, 8, 16), (16, 16, 8)], ids=str)
def test_small_dot_is_caught(shape: tuple[int, int, int]) -> None:
    assert_caught("tl.dot with M=.* at least 16", lambda: _dot(*shape, torch.float32))


# Bounds


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs + shift, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x, mask=offs < n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool], ids=str)
def test_accesses_inside_pass(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (20,)).to(dtype)
    y = torch.zeros_like(x)
    _copy_kernel[(2,)](x, y, 20, 0, BLOCK=16)
    assert torch.equal(x, y)


@pytest.mark.parametrize("shift, element", [(1, 20), (-1, -1)])
def test_load_outside_a_tensor_is_caught(shift: int, element: int) -> None:
    x, y = torch.zeros(30)[5:25], torch.zeros(20)  # out of the tensor, not out of its storage
    error = assert_caught("load out of bounds", lambda: _copy_kernel[(2,)](x, y, 20, shift, BLOCK=16))
    assert f"x_ptr[{element}]" in str(error) and "_copy_kernel, program (" in str(error)
    assert "x = tl.load(x_ptr" in str(error)  # the source line


def test_store_outside_a_tensor_is_caught() -> None:
    x, y = torch.zeros(20), torch.zeros(30)[5:24]
    assert_caught(r"store out of bounds at y_ptr\[19\]", lambda: _copy_kernel[(2,)](x, y, 20, 0, BLOCK=16))


def test_pointer_into_another_argument_is_caught() -> None:
    both = torch.zeros(40)
    x, y = both[:20], both[20:]
    assert_caught(r"load out of bounds at x_ptr\[20\]", lambda: _copy_kernel[(1,)](x, y, 16, 20, BLOCK=16))


@triton.jit
def _rows_kernel(x_ptr, y_ptr, stride, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, 8)[None, :]
    mask = columns < COLUMNS
    x = tl.load(x_ptr + rows * stride + columns, mask=mask, other=0.0)
    tl.store(y_ptr + rows * 8 + columns, x, mask=mask)


def test_gaps_between_rows_are_out_of_bounds() -> None:
    x, y = torch.randn(4, 9)[:, :5], torch.zeros(4, 8)
    _rows_kernel[(1,)](x, y, x.stride(0), COLUMNS=5)
    assert torch.equal(x, y[:, :5])
    assert_caught("gap between its rows", lambda: _rows_kernel[(1,)](x, y, x.stride(0), COLUMNS=6))


def test_expanded_and_empty_tensors() -> None:
    x, y = torch.randn(8).expand(4, 8), torch.zeros(4, 8)
    _rows_kernel[(1,)](x, y, x.stride(0), COLUMNS=8)
    assert torch.equal(x, y)
    _copy_kernel[(1,)](torch.empty(0), torch.empty(0), 0, 0, BLOCK=16)
    with pytest.raises(strict.StrictError, match="out of bounds"):
        _copy_kernel[(1,)](torch.empty(0), torch.empty(16), 16, 0, BLOCK=16)


@triton.jit
def _tuple_kernel(tensors, y_ptr, shift):
    offs = tl.arange(0, 16)
    tl.store(y_ptr + offs, tl.load(tensors[1] + offs + shift))


def test_tensors_in_a_tuple() -> None:
    x, y = torch.randn(20)[:16], torch.zeros(16)
    _tuple_kernel[(1,)]((y, x), y, 0)
    assert torch.equal(x, y)
    assert_caught(r"tensors\[1\]\[16\]", lambda: _tuple_kernel[(1,)]((y, x), y, 1))


@triton.jit
def _chosen_pointer_kernel(a_ptr, b_ptr, y_ptr, shift):
    offs = tl.arange(0, 16)
    ptrs = tl.where(offs < 8, a_ptr + offs, b_ptr + offs + shift)
    tl.store(y_ptr + offs, tl.load(ptrs))


def test_pointers_of_unknown_origin_may_reach_any_argument() -> None:
    buffer = torch.arange(40.0)
    a, b, y = buffer[:16], buffer[20:36], torch.zeros(16)
    _chosen_pointer_kernel[(1,)](a, b, y, 0)
    assert torch.equal(y, torch.cat([a[:8], b[8:]]))
    assert_caught(r"b_ptr\[16\]", lambda: _chosen_pointer_kernel[(1,)](a, b, y, 1))


# Masked-off lanes


@triton.jit
def _no_other_kernel(x_ptr, y_ptr, n):
    offs = tl.arange(0, 16)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64], ids=str)
def test_masked_off_lanes_read_poison(dtype: torch.dtype) -> None:
    x, y = torch.arange(12).to(dtype), torch.zeros(16, dtype=dtype)
    with plain_interpreter():
        _no_other_kernel[(1,)](x, y, 12)
        assert (y[12:] == 0).all()
    _no_other_kernel[(1,)](x, y, 12)
    assert torch.equal(y[:12], x)
    assert y[12:].isnan().all() if dtype.is_floating_point else (y[12:] == torch.iinfo(dtype).max).all()


# Several programs


@triton.jit
def _overlap_kernel(y_ptr, step, TWICE: tl.constexpr):
    pid = tl.program_id(1)
    offs = pid * step + tl.arange(0, 16)
    tl.store(y_ptr + offs, pid.to(tl.float32) + tl.zeros((16,), tl.float32))
    if TWICE:
        tl.store(y_ptr + offs, tl.load(y_ptr + offs) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_programs_writing_one_address_is_caught(dtype: torch.dtype) -> None:
    y = torch.zeros(48, dtype=dtype)
    error = assert_caught("wrote in this launch", lambda: _overlap_kernel[(1, 3)](y, 15, TWICE=False))
    assert "program (0, 1, 0): store where program (0, 0, 0)" in str(error) and "y_ptr[15]" in str(error)


def test_one_program_may_rewrite_and_launches_are_apart() -> None:
    y = torch.zeros(48)
    for _ in range(2):
        _overlap_kernel[(1, 3)](y, 16, TWICE=True)
    assert torch.equal(y, torch.arange(1.0, 4.0).repeat_interleave(16))


@triton.jit
def _two_outputs_kernel(a_ptr, b_ptr):
    pid = tl.program_id(0)
    tl.store(a_ptr + pid, pid)
    tl.store(b_ptr + 1 - pid, pid)


def test_outputs_that_share_memory_are_caught() -> None:
    y = torch.zeros(2, dtype=torch.int32)
    assert_caught("wrote in this launch", lambda: _two_outputs_kernel[(2,)](y, y.view(2, 1)))
    _two_outputs_kernel[(2,)](y, torch.zeros(2, dtype=torch.int32))


@triton.jit
def _neighbour_kernel(y_ptr):
    pid = tl.program_id(0)
    tl.store(y_ptr + 1 + pid, tl.load(y_ptr + pid))


def test_reading_what_another_program_wrote_is_caught() -> None:
    assert_caught("load where program", lambda: _neighbour_kernel[(2,)](torch.zeros(3)))
    _neighbour_kernel[(1,)](torch.zeros(3))


@triton.jit
def _same_lane_kernel(y_ptr, scale):
    offs = tl.arange(0, 16)
    tl.store(y_ptr + offs // 2, offs // scale)


def test_lanes_of_one_store_that_disagree_are_caught() -> None:
    y = torch.zeros(8, dtype=torch.int32)
    assert_caught("different values to one address", lambda: _same_lane_kernel[(1,)](y, 1))
    _same_lane_kernel[(1,)](y, 2)
    assert torch.equal(y, torch.arange(8, dtype=torch.int32))


@triton.jit
def _atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr + tl.arange(0, 16), 1.0)


def test_atomics_are_refused() -> None:
    assert_caught("atomics", lambda: _atomic_kernel[(1,)](torch.zeros(16)))


# Integers


@triton.jit
def _int_kernel(a_ptr, b_ptr, y_ptr, OP: tl.constexpr):
    offs = tl.arange(0, 4)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    if OP == "add":
        y = a + b
    elif OP == "sub":
        y = a - b
    elif OP == "mul":
        y = a * b
    elif OP == "sum":
        total = tl.sum(tl.reshape(a, (2, 2)), axis=0)
        y = tl.reshape(tl.join(total, total), (4,))
    elif OP == "cumsum":
        y = tl.cumsum(a, axis=0)
    elif OP == "wrap":
        y = tl.add(a, b, sanitize_overflow=False)
    tl.store(y_ptr + offs, y)


def _int(op: str, a: int, b: int, dtype: torch.dtype) -> torch.Tensor:
    x = [torch.tensor([1, v, 0, v], dtype=torch.int64).to(dtype) for v in (a, b)]
    y = torch.empty(4, dtype=dtype)
    _int_kernel[(1,)](*x, y, OP=op)
    return y


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("op", ["add", "sub", "mul", "sum", "cumsum"])
def test_signed_overflow_is_caught(op: str, dtype: torch.dtype) -> None:
    big = torch.iinfo(dtype).max
    a, b = {"add": (big, 1), "sub": (-2, big), "mul": (big // 2 + 1, 2)}.get(op, (big // 2 + 1, 0))
    if dtype is torch.int16 and op in ("sum", "cumsum"):  # Triton widens these to int32, and only the store narrows
        _int(op, a, b, dtype)
    else:
        assert_caught(f"int{torch.iinfo(dtype).bits} overflow", lambda: _int(op, a, b, dtype))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_at_the_limit_pass(dtype: torch.dtype) -> None:
    big = torch.iinfo(dtype).max
    assert _int("add", big - 1, 1, dtype)[1] == big
    assert _int("sub", -1, big, dtype)[1] == -big - 1
    assert _int("mul", big // 3, 3, dtype)[1] == big // 3 * 3
    assert _int("wrap", big, 1, dtype)[1] == -big - 1


@triton.jit
def _rand_kernel(y_ptr, seed):
    offs = tl.arange(0, 64)
    tl.store(y_ptr + offs, tl.rand(seed, offs))


def test_unsigned_wrap_and_philox_pass() -> None:
    assert _int("add", -1, 2, torch.uint32)[1] == 1
    assert _int("mul", -1, 2, torch.uint32)[1] == 2**32 - 2
    y = torch.zeros(64)
    _rand_kernel[(1,)](y, 2**40 + 3)
    assert 0 <= y.min() < y.max() < 1 and y.unique().numel() > 60


@triton.jit
def _offset_kernel(x_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0) + 3
    if WIDE:
        row = row.to(tl.int64)
    tl.load(x_ptr + (row * stride - 3 * stride.to(tl.int64)).to(tl.int64))


def test_a_row_offset_beyond_int32_is_caught() -> None:
    x = torch.zeros(1)
    with pytest.raises(strict.StrictError, match="int32 overflow in mul"):
        _offset_kernel[(1,)](x, 2**30, WIDE=False)
    _offset_kernel[(1,)](x, 2**30, WIDE=True)


# Grid, shapes, device_assert


@triton.jit
def _empty_kernel(x_ptr):
    pass


@pytest.mark.parametrize("grid", [(1, 65_536), (1, 1, 65_536)], ids=str)
def test_grids_that_cuda_cannot_launch_are_caught(grid: tuple[int, ...]) -> None:
    assert_caught("more than the 65535", lambda: _empty_kernel[grid](torch.zeros(1)))


def test_grid_limits() -> None:
    with pytest.raises(strict.StrictError, match="grid x is 2147483648"):  # too long a loop for the plain interpreter
        _empty_kernel[(2**31,)](torch.zeros(1))
    _empty_kernel[lambda meta: (1, 65_535)](torch.zeros(1))
    _empty_kernel[(0,)](torch.zeros(1))


@triton.jit
def _arange_kernel(N: tl.constexpr):
    tl.arange(0, N)


@triton.jit
def _zeros_kernel(N: tl.constexpr):
    tl.zeros((16, N), tl.float32)


@pytest.mark.parametrize("kernel", [_arange_kernel, _zeros_kernel], ids=["arange", "zeros"])
def test_shapes_that_are_no_power_of_two_are_caught(kernel: Callable) -> None:
    kernel[(1,)](N=16)
    with pytest.raises(InterpreterError, match="power of 2"):
        kernel[(1,)](N=24)


@triton.jit
def _promise_kernel(stride, ALIGN: tl.constexpr):
    tl.multiple_of(tl.arange(0, 16) * stride, ALIGN)


def test_a_false_promise_of_alignment_is_caught() -> None:
    _promise_kernel[(1,)](16, ALIGN=8)
    assert_caught(r"multiple_of\(\[8\]\) of 12", lambda: _promise_kernel[(1,)](12, ALIGN=8))


@triton.jit
def _assert_kernel(x_ptr, limit):
    offs = tl.arange(0, 16)
    tl.device_assert(tl.load(x_ptr + offs) < limit, "x is too big")


def test_device_assert_asserts() -> None:
    x = torch.arange(16)
    assert_caught("device_assert failed: x is too big", lambda: _assert_kernel[(1,)](x, 15))
    _assert_kernel[(1,)](x, 16)


# Tensor descriptors


@triton.jit
def _descriptor_kernel(x_desc, y_desc, column, BLOCK_M: tl.constexpr):
    row = tl.program_id(0) * BLOCK_M
    y_desc.store([row, 0], x_desc.load([row, column]))


@triton.jit
def _device_descriptor_kernel(x_ptr, y_ptr, M, N, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, N], [stride, 1], [BLOCK_M, BLOCK_N])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, BLOCK_N], [BLOCK_N, 1], [BLOCK_M, BLOCK_N])
    row = tl.program_id(0) * BLOCK_M
    y_desc.store([row, 0], x_desc.load([row, 0]))


def _host_copy(x: torch.Tensor, shape: tuple[int, ...] | None = None, column: int = 0) -> torch.Tensor:
    y = torch.full((x.shape[0], 16), 7, dtype=x.dtype)
    x_desc = TensorDescriptor(x, list(shape or x.shape), list(x.stride()), [4, 16])
    y_desc = TensorDescriptor(y, list(y.shape), list(y.stride()), [4, 16])
    _descriptor_kernel[(2,)](x_desc, y_desc, column, BLOCK_M=4)
    return y


def _device_copy(x: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    m, n = shape or x.shape
    y = torch.full((m, 16), 7, dtype=x.dtype)
    _device_descriptor_kernel[(2,)](x, y, m, n, x.stride(0), BLOCK_M=4, BLOCK_N=16)
    return y


@pytest.mark.parametrize("copy", [_host_copy, _device_copy], ids=["host", "device"])
class TestDescriptors:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_blocks_are_cut_at_the_edges(self, copy: Callable, dtype: torch.dtype) -> None:
        x = torch.randn(7, 16).to(dtype)[:, :13]
        assert torch.equal(copy(x), torch.cat([x, torch.zeros(7, 3, dtype=dtype)], dim=1))

    @pytest.mark.parametrize("shape", [(7, 14), (8, 13)], ids=str)
    def test_shape_beyond_the_tensor_is_caught(self, copy: Callable, shape: tuple[int, int]) -> None:
        x = torch.zeros(8, 16)[:7, :13]
        assert_caught(r"load out of bounds at x_(ptr|desc)\[", lambda: copy(x, shape))

    def test_unaligned_base_is_caught(self, copy: Callable) -> None:
        x = torch.zeros(8, 20)[:, 1:17]
        with pytest.raises(Exception, match=r"16.byte aligned|multiple of 16 bytes"):
            copy(x)

    def test_unaligned_stride_is_caught(self, copy: Callable) -> None:
        x = torch.zeros(8, 18)[:, :16]
        with pytest.raises(Exception, match=r"16.byte aligned|dimension 0 must be a multiple of 16 bytes"):
            copy(x)


def test_descriptor_last_offset_is_aligned() -> None:
    with pytest.raises(strict.StrictError, match="offset in the last dimension"):
        _host_copy(torch.zeros(8, 32), column=2)
    _host_copy(torch.zeros(8, 32), column=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_descriptor_nan_padding(dtype: torch.dtype) -> None:
    x, y = torch.ones(4, 16, dtype=dtype)[:3], torch.zeros(4, 16, dtype=dtype)
    x_desc = TensorDescriptor(x, [3, 16], [16, 1], [4, 16], padding="nan")
    _descriptor_kernel[(1,)](x_desc, TensorDescriptor(y, [4, 16], [16, 1], [4, 16]), 0, BLOCK_M=4)
    assert (y[:3] == 1).all() and y[3].isnan().all()


# Switching on and off


def test_install_and_uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = interp.GridExecutor
    strict.install()
    assert strict.active() and interp.bf16_is_exact is True and interp.GridExecutor is ours
    strict.uninstall()
    strict.uninstall()
    assert not strict.active() and not hasattr(interp, "bf16_is_exact") and interp.GridExecutor is not ours
    assert type(interp.interpreter_builder) is interp.InterpreterBuilder

    monkeypatch.delattr(interp.InterpreterBuilder, "create_dot")
    with pytest.raises(strict.StrictError, match=r"InterpreterBuilder\.create_dot is not in"):
        strict.install()
    assert not strict.active() and type(interp.interpreter_builder) is interp.InterpreterBuilder


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(InterpreterError) as caught:
        _arange_kernel[(1,)](N=0)
    assert not isinstance(caught.value, strict.StrictError)


def test_rounding_of_numpy_scalars_and_views() -> None:
    x = np.broadcast_to(np.float32(1.00390625), (3, 2))  # a tie: 1 + 2**-8
    assert (strict.to_bf16(x) == 0x3F80).all() and strict.to_bf16(x).shape == (3, 2)
