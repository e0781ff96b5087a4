"""Hugging Face's vision transformers: layer, attention and MLP (as of transformers 5.23).

Most models have the same pre-LN layer under other names. So a model is a row of `ROWS`, and the row is data: what the
layer calls its parts, and how it calls its attention.

The models call their layers one by one, and a layer does not know the next one. So the add at its end and the norm of
the next layer are two kernels. That and the weights of `_projected` are 3.5 % more bytes than in timm's accelerated
model in a forward of ViT-B/16 at batch 256, and 2.8 % more in a training step. A layer that computed its successor's
norm would have to keep it outside the autograd graph of a checkpoint, and through layers that are removed or exchanged.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import vit.kernels as kernels
from vit.adapters import generic, parts
from vit.adapters.fused import Part, is_fused
from vit.plain import is_linear, linear, owner_of, plain


class Row(NamedTuple):
    """One model of transformers. The defaults are those of ViT.

    Attributes:
        attend: the layer's call of its attention. Its parameters are those of the layer's ``forward``.
        norm1: name of the norm before the attention.
        attention: name of the attention. It returns the branch, or a tuple that starts with the branch.
        norm2: name of the norm before the MLP.
        mlp: name of the MLP, or of its halves: a linear layer with the activation, and one that adds the residual, too.
        dropout: name of the dropout after the attention and after the MLP, if the layer has one.
        layer_scales: names of the two LayerScales, or nothing.
        drop_path: name of the stochastic depth of both branches, if the layer has it.
        takes: parameters of the attention's ``forward`` after the hidden states.
        qkv: names of the projections to queries, keys and values, or of one projection to all three.
        out: name of the output projection, if the attention module has it.
        heads: name of the number of heads.
        attention_dropout: name of the dropout of the probabilities, a number or a module.
        scale: name of the factor of the logits.
        rope: name of the library's function that rotates queries and keys, if there is one.
        linears: names of an MLP's first linear layer, activation and second linear layer.
        classes: how the names of the classes of layer, attention and MLP (one or two) end.
        patches: how the name of the class with the patch projection ends, and the projection's name.
    """

    attend: Callable
    norm1: str = "layernorm_before"
    attention: str = "attention"
    norm2: str = "layernorm_after"
    mlp: tuple[str, ...] = ("mlp",)
    dropout: str = ""
    layer_scales: tuple[str, ...] = ()
    drop_path: str = ""
    takes: tuple[str, ...] = ("attention_mask", "kwargs")
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    heads: str = "num_attention_heads"
    attention_dropout: str = "attention_dropout"
    scale: str = "scaling"
    rope: str = ""
    linears: tuple[str, str, str] = ("fc1", "activation_fn", "fc2")
    classes: tuple[str, ...] = ("Layer", "Attention", "MLP")
    patches: tuple[str, str] = ("PatchEmbeddings", "projection")


VIT = Row(
    lambda attention, hidden_states, attention_mask=None, **kwargs: attention(hidden_states, attention_mask, **kwargs),
    dropout="dropout",
)
DINO = Row(
    lambda attention, hidden_states, attention_mask=None, **kwargs: attention(
        hidden_states, attention_mask=attention_mask, **kwargs
    ),
    norm1="norm1",
    norm2="norm2",
    layer_scales=("layer_scale1", "layer_scale2"),
    drop_path="drop_path",
)
CLIP = Row(
    lambda attention, hidden_states, attention_mask, **kwargs: attention(
        hidden_states=hidden_states, attention_mask=attention_mask, **kwargs
    ),
    norm1="layer_norm1",
    attention="self_attn",
    norm2="layer_norm2",
    out="out_proj",
    heads="num_heads",
    attention_dropout="dropout",
    scale="scale",
    classes=("EncoderLayer", "Attention", "MLP"),
    patches=("VisionEmbeddings", "patch_embedding"),
)
CLIP_VISION = CLIP._replace(patches=("Embeddings", "patch_embedding"))  # where the names of all classes have "Vision"
BLIP = CLIP._replace(
    attend=lambda attention, hidden_states, **kwargs: attention(hidden_states=hidden_states, **kwargs),
    takes=("kwargs",),
    qkv=("qkv",),
    out="projection",
)
YOLOS = Row(
    lambda attention, hidden_states, **kwargs: attention(hidden_states, **kwargs),
    mlp=("intermediate", "output"),
    takes=("kwargs",),
    qkv=("query", "key", "value"),
    out="",
    attention_dropout="dropout_prob",
    classes=("Layer", "SelfAttention", "Intermediate", "Output"),
)
ROWS = {
    "vit.ViT": VIT,
    "deit.DeiT": VIT,
    "vit_mae.ViTMAE": VIT,
    "vit_msn.ViTMSN": VIT,
    "ijepa.IJepa": VIT,
    "audio_spectrogram_transformer.AST": VIT,
    "vivit.Vivit": VIT,
    "pixio.Pixio": VIT._replace(drop_path="drop_path"),
    "dinov2.Dinov2": DINO,
    "dinov2_with_registers.Dinov2WithRegisters": DINO,
    "tipsv2.Tipsv2Vision": DINO,
    "radio.Radio": DINO._replace(
        takes=("attention_mask", "cu_seqlens", "kwargs"), patches=("PatchEmbeddings", "patch_projection")
    ),
    "dinov3_vit.DINOv3ViT": DINO._replace(
        attend=lambda attention, hidden_states, attention_mask=None, position_embeddings=None, **kwargs: attention(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        ),
        takes=("attention_mask", "position_embeddings", "kwargs"),
        heads="num_heads",
        attention_dropout="dropout",
        rope="apply_rotary_pos_emb",
        linears=("up_proj", "act_fn", "down_proj"),
        patches=("Embeddings", "patch_embeddings"),
    ),
    "clip.CLIP": CLIP,
    "metaclip_2.MetaClip2": CLIP,
    "altclip.AltCLIP": CLIP,
    "chinese_clip.ChineseCLIPVision": CLIP_VISION._replace(classes=("Layer", "Attention", "MLP")),
    "clipseg.CLIPSeg": CLIP,
    "owlvit.OwlViT": CLIP,
    "owlv2.Owlv2": CLIP,
    "git.GitVision": CLIP_VISION,
    "kosmos2.Kosmos2Vision": CLIP_VISION,
    "siglip.Siglip": CLIP,
    "siglip2.Siglip2": CLIP,
    "idefics2.Idefics2": CLIP._replace(classes=("EncoderLayer", "VisionAttention", "VisionMLP")),
    "idefics3.Idefics3": CLIP._replace(classes=("EncoderLayer", "VisionAttention", "VisionMLP")),
    "smolvlm.SmolVLM": CLIP._replace(classes=("EncoderLayer", "VisionAttention", "VisionMLP")),
    "blip.Blip": BLIP,
    "blip_2.Blip2": BLIP._replace(attention_dropout="attention_dropout"),
    "instructblip.InstructBlip": BLIP._replace(attention_dropout="attention_dropout"),
    "instructblipvideo.InstructBlipVideo": BLIP._replace(attention_dropout="attention_dropout"),
    "yolos.Yolos": YOLOS,
    "dpt.DPT": YOLOS._replace(
        classes=("ViTLayer", "SelfAttention", "ViTIntermediate", "ViTOutput"),
        patches=("ViTPatchEmbeddings", "projection"),
    ),
    "videomae.VideoMAE": YOLOS._replace(takes=()),
    "vitpose_backbone.VitPoseBackbone": YOLOS._replace(
        attend=lambda attention, hidden_states, dataset_index=None, **kwargs: attention(hidden_states, **kwargs),
        mlp=("mlp",),
        linears=("fc1", "activation", "fc2"),
        classes=("Layer", "SelfAttention", "MLP"),
    ),
}


def refuse(takes: list[str], module: nn.Module) -> str | None:
    """Refuses layers and attentions of other transformers versions, which have the same names but other code."""
    if getattr(module, "num_experts", 1) > 1:
        return "its MLP has experts"
    if list(inspect.signature(owner_of(type(module)).forward).parameters)[2:] == takes:
        return None
    return "its forward is not that of transformers 5.17 to 5.23, the versions known; install one of them"


def layer(row: Row, base: type, impl: str):
    # Without its own __call__, the class applies gradient checkpointing in the forward that we replace.
    checkpoints = base.__call__ is nn.Module.__call__

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        drop = getattr(self, row.dropout) if row.dropout else lambda branch: branch
        scales = [getattr(self, name) for name in row.layer_scales] or [None, None]
        drop_path = getattr(self, row.drop_path) if row.drop_path else None
        y = parts.layer_norm(getattr(self, row.norm1), x, impl)
        branch = row.attend(getattr(self, row.attention), y, *args, **kwargs)
        branch = drop(branch[0] if isinstance(branch, tuple) else branch)
        x, y = parts.add_norm(x, branch, getattr(self, row.norm2), impl, scales[0], drop_path)
        *first, last = (getattr(self, name) for name in row.mlp)
        if not first:
            branch = drop(last(y))
        elif all(is_fused(half) and plain(half) for half in (*first, last)):
            branch = parts.mlp(first[0].dense, first[0].intermediate_act_fn, None, last.dense, y, impl)
            branch = last.dropout(branch)
        else:
            return last(first[0](y), x)
        return parts.add_norm(x, branch, None, impl, scales[1], drop_path)[0]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if checkpoints and self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(functools.partial(run, self, **kwargs), hidden_states, *args)
        return run(self, hidden_states, *args, **kwargs)

    return forward


def attention(row: Row, base: type, impl: str):
    original = base.forward
    rotate = getattr(sys.modules[owner_of(base).__module__], row.rope) if row.rope else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        given = dict(zip(row.takes, args, strict=False)) | kwargs
        tables, mask = given.pop("position_embeddings", None), given.get("attention_mask")
        # A tensor among the arguments is a mask, a bias or the lengths of packed sequences.
        special = mask is not None or given.get("is_causal") or any(isinstance(t, Tensor) for t in given.values())
        drop = None if special or (rotate is None) != (tables is None) else _dropping(self, row, hidden_states)
        if drop is None:
            return original(self, hidden_states, *args, **kwargs)
        projected = _projected([getattr(self, name) for name in row.qkv], hidden_states, impl)
        heads, options = getattr(self, row.heads), {"scale": getattr(self, row.scale), "impl": impl} | drop
        wanted = given.get("output_attentions", getattr(self.config, "output_attentions", False)) or _recorded(self)
        if len(projected) == 1 and rotate is None and not wanted:
            o, weights = kernels.attention_qkvpacked(*projected, num_heads=heads, **options), None
        else:
            three = projected if len(projected) == 3 else projected[0].chunk(3, dim=-1)
            q, k, v = (t.unflatten(-1, (heads, -1)) for t in three)  # [B, N, HEADS, HEAD_DIM] each
            if rotate is not None:
                q, k = (t.transpose(1, 2) for t in rotate(q.transpose(1, 2), k.transpose(1, 2), *tables))
            o, weights = parts.attention_and_maps(q, k, v, wanted, **options)
        return linear(getattr(self, row.out), o, impl) if row.out else o, weights

    return forward


def _projected(layers: list[nn.Module], x: Tensor, impl: str) -> list[Tensor]:
    """Queries, keys and values [B, N, D], or one tensor [B, N, 3·D] if the model or enough tokens allow one product.

    One product reads x once instead of three times: 2·B·N·D elements less. It needs the three weights in one tensor,
    which is 6·D·D elements read and written. Its backward saves more.
    """
    if len(layers) == 1:
        return [linear(*layers, x, impl)]
    if all(map(is_linear, layers)) and x.shape[:-1].numel() > 3 * layers[0].out_features:
        weights, bias = [layer.weight for layer in layers], None
        if len({t.dtype for t in weights}) == 1:
            if any(layer.bias is not None for layer in layers):
                zeros = weights[0].new_zeros(len(weights[0]))
                bias = torch.cat([zeros if layer.bias is None else layer.bias for layer in layers])
            return [kernels.linear(x, torch.cat(weights), bias, impl=impl)]
    x = parts.kept(x)
    return [linear(layer, x, impl) for layer in layers]


def _dropping(module: nn.Module, row: Row, x: Tensor) -> dict[str, Any] | None:
    dropout = getattr(module, row.attention_dropout)
    if isinstance(dropout, nn.Module):
        return parts.dropping(dropout, x)
    return parts.draw(dropout if module.training else 0.0, x)


def _recorded(attention: nn.Module) -> bool:
    """Whether transformers' hooks record the attention maps, which not every model tells its layers."""
    recorder = sys.modules.get("transformers.utils.output_capturing") if attention._forward_hooks else None
    return recorder is not None and "attentions" in (recorder._active_collector.get() or ())


def mlp(row: Row, base: type, impl: str):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        fc1, act, fc2 = (getattr(self, name) for name in row.linears)
        return parts.mlp(fc1, act, None, fc2, x, impl)

    return forward


def intermediate(base: type, impl: str):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(linear(self.dense, hidden_states, impl))

    return forward


def output(base: type, impl: str):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.dropout(linear(self.dense, hidden_states, impl)) + input_tensor

    return forward


def pooling(base: type, impl: str):
    """Attention pooling (MAP) of SigLIP: a learned query, then an MLP with a residual."""
    original = base.forward

    def forward(self, hidden_state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        special = any(argument is not None for argument in (*args, *kwargs.values()))
        probe = self.probe.expand(len(hidden_state), -1, -1)
        x = None if special else generic.cross_attention(self.attention, probe, hidden_state, impl)
        if x is None:
            return original(self, hidden_state, *args, **kwargs)
        return (x + self.mlp(parts.layer_norm(self.layernorm, x, impl)))[:, 0]

    return forward


MODULES, PATCHES, CHILDREN = {}, {}, {}
for _name, _row in ROWS.items():
    _path = "transformers.models.{0}.modeling_{0}.{1}".format(*_name.split("."))
    _layer, _attention, *_mlps = (_path + _suffix for _suffix in _row.classes)
    _takes = list(inspect.signature(_row.attend).parameters)[2:]
    MODULES[_layer] = Part("block", functools.partial(layer, _row), functools.partial(refuse, _takes))
    MODULES[_attention] = Part(
        "attention", functools.partial(attention, _row), functools.partial(refuse, [*_row.takes])
    )
    _makes = [functools.partial(mlp, _row)] if len(_mlps) == 1 else [intermediate, output]
    MODULES |= {_mlp: Part("mlp", _make) for _mlp, _make in zip(_mlps, _makes, strict=True)}
    MODULES[_path + "MultiheadAttentionPoolingHead"] = Part("attention", pooling)
    PATCHES[_path + _row.patches[0]] = _row.patches[1]
    parts.LAYER_SCALES[_path + "LayerScale"] = "lambda1"
    parts.DROP_PATHS.add(_path + "DropPath")
    CHILDREN |= {_row.norm1: "norm", _row.attention: "attention", _row.norm2: "norm"} | dict.fromkeys(_row.mlp, "mlp")
    CHILDREN |= dict.fromkeys((*_row.layer_scales, _row.drop_path), "scale")
