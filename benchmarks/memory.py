"""Memory of a training step and of a forward, counted without a GPU; ours and others'.

    python -m benchmarks.memory [--shape vit_base_patch16_224/b256] [--provider ours] [--largest GIB] [--out FILE]

The model runs on tensors of device "meta" while every storage is followed from its first tensor to its last, those
inside the host code of our ops included. Peak: parameters, images, and the most that was alive at once of the rest, the
gradients among it. Saved: what autograd keeps between forward and backward, each storage once, without parameters and
images. Not counted: what a single operation of PyTorch allocates and frees, workspaces of cuBLAS and cuDNN, the
context, and what the caching allocator rounds up or cannot reuse; so a card needs somewhat more. An optimizer's state
comes on top.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import arguments, bench_vit, trace
from benchmarks.log import git_commit, utc, write
from benchmarks.shapes import MODELS, Shape
from vit.commands.parity import CannotStart
from vit.kernels import runtime

LABEL = "counted, not measured"
PROVIDERS = ("ours", "reference", "timm", "hf", "accelerated")
MIB = 2**20
Factory = Callable[[int], tuple[nn.Module, Tensor]]  # batch -> the model and its images, on device "meta"


class Live(trace.HostCode):
    """Bytes of the storages that were made inside and are alive: ``live`` now, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Storages that were there before."""
        self.known |= {t.untyped_storage()._cdata for t in tensors}

    def called(self, func, args, kwargs, out):
        for t in trace.tensors_in(out):
            storage = t.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@dataclasses.dataclass
class Memory:
    """Bytes; ``peak`` includes parameters, images and, with a backward, gradients and what is saved."""

    parameters: int
    gradients: int
    images: int
    saved: int
    peak: int


def count(model: nn.Module, image: Tensor, train: bool, arch: int = 90, num_sms: int = 132) -> Memory:
    """Of `trace.step` of a model and images on device "meta", as on a GPU of this architecture."""
    parameters = list(model.parameters())
    before, saved = [*parameters, *model.buffers(), image], {}
    own = {t.untyped_storage()._cdata for t in before}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return t.detach()  # the tensor itself would hold the graph that holds it

    live = Live()
    live.ignore(*before)
    with runtime.dry_run(arch, lambda *_: None, num_sms), trace.FusedAttention(), live:
        if train:
            with saved_tensors_hooks(keep, lambda t: t):
                trace.step(model, image, train=True)
        else:
            trace.step(model, image, train=False)
    there = sum(t.nbytes for t in before)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad) if train else 0
    return Memory(there - image.nbytes, gradients, image.nbytes, sum(saved.values()), there + live.peak)


def saved_by_a_block(make: Factory, batch: int, depth: int) -> int:
    """Bytes that one block saves for its backward: what the model saves less without its second one."""
    model, image = make(batch)
    whole = count(model, image, train=True).saved
    del next(m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) == depth)[1]
    return whole - count(model, image, train=True).saved


def largest_batch(make: Factory, memory_bytes: float, train: bool) -> int:
    """The largest batch whose counted peak is within ``memory_bytes``; 0 if one image is too much."""

    def fits(batch: int) -> bool:
        return count(*make(batch), train).peak <= memory_bytes

    if not fits(1):
        return 0
    # The peak grows linearly but for corners: the guess is close, and the search around it short.
    few, many = (count(*make(batch), train).peak for batch in (32, 64))
    guess = max(1, int(32 + (memory_bytes - few) * 32 / (many - few)))
    low, high, width = (guess, 0, 1) if fits(guess) else (1, guess, 1)
    while high == 0:
        low, high, width = (low + width, 0, 2 * width) if fits(low + width) else (low, low + width, width)
    while high - low > 1:
        middle = max(low + 1, high - width) if low == 1 else (low + high) // 2
        low, high, width = (middle, high, 2 * width) if fits(middle) else (low, middle, 2 * width)
    return low


def factory(provider: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Factory:
    """Makes the model of a provider of `benchmarks.bench_vit` with images of a shape, in any batch.

    Raises:
        vit.commands.parity.CannotStart: the library is not installed.
    """

    def make(batch: int) -> tuple[nn.Module, Tensor]:
        sized = dataclasses.replace(shape, batch=batch)
        tensors = bench_vit.inputs(sized, lambda *sizes, scale=1.0: torch.empty(sizes, device="meta", dtype=dtype))
        image = tensors.pop("image")
        return bench_vit.MODELS[provider](sized, tensors), image

    return make


# ---- the command -----------------------------------------------------------------------------------------------------


def records(shape: Shape, provider: str, largest_gib: float | None) -> list[dict[str, Any]]:
    """One for the training step and one for the forward, with ``largest_gib`` also the largest batches."""
    make = factory(provider, shape)
    about = {"bench": "memory", "op": "vit", "shape": str(shape), "dtype": "bfloat16", "provider": provider, "ok": True}
    found = []
    for mode in ("full", "fwd"):
        memory = count(*make(shape.batch), mode == "full")
        sizes = {f"{name}_mb": size / MIB for name, size in dataclasses.asdict(memory).items() if name != "peak"}
        if mode == "full":
            sizes["saved_by_a_block_mb"] = saved_by_a_block(make, shape.batch, shape.config.depth) / MIB
        found.append(about | {"mode": mode, "peak_mem_mb": memory.peak / MIB, "counted": True} | sizes)
        if largest_gib is not None:
            batch = largest_batch(make, largest_gib * 2**30, mode == "full")
            limit = {"op": "largest_batch", "mode": mode, "largest_batch": batch, "gib": largest_gib, "counted": True}
            found.append(about | limit)
    return found


def show(shape: Shape, found: list[dict[str, Any]]) -> None:
    u = 2 * shape.rows * shape.width / MIB
    print(f"\n{shape}, bf16, MiB ({LABEL}; u = {u:.1f} MiB, one token matrix)")
    print(f"{'':12s} {'parameters':>10s} {'gradients':>9s} {'saved':>9s} {'a block':>16s} {'peak step':>10s} ", end="")
    searched = any(r["op"] == "largest_batch" for r in found)
    print(f"{'peak forward':>12s}{'  largest batch: step, forward' if searched else ''}")
    for provider in dict.fromkeys(r["provider"] for r in found):
        mine = {(r["op"], r.get("mode")): r for r in found if r["provider"] == provider}
        if ("vit", "full") not in mine:
            print(f"{provider:12s} {next(iter(mine.values()))['skipped']}")
            continue
        full, fwd = mine["vit", "full"], mine["vit", "fwd"]
        block = full["saved_by_a_block_mb"]
        peaks = f"{full['peak_mem_mb']:10.0f} {fwd['peak_mem_mb']:12.0f}"
        limits = [str(r["largest_batch"]) for (op, _), r in mine.items() if op == "largest_batch"]
        print(
            f"{provider:12s} {full['parameters_mb']:10.0f} {full['gradients_mb']:9.0f} {full['saved_mb']:9.0f} "
            f"{block:8.1f} {block / u:6.2f}u {peaks}  {', '.join(limits)}".rstrip()
        )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--shape", action="append", type=arguments.shape, help="vit_base_patch16_224/b256, say; all if none"
    )
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="all if none")
    parser.add_argument(
        "--largest", type=arguments.positive, metavar="GIB", help="also the largest batch in so much memory"
    )
    parser.add_argument("--out", type=arguments.file, help="write the records to this file as well")
    args = parser.parse_args(words)
    results: list[dict[str, Any]] = []
    for shape in args.shape or MODELS.values():
        of_shape = []
        for provider in args.provider or PROVIDERS:
            try:
                of_shape += records(shape, provider, args.largest)
            except (CannotStart, ImportError) as error:
                common = {"bench": "memory", "op": "vit", "shape": str(shape), "provider": provider, "ok": True}
                of_shape.append(common | {"skipped": str(error).split("\n")[0][:100]})
        show(shape, of_shape)
        results += of_shape
    if args.out:
        commit = git_commit()
        about = {"gpu": f"none: {LABEL}", "torch": torch.__version__, "commit": commit, "utc": utc()}
        write(args.out, about, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
