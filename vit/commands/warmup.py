"""`vit warmup`: compiles the kernels of a model before its first call."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vit.create import create_model
from vit.kernels import runtime
from vit.kernels.dry_run import dry_run
from vit.unchanged import unchanged

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass
class Compilations:
    """Numbers of kernels that Triton compiled or found in its cache. Kernels that were already loaded do not count."""

    compiled: int = 0
    cached: int = 0
    seconds: float = 0.0

    @property
    def cache(self) -> Path:
        return Path(triton.knobs.cache.dir)


@contextlib.contextmanager
def counting() -> Iterator[Compilations]:
    """Counts the compilations inside the ``with`` block."""
    found, previous, start = Compilations(), triton.knobs.compilation.listener, time.perf_counter()

    def listen(*, cache_hit: bool, **_: object) -> None:
        if cache_hit:
            found.cached += 1
        else:
            found.compiled += 1

    triton.knobs.compilation.listener = listen
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = previous
        found.seconds = time.perf_counter() - start


def warm_up(model: nn.Module, *example: Tensor, train: bool = False, arch: int | None = None) -> Compilations:
    """Compiles the kernels of an inference forward, and with ``train`` those of a training step.

    The model, its gradients and the random states do not change. An active autocast applies.

    Args:
        model: any module on a GPU, or on the CPU with ``arch``.
        *example: arguments of the forward, with the shapes and dtypes of later calls.
        train: also compile the kernels of a forward and backward in training mode.
        arch: compile for GPUs with this compute capability times ten, and run nothing.

    Returns:
        The numbers of compiled and cached kernels.

    Raises:
        RuntimeError: the kernels are interpreted, or the example is not on a GPU.
    """
    device = example[0].device
    if runtime.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set, so no kernel can be compiled in this process")
    if arch is None and device.type != "cuda":
        raise RuntimeError(f"kernels are compiled for an NVIDIA GPU, and the example is on {device.type}")
    with counting() as found, dry_run(arch) if arch is not None else contextlib.nullcontext():
        with unchanged(model, example), torch.no_grad():
            model.eval()(*example)
        if train:
            with unchanged(model, example, train=True), torch.enable_grad():
                outs = [t for t in tree_leaves(model.train()(*example)) if isinstance(t, Tensor) and t.requires_grad]
                wanted = [p for p in model.parameters() if p.requires_grad]
                torch.autograd.grad(outs, wanted, [torch.zeros_like(t) for t in outs], allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return found


def command(args: argparse.Namespace) -> str:
    """Runs the command and returns the text to print.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: this machine cannot compile the kernels.
    """
    arch, dtype = _arch(args.arch), DTYPES[args.dtype]
    if arch is None and torch.device(args.device).type != "cuda":
        raise ValueError(f"--device {args.device}: kernels are compiled for NVIDIA GPUs, so name one, e.g. cuda:0")
    if arch is None and not torch.cuda.is_available():
        raise RuntimeError("no NVIDIA GPU was found; --arch sm_90, say, compiles for one that is in another machine")
    device = torch.device("cpu" if arch is not None else args.device)
    size = {"img_size": args.img_size} if args.img_size else {}
    model = create_model(args.model, device=device, dtype=torch.float32 if args.autocast else dtype, **size)
    height, width = model.config.img_size
    image = torch.zeros(
        args.batch_size, model.config.in_chans, height, width, device=device, dtype=model.pos_embed.dtype
    )
    with torch.autocast(device.type, dtype, enabled=args.autocast):
        found = warm_up(model, image, train=args.train, arch=arch)
    where = f"sm_{arch}, from here" if arch else torch.cuda.get_device_name(device)
    passes = "inference and training" if args.train else "inference"
    return (
        f"{args.model}, {args.batch_size} x {height} x {width} pixels, {args.dtype}{' autocast' * args.autocast}, "
        f"{passes}, for {where}\n"
        f"{found.compiled} kernels compiled, {found.cached} were in the cache, {found.seconds:.1f} s\n"
        f"cache: {found.cache}"
    )


def _arch(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch(r"sm_\d{2,3}", text):
        raise ValueError(f"--arch {text} is not understood; write sm_90 for compute capability 9.0")
    if int(text[3:]) < 80:
        raise ValueError(f"--arch {text}: the kernels need compute capability 8.0 (sm_80) or newer")
    return int(text[3:])
