"""``make profile``: PyTorch's profiler on one step of a model, its table, and the share of each kind of kernel.

On a GPU the times are those of kernels. Without one they are those of operators on this CPU, for a small fp32 model.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

from benchmarks import arguments
from benchmarks.log import ROOT, name_of, table

# Kinds by names of kernels on a GPU and of operators on a CPU. The first that matches counts.
KINDS = {
    "our kernels": r"^_\w+_kernel",
    "attention of PyTorch": r"flash|fmha|attention|cudnn_generated",
    "matrix products": r"gemm|cutlass|xmma|nvjet|cublas|splitk|convolution|\b(add|b|)mm\b",
    "everything else": r"",
}
STEPS = 5


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))


def shares(events: list[Any], time: str) -> str:
    """Milliseconds per step of every kind, and its share. ``time``: the field of an event with its own microseconds."""
    ms = dict.fromkeys(KINDS, 0.0)
    for event in events:
        ms[kind_of(event.key)] += getattr(event, time) / STEPS / 1e3
    whole = sum(ms.values())
    return table(["", "ms a step", "share"], [[kind, f"{x:.3f}", f"{x / whole:.1%}"] for kind, x in ms.items() if x])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=arguments.shape, help="default vit_base_patch16_224/b256, small on a CPU")
    parser.add_argument("--provider", default="ours", help="ours, reference, timm, hf, accelerated, compile, …")
    parser.add_argument("--mode", default="full", choices=("fwd", "full"), help="full: forward + backward")
    parser.add_argument("--top", type=arguments.count, default=25, help="number of kernels in the table")
    parser.add_argument("--out", type=arguments.folder, default=ROOT / "build/profile", help="folder of trace.json")
    args = parser.parse_args()
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.bench_vit import BENCHES
    from benchmarks.harness import mode_of, tensors_of
    from benchmarks.shapes import MODELS, SMALL

    gpu, bench = torch.cuda.is_available(), BENCHES[0]
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    shape = args.shape or (MODELS["B/16"] if gpu else SMALL)
    if args.provider not in bench.providers:
        parser.error(f"no provider {args.provider!r}; there are {', '.join(bench.providers)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs its start and its end
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        run = bench.run(args.provider, shape, tensors_of(bench, shape, dtype, device))
        step = mode_of(run, lambda outs: [torch.randn_like(o) for o in outs], args.mode)
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as found:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize() if gpu else None
    except Exception as error:  # such as a missing library
        print(f"{args.provider} does not run: {error}", file=sys.stderr)
        return 2
    found.export_chrome_trace(str(args.out / "trace.json"))
    time = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = found.key_averages()
    print(events.table(sort_by=time, row_limit=args.top, max_name_column_width=60))
    print(shares([e for e in events if (e.device_type == DeviceType.CUDA) == gpu], time))
    where = torch.cuda.get_device_name() if gpu else "this CPU (no GPU here: operators of PyTorch)"
    print(f"{shape}, {name_of(dtype)}, {args.mode}, {args.provider}, {STEPS} steps, on {where}")
    print(f"{args.out / 'trace.json'} opens in https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
