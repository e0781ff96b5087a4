"""Memory of a training step and of a forward, ours and others', counted without a GPU.

    python -m benchmarks.memory [--shape vit_base_patch16_224/b256] [--provider ours] [--largest GIB] [--out FILE]

The model runs on tensors of device "meta", and every storage is tracked while it exists, also in the host code of our
ops. Peak is parameters, images, and the most of all others at one time, which includes gradients. Saved is what
autograd keeps between forward and backward, each storage once, without parameters and images. A card needs more:
temporary memory inside an operation of PyTorch, workspaces of cuBLAS and cuDNN, the context, the caching allocator's
rounding and fragmentation, and the state of an optimizer are not counted.
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
from benchmarks.log import git_commit, table, utc, write
from benchmarks.shapes import MODELS, Shape
from vit.commands.parity import CannotStart
from vit.kernels.dry_run import dry_run

LABEL = "counted, not measured"
PROVIDERS = ("ours", "reference", "timm", "hf", "accelerated", "accelerated-hf")
MIB = 2**20
Factory = Callable[[int], tuple[nn.Module, Tensor]]  # batch -> the model and its images, on device "meta"


class Live(trace.HostCode):
    """Bytes of the storages that are allocated inside: ``live`` now, ``peak`` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Excludes storages from before."""
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
    """In bytes. ``peak`` includes parameters, images and, with a backward, gradients and saved tensors."""

    parameters: int
    gradients: int
    images: int
    saved: int
    peak: int


def count(model: nn.Module, image: Tensor, train: bool, arch: int = 90, num_sms: int = 132) -> Memory:
    """Memory of `trace.step` of a model and images on device "meta", as on a GPU of this architecture."""
    parameters = list(model.parameters())
    before, saved = [*parameters, *model.buffers(), image], {}
    own = {t.untyped_storage()._cdata for t in before}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return t.detach()  # t itself would make a reference cycle with the graph

    live = Live()
    live.ignore(*before)
    with dry_run(arch, lambda *_: None, num_sms), trace.FusedAttention(), live:
        if train:
            with saved_tensors_hooks(keep, lambda t: t):
                trace.step(model, image, train=True)
        else:
            trace.step(model, image, train=False)
    there = sum(t.nbytes for t in before)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad) if train else 0
    return Memory(there - image.nbytes, gradients, image.nbytes, sum(saved.values()), there + live.peak)


def saved_by_a_block(make: Factory, batch: int, depth: int) -> int:
    """Bytes that one block saves for its backward: the difference if the model has no second block."""
    model, image = make(batch)
    whole = count(model, image, train=True).saved
    del next(m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) == depth)[1]
    return whole - count(model, image, train=True).saved


def largest_batch(make: Factory, memory_bytes: float, train: bool) -> int:
    """The largest batch whose counted peak is within ``memory_bytes``, or 0 if one image is too much."""

    def fits(batch: int) -> bool:
        return count(*make(batch), train).peak <= memory_bytes

    # The peak is nearly linear in the batch, so the guess is close.
    few, many = (count(*make(batch), train).peak for batch in (32, 64))
    batch = max(0, int(32 + (memory_bytes - few) * 32 / (many - few)))
    while batch and not fits(batch):
        batch -= 1
    while fits(batch + 1):
        batch += 1
    return batch


def factory(provider: str, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Factory:
    """A function that makes the model of a provider of `benchmarks.bench_vit` and a batch of images.

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
    """A record for the training step and one for the forward. With ``largest_gib`` also the largest batches."""
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


SIZES = ("parameters_mb", "gradients_mb", "saved_mb", "saved_by_a_block_mb", "peak_mem_mb")
HEADS = ("parameters", "gradients", "saved", "by a block", "peak of a step", "of a forward", "in u, by a block")


def show(shape: Shape, found: list[dict[str, Any]]) -> None:
    u, rows, skipped = 2 * shape.rows * shape.width / MIB, [], []
    searched = any(r["op"] == "largest_batch" for r in found)
    for provider in dict.fromkeys(r["provider"] for r in found):
        mine = [r for r in found if r["provider"] == provider]
        if "skipped" in mine[0]:
            skipped.append(f"{provider}: {mine[0]['skipped']}")
            continue
        full, fwd = (r for r in mine if r["op"] == "vit")
        cells = [
            *(f"{full[k]:.0f}" for k in SIZES),
            f"{fwd['peak_mem_mb']:.0f}",
            f"{full['saved_by_a_block_mb'] / u:.2f}",
        ]
        rows.append([provider, *cells, *(r["largest_batch"] for r in mine if r["op"] == "largest_batch")])
    heads = [f"{shape}, bf16, MiB", *HEADS, *["largest batch: step", "forward"] * searched]
    print("\n".join(["", table(heads, rows), *skipped, f"{LABEL}; u = {u:.1f} MiB, one token matrix"]))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", action="append", type=arguments.shape, help="vit_base_patch16_224/b256; default all")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, help="default all")
    parser.add_argument("--largest", type=arguments.positive, metavar="GIB", help="also the largest batch within GIB")
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
        about = {"gpu": f"none: {LABEL}", "torch": torch.__version__, "commit": git_commit(), "utc": utc()}
        write(args.out, about, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
