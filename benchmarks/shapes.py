"""The one table of what is measured: models at a batch size. The shapes of every op follow from them."""

from __future__ import annotations

import dataclasses
import functools
import re

from vit.config import ViTConfig, get_config


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model under timm's name, a batch, and an image size where it is not the name's own."""

    model: str
    batch: int
    img_size: int | None = None

    @functools.cached_property
    def config(self) -> ViTConfig:
        return get_config(self.model, **({} if self.img_size is None else {"img_size": self.img_size}))

    tokens = property(lambda self: self.config.num_tokens)
    rows = property(lambda self: self.batch * self.tokens)  # of the token matrix that linear layers and norms see
    width = property(lambda self: self.config.embed_dim)
    hidden = property(lambda self: self.config.mlp_hidden_dim)
    heads = property(lambda self: self.config.num_heads)
    head_dim = property(lambda self: self.config.head_dim)

    def __str__(self) -> str:
        """As in the records: ``vit_base_patch16_224/b256``; of another image size ``vit_base_patch16_224@320/b256``."""
        return f"{self.model}{'' if self.img_size is None else f'@{self.img_size}'}/b{self.batch}"


def parse(text: str) -> Shape:
    """The `Shape` that is written so.

    Raises:
        ValueError: it is not of the form ``MODEL/bBATCH`` or ``MODEL@SIZE/bBATCH``, or there is no such model.
    """
    found = re.fullmatch(r"(\w+?)(?:@(\d+))?/b(\d+)", text)
    if not found or int(found[3]) < 1:
        raise ValueError(f"shape {text!r} is not understood; write vit_base_patch16_224/b256, say")
    shape = Shape(found[1], int(found[3]), int(found[2]) if found[2] else None)
    shape.config  # noqa: B018 (raises where there is no such model or size)
    return shape


#: Most wanted first. The names of the columns of README's table come from here, too.
MODELS = {
    "B/16": Shape("vit_base_patch16_224", 256),
    "L/16": Shape("vit_large_patch16_224", 128),
    "H/14": Shape("vit_huge_patch14_224", 64),
    "B/16@384": Shape("vit_base_patch16_384", 64),
    "S/16": Shape("vit_small_patch16_224", 256),
}
#: Where latency counts: one image.
LATENCY = Shape("vit_base_patch16_224", 1)
#: The paper's Fig. 12: speed and largest batch of B/16 against the image's side.
SIDES = (64, 128, 224, 384, 512)
#: Small enough for a CPU, and with ragged edges: 17 tokens, 3 heads.
SMALL = Shape("vit_tiny_patch16_224", 2, 64)
