"""The `vit` command; `python -m vit` is the same."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import vit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 success, 1 a check failed, 2 it could not start."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # `vit info | head`; Python flushes once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vit", description="Vision Transformers on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fused-vit {vit.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="a photograph through a ViT, forward and backward, checked against plain PyTorch",
        description="A photograph through a ViT, forward and backward, with the path of every op, the errors against "
        "fp64 beside eager PyTorch's, times, and a picture of the attention. ViT-B/16 in bf16 on an NVIDIA GPU; "
        "without one ViT-S/16 on the CPU and a small ViT on interpreted kernels. The exit code is 1 if a check fails.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("vit-attention.png"), metavar="PATH", help="the picture (default: %(default)s)"
    )
    demo.add_argument(
        "--interpreted", action="store_true", help=argparse.SUPPRESS
    )  # how the demo starts its second part
    demo.set_defaults(run=_demo)

    warmup = commands.add_parser(
        "warmup",
        help="compiles the kernels that a model needs, ahead of its first call",
        description="Compiles the kernels that a model needs into Triton's cache, ahead of its first call: one forward "
        "of zeros on the GPU, with --train also a forward and backward. With --arch nothing runs and no GPU is needed: "
        "the cache is for a machine with that GPU, the same package and the same Triton. Sizes matter little: Triton "
        "compiles anew where a number of rows or columns is divisible by 16 and was not, or is 1.",
    )
    warmup.add_argument("model", metavar="MODEL", help="a name that `vit info` lists")
    warmup.add_argument("--img-size", type=_size, metavar="N|HxW", help="pixels (default: the model's own)")
    warmup.add_argument("--batch-size", type=_positive, default=1, metavar="B", help="images (default: %(default)s)")
    warmup.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    warmup.add_argument("--autocast", action="store_true", help="fp32 parameters under torch.autocast to --dtype")
    warmup.add_argument("--train", action="store_true", help="also what training needs")
    warmup.add_argument("--device", default="cuda", help="the GPU to run on (default: %(default)s)")
    warmup.add_argument("--arch", metavar="sm_90", help="compile for this GPU instead, without one")
    warmup.set_defaults(run=_warmup)

    parity = commands.add_parser(
        "parity",
        help="your timm, Hugging Face or torchvision model, accelerated, against itself in fp64",
        description="The output and every gradient of a model on the fused ops, beside the original library's own in "
        "the same dtype, both against that model in fp64, over several draws. The exit code is 0 if the policy of "
        "vit/testing/policy.py holds, 1 if it fails, 2 if nothing could be compared.",
    )
    add = parity.add_argument
    add("--model", required=True, metavar="timm:NAME|torchvision:NAME|hf:FOLDER|FILE", help="random weights for a NAME")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: %(default)s)")
    add("--image", type=Path, metavar="FILE", help="a photograph (default: random images)")
    add("--batch-size", type=_positive, default=2, metavar="N", help="(default: %(default)s)")
    add("--impl", choices=vit.kernels.runtime.IMPLS, default="auto", help="of every op (default: %(default)s)")
    add("--device", metavar="NAME", help="(default: cuda where there is one)")
    add("--img-size", type=_size, metavar="N|HxW", help="(default: the model's own)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of the model: --set depth=2")
    parity.set_defaults(run=_parity)

    classify = commands.add_parser(
        "classify",
        help="what a photograph shows, by a checkpoint",
        description="The classes that a checkpoint finds in a photograph, after the preprocessing it was trained with.",
    )
    add = classify.add_argument
    add("image", type=Path, metavar="IMAGE")
    add(
        "--weights", required=True, type=Path, metavar="PATH", help="a checkpoint: a file or a folder of Hugging Face's"
    )
    add("--model", metavar="NAME", help="the model, where the checkpoint does not tell")
    add("--top", type=_positive, default=5, metavar="N", help="how many classes (default: %(default)s)")
    add("--preprocess", metavar="NAME", help="whose preprocessing, where the checkpoint does not tell")
    classify.set_defaults(run=_classify)

    info = commands.add_parser(
        "info", help="versions, GPU, models", description="Versions, the GPU or that there is none, and the models."
    )
    info.set_defaults(run=_info)
    return parser


def _demo(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("PIL") is None:
        return _fail("demo", "Pillow is missing, which reads and writes the pictures; pip install Pillow")
    if args.interpreted:
        from vit.kernels import runtime

        if not runtime.INTERPRETED:
            return _fail("demo", "--interpreted needs TRITON_INTERPRET=1 in the environment")
    else:
        try:  # before a minute of work, not after it
            new = not args.out.exists()
            args.out.open("ab").close()
            if new:
                args.out.unlink()
        except OSError as error:
            return _fail("demo", f"cannot write {args.out}: {error.strerror}; choose another --out")
    from vit.commands import demo

    return 0 if (demo.demo_interpreted() if args.interpreted else demo.demo(args.out)) else 1


def _warmup(args: argparse.Namespace) -> int:
    from vit.commands import warmup

    try:
        print(warmup.command(args))
    except (ValueError, RuntimeError) as error:
        return _fail("warmup", str(error))
    return 0


def _parity(args: argparse.Namespace) -> int:
    if args.image is not None and importlib.util.find_spec("PIL") is None:
        return _fail("parity", "Pillow is missing, which reads pictures; pip install Pillow")
    from vit.commands import parity

    try:
        return 0 if parity.check(args) else 1
    except parity.CannotStart as error:
        return _fail("parity", str(error))


def _classify(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("PIL") is None:
        return _fail("classify", "Pillow is missing, which reads pictures; pip install Pillow")
    from vit.commands import classify

    try:
        print(classify.classify(args.image, args.weights, args.model, args.top, args.preprocess))
    except (ValueError, OSError) as error:
        return _fail("classify", str(error))
    return 0


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive integer of at most 9 digits, got {text[:20]!r}")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    """'224' or '224x160' as (H, W)."""
    height, _, width = text.partition("x")
    return _positive(height), _positive(width or height)


def _info(args: argparse.Namespace) -> int:
    import numpy
    import torch
    import triton

    from vit.kernels import runtime

    if torch.cuda.is_available():
        g = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = f"{g.name}, compute capability {g.major}.{g.minor}, {g.total_memory / 2**30:.0f} GiB"
    else:
        gpu = "none: CPU tensors run the eager PyTorch path"
    if runtime.INTERPRETED:
        kernels = "interpreted on the CPU: TRITON_INTERPRET is set"
    elif torch.cuda.is_available():
        kernels = "compiled for the GPU at their first call"
    else:
        kernels = "cannot run here: they need a GPU, or TRITON_INTERPRET=1 from the start of the process"
    rows = {
        "fused-vit": vit.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "GPU": gpu,
        "kernels": kernels,
        "models": "\n          ".join(vit.list_models()),
    }
    print("\n".join(f"{name:<10}{value}" for name, value in rows.items()))
    return 0


def _fail(command: str, message: str) -> int:
    print(f"vit {command}: {message}", file=sys.stderr)
    return 2
