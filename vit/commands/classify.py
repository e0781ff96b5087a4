"""`vit classify`: classifies a photograph with a checkpoint and the preprocessing of its training."""

from __future__ import annotations

from pathlib import Path

import torch

import vit
from vit import preprocess


def classify(image: Path, weights: Path, name: str | None = None, top: int = 5, source: str | None = None) -> str:
    """The text that the command prints: a line about the preprocessing, then the ``top`` classes with probabilities.

    Args:
        image: a picture that Pillow reads.
        weights: a checkpoint for `vit.load_pretrained`.
        name: name of the model, if the checkpoint does not contain it.
        top: number of classes.
        source: a key of `vit.preprocess.SOURCES`; None means the preprocessing of the checkpoint.

    Raises:
        ValueError: Pillow cannot read the picture, the checkpoint is invalid or has no head, or the preprocessing is
            unknown.
        OSError: a file does not exist.
    """
    photo = preprocess.open_photo(image)
    model = vit.load_pretrained(*([] if name is None else [name]), weights).eval()
    size, classes = model.config.img_size, model.config.num_classes
    if not classes:
        raise ValueError(f"{weights} has no classification head")
    prepare = preparation(model, weights, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = prepare(photo).to(device)
    if tuple(pixels.shape[2:]) != tuple(size) and not model.config.dynamic_img_size:
        height, width = pixels.shape[2:]
        raise ValueError(f"{prepare.source} makes {width} x {height} pixels, but the model takes {size[1]} x {size[0]}")
    with torch.no_grad():
        probs = model.to(device)(pixels)[0].float().softmax(0).cpu()
    folder = _folder(weights)
    names = preprocess.class_names(folder) if folder else {}
    if not names:
        names = preprocess.real_names(model.pretrained_cfg.get("label_names"))
        names = names if len(names) == classes else {}  # else they are of an earlier head
    lines = [f"{image}, {photo.width} x {photo.height} pixels: {prepare}"]
    if not names:
        lines.append("The checkpoint carries no class names, so these are indices:")
    for prob, index in zip(*(values.tolist() for values in probs.topk(min(top, classes))), strict=True):
        label = f"{names[index]} ({index})" if index in names else f"class {index}"
        lines.append(f"  {100 * prob:6.2f} %  {label}")
    return "\n".join(lines)


def preparation(model: torch.nn.Module, weights: Path, source: str | None = None) -> preprocess.Preprocessing:
    """The preprocessing of a checkpoint that `vit.load_pretrained` loaded, or of ``source``.

    Raises:
        ValueError: it is unknown, or for another number of channels than the model's.
    """
    size, folder, prepare = model.config.img_size, _folder(weights), None
    if source is None:
        prepare = preprocess.of_folder(folder, size) if folder else None
        prepare = prepare or preprocess.of_note(model.pretrained_cfg, size, f"as {weights.name} says")
    prepare = prepare or preprocess.preprocessing(source or _source(model, weights), size)
    return prepare.for_channels(model.config.in_chans)


def _folder(weights: Path) -> Path | None:
    """The folder whose JSON files belong to the checkpoint: transformers or timm gave it its name."""
    if weights.is_dir():
        return weights
    return weights.parent if weights.name.startswith(("model.", "model-", "pytorch_model")) else None


def _source(model: torch.nn.Module, weights: Path) -> str:
    """The usual preprocessing for the checkpoint's dialect, a key of `vit.preprocess.SOURCES`."""
    dialect = model.pretrained_cfg["source"].removesuffix("_old").removesuffix("_memory")
    if dialect in preprocess.SOURCES and dialect != "timm":  # timm's models have different ones
        return dialect
    raise ValueError(
        f"nothing beside {weights} tells how a picture is prepared; choose one with --preprocess: "
        + ", ".join(preprocess.SOURCES)
    )
