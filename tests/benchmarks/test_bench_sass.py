"""Decoding and execution of SASS that is written by hand, with results worked out by hand."""

import numpy as np
import pytest

from benchmarks import sass
from benchmarks import walk as path

FREE = 7  # no scoreboard


def program(text):
    """Instructions in the format of nvdisasm. "; s4 w0 r1 m03" at the end of a line: stall, barriers, wait mask."""
    lines, address = ["\t.section\t.text.k"], 0
    for line in text.strip().splitlines():
        line, _, bits = line.strip().partition(";")
        if line.endswith(":"):
            lines.append(line)
            continue
        said = {"s": 1, "w": FREE, "r": FREE, "m": 0} | {word[0]: int(word[1:], 16) for word in bits.split()}
        control = said["s"] | said["w"] << 5 | said["r"] << 8 | said["m"] << 11
        lines.append(f"        /*{address:04x}*/  {line.strip()} ;  /* 0x{0:016x} */")
        lines.append(f"                    /* 0x{control << 41:016x} */")
        address += 16
    return sass.parse("\n".join(lines))


# ---- the decoder -----------------------------------------------------------------------------------------------------


def test_control_bits():
    """0x000ea8000c1e9d00 >> 41 is 0b000000_111_010_1_0100: waits, reads, writes, yield, stall."""
    text = """
    .text.k:
            /*0000*/              @!P0 LDG.E.128 R20, desc[UR42][R18.64+0x10] ;   /* 0x0000101218148981 */
                                                                             /* 0x000ea8000c1e9d00 */
    .L_x_0:
            /*0010*/                   FADD R60, |R60|, -R37.reuse ;   /* 0x000000253c3c7221 */
                                                                             /* 0x004fe20000010100 */
            /*0020*/              @!P2 BRA `(.L_x_0) ;                      /* 0xfffffffc00dca947 */
                                                                             /* 0x000fea000383ffff */
    """.replace("\n    ", "\n")
    load, add, jump = sass.parse(text)
    assert (load.address, load.guard, load.opcode, load.width, load.pipe) == (0, "@!P0", "LDG.E.128", 16, "global")
    assert load.operands == ("R20", "desc[UR42][R18.64+0x10]")
    assert (load.stall, load.writes, load.reads, load.waits) == (4, 2, None, ())
    assert (add.stall, add.writes, add.reads, add.waits, add.pipe) == (1, None, None, (2,), "fma")
    assert (jump.stall, jump.target, jump.address) == (5, 0x10, 0x20)


def test_units():
    code = program(
        "FSETP.GT P0, R1\nF2FP.BF16.F32.PACK_AB R1, R2\nI2F.RP R1, R2\nFMUL R1, R2\nR2UR UR1, R2\nSHFL.BFLY R1\nLDC R1"
    )
    assert [i.pipe for i in code] == ["alu", "alu", "mufu", "fma", "uniform", "shared", "other"]


def test_parts():
    code = program("""
        IADD3 R61, P2, P3, R57, UR4, R59
        ISETP.GE.U32.AND.EX P4, PT, R236, RZ, PT, P1
        LOP3.LUT P5, R10, R20, 0xff, RZ, 0xc0, !PT
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10+0x18000], R4
        LDGSTS.E.BYPASS.128 [R67+0x4000], desc[UR42][R24.64], P3
    """)
    assert [i.parts for i in code] == [
        (["P2", "P3"], "R61", ["R57", "UR4", "R59"], []),
        (["P4", "PT"], None, ["R236", "RZ"], ["PT", "P1"]),
        (["P5"], "R10", ["R20", "0xff", "RZ", "0xc0"], ["!PT"]),
        (["P0"], None, ["[UR10+0x18000]", "R4"], []),
        ([], "[R67+0x4000]", ["desc[UR42][R24.64]"], ["P3"]),
    ]


# ---- the path --------------------------------------------------------------------------------------------------------


def launched(**words):
    """Constants with the given words of bank 0, and three tensors at multiples of 1 << 40."""
    return path.Constants({int(name[1:], 16): value for name, value in words.items()}, {1: 1000, 2: 1000, 3: 1000}, {})


def run(text, launch=None, **registers):
    """The registers after straight code that starts with ``registers``."""
    threads = path.Threads((launch or launched()).words, {})
    for name, value in registers.items():
        value = np.atleast_1d(np.asarray(value, dtype=bool if name[0] == "P" else np.uint64))
        threads.write(name, value, np.array([True]), words=1 if name[0] == "P" else 2)
    for i in program(text):
        path.execute(threads, i, threads.read(i.guard[1:]) if i.guard else np.array([True]))

    def read(name):
        value = threads.read(name)
        return None if value is None else int(value[0])

    return read


A, B, C = 0xFFFF_FFF0, 0x8000_0123, 0x1234_5678  # two of them negative as signed
W = 0xFFFF_FFFF


def s(x):
    return x - (1 << 32) if x >> 31 else x


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("IADD3 R9, R1, -R2, R3", (A - B + C) & W),
        ("VIADD R9, R1, -0x10", A - 16),
        ("IMAD R9, R1, R2, R3", (A * B + C) & W),
        ("IMAD.MOV R9, RZ, RZ, -R3", -C & W),
        ("IMAD.HI.U32 R9, R1, R2, RZ", A * B >> 32),
        ("IMAD.HI R9, R1, R2, RZ", (s(A) * s(B) >> 32) & W),
        ("LEA R9, R3, R2, 0x4", ((C << 4) + B) & W),
        ("LEA.HI R9, R1, R3, RZ, 0x7", C + (A >> 25)),
        ("SHF.L.U32 R9, R3, 0x5, RZ", C << 5 & W),
        ("SHF.R.U32.HI R9, RZ, 0x5, R1", A >> 5),
        ("SHF.R.S32.HI R9, RZ, 0x1f, R1", W),
        ("SHF.L.U64.HI R9, R1, 0x4, R3", ((C << 32 | A) << 4 >> 32) & W),
        ("SHF.R.U64 R9, R1, 0x4, R3", (C << 32 | A) >> 4 & W),
        ("LOP3.LUT R9, R1, R2, R3, 0x78, !PT", A ^ (B & C)),
        ("LOP3.LUT R9, R1, 0xff, RZ, 0xc0, !PT", A & 0xFF),
        ("SEL R9, R1, R2, !PT", B),
        ("IABS R9, R1", 16),
        ("IMNMX R9, R1, R3, PT", A),
        ("IMNMX.U32 R9, R1, R3, PT", C),
        ("VIMNMX R9, R1, R3, !PT", C),
        ("SGXT R9, R2, 0x9", 0xFFFF_FF23),
        ("SGXT.U32 R9, R2, 0x9", 0x123),
        ("HFMA2.MMA R9, -RZ, RZ, 1.875, 0", 0x3F80_0000),
        ("I2F.U32 R9, 0x1000001", 0x4B80_0000),  # between two floats: rounds to even, or up
        ("I2F.U32.RP R9, 0x1000001", 0x4B80_0001),
        ("UIMAD UR9, R1, R2, R3\nMOV R9, UR9", (A * B + C) & W),
    ],
)
def test_arithmetic(text, want):
    assert run(text, R1=A, R2=B, R3=C)("R9") == want


def test_arithmetic_of_64_bits():
    """Sums with two carries, products, and comparisons of the upper halves."""
    read = run(
        """
        IADD3 R10, P0, P1, R1, R1, R1
        IADD3.X R11, RZ, RZ, RZ, P0, P1
        IADD3 R8, P3, P4, R1, R1, RZ
        IADD3.X R9, RZ, RZ, RZ, P3, P4
        IADD3 R12, P2, RZ, -R1, RZ
        IADD3.X R13, RZ, ~RZ, RZ, P2, !PT
        IMAD.WIDE R14, R1, 0x6, R20
        IMAD.WIDE.U32 R16, P3, R1, R1, R18
        LEA R22, P4, R1, R1, 0x1
        LEA.HI.X.SX32 R23, R1, RZ, 0x1, P4
        ISETP.GE.U32.AND P5, PT, R3, R1, PT
        ISETP.GE.AND.EX P5, P6, R1, R1, PT, P5
        UIADD3.64 UR4, UR6, 0x1, URZ
    """,
        R1=A, R3=C, R20=5 << 32 | 7, R18=(1 << 64) - 1, UR6=W,
    )  # fmt: skip
    assert read("R11") << 32 | read("R10") == 3 * A and (read("P0"), read("P1")) == (1, 1)
    assert read("R9") << 32 | read("R8") == 2 * A
    assert read("R13") << 32 | read("R12") == (1 << 64) - A
    assert read("R15") << 32 | read("R14") == (5 << 32 | 7) + 6 * s(A)
    assert read("R17") << 32 | read("R16") == A * A - 1 and read("P3") == 1
    assert read("R23") << 32 | read("R22") == (3 * A - (2 << 32)) & ((1 << 64) - 1)  # A + 2 · its signed value
    assert (read("P5"), read("P6")) == (0, 1)  # upper halves equal, lower half smaller
    assert read("UR5") << 32 | read("UR4") == 1 << 32


@pytest.mark.parametrize(("kind", "want"), [("LT", 100), ("LE", 110), ("GT", 1), ("GE", 11), ("EQ", 10), ("NE", 101)])
def test_comparisons(kind, want):
    for below in ("", ".EX"):  # .EX: the lower halves decide if the upper ones are equal
        found = 0
        for a in (W, 0, 1):
            code = f"ISETP.{kind}.U32.AND P1, PT, R1, R2, PT\nISETP.{kind}.AND{below} P0, PT, R1, R2, PT, P1"
            found = 10 * found + run(code, R1=a, R2=0)("P0")
        assert found == want


def test_predicates_as_bits_and_tables():
    read = run("P2R R9, PR, R1, 0x5\nPLOP3.LUT P3, P4, P0, PT, P1, 0x80, 0x2\n", R1=W, P0=True, P1=False, P2=True)
    assert read("R9") == (W & ~5) | 5 and (read("P3"), read("P4")) == (0, 0)
    assert run("P2R R9, PR, RZ, 0x6", P0=True, P1=False, P2=True)("R9") == 4


def test_values_of_a_warp():
    """A vote is over 32 threads. A uniform register gets the value of the first thread that writes it."""
    lanes = np.arange(128)
    read = run(
        "VOTEU.ANY UP0, P0\nVOTEU.ANY UP1, P1\nVOTE.ALL P2, P0\n@P0 R2UR UR5, R2",
        P0=lanes == 5,
        P1=lanes == 40,
        R2=lanes * 3,
    )
    assert [read(name) for name in ("UP0", "UP1", "P2", "UR5")] == [1, 0, 0, 15]


@pytest.mark.parametrize(("a", "b"), [(7, 3), (W, 1), (W, W), (0, 5), (4_000_000_000, 7), (123_456_789, 12)])
def test_division(a, b):
    """As in compiled code, the remainder corrects the quotient twice, which is from an estimate of the reciprocal."""
    read = run(
        """
        I2F.U32.RP R4, R2
        MUFU.RCP R4, R4
        IADD3 R4, R4, 0xffffffe, RZ
        F2I.FTZ.U32.TRUNC.NTZ R5, R4
        IADD3 R6, RZ, -R5, RZ
        IMAD R6, R6, R2, RZ
        MOV R4, RZ
        IMAD.HI.U32 R5, R5, R6, R4
        IMAD.HI.U32 R7, R5, R1, RZ
        IADD3 R8, -R7, RZ, RZ
        IMAD R8, R2, R8, R1
        ISETP.GE.U32.AND P0, PT, R8, R2, PT
        @P0 IADD3 R8, R8, -R2, RZ
        @P0 IADD3 R7, R7, 0x1, RZ
        ISETP.GE.U32.AND P0, PT, R8, R2, PT
        @P0 IADD3 R7, R7, 0x1, RZ
    """,
        R1=a, R2=b,
    )  # fmt: skip
    assert read("R7") == a // b


def test_what_is_not_known():
    read = run("FADD R9, R1, R2\nIADD3 R8, R9, R1, RZ\nFSETP.GT.AND P0, PT, R1, R2, PT\n@P0 MOV R7, R1", R1=1, R2=1)
    assert read("R9") is None and read("R8") is None and read("P0") is None and read("R7") is None
    assert run("LDG.E.128 R4, desc[UR2][R2.64]\nMOV R9, R7", R2=0)("R9") is None  # the fourth word of the load
    assert run("MOV R9, c[0x0][0x500]")("R9") is None


LOOP = """
    S2R R0, SR_TID.X
    S2R R9, SR_CTAID.X
    ISETP.GE.AND P1, PT, R0, c[0x0][0x230], PT
    MOV R1, RZ
    MOV R2, c[0x0][0x210]
    MOV R3, c[0x0][0x214]
    IMAD.WIDE.U32 R2, R0, 0x4, R2
.L_x_0:
    IADD3 R1, R1, 0x40, RZ
    @!P1 LDG.E R4, desc[UR4][R2.64+-0x4]
    ISETP.GE.AND P0, PT, R1, c[0x0][0x220], PT
    FADD R5, R4, R5
    @!P0 BRA `(.L_x_0)
    @P1 EXIT
    STG.E desc[UR4][R2.64], R5
    EXIT
"""


@pytest.mark.parametrize(("k", "trips"), [(1, 1), (64, 1), (65, 2), (768, 12)])
def test_loops_end_and_masks_hold(k, trips):
    """20 of 128 threads read 80 bytes from 4 bytes before a sector, which is four sectors. They write three."""
    launch = launched(x210=0, x214=1 << 8, x220=k, x230=20)
    steps = path.walk(program(LOOP), launch, program=3)
    assert len(steps) == 7 + 5 * trips + 3
    loads = [step for step in steps if step.instruction.base == "LDG"]
    assert [(step.bytes, step.tensor) for step in loads] == [(4 * 32, 0)] * trips  # one address is before the tensor
    (store,) = (step for step in steps if step.instruction.base == "STG")
    assert (store.bytes, store.tensor, store.clocks) == (3 * 32, 1, 20 * 4 / 128)
    assert path.loops(steps) == {0xB0: (5, trips)}


def test_other_warps_are_other_threads():
    launch = launched(x210=0, x214=1 << 8, x220=1, x230=150)
    bytes_of = [
        sum(x.bytes for x in path.walk(program(LOOP), launch, 0, w) if x.instruction.base == "STG") for w in (0, 4)
    ]
    assert bytes_of == [512, 96]  # threads 128 to 149


def test_jumps_that_cannot_be_followed(monkeypatch):
    monkeypatch.setattr(path, "LIMIT", 3000)
    launch = launched(x210=0, x214=1 << 8)
    with pytest.raises(ValueError, match=r"jump at 0x20 \(BRA\) depends on what the kernel has read"):
        path.walk(
            program("LDG.E R4, [R2.64]\nISETP.GT.AND P0, PT, R4, RZ, PT\n@P0 BRA `(.L_0)\n.L_0:\nEXIT"), launch, 0
        )
    with pytest.raises(ValueError, match=r"jump at 0x0 \(BRX\) depends on a table"):
        path.walk(program("BRX R2"), launch, 0)
    with pytest.raises(ValueError, match="has not ended after 3,000 instructions"):
        path.walk(program(".L_0:\nNOP\nBRA `(.L_0)"), launch, 0)


def test_calls_return():
    text = "MOV R2, 0x20\nCALL.REL.NOINC `($f)\nMOV R3, 0x1\nEXIT\n$f:\nMOV R4, 0x2\nRET.REL.NODEC R2 `(k)"
    assert [x.instruction.address for x in path.walk(program(text), launched(), 0)] == [0, 16, 64, 80, 32, 48]


def test_copies_that_write_zeros_read_nothing():
    text = """
        S2R R0, SR_TID.X
        ISETP.LT.AND P3, PT, R0, 0x8, PT
        ISETP.GE.AND P4, PT, R0, 0x4, PT
        IMAD.WIDE.U32 R2, R0, 0x10, c[0x0][0x210]
        LDGSTS.E.128 [R9], desc[UR4][R2.64], P3
        @P4 LDGSTS.E.128 [R9], desc[UR4][R2.64], P3
        EXIT
    """
    steps = path.walk(program(text), launched(x210=0, x214=2 << 8), 0)
    assert [(x.bytes, x.tensor, x.clocks) for x in steps[4:6]] == [(128, 2, 1.0), (64, 2, 0.5)]


TMA = """
    S2R R0, SR_TID.X
    ELECT P0, URZ, PT
    ISETP.LT.AND P0, PT, R0, 0x20, P0
    VOTEU.ANY UP0, P0
    UMOV UR9, 0x8000
    UMOV UR10, 0x1ffffc
    UMOV UR4, 0x240
    UMOV UR5, 0x40000000
    MOV R2, 0x4000
    @UP0 SYNCS.EXCH.64 URZ, [UR9], UR10
    @P0 SYNCS.ARRIVE.TRANS64 RZ, [UR9], R2
    @UP0 UTMALDG.2D [UR8], [UR4]
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], RZ
    @!P1 EXIT
    EXIT
"""


def test_descriptors_and_their_barriers():
    launch = path.Constants({}, {1: 1 << 20}, {path.PARAMETER_SPACE + 0x240: (1, 0x4000)})
    for first_warp, active in ((0, True), (4, False)):  # only the first warp loads
        found = [
            (x.bytes, x.tensor, x.barrier, x.arrivals, x.amount) for x in path.walk(program(TMA), launch, 0, first_warp)
        ]
        wanted = [(0, 0, 0x8000, 2, 0), (0, 0, 0x8000, 1, 0x4000), (0x4000, 1, 0x8000, 0, 0)]
        assert found[9:12] == (wanted if active else [(0, 0, None, 0, 0)] * 3)
        assert found[12] == (0, 0, 0x8000, 0, 0)
    with pytest.raises(ValueError, match="its tensor descriptor is no argument"):
        path.walk(program(TMA), launched(), 0)
