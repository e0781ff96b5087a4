"""The gate of `vit.kernels.gemm_pingpong`, which no test on a CPU computes with: it is turned on only if this passes.

Each product by both kernels, with all that its epilogue can do: against fp64 no worse than the kernel that is on, and
the same bits 20 times in memory of NaN. On another GPU than Hopper both are the one that is on.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu_stages import cases
from benchmarks.gpu_stages.exact import nan_outputs
from benchmarks.log import Log, name_of
from benchmarks.variants import configured
from vit.kernels import configs, reference, runtime
from vit.kernels.checks import ACTIVATIONS
from vit.kernels.linear import gemm

# Rows, columns, summed: ViT-B's fc1 at batch 32, SO400M's at 8, one image, ragged in every direction, less than one
# tile, less than one step.
SIZES = ((6304, 3072, 768), (5832, 4304, 1152), (197, 3072, 768), (1001, 1000, 200), (9, 16, 64), (700, 520, 24))
FORMS = ("plain", "gelu", "gelu and h", "dgelu", "dgelu and sums", "dgelu and all")


def pingpong(log: Log, rehearse: bool) -> None:
    device, times = cases.device(rehearse), 2 if rehearse else 20
    for dtype in (torch.float32,) if rehearse else (torch.bfloat16, torch.float16):
        for sizes in SIZES[4:5] if rehearse else SIZES:
            for form in FORMS:
                for activation in ACTIVATIONS if sizes == SIZES[2] else ACTIVATIONS[:1]:
                    compare = functools.partial(_compare, sizes, dtype, device, form, activation, times)
                    log.attempt(compare, sizes=list(sizes), dtype=name_of(dtype), form=form, activation=activation)


def _compare(
    sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device, form: str, activation: str, times: int
) -> dict[str, Any]:
    (M, N, K), generator = sizes, torch.Generator(device).manual_seed(0)
    shapes = [(M, K), (N, K), (N,), (M, N)]
    a, weight, bias, pre = (torch.randn(s, generator=generator, device=device).to(dtype) for s in shapes)
    weight *= K**-0.5
    launched = []

    def product() -> list[Tensor]:
        if form.startswith("dgelu"):
            wanted = {"aux": form == "dgelu and all", "sums": form != "dgelu"}
            return list(gemm(a, weight.t().contiguous(), None, activation, pre, **wanted))
        return list(gemm(a, weight, bias, None if form == "plain" else activation, trans_b=True, aux="h" in form[4:]))

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.__name__)
        plain_launch(kernel, *args, **kwargs)

    arch, plain_launch = runtime.arch(device), runtime.launch
    pinned = configs.gemm(arch, dtype, runtime.precision(dtype))
    with configured("gemm", dataclasses.replace(pinned, pingpong=False)):
        theirs = product()
    with configured("gemm", dataclasses.replace(pinned, pingpong=True)), nan_outputs():
        with patch.object(runtime, "launch", launch):
            ours = product()
        found = cases.same_bits(ours, (product() for _ in range(times)))
    expected = "_gemm_pingpong_kernel" if arch == 90 else "_gemm_kernel"
    found |= {"kernel": launched, "ok": found["ok"] and launched == [expected]}
    for name, x, y, exact in zip(
        ("out", "aux", "sums"), ours, theirs, _exact(a, weight, bias, pre, form, activation), strict=True
    ):
        if x.numel():
            rms, limit = ((t.double() - exact).square().mean().sqrt().item() for t in (x, y))
            found |= {f"{name}_rms": rms, f"{name}_rms_of_gemm": limit, "ok": found["ok"] and rms <= 1.02 * limit}
    return found


def _exact(a: Tensor, weight: Tensor, bias: Tensor, pre: Tensor, form: str, activation: str) -> list[Tensor]:
    """out, aux and sums in fp64."""
    product = a.double() @ weight.double().t()
    leaf = (pre.double() if form.startswith("dgelu") else product + bias.double()).requires_grad_()
    gelu = reference.gelu(leaf, activation)
    if form.startswith("dgelu"):
        out = product * torch.autograd.grad(gelu.sum(), leaf)[0]
        return [out, gelu.detach(), out.sum(dim=0)]
    return [(leaf if form == "plain" else gelu).detach(), leaf.detach(), product.new_empty(0)]
