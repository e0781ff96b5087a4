"""The tolerance policy: what each factor catches, and that right results pass."""

import pytest
import torch

import vit
from vit.reference import VisionTransformer as Reference
from vit.testing import as_good, check, check_mirror, check_op, measure, pool


def results(dtype, shape=(64, 96)):
    """fp64 values, and two right roundings of them to ``dtype`` that differ in how they got there."""
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
    """The same sums in another order: alone, a draw has more than twice eager's largest error now and then.

    As many draws as `vit.testing.parity.enough_draws` takes of a model of this size. 8 are too few on some CPUs.
    """
    draws = [model_results(seed) for seed in range(96)]
    ratios = []
    for i in range(0, len(draws), 32):
        reversed_, eager, exact = (pool(list(part)) for part in zip(*draws[i : i + 32], strict=True))
        for name in exact:
            report = check(reversed_[name], eager[name], exact[name], scope="model", name=name)
            ratios.append(report.max / report.max_eager)
    assert max(ratios) > 1.2, "no chance in it: is this the same computation?"


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
    """`check_op`, `check_mirror` and `as_good`; and each passes what is right."""
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
