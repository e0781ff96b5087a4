"""The simulated multiprocessor runs a few instructions. Their clocks are worked out by hand."""

import dataclasses

import pytest
from test_bench_sass import program

from benchmarks import sm
from benchmarks import walk as path

GPU = sm.Machine(num_sms=1, tflops=1e9, gbps=10.0, l2_gbps=20.0, ghz=1.0)


def steps_of(text, **fields):
    """Steps of code without jumps. ``fields`` are those of an opcode: LDG={"bytes": 64}."""
    return [path.Step(i, **fields.get(i.base, {})) for i in program(text)]


def end(*warps, machine=GPU, **options):
    """When the last instruction of one program issues."""
    return sm.simulate([warps], 1, 1, machine, **options).ends[-1]


@pytest.mark.parametrize(
    ("line", "apart"),
    [("FFMA R1, R2, R3, R4", 1), ("IMAD R1, R2, R3, R4", 2), ("LOP3.LUT R1, R2, R3, R4, 0x80, !PT", 2),
     ("MUFU.EX2 R1, R2", 8), ("UIADD3 UR1, UR2, UR3, URZ", 2), ("NOP", 1), ("NOP; s5", 5)],
)  # fmt: skip
def test_a_unit_takes_one_instruction_at_a_time(line, apart):
    one = steps_of("\n".join([line] * 10))
    assert end(one) == 9 * apart
    assert end(one, one) == (19 * apart if apart != 5 else 46)  # two warps share a unit, but not a stall count


def test_units_work_beside_each_other():
    """Of 14 instructions only the second MUFU waits, for one clock."""
    text = "MUFU.EX2 R1, R2\n" + 2 * "MOV R1, R2\nIMAD R1, R2, R3, R4\nFADD R1, R2, R3\n"
    timing = sm.simulate([[steps_of(text * 2)]], 1, 1, GPU)
    assert timing.ends == [14.0] and timing.busy == {"issue": 14, "mufu": 16, "alu": 8, "imad": 8, "fma": 4}
    assert end(steps_of("IMAD R1, R2, R3, R4\nFADD R1, R2, R3")) == 1  # IMAD takes half the lanes of FADD for a clock


def test_scoreboards():
    assert end(steps_of("MUFU.EX2 R1, R2; w0\nFADD R1, R1, R2; m1")) == 22
    assert end(steps_of("MUFU.EX2 R1, R2; w0\nFADD R1, R1, R2; m2")) == 1  # it waits for another scoreboard
    assert end(steps_of("S2R R1, SR_TID.X; w3\nFADD R1, R1, R2; m8")) == 45
    assert end(steps_of("STS [R1], R2; r4\nMOV R1, R3; m10", STS={"clocks": 4.0})) == 30  # until the operands are read


@pytest.mark.parametrize(
    ("size", "share", "wait"),
    [(100, 0.0, 280), (100, 1.0, 650), (4000, 0.0, 368), (40_000, 0.5, 2168), (40_000, 1.0, 650 + 4000 - 1638.4)],
)
def test_loads(size, share, wait):
    """L2 takes 280 clocks, or its rate and 0.6 of them. Memory takes its rate and 650, with 16,384 bytes ahead."""
    steps = steps_of("LDG.E R1, desc[UR4][R2.64]; w0\nFADD R1, R1, R2; m1", LDG={"bytes": size, "tensor": 1})
    assert end(steps, shares={1: share}) == pytest.approx(wait)


@pytest.mark.parametrize(("size", "wait"), [(16_000, 1), (32_000, 500), (320_000, 32_000 - 15_000 - 1638.4)])
def test_stores(size, wait):
    """L2 takes 32 bytes per clock and 500 clocks in advance, memory 10 bytes. L2 holds 15,000 clocks of stores."""
    steps = steps_of("STG.E desc[UR4][R2.64], R1\nNOP", STG={"bytes": size})
    assert end(steps) == pytest.approx(wait)


def test_shared_memory():
    """LDS.128 takes the port for 16 clocks. A warp may be 48 clocks ahead. The data come 26 clocks later."""
    one = steps_of("LDS.128 R4, [R1]; w0\nFADD R1, R4, R2; m1", LDS={"clocks": 16.0})
    assert end(one) == 16 + 26
    many = steps_of("\n".join(["LDS.128 R4, [R1]"] * 10), LDS={"clocks": 16.0})
    assert end(many) == 9 * 16 - 48
    copy = steps_of("LDGSTS.E.128 [R1], desc[UR4][R2.64]\nLDGDEPBAR; w0\nDEPBAR.LE SB0, 0x0", LDGSTS={"bytes": 100})
    assert end(copy, shares={0: 0.0}) == 280
    two = steps_of(
        "LDGSTS.E [R1], [R2.64]\nLDGDEPBAR\nLDGSTS.E [R1], [R2.64]\nLDGDEPBAR\nDEPBAR.LE SB0, 0x1",
        LDGSTS={"bytes": 100},
    )
    assert end(two, shares={0: 0.0}) == 280  # it waits for the first of two groups
    assert end([*two[:-1], *steps_of("DEPBAR.LE SB0, 0x0")], shares={0: 0.0}) == 282


HGMMA = "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56"


@pytest.mark.parametrize(
    ("opcode", "a", "clocks", "port"),
    [
        ("HGMMA.64x64x16.F32.BF16", "gdesc[UR8]", 32, 32),
        ("HGMMA.64x64x16.F32.BF16", "R4, gdesc[UR8]", 32, 16),
        ("HGMMA.64x256x16.F32.BF16", "gdesc[UR8]", 128, 80),
        ("HGMMA.64x32x16.F32.BF16", "gdesc[UR8]", 16, 24),
        ("HGMMA.64x64x8.F32.TF32", "gdesc[UR8]", 32, 32),
        ("HMMA.16816.F32.BF16", "R8, R12", 4 / 0.62, 0),
    ],
)
def test_products(opcode, a, clocks, port):
    """64 · 64 · 16 products are 131,072 FLOPs at 4096 per clock. A has 2048 and B 32 · N bytes at 128 per clock."""
    (i,) = program(f"{opcode} R56, {a}, R56")
    assert sm.product(i, GPU) == pytest.approx((clocks, port))


def test_the_queue_of_the_tensor_cores():
    """Products run in sequence from clock 4. The wait for a group ends 32 clocks after its last product."""
    text = f"{HGMMA}\n{HGMMA}, gsb0\n{HGMMA}, gsb0\nWARPGROUP.DEPBAR.LE gsb0, 0x%d"
    assert end(steps_of(text % 0)) == 4 + 3 * 32 + 32 and end(steps_of(text % 1)) == 4 + 2 * 32 + 32
    assert end(steps_of(text % 0), steps_of(text % 0)) == 4 + 6 * 32 + 32  # two warps share them
    slow = dataclasses.replace(GPU, tflops=GPU.flops / 1e3 / 2)  # the power limit halves the rate
    assert end(steps_of(text % 0), machine=slow) == 4 + 3 * 64 + 32


def test_products_come_first_at_the_shared_memory_port():
    """With A in registers a product of 32 clocks leaves half of the port, so a load of 8 clocks takes 16."""
    from_registers = "HGMMA.64x64x16.F32.BF16 R56, R4, gdesc[UR8], R56"
    load = "LDS.64 R4, [R1]; w0\nFADD R1, R4, R2; m1"
    assert end(steps_of(f"{from_registers}\n{load}", LDS={"clocks": 8.0})) == 1 + 16 + 26
    assert end(steps_of(f"{HGMMA}\n{load}", LDS={"clocks": 8.0})) == 4 + 32 + 8 + 26  # none of the port is left
    assert end(steps_of(f"{from_registers}\n{load}", LDS={"clocks": 40.0})) == 36 + (40 - 35 / 2) + 26


def test_barriers():
    late = steps_of("NOP; sF\nBAR.SYNC.DEFER_BLOCKING 0x0\nNOP")
    assert end(late, steps_of("BAR.SYNC.DEFER_BLOCKING 0x0\nNOP")) == 15 + 18 + 1
    named = steps_of("BAR.SYNC 0x1, 0x80\nNOP")  # 128 threads: one warp in each quadrant
    assert end(named, steps_of("NOP; sF\nNOP; sF\nNOP")) == 31 and end(named) == 18
    with pytest.raises(ValueError, match="something that does not come"):
        end(steps_of("BAR.SYNC 0x1, 0x100\nNOP"))


def test_mbarriers():
    """The wait ends with the bytes, 150 clocks later than a plain load. A wait for parity 1 ends at once."""
    text = "SYNCS.EXCH.64 URZ, [UR9], UR10\nSYNCS.ARRIVE.TRANS64 RZ, [UR9], R2\nUTMALDG.2D [UR8], [UR4]\n"
    steps = steps_of(text + "SYNCS.TRYWAIT P1, [UR9], RZ", UTMALDG={"bytes": 100, "barrier": 8})
    fields = {"SYNCS.EXCH.64": (1, 0), "SYNCS.ARRIVE.TRANS64": (1, 100), "SYNCS.TRYWAIT": (0, 0)}
    for step in steps:
        if step.instruction.opcode in fields:
            step.barrier, (step.arrivals, step.amount) = 8, fields[step.instruction.opcode]
    assert end(steps, shares={0: 0.0}) == 2 + 280 + 150
    assert end([steps[0], dataclasses.replace(steps[3], amount=1)]) == 1
    for k, change in ((1, {"amount": 101}), (0, {"arrivals": 2})):  # a byte, or an arrival, is missing
        with pytest.raises(ValueError, match="something that does not come"):
            end(*[[*steps[:k], dataclasses.replace(steps[k], **change), *steps[k + 1 :]]], shares={0: 0.0})


def test_programs_follow_each_other():
    """In one slot programs are 300 clocks apart. Two slots share the units and start ``spread`` apart."""
    one = [steps_of("\n".join(["MUFU.EX2 R1, R2"] * 4))]
    assert sm.simulate([one], 1, 3, GPU).ends == [24.0, 348.0, 672.0]
    assert sm.simulate([one], 2, 2, GPU).ends == [48.0, 56.0]
    assert sm.simulate([one], 2, 2, GPU, spread=100.0).ends == [24.0, 124.0]
    other = [steps_of("NOP")]
    assert sm.simulate([one, other], 1, 3, GPU).ends == [24.0, 324.0, 648.0]  # programs come in turn


def test_a_copy_runs_at_the_rate_of_memory():
    """Each program reads and writes 1,000 bytes at 10 per clock. Two SMs share the rate."""
    text = "LDG.E R1, desc[UR4][R2.64]; w0\nSTG.E desc[UR4][R2.64], R1; m1\nEXIT"
    one = [steps_of(text, LDG={"bytes": 1000, "tensor": 1}, STG={"bytes": 1000, "tensor": 2})]
    for sms, clocks in ((1, 200), (2, 400)):
        timing = sm.simulate([one], 8, 200, dataclasses.replace(GPU, absorb=10_000), sms=sms)
        assert timing.clocks(200, 8) == pytest.approx(200 * clocks, rel=0.02)
        assert timing.clocks(10_000, 8) == pytest.approx(10_000 * clocks, rel=0.02)
    assert sm.simulate([one], 8, 50, GPU).clocks(50, 8) == 50 * 200  # L2 has the stores, but memory has not


def test_the_pace_is_that_of_the_middle():
    timing = sm.Timing([10.0, 20, 50, 60, 90, 100, 105, 106], 0.0, {})
    assert timing.clocks(8, 2) == 106 and timing.clocks(12, 2) == 106 + 4 * (100 - 20) / 4
    assert dataclasses.replace(timing, busy={"DRAM": 160.0}).clocks(12, 2) == 240


def test_only_one_architecture_has_a_model():
    machine = sm.machine(90)
    assert (machine.num_sms, machine.tflops, machine.gbps) == (132, 798.0, 3000.0)
    assert machine.stretch == pytest.approx(4096 * 132 * 1.755 / 1e3 / 798)
    with pytest.raises(ValueError, match="no cycle model of sm_80; there is one of sm_90"):
        sm.machine(80)
