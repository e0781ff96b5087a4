"""The Vision Transformer: patch embedding, blocks, head.

Shapes: B images, R prefix tokens, N tokens in total, D = embed_dim.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vit.kernels as kernels
from vit.config import ViTConfig
from vit.groups import MATCHER, NO_WEIGHT_DECAY
from vit.init import init_weights
from vit.layers import (
    HEAD,
    POS,
    AttentionPool,
    Block,
    Blocks,
    Dropout,
    LayerNorm,
    Linear,
    PatchEmbed,
    PreLogits,
    lendable,
    run_blocks,
    seeded,
)
from vit.plain import absent, hooked
from vit.tokens import PatchDrop, resize_pos_embed, take_indices


class VisionTransformer(nn.Module):
    """A ViT (Dosovitskiy et al., ICLR 2021) on the ops of `vit.kernels`, with timm's state-dict keys.

    Args:
        config: the architecture, and the ``impl`` of every op.
        seed: seed of the initial weights, see `vit.init.init_weights`.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        config: ViTConfig,
        seed: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self._source: dict[str, Any] = {}  # the entries of `pretrained_cfg` that describe the weights
        dim = config.embed_dim
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
            self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim)) if config.use_mask_token else None
            self.pos_embed = nn.Parameter(torch.empty(1, config.pos_embed_len, dim))
            self.patch_embed = PatchEmbed(config)
            self.pos_drop = Dropout(config, config.pos_drop_rate, POS)
            self.patch_drop = PatchDrop(config)
            self.norm_pre = LayerNorm(config) if config.pre_norm else nn.Identity()
            self.blocks = Blocks(*(Block(config, index) for index in range(config.depth)))
            before, after = (config.final_norm and config.use_fc_norm is pooled for pooled in (False, True))
            self.norm = LayerNorm(config) if before else nn.Identity()
            self.attn_pool = AttentionPool(config) if config.global_pool == "map" else None
            self.fc_norm = LayerNorm(config) if after else nn.Identity()
            self.pre_logits = PreLogits(config) if config.representation_size else nn.Identity()
            self.head_drop = Dropout(config, config.drop_rate, HEAD)
            width = config.representation_size or dim
            self.head = Linear(config, width, config.num_classes) if config.num_classes else nn.Identity()
        init_weights(self, seed)
        if dtype is not None:
            self.to(dtype)

    def forward(
        self,
        image: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        *,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """Classifies images.

        Args:
            image: [B, in_chans, H, W], floating point, in the dtype of the parameters; any strides.
            bool_masked_pos: bool [B, number of patches]; the mask token replaces the patches that are True.
            interpolate_pos_encoding: resize the position embedding to the image. H and W may then be any multiples of
                the patch. None means ``config.dynamic_img_size``.
            dropout_seed: seed of dropout in training, from `vit.kernels.dropout_seed`; None draws one. It does not
                cover ``patch_drop_rate``, which uses PyTorch's generator.

        Returns:
            [B, num_classes], or [B, N, num_classes] if ``global_pool=""``; D columns if the model has no head.

        Raises:
            TypeError: the image is not floating point, the mask is not boolean, or the seed is not an int64 tensor.
            ValueError: the image or the mask does not fit the model, or the model has no mask token.
        """
        seed, arguments = self._seed(image, dropout_seed), (image, bool_masked_pos, interpolate_pos_encoding)
        if self._reads_first_token_alone():
            blocks = self._run(self._embed(*arguments, seed), self.config.depth, seed, first=True)
            ((_, y),) = collections.deque(blocks, maxlen=1)  # [B, 1, D]; keeps no other block's
        else:
            y = self.forward_features(*arguments, dropout_seed=seed)  # [B, N, D]
        return self.forward_head(y, dropout_seed=seed)  # [B, num_classes]

    def forward_features(
        self,
        image: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        *,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """All tokens [B, N, D] after the last block and ``norm``, which is an identity if the model has ``fc_norm``."""
        seed = self._seed(image, dropout_seed)
        x = self._embed(image, bool_masked_pos, interpolate_pos_encoding, seed)  # [B, N, D]
        if hooked(self.blocks):
            return self.norm(self.blocks(x, *([seed, True] if self._recompute else seeded(seed))))
        for _stream, normalised in self._run(x, self.config.depth, seed):
            y = normalised
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False, *, dropout_seed: Tensor | None = None) -> Tensor:
        """Pools tokens [B, N, D] and classifies them; ``pre_logits`` stops before the last projection."""
        if self.config.global_pool == "token":
            x = x[:, 0]  # [B, D]
        elif self.config.global_pool == "avg":
            x = x[:, self.config.num_prefix_tokens :].mean(dim=1)  # [B, D]
        elif self.config.global_pool == "map":
            x = self.attn_pool(x[:, self.config.num_prefix_tokens :])  # [B, D]
        x = self.head_drop(self.pre_logits(self.fc_norm(x)), self._seed(x, dropout_seed))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        image: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        interpolate_pos_encoding: bool | None = None,
    ) -> Any:
        """The residual stream after selected blocks, with timm's options.

        Args:
            image: as for `forward`.
            indices: indices of the blocks; negative ones count from the end. An integer n means the last n blocks,
                None all blocks. The intermediates come in the order of the blocks.
            return_prefix_tokens: return each intermediate as (patch tokens, prefix tokens), if the model has prefixes.
            norm: apply the final norm to each intermediate.
            stop_early: skip the blocks after the last index.
            output_fmt: "NCHW" for patch tokens as a map [B, D, grid height, grid width], "NLC" for [B, N - R, D].
            intermediates_only: return only the list.
            interpolate_pos_encoding: as for `forward`.

        Returns:
            (normalised tokens [B, N, D] after the last block that ran, list of intermediates), or only the list.

        Raises:
            ValueError: an index is out of range, output_fmt is unknown, or output_fmt is "NCHW" in training with
                ``patch_drop_rate``.
            TypeError: an index is not an integer.
        """
        config, taken = self.config, take_indices(self.config.depth, indices)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt={output_fmt!r} is unknown; use "NCHW" or "NLC"')
        if output_fmt == "NCHW" and self.training and config.patch_drop_rate:
            raise ValueError('output_fmt="NCHW" needs all patches; call eval(), or use "NLC" with patch_drop_rate')
        seed = self._seed(image)
        x = self._embed(image, None, interpolate_pos_encoding, seed)
        kept = []
        depth = max(taken) + 1 if stop_early else config.depth
        for index, (stream, normalised) in enumerate(self._run(x, depth, seed), start=-1):
            y = normalised
            if index in taken:
                kept.append(self.norm(stream) if norm else stream)

        prefix = config.num_prefix_tokens
        patches = [x[:, prefix:] for x in kept]
        if output_fmt == "NCHW":
            grid = config.check_image(image, interpolate_pos_encoding)
            patches = [x.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for x in patches]
        if return_prefix_tokens and prefix:
            patches = [(p, x[:, :prefix]) for p, x in zip(patches, kept, strict=True)]
        return patches if intermediates_only else (y, patches)

    def get_intermediate_layers(
        self,
        image: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """`forward_intermediates` with DINO's arguments: the last ``n`` blocks, or the blocks with indices ``n``."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(
            image, n, return_prefix_tokens, norm, output_fmt=output_fmt, intermediates_only=True
        )

    num_features = embed_dim = property(lambda self: self.config.embed_dim)
    head_hidden_size = property(lambda self: self.config.representation_size or self.config.embed_dim)
    num_classes = property(lambda self: self.config.num_classes)
    num_prefix_tokens = property(lambda self: self.config.num_prefix_tokens)
    global_pool = property(lambda self: self.config.global_pool)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and reduction of each block, in timm's format."""
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": max(self.config.patch_size)}
            for i in range(self.config.depth)
        ]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the model's images, its head and its weights.

        `vit.load_pretrained` adds ``source`` and, if the checkpoint has them, ``mean``, ``std`` and ``label_names``.
        Assignment ignores the keys that the model derives from its configuration.
        """
        config = self.config
        return self._source | {
            "input_size": (config.in_chans, *config.img_size),
            "fixed_input_size": not config.dynamic_img_size,
            "interpolation": "bicubic",
            "num_classes": config.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: dict[str, Any]) -> None:
        self._source = {}
        self._source = {key: value for key, value in cfg.items() if key not in self.pretrained_cfg}

    default_cfg = property(lambda self: self.pretrained_cfg)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes backward recompute each block, so that forward keeps no activations of it."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay. Parameters with one dimension should have none either."""
        return set(NO_WEIGHT_DECAY)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that give each parameter its layer, in timm's format. ``coarse`` has no effect, as in timm's ViT."""
        return dict(MATCHER)

    def attention_maps(
        self,
        image: Tensor,
        layers: int | Sequence[int] | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The logits and the attention probabilities. The logits have the same bits as those of `forward`.

        Args:
            image: as for `forward`.
            layers: the blocks, as ``indices`` of `forward_intermediates`. Each map takes B · HEADS · N² numbers.
            bool_masked_pos: as for `forward`.
            interpolate_pos_encoding: as for `forward`.

        Returns:
            (logits, {block: probabilities [B, HEADS, N queries, N keys]}). The probabilities are those before dropout,
            in fp32, or fp64 for an fp64 model.

        Raises:
            ValueError: a block is out of range, or as for `forward`.
            TypeError: as for `forward`.
        """
        taken, seed, maps = take_indices(self.config.depth, layers), self._seed(image), {}
        x, first = self._embed(image, bool_masked_pos, interpolate_pos_encoding, seed), self._reads_first_token_alone()
        for index, (stream, normalised) in enumerate(self._run(x, self.config.depth, seed, first)):
            y = normalised
            if index in taken:
                y = self.blocks[index].norm1(stream) if y is None else y
                maps[index] = kernels.attention_probs(*self.blocks[index].attn.heads(y)[:2])
        return self.forward_head(y, dropout_seed=seed), maps

    def _seed(self, x: Tensor, seed: Tensor | None = None) -> Tensor | None:
        """The seed of dropout: ``seed``, or a new one for None. None in evaluation and if every rate is 0."""
        if seed is not None and not (isinstance(seed, Tensor) and seed.dtype is torch.int64):
            raise TypeError(
                f"dropout_seed must be an int64 tensor, as vit.kernels.dropout_seed returns it, got {seed!r}"
            )
        if not (self.training and self.config.drops):
            return None
        return kernels.dropout_seed(x) if seed is None else seed

    def _embed(
        self, image: Tensor, mask: Tensor | None, interpolate_pos_encoding: bool | None, seed: Tensor | None
    ) -> Tensor:
        """The stream [B, N, D] that enters the first block."""
        grid = self.config.check_image(image, interpolate_pos_encoding)
        self.config.check_mask(mask, image.shape[0], grid)
        pos_embed = resize_pos_embed(self.pos_embed, self.config, grid)  # [1, N or N - R, D]
        masked = {} if mask is None else {"mask_token": self.mask_token, "bool_masked_pos": mask}
        x = self.patch_embed(image, pos_embed, self._prefix(), **masked)
        return self.norm_pre(self.patch_drop(self.pos_drop(x, seed)))

    def _run(
        self, x: Tensor, depth: int, seed: Tensor | None, first: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Runs the first ``depth`` blocks. Yields (x, y) before the first block and after each block.

        x is the residual stream and y its LayerNorm for the next block, or None if the next block computes it itself.
        After the last block y is ``self.norm(x)``. With ``first``, the last block computes the first token alone.
        """
        blocks = list(self.blocks)[:depth]
        for index, (stream, y) in enumerate(run_blocks(blocks, x, self.norm, seed, self._recompute, first)):
            yield stream, self.norm(stream) if y is None and index == depth else y

    def _reads_first_token_alone(self) -> bool:
        """Whether the last block may compute the first token alone: `forward` pools it, and nothing sees the others."""
        names, cls = ("forward_features", "forward_head"), type(self)
        own = all(getattr(cls, n) is getattr(VisionTransformer, n) and n not in self.__dict__ for n in names)
        quiet = type(self.blocks) is Blocks and not hooked(self.blocks) and (lendable(self.norm) or absent(self.norm))
        last = self.blocks[-1] if own and quiet and self.config.global_pool == "token" and len(self.blocks) else None
        return isinstance(last, Block) and last.separates()

    @property
    def _recompute(self) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled()

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    @torch.no_grad()
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a zero-initialised one for fine-tuning (paper, 3.2). 0 classes: no head.

        This also removes the hidden layer of a pre-training head. ``global_pool``, unless None, replaces the pooling;
        the norms do not move. Attention pooling ("map") can be removed, but not added.

        Raises:
            ValueError: the model has no attention pooling to read "map" with.
        """
        if global_pool == "map" and self.attn_pool is None:
            raise ValueError('global_pool="map" has weights, which the model does not have; make the model with it')
        changed = {"num_classes": num_classes, "representation_size": None}
        if global_pool is not None:
            changed |= {"global_pool": global_pool, "fc_norm": self.config.use_fc_norm}
        self.config = config = dataclasses.replace(self.config, **changed)
        self.attn_pool = self.attn_pool if config.global_pool == "map" else None
        like = {"device": self.pos_embed.device, "dtype": self.pos_embed.dtype}
        self.pre_logits = nn.Identity().train(self.training)
        self.head = Linear(config, config.embed_dim, num_classes, **like) if num_classes else nn.Identity()
        self.head.train(self.training)
        for param in self.head.parameters():
            param.zero_()

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what `forward_intermediates` does not need for these blocks, as timm does.

        Args:
            indices: as for `forward_intermediates`. The blocks after the last index are removed.
            prune_norm: also remove the norm after the blocks.
            prune_head: remove the head and its norm, and pool nothing.

        Returns:
            The indices, ascending and not negative.
        """
        taken = sorted(take_indices(self.config.depth, indices))
        del self.blocks[taken[-1] + 1 :]
        if prune_head:
            self.fc_norm = nn.Identity().train(self.training)
            self.reset_classifier(0, "")
        if prune_norm:
            self.norm = nn.Identity().train(self.training)
        before, after = (not isinstance(norm, nn.Identity) for norm in (self.norm, self.fc_norm))
        changed = {"depth": len(self.blocks), "final_norm": before or after, "fc_norm": after}
        self.config = dataclasses.replace(self.config, **changed)
        return taken

    def _prefix(self) -> Tensor | None:
        present = [t for t in (self.cls_token, self.reg_token) if t is not None]
        return torch.cat(present, dim=1) if len(present) > 1 else present[0] if present else None  # [1, R, D]
