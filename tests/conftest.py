"""The same tests run in the interpreter or on a GPU. The ``device`` fixture decides which.

Without a GPU the strict interpreter of `strict.py` runs the kernels. The decorator of a kernel reads TRITON_INTERPRET,
so the variable is set here, before anything imports vit.
"""

import os
import re
import time
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist runs one process per core
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS raises in deterministic mode without it

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import peers
import strict

from vit.kernels import runtime

torch.backends.cudnn.allow_tf32 = False  # on by default, which makes eager's fp32 patch convolution less exact

_started = time.time()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device of the kernels: a GPU, or the CPU with the interpreter. Skips if neither is possible."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not runtime.INTERPRETED:
        pytest.skip("no GPU, and TRITON_INTERPRET is not set")
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _strict_interpreter():
    if runtime.INTERPRETED:
        strict.install()
    yield


@pytest.fixture(autouse=True)
def _peers_are_marked(request):
    peers.marked = request.node.get_closest_marker("peers") is not None
    yield
    peers.marked = True


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def randn(device):
    """``randn(*shape)``: normal fp32 numbers, the same on every device, but other ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped without one")
    config.addinivalue_line("markers", "peers: compares with timm, transformers or torchvision; skipped without them")
    config.addinivalue_line("markers", "ci: takes long; skipped without THOROUGH=1, which CI sets")
    config.addinivalue_line("markers", "interpreted: needs interpreted kernels (fp64); skipped on a GPU")


def pytest_collection_modifyitems(config, items):
    if not os.environ.get("THOROUGH"):
        _leave_fp16_to_ci(config, items)
        for item in items:
            if "ci" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes long: THOROUGH=1 runs it, as CI does"))
    items.sort(key=lambda item: item.name != "test_every_kernel_compiles_as_locked")  # the longest one starts first
    missing = "interpreted" if torch.cuda.is_available() else "gpu"
    reason = {"interpreted": "fp64 kernels run interpreted only", "gpu": "needs an NVIDIA GPU"}[missing]
    for item in items:
        if missing in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def _leave_fp16_to_ci(config, items):
    """Drops a case in fp16 if the same case in bf16 is there."""
    there = {item.nodeid for item in items}
    twins = [item for item in items if re.sub(r"(?<!b)float16", "bfloat16", item.nodeid) in there - {item.nodeid}]
    config.hook.pytest_deselected(items=twins)
    items[:] = [item for item in items if item not in set(twins)]


def pytest_terminal_summary(terminalreporter):
    """Prints a table with the results of each folder of tests."""
    rows: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if hasattr(report, "duration"):
                row = rows[report.nodeid.split("::")[0].split("/")[-2]]  # the folder
                row[outcome] += 1
                row["seconds"] += report.duration
    if not rows:
        return
    terminalreporter.section("layers")
    write = terminalreporter.write_line
    write(f"{'layer':<22}{'cases':>7}{'failed':>8}{'skipped':>9}{'seconds':>10}  result")
    for layer, row in sorted(rows.items()):
        failed = row["failed"] + row["error"]
        cases, result = row["passed"] + failed, "FAILED" if failed else "ok" if row["passed"] else "skipped"
        write(f"{layer:<22}{cases:>7.0f}{failed:>8.0f}{row['skipped']:>9.0f}{row['seconds']:>10.1f}  {result}")
    write(f"{'wall clock':<46}{time.time() - _started:>10.1f}")
    reports = [r for o in ("passed", "failed") for r in terminalreporter.stats.get(o, [])]
    caught = [r.passed for r in reports if "test_mutants.py::test_caught" in r.nodeid]
    if caught:
        write(f"seeded bugs: {sum(caught)} of {len(caught)} caught")
    for report in reports:
        for table in [value for name, value in report.user_properties if name == "table"]:
            write("")
            write(table)


@pytest.fixture(autouse=True)
def _nan_filled_outputs():
    """Makes torch.empty fill its result with NaN, so that an element that a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
