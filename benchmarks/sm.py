"""An event simulation of one quadrant of a streaming multiprocessor (SM). It is a model, not a measurement.

The warps of the programs on the SM issue the steps of `benchmarks.walk`, one per clock. According to the control bits
they wait for stall counts, scoreboards, groups of asynchronous products and copies, and barriers. A unit takes an
instruction when it is free. The other three quadrants do the same, so traffic is counted for four warps together.
Bank conflicts, the instruction cache, address translation and changes of the clock rate are not modelled.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

from benchmarks.devices import DEVICES, ceilings
from benchmarks.sass import Instruction
from benchmarks.walk import Step

#: Clocks of a unit for an instruction of a warp: 32 threads / lanes of a quadrant. CUDA C++ Programming Guide,
#: "Arithmetic Instructions", compute capability 9.0: 128 fp32, 64 integer, 16 special functions per clock and SM.
CLOCKS = {"fma": 1, "imad": 2, "alu": 2, "mufu": 8, "uniform": 2}


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU: rates, latencies in clocks, sizes in bytes. Values without a source are estimates."""

    num_sms: int
    tflops: float  # of a large product, which the power limit slows down
    gbps: float  # to and from memory
    ghz: float = 1.755  # under load; at most 1.98
    flops: int = 4096  # dense bf16 per clock and SM: 989 TFLOP/s at 1.83 GHz, H100 architecture whitepaper
    mma: float = 0.62  # the part that mma.sync reaches, from Luo et al., arXiv:2402.13499, 2024
    port: int = 128  # shared memory, per clock and SM
    l2_gbps: float = 8500.0  # to all SMs: pranjalssh/fast.cu has 777 TFLOP/s with 192x192 tiles, which need 8,100
    l2_port: float = 64.0  # to one SM, per clock
    store_port: float = 32.0  # from one SM, per clock
    l2: int = 280  # latencies of loads from L2 and from memory
    dram: int = 650
    tma: int = 150  # more than a plain load
    mufu: int = 22
    shared: int = 26
    tensor: int = 32
    barrier: int = 18
    constant: int = 45  # LDC, S2R
    launch: int = 300  # from the end of a program to the first instruction of the next
    queue: int = 48  # clocks of work that may wait for the shared memory port
    burst: int = 16_384  # bytes that an SM may get from memory above its part of the rate
    absorb: int = 150_000  # bytes of an SM's stores that L2 buffers
    backlog: int = 500  # clocks of buffered stores to L2

    @property
    def stretch(self) -> float:
        """The factor by which the power limit makes products longer."""
        return max(1.0, self.flops * self.num_sms * self.ghz / 1e3 / self.tflops)


def machine(arch: int) -> Machine:
    """The GPU of `benchmarks.devices` with this architecture.

    Raises:
        ValueError: its latencies and rates are not known.
    """
    if arch != 90:
        raise ValueError(f"no cycle model of sm_{arch}; there is one of sm_90")
    rates, _ = ceilings(DEVICES[arch])
    return Machine(DEVICES[arch].num_sms, rates.tflops, rates.gbps)


@dataclasses.dataclass
class Timing:
    """Clocks of one SM: the ends of the simulated programs, the mean time of one, and the busy time of each unit."""

    ends: list[float]
    latency: float
    busy: dict[str, float]

    def clocks(self, programs: int, blocks: int) -> float:
        """Clocks until ``programs`` have ended and memory has finished their accesses.

        Programs after the simulated ones have the mean pace of these without the first and last ``blocks``.
        """
        count, end = len(self.ends), self.ends[-1]
        if programs > count:
            pace = (self.ends[count - blocks - 1] - self.ends[blocks - 1]) / (count - 2 * blocks)
            end += (programs - count) * pace
        return max(end, self.busy.get("DRAM", 0.0) * programs / count)


def product(i: Instruction, machine: Machine) -> tuple[float, float]:
    """(clocks of the tensor cores, of the shared memory port) of HGMMA by four warps, or HMMA by one per quadrant."""
    if i.base == "HMMA":
        m, n, k = map(int, re.fullmatch(r"(16)(8)(\d+)", i.modifiers[0]).groups())
        return 4 * 2 * m * n * k / machine.flops / machine.mma, 0.0
    m, n, k = map(int, i.modifiers[0].split("x"))
    size = 4 if "TF32" in i.modifiers else 2  # tf32 has half the rate
    rows = 0 if re.match(r"R\d", i.operands[1]) else m  # A is in registers or in shared memory
    return 2 * m * n * k / machine.flops * size / 2, (rows + n) * k * size / machine.port


class _Barrier:
    """An mbarrier. A phase ends when all threads and all bytes have arrived."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes, self.latest = 0, 0.0
        self.ends: list[float] = []

    def update(self, time: float, arrivals: int, size: int) -> None:
        self.pending, self.bytes, self.latest = self.pending - arrivals, self.bytes + size, max(self.latest, time)
        if self.pending <= 0 and self.bytes <= 0:
            self.ends.append(self.latest)
            self.pending = self.count

    def passed(self, parity: int) -> float:
        """The time when the phase of this parity ended, or infinity if it has not."""
        if len(self.ends) % 2 == parity:
            return float("inf")
        return self.ends[-1] if self.ends else 0.0


class _Program:
    def __init__(self, slot: int, start: float, warps: int) -> None:
        self.slot, self.start, self.warps, self.left = slot, start, warps, warps
        self.waiting: dict[str, list[_Warp]] = collections.defaultdict(list)  # at BAR, by barrier
        self.barriers: dict[int | None, _Barrier] = collections.defaultdict(lambda: _Barrier(1))


class _Warp:
    def __init__(self, steps: Sequence[Step], program: _Program, start: float) -> None:
        self.steps, self.program, self.at = steps, program, 0
        self.ready = start  # the end of the last stall count
        self.boards = [0.0] * 6
        self.products: list[float] = []  # ends of its groups of HGMMA
        self.copies: list[float] = []  # ends of its groups of cp.async
        self.copied = 0.0

    def earliest(self) -> float:
        """The time when its next instruction may issue if the units are free."""
        step = self.steps[self.at]
        i = step.instruction
        time = max([self.ready, *(self.boards[board] for board in i.waits)])
        if i.base in ("DEPBAR", "WARPGROUP") and i.operands:
            groups, allowed = self.copies if i.base == "DEPBAR" else self.products, int(i.operands[-1], 16)
            return max(time, groups[-1 - allowed]) if len(groups) > allowed else time
        return max(time, self.program.barriers[step.barrier].passed(step.amount)) if "TRYWAIT" in i.modifiers else time


def simulate(
    programs: Sequence[Sequence[Sequence[Step]]],
    blocks: int,
    count: int,
    machine: Machine,
    shares: Mapping[int, float] | None = None,
    spread: float = 0.0,
    sms: int | None = None,
) -> Timing:
    """Runs ``count`` programs, ``blocks`` at a time.

    Args:
        programs: for each program the steps of its warps in this quadrant. They repeat in turn.
        shares: for each tensor the part of its loads that memory serves, not L2. The default is 1.
        spread: clocks between the starts of the first programs.
        sms: how many SMs share L2 and memory, or None for all.
    """
    sms, shares = machine.num_sms if sms is None else sms, shares or {}
    l2, dram = (min(machine.l2_port, rate / sms / machine.ghz) for rate in (machine.l2_gbps, machine.gbps))
    burst, absorb = machine.burst / dram, machine.absorb / dram
    free: dict[str, float] = collections.defaultdict(float)  # when each unit is free
    free["read"] = free["DRAM"] = -burst
    busy: dict[str, float] = collections.defaultdict(float)
    warps: list[_Warp] = []
    ends: list[float] = []
    started, latencies = 0, 0.0
    left = 1.0  # the part of the shared memory port that the newest product leaves

    def start(slot: int, time: float) -> None:
        nonlocal started
        traces = programs[started % len(programs)]
        program = _Program(slot, time, len(traces))
        warps.extend(_Warp(steps, program, time) for steps in traces)
        started += 1

    def take(unit: str, time: float, clocks: float, ahead: float = 0.0) -> float:
        """The time when a unit has done this, too. It may be ``ahead`` of its rate."""
        free[unit] = max(free[unit], time - ahead) + clocks
        busy[unit] += clocks
        return free[unit]

    def access(time: float, clocks: float) -> float:
        """The time when the shared memory port has done this. Queued products come first."""
        if not clocks:
            return time
        begin, busy["shared"] = max(time, free["shared"]), busy["shared"] + clocks
        most = max(0.0, free["tensor"] - begin) * left  # possible before they end
        free["shared"] = begin + clocks / left if clocks <= most else max(begin, free["tensor"]) + clocks - most
        return free["shared"]

    def load(time: float, step: Step) -> float:
        """The time when the data have arrived."""
        done = max(time + machine.l2, take("L2", time, step.bytes / l2) + 0.6 * machine.l2)
        if share := shares.get(step.tensor, 1.0):
            clocks = step.bytes * share / dram
            read, all_traffic = take("read", time, clocks, burst), take("DRAM", time, clocks, burst)
            done = max(done, max(time, read, all_traffic - absorb) + machine.dram)
        return done

    def store(time: float, step: Step) -> float:
        """The time when the warp may continue."""
        late = take("DRAM", time, step.bytes / dram, burst) - absorb
        return max(time, late, take("store", time, step.bytes / machine.store_port) - machine.backlog)

    for slot in range(min(blocks, count)):
        start(slot, slot * spread)
    while warps:
        warp, now = warps[0], float("inf")
        for other in warps:
            unit, time = other.steps[other.at].instruction.pipe, max(other.earliest(), free["issue"])
            if unit in CLOCKS:
                time = max(time, free[unit])
            elif unit in ("shared", "global", "copy"):
                time = max(time, free["shared"] - machine.queue)
            if time < now or (time == now and other.ready < warp.ready):
                warp, now = other, time
        if now == float("inf"):
            raise ValueError("all warps wait for something that does not come")
        program, step = warp.program, warp.steps[warp.at]
        i = step.instruction
        take("issue", now, 1)
        warp.ready = now + max(1, i.stall)
        latency = 15.0  # of the result, for a scoreboard

        if i.pipe in CLOCKS:
            take(i.pipe, now, CLOCKS[i.pipe])
            if i.pipe == "imad":  # it uses half the lanes of fma
                free["fma"] = max(free["fma"], now + 1)
            latency = {"mufu": machine.mufu, "uniform": 12}.get(i.pipe, 6)
        elif i.pipe == "tensor":
            clocks, port = product(i, machine)
            clocks = max(clocks * machine.stretch, port)
            busy["shared"], left = busy["shared"] + port, 1 - port / clocks
            end = take("tensor", now + 4, clocks) + machine.tensor
            latency = end - now
            if "gsb0" in i.operands:
                warp.products.append(end)
        elif i.pipe == "shared":
            latency = access(now, step.clocks) - now + machine.shared
        elif i.pipe == "copy":
            access(now, step.clocks)
            warp.copied = max(warp.copied, load(now, step))
            latency = 30
        elif i.pipe == "global" and i.base.startswith("ST"):
            warp.ready = max(warp.ready, store(now, step))
            latency = 40
        elif i.pipe == "global":
            latency = load(now, step) - now
        elif i.pipe == "tma" and step.bytes:
            access(now, step.clocks)
            if i.base == "UTMALDG":
                program.barriers[step.barrier].update(load(now, step) + machine.tma, 0, -step.bytes)
            else:
                store(now, step)
            latency = 20
        elif i.base == "SYNCS" and "EXCH" in i.modifiers and step.arrivals:
            program.barriers[step.barrier] = _Barrier(step.arrivals)
        elif i.base == "SYNCS" and step.arrivals:
            program.barriers[step.barrier].update(now, step.arrivals, step.amount)
        elif i.base == "LDGDEPBAR":
            warp.copies.append(warp.copied)
        elif i.base == "BAR":
            here = program.waiting[i.operands[0]]
            here.append(warp)
            warp.ready = float("inf")
            if len(here) == (int(i.operands[1], 16) // 128 if len(i.operands) > 1 else program.warps):
                for other in here:
                    other.ready = now + machine.barrier
                here.clear()
        elif i.base in ("LDC", "S2R", "CS2R", "VOTE"):
            latency = machine.constant

        if i.writes is not None and i.base != "LDGDEPBAR":
            warp.boards[i.writes] = max(warp.boards[i.writes], now + latency)
        if i.reads is not None:
            read = 30 if i.pipe in ("shared", "global", "copy") else 12
            warp.boards[i.reads] = max(warp.boards[i.reads], now + read)
        warp.at += 1
        if warp.at == len(warp.steps):
            warps.remove(warp)
            program.left -= 1
            if not program.left:
                ends.append(now)
                latencies += now - program.start
                if started < count:
                    start(program.slot, now + machine.launch)
    return Timing(ends, latencies / len(ends), dict(busy))
