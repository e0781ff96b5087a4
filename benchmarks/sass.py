"""SASS, the machine code of a kernel: its instructions with their control bits, and the units that execute them."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile

import triton

#: The unit that executes an opcode. An opcode that is missing only takes an issue slot.
PIPES = {
    "fma": "FFMA FADD FMUL HFMA2 HADD2 HMUL2 FFMA2 FADD2 FMUL2",
    "imad": "IMAD IMUL IDP",
    "alu": "IADD3 LOP3 SHF ISETP FSETP FMNMX IMNMX SEL FSEL PRMT PLOP3 LEA IABS VIADD VIADDMNMX VIMNMX BMSK SGXT FCHK "
    "P2R R2P I2FP F2FP PSETP HSETP2 HMNMX2 MOV",
    "mufu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "tensor": "HGMMA HMMA",
    "shared": "LDS STS LDSM STSM ATOMS SHFL REDUX",
    "global": "LDG STG LD ST LDL STL",
    "copy": "LDGSTS",
    "tma": "UTMALDG UTMASTG",
    "uniform": "UMOV ULDC USHF ULEA UIADD3 ULOP3 UISETP UIMAD USEL UPLOP3 UPRMT USGXT UFLO R2UR S2UR UPOPC VOTEU ELECT",
}
_PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


@dataclasses.dataclass(eq=False)
class Instruction:
    """One instruction with its control bits.

    stall: clocks until the warp's next instruction. writes, reads: the scoreboard (0 to 5) that is released with the
    result, or after the operands have been read. waits: the scoreboards that it waits for.
    """

    address: int
    guard: str  # "@!P0", or empty
    opcode: str
    operands: tuple[str, ...]
    stall: int = 1
    writes: int | None = None
    reads: int | None = None
    waits: tuple[int, ...] = ()
    target: int | None = None  # of a jump

    def __post_init__(self) -> None:
        self.base, *self.modifiers = self.opcode.split(".")
        self.pipe = _PIPE_OF.get(self.base, "other")
        # UISETP computes the same as ISETP, in uniform registers.
        self.core = self.base[1:] if self.base.startswith("U") and not self.base.startswith("UTMA") else self.base
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        self.width = next((sizes[m] for m in self.modifiers if m in sizes), 4)  # bytes of a thread's access

    @functools.cached_property
    def parts(self) -> tuple[list[str], str | None, list[str], list[str]]:
        """(predicates written, register written, sources, predicates read)."""
        values = [k for k, x in enumerate(self.operands) if not re.fullmatch(PREDICATE, x)]
        sets = self.core in ("ISETP", "FSETP", "HSETP2", "PSETP", "SYNCS")
        first = (values if sets else values[1:])[:1] or [len(self.operands)]
        written = [x for k, x in enumerate(self.operands) if k not in values and k < first[0]]
        read = [x for k, x in enumerate(self.operands) if k not in values and k > first[0]]
        sources = [self.operands[k] for k in values]
        return written, None if sets or not sources else sources.pop(0), sources, read


PREDICATE = re.compile(r"!?U?P[\dT]")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[\dT]\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")


def disassemble(cubin: bytes) -> list[Instruction]:
    """The instructions of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> list[Instruction]:
    """Instructions from the output of nvdisasm. Of an instruction's 128 bits, those from bit 105 on are control bits.

    Their fields are stall (4 bits), yield (1), write barrier (3), read barrier (3, 7 is none), wait mask (6) and reuse
    flags: Jia et al., Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, 2018, section 2.1.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    names: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"([.$\w]+):", line):
            names.append(match[1])
        elif match := _LINE.match(line):
            operands = tuple(match[4].split(", ")) if match[4] else ()
            found.append(Instruction(int(match[1], 16), (match[2] or "").strip(), match[3], operands))
            labels |= dict.fromkeys(names, found[-1].address)
            names = []
        elif match := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", line):
            bits, i = int(match[1], 16) >> 41, found[-1]
            i.stall = bits & 15
            i.writes, i.reads = ((bits >> at & 7) if bits >> at & 7 != 7 else None for at in (5, 8))
            i.waits = tuple(board for board in range(6) if bits >> 11 + board & 1)
    for i in found:
        name = re.search(r"`\(([.$\w]+)\)", " ".join(i.operands))
        i.target = labels.get(name[1]) if name else None
    return found
