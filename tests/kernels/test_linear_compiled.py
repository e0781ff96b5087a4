"""The compiled GEMM of `linear` and `mlp`, in processes without the interpreter and without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(script):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


SASS = """
import torch
from benchmarks import compiled
from vit.kernels.linear import gemm

sizes = [(512, 768), (3072, 768), (3072,), (768, 3072), (512, 3072)]
x, fc1, bias, fc2, pre = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
found = []
with compiled.compiling(90, lambda name, args, kernel: found.append(kernel)):
    gemm(x, fc1, bias, "gelu", trans_b=True)
    gemm(x, fc1, bias, "gelu", trans_b=True, aux=True)
    gemm(x, fc2, None, "gelu", pre, aux=True)
    gemm(x, fc2, None, "gelu", pre, aux=True, sums=True)
    drop = {"seed": torch.zeros(1, dtype=torch.int64), "dropout_p": 0.1, "offset": 1}
    gemm(x, fc1, bias, "gelu", trans_b=True, aux=True, **drop)
    gemm(x, fc2, None, "gelu", pre, aux=True, sums=True, **drop)
for kernel, limit in zip(found, (20.5, 20.5, 24.5, 27.0, 39.0, 48.0), strict=True):
    figures, last = compiled.figures(kernel), kernel.asm["sass"].split("HGMMA")[-1]
    per_element = last.count(";") * figures["warps"] * 32 / (128 * 128)
    assert figures["registers"] * figures["warps"] * 32 * 2 <= 65_536 and not figures["spill"], figures
    assert per_element <= limit, (per_element, limit)
"""


def test_the_epilogue_of_a_product_with_gelu_is_short():
    """Counts the instructions per element after the last product on Hopper. Two programs fit on a multiprocessor.

    With erf, `exp` and a division there were 30, and 34 with the derivative, and one program fitted. With dropout that
    used one of a counter's four random numbers there were 59, and one program fitted.
    """
    run(SASS)


BATCHES = """
import torch, triton
from vit import kernels
from vit.kernels.dry_run import dry_run

found = set()  # what Triton would compile; True from the hook prevents it
triton.knobs.runtime.jit_cache_hook = lambda *, key, fn, **_: found.add((fn.name, key)) or True

def rand(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)

def step(tokens, seed=torch.zeros(1, dtype=torch.int64)):
    x, w1, b1, w2, b2 = rand(*tokens, 48), rand(80, 48), rand(80), rand(24, 80), rand(24)
    drop = {"dropout_p": 0.1, "seed": seed, "offset": len(tokens)}
    for impl in ("auto", "triton"):
        for activation in (None, "gelu"):
            kernels.linear(x, w1, b1, activation, impl=impl).sum().backward()
        kernels.linear(x, rand(10, 48), None, impl=impl).sum().backward()
        for options in ({}, drop):
            kernels.mlp(x, w1, b1, w2, b2, **options, impl=impl).sum().backward()
    kernels.dropout(x, 0.1, seed, 3).sum().backward()

for arch in (80, 90):
    with dry_run(arch):
        step((2, 8))
        first = set(found)
        others = [(1,), (5,), (1, 1), (3, 1), (1, 16), (3, 5, 7), (64, 197)]
        for tokens in [*((batch, 7) for batch in range(1, 34)), *others]:
            step(tokens)
            assert found == first, (arch, tokens, found - first)
print({name for name, _ in found})
"""


def test_no_batch_compiles_a_kernel_again():
    """Triton's cache keys are the same whether 16 divides the number of rows or not, and for one row."""
    names = run(BATCHES)
    assert all(name in names for name in ("_gemm_kernel", "_activation_kernel", "_dropout_kernel"))
