"""`vit parity`: compares an accelerated model of timm, Hugging Face or torchvision with the original in fp64."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vit
from vit.analysis import image_size
from vit.commands.console import say, step
from vit.config import HF_WORDS, ViTConfig, check_field
from vit.testing.parity import copies, enough_draws, example, parity, table, widen
from vit.training.options import assignment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# The libraries' names for fields of `ViTConfig`, to check values: {source: {their name: field of the same kind}}.
WORDS = {
    "timm": {name: name for name in ViTConfig.__dataclass_fields__},
    "hf": {theirs: ours for ours, (theirs, _default) in HF_WORDS.items()}
    | {"intermediate_size": "embed_dim", "hidden_dropout_prob": "drop_rate", "num_labels": "num_classes"},
    "torchvision": {"image_size": "img_size", "num_layers": "depth", "hidden_dim": "embed_dim", "mlp_dim": "embed_dim"}
    | {name: name for name in ("patch_size", "num_heads", "num_classes", "representation_size")}
    | {"dropout": "drop_rate", "attention_dropout": "attn_drop_rate"},
}


class CannotStart(Exception):
    """The command could compare nothing. The message has the reason and a fix."""


def check(args: argparse.Namespace) -> bool:
    """Runs the command. Returns whether parity holds.

    Raises:
        CannotStart: the model cannot be built, or this machine cannot run it.
    """
    source, _, name = args.model.partition(":")
    overrides = dict(assignment(text, CannotStart) for text in args.set)
    with explained("cannot build the model"):
        for word, value in overrides.items():  # the libraries explain wrong values badly, and accept huge ones
            if word in WORDS.get(source, {}) and not isinstance(value, (tuple, list)):  # some timm models take tuples
                check_field(WORDS[source][word], value, word)
        if source in MAKERS:
            model, what = build(args.model, args.img_size, overrides)
        elif Path(args.model).exists():
            with step(f"loading {args.model}"):
                model = vit.load_pretrained(args.model, **overrides)
            what = f"{args.model}: a file has no class of its own; the original is this package's plain PyTorch model"
        else:
            hint = f"did you mean timm:{args.model}? " if not name else ""
            raise CannotStart(f"{args.model} is no file; {hint}--model takes {', '.join(f'{m}:...' for m in MAKERS)}")
    with explained("cannot compare"):
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        images = _images(model, args).to(device, DTYPES[args.dtype])
        with step("copying it: accelerated, as it is, and in fp64"), collected_notes() as notes:
            models = copies(model, images, args.impl, **call_options(model, images))
        del model
        with step("a first forward, to see which path each op takes"):
            paths = vit.explain(models.fast, images, **models.options)
    count = sum(p.numel() for p in models.eager.parameters())
    say(f"  {what}, {count / 1e6:.1f} M parameters; {args.dtype} on {device}, images {list(images.shape)}")
    for note in notes:
        say(f"  Note: {note}")
    say("  Path of each op, and why (the backward of an op takes the path of its forward):")
    say("    " + str(paths).replace("\n", "\n    "))
    reports = parity(models, images, progress=step, draws=enough_draws(models))
    say("  " + table(reports).replace("\n", "\n  "))
    if all(row.path in ("pytorch", "reference") for row in paths):
        say("  No kernel ran, so this judged the adapter and not the kernels.")
    return all(report.ok for report in reports)


def build(model: str, img_size: tuple[int, int] | None, overrides: dict[str, Any]) -> tuple[nn.Module, str]:
    """The library's model that --model names, such as timm:NAME, and a description. Nothing is downloaded.

    Raises:
        CannotStart: there is no such library or model.
    """
    source, _, name = model.partition(":")
    if source not in MAKERS:
        hint = f"did you mean timm:{model}? " if not name else ""
        raise CannotStart(f"{model} names no library; {hint}--model takes {', '.join(f'{m}:...' for m in MAKERS)}")
    with step(f"building {name}"), torch.random.fork_rng([]):
        torch.manual_seed(0)
        return MAKERS[source](name, img_size, overrides)


def _timm(name: str, img_size: tuple[int, int] | None, overrides: dict[str, Any]) -> tuple[nn.Module, str]:
    timm = library("timm")
    if not timm.is_model(name):
        raise CannotStart(f"timm has no model {name!r}{_like(name.partition('.')[0], timm.list_models())}")
    if img_size is not None:
        overrides["img_size"] = img_size
    model = timm.create_model(name, pretrained=False, **overrides)
    widen(model, torch.Generator().manual_seed(0))
    return model, f"timm {timm.__version__}, {name}, random weights"


def _torchvision(name: str, img_size: tuple[int, int] | None, overrides: dict[str, Any]) -> tuple[nn.Module, str]:
    torchvision = library("torchvision")
    names = torchvision.models.list_models(include="vit_*")
    if name not in names:
        raise CannotStart(f"torchvision has no Vision Transformer {name!r}{_like(name, names)}")
    with torch.device("meta"):
        plan = torchvision.models.get_model(name)
    block = plan.encoder.layers[0]
    fields = {key: getattr(plan, key) for key in ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes")}
    fields |= {"num_layers": len(plan.encoder.layers), "num_heads": block.num_heads} | overrides
    if img_size is not None:
        if img_size[0] != img_size[1]:
            raise CannotStart(f"torchvision's models take square images, not {img_size[0]} x {img_size[1]}")
        fields["image_size"] = img_size[0]
    model = type(plan)(**fields)
    widen(model, torch.Generator().manual_seed(0))
    return model, f"torchvision {torchvision.__version__}, {name}, random weights"


def _hugging_face(name: str, img_size: tuple[int, int] | None, overrides: dict[str, Any]) -> tuple[nn.Module, str]:
    transformers = library("transformers")
    if not (Path(name) / "config.json").is_file():
        raise CannotStart(f"hf:{name} must name a folder with a config.json; download the model first")
    config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    classifies = any("ForImageClassification" in kind for kind in config.architectures or [])
    auto = transformers.AutoModelForImageClassification if classifies else transformers.AutoModel
    model = auto.from_pretrained(name, local_files_only=True, trust_remote_code=False, dtype=torch.float32, **overrides)
    return model, f"transformers {transformers.__version__}, {type(model).__name__}, the weights of {name}"


MAKERS: dict[str, Callable[[str, tuple[int, int] | None, dict[str, Any]], tuple[nn.Module, str]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hugging_face,
}


def library(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise CannotStart(f"{error.name} is missing; pip install {error.name}") from error
    except Exception as error:  # a build for another torch may raise anything
        raise CannotStart(f"{name} is installed but cannot be imported: {error}") from error


def _like(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _images(model: nn.Module, args: argparse.Namespace) -> Tensor:
    """Random images, or crops of a photograph. Odd crops are mirrored, and each pair zooms in further."""
    images = example(model, args.batch_size, args.img_size)
    if args.image is None:
        return images
    from PIL import ImageOps

    from vit.preprocess import open_photo, to_tensor

    if images.shape[1] != 3:
        raise CannotStart(f"the model takes {images.shape[1]} channels; a photograph has 3: leave --image out")
    photo, size = open_photo(args.image), (images.shape[3], images.shape[2])
    crops = [ImageOps.fit(photo, size, bleed=min(0.02 * (i // 2), 0.4)) for i in range(len(images))]
    return to_tensor([ImageOps.mirror(crop) if i % 2 else crop for i, crop in enumerate(crops)])


def call_options(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The keyword argument that a Hugging Face model needs for images of another size."""
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes and image_size(model) != tuple(images.shape[2:]) else {}


@contextlib.contextmanager
def collected_notes() -> Iterator[list[str]]:
    """Collects the messages of this package's warnings. Other warnings are shown as usual."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for warning in caught:
        if str(warning.message).startswith("accelerate: "):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the libraries' errors about wrong names, sizes and files into CannotStart."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError, OSError) as error:
        raise CannotStart(f"{what}: {error}") from error
