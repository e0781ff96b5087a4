"""The path of a program through its SASS: the instructions that it executes, and the bytes that they move.

`walk` executes the SASS for four warps of a program, one in each quadrant of a multiprocessor. It computes integers,
predicates and addresses from the arguments of the launch. So branches and loops run as on the GPU, and every access to
memory has its addresses. Floating-point values and values from memory are unknown. A jump that depends on them is an
error.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import numpy as np

from benchmarks.sass import PREDICATE, Instruction
from benchmarks.trace import Launch, moved

# ---- the launch ------------------------------------------------------------------------------------------------------

PARAMETERS = 0x210  # where the arguments begin in constant bank 0 of sm_90
PARAMETER_SPACE = 1 << 62  # address of the arguments, for tensor descriptors
SPACE = 40  # tensor k starts at k << SPACE, from k = 1 on, so an address identifies its tensor


@dataclasses.dataclass
class Constants:
    """Constant memory and tensors of a launch."""

    words: dict[int, int]  # constant bank 0, by offset; others are unknown
    sizes: dict[int, int]  # bytes of each tensor
    boxes: dict[int, tuple[int, int]]  # address of a tensor descriptor -> (tensor, bytes of a box)


def constants(launch: Launch, compiled: Any) -> Constants:
    """The arguments of a launch in the driver's layout."""
    given: list[Any] = []

    def flatten(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for pair in zip(kind, value, strict=True):
                flatten(*pair)
        elif kind != "constexpr":
            given.append(value)
            if hasattr(value, "block_shape"):  # a descriptor is followed by shape and strides
                given.extend([*value.shape, *value.strides])

    for name, kind in compiled.src.signature.items():
        flatten(kind, launch.args[name])
    pattern = r"\.param(?: \.align (\d+))? \.[bu](8|16|32|64)[^,\n]*?_param_\d+(?:\[(\d+)\])?"
    kinds = [(int(bits) // 8 * int(n or 1), int(a or 0)) for a, bits, n in re.findall(pattern, compiled.asm["ptx"])]
    result = Constants({0x198: 0, 0x19C: PARAMETER_SPACE >> 32}, {}, {})
    result.words |= {0xC + 4 * k: n for k, n in enumerate((*launch.grid, 1, 1)[:3])}
    at = _round_up(PARAMETERS, max(4, *(align for _, align in kinds)))
    for value, (size, align) in zip(given, kinds, strict=False):  # the last parameters are scratch memory
        at = _round_up(at, align or size)
        tensor = getattr(value, "base", value)
        if hasattr(tensor, "data_ptr"):
            number = len(result.sizes) + 1
            result.sizes[number] = moved([tensor])
            if tensor is not value:
                box = tensor.element_size() * int(np.prod(value.block_shape))
                result.boxes[PARAMETER_SPACE + at - PARAMETERS] = number, box
            value = number << SPACE if tensor is value else None
        if value is not None:
            result.words |= {at + 4 * k: int(value) >> 32 * k & _WORD for k in range(size // 4)}
        at += size
    return result


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ---- registers of 128 threads: arrays of 1 or 128 uint64 or bool, or None for an unknown value -----------------------

_WORD, _SIGN = 0xFFFF_FFFF, 1 << 31
Array = np.ndarray


def _array(value: Any) -> Array:
    return np.atleast_1d(np.asarray(value, dtype=np.uint64))


def _signed(x: Array) -> Array:
    """32 bits extended to 64 with their sign."""
    return (x & _WORD) | (x >> 31 & 1) * (_WORD << 32)


@functools.cache
def _operand(text: str) -> tuple[str, str, int]:
    """(sign, kind, number) of ``-R5.reuse``, ``c[0x0][0x210]`` or ``0x40``. Kind "?" is no integer."""
    found = re.fullmatch(r"([-~!]?)(?:(U?[RP])(\d+|Z|T)|c\[0x0\]\[(0x\w+)\]|(0x\w+|\d+))(?:\.reuse|\.64|\.U32)?", text)
    if not found:
        return "", "?", 0
    sign, kind, number, offset, value = found.groups()
    if kind:
        return sign, kind if number.isdigit() else number, int(number) if number.isdigit() else 0
    return sign, "c" if offset else "i", int(offset or value, 0)


class Threads:
    """Registers and predicates. Before a write they are 0."""

    def __init__(self, words: dict[int, int], special: dict[str, Array]) -> None:
        self.words, self.special = words, special
        self.registers: dict[tuple[str, int], Array | None] = {}

    def read(self, text: str, wide: bool = False) -> Array | None:
        """A source before its reduction to 32 bits: -0 is 1 << 32, whose top bit is a carry. ``wide`` reads a pair."""
        sign, kind, number = _operand(text)
        if kind == "?":
            return None
        if kind in ("T", "Z", "i"):
            value = np.array([True]) if kind == "T" else _array(number)
        else:
            default = np.array([False]) if kind in ("P", "UP") else _array(0)
            step = 4 if kind == "c" else 1
            words = [self.words.get(n) if kind == "c" else self.registers.get((kind, n), default)
                     for n in range(number, number + step * (1 + wide), step)]  # fmt: skip
            if any(word is None for word in words):
                return None
            value = words[0] if len(words) == 1 else _array(words[0]) | _array(words[1]) << 32
            value = _array(value) if kind == "c" else value
        if sign == "-":
            return ~value + 1 if wide else (1 << 32) - value
        return ~value if sign == "!" else value ^ _WORD if sign == "~" else value

    def write(self, text: str, value: Array | None, active: Array | None, words: int = 1) -> None:
        """Writes ``value`` in ``active`` threads. The others keep their value."""
        _, kind, number = _operand(text)
        everywhere = active is not None and active.all()
        if kind not in ("R", "UR", "P", "UP") or (active is not None and not active.any()):
            return
        for key in ((kind, number + k) for k in range(words)):
            part = value if value is None or value.dtype == bool else value >> 32 * (key[1] - number) & _WORD
            old = self.registers.get(key, part)
            if not everywhere:
                part = None if active is None or part is None or old is None else np.where(active, part, old)
            self.registers[key] = part


def _float(x: Array) -> Array:
    return x.astype(np.uint32).view(np.float32).astype(np.float64)


def _bits(x: Array) -> Array:
    return x.astype(np.float32).view(np.uint32).astype(np.uint64)


def _lut(table: int, a: Array, b: Array, c: Array) -> Array:
    """The bitwise function whose value for bits (a, b, c) is bit 4a + 2b + c of ``table``."""
    terms = [(a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c) for k in range(8) if table >> k & 1]
    return functools.reduce(np.bitwise_or, terms, a & ~a)


def compute(core: str, m: list[str], v: list[Array], p: list[Array]) -> tuple[Array | None, Array | None]:
    """(value, carry) of an integer instruction with modifiers m, sources v and predicates p."""
    carry_in = sum((x.astype(np.uint64) for x in p if "X" in m), _array(0))
    if core in ("MOV", "LDC"):
        return v[0], None
    if core in ("IADD3", "VIADD"):
        total = sum(v, carry_in)
        return total, total >> 32
    if core == "IMAD":
        a, b = map(_signed, v[:2]) if "U32" not in m and ("WIDE" in m or "HI" in m) else v[:2]
        total = a * b + v[2] + carry_in
        return total >> (32 if "HI" in m else 0), total < v[2]
    if core == "LEA":
        a, shift = v[0] & _WORD, v[-1]
        upper = _signed(a) >> 32 if "SX32" in m else v[2]
        total = ((upper << 32 | a) << shift >> 32 if "HI" in m else a << shift & _WORD) + v[1] + carry_in
        return total, total >> 32
    if core == "SHF":
        pair, count = v[2] << 32 | v[0] & _WORD, np.minimum(v[1] & (31 if "W" in m else 255), 63)
        if "L" in m:
            pair = pair << count
        elif "S32" in m or "S64" in m:
            pair = (pair.view(np.int64) >> count.astype(np.int64)).view(np.uint64)
        else:
            pair = pair >> count
        return pair >> (32 if "HI" in m else 0), None
    if core == "LOP3":
        value = _lut(int(v[3][0]), *v[:3]) & _WORD
        return value, value != 0
    if core == "SEL":
        return np.where(p[0], *v), None
    if core == "IABS":
        return np.where(v[0] & _SIGN, (1 << 32) - v[0], v[0]), None
    if core in ("IMNMX", "VIMNMX"):
        a, b = ((x & _WORD) ^ (0 if "U32" in m else _SIGN) for x in v[:2])
        return np.where((a < b) == p[0], *v[:2]), None
    if core == "SGXT":  # the lowest v[1] bits of v[0]
        unused = 32 - v[1]
        value = v[0] << unused & _WORD
        return value >> unused if "U32" in m else _signed(value).view(np.int64) >> unused.astype(np.int64), None
    if core == "I2F":
        exact = (v[0] if "U64" in m or "U32" in m else _signed(v[0]).view(np.int64)).astype(np.float64)
        value = exact.astype(np.float32)
        above = np.nextafter(value, np.float32(np.inf))
        return _bits(np.where((value < exact) & ("RP" in m), above, value)), None
    if core == "F2I":
        return np.floor(_float(v[0])).clip(0, 2.0**63 if "U64" in m else _WORD).astype(np.uint64), None
    if core == "MUFU" and "RCP" in m:
        with np.errstate(divide="ignore"):
            return _bits(1 / _float(v[0])), None
    return None, None


def _compare(m: list[str], v: list[Array], p: list[Array]) -> list[Array]:
    """ISETP: the comparison and its opposite, each combined with a predicate. EX compares upper halves of 64 bits."""
    a, b = ((x & _WORD) ^ (0 if "U32" in m else _SIGN) for x in v)
    equal = (a == b) & (p[1] if "EX" in m else m[0] in ("LE", "GE", "EQ"))
    value = {"L": (a < b) | equal, "G": (a > b) | equal, "E": equal, "N": (a != b) | equal}[m[0][0]]
    combine = {"OR": np.bitwise_or, "XOR": np.bitwise_xor}.get(m[-2 if "EX" in m else -1], np.bitwise_and)
    return [combine(value, p[0]), combine(~value, p[0])]


def execute(t: Threads, i: Instruction, active: Array | None) -> None:
    """Executes the writes of an instruction to registers and predicates."""
    written, dest, sources, read = i.parts
    base, core, m = i.base, i.core, i.modifiers
    results: list[Array | None] = [None] * len(written)
    value, words = None, max(1, i.width // 4) if i.pipe in ("global", "shared") else 1
    pair = core in ("IADD3", "MOV", "LDC") and "64" in m
    wide = {0, 1, 2} if pair or (core == "I2F" and "U64" in m) else set()
    wide |= {2} if core == "IMAD" and ("WIDE" in m or "HI" in m) else set()
    given, predicates = [t.read(x, k in wide) for k, x in enumerate(sources)], [t.read(x) for x in read]
    if base in ("S2R", "S2UR", "CS2R"):
        value, words = t.special.get(sources[0]), 2 if base == "CS2R" and "32" not in m else 1
    elif base == "HFMA2" and sources[:2] == ["-RZ", "RZ"]:  # the compiler's form of a constant: two halves
        high, low = (int(np.float16(float(x)).view(np.uint16)) for x in sources[2:])
        value = _array(high << 16 | low)
    elif base == "LDSM":
        words = int(m[-1]) if m[-1] in "24" else 1
    elif base == "ELECT":
        written, dest, results = i.operands[:1], None, [np.arange(128) % 32 == 0]
    elif base in ("VOTE", "VOTEU"):
        written, dest, source = i.operands[:1], None, t.read(i.operands[-1])
        if source is not None:
            lanes = np.broadcast_to(source, 128).reshape(4, 32)
            results = [np.repeat(lanes.all(1) if "ALL" in m else lanes.any(1), 32)]
    elif base == "R2UR" and active is not None and given[-1] is not None:  # from the first active thread of each warp
        lanes = np.broadcast_to(active, 128).reshape(4, 32)
        value = np.repeat(np.broadcast_to(given[-1], 128)[np.arange(0, 128, 32) + lanes.argmax(1)], 32)
        active = np.repeat(lanes.any(1), 32)
    elif core == "P2R" and "B1" not in i.opcode:  # predicates as bits; a register has those outside the mask
        bits = {k: t.read(f"P{k}") for k in range(7) if _operand(sources[2])[2] >> k & 1}
        if given[1] is not None and all(bit is not None for bit in bits.values()):
            value = sum((bit.astype(np.uint64) << k for k, bit in bits.items()), given[1] & ~given[2] & _WORD)
    elif core == "PLOP3":
        inputs = [t.read(x) for x in i.operands[-5:-2]]
        written, dest = i.operands[:2], None
        results = [None if any(x is None for x in inputs) else _lut(_operand(x)[2], *inputs) for x in i.operands[-2:]]
    elif base == "SYNCS" and "TRYWAIT" in m:
        results = [np.array([True])]
    elif not any(x is None for x in given + predicates):
        if core == "ISETP":
            results = _compare(m, given, predicates)
        else:
            value, carry = compute(core, m, given, predicates)
            words = 2 if pair or (core == "IMAD" and "WIDE" in m) or (core == "F2I" and "U64" in m) else 1
            if carry is not None:
                results = [carry if carry.dtype == bool else carry > k for k in range(len(written))]
    if dest is not None and "[" not in dest:
        t.write(dest, value if value is None else value.astype(np.uint64), active, words)
    for name, result in zip(written, results, strict=False):
        t.write(name, result, active)


# ---- the path --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class Step:
    """One executed instruction of a warp, with the traffic of four warps, one in each quadrant."""

    instruction: Instruction
    bytes: int = 0  # sectors of 32 bytes from or to L2
    tensor: int = 0  # 0: unknown
    clocks: float = 0.0  # of the shared memory port
    barrier: int | None = None  # address of an mbarrier
    arrivals: int = 0  # threads that arrive, or the new count
    amount: int = 0  # expected bytes, or the parity of the awaited phase


LIMIT = 300_000  # steps of a warp


def walk(code: list[Instruction], launch: Constants, program: int, first_warp: int = 0) -> list[Step]:
    """The steps of one warp of a program. The next three warps take the same path.

    Raises:
        ValueError: the path cannot be followed.
    """
    lanes = np.arange(128, dtype=np.uint64)
    special = {"SR_TID.X": lanes + 32 * first_warp, "SR_LANEID": lanes % 32, "SR_CTAID.X": program}
    special |= dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId", "SRZ"), 0)
    threads = Threads(launch.words, {name: _array(value) for name, value in special.items()})
    at = {i.address: k for k, i in enumerate(code)}
    steps: list[Step] = []
    running = np.ones(128, dtype=bool)
    k = 0
    while len(steps) < LIMIT:
        i, leader = code[k], int(running.argmax())  # all follow the first running thread
        active = threads.read(i.guard[1:]) if i.guard else np.array([True])
        active = None if active is None else active & running
        steps.append(_step(threads, i, active, launch))
        k += 1
        if i.base == "EXIT":
            running = running & (False if active is None else ~active)
            if not running.any():
                return steps
        elif i.base in ("BRA", "CALL", "RET") and "DIV" not in i.modifiers:
            conditions = [active, *(threads.read(x) for x in i.operands if re.fullmatch(PREDICATE, x))]
            target = i.target
            if i.base == "RET":
                back = threads.read(i.operands[0].split()[0])
                target = None if back is None else int(np.broadcast_to(back, 128)[leader])
            if target not in at:
                raise ValueError(f"the jump at {i.address:#x} ({i.opcode}) leads to an address that is not known")
            if any(c is None for c in conditions):
                raise ValueError(f"the jump at {i.address:#x} ({i.opcode}) depends on what the kernel has read")
            if all(np.broadcast_to(c, 128)[leader] for c in conditions):
                k = at[target]
        elif i.base in ("BRX", "JMX"):
            raise ValueError(f"the jump at {i.address:#x} ({i.opcode}) depends on a table")
        else:
            execute(threads, i, active)
    raise ValueError(f"a warp has not ended after {LIMIT:,} instructions")


def _step(t: Threads, i: Instruction, active: Array | None, launch: Constants) -> Step:
    step = Step(i)
    lanes = np.broadcast_to(np.array([True]) if active is None else active, 128)
    if (i.pipe not in ("shared", "global", "copy", "tma") and i.base != "SYNCS") or not lanes.any():
        return step
    places = [x for x in i.operands if "[" in x]
    if i.pipe == "shared":
        matrices = int(i.modifiers[-1]) if i.modifiers[-1:] in (["2"], ["4"]) else 1
        step.clocks = 4.0 * (matrices if i.base in ("LDSM", "STSM") else 1 if not places else max(1, i.width // 4))
    elif i.pipe == "tma":
        registers = [int(re.search(r"UR(\d+)", x)[1]) for x in places]
        boxes = [launch.boxes.get(int(address[0]))
                 for n in registers if (address := t.read(f"UR{n}", wide=True)) is not None]  # fmt: skip
        if not any(boxes):
            raise ValueError(f"{i.opcode} at {i.address:#x}: its tensor descriptor is no argument of the kernel")
        step.tensor, step.bytes = next(box for box in boxes if box)
        step.clocks = step.bytes / 128
        barrier = t.read(f"UR{registers[0] + 1}")
        step.barrier = None if barrier is None else int(barrier[0])
    elif i.base == "SYNCS":
        place = _address(t, places[0]) if places else None
        step.barrier = None if place is None else int(place[0])
        value = t.read(i.operands[-1])
        number = 0 if value is None else int(np.broadcast_to(value, 128)[lanes][0])
        if "EXCH" in i.modifiers:
            step.arrivals = (1 << 20) - (number >> 1)
        elif "ARRIVE" in i.modifiers:
            step.arrivals, step.amount = int(lanes.sum()), number
        elif "TRYWAIT" in i.modifiers:
            step.amount = number >> 31
    else:
        for x in i.parts[3] if i.pipe == "copy" else ():  # false: writes zeros and reads nothing
            lanes = lanes & (True if (condition := t.read(x)) is None else condition)
        address = _address(t, places[-1])
        step.clocks = int(lanes.sum()) * i.width / 128
        step.bytes = int(lanes.sum()) * i.width
        if address is not None and lanes.any():
            address = np.broadcast_to(address, 128)[lanes]
            step.bytes, step.tensor = 32 * len(np.unique(address >> 5)), int(address[0]) >> SPACE
    return step


def _address(t: Threads, text: str) -> Array | None:
    """The addresses of ``[R3+UR6+0x10]`` or ``desc[UR4][R2.64+-0x10]`` for each thread."""
    total = _array(0)
    for term in text[text.rindex("[") + 1 : -1].split("+"):
        value = t.read(term.lstrip("-"), wide=term.endswith(".64"))
        if value is None:
            return None
        total = total - value if term[0] == "-" else total + value
    return total if ".64" in text else total & _WORD


def loops(steps: list[Step]) -> dict[int, tuple[int, int]]:
    """Address of a backward jump -> (instructions of the loop, number of iterations)."""
    jumps = [s.instruction for s in steps if s.instruction.base == "BRA" and s.instruction.target is not None]
    counts = collections.Counter(i for i in jumps if i.target < i.address)
    return {i.address: ((i.address - i.target) // 16 + 1, n) for i, n in counts.items()}
