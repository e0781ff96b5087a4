"""``python -m benchmarks.profile``: the kernels of one forward + backward by time, and each group's share of its floor.

On a GPU the times are those of the kernels, from PyTorch's profiler, beside floors counted from shapes
(`benchmarks.trace`) at the card's own rates, which are measured first. Without one the times are those of PyTorch's
operators on this CPU, small and in fp32, and the floors, which are a GPU's, are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arguments
from benchmarks.gpu_stages.record import ROOT

if TYPE_CHECKING:
    from benchmarks.harness import Ceilings
    from benchmarks.shapes import Shape

# Groups of kernels by their names on a GPU and by those of PyTorch's operations in a trace; the first that fits.
GROUPS = {
    "our kernels": r"^_\w+_kernel",
    "attention of PyTorch": r"flash|fmha|attention|cudnn_generated",
    "matrix products": r"gemm|cutlass|xmma|nvjet|cublas|splitk|convolution|\b(add|b|)mm\b",
    "everything else": r"",
}
STEPS = 5


def group_of(name: str) -> str:
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE))


def floors(provider: str, shape: Shape, dtype: Any, mode: str, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds that each kernel of ours, under its name, and each group cannot do without; counted on no device."""
    import torch

    from benchmarks.bench_vit import BENCHES
    from benchmarks.harness import Work
    from benchmarks.trace import trace

    tensors = BENCHES[0].inputs(shape, lambda *sizes, scale=1.0: torch.empty(sizes, dtype=dtype, device="meta"))
    image = tensors.pop("image")
    total: dict[str, float] = defaultdict(float)
    for launch in trace(BENCHES[0].providers[provider](shape, tensors), image, train=mode == "full"):
        group = group_of(launch.name)
        for key in {group, launch.name if group == "our kernels" else group}:
            total[key] += Work(launch.flops, launch.bytes).floor_ms(ceilings)
    return dict(total)


def table(rows: list[tuple[str, int, float]], floor: dict[str, float], top: int) -> str:
    """Of (kernel, calls a step, milliseconds a step): groups first, then the longest ``top`` kernels.

    The two halves show the same time twice; shares of the floor are left out where no floor is known.
    """
    whole = sum(ms for _, _, ms in rows)
    grouped: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, calls, ms in rows:
        grouped[group_of(name)][0] += calls
        grouped[group_of(name)][1] += ms

    def line(name: str, calls: float, ms: float) -> str:
        known = floor.get(name)
        shares = f"{known:>9.3f}{100 * known / ms:>8.0f} %" if known and ms else f"{'-':>9}{'-':>10}"
        return f"{name[:58]:<60}{calls:>6.0f}{ms:>10.3f}{100 * ms / whole:>8.1f} %{shares}"

    head = f"{'':<60}{'calls':>6}{'ms':>10}{'of all':>10}{'floor':>9}{'of floor':>10}"
    by_time = sorted(grouped.items(), key=lambda item: -item[1][1])
    lines = [
        head,
        *(line(name, *found) for name, found in by_time),
        line("together", sum(r[1] for r in rows), whole),
        "",
    ]
    lines += [line(*row) for row in sorted(rows, key=lambda row: -row[2])[:top]]
    left = len(rows) - top
    return "\n".join(lines + ([f"and {left} more; --top shows them"] if left > 0 else []))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", type=arguments.shape, help="default vit_base_patch16_224/b256, on a CPU vit_tiny_patch16_224@64/b2"
    )
    parser.add_argument("--provider", default="ours", help="ours, reference, timm, hf, accelerated, compile, …")
    parser.add_argument("--mode", default="full", choices=("fwd", "full"), help="full: forward + backward")
    parser.add_argument("--top", type=arguments.count, default=25, help="how many kernels the table has")
    out = ROOT / "build/profile"
    parser.add_argument("--out", type=arguments.folder, default=out, help="folder of trace.json and table.txt")
    args = parser.parse_args()
    import torch

    from benchmarks.bench_vit import BENCHES
    from benchmarks.gpu_stages.record import Log
    from benchmarks.harness import measure_ceilings, mode_of, tensors_of
    from benchmarks.shapes import MODELS, SMALL
    from vit.parity_command import CannotStart

    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    if not gpu:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else PyTorch's profiler logs its start and its end
    bench = BENCHES[0]
    shape = args.shape or (MODELS["B/16"] if gpu else SMALL)
    if args.provider not in bench.providers:
        parser.error(f"no provider {args.provider!r}; there are {', '.join(bench.providers)}")
    args.out.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if gpu else "this CPU (no GPU here: operators of PyTorch, and no floors)"
    print(f"{shape}, {str(dtype).removeprefix('torch.')}, {args.mode}, {args.provider}, on {where}", flush=True)
    try:
        run = bench.run(args.provider, shape, tensors_of(bench, shape, dtype, device))
        step = mode_of(run, lambda outs: [torch.randn_like(o) for o in outs], args.mode)
        rows = profiled(step, args.out / "trace.json", gpu)
    except Exception as error:
        said = error if isinstance(error, CannotStart) else f"{type(error).__name__}: {error}"
        print(f"{args.provider} does not run: {said}", file=sys.stderr)
        return 2
    floor = {}
    if gpu and args.provider in ("ours", "reference"):
        ceilings = measure_ceilings(Log(args.out / "ceilings.json", {"gpu": where}), device, dtype)
        floor = floors(args.provider, shape, dtype, args.mode, ceilings)
    text = table(rows, floor, args.top)
    (args.out / "table.txt").write_text(text + "\n")
    print(f"{text}\nmean of {STEPS} steps; {args.out / 'trace.json'} opens in https://ui.perfetto.dev")
    return 0


def profiled(step: Any, trace_file: Path, gpu: bool) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of each kernel of a step, on a CPU of each operator without those it calls."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with profile(activities=activities) as found:
        for _ in range(STEPS):
            step()
        if gpu:
            torch.cuda.synchronize()
    found.export_chrome_trace(str(trace_file))
    rows = []
    for event in found.key_averages():
        if (event.device_type == DeviceType.CUDA) is gpu:
            us = event.self_device_time_total if gpu else event.self_cpu_time_total
            if us > 0:
                rows.append((event.key, round(event.count / STEPS), us / STEPS / 1e3))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
