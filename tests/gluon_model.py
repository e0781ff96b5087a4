"""Runs the Python source of a Gluon kernel on a CPU, one program at a time, with a model of what is asynchronous.

Gluon has no interpreter. Here each partition of `warp_specialize` is a thread. One thread runs at a time, and a barrier
hands over to another one at random. Everything asynchronous happens as late as it may, and spoils what it will write as
soon as it may: a copy into shared memory writes NaN at once and its data when somebody waits for its barrier; a copy
out of it reads when its thread waits for it; a product reads its operands when its thread waits for it. So a wait that
is missing, too early or on the wrong phase shows in the result, or as a deadlock. Layouts, and whether threads of one
partition see each other's writes, are not modelled.
"""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAN = float("nan")


class Deadlock(Exception):
    """Every partition waits."""


class Machine:
    """Hands over between the threads of a program, in an order that the seed decides."""

    def __init__(self, seed: int) -> None:
        self.random, self.turn = random.Random(seed), threading.Condition()
        self.ready: dict[int, Callable[[], bool]] = {}  # of each thread that has not ended: whether it can go on
        self.current, self.errors = 0, []
        self.stores: dict[int, list[Callable[[], None]]] = {}

    def run(self, *partitions: Callable[[], None]) -> None:
        self.ready = {i: lambda: True for i in range(len(partitions))}
        self.stores = {i: [] for i in self.ready}
        threads = [threading.Thread(target=self._thread, args=(i, f), daemon=True) for i, f in enumerate(partitions)]
        self.current = self.random.choice(list(self.ready))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _thread(self, i: int, partition: Callable[[], None]) -> None:
        try:
            self._await_turn(i)
            partition()
            if self.stores[i]:
                raise AssertionError("a partition ends before its copies out of shared memory are done")
        except BaseException as error:
            self.errors.append(error)
        with self.turn:
            self.ready.pop(i)
            self._hand_over()

    def _await_turn(self, i: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.current == i or self.errors)
            if self.errors:
                raise self.errors[0]

    def _hand_over(self) -> None:
        able = [i for i, ready in self.ready.items() if ready()]
        if self.ready and not able:
            self.errors.append(Deadlock())
        self.current = self.random.choice(able) if able else -1
        self.turn.notify_all()

    def wait(self, ready: Callable[[], bool]) -> None:
        i = self.current
        with self.turn:
            self.ready[i] = ready
            self._hand_over()
        self._await_turn(i)


class Barrier:
    """An mbarrier: its phase ends when as many have arrived as it counts and all expected bytes have."""

    def __init__(self) -> None:
        self.count = self.left = self.bytes = self.phase = 0
        self.copies: list[Callable[[], None]] = []

    def init(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, bytes_: int = 0) -> None:
        assert self.left > 0, "more arrive than the barrier counts"
        self.left, self.bytes = self.left - 1, self.bytes + bytes_
        self.end_phase()

    def end_phase(self) -> None:
        if self.left == 0 and self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity has ended. What copies are still owed arrives now, if they can end it."""
        if self.phase == parity and self.left == 0:
            for copy in self.copies:
                copy()
            self.copies, self.bytes = [], self.bytes - sum(copy.size for copy in self.copies)
            assert self.bytes == 0, "a barrier expects other bytes than are copied"
            self.end_phase()
        return self.phase != parity


class Tile:
    """A tensor in registers."""

    def __init__(self, data: Tensor, products: list[Callable[[], Tensor]] | None = None) -> None:
        self.data, self.products = data, products or []

    shape = property(lambda self: self._now().shape)

    def _now(self) -> Tensor:
        assert not self.products, "registers are read before their product is done"
        return self.data

    def to(self, dtype: Any) -> Tile:
        return Tile(self._now().to(dtype))

    def reshape(self, shape: list[int]) -> Tile:
        return Tile(self._now().reshape(shape))

    def permute(self, dims: tuple[int, ...]) -> Tile:
        return Tile(self._now().permute(dims))

    def split(self) -> tuple[Tile, Tile]:
        return Tile(self._now()[..., 0]), Tile(self._now()[..., 1])

    def __getitem__(self, key: Any) -> Tile:
        return Tile(self._now()[key])

    def __add__(self, other: Any) -> Tile:
        return Tile(self._now() + _data(other))

    __radd__ = __add__

    def __mul__(self, other: Any) -> Tile:
        return Tile(self._now() * _data(other))

    def __lt__(self, other: Any) -> Tile:
        return Tile(self._now() < _data(other))


def _data(x: Any) -> Any:
    return x._now() if isinstance(x, Tile) else x


class Scalar(int):
    """A number, which Triton can cast."""

    def to(self, dtype: Any) -> Scalar:
        return self


class Pointer:
    """Into a contiguous tensor."""

    def __init__(self, memory: Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory.view(-1), offsets

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, _data(self.offsets) + _data(more))


class Shared:
    """Shared memory. Its views share the data."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape = data, list(data.shape)

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0]
        return Shared(self.data[i])

    def permute(self, dims: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(dims))

    def load(self, layout: Any) -> Tile:
        return Tile(self.data.clone())

    def store(self, x: Tile) -> None:
        self.data.copy_(x._now())


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.all[i]


class Block:
    """A block of a descriptor's tensor from these coordinates, as far as it is inside."""

    def __init__(self, desc: Any, start: list[int]) -> None:
        rows, cols = (
            slice(s, min(s + n, size)) for s, n, size in zip(start, desc.block_shape, desc.shape, strict=True)
        )
        self.inside = desc.base[rows, cols]
        self.part = slice(0, self.inside.shape[0]), slice(0, self.inside.shape[1])


class Descriptor:
    """Of the host, with what a kernel reads of it."""

    def __init__(self, host: Any) -> None:
        self.base, self.shape, self.block_shape, self.layout = host.base, host.shape, list(host.block_shape), None
        self.dtype = host.base.dtype
        self.block_type = types.SimpleNamespace(
            nbytes=host.block_shape[0] * host.block_shape[1] * host.base.element_size()
        )


def run(
    kernel: Any, module: Any, args: dict[str, Any], grid: int, gelu_and_grad: Callable[..., Any], seed: int
) -> None:
    """Runs the programs of a launch; ``module`` is where the kernel stands and finds its names."""
    for program in range(grid):
        _program(kernel, module, args, grid, program, gelu_and_grad, seed * grid + program)


def _program(
    kernel: Any, module: Any, args: dict[str, Any], grid: int, program: int, gelu_and_grad: Any, seed: int
) -> None:
    machine = Machine(seed)

    def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
        return Barriers(shape[0]) if dtype is torch.int64 else Shared(torch.full(shape, NAN, dtype=dtype))

    def copy_in(desc: Descriptor, start: list[int], barrier: Barrier, to: Shared) -> None:
        to.data.fill_(NAN)

        def copy() -> None:
            block = Block(desc, start)
            to.data.zero_()
            to.data[block.part] = block.inside

        copy.size = desc.block_type.nbytes
        barrier.copies.append(copy)

    def copy_out(desc: Descriptor, start: list[int], source: Shared) -> None:
        def copy() -> None:
            block = Block(desc, start)
            block.inside.copy_(source.data[block.part])

        machine.stores[machine.current].append(copy)

    def store_wait(pending: int) -> None:
        assert pending == 0
        for copy in machine.stores[machine.current]:
            copy()
        machine.stores[machine.current].clear()

    def multiply(a: Shared, b: Shared, acc: Tile, is_async: bool) -> Tile:
        return Tile(acc.data, [*acc.products, lambda: a.data.float() @ b.data.float()])

    def multiply_wait(pending: int, deps: tuple[Tile]) -> Tile:
        (acc,) = deps
        done = len(acc.products) - pending
        for product in acc.products[: max(done, 0)]:
            acc.data = acc.data + product()
        return Tile(acc.data, acc.products[max(done, 0) :])

    def load(pointer: Pointer, mask: Tile, other: float) -> Tile:
        offsets, mask = _data(pointer.offsets), _data(mask)
        return Tile(torch.where(mask, pointer.memory[offsets.clamp(max=pointer.memory.numel() - 1)], other))

    def store(pointer: Pointer, value: Tile, mask: Tile) -> None:
        mask = _data(mask)
        pointer.memory[_data(pointer.offsets)[mask]] = _data(value)[mask]

    def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
        machine.run(*(lambda f=f, a=a: f(*a) for f, a in partitions))

    names = {
        "gl": types.SimpleNamespace(
            int64=torch.int64, float32=torch.float32, constexpr=None, cdiv=lambda a, b: -(-a // b), static_range=range,
            program_id=lambda axis: program, num_programs=lambda axis: grid, allocate_shared_memory=allocate,
            NVMMADistributedLayout=lambda *_: None, SliceLayout=lambda *_: None, convert_layout=lambda x, layout: x,
            zeros=lambda shape, dtype, layout: Tile(torch.zeros(shape, dtype=dtype)), load=load, store=store,
            arange=lambda start, end, layout: Tile(torch.arange(start, end)),
            sum=lambda x, axis: Tile(x._now().sum(dim=axis)), warp_specialize=warp_specialize,
        ),
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait
        ),
        "mbarrier": types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda bar, count: bar.init(count),
            expect=lambda bar, size: bar.arrive(size), arrive=lambda bar, pred=True: bar.arrive() if pred else None,
            wait=lambda bar, parity: machine.wait(lambda: bar.passed(parity)),
        ),
        "tl": types.SimpleNamespace(minimum=min),
        "_gelu_and_grad": lambda x, activation, cheap: map(Tile, gelu_and_grad(x._now(), activation)),
        "fence_async_shared": lambda: None, "warpgroup_mma": multiply, "warpgroup_mma_wait": multiply_wait,
    }  # fmt: skip
    for name, value in vars(module).items():
        if hasattr(value, "fn") and name not in names:  # the functions of the kernel, which call each other
            names[name] = types.FunctionType(value.fn.__code__, names, name)
    grouped_tile = names["_grouped_tile"]
    names["_grouped_tile"] = lambda *a: tuple(map(Scalar, grouped_tile(*a)))
    names[kernel](**args)
