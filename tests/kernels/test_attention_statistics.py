"""attention_statistics: against dense formulas in fp64 that are written here, and what its kernel may not do."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from views import last_programs_only, nan_padded, wide_rows

from vit.kernels import attention_statistics, configs, reference, runtime
from vit.kernels.attention import attention_fwd, attention_qkvpacked_fwd
from vit.kernels.reference import AttentionStatistics
from vit.testing.policy import check_all

statistics_module = sys.modules["vit.kernels.attention_statistics"]
attention_statistics_fwd, _places = statistics_module.attention_statistics_fwd, statistics_module._places

FIELDS = AttentionStatistics._fields


def dense(q: Tensor, k: Tensor, grid_size, num_prefix_tokens=0, patch_size=(1.0, 1.0), scale=None, **_) -> dict:
    """The formulas with all matrices, in the dtype of q: of fp64 tensors they are the oracle."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(wide).permute(0, 2, 1, 3) @ k.to(wide).permute(0, 2, 3, 1) * (scale or q.shape[-1] ** -0.5)
    p = logits.softmax(dim=-1)
    places = [
        torch.arange(n, dtype=wide, device=q.device) * size for n, size in zip(grid_size, patch_size, strict=True)
    ]
    places = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1).reshape(-1, 2)
    distances = p.new_zeros(q.shape[1], k.shape[1])
    of_patches = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    distances[num_prefix_tokens:, num_prefix_tokens:] = of_patches
    return {
        "distance": (p * distances).sum(-1),
        "patch_mass": p[..., num_prefix_tokens:].sum(-1),
        "prefix_mass": p[..., :num_prefix_tokens].sum(-1),
        "entropy": -(p * logits.log_softmax(dim=-1)).sum(-1),
        "max_logit": logits.amax(-1),
        "received": p.mean(-2),
    }


def ours(q: Tensor, k: Tensor, received: bool = True, impl: str = "triton", **options) -> dict:
    found = attention_statistics(q, k, received=received, impl=impl, **options)
    assert type(found) is AttentionStatistics
    return {name: t for name, t in found._asdict().items() if t is not None}


def queries_and_keys(randn, options: dict, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of two images, or of so many more that the largest error of few numbers is not chance."""
    images = min(max(2, 96 // tokens(options)), 24)
    return tuple(randn(images, tokens(options), 2, head_dim).to(dtype) for _ in range(2))


def judge(q: Tensor, k: Tensor, **options) -> None:
    """By the policy of fp32, in which all is computed, compared with dense PyTorch on the same numbers."""
    found = ours(q, k, **options)
    assert {t.dtype for t in found.values()} == {torch.float32}
    check_all(found, dense(q.float(), k.float(), **options), dense(q.double(), k.double(), **options))


def of_largest(found: dict, exact: dict) -> dict:
    """The largest error of each tensor, as a fraction of its largest value."""
    assert found.keys() == exact.keys()
    return {n: ((found[n].double() - t).abs().max() / t.abs().max().clamp_min(1e-300)).item() for n, t in exact.items()}


def tokens(options: dict) -> int:
    return options["num_prefix_tokens"] + math.prod(options["grid_size"])


def grid(rows: int, columns: int, prefix: int = 1, **options) -> dict:
    return {"grid_size": (rows, columns), "num_prefix_tokens": prefix, **options}


def bits_equal(a, b, what: str) -> None:
    for name, x, y in zip(FIELDS, a, b, strict=True):
        assert (x is None and y is None) or torch.equal(x, y), f"{what}: {name}"


# ---- accuracy --------------------------------------------------------------------------------------------------------

GRIDS = [
    grid(7, 7, 1, patch_size=(16, 16)),
    grid(5, 9, 0, patch_size=(14.3, 7.9)),
    grid(9, 5, 5, patch_size=(0.1, 33.0)),
    grid(1, 40, 1),
    grid(40, 1, 1, patch_size=(3.0, 1e6)),
    grid(3, 4, 40, patch_size=(2, 2.5)),  # more prefix tokens than a tile has columns
    grid(1, 1, 0),
    grid(0, 3, 5),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("head_dim", [16, 40, 80])
@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_fp64(randn, options, head_dim):
    q, k = (randn(2, tokens(options), 2, head_dim).double() for _ in range(2))
    for scale in (None, 0.9):
        found = ours(q, k, **options, scale=scale)
        assert {t.dtype for t in found.values()} == {torch.float64}
        errors = of_largest(found, dense(q, k, **options, scale=scale))
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_grids(randn, dtype, options):
    judge(*queries_and_keys(randn, options, 24, dtype), **options)


@pytest.mark.parametrize("head_dim", range(16, 136, 8))
def test_every_head_dim(randn, head_dim):
    judge(randn(3, 36, 2, head_dim), randn(3, 36, 2, head_dim), **grid(5, 7))


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_head_dims_in_every_dtype(randn, dtype, head_dim):
    q, k = (randn(3, 46, 2, head_dim).to(dtype) for _ in range(2))
    judge(q, k, **grid(9, 5, patch_size=(16, 16)), scale=0.31 * head_dim**-0.5)


def test_vit_length(randn):
    judge(randn(1, 197, 2, 64).bfloat16(), randn(1, 197, 2, 64).bfloat16(), **grid(14, 14, patch_size=(16, 16)))


LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 48, 49, 64, 65]


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_kind_of_last_tile(randn, monkeypatch, length, tail):
    monkeypatch.setattr(configs, "attention_statistics", lambda *_: configs.Config(block_m=32, block_n=32, tail=tail))
    judge(*queries_and_keys(randn, grid(1, length - 1), 24, torch.float32), **grid(1, length - 1))


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (16, 32)])
def test_other_tiles(randn, monkeypatch, block_m, block_n, tail):
    config = configs.Config(block_m=block_m, block_n=block_n, tail=tail)
    monkeypatch.setattr(configs, "attention_statistics", lambda *_: config)
    judge(randn(2, 68, 2, 72).half(), randn(2, 68, 2, 72).half(), **grid(7, 9, 5))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tile_dtype", [torch.float32, torch.bfloat16])
def test_shipped_tiles(randn, monkeypatch, arch, tile_dtype):
    shipped = configs.attention_statistics(arch, 64, tile_dtype)
    monkeypatch.setattr(configs, "attention_statistics", lambda *_: shipped)
    judge(randn(2, 68, 2, 64).half(), randn(2, 68, 2, 64).half(), **grid(7, 9, 5))


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("kind", ["x9", "very negative", "very positive"])
def test_large_logits(randn, dtype, kind, impl):
    """Within 1e-5 of the largest value: with lse − Σ p · s the entropy would be off by 3e-5."""
    q, k = randn(2, 50, 2, 64), randn(2, 50, 2, 64)
    if kind == "x9":
        q = 9 * q
    else:  # about ∓300: the rows that do not exist have logits of 0, far above or below
        q, k = q / 8 + 6.0, k / 8 + (-6.0 if kind == "very negative" else 6.0)
        q, k = ((t * 32).round() / 32 for t in (q, k))  # all fp32 products are exact
    q, k, options = q.to(dtype), k.to(dtype), grid(7, 7, patch_size=(16, 16))
    errors = of_largest(ours(q, k, impl=impl, **options), dense(q.double(), k.double(), **options))
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_rows_almost_without_entropy(randn, dtype, impl):
    """Each query looks at one key. Its entropy is about 1e-8, never negative, and its distance that of the key."""
    N, E, options = 50, 64, grid(7, 7, patch_size=(16, 16))
    k = torch.eye(N, E, device=randn(1).device, dtype=dtype)[None, :, None].expand(1, N, 2, E)
    q = torch.stack([190.0 * k[:, :, 0].flip(1), 300.0 * k[:, :, 1].flip(1)], dim=2)
    found, exact = ours(q, k, impl=impl, **options), dense(q.double(), k.double(), **options)
    assert 1e-9 < exact["entropy"][:, 0].max() < 1e-7 and exact["entropy"][:, 1].max() < 1e-13
    assert found["entropy"].min() >= 0.0
    assert (found["entropy"] - exact["entropy"]).abs().max() < 3e-7
    del found["entropy"], exact["entropy"]
    errors = of_largest(found, exact)
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_uniform_attention_by_hand(device, impl):
    """2 x 3 patches of 3 x 4 pixels, and two prefix tokens: every p is 1/8."""
    q, k = torch.zeros(1, 8, 1, 16, device=device), torch.ones(1, 8, 1, 16, device=device)
    found = ours(q, k, impl=impl, **grid(2, 3, 2, patch_size=(3, 4)))
    corner = (0 + 4 + 8 + 3 + 5 + math.sqrt(73)) / 8
    edge = (4 + 0 + 4 + 5 + 3 + 5) / 8
    want = {
        "distance": [0, 0, corner, edge, corner, corner, edge, corner],
        "patch_mass": [0.75] * 8,
        "prefix_mass": [0.25] * 8,
        "entropy": [math.log(8)] * 8,
        "max_logit": [0] * 8,
        "received": [0.125] * 8,
    }
    for name, t in found.items():
        torch.testing.assert_close(t.flatten(), torch.tensor(want[name], dtype=torch.float32, device=device), msg=name)


@pytest.mark.parametrize(
    "shape", [(1, 1), (25_000, 41), (2000, 61), (1000, 1048), (1, 2**20 - 1), (2**20 - 1, 1), (13, 80_659), (523, 2004)]
)
def test_places_of_large_grids(device, shape):
    """Exact, also with an error of two units in the last place of 1/width, which compiled divisions may have."""
    assert math.prod(shape) < statistics_module.MAX_PATCHES
    width = shape[1]
    ends = torch.arange(shape[0], device=device) * width
    index = torch.cat([ends + column for column in (0, width // 2, width - 1)]).to(torch.int32)
    index = index[:: max(1, len(index) // 4096)]
    index = torch.cat([index, index.new_tensor([0, math.prod(shape) - 1])])
    row, column = (torch.empty(len(index), device=device) for _ in range(2))
    runtime.launch(
        _places_kernel, triton.cdiv(len(index), 1024), index_ptr=index, row_ptr=row, column_ptr=column,
        N=len(index), GRID_W=width, BLOCK=1024, num_warps=4, num_stages=1,
    )  # fmt: skip
    assert torch.equal(row, (index // width).float()) and torch.equal(column, 0.5 * (index % width).float())
    inverse = np.float32(1.0) / np.float32(width)
    for away in (np.float32(0.0), np.float32(np.inf)):
        inverse_off = np.nextafter(np.nextafter(inverse, away), away)
        quotient = (index.cpu().numpy().astype(np.float32) + np.float32(0.5)) * inverse_off
        assert (np.floor(quotient) == index.cpu().numpy() // width).all()


@triton.jit
def _places_kernel(index_ptr, row_ptr, column_ptr, N, GRID_W, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offs, mask=offs < N, other=0)
    row, column = _places(index, GRID_W, 0.5, tl.float32)
    tl.store(row_ptr + offs, row, mask=offs < N)
    tl.store(column_ptr + offs, column, mask=offs < N)


# ---- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_masses(randn, dtype, impl):
    q, k = (3 * randn(2, 68, 3, 24).to(dtype) for _ in range(2))
    found = attention_statistics(q, k, **grid(7, 9, 5), received=True, impl=impl)
    ones = torch.ones(2, 3, 68, device=q.device)
    torch.testing.assert_close(found.patch_mass + found.prefix_mass, ones, rtol=3e-6, atol=0.0)
    torch.testing.assert_close(found.received.sum(-1), ones[..., 0], rtol=3e-6, atol=0.0)
    assert not found.distance[..., :5].any()
    assert found.distance.max() <= math.hypot(6, 8)
    without = attention_statistics(q, k, **grid(7, 9, 5), impl=impl)
    assert without.received is None
    bits_equal(without, found._replace(received=None), "without received")


def test_prefix_tokens_have_no_place(randn):
    """To move their keys from one prefix token to another changes no distance and no mass."""
    q, k = randn(2, 68, 2, 24), randn(2, 68, 2, 24)
    found = ours(q, k, **grid(7, 9, 5))
    order = torch.tensor([3, 0, 4, 1, 2, *range(5, 68)], device=q.device)
    moved = ours(q, k[:, order], **grid(7, 9, 5))
    found["received"] = found["received"][..., order]
    for name, t in found.items():
        torch.testing.assert_close(moved[name], t, rtol=2e-6, atol=1e-6, msg=name)


def test_heads_and_samples_do_not_mix(randn):
    q, k = randn(3, 41, 2, 32), randn(3, 41, 2, 32)
    whole = attention_statistics(q, k, **grid(8, 5), received=True, impl="triton")
    part = attention_statistics(q[1:2, :, 1:], k[1:2, :, 1:], **grid(8, 5), received=True, impl="triton")
    bits_equal([t[1:2, 1:] for t in whole], part, "one head of one sample")


@pytest.mark.parametrize("factor", [2.0**-40, 3.0, 2.0**60])
def test_patch_sizes_are_a_unit(randn, factor):
    """Also where the square of a distance would not fit into fp32."""
    q, k = randn(1, 36, 2, 16), randn(1, 36, 2, 16)
    one, other = (ours(q, k, **grid(5, 7), patch_size=(2 * f, 3 * f))["distance"] for f in (1.0, factor))
    torch.testing.assert_close(other, one * factor, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("shape", [(0, 6, 2, 16), (2, 0, 2, 16)])
def test_empty(randn, impl, shape):
    q = randn(*shape)
    options = {"grid_size": (1, shape[1])}
    found = attention_statistics(q, q, **options, received=True, impl=impl)
    assert [t.shape for t in found] == [(shape[0], 2, shape[1])] * 6
    assert attention_statistics(q, q, **options, impl=impl).received is None


# ---- saved -----------------------------------------------------------------------------------------------------------


def test_saved_statistics_of_the_forward(randn, dtype):
    """Those of every forward kernel give the same bits as none, whatever their strides."""
    qkv, options = randn(2, 36, 3, 2, 24).to(dtype), {**grid(5, 7), "scale": 0.3, "received": True, "impl": "triton"}
    q, k, v = qkv.unbind(2)
    right = attention_statistics(q, k, **options)
    drop = {"seed": torch.tensor([3], device=q.device), "dropout_p": 0.3, "offset": 1}
    for saved in (
        attention_fwd(q, k, v, 0.3, True)[1:],
        attention_qkvpacked_fwd(qkv, 0.3, True)[1:],
        attention_qkvpacked_fwd(qkv, 0.3, True, **drop)[1:],
    ):
        bits_equal(attention_statistics(q, k, **options, saved=saved), right, "saved")
        strided = [nan_padded(t.mT.contiguous().mT) for t in saved]
        bits_equal(attention_statistics(q, k, **options, saved=strided), right, "strided")


def test_saved_statistics_are_used(randn, monkeypatch):
    """Not computed again: the forward does not run, m is the largest logit, and received takes log l."""
    q, k = randn(2, 36, 2, 24), randn(2, 36, 2, 24)
    m, log_l = attention_fwd(q, k, k, 0.3, True)[1:]
    launched, launch = [], runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda f, *a, **o: (launched.append(f.__name__), launch(f, *a, **o)))
    options = {**grid(5, 7), "scale": 0.3, "received": True, "impl": "triton"}
    found = attention_statistics(q, k, **options, saved=(m + 1.0, log_l + math.log(2)))
    assert launched == ["_attention_statistics_kernel"]
    torch.testing.assert_close(found.max_logit, 0.3 * (m + 1.0))
    torch.testing.assert_close(found.received.sum(-1), torch.full_like(m[..., 0], 0.5 * math.exp(-0.3)))
    attention_statistics(q, k, **grid(5, 7), scale=0.3, impl="triton")
    assert launched[1:] == ["_attention_fwd_kernel", "_attention_statistics_kernel"]


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_same_bits(randn, dtype, impl):
    qkv = randn(2, 36, 3, 2, 24).to(dtype)
    q, k = (t.contiguous() for t in qkv.unbind(2)[:2])

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def run(q, k):
        return attention_statistics(q, k, **grid(5, 7, patch_size=(16, 12)), received=True, impl=impl)

    first = run(q, k)
    variants = {
        "again": (q, k),
        "packed": qkv.unbind(2)[:2],
        "views of [B, H, N, E]": (heads_first(q), heads_first(k)),
        "padded": (nan_padded(q), nan_padded(k)),
        "wide rows": (wide_rows(q), wide_rows(k)),
        "last stride not 1": (q.mT.contiguous().mT, k.mT.contiguous().mT),
    }
    for name, (q_view, k_view) in variants.items():
        found = run(q_view, k_view)
        if impl == "triton":
            bits_equal(first, found, name)
        else:  # PyTorch's product may sum in another order
            for a, b in zip(first, found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
    if impl == "triton":
        bits_equal(run(q, k[:1].expand(2, -1, -1, -1)), run(q, k[:1].repeat(2, 1, 1, 1)), "expanded keys")


def test_inputs_are_read_in_place(randn, monkeypatch):
    seen, launch = [], runtime.launch
    monkeypatch.setattr(runtime, "launch", lambda *a, **k: (seen.append(k), launch(*a, **k)))
    q, k, _ = randn(2, 6, 3, 2, 16).unbind(2)
    attention_statistics(q, k, **grid(1, 5), impl="triton")
    transposed = randn(2, 2, 6, 16).transpose(1, 2)
    attention_statistics(transposed, transposed, **grid(1, 5), impl="triton")
    packed, unpacked = seen[1::2]
    assert packed["q_ptr"].data_ptr() == q.data_ptr() and packed["k_ptr"].data_ptr() == k.data_ptr()
    assert unpacked["q_ptr"].data_ptr() == unpacked["k_ptr"].data_ptr() == transposed.data_ptr()
    assert packed["ALIGN"] == unpacked["ALIGN"] == 8


LENGTHS_PROGRAM = """
import collections, sys
import torch, triton
from vit import kernels
from vit.kernels.dry_run import dry_run

found = collections.defaultdict(set)

def note(key, fn, **_):
    found[fn.name.rpartition(".")[2]].add(key)
    return True  # nothing is compiled

triton.knobs.runtime.jit_cache_hook = note
with dry_run(90):
    grids = [(1, n, p) for n in range(1, 66) for p in (0, 1, 16)] + [(n, 16, 5) for n in range(34)]
    for rows, columns, prefix in grids:
        q = torch.empty(1 + columns % 17, rows * columns + prefix, 3, 64, dtype=getattr(torch, sys.argv[1]))
        options = {"grid_size": (rows, columns), "num_prefix_tokens": prefix, "patch_size": (16, 16)}
        kernels.attention_statistics(q, q, **options, received=True, impl="triton")
print(" ".join(f"{name}={len(keys)}" for name, keys in sorted(found.items()) if "statistics" in name))
"""


@pytest.mark.parametrize(("dtype", "kinds"), [("bfloat16", 5), ("float32", 1)])
def test_a_new_grid_compiles_nothing(dtype, kinds):
    """Nor does another number of prefix tokens or images; only another kind of last tile does."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LENGTHS_PROGRAM, dtype], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"_attention_statistics_kernel={kinds}"]


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", ["samples", "tokens", "heads"])
def test_offsets_beyond_32_bits(device, far):
    """Three samples, tokens or heads 2³⁰ elements apart. The memory between them is never touched."""
    gap, (B, N, H, E) = 2**30, {"samples": (3, 2, 1, 16), "tokens": (1, 3, 2, 16), "heads": (1, 2, 3, 16)}[far]
    near = torch.randn(B, N, 2, H, E, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    stride = list(near.stride())
    stride[{"samples": 0, "tokens": 1, "heads": 3}[far]] = gap
    memory = torch.from_numpy(np.zeros(2 * gap + near.numel(), dtype=np.float16)).to(device)
    apart = memory.as_strided(near.shape, stride)
    apart.copy_(near)
    first, second = (
        attention_statistics(*t.unbind(2), grid_size=(1, N), received=True, impl="triton") for t in (near, apart)
    )
    bits_equal(first, second, far)


def test_many_heads_go_on_grid_x(randn, monkeypatch):
    grids = []
    monkeypatch.setattr(runtime, "launch", lambda kernel, grid, **_: grids.append(grid))
    q = randn(1, 1, 1, 16).expand(35_001, 1, 2, 16)
    for received in (False, True):
        attention_statistics(q, q, grid_size=(1, 1), received=received, impl="triton")
    assert grids == [70_002, 70_002, 70_002, 140_004]  # forward and statistics, twice


@pytest.mark.interpreted
def test_the_last_of_many_heads(randn):
    q = torch.zeros(35_000, 5, 2, 16)
    q[-1] = randn(5, 2, 16)
    alone = attention_statistics(q[-1:], q[-1:], grid_size=(1, 5), received=True, impl="triton")
    with last_programs_only(4):
        many = attention_statistics(q, q, grid_size=(1, 5), received=True, impl="triton")
    bits_equal(alone, [t[-1:] for t in many], "last sample")


@pytest.mark.parametrize("head_dim", [8, 20, 136])
def test_unsupported_head_dim(randn, head_dim):
    q, options = randn(1, 6, 2, head_dim), grid(1, 5)
    said = f"^attention_statistics: impl='triton' cannot run: the kernels take .* in steps of 8, not {head_dim}$"
    with pytest.raises(RuntimeError, match=said):
        attention_statistics(q, q, **options, impl="triton")
    bits_equal(
        attention_statistics(q, q, **options), attention_statistics(q, q, **options, impl="reference"), "reference"
    )


def test_too_many_patches():
    q = torch.empty(1, 1, 1, 16, device="meta").expand(1, 2**20, 1, 16)
    with pytest.raises(RuntimeError, match=r"cannot run: .*fewer than 1,048,576 patches, not 1,048,576$"):
        attention_statistics(q, q, grid_size=(1024, 1024), impl="triton")


def test_tiles_are_asked_for_what_runs(randn, monkeypatch):
    asked, plain = [], configs.attention_statistics
    monkeypatch.setattr(configs, "attention_statistics", lambda *a: asked.append(a) or plain(*a))
    q = randn(1, 6, 2, 24).half()
    attention_statistics(q, q, **grid(1, 5), impl="triton")
    assert asked == [(runtime.arch(q.device), 24, torch.float16)]


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("received", [False, True])
def test_opcheck(randn, received):
    q, k = randn(2, 6, 2, 16), randn(2, 6, 2, 16)
    saved = attention_fwd(q, k, k, 0.25, True)[1:]
    torch.library.opcheck(attention_statistics_fwd, (q, k, *saved, 5, 1, 16.0, 14.0, 0.25, received))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_compile_fullgraph(randn, impl):
    def fn(q, k):
        return attention_statistics(q, k, **grid(1, 5), received=True, impl=impl)

    q, k = randn(2, 6, 2, 16).requires_grad_(), randn(2, 6, 2, 16)
    for a, b in zip(fn(q, k), torch.compile(fn, fullgraph=True, backend="aot_eager")(q, k), strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad and not b.requires_grad


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(randn, impl, low):
    """Of q and k as `attention` takes them there; m and log l are not cast."""
    q, k = randn(2, 6, 2, 16), randn(2, 6, 2, 16)
    options = {**grid(1, 5), "received": True, "impl": impl}
    saved = attention_fwd(q.to(low), k.to(low), k.to(low), 0.25, True)[1:]
    want = attention_statistics(q.to(low), k.to(low), **options)
    with torch.autocast(q.device.type, low):
        found = attention_statistics(q, k, **options, saved=saved)
    assert {t.dtype for t in found} == {torch.float32}
    bits_equal(found, want, "autocast")


def test_no_gradient_and_no_writes(randn):
    q, k = randn(2, 6, 2, 16).requires_grad_(), randn(2, 6, 2, 16)
    before = q.detach().clone(), k.clone()
    for impl in ("triton", "reference"):
        assert not any(t.requires_grad for t in attention_statistics(q, k, **grid(1, 5), received=True, impl=impl))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1]) and q._version == k._version == 0


# ---- the CPU path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 2 * 68 * 8, 3 * 2 * 68 * 8, 5 * 2 * 68 * 8, 67 * 2 * 68 * 8, 2**22])
@pytest.mark.parametrize("options", [grid(7, 9, 5, patch_size=(14.3, 7.9)), grid(4, 17, 0), grid(0, 0, 68)], ids=str)
def test_tiles_of_plain_pytorch(randn, monkeypatch, tile, options):
    """Of one query each, of three (a border inside the prefix), of five (one at its end), of all but one, of all."""
    monkeypatch.setattr(statistics_module, "TILE_BYTES", tile)
    q, k = (randn(2, 68, 2, 24).double() for _ in range(2))
    errors = of_largest(ours(q, k, impl="reference", **options), dense(q, k, **options))
    assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_pytorch(randn, dtype):
    q, k = (randn(3, 68, 2, 24).to(dtype) for _ in range(2))
    found, options = ours(q, k, impl="reference", **grid(7, 9, 5)), grid(7, 9, 5)
    check_all(found, dense(q.float(), k.float(), **options), dense(q.double(), k.double(), **options))


def test_auto_on_a_cpu_is_plain_pytorch():
    q = torch.randn(1, 6, 2, 16, generator=torch.Generator().manual_seed(0))
    with runtime.record_choices() as choices:
        found = attention_statistics(q, q, **grid(1, 5))
    assert [(c.op, c.path) for c in choices] == [("attention_statistics", "pytorch")]
    bits_equal(found, attention_statistics(q, q, **grid(1, 5), impl="reference"), "auto")


def test_the_reference_is_the_specification(randn):
    """The whole, and a part of the queries, which the CPU path computes."""
    q, k, options = randn(2, 68, 2, 24).double(), randn(2, 68, 2, 24).double(), grid(7, 9, 5, patch_size=(14.3, 7.9))
    exact = dense(q, k, **options)
    found = reference.attention_statistics(q, k, **options, received=True)._asdict()
    assert max(of_largest(found, exact).values()) < 1e-12
    part = reference.attention_statistics(q[:, 3:17], k, **options, first_query=3)
    assert part.received is None
    torch.testing.assert_close(part.distance, exact["distance"][..., 3:17], rtol=1e-12, atol=1e-12)


# ---- bad input -------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 6, 2, 16)
STATS = torch.ones(2, 2, 6)


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": ONES[0]}, ValueError, r"q must have shape \[B, NQ, H, E\], got \(6, 2, 16\)"),
        ({"k": torch.ones(2, 6, 3, 16)}, ValueError, r"k must have shape .* got \(2, 6, 3, 16\)"),
        ({"k": torch.ones(1, 6, 2, 16)}, ValueError, "k must have shape"),
        ({"k": torch.ones(2, 7, 2, 16)}, ValueError, r"1 prefix tokens and 1 x 5 patches are 6 tokens, .* k \(2, 7"),
        ({"q": torch.ones(2, 5, 2, 16)}, ValueError, r".* 6 tokens, got q \(2, 5, 2, 16\) and k \(2, 6, 2, 16\)"),
        ({"k": ONES.half()}, TypeError, r"k is torch\.float16 but q is torch\.float32"),
        ({"q": ONES.int()}, TypeError, "q must be a floating-point tensor"),
        ({"k": [1.0]}, TypeError, r"k must be a torch\.Tensor, got list"),
        ({"k": ONES.to("meta")}, ValueError, "all tensors must be on one device, got cpu and meta"),
        ({"num_prefix_tokens": 2}, ValueError, "2 prefix tokens and 1 x 5 patches are 7 tokens"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be a non-negative integer, got -1"),
        ({"num_prefix_tokens": 1.0}, ValueError, r"num_prefix_tokens must be a non-negative integer, got 1\.0"),
        ({"num_prefix_tokens": True}, ValueError, "num_prefix_tokens must be a non-negative integer, got True"),
        ({"num_prefix_tokens": None}, ValueError, "num_prefix_tokens must be a non-negative integer, got None"),
        ({"grid_size": 5}, ValueError, r"grid_size must be \(rows, columns\), two non-negative integers, got 5"),
        ({"grid_size": (5,)}, ValueError, r"grid_size must be .* got \(5,\)"),
        ({"grid_size": (1, 5, 1)}, ValueError, r"grid_size must be .* got \(1, 5, 1\)"),
        ({"grid_size": (-1, -5)}, ValueError, r"grid_size must be .* got \(-1, -5\)"),
        ({"grid_size": (1.0, 5)}, ValueError, r"grid_size must be .* got \(1\.0, 5\)"),
        ({"grid_size": (True, 5)}, ValueError, r"grid_size must be .* got \(True, 5\)"),
        ({"grid_size": None}, ValueError, "grid_size must be .* got None"),
        ({"patch_size": 16}, ValueError, r"patch_size must be \(height, width\), two positive and finite .* got 16"),
        ({"patch_size": (16,)}, ValueError, r"patch_size must be .* got \(16,\)"),
        ({"patch_size": (0, 16)}, ValueError, r"patch_size must be .* got \(0, 16\)"),
        ({"patch_size": (16, -1.0)}, ValueError, r"patch_size must be .* got \(16, -1\.0\)"),
        ({"patch_size": (float("nan"), 1)}, ValueError, r"patch_size must be .* got \(nan, 1\)"),
        ({"patch_size": (1, float("inf"))}, ValueError, r"patch_size must be .* got \(1, inf\)"),
        ({"patch_size": ("16", 16)}, ValueError, r"patch_size must be .* got \('16', 16\)"),
        ({"scale": 0.0}, ValueError, "scale must be positive"),
        ({"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
        ({"saved": STATS}, TypeError, r"saved must be the pair \(m, log l\), got Tensor"),
        ({"saved": (STATS,)}, TypeError, "saved must be the pair"),
        ({"saved": (STATS, None)}, TypeError, r"saved log l must be torch\.float32 .* got None"),
        ({"saved": (1.0, STATS)}, TypeError, r"saved m must be a torch\.Tensor, got float"),
        ({"saved": (STATS, STATS.double())}, TypeError, r"saved log l must be torch\.float32 .* got torch\.float64"),
        ({"saved": (STATS.half(), STATS)}, TypeError, r"saved m must be torch\.float32 for q of torch\.float32"),
        ({"saved": (STATS.mT, STATS)}, ValueError, r"saved m must have shape \[B, H, N\] = \(2, 2, 6\) .* \(2, 6, 2\)"),
        ({"saved": (STATS, STATS[:0])}, ValueError, r"saved log l must have shape .* got \(0, 2, 6\)"),
        ({"saved": (STATS, STATS.to("meta"))}, ValueError, "all tensors must be on one device, got cpu and meta"),
        ({"impl": "flash"}, ValueError, "impl must be one of"),
    ],
)
def test_bad_input(change, error, message, impl):
    with pytest.raises(error, match=f"^attention_statistics: {message}"):
        attention_statistics(**{"q": ONES, "k": ONES, **grid(1, 5), "impl": impl} | change)


def test_numbers_of_any_kind(randn):
    """Lists and integers are sizes, too."""
    q = randn(1, 6, 2, 16)
    want = attention_statistics(q, q, **grid(1, 5, patch_size=(16.0, 14.0)), impl="triton")
    bits_equal(attention_statistics(q, q, **grid(1, 5, patch_size=[16, 14]), impl="triton"), want, "integers")
    found = attention_statistics(q, q, grid_size=torch.Size([1, 5]), num_prefix_tokens=1, impl="triton")
    bits_equal(found, attention_statistics(q, q, **grid(1, 5), impl="triton"), "torch.Size")
