"""A map of patches over a photograph. Needs only numpy and Pillow. Shapes: GH x GW patches."""

from __future__ import annotations

import numpy as np
from PIL import Image

STOPS = np.array([(10, 6, 40), (84, 16, 110), (187, 55, 84), (249, 142, 8), (252, 255, 164)], dtype=float)
SIDE = 448  # pixels, the least length of the longer side of a picture


def levels(values: np.ndarray, percentile: float = 99.0) -> np.ndarray:
    """``values`` from 0, the smallest, to 1, which all have from the ``percentile`` on.

    Few patches often hold much of the attention. Scaled to the largest one, all others would be black.
    """
    low, high = values.min(), np.percentile(values, percentile)
    if high <= low:
        return (values > low).astype(float)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def colours(level: np.ndarray) -> np.ndarray:
    """RGB [..., 3] from 0 to 255 of levels [...]: from dark to bright, also without colours."""
    places = np.linspace(0, 1, len(STOPS))
    return np.stack([np.interp(level, places, stop) for stop in STOPS.T], axis=-1)


def enlarged(photo: Image.Image) -> Image.Image:
    """``photo``, with at least `SIDE` pixels on the longer side."""
    scale = SIDE / max(photo.size)
    if scale <= 1:
        return photo
    return photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))), Image.BICUBIC)


def overlay(photo: Image.Image, level: np.ndarray, patch_size: tuple[float, float]) -> Image.Image:
    """``photo`` in grey under the smoothed colours of ``level`` [GH, GW].

    ``patch_size`` is (height, width) in pixels of ``photo``. The last patches may stick out of it.
    """
    rows, columns = level.shape
    size = max(photo.width, round(columns * patch_size[1])), max(photo.height, round(rows * patch_size[0]))
    smooth = np.asarray(Image.fromarray(level.astype(np.float32)).resize(size, Image.BICUBIC))
    smooth = smooth[: photo.height, : photo.width].clip(0.0, 1.0)
    opacity = 0.45 + 0.35 * smooth[..., None]
    grey = np.asarray(photo.convert("L"), dtype=float)[..., None]  # so that every colour is one of the map
    mixed = (1 - opacity) * grey + opacity * colours(smooth)
    return Image.fromarray(mixed.round().astype(np.uint8))


def beside(*pictures: Image.Image, down: bool = False, gap: int = 8) -> Image.Image:
    """Pictures in a row, or in a column with ``down``, with white between them and after smaller ones."""
    along = [p.height if down else p.width for p in pictures]
    length, across = sum(along) + gap * (len(pictures) - 1), max(p.width if down else p.height for p in pictures)
    whole, start = Image.new("RGB", (across, length) if down else (length, across), "white"), 0
    for picture, size in zip(pictures, along, strict=True):
        whole.paste(picture, (0, start) if down else (start, 0))
        start += size + gap
    return whole
