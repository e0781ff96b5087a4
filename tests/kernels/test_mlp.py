"""mlp: accuracy, gradients, saved tensors, layouts, edge cases, and which implementation runs."""

import importlib

import pytest
import torch
from views import nan_padded

from vit.kernels import configs, mlp, reference
from vit.kernels.checks import ACTIVATIONS
from vit.kernels.linear import gemm
from vit.kernels.mlp import mlp_bwd, mlp_fwd
from vit.testing import check_op

linear_module = importlib.import_module("vit.kernels.linear")  # vit.kernels.linear and .mlp are the functions
mlp_module = importlib.import_module("vit.kernels.mlp")

NAMES = ["x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]
# (shape of x, hidden width, output width): tiny, ragged, several tiles. 100 and 10 do not fit a 16-bit descriptor.
SHAPES = [((16,), 40, 16), ((1, 24), 16, 10), ((65, 48), 136, 48), ((2, 3, 11, 72), 100, 40)]


def ours(activation="gelu", **drop):
    return lambda **a: mlp(**a, activation=activation, **drop, impl="triton")


def ref(activation="gelu", **drop):
    return lambda **a: reference.mlp(**a, activation=activation, **drop)


@pytest.fixture
def drop(device):
    return {"dropout_p": 0.3, "seed": torch.tensor([-1234567890123456789], device=device), "offset": 7}


def block(randn, shape, hidden, out):
    D = shape[-1]
    fc1_weight, fc2_weight = randn(hidden, D) * max(D, 1) ** -0.5, randn(out, hidden) * max(hidden, 1) ** -0.5
    return dict(zip(NAMES, (randn(*shape), fc1_weight, randn(hidden), fc2_weight, randn(out)), strict=True))


# Eager PyTorch rounds every step of quick_gelu, so for a few dozen activations its error varies by chance.
@pytest.mark.parametrize(
    ("shape", "hidden", "out", "activation"),
    [(*s, a) for s in SHAPES for a in ACTIVATIONS if a != "quick_gelu" or len(s[0]) == 4 or s[0][0] == 65],
)
def test_mlp(randn, dtype, shape, hidden, out, activation):
    check_op(ours(activation), ref(activation), block(randn, shape, hidden, out), dtype)


@pytest.mark.parametrize("missing", [("fc1_bias",), ("fc2_bias",), ("fc1_bias", "fc2_bias")])
def test_mlp_without_biases(randn, dtype, missing):
    check_op(ours(), ref(), block(randn, (33, 40), 72, 24) | dict.fromkeys(missing), dtype)


@pytest.mark.parametrize("scale", [1e-3, 9.0])
def test_wide_pre_activations(randn, dtype, scale):
    """Pre-activations are near zero, or far in both tails of the GELU."""
    inputs = block(randn, (33, 40), 72, 24)
    check_op(ours(), ref(), inputs | {"fc1_weight": inputs["fc1_weight"] * scale, "fc1_bias": None}, dtype)


def test_sums_over_many_rows(randn, monkeypatch):
    """The gradients of all four parameters are sums over 16k rows."""
    big = configs.Config(block_m=512, block_n=32, block_k=512, group_m=8)
    monkeypatch.setattr(configs, "gemm", lambda *_: big)
    check_op(ours(), ref(), block(randn, (16_500, 16), 24, 8), torch.bfloat16)


@pytest.mark.parametrize("dtype_precision", [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee")])
def test_every_tile_is_right(randn, monkeypatch, dtype_precision):
    for config in {configs.gemm(arch, *dtype_precision) for arch in (80, 89, 90, 100)}:
        monkeypatch.setattr(configs, "gemm", lambda *_, c=config: c)
        check_op(ours(), ref(), block(randn, (139, 40), 200, 24), dtype_precision[0])


@pytest.mark.parametrize("split", [1, 4])
def test_every_form_of_the_epilogue_is_right(randn, monkeypatch, drop, split):
    config = configs.Config(32, 128, 32, 2, split=split, warp_specialize=split == 4, cheap=split == 4)
    monkeypatch.setattr(configs, "gemm", lambda *_: config)
    check_op(ours(**drop), ref(**drop), block(randn, (37, 40), 168, 24), torch.bfloat16)


@pytest.mark.parametrize(("shape", "hidden", "out"), [SHAPES[0], SHAPES[3]])
def test_dropout(randn, dtype, drop, shape, hidden, out):
    check_op(ours(**drop), ref(**drop), block(randn, shape, hidden, out), dtype)


def test_dropout_draws_the_mask_of_the_reference(randn, drop):
    """The weights are identities, so the output shows the mask. Tokens are the rows of the mask."""
    x, one = randn(2, 33, 72) + 8, torch.eye(72, device=drop["seed"].device)
    y = mlp(x, one, None, one, None, **drop, impl="triton")
    keep = reference.dropout_scale(drop["seed"], drop["offset"], x.shape, drop["dropout_p"]).to(y.dtype)
    assert 0.2 < (y == 0).double().mean() < 0.4
    torch.testing.assert_close(y, mlp(x, one, None, one, None, impl="triton") * keep)


def test_dropout_that_is_off_is_no_dropout(randn, drop):
    """p = 0 launches the same kernels with the same arguments, whatever the seed and the offset."""
    inputs = block(randn, X, HIDDEN, OUT)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    y, shapes = saved_by(lambda: mlp(**leaves, **drop | {"dropout_p": 0.0}, impl="triton"))
    assert torch.equal(y, mlp(**inputs, impl="triton")) and shapes == sorted([X, PRE, W1, W2])
    _, shapes = saved_by(lambda: mlp(**leaves, **drop, impl="triton"))
    assert shapes == sorted([X, PRE, W1, W2, (1,)])  # the seed, and no mask


@pytest.mark.interpreted
def test_gradcheck_with_dropout(randn, drop):
    inputs = [randn(*s).double().requires_grad_() for s in [(2, 2), (3, 2), (3,), (1, 3), (1,)]]
    assert torch.autograd.gradcheck(lambda *a: mlp(*a, **drop, impl="triton"), inputs)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(randn, activation):
    inputs = [randn(*s).double().requires_grad_() for s in [(1, 2, 3), (4, 3), (4,), (2, 4), (2,)]]
    assert torch.autograd.gradcheck(lambda *a: mlp(*a, activation, impl="triton"), inputs)


@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_opcheck(randn, drop, impl):
    leaves = [t.requires_grad_() for t in block(randn, (2, 3, 20), 12, 8).values()]
    seed, p, offset = drop["seed"], drop["dropout_p"], drop["offset"]
    torch.library.opcheck(mlp_fwd, (*leaves, seed, "gelu", p, offset, True, impl))
    x, fc1_weight, _, fc2_weight, _ = leaves
    plain = (x, fc1_weight, None, fc2_weight, None, None, "gelu", 0.0, 0, False, impl)
    torch.library.opcheck(mlp_fwd, plain, test_utils="test_faketensor")
    x, fc1_weight, fc2_weight = x.detach(), fc1_weight.detach(), fc2_weight.detach()
    dy, pre = randn(2, 3, 8), randn(2, 3, 12)
    torch.library.opcheck(
        mlp_bwd, (dy, x, pre, fc1_weight, fc2_weight, seed, "gelu", p, offset, True, True, True, impl)
    )
    torch.library.opcheck(mlp_bwd, (dy, None, pre, None, None, seed, "gelu", p, offset, False, True, False, impl))
    torch.library.opcheck(mlp_bwd, (dy, None, None, None, None, None, "gelu", 0.0, 0, False, False, True, impl))


def grads(tensors, dy, **drop):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = mlp(*leaves, **drop, impl="triton")
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize(("hidden", "out", "p"), [(72, 40, 0.0), (50, 10, 0.0), (50, 40, 0.3)])
def test_same_bits(randn, dtype, drop, hidden, out, p):
    """A second run, other strides and NaN around the buffers change no bit. No input is written."""
    tensors = [t.to(dtype) for t in block(randn, (3, 13, 48), hidden, out).values()]
    dy = randn(3, 13, out).to(dtype)
    drop |= {"dropout_p": p}
    before = [t.clone() for t in (*tensors, dy)]
    first = grads(tensors, dy, **drop)
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = tensors

    def column_major(t):
        return t.mT.contiguous().mT

    variants = {
        "again": (tensors, dy),
        "batch and tokens swapped": ([x.transpose(0, 1).contiguous().transpose(0, 1), *tensors[1:]], dy),
        "column-major": (
            [column_major(x), column_major(fc1_weight), fc1_bias, column_major(fc2_weight), fc2_bias],
            column_major(dy),
        ),
        "offset, NaN around": ([nan_padded(t) for t in tensors], nan_padded(dy)),
    }
    for name, variant in variants.items():
        for a, b in zip(first, grads(*variant, **drop), strict=True):
            assert torch.equal(a, b), name
    for a, b in zip(before, (*tensors, dy), strict=True):
        assert torch.equal(a, b)
    expanded = torch.ones((), dtype=dtype, device=x.device).expand(dy.shape)  # the gradient of .sum().backward()
    for a, b in zip(grads(tensors, expanded.contiguous(), **drop), grads(tensors, expanded, **drop), strict=True):
        assert torch.equal(a, b)


def test_empty(randn, drop):
    for M, D, hidden, out in [(0, 16, 24, 8), (3, 16, 0, 8), (3, 0, 24, 8), (3, 16, 24, 0)]:
        leaves = [t.requires_grad_() for t in block(randn, (1, M, D), hidden, out).values()]
        y, expected = mlp(*leaves, impl="triton"), reference.mlp(*leaves)
        torch.testing.assert_close(y, expected)
        dy = randn(*y.shape)
        for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
            torch.testing.assert_close(a, b)
        dropped = mlp(*leaves, **drop, impl="triton")
        torch.testing.assert_close(dropped, reference.mlp(*leaves, **drop))


def saved_by(fn):
    """The output of fn, and the shapes of what it saved for the backward."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        return fn(), sorted(shapes)


HIDDEN, OUT = 40, 24
X, PRE, W1, W2 = (9, 16), (9, HIDDEN), (HIDDEN, 16), (OUT, HIDDEN)


def test_saves_one_tensor_of_hidden_width(randn, monkeypatch):
    """It saves the pre-activation and recomputes the activation. Without gradients it saves neither."""
    written = []

    def spy(*args, **kwargs):
        outputs = mlp_fwd(*args, **kwargs)
        written.append(outputs[1].numel() > 0)
        return outputs

    monkeypatch.setattr(mlp_module, "mlp_fwd", spy)
    inputs = block(randn, X, HIDDEN, OUT)
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    _, shapes = saved_by(lambda: mlp(**leaves, impl="triton"))
    assert shapes == sorted([X, PRE, W1, W2])
    _, shapes = saved_by(lambda: mlp(**inputs, impl="triton"))
    assert shapes == []
    with torch.no_grad():
        y, shapes = saved_by(lambda: mlp(**leaves, impl="triton"))
    assert shapes == [] and not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(mlp(**inputs, impl="triton"), y)
    mlp(**inputs | {"fc2_bias": leaves["fc2_bias"]}, impl="triton")  # its gradient does not need it
    assert written == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("wanted", "saved", "products"),
    [
        ({"x"}, [PRE, W1, W2], ["dgelu", "dx"]),
        ({"fc1_weight"}, [X, PRE, W2], ["dgelu", "dw"]),
        ({"fc1_bias"}, [PRE, W2], ["dgelu"]),
        ({"fc2_weight"}, [PRE], ["dw"]),
        ({"fc2_bias"}, [], []),
        ({"fc1_weight", "fc2_weight"}, [X, PRE, W2], ["dgelu", "dw", "dw"]),
        (set(NAMES), [X, PRE, W1, W2], ["dgelu", "dx", "dw", "dw"]),
    ],
    ids=lambda v: "+".join(sorted(v)) if isinstance(v, set) else "",
)
def test_frozen_parameters(randn, monkeypatch, wanted, saved, products):
    """The op saves and multiplies nothing for a gradient that is not needed. The other gradients are right."""
    inputs = block(randn, X, HIDDEN, OUT)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    y, shapes = saved_by(lambda: mlp(**leaves, impl="triton"))
    assert shapes == sorted(saved)

    seen = []

    def spy(*args, **kwargs):
        seen.append("dgelu" if len(args) > 4 else "dw" if kwargs.get("trans_a") else "dx")
        return gemm(*args, **kwargs)

    monkeypatch.setattr(linear_module, "gemm", spy)
    monkeypatch.setattr(mlp_module, "gemm", spy)
    dy = randn(*y.shape)
    y.backward(dy)
    assert seen == products
    assert {n for n, t in leaves.items() if t.grad is not None} == wanted
    copies = {n: t.double().requires_grad_(n in wanted) for n, t in inputs.items()}
    reference.mlp(**copies).backward(dy.double())
    for n in wanted:
        torch.testing.assert_close(leaves[n].grad.double(), copies[n].grad, rtol=1e-5, atol=1e-5)


def test_activation_of_a_frozen_first_layer(randn, dtype, drop):
    """The gradient of fc2's weight has the same bits if the activation is recomputed without the product."""
    inputs = {n: t.to(dtype) for n, t in block(randn, (2, 9, 40), 72, 24).items()}
    dy = randn(2, 9, 24).to(dtype)
    found = []
    for wanted in ({"fc2_weight"}, set(NAMES)):
        leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
        mlp(**leaves, **drop, impl="triton").backward(dy)
        found.append(leaves["fc2_weight"].grad)
    assert torch.equal(*found)


def test_explicit_triton_never_calls_another_gemm(randn, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("impl='triton' called PyTorch's product")

    for owner, name in [(torch, "mm"), (torch, "addmm"), (torch, "matmul"), (torch.nn.functional, "linear")]:
        monkeypatch.setattr(owner, name, forbidden)
    for name in ("mm", "addmm", "matmul", "__matmul__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    leaves = [t.requires_grad_() for t in block(randn, X, HIDDEN, OUT).values()]
    mlp(*leaves, impl="triton").sum().backward()
    assert all(t.grad is not None for t in leaves)


def test_auto_fuses_gelu_and_takes_the_rest_from_cublas(randn, monkeypatch, dtype):
    """The test calls the custom op, because on a CPU the public function takes the reference."""
    fused = []

    def spy(*args, **kwargs):
        fused.append("dgelu" if len(args) > 4 else "gelu")
        return gemm(*args, **kwargs)

    monkeypatch.setattr(linear_module, "gemm", spy)
    monkeypatch.setattr(mlp_module, "gemm", spy)
    inputs = block(randn, (17, 40), 72, 24)
    check_op(lambda **a: mlp_fwd(*a.values(), None, "gelu", 0.0, 0, True, "auto")[0], ref(), inputs, dtype)
    assert fused == ["gelu", "dgelu"]


def test_compile_fullgraph(randn, drop):
    leaves = [t.requires_grad_() for t in block(randn, (2, 5, 24), 40, 24).values()]

    def fn(*a):
        return mlp(*a, **drop, impl="triton")

    y, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    dy = randn(2, 5, 24)
    assert torch.equal(y, compiled)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(compiled, leaves, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(randn, device, drop, impl, half):
    """fp32 arguments give the same bits as cast ones, and fp32 leaves get fp32 gradients."""
    leaves = [t.requires_grad_() for t in block(randn, (2, 5, 24), 40, 24).values()]
    cast = [t.detach().to(half).requires_grad_() for t in leaves]
    with torch.autocast(device.type, half):
        y = mlp(*leaves, **drop, impl=impl)
        assert torch.equal(y, mlp(*cast, **drop, impl=impl))  # arguments may already be cast
    expected = mlp(*cast, **drop, impl=impl)
    assert y.dtype is half and torch.equal(y, expected)
    dy = randn(*y.shape).to(half)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, cast, dy), strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b.float())


def test_autocast_compiles(randn, device, drop):
    leaves = [t.requires_grad_() for t in block(randn, (2, 5, 24), 40, 24).values()]

    def fn(*a):
        with torch.autocast(device.type, torch.bfloat16):
            return mlp(*a, **drop, impl="triton")

    y, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend="aot_eager")(*leaves)
    assert y.dtype is torch.bfloat16 and torch.equal(y, compiled)
    dy = torch.ones_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(compiled, leaves, dy), strict=True):
        assert a.dtype is torch.float32 and torch.equal(a, b)


def test_bad_arguments(randn):
    good = block(randn, X, HIDDEN, OUT)
    activations = "activation must be one of 'gelu', 'gelu_tanh', 'quick_gelu'"
    cases = [
        (ValueError, r"mlp: fc1_weight must have shape \[N, 16\].*got \(40, 15\)", {"fc1_weight": randn(40, 15)}),
        (ValueError, r"mlp: fc1_weight must have shape .*got \(40,\)", {"fc1_weight": randn(40)}),
        (ValueError, r"mlp: fc1_bias must have shape \(40,\), got \(24,\)", {"fc1_bias": randn(24)}),
        (ValueError, r"mlp: fc2_weight must have shape \[N, 40\].*got \(40, 24\)", {"fc2_weight": randn(40, 24)}),
        (ValueError, r"mlp: fc2_bias must have shape \(24,\), got \(40,\)", {"fc2_bias": randn(40)}),
        (ValueError, "mlp: x must have shape .*scalar", {"x": randn()}),
        (ValueError, f"mlp: {activations}, got 'relu'", {"activation": "relu"}),
        (ValueError, f"mlp: {activations}, got None", {"activation": None}),
        (TypeError, "mlp: fc1_bias is torch.float16 but x is torch.float32", {"fc1_bias": good["fc1_bias"].half()}),
        (TypeError, "mlp: x must be a floating-point tensor", {"x": good["x"].long()}),
        (ValueError, r"mlp: dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
        (ValueError, r"mlp: dropout_p must be in \[0, 1\), got -0.1", {"dropout_p": -0.1}),
        (TypeError, "mlp: seed must be an int64 tensor of one element", {"dropout_p": 0.5, "seed": randn(1)}),
    ]  # fmt: skip
    for impl in ("auto", "triton", "reference"):
        for error, message, change in cases:
            with pytest.raises(error, match=message):
                mlp(**good | change, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        mlp(**good, impl="cublas")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "wanted",
    [{"fc2_weight"}, {"fc2_weight", "fc2_bias"}, {"fc1_bias"}, {"x"}, set(NAMES)],
    ids=lambda v: "+".join(sorted(v)),
)
def test_each_activation_where_parts_are_frozen(randn, drop, activation, p, wanted):
    """The comparison is with PyTorch's functions, also where the activation is recomputed without the product."""
    inputs, dy = block(randn, (2, 9, 20), 36, 12), randn(2, 9, 12).double()
    drop |= {"dropout_p": p}
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in inputs.items()}
    copies = {n: t.double().requires_grad_(n in wanted) for n, t in inputs.items()}
    functional = torch.nn.functional
    gelu = {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }[activation]
    hidden = gelu(functional.linear(*(copies[n] for n in NAMES[:3])))
    if p:
        hidden = hidden * reference.dropout_scale(drop["seed"], drop["offset"], hidden.shape, p)
    want = functional.linear(hidden, copies["fc2_weight"], copies["fc2_bias"])
    for impl in ("triton", "fused", "reference"):
        y = mlp(**leaves, activation=activation, **drop, impl=impl)
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(y, [leaves[n] for n in NAMES if n in wanted], dy.float())
        wanted_grads = torch.autograd.grad(want, [copies[n] for n in NAMES if n in wanted], dy, retain_graph=True)
        for a, b in zip(grads, wanted_grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_an_activation_that_is_no_word(randn, impl):
    for activation in ("", None, "GELU", "gelu_new", 0):
        with pytest.raises(ValueError, match=f"^mlp: activation must be one of .*, got {activation!r}$"):
            mlp(**block(randn, (2, 8), 16, 4), activation=activation, impl=impl)
