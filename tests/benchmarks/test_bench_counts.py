"""Counted bytes and FLOPs are compared with PyTorch's counter, with figures by hand, and with each other."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vit
from benchmarks import (
    bench_attention,
    bench_layer_norm,
    bench_linear,
    bench_mlp,
    bench_patch_embed,
    bench_vit,
    devices,
    memory,
    trace,
)
from benchmarks.harness import Ceilings
from benchmarks.records import ResultError
from benchmarks.shapes import MODELS
from vit import kernels

B16 = MODELS["B/16"]
OF_OPS = [bench_layer_norm, bench_linear, bench_mlp, bench_attention, bench_patch_embed]
OPS = {bench.op: bench for module in OF_OPS for bench in module.BENCHES}


def meta(*sizes, scale=1.0, dtype=torch.bfloat16):
    return torch.empty(sizes, device="meta", dtype=dtype)


def model(shape, kind=vit.VisionTransformer):
    with torch.device("meta"):
        made = kind(shape.config).to(torch.bfloat16)
    return made, meta(shape.batch, 3, *shape.config.img_size)


class AllTokens(vit.VisionTransformer):
    """The model computes all tokens in the last block, because a method is replaced."""

    def forward_features(self, *args, **options):
        return super().forward_features(*args, **options)


def total(launches, field, phase=None):
    return sum(getattr(launch, field) for launch in launches if phase in (None, launch.phase))


# Bytes of a block in u, one token matrix. The hidden matrix is 4u.
OURS = {
    "fwd": 4 + 4 + 2 + 4 + 5 + 5 + 4,  # qkv, attention, proj, add + norm, fc1 with GELU, fc2, add + norm
    "kept": 4,  # pre-activations
    # fc2: dgrad with dGELU and fc1's bias, wgrad, bias. fc1: dgrad, its input again, wgrad. Then norm, proj, attention
    # with delta, qkv with its input again and norm.
    "bwd": 13 + 5 + 1 + 5 + 2 + 5 + 4 + 2 + 2 + 1 + 7 + 2 + 4 + 2 + 4 + 3 + 4,
    "per query": 6,  # fp32 statistics of attention's backward
    "partials": 2,  # fp32 sums for fc1's bias, per tile of 128 rows
    "tokens": 1,  # written by the stem
    "once": 2,  # the first norm adds no residual gradient, so the sum is a separate pass
}
EAGER = {
    "fwd": 4 + 4 + 2 + 3 + 2 + 5 + 8 + 5 + 3 + 2,  # adds, norms and GELU are separate passes
    "kept": 0,
    # dGELU 12, each norm 3 and each sum of gradients 3. To stack dq, dk, dv and copy the stack takes 12.
    "bwd": 5 + 12 + 5 + 1 + 5 + 5 + 4 + 6 + 2 + 2 + 1 + 8 + 12 + 4 + 4 + 3 + 6,
    "tokens": 1 + 2 + 2,  # the projection, the class token, the position embedding
    "once": 0,
}


def by_hand(shape, units, phase, train=False):
    """Bytes of a model in bf16, with fp32 statistics and partial sums in the backward."""
    c, d, u = shape.config, shape.width, 2 * shape.rows * shape.width
    patches = 3 * c.patch_size[0] * c.patch_size[1]
    image, stem = 2 * shape.batch * c.num_patches * patches, 2 * patches * d
    head = 2 * (shape.batch * d + d * c.num_classes + shape.batch * c.num_classes)
    weights = 2 * (4 * d * d + 2 * d * shape.hidden)  # of a block
    if phase == "fwd":
        moved = c.depth * (u * (units["fwd"] + units["kept"] * train) + weights) + u * (units["tokens"] + 2)
        return moved + image + stem + head
    # Backward: the zeros around the gradient of the class token, the last norm, the bias and the weight of the stem.
    per_query, partials = 4 * shape.rows * shape.heads, 4 * shape.hidden * -(-shape.rows // 128)
    small = units.get("per query", 0) * per_query + units.get("partials", 0) * partials
    moved = c.depth * (u * units["bwd"] + small + 2 * weights) + u * (units["once"] + 1 + 3 + 1 + 1)
    return moved + image + stem + 2 * head


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AllTokens, vit.reference.VisionTransformer])
def test_flops_against_pytorchs_counter(kind):
    """PyTorch's counter runs without our tracing. Its attention is not fused and has four products in the backward."""
    shape = dataclasses.replace(B16, batch=2)
    reference, image = model(shape, vit.reference.VisionTransformer)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        reference(image)
    with FlopCounterMode(display=False) as both:
        out = reference(image)
        torch.autograd.grad(out, list(reference.parameters()), torch.empty_like(out))
    launches = trace.trace(*model(shape, kind), train=True)
    assert total(launches, "flops", "fwd") == forward.get_total_flops()
    logits_again = 2 * shape.rows * shape.tokens * shape.width * shape.config.depth
    assert total(launches, "flops") == both.get_total_flops() + logits_again


@pytest.mark.parametrize(("queries", "keys"), [(1, 17), (33, 7), (20, 20)])
def test_flops_of_attention_by_hand(queries, keys):
    """Attention has two products forward and five backward, each of queries x keys."""
    q, k, v = (meta(2, n, 4, 64).requires_grad_() for n in (queries, keys, keys))
    launches = trace.trace(kernels.attention, q, k, v, train=True)
    product = 2 * 2 * 4 * 64 * queries * keys
    assert total(launches, "flops", "fwd") == 2 * product
    assert total(launches, "flops", "bwd") in (5 * product, 7 * product)  # a separate kernel for dq recomputes two


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_one_launch_by_hand():
    rows, width = 4 * 197, 768
    x, branch, w, b = meta(4, 197, 768), meta(4, 197, 768), meta(768), meta(768)
    (launch,) = trace.trace(kernels.residual_layer_norm, x, branch, w, b)
    assert launch.bytes == (4 * rows * width + 2 * width) * 2 and launch.flops == 0
    (launch,) = trace.trace(kernels.attention_qkvpacked, meta(4, 197, 3, 12, 64))
    assert launch.bytes == 4 * rows * width * 2 and launch.flops == 4 * rows * 197 * width
    gelu = trace.trace(kernels.mlp, x, meta(3072, 768), meta(3072), meta(768, 3072), b)[0]
    assert gelu.bytes == (rows * 768 + 3072 * 768 + 3072 + rows * 3072) * 2 and gelu.flops == 2 * rows * 768 * 3072


def test_regions_are_counted_once():
    x = meta(8, 16, 4)
    assert trace.moved([x, x, x.view(8, 64)[:, :64].view(8, 16, 4)]) == x.nbytes
    assert trace.moved([x[0], x[0], x[1]]) == x.nbytes // 4  # views of a part
    assert trace.moved(x.unbind(2)) == x.nbytes and trace.moved([x[:2], x[1:]]) == x.nbytes  # at most its storage
    assert trace.moved([meta(1, 4).expand(100, 4)]) == 4 * 2 and trace.moved([meta(0, 4)]) == 0
    assert trace.moved([x], [x]) == 2 * x.nbytes
    assert trace.moved([x[:1].expand(8, 16, 4)]) == x.nbytes // 8  # although the storage is larger


@pytest.mark.parametrize(
    ("operation", "moved"),
    [
        (lambda x, y: x.view(-1)[3:].detach(), 0),
        (lambda x, y: torch.empty_like(x).new_empty(9), 0),
        (lambda x, y: x.t().contiguous(), 2),
        (lambda x, y: x.contiguous(), 0),
        (lambda x, y: x + y, 3),
        (lambda x, y: x.add_(y), 3),
        (lambda x, y: x.copy_(y), 2),
        (lambda x, y: x.zero_(), 1),
        (lambda x, y: torch.zeros_like(x), 1),
        (lambda x, y: torch.add(x, x, out=y), 2),
        (lambda x, y: torch.matmul(x, y), 3),
    ],
)
def test_bytes_of_pytorchs_operations(operation, moved):
    x, y = meta(64, 64), meta(64, 64)
    assert total(trace.trace(operation, x, y), "bytes") == moved * x.nbytes


@pytest.mark.parametrize("op", OPS)
def test_floors_of_the_op_benchmarks(op):
    """The FLOPs are those of the launches. The bytes are at most theirs, and the same if an op is one kernel."""
    shape, bench = dataclasses.replace(B16, batch=64), OPS[op]
    work = bench.work(shape, 2)
    tensors = {k: t.requires_grad_() for k, t in bench.inputs(shape, meta).items()}
    with trace.recording() as forward, torch.no_grad():
        bench.providers["ours"](**tensors)
    with trace.recording() as both:
        outs = bench.providers["ours"](**tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.autograd.grad(outs, list(tensors.values()), [torch.empty_like(o) for o in outs])
    assert total(forward, "flops") == work["fwd"].flops
    assert total(both, "flops", "bwd") == work["bwd"].flops
    assert total(forward, "bytes") >= work["fwd"].bytes and total(both, "bytes", "bwd") >= 0.999 * work["bwd"].bytes
    if op != "mlp":  # the floor assumes that it is not stored
        assert total(forward, "bytes") == pytest.approx(work["fwd"].bytes, rel=1e-3)


# ---- whole models against the count by hand --------------------------------------------------------------------------


def check(kind, units):
    for train, phase, tolerance in ((False, "fwd", 2e-3), (True, "fwd", 4e-3), (True, "bwd", 6e-3)):
        moved = total(trace.trace(*model(B16, kind), train=train), "bytes", phase)
        assert moved == pytest.approx(by_hand(B16, units, phase, train), rel=tolerance), phase


@pytest.mark.parametrize(("kind", "units"), [(AllTokens, OURS), (vit.reference.VisionTransformer, EAGER)])
def test_models_move_what_is_counted_by_hand(kind, units):
    check(kind, units)


@pytest.mark.parametrize("mistake", ["an output is left out", "a tensor counts twice", "a pass is fused that is not"])
def test_mistakes_are_noticed(mistake, monkeypatch):
    moved = trace.moved
    if mistake == "an output is left out":
        monkeypatch.setattr(trace, "moved", lambda reads, writes=(): moved(reads))
    elif mistake == "a tensor counts twice":
        monkeypatch.setattr(trace, "moved", lambda reads, writes=(): sum(t.nbytes for t in [*reads, *writes] * 2))
    with pytest.raises(AssertionError):
        check(AllTokens, OURS | ({"fwd": 26} if "fused" in mistake else {}))  # residual in an epilogue


@pytest.mark.parametrize("train", [False, True])
def test_the_floor_of_a_model_counts_the_class_token_of_the_last_block_alone(train):
    """In the last block, q, the logits, the values, proj and the MLP have one row instead of 197."""
    work, pooled = bench_vit.work(B16, 2), dataclasses.replace(B16)
    found = total(trace.trace(*model(B16), train=train), "flops", "fwd")
    saved = 256 * 196 * (2 * 768 * (768 + 768 + 2 * 3072) + 2 * 2 * 197 * 768)
    assert found == work["fwd"].flops == total(trace.trace(*model(B16, AllTokens), train=train), "flops", "fwd") - saved
    assert work["bwd"].flops == 2 * work["fwd"].flops
    vars(pooled)["config"] = dataclasses.replace(B16.config, global_pool="avg")
    assert bench_vit.work(pooled, 2)["fwd"].flops == work["fwd"].flops + saved


def test_kernel_without_a_count_is_refused(monkeypatch):
    monkeypatch.delitem(trace.FLOPS, "_layer_norm_fwd_kernel")
    with pytest.raises(KeyError, match="_layer_norm_fwd_kernel has no count"):
        trace.trace(kernels.layer_norm, meta(4, 64))


def test_trace_leaves_everything_as_it_was():
    x = torch.ones(2, 4, 32)
    trace.trace(nn.Linear(32, 8, device="meta"), meta(2, 32, dtype=torch.float32), train=True)
    assert torch.equal(kernels.layer_norm(x), torch.zeros_like(x)) and torch.mm(x[0], x[0].mT).sum() == 4 * 4 * 32


@pytest.mark.peers
def test_timm_in_eager_mode_moves_what_the_reference_moves():
    import peers

    timm = peers.import_timm()
    shape = dataclasses.replace(B16, batch=64)
    with torch.device("meta"):
        theirs = timm.create_model(shape.model).to(torch.bfloat16)
    reference, image = model(shape, vit.reference.VisionTransformer)
    for train in (False, True):
        found, expected = (trace.trace(m, image, train=train) for m in (theirs, reference))
        assert total(found, "bytes") == total(expected, "bytes") and total(found, "flops") == total(expected, "flops")
    fused = trace.trace(vit.accelerate(theirs), image)
    copied = 2 * 64 * 196 * 768 * 2  # a copy of the patches, because the result has the strides of a convolution
    assert total(fused, "bytes") == pytest.approx(by_hand(shape, OURS, "fwd") + copied, rel=0.02)


# ---- cards -----------------------------------------------------------------------------------------------------------


def card(**limits):
    return devices.Device("any", 10, Ceilings(1.0, 1.0), "none", **limits)


@pytest.mark.parametrize(
    ("limits", "kernel", "blocks"),
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers, 128 and 320 threads.
        ({}, (37, 0, 4), 12),
        ({}, (37, 0, 10), 4),
        ({}, (32, 0, 4), 16),  # the same guide: 32 registers per thread allow full occupancy
        ({}, (33, 0, 4), 12),  # 1,280 registers per warp: 51 warps, in fours 48
        ({}, (16, 0, 1), 32),  # the limit of programs
        ({}, (255, 0, 8), 1),
        ({}, (255, 0, 4), 2),
        ({}, (16, 98_328, 8), 2),  # 2 · (98,328 + 1,024 and rounding) of 233,472 bytes
        ({"shared": 102_400}, (16, 98_328, 8), 1),
        ({"shared": 102_400}, (16, 101_376, 8), 1),  # the most that a program may have
        ({"shared": 102_400}, (16, 101_377, 8), 0),
        ({"max_warps": 48, "max_blocks": 24}, (16, 0, 4), 12),
    ],
)
def test_occupancy(limits, kernel, blocks):
    registers, shared, warps = kernel
    assert devices.occupancy(card(**limits), registers, shared, warps) == devices.Occupancy(blocks, blocks * warps)


def test_waves():
    assert devices.waves(264, 132) == (2.0, 1.0)
    assert devices.waves(198, 132) == (1.5, 0.5)
    assert devices.waves(66, 132) == (0.5, 0.5)
    assert devices.waves(133, 132) == (pytest.approx(1.0076, abs=1e-4), pytest.approx(1 / 132))


def test_rates_are_assumed_until_they_are_measured(tmp_path):
    h100, folder = devices.DEVICES[90], tmp_path / "sample"
    assert devices.ceilings(h100, tmp_path) == (Ceilings(798.0, 3000.0), "assumed, seen on one card")
    folder.mkdir()
    for utc, rates in (("2026-01-02", (700.0, 2900.0)), ("2026-01-01", (600.0, 2000.0))):
        ceiling = {"bench": "ceiling", "ok": True, "dtype": "bfloat16"}
        records = [{**ceiling, "op": "matmul", "tflops": rates[0]}, {**ceiling, "op": "copy", "gbps": rates[1]}]
        about = {"gpu": "SAMPLE, not a measurement (H100)", "utc": utc}
        (folder / f"bench_{utc}.json").write_text(json.dumps({"about": about, "records": records}))
    assert devices.ceilings(h100, tmp_path) == (Ceilings(700.0, 2900.0), "measured 2026-01-02")
    assert devices.ceilings(devices.DEVICES[80], tmp_path)[1] == "assumed, datasheet"
    (folder / "bench_vit.json").write_text('{"about": ')
    with pytest.raises(ResultError, match="is not whole JSON"):
        devices.ceilings(h100, tmp_path)


# ---- more of the counts ----------------------------------------------------------------------------------------------


def test_limits_of_the_cards():
    """The limits are those of NVIDIA's tables."""
    found = {
        arch: (c.name, c.num_sms, c.max_warps, c.max_blocks, c.shared, c.registers)
        for arch, c in devices.DEVICES.items()
    }
    assert found == {
        80: ("A100", 108, 64, 32, 164 * 1024, 2**16),
        89: ("RTX 4090", 128, 48, 24, 100 * 1024, 2**16),
        90: ("H100", 132, 64, 32, 228 * 1024, 2**16),
        100: ("B200", 148, 64, 32, 228 * 1024, 2**16),
    }
    rates = {arch: (c.assumed.tflops, c.assumed.gbps) for arch, c in devices.DEVICES.items()}
    assert rates == {80: (312, 2039), 89: (165.2, 1008), 90: (798, 3000), 100: (2250, 8000)}


def test_rates_of_another_card_are_not_taken(tmp_path):
    """A card is found by its name, whatever the case, and needs both rates."""
    for gpu, (tflops, gbps) in {"NVIDIA a100-SXM4": (250.0, 1700.0), "NVIDIA H100": (700.0, None)}.items():
        folder = tmp_path / gpu[-4:]
        folder.mkdir()
        common = {"bench": "ceiling", "ok": True, "dtype": "bfloat16"}
        found = [
            common | {"op": "matmul", "tflops": tflops},
            *([common | {"op": "copy", "gbps": gbps}] if gbps else []),
        ]
        (folder / "bench_x.json").write_text(json.dumps({"about": {"gpu": gpu, "utc": "2026-01-01"}, "records": found}))
    assert devices.ceilings(devices.DEVICES[80], tmp_path) == (Ceilings(250.0, 1700.0), "measured 2026-01-01")
    assert devices.ceilings(devices.DEVICES[90], tmp_path) == (devices.DEVICES[90].assumed, "assumed, seen on one card")


@pytest.mark.parametrize(
    ("options", "dtype", "name"),
    [
        ({}, torch.bfloat16, "_scaled_dot_product_flash_attention"),
        ({}, torch.float16, "_scaled_dot_product_flash_attention"),
        ({}, torch.float32, "_scaled_dot_product_efficient_attention"),
        ({"attn_mask": True}, torch.bfloat16, "_scaled_dot_product_efficient_attention"),
    ],
)
def test_which_attention_pytorch_would_take(options, dtype, name):
    q, k = meta(2, 4, 33, 64, dtype=dtype), meta(2, 4, 7, 64, dtype=dtype)
    if options:
        options = {"attn_mask": meta(2, 4, 33, 7, dtype=dtype)}
    launches = trace.trace(lambda q, k: torch.nn.functional.scaled_dot_product_attention(q, k, k, **options), q, k)
    (launch,) = [launch for launch in launches if launch.flops]
    assert launch.name == name and launch.flops == 4 * 2 * 4 * 33 * 7 * 64


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_flops_of_patches_by_hand(size):
    """Forward, dweight and dimage are one product each. Batch, channels, height, width and features all differ."""
    image, weight = meta(5, 2, *size).requires_grad_(), meta(24, 2, 16, 16).requires_grad_()
    pos, prefix = meta(1, 7, 24), meta(1, 1, 24)
    call = lambda image, weight: kernels.patch_embed(image, weight, None, pos, prefix)  # noqa: E731
    launches = trace.trace(call, image, weight, train=True)
    product = 2 * 5 * 6 * (2 * 16 * 16) * 24
    assert total(launches, "flops", "fwd") == product and total(launches, "flops", "bwd") == 2 * product


def test_a_step_walks_back_to_what_requires_a_gradient():
    """Without training there is no graph. .grad stays empty. Gradients of parameters come before those of inputs."""
    model, x = nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    model.bias.requires_grad_(False)
    assert trace.step(model, x, train=False).requires_grad is False
    out, grads = trace.step(model, x, train=True)
    assert out.requires_grad and [g.shape for g in grads] == [(3, 4), (2, 4)]
    assert model.weight.grad is None and x.grad is None
    launches = trace.trace(nn.Linear(4, 3, device="meta"), meta(2, 4, dtype=torch.float32))
    assert {launch.phase for launch in launches} == {"fwd"}


def test_a_launch_names_its_shapes_grid_and_phase():
    x, w, b = meta(4, 6, 64).requires_grad_(), meta(32, 64).requires_grad_(), meta(32)
    launches = trace.trace(lambda x: kernels.linear(x, w, b, impl="triton"), x, train=True)
    assert [launch.phase for launch in launches] == sorted((launch.phase for launch in launches), reverse=True)
    first = launches[0]
    assert (
        first.name == "_gemm_kernel" and first.flops == 2 * 24 * 32 * 64 and (24, 64) in [s[-2:] for s in first.shapes]
    )
    assert first.grid and first.args["M"] == 24 and first.options["num_warps"] >= 1
    (eager,) = trace.trace(lambda x: torch.nn.functional.gelu(x), meta(4, 6, 64))
    assert (eager.name, eager.grid, eager.kernel, eager.args, eager.shapes) == ("gelu", None, None, None, ((4, 6, 64),))


@pytest.mark.peers
@pytest.mark.parametrize(("train", "more"), [(False, 1.035), (True, 1.028)])
def test_accelerated_models_move_as_many_bytes(train, more):
    """Ours with all tokens in the last block, timm's, and Hugging Face's: the figures in `vit.adapters.huggingface`."""
    import peers

    peers.import_timm()
    peers.import_transformers()
    made = {name: memory.factory(name, B16)(256) for name in ("accelerated", "accelerated-hf")}
    with torch.device("meta"):
        made["ours"] = AllTokens(B16.config).to(torch.bfloat16), made["accelerated"][1]
    found = {name: total(trace.trace(*both, train=train, arch=90), "bytes") for name, both in made.items()}
    assert 1 < found["accelerated"] / found["ours"] < 1.03
    assert found["accelerated-hf"] / found["accelerated"] == pytest.approx(more, abs=5e-4)
