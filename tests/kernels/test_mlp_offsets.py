"""The epilogue of the GEMM beyond 2³¹ elements. One program runs, and the other pages of memory stay untouched."""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from vit.kernels import reference, runtime
from vit.kernels.linear import _activation_kernel, _gemm_kernel

M, N, K, BLOCK_M, BLOCK_N = 2**15 + 8, 2**16, 16, 32, 64
FIRST, COLUMN = 2**15, 5  # the last row of tiles, which starts at element 2³¹, and one of its tiles
ROWS, COLUMNS = slice(FIRST, M), slice(COLUMN * BLOCK_N, (COLUMN + 1) * BLOCK_N)
META = {"ACTIVATION": "gelu", "P": 0.25, "ACC": tl.float32, "BLOCK_M": BLOCK_M, "num_warps": 4, "num_stages": 1}


@pytest.fixture
def program(monkeypatch):
    """A launch of one program runs a tile of the last row. GROUP_M is 1, so tiles are numbered along the rows."""
    try:
        np.zeros(10 * M * N, dtype=np.int8)  # the matrices, and the interpreter's 4 bytes for each of their bytes
    except MemoryError:
        pytest.skip("the system does not overcommit memory")
    pid = FIRST // BLOCK_M * (N // BLOCK_N) + COLUMN
    handle = interpreter.TensorHandle(np.array([pid], dtype=np.int32), tl.int32)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda self, axis: handle)


def matrices(count):
    """Matrices [M, N] in one buffer, each 16 rows after the one before. The last 8 rows do not overlap the next."""
    memory = torch.from_numpy(np.zeros((M + 16 * count, N), dtype=np.float16))
    return [memory[16 * i : 16 * i + M] for i in range(count)]


def keep(seed):
    words = reference.dropout_words(seed, 3, torch.arange(FIRST, M), N)[:, COLUMNS]
    return torch.where(words >= int(META["P"] * 2**32), 1 / (1 - META["P"]), 0.0)


@pytest.mark.interpreted
@pytest.mark.parametrize("backward", [False, True])
def test_product(randn, program, backward):
    a, b, seed = torch.zeros(M, K, dtype=torch.float16), randn(K, N).half(), torch.tensor([5])
    a[ROWS] = randn(M - FIRST, K).half()
    pre, out, second = matrices(3)
    sums = torch.from_numpy(np.zeros((M // BLOCK_M + 1, N), dtype=np.float32)) if backward else None
    if backward:
        pre[ROWS, COLUMNS] = randn(M - FIRST, BLOCK_N).half()
    runtime.launch(
        _gemm_kernel, 1,
        a_ptr=TensorDescriptor.from_tensor(a, [BLOCK_M, K]), b_ptr=TensorDescriptor.from_tensor(b, [K, BLOCK_N]),
        bias_ptr=None, preact_ptr=pre if backward else None, seed_ptr=seed, out_ptr=out, aux_ptr=second,
        sum_ptr=sums,
        M=M, N=N, K=K, OFFSET=3, stride_a=None, stride_b=None,
        TRANS_A=False, TRANS_B=False, ALIGN_A=1, ALIGN_B=1, PRECISION="ieee", BLOCK_N=BLOCK_N, BLOCK_K=K, GROUP_M=1,
        SPLIT=2, CHEAP=None, WARP_SPECIALIZE=False, **META,
    )  # fmt: skip
    h = a[ROWS].float() @ b[:, COLUMNS].float()
    argument = (pre[ROWS, COLUMNS].float() if backward else h).requires_grad_()
    gelu = torch.nn.functional.gelu(argument)
    wanted = (gelu * keep(seed)).detach(), h.detach()
    if backward:
        (slope,) = torch.autograd.grad(gelu.sum(), argument)
        wanted = h * slope * keep(seed), wanted[0]
    for got, want in zip((out, second), wanted, strict=True):
        torch.testing.assert_close(got[ROWS, COLUMNS].float(), want, rtol=2e-3, atol=2e-3)
    if backward:
        torch.testing.assert_close(sums[-1, COLUMNS], wanted[0].sum(dim=0), rtol=2e-3, atol=2e-3)


@pytest.mark.interpreted
def test_activation(randn, program):
    x, out = matrices(2)
    seed = torch.tensor([5])
    x[ROWS, COLUMNS] = randn(M - FIRST, BLOCK_N).half()
    runtime.launch(
        _activation_kernel, 1,
        x_ptr=x, preact_ptr=None, seed_ptr=seed, out_ptr=out, M=M, N=N, OFFSET=3, BLOCK_N=BLOCK_N, **META,
    )  # fmt: skip
    want = torch.nn.functional.gelu(x[ROWS, COLUMNS].float()) * keep(seed)
    torch.testing.assert_close(out[ROWS, COLUMNS].float(), want, rtol=2e-3, atol=2e-3)
