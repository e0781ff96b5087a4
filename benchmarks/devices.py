"""One card for each architecture, and how many programs fit on it.

The rates are the vendor's, for dense bf16 with fp32 accumulation and for memory. Those of the H100 were measured on one
card. `ceilings` takes the rates of a run instead if there are results.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.harness import Ceilings
from benchmarks.records import ceilings as measured
from benchmarks.records import load

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits of a GPU. Shared memory is in bytes, and a register has 32 bits."""

    name: str  # a part of the driver's name of the card
    num_sms: int
    assumed: Ceilings
    basis: str  # of ``assumed``
    max_warps: int = 64  # per multiprocessor
    max_blocks: int = 32
    shared: int = 233_472  # 228 KiB
    registers: int = 65_536


# Warps, blocks and shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
DEVICES = {
    # NVIDIA A100 80GB SXM datasheet (2021): 312 TFLOP/s, 2,039 GB/s; A100 architecture whitepaper: 108 SMs.
    80: Device("A100", 108, Ceilings(312.0, 2039.0), "datasheet", shared=167_936),
    # Ada architecture whitepaper, table of the RTX 4090: 128 SMs, 165.2 TFLOP/s with fp32 accumulation, 1,008 GB/s.
    89: Device("RTX 4090", 128, Ceilings(165.2, 1008.0), "datasheet", max_warps=48, max_blocks=24, shared=102_400),
    # H100 SXM5: 132 SMs (architecture whitepaper). An 8192^3 product of random numbers runs at 798 TFLOP/s and a copy
    # at 3.0 TB/s, below the datasheet's 989 TFLOP/s and 3,350 GB/s.
    90: Device("H100", 132, Ceilings(798.0, 3000.0), "seen on one card"),
    # HGX B200 datasheet (2024): 2,250 TFLOP/s and 8,000 GB/s per GPU; 148 SMs as the driver reports them.
    100: Device("B200", 148, Ceilings(2250.0, 8000.0), "datasheet"),
}


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """How many programs and warps a multiprocessor holds at once."""

    blocks: int
    warps: int


def occupancy(device: Device, registers: int, shared: int, warps: int) -> Occupancy:
    """The occupancy for a kernel's registers per thread, bytes of shared memory and warps per program.

    These are the rules of NVIDIA's occupancy calculator from compute capability 8.0 on. Registers of a warp are rounded
    up to 256, and warps down to fours. A program's shared memory and 1 KiB for the system are rounded up to 128 bytes.
    """
    per_warp = _round_up(max(registers, 1) * 32, 256)
    by_registers = device.registers // per_warp // 4 * 4 // warps
    by_shared = device.shared // _round_up(shared + 1024, 128)
    blocks = min(device.max_blocks, device.max_warps // warps, by_registers, by_shared)
    return Occupancy(blocks, blocks * warps)


def waves(programs: int, slots: int) -> tuple[float, float]:
    """(waves of ``programs`` on the ``slots`` of a GPU, the share of the slots that the last wave uses)."""
    last = programs % slots or slots
    return programs / slots, last / slots


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def ceilings(device: Device, results: Path = RESULTS) -> tuple[Ceilings, str]:
    """(the card's rates, their source). They are the last measured ones under ``results``, or the assumed ones.

    Raises:
        benchmarks.records.ResultError: a file is damaged.
    """
    for folder in sorted({path.parent for path in results.glob("*/bench_*.json")}):
        records = load(folder)
        rates = measured(records, "bfloat16")
        if all(rates) and device.name.lower() in records[0].about["gpu"].lower():
            return Ceilings(*rates), f"measured {max(r.about['utc'] or '' for r in records)}"
    return device.assumed, f"assumed, {device.basis}"
