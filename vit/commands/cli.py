"""The `vit` command; `python -m vit` is the same."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import vit


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 success, 1 a check failed, 2 it could not start."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except BrokenPipeError:  # as in `vit info | head`; devnull, because Python flushes stdout again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vit", description="Vision Transformers on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fused-vit {vit.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="run a ViT on a photograph, forward and backward, and compare it with plain PyTorch",
        description="Runs a ViT on a photograph, forward and backward. Prints the path of each op, the errors against "
        "fp64 compared with eager PyTorch's, and times. Writes a picture of the attention. With an NVIDIA GPU it runs "
        "ViT-B/16 in bf16, without one ViT-S/16 on the CPU and a small ViT on interpreted kernels. The exit code is 1 "
        "if a check fails.",
    )
    demo.add_argument(
        "--out", type=Path, default=Path("vit-attention.png"), metavar="PATH", help="the picture (default: %(default)s)"
    )
    demo.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)  # for the demo's second process
    demo.set_defaults(run=_demo)

    warmup = commands.add_parser(
        "warmup",
        help="compile the kernels of a model before its first call",
        description="Compiles the kernels of a model into Triton's cache before its first call. It runs one forward on "
        "zeros on the GPU, and with --train also one forward and backward. With --arch nothing runs and no GPU is "
        "needed. The cache then serves machines with that GPU, the same package and the same Triton. Each image size "
        "needs its own run, because attention is compiled for one number of tokens. The batch size matters little: "
        "Triton specialises sizes only for 1 and for multiples of 16.",
    )
    warmup.add_argument("model", metavar="MODEL", help="a name from `vit info`")
    warmup.add_argument("--img-size", type=_size, metavar="N|HxW", help="image size in pixels (default: the model's)")
    warmup.add_argument("--batch-size", type=_positive, default=1, metavar="B", help="images (default: %(default)s)")
    warmup.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="(default: %(default)s)")
    warmup.add_argument("--autocast", action="store_true", help="fp32 parameters and torch.autocast to --dtype")
    warmup.add_argument("--train", action="store_true", help="also compile the kernels for training")
    warmup.add_argument("--device", default="cuda", help="the GPU to run on (default: %(default)s)")
    warmup.add_argument("--arch", metavar="sm_90", help="compile for this architecture; needs no GPU")
    warmup.set_defaults(run=_warmup)

    parity = commands.add_parser(
        "parity",
        help="check an accelerated timm, Hugging Face or torchvision model against the original",
        description="Measures the errors of an accelerated model against the original in fp64, for the output and "
        "every gradient, and compares them with the errors of the original in the same dtype. The exit code is 0 if "
        "all errors are within the limits of vit/testing/policy.py, 1 if not, and 2 if it could compare nothing.",
    )
    add = parity.add_argument
    add("--model", required=True, metavar="timm:NAME|torchvision:NAME|hf:FOLDER|FILE", help="NAME: random weights")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype (default: %(default)s)")
    add("--image", type=Path, metavar="FILE", help="a photograph (default: random images)")
    add("--batch-size", type=_positive, default=2, metavar="N", help="images per batch (default: %(default)s)")
    add("--impl", choices=vit.kernels.runtime.IMPLS, default="auto", help="path of every op (default: %(default)s)")
    add("--device", metavar="NAME", help="device (default: cuda if available)")
    add("--img-size", type=_size, metavar="N|HxW", help="image size (default: the model's)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="model arguments: --set depth=2")
    parity.set_defaults(run=_parity)

    classify = commands.add_parser(
        "classify",
        help="classify a photograph with a checkpoint",
        description="Classifies a photograph with a checkpoint and the preprocessing of its training.",
    )
    add = classify.add_argument
    add("image", type=Path, metavar="IMAGE")
    add("--weights", required=True, type=Path, metavar="PATH", help="a checkpoint: a file or a Hugging Face folder")
    add("--model", metavar="NAME", help="name of the model, if the checkpoint does not contain it")
    add("--top", type=_positive, default=5, metavar="N", help="number of classes to print (default: %(default)s)")
    add("--preprocess", metavar="NAME", help="source of the preprocessing, if the checkpoint does not contain it")
    classify.set_defaults(run=_classify)

    probe = commands.add_parser(
        "probe",
        help="measure how well a linear classifier of a few images reads a checkpoint's features",
        description="Fits linear classifiers on the frozen features of a few training images by regularised least "
        "squares, and prints their accuracy on the test images. Beside it: features of the same architecture with "
        "random weights, and raw pixels. Features that do not exceed these say little about the checkpoint. The "
        "regularisation is chosen by cross-validation on the few images. Data without test images lend a fifth of "
        "their training images.",
    )
    add = probe.add_argument
    add("data", metavar="DATA", help="fashion-mnist, a folder with IDX files or images, or an .npz file")
    add("--weights", required=True, type=Path, metavar="PATH", help="a checkpoint: a file or a Hugging Face folder")
    add("--shots", type=_positive, nargs="+", default=[5, 10, 25], metavar="N",
        help="training images of each class (default: 5 10 25)")  # fmt: skip
    add("--max-train-samples", type=_positive, nargs="+", metavar="N",
        help="instead of --shots: training images, with the classes in proportion")  # fmt: skip
    add("--seed", type=_natural, nargs="+", default=[0, 1, 2], metavar="N",
        help="seeds of the choice of images and of the random weights (default: 0 1 2)")  # fmt: skip
    add("--img-size", type=_size, metavar="N|HxW", help="image size in pixels (default: the model's)")
    add("--save", type=Path, metavar="FILE.csv", help="write every single result")
    add("-b", "--batch-size", type=_positive, default=128, metavar="N", help="images per batch (default: %(default)s)")
    add("-j", "--workers", type=_natural, default=0, metavar="N", help="processes that load images (default: 0)")
    add("--device", metavar="NAME", help="device (default: cuda if available)")
    probe.set_defaults(run=_probe)

    attention = commands.add_parser(
        "attention",
        help="show what a ViT looks at in photographs",
        description="Prints the attention distance, entropy, mass of the prefix tokens and largest logit of each layer "
        "beside uniform attention, and which patch the query looks at most. With -o it draws a figure: the photograph "
        "as the model sees it, the attention of the last layer, attention rollout, maps of heads, and the distance of "
        "each head against depth. A map is dark at its smallest value and bright from the percentile on. With several "
        "photographs, -o out.png writes out-1.png, out-2.png and so on. Layers, heads, rows and columns count from 0.",
    )
    add = attention.add_argument
    add("images", type=Path, nargs="+", metavar="IMAGE", help="a photograph; transparent parts become white")
    _model_options(attention)
    add("--save", type=Path, metavar="FILE.npz", help="write the numbers of all layers and heads; needs no matplotlib")
    add("--img-size", type=_size, metavar="N|HxW", help="image size (default: the model's)")
    add("--preprocess", metavar="NAME", help="source of the preprocessing, if the model does not tell it")
    add("--query", type=_query, default="cls", metavar="cls|ROW,COLUMN", help="the token that looks (default: cls)")
    add("--layers", type=_indices, metavar="I,J,…", help="layers of the head maps (default: the last, --layers=-1)")
    add("--heads", type=_indices, metavar="I,J,…", help="heads of the head maps (default: all)")
    add("--rollout", action="store_true", help="draw only the rollout, or only what is asked for with --distance")
    add("--distance", action="store_true", help="draw only the distances, or only what is asked for with --rollout")
    add("--convention", choices=("published", "renormalised"), default="published",
        help="distance with attention to prefix tokens as 0, or without it (default: %(default)s)")  # fmt: skip
    add(
        "--clip-percentile",
        type=float,
        default=99.0,
        metavar="P",
        help="bright from this percentile of a map on (default: 99)",
    )
    attention.set_defaults(run=_attention)

    inspect = commands.add_parser(
        "inspect",
        help="show the embeddings of a ViT: filters and positions",
        description="Prints how much of the filters of the patch projection their first 28 principal components hold, "
        "and how similar the position embeddings are. With -o it draws both, as in Fig. 7 of the paper.",
    )
    _model_options(inspect)
    inspect.add_argument("--save", type=Path, metavar="FILE.npz", help="write the numbers; needs no matplotlib")
    inspect.set_defaults(run=_inspect)

    _training_commands(commands)

    info = commands.add_parser(
        "info", help="print versions, GPU and models", description="Prints versions, the GPU if any, and the models."
    )
    info.set_defaults(run=_info)
    return parser


def _training_commands(commands: argparse._SubParsersAction) -> None:
    from vit.commands import train

    data = "DATA is fashion-mnist, a folder with IDX files (MNIST's format), a folder of images, or an .npz file."
    trained = commands.add_parser(
        "train",
        help="train a ViT",
        description=f"Trains a ViT and writes the folder RUN. {data} A run that was stopped or killed continues with "
        "--resume and then has the same bits as one that was not. With torchrun it uses several GPUs or processes.",
    )
    train.add_train(trained, finetune=False)
    trained.set_defaults(run=_train, command="train")

    finetuned = commands.add_parser(
        "finetune",
        help="train a checkpoint further, with a new head",
        description="Removes the head of a checkpoint, adds a linear one of zeros, and trains all weights as vit train "
        f"does. The position embedding is resized to --img-size. {data}",
    )
    train.add_train(finetuned, finetune=True)
    finetuned.set_defaults(run=_train, command="finetune")

    evaluated = commands.add_parser(
        "evaluate",
        help="measure the accuracy of a checkpoint",
        description=f"Measures the accuracy of a checkpoint on the test images, prepared as in its training. {data}",
    )
    train.add_evaluate(evaluated)
    evaluated.set_defaults(run=_evaluate)

    from vit.commands import experiment

    measured = commands.add_parser(
        "experiment",
        help="measure a claim of the ViT paper: data-scale, transfer, pos-embed, pooling, shuffle",
        description="Trains small models, and writes DIR/NAME.csv, DIR/NAME.png and DIR/NAME.md with the sentence of "
        "the paper beside what was measured, agreeing or not. data-scale: ViT and ResNet on growing subsets. transfer: "
        "fine-tuning on few labels at twice the resolution. pos-embed: none, 1-D, 2-D, sin-cos. pooling: class token "
        f"or average. shuffle: patches in another order. The same command continues what was interrupted. {data}",
    )
    experiment.add(measured)
    measured.set_defaults(run=_experiment)


def _model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--weights", type=Path, metavar="PATH", help="a checkpoint: a file or a Hugging Face folder")
    add("--model", metavar="NAME|timm:NAME|torchvision:NAME|hf:FOLDER", help="instead of it; NAME: random weights")
    add("-o", "--out", type=Path, metavar="FILE.png", help="draw a figure: .png, .jpg, .pdf or .svg; needs matplotlib")


def _demo(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("PIL") is None:
        return _fail("demo", "Pillow is missing, which reads and writes the pictures; pip install Pillow")
    if args.interpreted:
        from vit.kernels import runtime

        if not runtime.INTERPRETED:
            return _fail("demo", "--interpreted needs TRITON_INTERPRET=1 in the environment")
    else:
        try:  # before the work, which takes a minute
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
        return _fail("classify", error)
    return 0


def _probe(args: argparse.Namespace) -> int:
    from vit.commands import parity, probe

    try:
        probe.run(args)
    except (parity.CannotStart, ValueError, OSError, ImportError) as error:
        return _fail("probe", error)
    return 0


def _attention(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("PIL") is None:
        return _fail("attention", "Pillow is missing, which reads pictures; pip install Pillow")
    from vit.commands import attention, parity

    try:
        attention.attention(args)
    except (parity.CannotStart, ValueError, IndexError, OSError) as error:
        return _fail("attention", error)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from vit.commands import inspect, parity

    try:
        inspect.inspect(args)
    except (parity.CannotStart, ValueError, OSError) as error:
        return _fail("inspect", error)
    return 0


def _train(args: argparse.Namespace) -> int:
    from vit.commands import train
    from vit.training.errors import TrainingError

    try:
        return train.train(args, shlex.join(["vit", *sys.argv[1:]]))
    except TrainingError as error:
        return _fail(args.command, error) if os.environ.get("RANK", "0") == "0" else 2
    except KeyboardInterrupt:
        print(f"vit {args.command}: stopped", file=sys.stderr)
        return 130


def _experiment(args: argparse.Namespace) -> int:
    from vit.commands import experiment
    from vit.training.errors import TrainingError

    try:
        return experiment.run(args, shlex.join(["vit", *sys.argv[1:]]))
    except TrainingError as error:
        return _fail("experiment", error)


def _evaluate(args: argparse.Namespace) -> int:
    from vit.commands import train
    from vit.training.errors import TrainingError

    try:
        train.evaluate_file(args)
    except TrainingError as error:
        return _fail("evaluate", error)
    return 0


def _indices(text: str) -> list[int]:
    try:
        return [int(index) for index in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be integers with commas between them, got {text[:20]!r}") from error


def _query(text: str) -> str | tuple[int, int]:
    if text == "cls":
        return text
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal() and len(text) < 20):
        raise argparse.ArgumentTypeError(f"must be cls or ROW,COLUMN of a patch, got {text[:20]!r}")
    return int(row), int(column)


def _positive(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"must be a positive integer of at most 9 digits, got {text[:20]!r}")
    return int(text)


def _natural(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"must be an integer from 0 on, of at most 9 digits, got {text[:20]!r}")
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


def _fail(command: str, error: str | Exception) -> int:
    of_file = isinstance(error, OSError) and error.filename
    message = f"{error.filename}: {error.strerror}" if of_file else error
    print(f"vit {command}: {message}", file=sys.stderr)
    return 2
