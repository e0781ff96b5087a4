"""``pytest benchmarks --benchmark-only``: small cases of ``make bench`` on any machine.

Each group is an op in a mode, and its rows are the providers (``-k "attention and fwd"`` selects). On a CPU "ours" is
PyTorch's operators, so the times show only changes of the CPU path.
"""

import pytest
import torch

from benchmarks.harness import Gate, admit, mode_of, tensors_of
from benchmarks.plan import SECONDS, benches
from benchmarks.shapes import SMALL

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CASES = [(bench, name) for file in SECONDS for bench in benches(file) for name in bench.names if "compile" not in name]


@pytest.mark.parametrize("mode", ["fwd", "bwd", "full"])
@pytest.mark.parametrize("bench, implementation", CASES, ids=lambda x: getattr(x, "op", x))
def test_bench(benchmark, bench, implementation, mode):
    if mode != "fwd" and bench.op == "latency":
        pytest.skip("inference only")
    tensors = tensors_of(bench, SMALL, DTYPE, DEVICE)
    gate = Gate(bench, SMALL, tensors)
    verdict, run = admit(bench, implementation, SMALL, tensors, gate)
    assert verdict.get("ok", True), verdict
    if run is None:
        pytest.skip(verdict["skipped"])
    fn = mode_of(run, gate.cotangents, mode)

    def call():
        fn()
        torch.cuda.synchronize() if DEVICE.type == "cuda" else None

    benchmark.group = f"{bench.op} {mode}"
    benchmark.name = implementation
    benchmark.extra_info |= {"shape": str(SMALL), "dtype": str(DTYPE), "device": str(DEVICE)} | verdict
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
