"""``make gpu``: all checks that need a GPU, in stages. Each stage writes its JSON record by record.

Each stage runs in a separate process, so a stage that fails or hangs does not stop the next. The most important stages
come first.

``STAGE`` or ``--stage`` selects stages, separated by commas. ``BUDGET`` (seconds, default 450) limits the whole run. A
stage that no longer fits is recorded as not run. ``summary.json`` has a line for each stage. ``--rehearse`` runs tiny
shapes in the interpreter without a GPU and writes to ``build/``. It tests the script, not the kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from benchmarks import arguments
from benchmarks.log import folder_of
from benchmarks.stages import Stage, run

_AT = "benchmarks.gpu_stages."
STAGES = {
    "smoke": Stage(_AT + "parity:smoke", 55),  # every op once, forward and backward, in bf16
    "ops": Stage(_AT + "parity:ops", 130),  # the kernel tests, compiled
    "vit": Stage(_AT + "parity:whole_model", 40),  # ViT-B/16 in three dtypes against fp64
    "determinism": Stage(_AT + "exact:determinism", 20),  # the same bits, 100 times
    "nan_bands": Stage(_AT + "exact:nan_bands", 12),  # the same bits in buffers of NaN
    "streams": Stage(_AT + "modes:streams", 12),  # the same bits on a side stream
    "graphs": Stage(_AT + "modes:graphs", 12),  # the same bits from a CUDA graph
    "checkpoint": Stage(_AT + "modes:checkpoint", 12),  # the same bits with recomputation
    "race": Stage(_AT + "exact:race", 20),  # the same bits, 250 times, at other addresses, with other work
    "heads": Stage(_AT + "limits:heads", 15),  # 70,000 heads in a batch
    "compile": Stage(_AT + "modes:compiled", 50),  # the same bits, compiled
    "pingpong": Stage(_AT + "pingpong:pingpong", 25),  # the GEMM that is off by default, against the one that is on
    "large": Stage(_AT + "limits:large", 35),  # tensors of more than 2³¹ elements
    "peers": Stage(_AT + "peers:peers", 90),  # accelerated models against fp64
    "training": Stage(_AT + "training:training", 60),  # 1,000 steps, the loss compared with eager's
    "sanitizer": Stage(_AT + "sanitizer:sanitizer", 90),  # every op under memcheck and racecheck
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default=os.environ.get("STAGE") or ",".join(STAGES), help="stages, with commas")
    parser.add_argument("--out", type=arguments.folder, help="default benchmarks/results/<gpu>")
    budget = os.environ.get("BUDGET") or 450
    parser.add_argument("--budget", type=arguments.positive, default=budget, help="seconds in all")
    parser.add_argument("--rehearse", action="store_true", help="tiny and interpreted, without a GPU, into build/")
    args = parser.parse_args()
    names = [name.strip() for name in args.stage.split(",")]
    if unknown := set(names) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if args.rehearse:  # before torch and vit are imported
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    import torch

    if args.rehearse:
        import benchmarks.gpu_stages.cases  # noqa: F401 (once here, not once in every forked stage)
    if not args.rehearse and not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing was run. `python -m benchmarks.gpu --rehearse` runs the script without one.")
        return 2
    gpu = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    out = args.out or folder_of(gpu)
    # The interpreter needs other times than a GPU, so in a rehearsal every stage gets the same.
    stages = {name: dataclasses.replace(STAGES[name], seconds=60) if args.rehearse else STAGES[name] for name in names}
    return run(stages, out, args.budget, gpu, args.rehearse)


if __name__ == "__main__":
    sys.exit(main())
