"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from vit.training.errors import TrainingError


class Ranks:
    """This process among the others, and what they agree on. The first one alone prints and writes.

    Args:
        device: name of the device; "" means the GPU of this process if there is one, else the CPU.

    Raises:
        TrainingError: the device does not exist.
    """

    def __init__(self, device: str = "") -> None:
        self.world, self.rank = (int(os.environ.get(name, one)) for name, one in (("WORLD_SIZE", 1), ("RANK", 0)))
        local = f":{os.environ.get('LOCAL_RANK', 0)}" if self.world > 1 else ""
        try:
            self.device = torch.device(device or ("cuda" + local if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise TrainingError(f"--device {device}: {reason}; use cpu, or leave it out") from error
        self.group = None
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            # Its tensors are on the CPU, so agreeing does not wait for the GPU.
            self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def on_first(self, work: Callable[[], Any]) -> Any:
        """Runs ``work`` on the first process. Every process gets its result, or its TrainingError."""
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = work()
            except TrainingError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, 0, group=self.group)
        if box[1] is not None:
            raise TrainingError(box[1])
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, on each of them."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, *values: float) -> list[float]:
        """The largest value over the processes, for each argument."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()
