"""The table of measured models and batch sizes. The shapes of every op follow from them."""

from __future__ import annotations

import dataclasses
import functools
import re

from vit.config import ViTConfig, get_config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model by timm's name, a batch, and an image size if it is not that of the name."""

    model: str
    batch: int
    img_size: int | None = None

    @functools.cached_property
    def config(self) -> ViTConfig:
        return get_config(self.model, **({} if self.img_size is None else {"img_size": self.img_size}))

    tokens = property(lambda self: self.config.num_tokens)
    rows = property(lambda self: self.batch * self.tokens)  # of the token matrix
    width = property(lambda self: self.config.embed_dim)
    hidden = property(lambda self: self.config.mlp_hidden_dim)
    heads = property(lambda self: self.config.num_heads)
    head_dim = property(lambda self: self.config.head_dim)

    def __str__(self) -> str:
        """As in records: ``vit_base_patch16_224/b256``, or ``vit_base_patch16_224@320/b256`` for another image size."""
        return f"{self.model}{'' if self.img_size is None else f'@{self.img_size}'}/b{self.batch}"


def parse(text: str) -> Shape:
    """The `Shape` of such a text.

    Raises:
        ValueError: it is not of the form ``MODEL/bBATCH`` or ``MODEL@SIZE/bBATCH``, or there is no such model.
    """
    found = re.fullmatch(r"(\w+?)(?:@(\d+))?/b(\d+)", text)
    if not found or int(found[3]) < 1:
        raise ValueError(f"shape {text!r} is not understood; write it as in vit_base_patch16_224/b256")
    shape = Shape(found[1], int(found[3]), int(found[2]) if found[2] else None)
    shape.config  # noqa: B018 (raises if there is no such model or size)
    return shape


#: The most important first. README's table has these names.
MODELS = {
    "B/16": Shape("vit_base_patch16_224", 256),
    "L/16": Shape("vit_large_patch16_224", 128),
    "H/14": Shape("vit_huge_patch14_224", 64),
    "B/16@384": Shape("vit_base_patch16_384", 64),
    "S/16": Shape("vit_small_patch16_224", 256),
}
#: For latency: one image.
LATENCY = Shape("vit_base_patch16_224", 1)
#: Fig. 12 of the ViT paper: speed and largest batch of B/16 by the side of the image.
SIDES = (64, 128, 224, 384, 512)
#: Small enough for a CPU, and ragged: 17 tokens, 3 heads.
SMALL = Shape("vit_tiny_patch16_224", 2, 64)
