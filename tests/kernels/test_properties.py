"""Properties: every op with random shapes, strides, dtypes, optional arguments and sets of gradients.

These tests look for structural bugs (a mask, a stride, an absent argument), so one wide limit is enough. The file of
each op tests its accuracy. THOROUGH=1 (as in CI) draws 500 cases for each op instead of 20.
"""

import math
import os

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

from vit import kernels  # noqa: E402
from vit.kernels import reference  # noqa: E402

EXAMPLES = 500 if os.environ.get("THOROUGH") else 20

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "transposed", "inside NaN", "every other column"]
small, batch = st.integers(1, 20), st.integers(0, 3)
# Widths of a LayerNorm. Two or three numbers may have nearly no variance, and then no limit fits.
widths = st.integers(8, 130)


def lay_out(t, layout):
    """The same values with other strides, or at an offset in a buffer whose rest is NaN."""
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "inside NaN":
        outer = t.new_full([n + 2 for n in t.shape], float("nan"))
        inner = outer[tuple(slice(1, n + 1) for n in t.shape)]
    elif layout == "every other column":
        inner = t.new_full([*t.shape[:-1], 2 * t.shape[-1]], float("nan"))[..., ::2]
    else:
        return t
    return inner.copy_(t)


@st.composite
def maybe(draw, shape):
    return draw(st.sampled_from([None, shape]))


@st.composite
def layer_norm_cases(draw):
    width = draw(widths)
    shape = (*draw(st.sampled_from([(), (draw(batch),), (draw(batch), draw(small))])), width)
    return {"x": shape, "weight": draw(maybe((width,))), "bias": draw(maybe((width,)))}, {}


@st.composite
def drop(draw):
    """Options without or with dropout."""
    if draw(st.booleans()):
        return {}
    seed = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))])
    return {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "seed": seed, "offset": draw(st.integers(0, 2**31 - 1))}


@st.composite
def residual_cases(draw):
    B, N, D = draw(batch), draw(small), draw(widths)
    shapes = {"residual": (B, N, D), "branch": (B, N, D)}
    shapes |= {name: draw(maybe((D,))) for name in ("weight", "bias", "branch_bias", "gamma")}
    scale = torch.randint(3, (B,)).float() if draw(st.booleans()) else None
    return shapes, {"row_scale": scale} | draw(drop())


@st.composite
def linear_cases(draw):
    rows = draw(st.sampled_from([(), (draw(batch),), (draw(batch), draw(small))]))
    K, N = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    activation = draw(st.sampled_from([None, "gelu", "gelu_tanh", "quick_gelu"]))
    return {"x": (*rows, K), "weight": (N, K), "bias": draw(maybe((N,)))}, {"activation": activation}


@st.composite
def mlp_cases(draw):
    rows = draw(st.sampled_from([(), (draw(batch),), (draw(batch), draw(small))]))
    D, H, E = (draw(st.integers(1, 70)) for _ in range(3))
    shapes = {"x": (*rows, D), "fc1_weight": (H, D), "fc1_bias": draw(maybe((H,)))}
    shapes |= {"fc2_weight": (E, H), "fc2_bias": draw(maybe((E,)))}
    return shapes, {"activation": draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu"]))} | draw(drop())


head_dims = st.sampled_from([16, 24, 32, 40, 72])
scales = st.sampled_from([None, 0.05, 1.0])


@st.composite
def attention_qkvpacked_cases(draw):
    shape = (draw(batch), draw(st.integers(1, 40)), 3, draw(st.integers(1, 2)), draw(head_dims))
    return {"qkv": shape}, {"scale": draw(scales)} | draw(drop())


@st.composite
def attention_cases(draw):
    B, HEADS, E = draw(batch), draw(st.integers(1, 2)), draw(head_dims)
    NQ, NK = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    shapes = {"q": (B, NQ, HEADS, E), "k": (B, NK, HEADS, E), "v": (B, NK, HEADS, E)}
    return shapes, {"scale": draw(scales)} | draw(drop())


@st.composite
def attention_statistics_cases(draw):
    B, HEADS, E = draw(batch), draw(st.integers(1, 2)), draw(head_dims)
    rows, columns, prefix = draw(st.integers(0, 8)), draw(st.integers(1, 8)), draw(st.sampled_from([0, 1, 5]))
    options = {"grid_size": (rows, columns), "num_prefix_tokens": prefix, "scale": draw(scales)}
    options |= {"patch_size": draw(st.sampled_from([(1, 1), (0.9, 0.3)])), "received": draw(st.booleans())}
    return {name: (B, prefix + rows * columns, HEADS, E) for name in "qk"}, options


@st.composite
def patch_embed_cases(draw):
    B, C, D = draw(batch), draw(st.integers(1, 4)), draw(st.integers(1, 70))
    ph, pw = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    gh, gw = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    N, prefix = gh * gw, draw(st.integers(0, 3))
    pos = draw(st.sampled_from([None, (1, N, D), (1, prefix + N, D)]))
    shapes = {"image": (B, C, gh * ph, gw * pw), "weight": (D, C, ph, pw), "bias": draw(maybe((D,)))}
    shapes |= {"pos_embed": pos, "prefix": (1, prefix, D) if prefix else None}
    if draw(st.booleans()):
        return shapes, {}
    return shapes | {"mask_token": (1, 1, D)}, {"bool_masked_pos": torch.rand(B, N) < 0.5}


@st.composite
def dropout_cases(draw):
    shape = (*draw(st.sampled_from([(), (draw(batch),), (draw(batch), draw(small))])), draw(st.integers(1, 130)))
    drawn = draw(drop())
    return {"x": shape}, {"p": drawn.pop("dropout_p", 0.0)} | (drawn or {"seed": None})


CASES = {
    "layer_norm": (layer_norm_cases, reference.layer_norm),
    "residual_layer_norm": (residual_cases, reference.residual_layer_norm),
    "linear": (linear_cases, reference.linear),
    "mlp": (mlp_cases, reference.mlp),
    "attention_qkvpacked": (attention_qkvpacked_cases, reference.attention_qkvpacked),
    "attention": (attention_cases, reference.attention),
    "attention_statistics": (attention_statistics_cases, reference.attention_statistics),
    "patch_embed": (patch_embed_cases, reference.patch_embed),
    "dropout": (dropout_cases, reference.dropout),
}


def results(fn, values, options, dtype, wanted, cotangent):
    """Outputs and the gradients of ``wanted`` by name. Asserts that no other input got one."""
    to = {n: None if t is None else t.to(dtype).requires_grad_(n in wanted) for n, t in values.items()}
    options = {
        n: o.to(dtype) if isinstance(o, torch.Tensor) and o.is_floating_point() else o for n, o in options.items()
    }
    outs = fn(**to, **options)
    outs = tuple(o for o in outs if o is not None) if isinstance(outs, tuple) else (outs,)
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    if wanted:
        live = [(o, cotangent(i, o)) for i, o in enumerate(outs) if o.requires_grad]
        if fn.__module__ != __name__:  # eager products of 16 bits may give NaN where only the memory around dy has NaN
            live = [(o, dy.contiguous()) for o, dy in live]
        torch.autograd.backward(*zip(*live, strict=True))
    for n, t in to.items():
        assert t is None or (t.grad is not None) == (n in wanted), f"gradient of {n}"
    return found | {f"gradient of {n}": to[n].grad for n in wanted}


@pytest.mark.parametrize("op", CASES)
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_op(op, device, data):
    cases, reference_op = CASES[op]
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shapes, options = draw(cases())
    dtype = draw(st.sampled_from(DTYPES))
    options = {n: o.to(device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    layouts = {n: draw(st.sampled_from(LAYOUTS)) for n, shape in shapes.items() if shape is not None}
    present = sorted(layouts)
    wanted = [n for n in present if op != "attention_statistics" and draw(st.booleans())]
    values = {}
    for n, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if shape is not None and n.endswith("weight") and len(shape) > 1 else 1
        values[n] = None if shape is None else (torch.randn(shape) * fan_in**-0.5).to(device, dtype)
    flat = draw(st.booleans())  # the gradient of .sum().backward(), with stride 0
    layout = draw(st.sampled_from(LAYOUTS))

    def cotangent(i, out):
        if flat:
            return out.new_ones(()).expand(out.shape)
        t = torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out.device, dtype).to(out.dtype)
        return lay_out(t, layout) if t.dim() else t

    def plain(t):
        return None if t is None else t.clone()

    laid = {n: None if t is None else lay_out(t.clone(), layouts[n]).detach() for n, t in values.items()}
    before = {n: plain(t) for n, t in laid.items()}
    ours_op = getattr(kernels, op)
    ours = results(lambda **a: ours_op(**a, impl="triton"), laid, options, dtype, wanted, cotangent)
    for n, t in laid.items():
        assert t is None or torch.equal(t, before[n]), f"{n} was changed"
    eager, exact = (
        results(reference_op, {n: plain(t) for n, t in values.items()}, options, to, wanted, cotangent)
        for to in (dtype, torch.float64)
    )
    for n, want in exact.items():
        assert ours[n].shape == want.shape and ours[n].dtype is eager[n].dtype, n
        if want.numel() == 0:
            continue
        error, error_eager = ((t[n].double() - want).abs().max().item() for t in (ours, eager))
        limit = 4 * error_eager + 4 * torch.finfo(dtype).eps * want.abs().max().item()
        # In a small tensor eager PyTorch may have no error at all, by chance.
        size = max(1.0, *(t.abs().max().item() for t in exact.values() if t.numel()))  # inputs are of size 1
        limit += 4 * torch.finfo(dtype).eps * size
        if op.startswith("attention"):
            # dS = P * (dP - delta): dP and delta are fp32 sums over the head. With one key their difference is only
            # rounding, which the scale and the product with q or k multiply.
            head_dim = next(reversed(shapes.values()))[-1]
            scale = options["scale"] or head_dim**-0.5
            limit += 12 * torch.finfo(dtype).eps * size + 4 * torch.finfo(torch.float32).eps * scale * head_dim
        assert error <= limit, f"{n}: {error:.2e}, eager {error_eager:.2e}, limit {limit:.2e}"
