"""DDP and FSDP2 training against one process on the whole batch. `test_distributed.py` runs it.

    TRITON_INTERPRET=1 python tests/distributed.py         two processes on the CPU, gloo
    torchrun --nproc-per-node 2 tests/distributed.py       one GPU per process, NCCL

Rank 0 prints one JSON line per case. ``ok`` means that losses and trained weights are those of one process.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import vit
from vit.init import init_weights

STEPS, BATCH, SEED = 3, 4, 3  # images of one step, over all processes
CONFIG = dict(
    img_size=(16, 24), patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5, reg_tokens=1, init_values=0.5,
)  # fmt: skip


def model(device: torch.device | str, impl: str = "auto") -> vit.VisionTransformer:
    return vit.VisionTransformer(vit.ViTConfig(**CONFIG, impl=impl), SEED, device=device)


def shard(net: nn.Module, mesh: DeviceMesh, *, blocks: bool = True, **options: Any) -> nn.Module:
    """FSDP2 as in user code: every block, then the model."""
    for block in net.blocks if blocks else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def from_meta(mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """A model that is sharded on the meta device. The seed gives the same weights as in one process."""
    net = shard(model("meta"), mesh)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device=device)
    init_weights(net, SEED)
    return net


def train(net: nn.Module, images: Tensor, labels: Tensor, accumulate: bool = False) -> tuple[list[float], list[Tensor]]:
    """(losses of the steps, averaged over processes, weights after them). images: [STEPS, B, C, H, W].

    With ``accumulate`` each step's batch runs as two forwards, then one backward.
    """
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9), []
    for image, label in zip(images, labels, strict=True):
        parts = zip(image.chunk(2), label.chunk(2), strict=True) if accumulate else [(image, label)]
        loss = torch.stack([F.cross_entropy(net(x).float(), y) for x, y in parts]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses, [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in net.parameters()]


def compare(found: tuple, expected: tuple, before: list[Tensor], limit: float) -> dict[str, Any]:
    """Errors of the losses and of the change of each weight, relative to the largest change of that weight."""
    loss = max(abs(a - b) / b for a, b in zip(found[0], expected[0], strict=True))
    weights = max(
        ((a - b).abs().max() / (b - c).abs().max()).item()
        for a, b, c in zip(found[1], expected[1], before, strict=True)
    )
    return {"ok": loss <= limit and weights <= limit, "loss_error": loss, "weight_error": weights, "limit": limit}


def checkpointed(net: vit.VisionTransformer) -> vit.VisionTransformer:
    net.set_grad_checkpointing()
    return net


def some_blocks(net: vit.VisionTransformer, mesh: DeviceMesh) -> nn.Module:
    """Shards the last block, and the final norm with the head, as torchtitan does. The root shards the rest."""
    fully_shard(net.blocks[1], mesh=mesh)
    fully_shard([net.norm, net.head], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def parts_of_blocks(net: vit.VisionTransformer, mesh: DeviceMesh) -> nn.Module:
    """Shards the branches of every block and its first norm, then the model."""
    for block in net.blocks:
        for part in (block.norm1, block.attn, block.mlp):
            fully_shard(part, mesh=mesh)
    return fully_shard(net, mesh=mesh)


Build = Callable[[vit.VisionTransformer, DeviceMesh, torch.device], nn.Module]
#: name: (function that wraps the model of a single process, options of `train`, limit of the errors)
CASES: dict[str, tuple[Build, dict[str, Any], float]] = {
    "ddp": (lambda net, mesh, device: DistributedDataParallel(net), {}, 1e-4),
    "fsdp": (lambda net, mesh, device: shard(net, mesh), {}, 1e-4),
    "fsdp, root alone": (lambda net, mesh, device: shard(net, mesh, blocks=False), {}, 1e-4),
    "fsdp, some blocks": (lambda net, mesh, device: some_blocks(net, mesh), {}, 1e-4),
    "fsdp, parts of blocks": (lambda net, mesh, device: parts_of_blocks(net, mesh), {}, 1e-4),
    "fsdp, checkpointing": (lambda net, mesh, device: shard(checkpointed(net), mesh), {}, 1e-4),
    "fsdp, two forwards": (
        lambda net, mesh, device: shard(net, mesh, reshard_after_forward=False), {"accumulate": True}, 1e-4,
    ),
    "fsdp, from meta": (lambda net, mesh, device: from_meta(mesh, device), {}, 1e-4),
    "fsdp, bf16": (
        lambda net, mesh, device: shard(net, mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
        {}, 0.1,
    ),
    "fsdp, kernels": (lambda net, mesh, device: shard(net, mesh), {}, 1e-3),  # rounded at other places
}  # fmt: skip


def run(rank: int, world: int, device: torch.device) -> bool:
    """Runs every case, and returns whether all were right."""
    mesh, good = init_device_mesh(device.type, (world,)), True
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(STEPS, BATCH, 3, 16, 24, generator=generator).to(device)
    labels = torch.randint(5, (STEPS, BATCH), generator=generator).to(device)
    mine = slice(rank, None, world)
    before = [p.detach().clone() for p in model(device).parameters()]
    for name, (build, options, limit) in CASES.items():
        impl, steps = ("triton", 1) if name == "fsdp, kernels" else ("auto", STEPS)  # an interpreted step takes seconds
        # The whole batch, in every process the same, so that averages over processes change nothing.
        expected = train(model(device), images[:steps], labels[:steps])
        net = build(model(device, impl), mesh, device)
        record = compare(train(net, images[:steps, mine], labels[:steps, mine], **options), expected, before, limit)
        good &= record["ok"]
        if rank == 0:
            print(json.dumps({"case": name} | record), flush=True)
    return good & other_methods(model(device), shard(model(device), mesh), images[0], rank)


def other_methods(single: nn.Module, net: nn.Module, image: Tensor, rank: int) -> bool:
    """A method that is not registered with FSDP raises an error about sharded parameters. A registered one is right."""
    try:
        net.forward_intermediates(image)
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    register_fsdp_forward_method(net, "forward_intermediates")
    maps, expected = (m.forward_intermediates(image, norm=True, intermediates_only=True) for m in (net, single))
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(maps, expected, strict=True))
    record = {
        "case": "other methods",
        "ok": same and "some of its tensors are sharded" in said,
        "same": same,
        "said": said,
    }
    if rank == 0:
        print(json.dumps(record), flush=True)
    return record["ok"]


def process(rank: int, world: int, port: int) -> None:
    """A process on the CPU."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    good = run(rank, world, torch.device("cpu"))
    dist.destroy_process_group()
    sys.exit(0 if good else 1)


def main() -> int:
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = mp.start_processes(process, (2, port), 2, join=False, start_method="fork")  # imports torch once
        try:
            while not processes.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    good = run(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
