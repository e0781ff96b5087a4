"""linear and its GEMM: accuracy, gradients, layouts, edge cases, and which implementation runs."""

import functools
import importlib
import warnings

import pytest
import torch
from views import nan_padded

from vit.kernels import configs, linear, reference, runtime
from vit.kernels.dry_run import dry_run
from vit.kernels.linear import gemm, linear_bwd, linear_fwd
from vit.testing import check_op

linear_module = importlib.import_module("vit.kernels.linear")  # vit.kernels.linear is the function

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu"]
# Tiny, ragged, and several tiles in every direction. K = 100 and N = 10 do not fit a descriptor in 16 bits.
SHAPES = [((16,), 10), ((1, 48), 40), ((5, 24), 136), ((65, 100), 136), ((2, 3, 11, 72), 40), ((4, 1), 1)]


def ours(activation=None):
    return lambda **a: linear(**a, activation=activation, impl="triton")


def ref(activation=None):
    return lambda **a: reference.linear(**a, activation=activation)


def layer(randn, shape, N):
    K = shape[-1]
    return {"x": randn(*shape), "weight": randn(N, K) * K**-0.5, "bias": randn(N)}


# Eager PyTorch rounds every step of quick_gelu, so for a few dozen activations its error varies by chance.
@pytest.mark.parametrize(
    ("shape", "N", "activation"),
    [(*s, a) for s in SHAPES for a in ACTIVATIONS if a != "quick_gelu" or len(s[0]) == 4 or s[0][0] == 65],
)
def test_linear(randn, dtype, shape, N, activation):
    check_op(ours(activation), ref(activation), layer(randn, shape, N), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_without_bias(randn, dtype, activation):
    check_op(ours(activation), ref(activation), layer(randn, (33, 40), 72) | {"bias": None}, dtype)


def test_sums_over_many_rows(randn, monkeypatch):
    """dW and db over 16k rows: sums in bf16 would have a far larger error than eager."""
    big = configs.Config(block_m=512, block_n=32, block_k=512, group_m=8)
    for name in ("gemm", "elementwise"):
        monkeypatch.setattr(configs, name, lambda *_: big)
    check_op(ours("gelu"), ref("gelu"), layer(randn, (16_500, 16), 10), torch.bfloat16)


def shipped_tiles():
    kinds = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee")]
    found = {configs.gemm(arch, *kind) for arch in (80, 86, 89, 90, 100, 120) for kind in kinds}
    return sorted(found, key=str)


@pytest.mark.parametrize("config", shipped_tiles(), ids=lambda c: f"{c.block_m}x{c.block_n}x{c.block_k}")
def test_every_tile_is_right(randn, monkeypatch, config):
    monkeypatch.setattr(configs, "gemm", lambda *_: config)
    check_op(ours("gelu"), ref("gelu"), layer(randn, (139, 72), 200), torch.float16)


@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("cheap", [False, True])
def test_every_form_of_the_epilogue_is_right(randn, monkeypatch, split, cheap):
    """Tiles extend beyond every edge. Of some, whole pieces are beyond the last column."""
    config = configs.Config(32, 128, 32, 2, split=split, cheap=cheap, warp_specialize=split == 4)
    monkeypatch.setattr(configs, "gemm", lambda *_: config)
    check_op(ours("gelu"), ref("gelu"), layer(randn, (37, 72), 168), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_of_the_gemm_agree(randn, monkeypatch, dtype):
    """Other pieces and warps change no bit. The cheap GELU is within its error, also for fp32."""
    a, b, bias, pre = (randn(*s).to(dtype) for s in [(37, 72), (168, 72), (168,), (37, 168)])
    products = [
        lambda: gemm(a, b, bias, trans_b=True),
        lambda: gemm(a, b, bias, "gelu", trans_b=True, aux=True),
        lambda: gemm(a, b, None, "gelu", pre, trans_b=True, aux=True, sums=True),
    ]

    def results(**form):
        config = configs.Config(32, 128, 32, 2, **form)
        monkeypatch.setattr(configs, "gemm", lambda *_: config)
        return [t for product in products for t in product()]

    default, erf, cheap = results(), results(cheap=False), results(cheap=True)
    for form in ({"split": 1}, {"split": 4}, {"warp_specialize": True}):
        assert all(map(torch.equal, results(**form), default)), form
    # The default depends on the dtype of the result.
    same, other = (erf, cheap) if dtype is torch.float32 else (cheap, erf)
    assert all(map(torch.equal, same, default)) and not all(map(torch.equal, other, default))
    share = 4e-3 if dtype is torch.bfloat16 else 5e-7  # of the largest value, for a sum of the columns, too
    for x, y in zip(erf, cheap, strict=True):
        assert not x.numel() or (x - y).abs().max() <= share * x.abs().max()


FP64 = pytest.param(torch.float64, marks=pytest.mark.interpreted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, FP64], ids=str)
@pytest.mark.parametrize(("M", "K", "N"), [(1, 16, 10), (32, 24, 64), (33, 72, 168), (139, 40, 200)])
def test_sums_of_the_columns(randn, dtype, M, K, N):
    """The epilogue sums the unrounded product with gelu' and rounds the sums once, also with dropout."""
    a, b, pre = (randn(*s).to(dtype) for s in [(M, K), (K, N), (M, N)])
    seed = torch.tensor([3], device=a.device)
    for drop in ({}, {"seed": seed, "dropout_p": 0.5, "offset": 2}):
        out, aux, sums = gemm(a, b, None, "gelu", pre, aux=True, sums=True, **drop)
        plain = gemm(a, b, None, "gelu", pre, aux=True, **drop)
        assert torch.equal(out, plain[0]) and torch.equal(aux, plain[1]) and plain[2].numel() == 0
        leaf = pre.double().requires_grad_()
        (slope,) = torch.autograd.grad(reference.gelu(leaf, "gelu").sum(), leaf)
        exact = (a.double() @ b.double()) * slope
        if drop:
            exact *= reference.dropout_scale(seed, 2, exact.shape, 0.5)
        exact, size = exact.sum(dim=0), exact.abs().sum(dim=0)
        wide = torch.promote_types(dtype, torch.float32)
        limit = 0.51 * torch.finfo(dtype).eps * exact.abs() + 8 * torch.finfo(wide).eps * size
        assert sums.dtype is dtype and ((sums.double() - exact).abs() <= limit).all()


def test_sums_over_no_rows(randn):
    for M, K, N in [(0, 16, 8), (3, 0, 8), (3, 16, 0)]:
        _, _, sums = gemm(randn(M, K), randn(K, N), None, "gelu", randn(M, N), sums=True)
        assert torch.equal(sums, torch.zeros_like(sums)) and sums.shape == (N,)


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize(
    "dtype_precision", [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
)
def test_tiles_fit_the_tensor_cores(arch, dtype_precision):
    config = configs.gemm(arch, *dtype_precision)
    assert config.block_m >= 64 and config.block_m % 64 == 0  # for wgmma
    assert config.block_k * dtype_precision[0].itemsize <= 128  # one swizzled row of a descriptor's block
    assert config.group_m > 0


@pytest.mark.interpreted
def test_descriptors_made_in_the_kernel(randn, monkeypatch):
    """Before compute capability 9.0 the kernel makes descriptors from pointers. The bits are the same."""
    x, weight, dy = randn(37, 72).half(), randn(40, 72).half(), randn(37, 40).half()
    products = [
        lambda: gemm(x, weight, trans_b=True),
        lambda: gemm(dy, weight),
        lambda: gemm(dy, x, trans_a=True),
        lambda: gemm(x.t(), weight, trans_a=True, trans_b=True),
    ]
    host = [product()[0] for product in products]
    monkeypatch.setattr(configs, "has_tma", lambda arch: False)
    for a, product in zip(host, products, strict=True):
        assert torch.equal(a, product()[0])


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(randn, activation):
    x, weight, bias = (randn(*s).double().requires_grad_() for s in [(1, 3, 4), (2, 4), (2,)])
    assert torch.autograd.gradcheck(lambda *a: linear(*a, activation, impl="triton"), (x, weight, bias))


@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_opcheck(randn, activation, impl):
    x, weight, bias = (randn(*s).requires_grad_() for s in [(2, 3, 20), (12, 20), (12,)])
    torch.library.opcheck(linear_fwd, (x, weight, bias, activation, True, impl))
    torch.library.opcheck(linear_fwd, (x, weight, None, activation, False, impl), test_utils="test_faketensor")
    x, weight, dy = x.detach(), weight.detach(), randn(2, 3, 12)
    pre = None if activation is None else randn(2, 3, 12)
    torch.library.opcheck(linear_bwd, (dy, x, weight, pre, activation, True, impl))
    torch.library.opcheck(linear_bwd, (dy, None, None, pre, activation, False, impl))


def padded_rows(t):
    """t as a view that fits a descriptor, with NaN between its rows."""
    buffer = torch.full((*t.shape[:-1], t.shape[-1] + 32), float("nan"), dtype=t.dtype, device=t.device)
    view = buffer[..., 16 : 16 + t.shape[-1]]
    view.copy_(t)
    return view


def grads(x, weight, bias, dy, activation):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = linear(*leaves, activation, impl="triton")
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(("K", "N"), [(48, 72), (50, 10)])
def test_same_bits(randn, dtype, activation, K, N):
    """A second run, other strides and NaN around the buffers change no bit. No input is written."""
    x, weight, bias, dy = (randn(*s).to(dtype) for s in [(3, 13, K), (N, K), (N,), (3, 13, N)])
    before = [t.clone() for t in (x, weight, bias, dy)]
    first = grads(x, weight, bias, dy, activation)

    def transposed(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    def column_major(t):
        return t.mT.contiguous().mT

    variants = {
        "again": (x, weight, bias, dy),
        "batch and tokens swapped": (transposed(x), weight, bias, transposed(dy)),
        "column-major": (column_major(x), column_major(weight), bias, column_major(dy)),
        "offset, NaN around": tuple(nan_padded(t) for t in (x, weight, bias, dy)),
        "NaN between rows": tuple(padded_rows(t) for t in (x, weight, bias, dy)),
    }
    for name, variant in variants.items():
        for a, b in zip(first, grads(*variant, activation), strict=True):
            assert torch.equal(a, b), name
    for a, b in zip(before, (x, weight, bias, dy), strict=True):
        assert torch.equal(a, b)
    expanded = torch.ones((), dtype=dtype, device=x.device).expand(dy.shape)  # the gradient of .sum().backward()
    dense = grads(x, weight, bias, expanded.contiguous(), activation)
    for a, b in zip(dense, grads(x, weight, bias, expanded, activation), strict=True):
        assert torch.equal(a, b)


def test_operands_are_copied_only_where_a_descriptor_cannot_describe_them(randn):
    legal = randn(6, 48).half()
    assert linear_module._operand(legal) is legal
    assert linear_module._operand(legal[1:, :16]).data_ptr() == legal[1:].data_ptr()
    for other in (legal[:, 1:9], legal.t(), randn(6, 10).half(), legal[:1].expand(4, 48), legal[:, ::2]):
        copy = linear_module._operand(other)
        assert copy.data_ptr() != other.data_ptr() and torch.equal(copy, other)
        assert copy.data_ptr() % 16 == 0 and copy.stride(0) % 8 == 0 and copy.stride(1) == 1


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_empty(randn, activation):
    for M, K, N in [(0, 16, 8), (3, 0, 8), (3, 16, 0)]:
        x, weight, bias = (randn(*s).requires_grad_() for s in [(1, M, K), (N, K), (N,)])
        y = linear(x, weight, bias, activation, impl="triton")
        expected = reference.linear(x, weight, bias, activation)
        torch.testing.assert_close(y, expected)
        dy = randn(*y.shape)
        actual = torch.autograd.grad(y, [x, weight, bias], dy)
        for a, b in zip(actual, torch.autograd.grad(expected, [x, weight, bias], dy), strict=True):
            torch.testing.assert_close(a, b)


def saved_by(fn):
    """The output of fn, and the shapes of what it saved for the backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        return fn(), sorted(shapes)


def test_frozen_parameters(randn, monkeypatch):
    """The op saves and multiplies nothing for a gradient that is not needed."""
    x, weight, bias = randn(9, 16), randn(24, 16), randn(24)
    products = []

    def spy(*args, **kwargs):
        products.append("dw" if kwargs.get("trans_a") else "y" if kwargs.get("trans_b") else "dx")
        return gemm(*args, **kwargs)

    monkeypatch.setattr(linear_module, "gemm", spy)
    cases = [
        ({"x"}, [(24, 16)], ["y", "dx"]), ({"weight"}, [(9, 16)], ["y", "dw"]), ({"bias"}, [], ["y"]),
        ({"x", "weight", "bias"}, [(9, 16), (24, 16)], ["y", "dx", "dw"]),
    ]  # fmt: skip
    for wanted, saved, expected in cases:
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in {"x": x, "weight": weight, "bias": bias}.items()}
        products.clear()
        y, shapes = saved_by(lambda a=leaves: linear(**a, impl="triton"))
        y.sum().backward()
        assert shapes == saved and products == expected
        assert {n for n, t in leaves.items() if t.grad is not None} == wanted
    _, shapes = saved_by(lambda: linear(x, weight.clone().requires_grad_(), bias, "gelu", impl="triton"))
    assert shapes == [(9, 16), (9, 24)]  # x and the pre-activation
    written = []
    monkeypatch.setattr(linear_module, "linear_fwd", lambda *a: written.append(a[4]) or linear_fwd(*a))
    assert not linear(x, weight, bias, "gelu", impl="triton").requires_grad
    assert written == [False] and linear_fwd(x, weight, bias, "gelu", False, "triton")[1].numel() == 0
    with torch.inference_mode():
        inferred = linear(x, weight, bias, "gelu", impl="triton")
    assert torch.equal(inferred, linear(x, weight.clone().requires_grad_(), bias, "gelu", impl="triton"))


def test_provider():
    """``impl="triton"`` runs our kernel for every product."""
    assert [configs.gemm_provider(impl) for impl in ("auto", "fused", "triton")] == ["cublas", "cublas", "triton"]


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_explicit_triton_never_calls_another_gemm(randn, monkeypatch, activation):
    def forbidden(*args, **kwargs):
        raise AssertionError("impl='triton' called PyTorch's product")

    for owner, name in [(torch, "mm"), (torch, "addmm"), (torch, "matmul"), (torch.nn.functional, "linear")]:
        monkeypatch.setattr(owner, name, forbidden)
    for name in ("mm", "addmm", "matmul", "__matmul__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    leaves = [randn(*s).requires_grad_() for s in [(5, 24), (40, 24), (40,)]]
    linear(*leaves, activation, impl="triton").sum().backward()
    assert all(t.grad is not None for t in leaves)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_auto_takes_plain_products_from_cublas(randn, monkeypatch, dtype, activation):
    fused = []
    monkeypatch.setattr(linear_module, "gemm", lambda *a, **k: fused.append(a[3]) or gemm(*a, **k))
    check_op(
        lambda x, weight, bias: linear_fwd(x, weight, bias, activation, True, "auto")[0],
        ref(activation),
        layer(randn, (17, 40), 24),
        dtype,
    )
    assert fused == ([] if activation is None else [activation])


def test_choice_is_recorded(randn, device):
    """Without activation auto takes cuBLAS through PyTorch. On a CPU it takes PyTorch's operators."""
    args = randn(4, 16), randn(8, 16)

    def paths():
        with runtime.record_choices() as choices:
            for impl in ("auto", "fused", "triton"):
                outs = [linear(*args, None, activation, impl=impl) for activation in (None, "gelu")]
                torch.testing.assert_close(outs, [reference.linear(*args, None, a) for a in (None, "gelu")])
        return [choice.path for choice in choices]

    where = ["cublas", "triton"] if device.type == "cuda" else ["pytorch", "pytorch"]
    assert paths() == [*where, "cublas", "triton", "triton", "triton"]


def test_recorders_nest(randn):
    args = randn(4, 16), randn(8, 16)
    with runtime.record_choices() as outer:
        linear(*args)
        with pytest.raises(KeyError), runtime.record_choices() as inner:
            linear(*args)
            linear(*args)
            raise KeyError
        linear(*args)
    linear(*args)
    assert (len(outer), len(inner)) == (2, 2)


def test_choice_on_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    x, weight = torch.ones(4, 16), torch.ones(8, 16)
    with dry_run(90, lambda *_: None), runtime.record_choices() as choices:
        for impl in ("auto", "fused"):
            linear(x, weight, impl=impl)
    assert [(c.path, c.reason) for c in choices] == [
        ("cublas", f"{impl}: cuBLAS runs plain products") for impl in ("auto", "fused")
    ]


@pytest.fixture
def default_precision():
    yield
    torch.set_float32_matmul_precision("highest")
    for owner in (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn.matmul):
        owner.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = False  # as conftest.py sets it


def _set(path, value):
    *owners, name = path.split(".")
    setattr(functools.reduce(getattr, owners, torch.backends), name, value)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ([], "ieee"),
        ([("cuda.matmul.allow_tf32", True)], "tf32"),
        ([("cuda.matmul.allow_tf32", True), ("cuda.matmul.allow_tf32", False)], "ieee"),
        ([("cuda.matmul.fp32_precision", "tf32")], "tf32"),
        ([("fp32_precision", "tf32")], "tf32"),  # inherited
        ([("fp32_precision", "bf16")], "ieee"),  # not supported by CUDA
        ([("cudnn.fp32_precision", "tf32")], "tf32"),  # PyTorch applies it to all of CUDA, also cuBLAS
        ([("cudnn.conv.fp32_precision", "tf32")], "ieee"),
        ([("fp32_precision", "tf32"), ("cuda.matmul.fp32_precision", "ieee")], "ieee"),
        ([("cuda.matmul.allow_tf32", True), ("cuda.matmul.fp32_precision", "ieee")], "ieee"),  # allow_tf32 now raises
        ([("cuda.matmul.fp32_precision", "tf32"), ("cuda.matmul.allow_tf32", False)], "ieee"),
        ([("fp32_precision", "tf32"), ("cuda.matmul.allow_tf32", False)], "ieee"),
        (["high"], "tf32"),
        (["medium"], "tf32"),
        ([("fp32_precision", "tf32"), "highest"], "ieee"),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True], ids=["called", "compiled"])
def test_fp32_precision_follows_pytorch(randn, monkeypatch, default_precision, compiled, settings, want):
    """New settings, old ones and both give the precision that `at::Context::float32Precision` gives cuBLAS."""
    seen = []
    monkeypatch.setattr(runtime, "launch", lambda *_, **k: seen.append(k["PRECISION"]))
    op = functools.partial(linear, impl="triton")
    op = torch.compile(op, fullgraph=True, backend="aot_eager") if compiled else op
    with warnings.catch_warnings(action="ignore"):  # the old ones are deprecated
        for setting in settings:
            _set(*setting) if isinstance(setting, tuple) else torch.set_float32_matmul_precision(setting)
        op(randn(4, 16), randn(8, 16))
        op(randn(4, 16).half(), randn(8, 16).half())
    assert seen == [want, "ieee"]


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_compile_fullgraph(randn, activation):
    leaves = [randn(*s).requires_grad_() for s in [(2, 5, 24), (40, 24), (40,)]]

    def fn(*a):
        return linear(*a, activation, impl="triton")

    y, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    dy = randn(2, 5, 40)
    assert torch.equal(y, compiled)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(compiled, leaves, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(randn, device, impl, half):
    """fp32 arguments give the same bits as cast ones, and fp32 leaves get fp32 gradients."""
    leaves = [t.requires_grad_() for t in (randn(*s) for s in [(2, 5, 24), (40, 24), (40,)])]
    cast = [t.detach().to(half).requires_grad_() for t in leaves]
    with torch.autocast(device.type, half):
        y = linear(*leaves, "gelu", impl=impl)
        assert torch.equal(y, linear(*cast, "gelu", impl=impl))  # arguments may already be cast
    expected = linear(*cast, "gelu", impl=impl)
    assert y.dtype is half and torch.equal(y, expected)
    dy = randn(*y.shape).to(half)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, cast, dy), strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b.float())


def test_autocast_compiles(randn, device):
    leaves = [t.requires_grad_() for t in (randn(*s) for s in [(2, 5, 24), (40, 24), (40,)])]

    def fn(*a):
        with torch.autocast(device.type, torch.bfloat16):
            return linear(*a, "gelu", impl="triton")

    y, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    assert y.dtype is torch.bfloat16 and torch.equal(y, compiled)
    dy = torch.ones_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(compiled, leaves, dy), strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b)


def test_bad_arguments(randn):
    x, weight, bias = randn(2, 16), randn(8, 16), randn(8)
    cases = [
        (ValueError, r"linear: weight must have shape \[N, 16\] .*got \(8, 15\)", (x, randn(8, 15))),
        (ValueError, r"linear: weight must have shape \[N, 16\] .*got \(16,\)", (x, randn(16))),
        (ValueError, r"linear: weight must have shape .*got \(2, 8, 16\)", (x, randn(2, 8, 16))),
        (ValueError, r"linear: bias must have shape \(8,\), got \(16,\)", (x, weight, randn(16))),
        (ValueError, r"linear: bias must have shape \(8,\), got \(1, 8\)", (x, weight, randn(1, 8))),
        (ValueError, r"linear: x must have shape .*scalar", (randn(), weight)),
        (
            ValueError,
            "linear: activation must be one of 'gelu', 'gelu_tanh', 'quick_gelu', got 'relu'",
            (x, weight, bias, "relu"),
        ),
        (TypeError, "linear: weight is torch.float16 but x is torch.float32", (x, weight.half(), bias)),
        (TypeError, "linear: bias is torch.float64 but x is torch.float32", (x, weight, bias.double())),
        (TypeError, "linear: x must be a floating-point tensor", (x.long(), weight)),
        (TypeError, "linear: x must be a torch.Tensor, got list", ([1.0], weight)),
    ]
    for impl in ("auto", "triton", "reference"):
        for error, message, args in cases:
            with pytest.raises(error, match=message):
                linear(*args, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        linear(x, weight, impl="cublas")
    too_long = torch.zeros(1, dtype=torch.float16, device=x.device).expand(2**31, 1)
    with pytest.raises(ValueError, match="32-bit"):
        linear(too_long, weight[:, :1].half(), impl="triton")


@pytest.mark.parametrize("impl", ["auto", "fused", "triton", "reference"])
def test_only_none_is_no_activation(randn, impl):
    for activation in ("", "none", "GELU", 0, False):
        with pytest.raises(ValueError, match=f"^linear: activation must be one of .*, got {activation!r}$"):
            linear(randn(2, 8), randn(4, 8), None, activation, impl=impl)


@pytest.mark.parametrize("side", ["rows", "columns", "summed"])
def test_a_side_beyond_32_bits_is_refused(side):
    """Each of the three sides is checked before anything is read or allocated."""
    rows, columns, summed = (2**31 if side == name else 1 for name in ("rows", "columns", "summed"))
    x, weight = torch.empty(rows, summed, device="meta"), torch.empty(columns, summed, device="meta")
    with pytest.raises(
        ValueError, match=rf"a product of \[{rows}, {summed}\] and \[{summed}, {columns}\] has a side too"
    ):
        gemm(x, weight, trans_b=True)
