"""sum_partials: accuracy, zero rows, several sums in one launch, and the same bits beside other sums."""

import pytest
import torch

from vit import kernels
from vit.kernels import configs, runtime
from vit.kernels.partial_sums import sum_partials
from vit.testing import check

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (3, 255), (4, 256), (5, 257), (16, 520), (301, 300)]  # tiles of 4 x 256 interpreted, 128 x 32 shipped


def summed(*pairs):
    """The sums of these (partials, dtype), from one call."""
    outs = [p.new_empty(p.shape[1:], dtype=dtype) for p, dtype in pairs]
    sum_partials([(p, out) for (p, _), out in zip(pairs, outs, strict=True)])
    return outs


@pytest.mark.parametrize("partials", DTYPES, ids=str)
@pytest.mark.parametrize("shipped", [False, True])
def test_each_sum_is_rounded_once_to_its_dtype(randn, monkeypatch, partials, shipped):
    """16-bit partials are added in fp32, too."""
    if shipped:
        config = configs.partial_sums(90)
        monkeypatch.setattr(configs, "partial_sums", lambda arch: config)
    for i in range(3):
        pairs = [(randn(*size).to(partials), DTYPES[(i + j) % 3]) for j, size in enumerate(SIZES[:5])]
        pairs[0] = randn(*SIZES[5]).to(partials), DTYPES[i]
        for (p, dtype), found in zip(pairs, summed(*pairs), strict=True):
            assert found.dtype is dtype
            check(found, p.float().sum(dim=0).to(dtype), p.double().sum(dim=0), name=str(tuple(p.shape)))


@pytest.mark.interpreted
def test_fp64(randn):
    p = randn(7, 40).double()
    (found,) = summed((p, torch.float64))
    torch.testing.assert_close(found, p.sum(dim=0), rtol=1e-14, atol=1e-14)


def test_sums_lose_no_small_terms(randn):
    """fp32 adds a row of 2²⁰ and ones exactly. 16 bits would lose the ones."""
    p = torch.ones(257, 5, device=randn(1).device)
    p[100] = 2.0**20
    (found,) = summed((p, torch.float32))
    assert (found == 2.0**20 + 256).all()


@pytest.mark.parametrize("n", range(8))
def test_launches(randn, monkeypatch, n):
    """A launch does up to five sums. Without sums there is none."""
    launched, launch = [], runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *args, **kwargs: launched.append(args) or launch(*args, **kwargs))
    pairs = [(randn(2 + i, 10 * i + 1), torch.float32) for i in range(n)]
    for (p, _), found in zip(pairs, summed(*pairs), strict=True):
        torch.testing.assert_close(found, p.sum(dim=0))
    assert len(launched) == [0, 1, 1, 1, 1, 1, 2, 2][n]


def test_no_rows_are_zero(randn):
    found = summed((randn(0, 7), torch.float16), (randn(3, 4), torch.float32), (randn(0, 2, 40), torch.float32))
    assert not found[0].any() and not found[2].any() and found[2].shape == (2, 40) and found[1].all()


def test_same_bits(randn):
    """A second run, other sums, an offset between NaN and more dimensions change no bit. Nothing else is written."""
    pairs = [(randn(*size), DTYPES[i % 3]) for i, size in enumerate(SIZES[1:])]
    first = summed(*pairs)
    assert all(map(torch.equal, first, summed(*pairs)))
    for pair, want in zip(pairs, first, strict=True):
        assert torch.equal(summed(pair)[0], want)
    p, want = pairs[-1][0], first[-1]
    buffer = torch.full((307, 300), float("nan"), device=p.device)
    buffer[3:304] = p
    around = torch.full((302,), 5.0, dtype=want.dtype, device=p.device)
    sum_partials([(buffer[3:304], around[1:301])])
    assert torch.equal(around[1:301], want) and (around[[0, -1]] == 5.0).all()
    (found,) = summed((p.view(301, 5, 4, 15), want.dtype))
    assert torch.equal(found, want.view(5, 4, 15))


@pytest.mark.parametrize(
    "case", ["layer_norm", "residual_layer_norm", "residual_layer_norm, gamma", "fp32 stream", "patch_embed"]
)
def test_a_backward_ends_with_one_launch(case):
    """The launch does all sums and casts, but the sum of dy over the images in patch_embed is a separate pass."""
    from benchmarks import trace  # here, because copies of the tests have no benchmarks

    def make(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta").requires_grad_()

    norm = {"weight": make(48), "bias": make(48)}
    pending = {"residual": make(2, 5, 48), "branch": make(2, 5, 48), "branch_bias": make(48), **norm}
    inputs = {
        "layer_norm": {"x": make(2, 5, 48), **norm},
        "residual_layer_norm": pending,
        "residual_layer_norm, gamma": pending | {"gamma": make(48)},
        "fp32 stream": pending | {"residual": make(2, 5, 48, dtype=torch.float32)},
        "patch_embed": {
            "image": make(2, 3, 16, 16).detach(), "weight": make(48, 3, 8, 8), "bias": make(48),
            "pos_embed": make(1, 5, 48), "prefix": make(1, 1, 48),
        },
    }[case]  # fmt: skip
    op = case.partition(",")[0] if case != "fp32 stream" else "residual_layer_norm"
    with trace.recording() as launches:
        outs = getattr(kernels, op)(**inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        leaves = [t for t in inputs.values() if t.requires_grad]
        torch.autograd.grad(outs, leaves, [torch.empty_like(o) for o in outs])
    backward = [launch.name for launch in launches if launch.phase == "bwd"]
    first = {"patch_embed": ["sum", "_patch_embed_dw_kernel"]}.get(op, ["_layer_norm_bwd_kernel"])
    assert backward == [*first, "_partial_sums_kernel"]
