"""Converts a photograph to the input of a checkpoint, with the size, crop, mean and standard deviation of its source.

It needs only Pillow, with which the source libraries also resize. Shapes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, scale, subtract the mean, divide by the standard deviation.

    One number as the mean makes the picture grey.
    """

    source: str
    resize: tuple[int, int] | int | None  # (height, width), or the length of the shorter side; None: no resize
    crop: tuple[int, int] | None  # (height, width), black outside the picture; None: no crop
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    odd_down: bool = False  # half of an odd margin: round down; False: to even, as Python's round does

    def __call__(self, photo: Image.Image) -> Tensor:
        """[1, C, H, W] in fp32."""
        return to_tensor([self.view(photo)], self.mean, self.std, self.scale)

    def view(self, photo: Image.Image) -> Image.Image:
        """What the model sees of ``photo``: resized and cropped, grey or in RGB."""
        photo = photo.convert("L" if self.is_grey else "RGB")
        if isinstance(self.resize, int):
            short, long = sorted(photo.size)
            other = int(self.resize * long / short)
            size = (self.resize, other) if photo.width <= photo.height else (other, self.resize)
        else:
            size = photo.size if self.resize is None else self.resize[::-1]
        photo = photo if size == photo.size else photo.resize(size, self.resample)
        if self.crop is not None:
            left, top = (
                margin // 2 if self.odd_down else round(margin / 2)
                for margin in (photo.width - self.crop[1], photo.height - self.crop[0])
            )
            photo = photo.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return photo

    @property
    def is_grey(self) -> bool:
        return len(self.mean) == 1

    def for_channels(self, channels: int) -> Preprocessing:
        """The same for a model with ``channels``: one channel is grey.

        Raises:
            ValueError: means or standard deviations are for another number of channels or cannot be used, or no
                photograph has so many channels.
        """
        if not (
            self.mean
            and len(self.mean) == len(self.std)
            and all(0 < std < math.inf for std in self.std)
            and all(map(math.isfinite, self.mean))
        ):
            raise ValueError(f"{self.source}: mean {self.mean} and std {self.std} cannot normalise a picture")
        if channels not in (1, 3):
            raise ValueError(f"the model takes images with {channels} channels, but photographs have 1 or 3")
        if len(set(zip(self.mean, self.std, strict=True))) == 1:
            return dataclasses.replace(self, mean=self.mean[:1] * channels, std=self.std[:1] * channels)
        if len(self.mean) != channels:
            raise ValueError(
                f"{self.source} prepares pictures with {len(self.mean)} channels, but the model takes {channels}"
            )
        return self

    def __str__(self) -> str:
        steps = ["grey"] if self.is_grey else []
        if isinstance(self.resize, int):
            steps.append(f"shorter side to {self.resize}")
        elif self.resize is not None:
            steps.append(f"resized to {self.resize[1]} x {self.resize[0]}")
        steps += [] if self.resize is None else [Image.Resampling(self.resample).name.lower()]
        steps += [f"centre {self.crop[1]} x {self.crop[0]}"] if self.crop else []
        return ", ".join([*steps, f"mean {_figures(self.mean)}, std {_figures(self.std)}"]) + f" ({self.source})"


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The preprocessing of a source at any size.

    ``crop_pct`` is the crop size divided by the shorter side after the resize. None means no crop: the picture is
    resized to the size, whatever its aspect ratio.
    """

    where: str
    crop_pct: float | None
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    from_384: dict[str, Any] = dataclasses.field(default_factory=dict)  # other values from 384 pixels on


# Sources of the constants:
# - google: vit_jax/input_pipeline.py of google-research/vision_transformer; big_vision: its ViT configs. Both resize
#   with TensorFlow, google without antialiasing. Here Pillow resizes, as for the models that transformers converted.
# - hf, hf_clip, hf_siglip: the image processors of transformers 5.23; hf_deit,
#   hf_dinov2: those of facebook/deit-base-distilled-patch16-224 and facebook/dinov2-base.
# - timm: the most common values in the default_cfgs of vision_transformer.py and deit.py of timm 1.0.31.
# - torchvision: the transforms of the weights of torchvision 0.28.
# - dinov2: dinov2/data/transforms.py.
_UNCUT = {"crop_pct": 1.0}
_SWAG = {"where": "torchvision, IMAGENET1K_SWAG", "crop_pct": 1.0, "resample": BICUBIC}
_DINOV2 = _Rule("facebook/dinov2-base of transformers", 224 / 256, BICUBIC, IMAGENET_MEAN, IMAGENET_STD)
SOURCES = {
    "google": _Rule("google-research/vision_transformer", None, BILINEAR, HALF, HALF),
    "big_vision": _Rule("google-research/big_vision", 224 / 256, Image.Resampling.BOX, HALF, HALF, _UNCUT),
    "hf": _Rule("ViTImageProcessor of transformers", None, BILINEAR, HALF, HALF),
    "timm": _Rule("timm, vit_*.augreg", 0.9, BICUBIC, HALF, HALF, _UNCUT),
    "timm-imagenet": _Rule("timm, deit, mae and dino", 0.9, BICUBIC, IMAGENET_MEAN, IMAGENET_STD, _UNCUT),
    "timm-clip": _Rule("timm, vit_*_clip", 0.9, BICUBIC, CLIP_MEAN, CLIP_STD, _UNCUT),
    "timm-dinov2": _Rule("timm, vit_*_dinov2", 1.0, BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
    "torchvision": _Rule("torchvision, IMAGENET1K_V1", 224 / 256, BILINEAR, IMAGENET_MEAN, IMAGENET_STD, _SWAG),
    "dinov2": _Rule("facebookresearch/dinov2", 224 / 256, BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
    "open_clip": _Rule("OpenCLIP", 1.0, BICUBIC, CLIP_MEAN, CLIP_STD),
    "hf_clip": _Rule("CLIPImageProcessor of transformers", 1.0, BICUBIC, CLIP_MEAN, CLIP_STD),
    "hf_siglip": _Rule("SiglipImageProcessor of transformers", None, BICUBIC, HALF, HALF),
    "hf_deit": _Rule("DeiT of transformers", 224 / 256, BICUBIC, IMAGENET_MEAN, IMAGENET_STD),
    "hf_dinov2": _DINOV2,
    "hf_dinov2_reg": _DINOV2,
}
# The defaults of transformers' image processors.
_BY_SIDE = {
    "size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": BICUBIC,
    "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip
_ALWAYS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "do_center_crop": False,
}
_PROCESSORS = {
    "ViT": {"size": 224, "resample": BILINEAR, "image_mean": HALF, "image_std": HALF},
    "DeiT": _BY_SIDE | {"size": 256, "image_mean": HALF, "image_std": HALF},
    "Bit": _BY_SIDE,
    "CLIP": _BY_SIDE,
}


def preprocessing(source: str, size: tuple[int, int]) -> Preprocessing:
    """The preprocessing of ``source``, a key of `SOURCES`, for a model with input ``size`` = (height, width)."""
    if source not in SOURCES:
        raise ValueError(f"unknown preprocessing {source!r}; known: {', '.join(SOURCES)}")
    rule = SOURCES[source]
    rule = dataclasses.replace(rule, **rule.from_384) if min(size) >= 384 else rule
    values = {"resample": rule.resample, "mean": rule.mean, "std": rule.std}
    if rule.crop_pct is None:
        return Preprocessing(rule.where, size, None, **values)
    # timm and torchvision resize the shorter side, and assume square sizes.
    shorter = math.floor(max(size) / rule.crop_pct)
    return Preprocessing(rule.where, shorter, size, **values, odd_down=source == "big_vision")


def of_folder(folder: Path, size: tuple[int, int]) -> Preprocessing | None:
    """The preprocessing in a checkpoint's folder: transformers' preprocessor_config.json, or timm's config.json."""
    told = _json(folder / "preprocessor_config.json")
    if told is not None:
        return _of_transformers(told)
    told = (_json(folder / "config.json") or {}).get("pretrained_cfg")
    return of_timm(told, size, f"{folder / 'config.json'}") if isinstance(told, dict) else None


def of_timm(told: dict[str, Any], size: tuple[int, int], source: str) -> Preprocessing:
    """The preprocessing that ``told``, timm's pretrained_cfg, describes."""
    resample = getattr(Image.Resampling, told.get("interpolation", "bicubic").upper())
    mean, std = (tuple(told.get(key, HALF)) for key in ("mean", "std"))
    crop_pct, squeeze = told.get("crop_pct", 0.9), told.get("crop_mode") == "squash"
    resize = tuple(math.floor(n / crop_pct) for n in size) if squeeze else math.floor(max(size) / crop_pct)
    return Preprocessing(source, resize, size, resample, mean, std)


def of_note(told: dict[str, Any], size: tuple[int, int], source: str) -> Preprocessing | None:
    """The preprocessing of a model that this package trained: the whole picture is resized, as in training.

    Args:
        told: the model's ``pretrained_cfg``.
        size: (height, width) of the model's input.
        source: what to name as the source.

    Returns:
        None if ``told`` has no mean and std, or describes the weights of another library in `SOURCES`.
    """
    ours = "training" in told or told["source"] == "timm" or told["source"] not in SOURCES
    if not (ours and "mean" in told and "std" in told):
        return None
    return Preprocessing(source, size, None, BILINEAR, tuple(told["mean"]), tuple(told["std"]))


def class_names(folder: Path) -> dict[int, str]:
    """Class names from config.json: transformers' id2label or timm's label_names; {} for generic names (LABEL_0)."""
    config = _json(folder / "config.json") or {}
    return real_names(config.get("id2label") or config.get("label_names"))


def real_names(told: Any) -> dict[int, str]:
    """Class names by index, from a list or a dictionary; {} for anything else and for generic names (LABEL_0)."""
    told = dict(enumerate(told)) if isinstance(told, list) else told if isinstance(told, dict) else {}
    names = {int(index): str(name) for index, name in told.items()}
    generic = all(name == f"LABEL_{index}" for index, name in names.items())
    return {} if generic else names


def open_photo(path: Path) -> Image.Image:
    """Opens a photograph in RGB, rotated as its EXIF data say.

    What is transparent becomes white. Of 16 bits a channel, the upper 8 are kept.

    Raises:
        ValueError: Pillow cannot identify the file as a picture, it is damaged or huge, or it is not a regular file.
        OSError: the file cannot be read.
    """
    if path.exists() and not path.is_file():  # opening a pipe would block
        raise ValueError(f"{path} is not a regular file")
    try:
        with Image.open(path) as photo:
            return _rgb(ImageOps.exif_transpose(photo))
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not a picture that Pillow reads") from error
    except (SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _rgb(photo: Image.Image) -> Image.Image:
    if photo.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion makes everything above 255 white
        return Image.fromarray((np.asarray(photo).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if photo.has_transparency_data:
        photo = photo.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo).convert("RGB")
    return photo.convert("RGB")


def to_tensor(
    photos: list[Image.Image], mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF, scale: float = 1 / 255
) -> Tensor:
    """[B, C, H, W] in fp32: (pixel · scale − mean) / std. Grey photographs have one channel."""
    pixels = np.stack([np.array(photo) for photo in photos])  # [B, H, W] or [B, H, W, C]
    pixels = torch.from_numpy(pixels).view(*pixels.shape[:3], -1).movedim(3, 1) * scale
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def _of_transformers(told: dict[str, Any]) -> Preprocessing:
    name = str(told.get("image_processor_type") or told.get("feature_extractor_type") or "ViT")
    kind = next((kind for kind in _PROCESSORS if name.startswith(kind)), None)
    if kind is None:
        raise ValueError(f"preprocessor_config.json: {name} is not supported; choose one with --preprocess")
    told = _ALWAYS | _PROCESSORS[kind] | told
    mean, std = (told["image_mean"], told["image_std"]) if told["do_normalize"] else ((0.0,) * 3, (1.0,) * 3)
    return Preprocessing(
        "preprocessor_config.json",
        _size(told["size"], by_side=kind in ("Bit", "CLIP")) if told["do_resize"] else None,
        _size(told["crop_size"], by_side=False) if told["do_center_crop"] else None,
        told["resample"],
        tuple(mean),
        tuple(std),
        told["rescale_factor"] if told["do_rescale"] else 1.0,
        odd_down=True,
    )


def _size(told: int | dict[str, int], by_side: bool) -> tuple[int, int] | int:
    if isinstance(told, int):
        return told if by_side else (told, told)
    if "shortest_edge" in told:
        return told["shortest_edge"]
    if not {"height", "width"} <= told.keys():
        raise ValueError(f"preprocessor_config.json: a size of {told} is not supported")
    return told["height"], told["width"]


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return told if isinstance(told, dict) else None


def _figures(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.3g}" for value in (values[:1] if len(set(values)) == 1 else values))
