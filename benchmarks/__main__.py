"""``make bench``: the speed of every kernel and model, compared with alternatives and with the floor.

It measures the card's matrix rate and copy bandwidth, then whole models, then each op, the most important first. Each
file of results, ``benchmarks/results/<gpu>/bench_<name>.json``, is written by a separate process. It is complete after
every record, so an interrupted run keeps its results. A run of only some points writes to ``build/bench/<gpu>/``.
``--rehearse`` runs the same code without a GPU on small shapes in fp32 and writes to ``build/``. It tests the script.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks import arguments
from benchmarks.log import folder_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 minutes instead of 10: fewer shapes, no max-autotune")
    for name, what in (
        ("op", "mlp, attention, residual_layer_norm, vit, …"),
        ("shape", "vit_base_patch16_224/b256, …"),
        ("provider", "ours, sdpa-cudnn, …"),
        ("mode", "fwd, bwd, full"),
    ):
        parser.add_argument(f"--{name}", default="", metavar=name.upper(), help=f"only these, with commas: {what}")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--budget", type=arguments.positive, help="seconds in all (default 240 with --quick, else 600)")
    parser.add_argument("--out", type=arguments.folder, help="folder of the JSON files")
    parser.add_argument("--rehearse", action="store_true", help="small shapes without a GPU, into build/")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="only compare two results")
    args = parser.parse_args()
    if args.compare:
        from benchmarks.compare import main as compare

        return compare([str(path) for path in args.compare])
    if args.rehearse:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from benchmarks.plan import Wanted, stages
    from benchmarks.stages import run

    picked = {
        f"{name}s": tuple(filter(None, getattr(args, name).split(","))) for name in ("op", "shape", "provider", "mode")
    }
    wanted = Wanted(**picked, dtype=args.dtype, quick=args.quick)
    try:
        planned = stages(wanted, args.rehearse)
    except ValueError as error:
        parser.error(str(error))
    if not args.rehearse and not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing was measured. `python -m benchmarks --rehearse` runs the code without one,")
        print(
            "`make roofline` counts and predicts, `pytest benchmarks --benchmark-only` times small cases on this CPU."
        )
        return 2
    gpu = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    out = args.out or folder_of(gpu, "build/bench" if wanted.some else "benchmarks/results")
    return run(planned, out, args.budget or (240 if args.quick else 600), gpu, args.rehearse)


if __name__ == "__main__":
    sys.exit(main())
