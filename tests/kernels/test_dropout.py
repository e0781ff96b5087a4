"""Dropout: known answers of the generator, the mask of every path, statistics, and `residual_layer_norm`."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from vit.kernels import dropout, dropout_seed, reference, residual_layer_norm
from vit.kernels.dropout import dropout_fwd
from vit.testing import check_op

# Philox-4x32-10: counter, key, result (known-answer tests of Random123).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]  # fmt: skip


@pytest.fixture
def seed(device):
    return torch.tensor([-1234567890123456789], device=device)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_reference_generator_gives_the_known_answers(counter, key, answer):
    seed = key[1] << 32 | key[0]
    seed -= (seed >> 63) << 64  # as a signed number
    assert tuple(word.item() for word in reference.philox(torch.tensor(seed), counter)) == answer


def test_numbers_of_columns(seed):
    """Worked out by hand: columns c, c + 1, c + 8 and c + 9 have the four words of one counter, with nothing unused."""
    rows = torch.tensor([0, 2**32 + 7], device=seed.device)
    words, seed = reference.dropout_words(seed, 3, rows, 40), seed.reshape(())
    first = [0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15], [16, 17, 24, 25], [18, 19, 26, 27]
    for counter, columns in enumerate(first):
        for row, halves in enumerate([(0, 0), (7, 1)]):
            want = reference.philox(seed, (counter, *halves, 3))
            assert words[row, columns].tolist() == [word.item() for word in want]
    assert words.unique().numel() == words.numel()
    assert torch.equal(reference.dropout_words(seed, 3, rows, 21), words[:, :21])


@pytest.mark.parametrize("shape", [(1,), (3, 5, 67), (30, 2), (9, 16), (0, 5)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_kernel_draws_the_mask_of_the_reference(randn, seed, dtype, shape, p):
    x = randn(*shape).to(dtype)
    for offset in (1, 2**31 - 1):
        want = reference.dropout(x, p, seed, offset)
        assert torch.equal(dropout(x, p, seed, offset, impl="triton"), want)
    keep = reference.dropout_scale(seed, 5, x.shape, p).to(x.dtype)
    assert not x.numel() or set(keep.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}


def test_rows_beyond_32_bits_draw_differently(seed):
    """Rows that are 2³² apart have different masks."""
    low, high = reference.dropout_words(seed, 3, torch.tensor([7, 7 + 2**32], device=seed.device), 64)
    assert not torch.equal(low, high)


def test_gradient(randn, seed, dtype):
    check_op(
        lambda x: dropout(x, 0.3, seed, 2, impl="triton"),
        lambda x: reference.dropout(x, 0.3, seed, 2),
        {"x": randn(7, 45)},
        dtype,
    )
    x = randn(4, 6, 10).requires_grad_()
    y = dropout(x.transpose(0, 1), 0.3, seed, 2, impl="triton")
    (grad,) = torch.autograd.grad(y.sum(), x)  # an incoming gradient with stride 0
    assert torch.equal(grad, reference.dropout_scale(seed, 2, y.shape, 0.3).to(grad).transpose(0, 1))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_statistics(p):
    """Share of kept elements, and correlation of neighbours, offsets and seeds, within 5 standard deviations."""
    rows, columns = 512, 768

    def centred(seed, offset):
        keep = reference.dropout_scale(torch.tensor([seed]), offset, torch.Size((rows, columns)), p) * (1 - p)
        return (keep - (1 - p)) / math.sqrt(p * (1 - p))

    base = centred(1, 0)
    limit = 5 / math.sqrt(rows * columns)
    assert abs(base.mean().item()) < limit
    assert base.mean(dim=0).abs().max() < 5.5 / math.sqrt(rows)
    assert base.mean(dim=1).abs().max() < 5.5 / math.sqrt(columns)
    others = [centred(2, 0), centred(1, 1), centred(1, 8), base.roll(1, 0), base.roll((1, 1), (0, 1))]
    others += [base.roll(columns, 1) for columns in (1, 2, 8, 9)]
    for other in [*others, centred(1 + 2**32, 0)]:
        assert abs((base * other).mean().item()) < limit


def test_seed_follows_torchs_generator(device):
    x = torch.empty(0, device=device)
    torch.manual_seed(3)
    first, second = dropout_seed(x), dropout_seed(x)
    torch.manual_seed(3)
    assert torch.equal(dropout_seed(x), first) and not torch.equal(first, second)
    assert first.dtype is torch.int64 and first.shape == (1,) and first.device == x.device


@pytest.mark.parametrize("gamma", [False, True])
def test_residual_layer_norm(randn, seed, dtype, gamma):
    B, N, D = 3, 17, 100
    scale = torch.tensor([0.0, 2.0, 2.0], device=seed.device)
    inputs = {
        "residual": randn(B, N, D), "branch": randn(B, N, D), "weight": randn(D) + 1, "bias": randn(D),
        "gamma": randn(D) if gamma else None, "branch_bias": randn(D) if gamma else None,
    }  # fmt: skip
    drop = {"dropout_p": 0.25, "seed": seed, "offset": 9}
    check_op(
        lambda **a: residual_layer_norm(**a, **drop, row_scale=scale.to(a["residual"].dtype), impl="triton"),
        lambda **a: reference.residual_layer_norm(**a, **drop, row_scale=scale.to(a["residual"].dtype)),
        inputs,
        dtype,
    )


@pytest.mark.interpreted
def test_gradcheck(seed):
    def op(x, branch, branch_bias, gamma, weight, bias):
        x = dropout(x, 0.2, seed, 1, impl="triton")
        drop = {"dropout_p": 0.4, "seed": seed, "offset": 2}
        return residual_layer_norm(x, branch, weight, bias, branch_bias=branch_bias, gamma=gamma, **drop, impl="triton")

    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(1, 2, 4)] * 2 + [(4,)] * 4]
    assert torch.autograd.gradcheck(op, leaves)


def test_opcheck(randn, seed):
    torch.library.opcheck(dropout_fwd, (randn(3, 10).requires_grad_(), 0.3, seed, 1))
    torch.library.opcheck(
        torch.ops.vit.dropout_seed.default, (randn(3),), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_mask(randn, seed, reentrant):
    x = randn(5, 40).requires_grad_()

    def block(x, seed):
        return dropout(torch.tanh(x), 0.5, seed, 4, impl="triton")

    (want,) = torch.autograd.grad(block(x, seed).sum(), x)
    checkpoint(block, x, seed, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, want)


def test_compiled_code_draws_anew_at_every_call(randn):
    """The graph draws the seed, and the seed follows torch.manual_seed as in eager code."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return dropout(x, 0.5, dropout_seed(x), 1, impl="triton")

    x = randn(8, 64)
    torch.manual_seed(5)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(5)
    eager = dropout(x, 0.5, dropout_seed(x), 1, impl="triton")
    assert torch.equal(first, eager) and not torch.equal(first, second)


def test_nothing_to_drop(randn):
    x = randn(3, 4)
    assert dropout(x, 0.0) is x
    assert dropout(x[:0], 0.5, dropout_seed(x), impl="triton").shape == (0, 4)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_bad_input(randn, seed, impl):
    x = randn(3, 4)
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout_p must be in"):
            dropout(x, p, seed, impl=impl)
    with pytest.raises(TypeError, match="int64 tensor of one element"):
        dropout(x, 0.5, torch.zeros(2, dtype=torch.int64), impl=impl)
    with pytest.raises(TypeError, match="int64 tensor of one element"):
        dropout(x, 0.5, 17, impl=impl)
    with pytest.raises(TypeError, match="floating-point"):
        dropout(x.long(), 0.5, seed, impl=impl)
    with pytest.raises(ValueError, match="scalar"):
        dropout(x[0, 0], 0.5, seed, impl=impl)


def test_seeds_use_all_64_bits(device):
    torch.manual_seed(0)
    drawn = [dropout_seed(torch.empty(2, device=device)).item() for _ in range(100)]
    assert len(set(drawn)) == 100
    for bit in range(64):
        assert {value >> bit & 1 for value in drawn} == {0, 1}, bit


def test_a_seed_of_what_learns_has_no_gradient(randn):
    x = randn(3, 4).requires_grad_()
    assert not dropout_seed(x).requires_grad and not x.grad
    y = dropout(x, 0.5, impl="triton")
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, y == 0) and set(grad.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 1, 5)], ids=str)
def test_rows_are_all_dimensions_but_the_last(randn, seed, impl, shape):
    """The mask of a tensor is that of the matrix of its rows, also for a view with other strides."""
    x, device = torch.ones(shape), seed.device
    rows = x.reshape(-1, 5).to(device)
    want = reference.dropout_scale(seed, 4, rows.shape, 0.4).float().reshape(shape)
    assert torch.equal(dropout(x.to(device), 0.4, seed, 4, impl=impl), want)
    strided = x.movedim(0, -1).contiguous().movedim(-1, 0).to(device)
    assert torch.equal(dropout(strided, 0.4, seed, 4, impl=impl), want)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_zero_is_the_offset_that_nobody_gives(randn, seed, impl):
    x = randn(8, 16)
    first, named, other = dropout(x, 0.5, seed, impl=impl), *(dropout(x, 0.5, seed, i, impl=impl) for i in (0, 1))
    assert torch.equal(first, named) and not torch.equal(first, other)


def test_what_drops_nothing_is_not_looked_at(randn):
    """p = 0 returns the same tensor object, also a scalar, and does not check the other arguments."""
    for x in (randn(3, 4), randn(), randn(0)):
        for impl in ("auto", "triton", "reference"):
            assert dropout(x, 0.0, "no seed", -1, impl=impl) is x
            assert dropout(x, 0, impl=impl) is x
