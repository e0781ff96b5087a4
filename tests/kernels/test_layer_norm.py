"""layer_norm and residual_layer_norm: accuracy, gradients, determinism, strides."""

import pytest
import torch
from views import nan_padded

from vit.kernels import configs, layer_norm, reference, residual_layer_norm
from vit.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from vit.testing import check, check_mirror, check_op


def ours_layer_norm(**inputs):
    return layer_norm(**inputs, impl="triton")


def ours_residual(**inputs):
    return residual_layer_norm(**inputs, impl="triton")


def ours_positional(*inputs):
    return residual_layer_norm(*inputs, impl="triton")


@pytest.mark.parametrize("width", [1, 48, 100, 192, 257])
def test_layer_norm(randn, dtype, width):
    inputs = {"x": randn(3, 17, width) * 2 + 1, "weight": randn(width) + 1, "bias": randn(width)}
    check_op(ours_layer_norm, reference.layer_norm, inputs, dtype)


def test_layer_norm_without_weight_or_bias(randn, dtype):
    check_op(ours_layer_norm, reference.layer_norm, {"x": randn(5, 192), "weight": None, "bias": None}, dtype)
    check_op(ours_layer_norm, reference.layer_norm, {"x": randn(5, 192), "weight": randn(192), "bias": None}, dtype)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_layer_norm(randn, dtype, gamma, scaled, pending):
    B, N, D = 3, 17, 100 if pending else 192
    inputs = {
        "residual": randn(B, N, D), "branch": randn(B, N, D), "weight": randn(D) + 1, "bias": randn(D),
        "gamma": randn(D) if gamma else None, "branch_bias": randn(D) if pending else None,
    }  # fmt: skip
    row_scale = torch.tensor([0.0, 1.25, 1.25]).to(inputs["residual"].device) if scaled else None

    def scale_like(t):
        return None if row_scale is None else row_scale.to(t.dtype)

    check_op(
        lambda **a: residual_layer_norm(**a, row_scale=scale_like(a["residual"]), impl="triton"),
        lambda **a: reference.residual_layer_norm(**a, row_scale=scale_like(a["residual"])),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_stream_with_16_bit_branch(randn, half):
    """The stream stays fp32. y and the gradients of the branch and of its bias have the branch's dtype."""
    B, N, D = 2, 17, 192
    residual, cotangent = randn(B, N, D), randn(B, N, D)
    branch, weight, bias, pending = randn(B, N, D).to(half), (randn(D) + 1).to(half), *randn(2, D).to(half)

    def run(fn, wide: bool):
        leaves = [t.double() if wide else t.clone() for t in (residual, branch, weight, bias, pending)]
        leaves = [t.detach().requires_grad_() for t in leaves]
        stream, y = fn(*leaves[:4], branch_bias=leaves[4])
        dstream, dy = cotangent.to(stream.dtype), cotangent.to(half).to(y.dtype)
        return [stream, y, *torch.autograd.grad([stream, y], leaves, [dstream, dy])]

    ours = run(lambda *a, **k: residual_layer_norm(*a, **k, impl="triton"), wide=False)
    eager, exact = run(reference.residual_layer_norm, wide=False), run(reference.residual_layer_norm, wide=True)
    assert [t.dtype for t in ours] == [torch.float32, half, torch.float32, half, half, half, half]
    names = ["stream", "y", "dresidual", "dbranch", "dweight", "dbias", "dbranch_bias"]
    for name, a, b, c in zip(names, ours, eager, exact, strict=True):
        check(a, b, c, name=name)


class Mirror(torch.autograd.Function):
    """The algorithm of the kernels in PyTorch: statistics and sums in fp32, each result rounded once.

    The norm and the backward read the rounded stream.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, gamma, row_scale, branch_bias, eps=1e-6):
        stream, factor = x, torch.ones((), device=x.device)
        if branch is not None:
            for t in (None if gamma is None else gamma, None if row_scale is None else row_scale[:, None, None]):
                factor = factor if t is None else factor * t.float()
            whole = branch.float() if branch_bias is None else branch.float() + branch_bias.float()
            stream = (x.float() + whole * factor).to(x.dtype)
        s = stream.float()
        mean = s.mean(dim=-1, keepdim=True)
        shift = (s - mean).mean(dim=-1, keepdim=True)
        variance = (s - mean).square().mean(dim=-1, keepdim=True) - shift.square()
        mean, rstd = mean + shift, 1 / (variance + eps).sqrt()
        y = (s - mean) * rstd
        y = y if weight is None else y * weight.float()
        y = y if bias is None else y + bias.float()
        ctx.save_for_backward(stream, mean, rstd, branch, weight, bias, gamma, row_scale, branch_bias, factor)
        return stream, y.to(x.dtype if branch is None else branch.dtype)

    @staticmethod
    def backward(ctx, dstream, dy):
        stream, mean, rstd, branch, weight, bias, gamma, row_scale, branch_bias, factor = ctx.saved_tensors
        x_hat, dy = (stream.float() - mean) * rstd, dy.float()
        rows = tuple(range(dy.dim() - 1))
        dweight, dbias = (dy * x_hat).sum(dim=rows), dy.sum(dim=rows)
        dy = dy if weight is None else dy * weight.float()
        c1, c2 = dy.mean(dim=-1, keepdim=True), (dy * x_hat).mean(dim=-1, keepdim=True)
        ds = rstd * (dy - c1 - x_hat * c2)
        ds = ds if branch is None else ds + dstream.float()
        dgamma = None
        if gamma is not None:
            scale = 1.0 if row_scale is None else row_scale.float()[:, None, None]
            whole = branch.float() if branch_bias is None else branch.float() + branch_bias.float()
            dgamma = (ds * scale * whole).sum(dim=rows).to(gamma.dtype)
        return (
            ds.to(stream.dtype),
            None if branch is None else (ds * factor).to(branch.dtype),
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dgamma,
            None,
            None if branch_bias is None else (ds * factor).sum(dim=rows).to(branch_bias.dtype),
        )


@pytest.mark.parametrize("width", [100, 192])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_layer_norm_as_good_as_its_mirror(randn, dtype, width, offset):
    inputs = {"x": randn(3, 17, width) * 2 + offset, "weight": randn(width) + 1, "bias": randn(width)}
    check_mirror(
        ours_layer_norm,
        lambda x, weight, bias: Mirror.apply(x, None, weight, bias, None, None, None)[1],
        reference.layer_norm,
        inputs,
        dtype,
    )


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_layer_norm_as_good_as_its_mirror(randn, dtype, scaled, pending):
    B, N, D = 3, 17, 192
    inputs = {
        "residual": randn(B, N, D), "branch": randn(B, N, D), "weight": randn(D) + 1, "bias": randn(D),
        "gamma": randn(D) if scaled else None, "branch_bias": randn(D) if pending else None,
    }  # fmt: skip
    scale = {"row_scale": torch.tensor([0.0, 1.25, 1.25], device=inputs["residual"].device) if scaled else None}

    def mirror(residual, branch, weight, bias, gamma, branch_bias):
        return Mirror.apply(residual, branch, weight, bias, gamma, scale["row_scale"], branch_bias)

    check_mirror(
        lambda **a: ours_residual(**a, **scale), mirror, lambda **a: reference.residual_layer_norm(**a, **scale),
        inputs, dtype,
    )  # fmt: skip


HALF = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
IMPL = pytest.mark.parametrize("impl", ["triton", "reference"])


def _autocast_grads(fn, leaves, cotangents, half):
    """Outputs, and gradients of the leaves that are not None. The forward is under autocast unless half is None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    device = cotangents[0].device.type
    with torch.autocast(device, half, enabled=half is not None):
        outs = fn(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    cotangents = [c.to(o.dtype) for c, o in zip(cotangents, outs, strict=True)]
    return [*outs, *torch.autograd.grad(outs, [t for t in leaves if t is not None], cotangents)]


@HALF
@IMPL
@pytest.mark.parametrize("stream", [torch.float32, "half"], ids=str)
def test_layer_norm_under_autocast(randn, half, impl, stream):
    """With fp32 parameters y has autocast's dtype, rounded once. Gradients have the dtypes of the leaves."""
    x, weight, bias, dy = randn(3, 7, 96) + 1, randn(96) + 1, randn(96), randn(3, 7, 96).to(half)
    x = x.to(half if stream == "half" else stream)
    leaves = [x, weight, bias]
    got = _autocast_grads(lambda *a: layer_norm(*a, impl=impl), leaves, [dy], half)
    eager = _autocast_grads(
        lambda *a: torch.nn.functional.layer_norm(a[0], (96,), *a[1:], 1e-6).to(half), leaves, [dy], half
    )
    exact = _autocast_grads(reference.layer_norm, [t.double() for t in leaves], [dy.double()], None)
    assert [t.dtype for t in got] == [half, x.dtype, torch.float32, torch.float32]
    for name, a, b, c in zip(["y", "dx", "dweight", "dbias"], got, eager, exact, strict=True):
        check(a, b, c, name=name)


@HALF
@IMPL
@pytest.mark.parametrize("stream", [torch.float32, "half"], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_layer_norm_under_autocast(randn, half, impl, stream, scaled):
    """With fp32 parameters and a 16-bit branch, the stream keeps its dtype and y has autocast's."""
    x, branch, dstream, dy = (randn(3, 7, 96) for _ in range(4))
    x, branch = x.to(half if stream == "half" else stream), branch.to(half)
    leaves = [x, branch, randn(96) + 1, randn(96), *(randn(2, 96) if scaled else [None, None])]
    cotangents = [dstream.to(x.dtype), dy.to(half)]

    def eager(x, branch, weight, bias, gamma, branch_bias):
        s = x + (branch if gamma is None else (branch + branch_bias) * gamma).to(x.dtype)
        return s, torch.nn.functional.layer_norm(s, (96,), weight, bias, 1e-6).to(half)

    def ours(*args):
        return residual_layer_norm(*args[:4], gamma=args[4], branch_bias=args[5], impl=impl)

    got = _autocast_grads(ours, leaves, cotangents, half)
    theirs = _autocast_grads(eager, leaves, cotangents, half)
    exact = _autocast_grads(
        lambda *a: reference.residual_layer_norm(*a[:4], gamma=a[4], branch_bias=a[5]),
        [None if t is None else t.double() for t in leaves], [t.double() for t in cotangents], None,
    )  # fmt: skip
    dtypes = [x.dtype, half, x.dtype, half, torch.float32, torch.float32]
    assert [t.dtype for t in got] == dtypes + ([torch.float32] * 2 if scaled else [])
    names = ["stream", "y", "dresidual", "dbranch", "dweight", "dbias", "dgamma", "dbranch_bias"]
    for name, a, b, c in zip(names, got, theirs, exact, strict=False):
        check(a, b, c, name=name)


@HALF
def test_autocast_takes_the_branch_in_16_bits(randn, half):
    """An fp32 branch is cast to 16 bits, and its gradient is fp32."""
    leaves, cotangents = [randn(2, 5, 48), randn(2, 5, 48), randn(48), randn(48)], [randn(2, 5, 48), randn(2, 5, 48)]
    got = _autocast_grads(ours_positional, leaves, cotangents, half)
    leaves[1] = leaves[1].to(half)
    for a, b in zip(got, _autocast_grads(ours_positional, leaves, cotangents, None), strict=True):
        assert torch.equal(a, b.to(a.dtype))
    assert got[1].dtype is half and got[3].dtype is torch.float32


@HALF
def test_autocast_compile_fullgraph(randn, half):
    leaves, cotangents = [randn(2, 5, 48), randn(2, 5, 48), randn(48), randn(48)], [randn(2, 5, 48)] * 3

    def fn(*args):
        stream, y = residual_layer_norm(*args, impl="triton")
        return stream, y, layer_norm(stream, *args[2:], impl="triton")

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    direct = _autocast_grads(fn, leaves, cotangents, half)
    assert direct[2].dtype is half
    assert all(map(torch.equal, direct, _autocast_grads(compiled, leaves, cotangents, half)))


@pytest.mark.parametrize("kind", ["constant rows", "large offset", "subnormal", "one spike a row"])
def test_extreme_rows(randn, dtype, kind):
    x = randn(6, 100)
    if kind == "constant rows":
        x = x[:, :1].expand(6, 100).contiguous()
    elif kind == "large offset":
        x = x + 300.0
    elif kind == "subnormal":
        x = x * 1e-40
    else:
        x[range(6), [7, 20, 33, 46, 59, 72]] = 1000.0
    check_op(ours_layer_norm, reference.layer_norm, {"x": x, "weight": randn(100), "bias": randn(100)}, dtype)


def test_variance_of_rows_far_from_zero(randn):
    """rstd is exact also in rows with a mean of 1000 and deviations of 0.001."""
    x = 1000 + 1e-3 * randn(64, 700)
    _, _, _, rstd = layer_norm_fwd(x, *[None] * 7, 1e-12, 0.0, 0, torch.float32, True)
    want = x.double().var(dim=1, correction=0).add(1e-12).rsqrt()
    torch.testing.assert_close(rstd.double().flatten(), want, rtol=1e-4, atol=0)


def test_sums_over_many_rows(randn, monkeypatch):
    """dγ and dβ over 16k rows are compared with fp32 sums. Eager sums in bf16 on a CPU, with 50 times the error."""
    monkeypatch.setattr(configs, "layer_norm", lambda *args: configs.Config(block_m=256, block_n=16))
    inputs = {"x": randn(16_500, 16), "weight": randn(16), "bias": randn(16)}

    def eager_in_fp32(x, weight, bias):
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, weight, bias)]
        return reference.layer_norm(*wide).to(x.dtype)

    check_op(ours_layer_norm, eager_in_fp32, inputs, torch.bfloat16)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "case", ["alone", "residual", "gamma and row scale", "branch bias", "everything", "stream unused", "y unused"]
)
def test_gradcheck(randn, case):
    shapes = [(2, 3, 7), (2, 3, 7), (7,), (7,), (7,), (7,)]
    x, branch, weight, bias, gamma, branch_bias = (randn(*s).double().requires_grad_() for s in shapes)
    row_scale = torch.tensor([0.0, 1.5], dtype=torch.float64)

    def residual(*args):
        return residual_layer_norm(*args, impl="triton")

    def scaled(*args):
        pending = args[5] if len(args) == 6 else None
        return residual_layer_norm(*args[:4], branch_bias=pending, gamma=args[4], row_scale=row_scale, impl="triton")

    def pending(*args):
        return residual_layer_norm(*args[:4], branch_bias=args[4], impl="triton")

    fn, inputs = {
        "alone": (lambda *args: layer_norm(*args, impl="triton"), (x, weight, bias)),
        "residual": (residual, (x, branch, weight, bias)),
        "gamma and row scale": (scaled, (x, branch, weight, bias, gamma)),
        "branch bias": (pending, (x, branch, weight, bias, branch_bias)),
        "everything": (scaled, (x, branch, weight, bias, gamma, branch_bias)),
        "stream unused": (lambda *args: residual(*args)[1], (x, branch, weight, bias)),
        "y unused": (lambda *args: residual(*args)[0], (x, branch, weight, bias)),
    }[case]
    assert torch.autograd.gradcheck(fn, inputs, fast_mode=True)


@pytest.mark.parametrize("with_branch", [False, True])
def test_opcheck(randn, with_branch):
    B, N, D = 2, 3, 20
    x, branch, row_scale = randn(B, N, D).requires_grad_(), randn(B, N, D).requires_grad_(), randn(B).abs()
    weight, bias, gamma, branch_bias = (randn(D).requires_grad_() for _ in range(4))
    extra = (branch, branch_bias, gamma, row_scale) if with_branch else (None,) * 4
    drop = (torch.tensor([7], device=x.device), 1e-6, 0.3, 2) if with_branch else (None, 1e-6, 0.0, 0)
    torch.library.opcheck(layer_norm_fwd, (x, *extra, weight, bias, *drop, torch.float32, True))
    s, mean, rstd = x.detach(), randn(B * N), randn(B * N).abs()
    extra = tuple(None if t is None else t.detach() for t in extra)
    sums = (torch.float32, torch.float64, *(torch.float16 if with_branch else None,) * 2)
    given = (randn(B, N, D), s, s, mean, rstd, weight.detach(), bias.detach(), *extra, drop[0], *drop[2:])
    torch.library.opcheck(layer_norm_bwd, (*given, with_branch, True, *sums))
    torch.library.opcheck(layer_norm_bwd, (*given, False, False, None, None, None, None))


def _grads(x, branch, weight, bias, gamma, branch_bias, cotangents):
    leaves = [t.detach().requires_grad_() for t in (x, branch, weight, bias, gamma, branch_bias)]
    outs = residual_layer_norm(*leaves[:4], gamma=leaves[4], branch_bias=leaves[5], impl="triton")
    return [*outs, *torch.autograd.grad(outs, leaves, cotangents)]


def test_same_bits(randn, dtype):
    """A second run, other strides of inputs and gradients and NaN around the buffers change no bit."""
    B, N, D = 3, 7, 48
    x, branch, dy, ds = (randn(B, N, D).to(dtype) for _ in range(4))
    vectors = tuple(randn(D).to(dtype) for _ in range(4))
    first = _grads(x, branch, *vectors, (ds, dy))

    def transposed(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    wide = randn(4, D, 2).to(dtype)
    wide[..., 0] = torch.stack(vectors)
    variants = {
        "again": (x, branch, *vectors, (ds, dy)),
        "transposed": (transposed(x), transposed(branch), *vectors, (transposed(ds), transposed(dy))),
        "padded": (*map(nan_padded, (x, branch, *vectors)), (nan_padded(ds), nan_padded(dy))),
        "column-major": (x.mT.contiguous().mT, branch, *vectors, (ds.mT.contiguous().mT, dy)),
        "strided parameters": (x, branch, *wide[..., 0], (ds, dy)),
    }
    for name, variant in variants.items():
        for a, b in zip(first, _grads(*variant), strict=True):
            assert torch.equal(a, b), name
    expanded = torch.ones((), dtype=dtype, device=x.device).expand(B, N, D)  # the gradient of .sum().backward()
    dense = _grads(x, branch, *vectors, (expanded.contiguous(), expanded.contiguous()))
    for a, b in zip(dense, _grads(x, branch, *vectors, (expanded, expanded)), strict=True):
        assert torch.equal(a, b)


def test_same_bits_of_layer_norm_alone(randn, dtype):
    """The backward reads the input with its own strides and writes a contiguous gradient."""
    x, dy, weight = randn(3, 7, 48).to(dtype), randn(3, 7, 48).to(dtype), randn(48).to(dtype)

    def results(x):
        x = x.detach().requires_grad_()
        y = layer_norm(x, weight, impl="triton")
        return y, *torch.autograd.grad(y, x, dy)

    first = results(x)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT, nan_padded(x)):
        found = results(strided)
        assert all(t.is_contiguous() for t in found) and all(map(torch.equal, found, first))


NORMED = {  # the optional arguments of each case
    "alone": "weight bias",
    "weight alone": "weight",
    "bias alone": "bias",
    "no parameters": "",
    "residual": "branch weight bias",
    "branch bias": "branch branch_bias weight bias",
    "everything": "branch branch_bias gamma row_scale weight bias seed",
}
STREAMS = [(d, d) for d in (torch.float16, torch.bfloat16, torch.float32)]
STREAMS += [(torch.float32, torch.float16), (torch.float32, torch.bfloat16)]  # under autocast
STREAMS += [pytest.param(torch.float64, torch.float64, marks=pytest.mark.interpreted)]


def _forward(randn, case, shape, stream_dtype, dtype):
    """(s, y, mean, rstd) of the forward op, and the arguments of the backward between weight and need_dbranch."""
    given, (B, *_, D) = NORMED[case].split(), shape
    tensors = {
        "branch": randn(*shape).to(dtype), "branch_bias": randn(D).to(dtype), "gamma": randn(D).to(dtype),
        "row_scale": randn(B).abs(), "weight": randn(D).to(dtype) + 1, "bias": randn(D).to(dtype),
        "seed": torch.tensor([-5], device=randn(1).device),
    }  # fmt: skip
    branch, branch_bias, gamma, row_scale, weight, bias, seed = (
        t if name in given else None for name, t in tensors.items()
    )
    x, factors, drop = 2 * randn(*shape).to(stream_dtype) + 1, (branch, branch_bias, gamma, row_scale), (0.3, 2)
    stream, *rest = layer_norm_fwd(x, *factors, weight, bias, seed, 1e-6, *drop, dtype, True)
    return (x if branch is None else stream, *rest), (weight, bias, *factors, seed, *drop)


@pytest.mark.parametrize("case", NORMED)
@pytest.mark.parametrize(("stream", "out"), STREAMS, ids=str)
@pytest.mark.parametrize("shape", [(3, 17, 100), (2, 5, 1)], ids=str)
def test_backward_gives_y_again(randn, case, stream, out, shape):
    """With need_y the backward recomputes y from the stored stream, with the same bits and dtype."""
    (s, y, mean, rstd), given = _forward(randn, case, shape, stream, out)
    assert s.dtype is stream and y.dtype is out
    dy, ds_out = randn(*shape).to(out), randn(*shape).to(stream)
    sums = [out if name in NORMED[case].split() else None for name in ("weight", "bias", "gamma", "branch_bias")]
    _, _, again, *_ = layer_norm_bwd(dy, ds_out, s, mean, rstd, *given, False, True, *sums)
    assert again.dtype is out and torch.equal(again, y)


@pytest.mark.parametrize("case", ["residual", "everything"])
def test_column_sums_on_request(randn, dtype, case):
    """The sums of the branch's gradient, which do not need a branch_bias, are those of exact gradients."""
    shape = (3, 17, 100)
    (s, _, mean, rstd), given = _forward(randn, case, shape, dtype, dtype)
    weight, _, _, _, gamma, row_scale, seed, p, offset = given
    dy, ds_out = randn(*shape).to(dtype), randn(*shape).to(dtype)
    found = layer_norm_bwd(dy, ds_out, s, mean, rstd, *given, False, False, None, None, None, torch.float32)
    assert found[6].dtype is torch.float32 and [t.numel() for t in found[1:6]] == [0] * 5
    exact = s.double().requires_grad_()
    y = torch.nn.functional.layer_norm(exact, shape[-1:], weight.double(), None, 1e-6)
    (want,) = torch.autograd.grad(y, exact, dy.double())
    want = want + ds_out.double()
    if case == "everything":
        want = want * gamma.double() * row_scale.double()[:, None, None]
        want = want * reference.dropout_scale(seed, offset, want.shape, p)
    torch.testing.assert_close(found[6].double(), want.sum(dim=(0, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_m", [1, 2, 4, 16])
def test_every_tile_is_right(randn, monkeypatch, block_m):
    monkeypatch.setattr(configs, "layer_norm", lambda *args: configs.Config(block_m=block_m, block_n=128))
    shape = (5, 5, 100)
    inputs = {"residual": randn(*shape), "branch": randn(*shape), "weight": randn(100), "bias": randn(100)}
    check_op(ours_residual, reference.residual_layer_norm, inputs, torch.float16)


def test_empty_batch(randn):
    x = randn(0, 5, 16).requires_grad_()
    weight, bias = randn(16).requires_grad_(), randn(16).requires_grad_()
    stream, y = residual_layer_norm(x, x, weight, bias, impl="triton")
    grads = torch.autograd.grad(stream.sum() + y.sum(), [x, weight, bias])
    assert y.shape == x.shape
    assert grads[0].shape == x.shape
    assert not grads[1].any() and not grads[2].any()


def test_frozen_parameters_and_no_grad(randn):
    x, weight, bias = randn(4, 16), randn(16), randn(16).requires_grad_()
    layer_norm(x, weight, bias, impl="triton").sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 4.0))
    assert weight.grad is None and x.grad is None
    assert not layer_norm(x, weight, impl="triton").requires_grad
    with torch.inference_mode():
        inferred = layer_norm(x, weight, bias, impl="triton")
    assert torch.equal(inferred, layer_norm(x, weight, bias, impl="triton"))


def test_compile_fullgraph(randn):
    args = [randn(2, 5, 48), randn(2, 5, 48), randn(48), randn(48)]
    leaves = [t.requires_grad_() for t in args]

    def fn(*a):
        return residual_layer_norm(*a, impl="triton")

    direct, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    for a, b in zip(direct, compiled, strict=True):
        assert torch.equal(a, b)
    cotangents = [randn(2, 5, 48), randn(2, 5, 48)]
    for a, b in zip(
        torch.autograd.grad(direct, leaves, cotangents), torch.autograd.grad(compiled, leaves, cotangents), strict=True
    ):
        assert torch.equal(a, b)


def test_forward_mode_raises_and_auto_is_right(randn):
    x, tangent = randn(4, 16), randn(4, 16)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda t: layer_norm(t, impl="triton"), (x,), (tangent,))
    _, ours = torch.func.jvp(layer_norm, (x,), (tangent,))
    _, torchs = torch.func.jvp(lambda t: torch.nn.functional.layer_norm(t, (16,), eps=1e-6), (x,), (tangent,))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(15)}, ValueError, r"weight must have shape \(16,\), got \(15,\)"),
        ({"eps": -1e-6}, ValueError, "eps must not be negative"),
        ({"x": torch.ones(4, 16, dtype=torch.int32)}, TypeError, "x must be a floating-point tensor, got torch.int32"),
        ({"weight": torch.ones(16, dtype=torch.float16)}, TypeError, "weight is torch.float16 but x is torch.float32"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"x": torch.tensor(1.0)}, ValueError, "last dimension"),
    ],
)
def test_bad_input(change, error, message):
    args = {"x": torch.ones(4, 16), "weight": torch.ones(16), "bias": torch.zeros(16)} | change
    with pytest.raises(error, match=message):
        layer_norm(**args)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"branch": torch.ones(2, 4, 8)}, ValueError, "branch must have the shape of residual"),
        ({"gamma": torch.ones(4)}, ValueError, "gamma must have shape"),
        ({"branch_bias": torch.ones(2, 16)}, ValueError, r"branch_bias must have shape \(16,\), got \(2, 16\)"),
        ({"row_scale": torch.ones(4)}, ValueError, r"row_scale must have shape \(2,\)"),
        ({"row_scale": torch.ones(2, requires_grad=True)}, ValueError, "carries no gradient"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
        ({"branch": torch.ones(2, 4, 16, dtype=torch.float64)}, TypeError, "branch is torch.float64"),
    ],
)
def test_bad_residual_input(change, error, message):
    args = {"residual": torch.ones(2, 4, 16), "branch": torch.ones(2, 4, 16), "weight": torch.ones(16)} | change
    with pytest.raises(error, match=message):
        residual_layer_norm(**args)


IMPLS = pytest.mark.parametrize("impl", ["triton", "reference", "auto"])


@IMPLS
@pytest.mark.parametrize("shape", [(24,), (5, 24), (3, 5, 24), (3, 2, 5, 24), (2, 3, 1, 2, 24)], ids=str)
def test_any_number_of_dimensions(randn, impl, shape):
    """row_scale has one factor for each sample, with any number of dimensions between samples and channels."""
    x, branch, weight, bias, gamma = randn(*shape), randn(*shape), randn(24), randn(24), randn(24)
    y = layer_norm(x, weight, bias, impl=impl)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (24,), weight, bias, 1e-6), rtol=1e-5, atol=1e-5)
    leaves = [t.requires_grad_() for t in (x, branch, weight, bias, gamma)]
    row_scale = None if len(shape) == 1 else torch.arange(shape[0], device=x.device) + 0.5
    factors = 1.0 if row_scale is None else row_scale.reshape(-1, *[1] * (len(shape) - 1))
    stream = x + branch * gamma * factors
    want = stream, torch.nn.functional.layer_norm(stream, (24,), weight, bias, 1e-6)
    found = residual_layer_norm(*leaves[:4], gamma=gamma, row_scale=row_scale, impl=impl)
    into = randn(*shape), randn(*shape)
    for a, b in zip(
        [*found, *torch.autograd.grad(found, leaves, into)],
        [*want, *torch.autograd.grad(want, leaves, into)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@IMPLS
@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2, 3])
def test_eps_is_added_to_the_variance(randn, impl, eps):
    """Here eps is not small compared with the variance. It may be 0, but not negative."""
    x, zero = 0.1 * randn(6, 24), torch.zeros(6, 24, device=randn(1).device)
    centred = x.double() - x.double().mean(dim=1, keepdim=True)
    want = centred / (centred.square().mean(dim=1, keepdim=True) + eps).sqrt()
    torch.testing.assert_close(layer_norm(x, None, None, eps, impl=impl).double(), want, rtol=1e-4, atol=1e-5)
    _, y = residual_layer_norm(x, zero, None, None, eps, impl=impl)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
    for op, args in ((layer_norm, (x,)), (residual_layer_norm, (x, x))):
        with pytest.raises(ValueError, match=f"^{op.__name__}: eps must not be negative, got -1e-12"):
            op(*args, eps=-1e-12, impl=impl)


@pytest.mark.parametrize("op", [layer_norm, residual_layer_norm], ids=lambda op: op.__name__)
def test_widest_row(op, device):
    """A row may have 65,536 elements. For a longer row `auto` takes PyTorch."""
    x = torch.ones(1, 65_537, device=device)
    inputs = (x,) if op is layer_norm else (x, x)
    with pytest.raises(RuntimeError, match=f"^{op.__name__}: impl='triton' cannot run: rows of 65537 elements exceed"):
        op(*inputs, impl="triton")
    found = op(*inputs)
    assert not (found if op is layer_norm else found.y).any()
    ramp = torch.linspace(-1, 1, 65_536, device=device)[None]
    inputs = (ramp,) if op is layer_norm else (ramp, 0 * ramp)
    found = op(*inputs, impl="triton")
    want = torch.nn.functional.layer_norm(ramp, (65_536,), eps=1e-6)
    torch.testing.assert_close(found if op is layer_norm else found.y, want, rtol=1e-4, atol=1e-4)


def saved_by(fn):
    """The shapes of what fn saved for the backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        fn()
    return sorted(shapes)


def test_what_is_saved(randn):
    """The op saves the stream, two numbers per row and the factors. It saves the branch only if gamma requires grad."""
    x, branch, weight, bias, gamma = (t.requires_grad_() for t in (randn(9, 16), randn(9, 16), *randn(3, 16)))
    scale = torch.ones(9, device=x.device)
    stats, rows, row = [(9,), (9,)], (9, 16), (16,)
    assert saved_by(lambda: layer_norm(x, weight, bias, impl="triton")) == sorted([rows, *stats, row])
    assert saved_by(lambda: layer_norm(x, impl="triton")) == sorted([rows, *stats])
    plain = saved_by(lambda: residual_layer_norm(x, branch, weight, bias, impl="triton"))
    assert plain == sorted([rows, *stats, row])
    learns = saved_by(lambda: residual_layer_norm(x, branch, weight, bias, gamma=gamma, row_scale=scale, impl="triton"))
    assert learns == sorted([rows, rows, *stats, row, row, (9,)])
    frozen = saved_by(lambda: residual_layer_norm(x, branch, weight, bias, gamma=gamma.detach(), impl="triton"))
    assert frozen == sorted([rows, *stats, row, row])
    pending = saved_by(lambda: residual_layer_norm(x, branch, weight, bias, branch_bias=gamma, impl="triton"))
    assert pending == sorted([rows, *stats, row])
    both = saved_by(lambda: residual_layer_norm(x, branch, weight, branch_bias=bias, gamma=gamma, impl="triton"))
    assert both == sorted([rows, rows, *stats, row, row, row])


KINDS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("branch", KINDS, ids=str)
@pytest.mark.parametrize("other", KINDS, ids=str)
@pytest.mark.parametrize(
    "names", [("residual",), ("weight", "bias"), ("gamma",), ("branch_bias",), ("weight",), ("bias",)], ids="+".join
)
def test_dtypes_that_go_together(names, branch, other):
    """Arguments have the dtype of the branch, or fp32 if that has 16 bits. weight and bias share theirs."""
    shapes = {"residual": (2, 3, 8), "branch": (2, 3, 8)} | dict.fromkeys(("weight", "bias", "gamma"), (8,))
    shapes |= {"branch_bias": (8,)}
    args = {n: torch.ones(shape, dtype=other if n in names else branch) for n, shape in shapes.items()}
    wide = other is torch.float32 and branch in HALVES and names not in (("weight",), ("bias",))
    if other is branch or wide:
        stream, y = residual_layer_norm(**args)
        assert stream.dtype is args["residual"].dtype and y.dtype is branch
    else:
        with pytest.raises(
            TypeError, match=r"^residual_layer_norm: \w+ is torch\.\w+ but \w+ is torch\.\w+; "
        ) as raised:
            residual_layer_norm(**args)
        assert any(f"{name} is {other}" in str(raised.value) for name in names)


@pytest.mark.parametrize("crowded", [False, True])
def test_shipped_tiles_hold_a_whole_row(crowded):
    """A program has 4,096 elements, or half as many if crowded, but at least one row of 16, and 4 to 16 warps."""
    budget = 2048 if crowded else 4096
    for arch in (80, 90, 100):
        for width in (1, 2, 3, 31, 32, 33, 192, 384, 512, 768, 1024, 1025, 2048, 2049, 4096, 8192, 8193, 65_536):
            whole = next(2**i for i in range(4, 17) if 2**i >= width)
            for backward, columns in ((False, 512), (True, 256)):  # per warp
                config = configs.layer_norm(arch, width, backward, crowded)
                assert config.block_n == whole and config.block_m == max(1, budget // whole), width
                assert config.num_warps == min(16, max(4, whole // columns))
            flat = configs.elementwise(arch, width)
            assert flat.block_n == min(whole, 1024) and flat.block_m == 2048 // flat.block_n
    assert configs.layer_norm(90, 768) == configs.layer_norm(90, 768, False, False)


def test_which_backward_has_the_smaller_tile(randn, monkeypatch):
    """Dropout and fp32 gradients need it. So does a branch that is read with an fp32 stream or while y is written."""
    asked, plain = [], configs.layer_norm
    monkeypatch.setattr(configs, "layer_norm", lambda *args: asked.append(args[1:]) or plain(*args))
    x, seed = randn(4, 24).half(), torch.tensor([3], device=randn(1).device)
    wide, gamma, drop = x.float(), x[0], {"dropout_p": 0.5, "seed": seed}
    for residual, branch, options, crowded in (
        (x, x, {}, False), (x, x, {"gamma": gamma}, False), (x, x, drop, True), (wide, x, {}, False),
        (wide, x, {"gamma": gamma}, True), (wide, wide, {}, True),
    ):  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in (residual, branch)]
        options = {n: t.detach().requires_grad_() if n == "gamma" else t for n, t in options.items()}
        residual_layer_norm(*leaves, **options, impl="triton").y.sum().backward()
        assert asked == [(24,), (24, True, crowded)]
        asked.clear()
    for need_y, dgamma in ((True, None), (False, torch.float16), (True, torch.float16)):
        rows, rest = (x, x, x, *wide.mT.contiguous()[:2]), (None, None, x, None, gamma, None, None, 0.0, 0)
        layer_norm_bwd(*rows, *rest, False, need_y, None, None, dgamma, None)
    assert asked == [(24, True, False), (24, True, False), (24, True, True)]
