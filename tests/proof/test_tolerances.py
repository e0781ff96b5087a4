"""The tolerance policy: what each factor catches, and that right results pass."""

import math

import pytest
import torch

import vit
from vit.reference import VisionTransformer as Reference
from vit.testing import Report, Tally, as_good, check, check_draws, check_mirror, check_op, measure, rounding_floor


def results(dtype, shape=(64, 96)):
    """fp64 values, and two correct roundings of them to ``dtype``, computed in different ways."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(shape[0], 256, generator=generator).to(dtype)
    b = torch.randn(256, shape[1], generator=generator).to(dtype)
    exact = a.double() @ b.double()
    ours = (a[:, :128].float() @ b[:128].float() + a[:, 128:].float() @ b[128:].float()).to(dtype)
    return ours, (a @ b).to(dtype), exact


@pytest.mark.parametrize("scope", ["op", "model"])
def test_right_results_pass(dtype, scope):
    ours, eager, exact = results(dtype)
    check(ours, eager, exact, scope=scope)
    check(eager, ours, exact, scope=scope)


def stale_row(ours, exact):
    ours[3] = ours[4]
    return ours


def truncated(ours, exact):
    """Rounds towards zero instead of to nearest."""
    unit = torch.finfo(ours.dtype).eps * 2.0 ** exact.abs().log2().floor()
    return ((exact / unit).trunc() * unit).to(ours.dtype)


def accumulated_in_low_precision(ours, exact):
    total = torch.zeros_like(ours)
    for _ in range(16):
        total = total + (exact / 16).to(ours.dtype)
    return total


def one_wrong_element(ours, exact):
    ours[5, 7] = ours[5, 7] * 1.1
    return ours


def scaled_by_a_third_of_a_percent(ours, exact):
    return (exact * 1.003).to(ours.dtype)


def nan(ours, exact):
    ours[0, 0] = float("nan")
    return ours


HALF = [torch.float16, torch.bfloat16]
BUGS = {
    stale_row: [*HALF, torch.float32],
    truncated: HALF,
    accumulated_in_low_precision: HALF,
    one_wrong_element: [*HALF, torch.float32],
    scaled_by_a_third_of_a_percent: [*HALF, torch.float32],
    nan: [*HALF, torch.float32],
}


@pytest.mark.parametrize(("bug", "dtype"), [(b, d) for b, ds in BUGS.items() for d in ds])
@pytest.mark.parametrize("scope", ["op", "model"])
def test_bug_is_caught(bug, dtype, scope):
    ours, eager, exact = results(dtype)
    with pytest.raises(AssertionError, match="rms"):
        check(bug(ours.clone(), exact), eager, exact, scope=scope)


def test_the_rms_factor_alone_catches_noise_spread_evenly(dtype):
    """1.3 times eager's error in fp16 and bf16, 2.5 times in fp32, without one element that stands out."""
    _, eager, exact = results(torch.float32)
    factor = 2.5 if dtype is torch.float32 else 1.3
    unit = exact.abs().max().item() * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(exact.shape, generator=generator, dtype=torch.float64).clamp(-2, 2)
    eager = (exact + 8 * unit * noise).to(dtype)
    ours = (exact + factor * 8 * unit * noise.flip(0)).to(dtype)
    report = measure(ours, eager, exact)
    assert report.rms > report.rms_limit


def test_a_floor_never_hides_a_16_bit_rms():
    """14 times eager's error of a small tensor is below the floor of 0.3, and must still fail."""
    exact = torch.linspace(1e-3, 2e-3, 5000, dtype=torch.float64)
    eager = exact.to(torch.bfloat16)
    noise = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = (exact + 14 * 2e-6 * noise).to(torch.bfloat16)
    assert not measure(ours, eager, exact).ok


def model_results(seed):
    """The gradients of a small model in fp32 with its batch reversed, in fp32, and in fp64."""
    torch.manual_seed(seed)
    sizes = {"img_size": (32, 48), "patch_size": 8, "num_classes": 10, "embed_dim": 64, "depth": 2, "num_heads": 2}
    eager = Reference(vit.ViTConfig(**sizes, global_pool="avg"))
    with torch.no_grad():
        for p in eager.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.05))
    image, cotangent = torch.randn(2, 3, 32, 48), torch.randn(2, 10)

    def gradients(model, *batch):
        image, cotangent = (t.to(model.pos_embed.dtype) for t in batch)
        return torch.autograd.grad(model(image), list(model.parameters()), cotangent)

    results = gradients(eager, image.flip(0), cotangent.flip(0)), gradients(eager, image, cotangent)
    names = [name for name, _ in eager.named_parameters()]
    return [dict(zip(names, g, strict=True)) for g in (*results, gradients(eager.double(), image, cotangent))]


def test_chance_passes_where_draws_are_pooled():
    """The same sums in another order: a single draw sometimes has more than twice eager's largest error."""
    draws, ratios = [model_results(seed) for seed in range(96)], []
    for i in range(0, len(draws), 8):
        ratios += [report.max / report.max_eager for report in check_draws(draws[i : i + 8])]
    assert max(ratios) > 1.2, "no difference: is this the same computation?"


def test_shapes_and_dtypes_must_agree():
    ours, eager, exact = results(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        measure(ours[:1], eager, exact)
    with pytest.raises(AssertionError, match="fp64"):
        measure(ours, eager, exact.float())
    with pytest.raises(AssertionError, match="dtype"):
        measure(ours.half(), eager, exact)


def spoiled(x, how):
    """x, with an error that every judge must see."""
    wrong = x.clone()
    wrong.view(-1)[3] = {"nan": float("nan"), "infinite": float("inf"), "large": 9.0 + 9.0 * x.abs().max().item()}[how]
    return wrong


class Spoiled(torch.autograd.Function):
    """The identity, with a wrong result or a wrong gradient."""

    @staticmethod
    def forward(ctx, x, how, where):
        ctx.spoils = how if where == "gradient" else None
        return spoiled(x, how) if where == "output" else x.clone()

    @staticmethod
    def backward(ctx, dy):
        return (spoiled(dy, ctx.spoils) if ctx.spoils else dy), None, None


@pytest.mark.parametrize("how", ["nan", "infinite", "large"])
@pytest.mark.parametrize("where", ["output", "gradient"])
def test_every_judge_sees_an_error_that_any_would(how, where, dtype):
    """`check_op`, `check_mirror` and `as_good`; each accepts correct results."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))

    def right(x):
        return x * 3

    def wrong(x):
        return Spoiled.apply(x * 3, how, where)

    check_op(right, right, {"x": x}, dtype)
    check_mirror(right, right, right, {"x": x}, dtype)
    with pytest.raises(AssertionError):
        check_op(wrong, right, {"x": x}, dtype)
    with pytest.raises(AssertionError):
        check_mirror(wrong, right, right, {"x": x}, dtype)
    exact = x.double() * 3
    mirror = exact.to(dtype)
    as_good(mirror, mirror, exact)
    with pytest.raises(AssertionError):
        as_good(spoiled(mirror, how), mirror, exact)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mirrors_error_has_no_floor_in_16_bits(dtype):
    """One unit in the last place more on every element: a rounding floor would let that through."""
    exact = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mirror = exact.to(dtype)
    ours = mirror + (torch.finfo(dtype).eps * mirror.abs().log2().floor().exp2()).to(dtype)
    as_good(mirror, mirror, exact)
    with pytest.raises(AssertionError, match="mirror"):
        as_good(ours, mirror, exact)


# ---- every limit, by hand ----------------------------------------------------------------------------------------

# (factor of eager's rms, factor of its maximum, least signed bias in eager's rms): the table of CONTRIBUTING.md.
LIMITS = {
    ("op", torch.float16): (1.10, 1.5, 0.0),
    ("op", torch.bfloat16): (1.10, 1.5, 0.0),
    ("op", torch.float32): (2.0, 4.0, 0.0),
    ("model", torch.float16): (1.25, 2.0, 0.25),
    ("model", torch.bfloat16): (1.25, 2.0, 0.25),
    ("model", torch.float32): (1.5, 2.0, 0.25),
}


def two_roundings(exact, dtype):
    """Twice the largest change from adding and subtracting 0.3 in ``dtype``."""
    r = exact.to(dtype)
    there = (r.double() + torch.tensor(0.3, dtype=torch.float64)).to(dtype)
    return 2 * max(abs(a - b) for a, b in zip((there - 0.3).tolist(), r.tolist(), strict=True))


@pytest.mark.parametrize("n", [40, 4000])
@pytest.mark.parametrize(("scope", "dtype"), LIMITS)
def test_errors_and_limits_by_hand(scope, dtype, n):
    """For few and many numbers: 5/sqrt(n) is the larger or the smaller of the two least biases."""
    generator = torch.Generator().manual_seed(0)
    exact, noise, other = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(3))
    ours, eager = (exact + 0.02 * noise + 0.01 * exact.sign()).to(dtype), (exact - 0.03 * other.abs()).to(dtype)
    report = measure(ours, eager, exact, scope=scope, name="x")
    rms_factor, max_factor, least = LIMITS[scope, dtype]
    errors = [[a - b for a, b in zip(t.tolist(), exact.tolist(), strict=True)] for t in (ours, eager)]
    rms, rms_eager = (math.sqrt(sum(e * e for e in of) / n) for of in errors)
    peak, peak_eager = (max(map(abs, of)) for of in errors)
    signs = [math.copysign(1, x) for x in exact.tolist()]
    bias, bias_eager = (abs(sum(e * s for e, s in zip(of, signs, strict=True))) / n for of in errors)
    floor = two_roundings(exact, dtype)
    want = {
        "rms": rms, "rms_eager": rms_eager,
        "rms_limit": rms_factor * rms_eager + (floor if dtype is torch.float32 else 0),
        "max": peak, "max_eager": peak_eager, "max_limit": max_factor * peak_eager + floor,
        "bias": bias, "bias_limit": 1.5 * bias_eager + max(least, 5 / math.sqrt(n)) * rms_eager + floor,
    }  # fmt: skip
    assert floor > 0 and report.name == "x"
    assert {key: getattr(report, key) for key in want} == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("field", ["rms", "max", "bias"])
def test_a_report_is_ok_up_to_each_limit_and_no_further(field):
    values = dict.fromkeys(("rms", "rms_eager", "max", "max_eager", "bias"), 1.0)
    limits = dict.fromkeys(("rms_limit", "max_limit", "bias_limit"), 1.0)
    assert Report("x", **values | limits).ok and Report("x", **values | limits).share == 1
    for wrong in (1.5, math.nan, math.inf):
        report = Report("x", **values | limits | {field: wrong})
        assert not report.ok and (wrong != 1.5 or report.share == 1.5)
    tight = dict.fromkeys(("rms", "max", "bias"), 0.0) | {f"{field}_limit": 0.0}
    assert Report("x", **values | limits | tight).share == 0
    assert Report("x", **values | limits | tight | {field: 1e-9}).share == math.inf


def test_a_report_says_which_figure_is_which():
    assert str(Report("a.b", 1, 2, 3, 4, 5, 6, 7, 8)) == (
        "a.b: rms 1.000e+00 (eager 2.000e+00, limit 3.000e+00), max 4.000e+00 (eager 5.000e+00, limit 6.000e+00), "
        "signed bias 7.000e+00 (limit 8.000e+00)"
    )


def test_what_is_empty_has_no_error(dtype):
    empty, other = torch.empty(0, 3, dtype=dtype), results(dtype)
    report = check(empty, empty, empty.double())
    assert report.ok and report.rms == report.rms_limit == report.max_limit == report.bias_limit == 0
    check_op(lambda x: x * 2, lambda x: x * 2, {"x": torch.empty(0, 3)}, dtype)
    one = measure(*other)
    for order in (("all", "none"), ("none", "all")):
        tally = Tally("output")
        for what in order:
            tally.add(*(other if what == "all" else (empty, empty, empty.double())))
        assert tally.report() == one


def test_a_name_and_a_scope_reach_the_message():
    ours, eager, exact = results(torch.float32)
    with pytest.raises(AssertionError, match=r"\nfc1: rms"):
        check(ours * 1.1, eager, exact, name="fc1", scope="model")
    assert measure(ours, eager, exact).name == "output" and Tally("x").scope == "op"
    assert measure(ours, eager, exact) == measure(ours, eager, exact, scope="op", name="output")
    assert measure(ours, eager, exact, scope="model") != measure(ours, eager, exact)


@pytest.mark.parametrize("size", [2047, 2048])
def test_all_computations_start_from_the_same_rounded_numbers(size, dtype):
    """Inputs and cotangents; fewer than 2048 numbers get eight cotangents. None stays None."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    seen, cotangents = [], []

    def op(x, nothing):
        assert nothing is None
        y, mine = x * 2, []
        y.register_hook(mine.append)
        seen.append(x.detach())
        cotangents.append(mine)
        return y

    for checked, dtypes in ((check_op, [dtype, dtype]), (check_mirror, [dtype, dtype])):
        seen.clear(), cotangents.clear()
        checked(op, *([op] if checked is check_op else [op, op]), {"x": x, "nothing": None}, dtype)
        assert [t.dtype for t in seen] == [*dtypes, torch.float64]
        assert all(torch.equal(t.double(), x.to(dtype).double()) for t in seen)
        assert [len(mine) for mine in cotangents] == [8 if size < 2048 else 1] * 3
        for same in zip(*cotangents, strict=True):
            assert all(torch.equal(c.double(), same[0].double()) for c in same)
        assert len({tuple(c.tolist()) for c in cotangents[0]}) == len(cotangents[0])
        first = cotangents[0][0].clone()
        checked(op, *([op] if checked is check_op else [op, op]), {"x": x, "nothing": None}, dtype, seed=1)
        assert not torch.equal(first, cotangents[3][0])


@pytest.mark.parametrize("what", ["output 0", "output 1", "grad a", "grad b"])
def test_each_output_and_each_gradient_is_judged_under_its_name(what):
    """The first and the later ones; only those that fail have a line."""
    inputs = {k: torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i, k in enumerate("ab")}

    def right(a, b):
        return a * 2, b * 3

    def wrong(**tensors):
        kind, which = what.split()
        if kind == "grad":
            tensors[which] = Spoiled.apply(tensors[which], "large", "gradient")
        outs = list(right(**tensors))
        if kind == "output":
            outs[int(which)] = Spoiled.apply(outs[int(which)], "large", "output")
        return tuple(outs)

    with pytest.raises(AssertionError) as failure:
        check_op(wrong, right, inputs, torch.float32)
    assert [line.split(":")[0] for line in str(failure.value).splitlines()[1:]] == [what]
    with pytest.raises(AssertionError, match=f"^{what}: rms .*, mirror .*, limit "):
        check_mirror(wrong, right, right, inputs, torch.float32)


def test_the_mirrors_factor(dtype):
    """At most 1.25 times its error; zeros have no rounding floor in any dtype."""
    exact = torch.zeros(64, dtype=torch.float64)
    mirror = torch.ones(64).to(dtype)
    as_good(mirror * 1.25, mirror, exact)
    as_good(mirror * 0, mirror, exact)
    for factor in (1.2578125, -1.2578125):
        with pytest.raises(AssertionError, match=r"^x: rms 1.258e"):
            as_good(mirror * factor, mirror, exact, name="x")
    for wrong in ((mirror[:1], mirror, exact), (mirror, mirror[:1], exact), (mirror, mirror, exact[:1])):
        with pytest.raises(AssertionError, match="dtype or shape"):
            as_good(*wrong)
    with pytest.raises(AssertionError, match="dtype or shape"):
        as_good(mirror, mirror.double(), exact)
    with pytest.raises(AssertionError, match="fp64"):
        as_good(mirror, mirror, exact.float())


def test_only_fp32_may_be_a_rounding_worse_than_the_mirror():
    """A mirror without any error: fp32's floor allows two roundings of 1, 16 bits allow nothing."""
    for dtype in (torch.float32, *HALF):
        mirror = torch.linspace(1, 2, 64).to(dtype)
        exact, ulp = mirror.double(), torch.finfo(dtype).eps
        as_good(mirror, mirror, exact)
        if dtype is torch.float32:
            as_good(mirror + ulp / 2, mirror, exact)
        else:
            with pytest.raises(AssertionError, match="rms"):
                as_good(mirror + ulp, mirror, exact)


def test_rounding_floor_by_hand():
    """In bf16, 1 + 0.3 is 1.296875, and that minus 0.3 is 0.99609375: twice 0.00390625. Without values it is 0."""
    assert rounding_floor(torch.tensor([0.0, 1.0], dtype=torch.float64), torch.bfloat16) == 2 * 0.00390625
    assert rounding_floor(torch.empty(0, dtype=torch.float64), torch.bfloat16) == 0


def test_draws_by_hand():
    """All elements count alike, and of each draw the largest."""
    exact = [torch.full((n,), 2.0, dtype=torch.float64) for n in (4, 1)]
    errors = [[0.5, -1.0, 0.0, 0.25], [3.0]]
    ours, eager = ([(x + f * torch.tensor(e)).float() for x, e in zip(exact, errors, strict=True)] for f in (1, 0.5))
    draws = [({"x": a}, {"x": b}, {"x": c}) for a, b, c in zip(ours, eager, exact, strict=True)]
    with pytest.raises(AssertionError, match=r"x: rms 1.436e\+00 .*max 2.236e\+00 .*bias 5.500e-01"):
        check_draws(draws)
    for other in range(2):
        wrong = [dict.fromkeys(draw[0], torch.full_like(draw[0]["x"], math.nan)) if i == other else draw[2]
                 for i, draw in enumerate(draws)]  # fmt: skip
        with pytest.raises(AssertionError, match="max nan"):
            check_draws([({"x": w["x"].float()}, b, c) for w, (_, b, c) in zip(wrong, draws, strict=True)])
