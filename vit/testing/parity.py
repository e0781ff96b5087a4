"""Parity of whole models: errors of the output and of every gradient against fp64, compared with eager PyTorch.

`vit demo` compares the model of this package with `vit.reference`. `vit parity` and `vit.testing.assert_parity` compare
an accelerated model of another library with the original.

Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vit.adapters import accelerate, restore
from vit.analysis import image_size
from vit.config import ViTConfig
from vit.kernels.runtime import Impl
from vit.model import VisionTransformer
from vit.reference import VisionTransformer as Reference
from vit.testing.policy import FACTORS, Report, Tally, require

Progress = Callable[[str], contextlib.AbstractContextManager[Any]]

# The groups of the table, and patterns for the names of this package, timm, Hugging Face and torchvision.
GROUPS = {
    "attention pool": r"^attn_pool\.",
    "patch_embed": r"patch_embed|conv_proj\.",
    "class, register and position tokens": r"_tokens?$|pos_embed|position_embeddings",
    "attn.qkv": r"(qkv|[qkv]_proj|attention\.(query|key|value))\.|in_proj_",
    "attn.proj": r"(attn\.proj|o_proj|out_proj|self_attn\.projection|attention\.output\.dense)\.",
    "mlp.fc1": r"(mlp\.(fc1|0)|intermediate\.dense)\.",
    "mlp.fc2": r"(mlp\.(fc2|3)|output\.dense)\.",
    "norms": r"norm|\bln(_\d)?\.",
    "LayerScale": r"\bls\d\.|layer_scale\d\.",
    "head": r"head|pre_logits|classifier|pooler|decoder",
}
# Tensors that are judged as one, because the exact gradient of a key bias is zero (see `parity`).
TOGETHER = (
    (r"\b([qkv]_proj|query|key|value)\.bias$", "qkv.bias"),
    (r"\b[qk]_norm\.bias$", "q_norm.bias and k_norm.bias"),
)
OUTPUTS = ("logits", "last_hidden_state", "output")


@dataclasses.dataclass
class Models:
    """Three models with the same weights, and the cotangent of their output."""

    fast: nn.Module
    eager: nn.Module
    exact: nn.Module | None
    direction: Tensor  # cotangent, of the output's shape
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of each call


def widen(model: nn.Module, generator: torch.Generator) -> None:
    """Adds noise to every parameter. At 0 or 1, an error in the use of a bias, norm or token would not show.

    The noise also widens the usual initialisation from a std of 0.02 to 0.054. With 0.02, attention is nearly uniform.
    """
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.05)


def make_models(config: ViTConfig, images: Tensor) -> Models:
    """This package's model and its reference, with random weights from `widen`."""
    like, generator = {"device": images.device, "dtype": images.dtype}, torch.Generator().manual_seed(0)
    eager = Reference(config, seed=0)
    widen(eager, generator)
    eager.to(**like)
    fast = VisionTransformer(config, seed=0, **like)
    fast.load_state_dict(eager.state_dict())
    direction = torch.randn(len(images), config.num_classes, generator=generator).to(**like)
    return Models(fast, eager, copy.deepcopy(eager).double(), direction)


def copies(model: nn.Module, images: Tensor, impl: str = "auto", **options: Any) -> Models:
    """Three copies of a model: accelerated, original, and original in fp64. The first two have the images' dtype.

    The copies are in eval(), without dropout. ``model`` does not change. For a model of this package, the original is
    `vit.reference`.
    """
    if isinstance(model, VisionTransformer):
        # The constructors of PyTorch's layers draw from the global generator, and the caller's numbers stay.
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            eager = Reference(model.config, seed=0)
            fast = VisionTransformer(dataclasses.replace(model.config, impl=impl), seed=0)
        for twin in (eager, fast):
            twin.load_state_dict(model.state_dict())
            twin.eval().to(images.device, images.dtype)
    else:
        eager = restore(copy.deepcopy(model)).eval().to(images.device, images.dtype)
        fast = accelerate(copy.deepcopy(eager), impl)
    exact = copy.deepcopy(eager).double()
    with torch.no_grad():
        shape = output_of(eager(images, **options))[1].shape
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(images)
    return Models(fast, eager, exact, direction, options)


def example(model: nn.Module, batch: int = 2, img_size: tuple[int, int] | None = None) -> Tensor:
    """Random images [B, C, H, W] of the model's input size, on its device and in its dtype.

    Raises:
        ValueError: the model does not state its input size.
    """
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(getattr(model, "config", None), "in_chans", None) or getattr(conv, "in_channels", None)
    img_size = img_size or image_size(model)
    if channels is None or img_size is None:
        raise ValueError(f"{type(model).__name__} does not say which images it takes; pass an image [B, C, H, W]")
    shape = (batch, channels, *img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))


def output_of(returned: Any) -> tuple[str, Tensor]:
    """The first tensor that a model returned, and its name, one of `OUTPUTS`."""
    if isinstance(returned, Mapping):
        name = next(name for name, value in returned.items() if isinstance(value, Tensor) and value.dim())
        return name if name in OUTPUTS else "output", returned[name]
    return "logits", returned[0] if isinstance(returned, tuple) else returned


def results(model: nn.Module, images: Tensor, direction: Tensor, **options: Any) -> dict[str, Tensor | None]:
    """The output, and the gradients of (output · direction).sum() for the images and the parameters that require grad.

    The gradient of an unused parameter is None. A fixed direction replaces the loss, so every logit counts and the
    backward of each model starts from the same numbers.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    dtype = next(model.parameters()).dtype
    images = images.detach().to(dtype, copy=True).requires_grad_()
    name, output = output_of(model(images, **options))
    wanted = [images, *params.values()]
    grads = torch.autograd.grad(output, wanted, direction.to(dtype), allow_unused=True)
    return {name: output.detach()} | dict(zip(["image", *params], grads, strict=True))


def parity(models: Models, images: Tensor, progress: Progress = contextlib.nullcontext, draws: int = 1) -> list[Report]:
    """Measures the errors of the output and of every gradient.

    The exact gradient of the key bias is zero, because softmax ignores a constant per row. So its computed gradient is
    rounding noise. It is judged together with the query and value bias, which set the scale of the allowed error. A
    wrong, large gradient of the key bias still fails.

    Parameters that no model used are ignored. A parameter that only some models used fails.

    Args:
        models: the three models.
        images: [B, C, H, W] in the dtype to test.
        progress: called with a text; the result is a context manager around each step.
        draws: number of draws, see `enough_draws`. Each has its own direction and shifted images.

    Returns:
        One report for each tensor.
    """
    tallies: dict[str, Tally] = {}
    three = (("this package", models.fast), ("eager PyTorch", models.eager), ("fp64", models.exact))
    for draw in range(draws):
        found = []
        whole, each = (contextlib.nullcontext, progress) if draws == 1 else (progress, contextlib.nullcontext)
        with whole(f"forward and backward of all three, draw {draw + 1} of {draws}"):
            for label, model in three:
                with each(f"forward and backward, {label}"), _ieee_convolutions(images.dtype):
                    shifted, direction = images.roll(5 * draw, dims=3), models.direction.roll(draw)
                    found.append(results(model, shifted, direction, **models.options))
                    if images.is_cuda:
                        torch.cuda.synchronize()
        found = [_together(result) for result in _comparable(found)]
        for name, exact in found[2].items():
            if any(result[name].any() for result in found):
                tallies.setdefault(name, Tally(name, "model")).add(found[0][name], found[1][name], exact)
    return [tally.report() for tally in tallies.values()]


@contextlib.contextmanager
def _ieee_convolutions(dtype: torch.dtype) -> Iterator[None]:
    """Switches cuDNN off for fp32. Its tf32 is on by default, and eager PyTorch's patch convolution would be inexact.

    Without cuDNN the convolution is a matrix product with the same precision as ours. The precision settings themselves
    cannot be restored: a read also returns inherited values, and ``allow_tf32`` raises after use of the newer API.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and dtype is not torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _comparable(found: list[dict[str, Tensor | None]]) -> list[dict[str, Tensor]]:
    """Removes tensors that no model used. NaN, which fails, replaces a tensor that only other models used."""
    used = {name: t for result in found for name, t in result.items() if t is not None}
    comparable = []
    for result in found:
        dtype = next(iter(result.values())).dtype  # of the output
        names = [name for name in result if name in used]
        missing = {n: torch.full_like(used[n], torch.nan, dtype=dtype) for n in names if result[n] is None}
        comparable.append({n: missing.get(n, result[n]) for n in names})
    return comparable


def enough_draws(models: Models) -> int:
    """The number of draws for a stable verdict: 32 below 10 M parameters, else 8.

    The elements of a tensor have earlier rounding errors in common, so the error of one draw varies by chance, whatever
    the size of the tensor. Small models vary most, because their sums are short. PyTorch itself, with another order of
    summation, exceeds the limits in one draw of many small models, and in 8 draws of a few, in fp32 and in bf16.
    """
    return 32 if sum(p.numel() for p in models.eager.parameters()) < 10e6 else 8


def _together(result: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, list[Tensor]] = {}
    for name, tensor in result.items():
        for pattern, common in TOGETHER:
            name = re.sub(pattern, common, name)
        tensors.setdefault(name, []).append(tensor)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in tensors.items()}


def group_of(name: str) -> str:
    """The table's group for a tensor. If no group fits: its name with * for numbers."""
    return next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), re.sub(r"\d+", "*", name))


def table(reports: list[Report]) -> str:
    """The report as text: the worst tensor of each group, the first five tensors that failed, and the verdict."""
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(group_of(report.name), []).append(report)
    lines = [
        "Error against fp64 (root mean square) of the worst tensor of each group, and eager PyTorch's of the same:",
        f"  {'':<48}{'tensors':>8}{'ours':>11}{'eager':>11}{'limit':>11}  verdict",
    ]
    for group, members in groups.items():
        worst = max(members, key=lambda r: (not r.ok, r.share))
        label = group if group in OUTPUTS else f"gradient of {group}"
        figures = "".join(f"{figure:>11.2e}" for figure in (worst.rms, worst.rms_eager, worst.rms_limit))
        lines.append(f"  {label:<48}{len(members):>8}{figures}  {'pass' if worst.ok else 'FAIL'}")
    failed = [report for report in reports if not report.ok]
    lines += [f"  FAIL {report}" for report in failed[:5]]
    verdict = "FAIL" if failed else "pass"
    lines.append(f"Parity: {verdict}, {len(reports) - len(failed)} of {len(reports)} tensors within all limits")
    return "\n".join(lines)


def assert_parity(
    model: nn.Module,
    image: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> list[Report]:
    """Asserts that `vit.accelerate` keeps the results of a timm, Hugging Face or torchvision model, for your own tests.

    It compares an accelerated copy and an eager copy with an fp64 copy: the output, the gradient of the image and the
    gradient of every parameter that requires grad. It takes several draws of the cotangent, with shifted images. All
    copies are in eval(), and ``model`` does not change. An fp32 model needs the memory of eight more such models.

        from vit.testing import assert_parity
        def test_fused_ops():
            model = timm.create_model("vit_base_patch16_224", pretrained=True).cuda()
            assert_parity(model, dtype=torch.bfloat16, impl="triton")

    Args:
        model: a model for `vit.accelerate`, or a `vit.VisionTransformer`.
        image: [B, C, H, W]; None means two random images of the model's input size.
        dtype: fp32, fp16 or bf16; None means the dtype of the model's parameters.
        impl: path of every op. Without a GPU, "auto" is plain PyTorch and tests no kernel.

    Returns:
        One report for each tensor.

    Raises:
        AssertionError: a tensor exceeds a limit; the message has a line for each such tensor.
        ValueError: the model has no block to accelerate, ``image`` is None and the model does not state its input size,
            or the dtype is another one.
    """
    param = next(model.parameters())
    image = (example(model) if image is None else image).to(param.device, dtype or param.dtype)
    if ("model", image.dtype) not in FACTORS:
        raise ValueError(f"assert_parity: dtype must be float32, float16 or bfloat16, got {image.dtype}")
    models = copies(model, image, impl)
    return require(parity(models, image, draws=enough_draws(models)))
