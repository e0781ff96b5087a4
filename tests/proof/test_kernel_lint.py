"""The kernels keep the rules that only their source shows, and the lint can fail."""

import re
from pathlib import Path

import kernel_lint
import pytest

from vit import kernels

KERNEL = """
import triton
import triton.language as tl
from . import tile

@triton.jit
def _sum_of(x, ACC: tl.constexpr):
    return tl.sum(x, axis=0)

@triton.jit
def _load_parts(ptr, offs, mask):
    parts = ()
    for i in tl.static_range(2):
        parts += (tl.load(ptr + i + offs, mask=mask, other=0.0),)
    return parts

@triton.jit
def _kernel(x_ptr, y_ptr, M, ACC: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < M
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    parts = _load_parts(x_ptr, offs, mask)
    acc = tl.zeros([BLOCK], dtype=ACC)
    {line}
"""

GOOD = [
    "acc = tile.dot(x, x, acc, 'ieee')",
    "total = tl.sum(x.to(ACC))",
    "x = x.to(ACC); total = tl.sum(x * x)",
    "total = tl.sum((acc - x) * acc)",
    "total = tl.sum(parts[0].to(acc.dtype))",
    "total = _sum_of(x.to(ACC), ACC)",
    "biggest = tl.max(x)",
    "rows = tl.num_programs(0).to(tl.int64) * BLOCK",
    "pid_m = tl.program_id(0) // M; row = pid_m.to(tl.int64) * BLOCK",
    "pid_m, pid_n = tile.grouped_tile(tl.program_id(0), M, M, 8); row = (pid_n.to(tl.int64) * BLOCK).to(tl.int32)",
    "y = tl.load(y_ptr)",
    "y = tl.load(y_ptr + offs, mask, 0.0)",
    "tl.store(y_ptr + offs, x, mask=mask)",
]
BAD = {
    "y = tl.load(y_ptr + offs, mask=mask)": "without other=",
    "y = tl.load(y_ptr + offs, mask)": "without other=",
    "acc = tl.dot(x, x, acc)": "tile.dot",
    "row = tl.program_id(1) * BLOCK": "32 bits",
    "row = (tl.program_id(1) * BLOCK).to(tl.int64)": "32 bits",
    "row = tl.program_id(1).to(tl.int32)": "32 bits",
    "rows = tl.num_programs(0)": "32 bits",
    "row = tl.program_id(1) % M * BLOCK": "32 bits",
    "pid_m = tl.program_id(0) // M; row = pid_m * BLOCK": "32 bits",
    "pid_m, pid_n = tile.grouped_tile(tl.program_id(0), M, M, 8); row = (BLOCK * pid_n).to(tl.int64)": "32 bits",
    "total = tl.sum(x)": "widen",
    "total = x.sum()": "widen",
    "total = tl.sum(x * 2.0)": "widen",
    "y = tl.where(mask, x, 0.0); total = tl.sum(y)": "widen",
    "total = tl.sum(acc.to(x.dtype))": "widen",
    "total = tl.sum(acc.to(y_ptr.dtype.element_ty))": "widen",
    "total = tl.sum(parts[1])": "widen",
    "total = tl.sum(y_ptr.load([0, 0]))": "widen",
    "total = _sum_of(x, ACC)": "widen",
    "for i in range(4): total = tl.sum(acc); acc = x": "widen",
    "tl.atomic_add(y_ptr + offs, x)": "no fixed order",
    "x = tl.make_block_ptr(x_ptr, [M], [1], [0], [BLOCK], [0])": "block pointers",
    "x = tl.extra.cuda.libdevice.erf(acc)": "libdevice",
    "tl.debug_barrier()": "wait for each other",
    "while tl.load(y_ptr) == 0: pass": "no bound",
}


def found(source: str) -> list[str]:
    return kernel_lint.problems({"bad.py": source})


def test_the_kernels_are_clean():
    files = Path(kernels.__file__).parent.glob("*.py")
    assert not kernel_lint.problems({file.name: file.read_text() for file in files})


def test_loads_of_real_kernels_are_followed_into_the_functions_that_sum():
    sources = {file.name: file.read_text() for file in Path(kernels.__file__).parent.glob("*.py")}
    sources["attention_tile.py"] = sources["attention_tile.py"].replace("a[0].to(ACC) * b[0].to(ACC)", "a[0] * b[0]")
    (said,) = kernel_lint.problems(sources)
    assert said.startswith("attention_tile.py") and "widen" in said


@pytest.mark.parametrize("line", GOOD)
def test_good_lines_pass(line):
    assert not found(KERNEL.format(line=line))


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_found(line):
    said = found(KERNEL.format(line=line))
    assert said and all(re.search(re.escape(BAD[line]), s) for s in said), said


def test_imports_and_decorators_are_found():
    assert "libdevice" in found("from triton.language.extra import libdevice")[0]
    tuned = "@triton.autotune(configs=[], key=['M'])\n@triton.jit\ndef _kernel(x_ptr, M):\n    pass"
    assert "nothing tunes" in found(tuned)[0]


def test_an_offset_is_never_specialised():
    source = "@triton.jit{}\ndef _a_kernel(x_ptr, OFFSET, P: tl.constexpr):\n    pass"
    assert "OFFSET is specialised" in found(source.format(""))[0]
    assert not found(source.format('(do_not_specialize=["OFFSET"])'))


def test_only_tile_dot_may_call_tl_dot():
    source = "@triton.jit\ndef {}(a, b, acc):\n    return tl.dot(a, b, acc)"
    assert not kernel_lint.problems({"tile.py": source.format("dot")})
    assert kernel_lint.problems({"tile.py": source.format("product")})
    assert kernel_lint.problems({"linear.py": source.format("dot")})
