"""How far outputs and every gradient of a model on the fused ops are from fp64, beside the model it came from.

`vit demo` compares the model of this package with its reference; `vit parity` and `vit.testing.assert_parity` compare a
model of another library with itself, accelerated.

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
from vit.config import ViTConfig
from vit.kernels.runtime import Impl
from vit.model import VisionTransformer
from vit.reference import VisionTransformer as Reference
from vit.testing.policy import FACTORS, Report, Tally

Progress = Callable[[str], contextlib.AbstractContextManager[Any]]

# The groups of the table, and what the names in each have: this package's and timm's, Hugging Face's, torchvision's.
GROUPS = {
    "attention pool": r"^attn_pool\.",
    "patch_embed": r"patch_embed|conv_proj\.",
    "class, register and position tokens": r"_tokens?$|pos_embed|position_embeddings",
    "attn.qkv": r"(qkv|[qkv]_proj)\.|in_proj_",
    "attn.proj": r"(attn\.proj|o_proj|out_proj)\.",
    "mlp.fc1": r"mlp\.(fc1|0)\.",
    "mlp.fc2": r"mlp\.(fc2|3)\.",
    "norms": r"norm|\bln(_\d)?\.",
    "LayerScale": r"\bls\d\.|layer_scale\d\.",
    "head": r"head|pre_logits|classifier|pooler|decoder",
}
# Tensors judged as one: a bias of all keys has no gradient of its own (see `parity`).
TOGETHER = ((r"\b[qkv]_proj\.bias$", "qkv.bias"), (r"\b[qk]_norm\.bias$", "q_norm.bias and k_norm.bias"))
OUTPUTS = ("logits", "last_hidden_state", "output")


@dataclasses.dataclass
class Models:
    """Three models with the same weights, and the direction in which their output is differentiated."""

    fast: nn.Module
    eager: nn.Module
    exact: nn.Module | None
    direction: Tensor  # of the output's shape
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # keywords of each call


def widen(model: nn.Module, generator: torch.Generator) -> None:
    """Noise on every parameter, so that none is left at 0 or 1, where a bias, norm or token can be wrong unseen.

    It also widens the usual normal initialisation from 0.02 to 0.054; with 0.02, attention is nearly uniform.
    """
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.05)


def make_models(config: ViTConfig, images: Tensor) -> Models:
    """This package's model and its reference, with random weights that `widen` leaves."""
    like, generator = {"device": images.device, "dtype": images.dtype}, torch.Generator().manual_seed(0)
    eager = Reference(config, seed=0)
    widen(eager, generator)
    eager.to(**like)
    fast = VisionTransformer(config, seed=0, **like)
    fast.load_state_dict(eager.state_dict())
    direction = torch.randn(len(images), config.num_classes, generator=generator).to(**like)
    return Models(fast, eager, copy.deepcopy(eager).double(), direction)


def copies(model: nn.Module, images: Tensor, impl: str = "auto", **options: Any) -> Models:
    """Three copies of another library's model in the images' dtype: accelerated, as it is, and as it is in fp64.

    In eval(), so that none of them drops anything; ``model`` stays as it is. A model of this package is taken, too, and
    compared with its reference.
    """
    if isinstance(model, VisionTransformer):
        eager = Reference(model.config, seed=0)  # a seed leaves the global generator alone
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
    """Random images [B, C, H, W] of the size that the model says it takes, on its device and in its dtype.

    Raises:
        ValueError: it does not say.
    """
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(getattr(model, "config", None), "in_chans", None) or getattr(conv, "in_channels", None)
    img_size = img_size or image_size(model)
    if channels is None or img_size is None:
        raise ValueError(f"{type(model).__name__} does not say which images it takes; pass an image [B, C, H, W]")
    shape = (batch, channels, *img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()))


def image_size(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the images that a model of any of the libraries says it takes."""
    config, patches = getattr(model, "config", None), getattr(model, "patch_embed", None)
    said = getattr(config, "image_size", None) or getattr(config, "img_size", None)
    said = said or getattr(model, "image_size", None) or getattr(patches, "img_size", None)
    said = said or (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    if said is None:
        return None
    return (said, said) if isinstance(said, int) else tuple(said[-2:])


def output_of(returned: Any) -> tuple[str, Tensor]:
    """One of `OUTPUTS`, and the first tensor that a model returned."""
    if isinstance(returned, Mapping):
        name = next(name for name, value in returned.items() if isinstance(value, Tensor) and value.dim())
        return name if name in OUTPUTS else "output", returned[name]
    return "logits", returned[0] if isinstance(returned, tuple) else returned


def results(model: nn.Module, images: Tensor, direction: Tensor, **options: Any) -> dict[str, Tensor | None]:
    """The output, and the gradient of (output · direction).sum() for the images and every parameter that wants one.

    None for what was not used. A fixed direction instead of a loss: every logit counts, and each model's backward
    starts from the same numbers.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    dtype = next(model.parameters()).dtype
    images = images.detach().to(dtype, copy=True).requires_grad_()
    name, output = output_of(model(images, **options))
    wanted = [images, *params.values()]
    grads = torch.autograd.grad(output, wanted, direction.to(dtype), allow_unused=True)
    return {name: output.detach()} | dict(zip(["image", *params], grads, strict=True))


def parity(models: Models, images: Tensor, progress: Progress = contextlib.nullcontext, draws: int = 1) -> list[Report]:
    """The errors of the output and of every gradient; ``progress(text)`` is entered around each model's work.

    Each draw has a direction of its own, and the images shifted a little; `enough_draws` says how many to take.

    The key bias has no gradient (softmax ignores what all keys of a row share), so what is computed for it is rounding
    noise. It is judged as a third of qkv.bias, one tensor even where a library has three: the error of the other two
    thirds says how much noise is fair, and a key bias with a gradient of its own would fail. Parameters that no model
    used are left out; one that only some models used fails.
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
    """cuDNN's tf32 is on by default: the patch convolution of eager PyTorch in fp32 would be a lax standard.

    Without cuDNN it is a matrix product, whose precision is that of ours. The settings of the precision itself cannot
    be put back: reading one tells what is inherited, too, and ``allow_tf32`` raises after the newer API was used.
    """
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and dtype is not torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _comparable(found: list[dict[str, Tensor | None]]) -> list[dict[str, Tensor]]:
    """Without what no model used; NaN, which fails, for what only others used."""
    used = {name: t for result in found for name, t in result.items() if t is not None}
    comparable = []
    for result in found:
        dtype = next(iter(result.values())).dtype  # of the output
        names = [name for name in result if name in used]
        missing = {n: torch.full_like(used[n], torch.nan, dtype=dtype) for n in names if result[n] is None}
        comparable.append({n: missing.get(n, result[n]) for n in names})
    return comparable


def enough_draws(models: Models) -> int:
    """With how many draws the verdict is no longer chance.

    However many elements a tensor has, its error in one draw is chance, because they share what was rounded before
    them. That shows most in a small model, where little is summed. PyTorch's own sums in another order exceed the
    limits in one draw of many small models, and in 8 draws in a few, in fp32 as in bf16.
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
    """The table's group for a tensor; its name with * for the block's number where no group fits."""
    return next((g for g, pattern in GROUPS.items() if re.search(pattern, name)), re.sub(r"\d+", "*", name))


def table(reports: list[Report]) -> str:
    """A row for each group, of its tensor nearest to a limit, then the tensors that failed, then the verdict."""
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
    """That `vit.accelerate` keeps what a timm, Hugging Face or torchvision model computes: for a pytest of your own.

    The output and the gradient of the image and of every parameter that wants one, of an accelerated copy and of the
    model itself, both against the model in fp64, over several draws of what is differentiated and of the image,
    shifted. All in eval(); ``model`` is not changed. In fp32 it needs the memory of eight more such models.

        from vit.testing import assert_parity
        def test_fused_ops():
            model = timm.create_model("vit_base_patch16_224", pretrained=True).cuda()
            assert_parity(model, dtype=torch.bfloat16, impl="triton")

    Args:
        model: what `vit.accelerate` takes.
        image: [B, C, H, W]; two random ones of the size that the model says it takes, if None.
        dtype: fp32, fp16 or bf16; that of the model's parameters if None.
        impl: of every op; "auto" is plain PyTorch where there is no GPU, so it then shows nothing about a kernel.

    Returns:
        One report for each tensor.

    Raises:
        AssertionError: a line for each tensor that exceeds a limit of the policy.
        ValueError: there is no block to accelerate, or no image and the model does not say which it takes.
    """
    param = next(model.parameters())
    image = (example(model) if image is None else image).to(param.device, dtype or param.dtype)
    if ("model", image.dtype) not in FACTORS:
        raise ValueError(f"assert_parity: dtype must be float32, float16 or bfloat16, got {image.dtype}")
    models = copies(model, image, impl)
    reports = parity(models, image, draws=enough_draws(models))
    failed = [str(report) for report in reports if not report.ok]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(reports)} tensors exceed a limit:\n" + "\n".join(failed))
    return reports
