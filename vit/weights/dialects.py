"""The dialects of checkpoints: one table of names for each, used for loading and saving.

A row is (their module or tensor, ours, how). ``{i}`` is the index of a block, and ``{a,b,c}`` are tensors that are one
tensor in our model. ``how`` lists the tensors of a module and their layouts. Our names are timm's, see `vit.model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


class Layout(NamedTuple):
    """``load(their tensors, heads)`` returns our tensor, ``save(our tensor, heads)`` theirs."""

    load: Callable[[list[Tensor], int], Tensor]
    save: Callable[[Tensor, int], list[Tensor]]


def _heads(x: Tensor, heads: int, axis: int) -> Tensor:
    if x.shape[axis] != heads:
        raise ValueError(f"has {x.shape[axis]} heads, the model num_heads={heads}")
    return x


SAME = Layout(lambda t, h: t[0], lambda t, h: [t])
ROW = Layout(lambda t, h: t[0][:, None], lambda t, h: [t[:, 0]])  # [1, D]
VECTOR = Layout(lambda t, h: t[0][None, None], lambda t, h: [t[0, 0]])  # [D]
MATRIX = Layout(lambda t, h: t[0][None], lambda t, h: [t[0]])  # [N, D]
KERNEL = Layout(lambda t, h: t[0].mT, lambda t, h: [t.mT])  # [in, out]
HWIO = Layout(lambda t, h: t[0].permute(3, 2, 0, 1), lambda t, h: [t.permute(2, 3, 1, 0)])
JOINED, KV = (  # q, k and v; k and v
    Layout(lambda t, h: torch.stack(t).flatten(0, 1), lambda t, h, n=n: list(t.chunk(n))) for n in (3, 2)
)
QKV_KERNEL, KV_KERNEL, Q_KERNEL = (  # [D, HEADS, HEAD_DIM] each of q, k and v; of k and v; of q
    Layout(
        lambda t, h: torch.stack([_heads(x, h, 1).flatten(1).mT for x in t]).flatten(0, 1),
        lambda t, h, n=n: [x.mT.unflatten(1, (h, -1)) for x in t.chunk(n)],
    )
    for n in (3, 2, 1)
)
QKV_BIAS, KV_BIAS, Q_BIAS = (  # [HEADS, HEAD_DIM] each
    Layout(
        lambda t, h: torch.stack([_heads(x, h, 0).flatten() for x in t]).flatten(),
        lambda t, h, n=n: [x.unflatten(0, (h, -1)) for x in t.chunk(n)],
    )
    for n in (3, 2, 1)
)
OUT_KERNEL = Layout(  # [HEADS, HEAD_DIM, D]
    lambda t, h: _heads(t[0], h, 0).flatten(0, 1).mT,
    lambda t, h: [t.mT.unflatten(0, (h, -1))],
)

# The tensors of a module: (suffix of their name, suffix of ours, layout).
TENSOR = (("", "", SAME),)
TOKEN = (("", "", ROW),)
EMBEDDING = (("", "", VECTOR),)
TABLE = ((".weight", "", MATRIX),)
PROJECTION = ((".weight", ".weight", SAME),)
MODULE = ((".weight", ".weight", SAME), (".bias", ".bias", SAME))
SPLIT = ((".weight", ".weight", JOINED), (".bias", ".bias", JOINED))
PACKED = (("_weight", ".weight", SAME), ("_bias", ".bias", SAME))
NORM = (("/scale", ".weight", SAME), ("/bias", ".bias", SAME))
DENSE = (("/kernel", ".weight", KERNEL), ("/bias", ".bias", SAME))
CONV = (("/kernel", ".weight", HWIO), ("/bias", ".bias", SAME))
QKV = (("/kernel", ".weight", QKV_KERNEL), ("/bias", ".bias", QKV_BIAS))
OUT = (("/kernel", ".weight", OUT_KERNEL), ("/bias", ".bias", SAME))

POOL = tuple(f"attn_pool.{name}" for name in ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2"))
TIMM = (
    *((name, name, TENSOR) for name in ("cls_token", "reg_token", "mask_token", "pos_embed", "attn_pool.latent")),
    *((name, name, MODULE) for name in POOL),
    *((name, name, MODULE) for name in ("patch_embed.proj", "norm_pre", "norm", "fc_norm", "pre_logits.fc", "head")),
    *(
        (f"blocks.{{i}}.{name}", f"blocks.{{i}}.{name}", MODULE)
        for name in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    ),
    *((f"blocks.{{i}}.{name}.gamma", f"blocks.{{i}}.{name}.gamma", TENSOR) for name in ("ls1", "ls2")),
)
DINOV2 = (
    ("register_tokens", "reg_token", TENSOR),
    ("mask_token", "mask_token", TOKEN),
    *(row for row in TIMM if not re.search(r"_token$|_norm|head|pre|pool", row[0]) or row[0] == "cls_token"),
)


def _hf(layer: str, qkv: str, out: str, fc1: str, fc2: str) -> tuple:
    return (
        ("embeddings.cls_token", "cls_token", TENSOR),
        ("embeddings.mask_token", "mask_token", TENSOR),
        ("embeddings.position_embeddings", "pos_embed", TENSOR),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj", MODULE),
        (f"{layer}.layernorm_before", "blocks.{i}.norm1", MODULE),
        (f"{layer}.attention.{qkv}", "blocks.{i}.attn.qkv", SPLIT),
        (f"{layer}.attention.{out}", "blocks.{i}.attn.proj", MODULE),
        (f"{layer}.layernorm_after", "blocks.{i}.norm2", MODULE),
        (f"{layer}.{fc1}", "blocks.{i}.mlp.fc1", MODULE),
        (f"{layer}.{fc2}", "blocks.{i}.mlp.fc2", MODULE),
        ("layernorm", "norm", MODULE),
        ("pooler.dense", "pre_logits.fc", MODULE),
        ("classifier", "head", MODULE),
    )


_ON_DISK = ("encoder.layer.{i}", "attention.{query,key,value}", "output.dense", "intermediate.dense", "output.dense")
_IN_MEMORY = ("layers.{i}", "{q_proj,k_proj,v_proj}", "o_proj", "mlp.fc1", "mlp.fc2")
HF_DEIT = (*_hf(*_ON_DISK), ("embeddings.distillation_token", "reg_token", TENSOR))  # it follows the class token
HF_DINOV2 = (
    ("embeddings.cls_token", "cls_token", TENSOR),
    ("embeddings.register_tokens", "reg_token", TENSOR),
    ("embeddings.mask_token", "mask_token", TOKEN),
    ("embeddings.position_embeddings", "pos_embed", TENSOR),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj", MODULE),
    ("encoder.layer.{i}.norm1", "blocks.{i}.norm1", MODULE),
    ("encoder.layer.{i}.attention.attention.{query,key,value}", "blocks.{i}.attn.qkv", SPLIT),
    ("encoder.layer.{i}.attention.output.dense", "blocks.{i}.attn.proj", MODULE),
    ("encoder.layer.{i}.layer_scale1.lambda1", "blocks.{i}.ls1.gamma", TENSOR),
    ("encoder.layer.{i}.norm2", "blocks.{i}.norm2", MODULE),
    ("encoder.layer.{i}.mlp.fc1", "blocks.{i}.mlp.fc1", MODULE),
    ("encoder.layer.{i}.mlp.fc2", "blocks.{i}.mlp.fc2", MODULE),
    ("encoder.layer.{i}.layer_scale2.lambda1", "blocks.{i}.ls2.gamma", TENSOR),
    ("layernorm", "norm", MODULE),
)
_HF_TOWER = (  # of CLIP and SigLIP
    ("embeddings.patch_embedding", "patch_embed.proj", MODULE),
    ("embeddings.position_embedding", "pos_embed", TABLE),
    ("encoder.layers.{i}.layer_norm1", "blocks.{i}.norm1", MODULE),
    ("encoder.layers.{i}.self_attn.{q_proj,k_proj,v_proj}", "blocks.{i}.attn.qkv", SPLIT),
    ("encoder.layers.{i}.self_attn.out_proj", "blocks.{i}.attn.proj", MODULE),
    ("encoder.layers.{i}.layer_norm2", "blocks.{i}.norm2", MODULE),
    ("encoder.layers.{i}.mlp.fc1", "blocks.{i}.mlp.fc1", MODULE),
    ("encoder.layers.{i}.mlp.fc2", "blocks.{i}.mlp.fc2", MODULE),
    ("post_layernorm", "norm", MODULE),
)
HF_CLIP = (
    ("embeddings.class_embedding", "cls_token", EMBEDDING),
    ("pre_layrnorm", "norm_pre", MODULE),
    *_HF_TOWER,
    ("visual_projection", "head", PROJECTION),
)
HF_SIGLIP = (  # `plain` splits the packed projection of the head
    *_HF_TOWER,
    ("head.probe", "attn_pool.latent", TENSOR),
    ("head.attention.q_proj", "attn_pool.q", MODULE),
    ("head.attention.{k_proj,v_proj}", "attn_pool.kv", ((".weight", ".weight", KV), (".bias", ".bias", KV))),
    ("head.attention.out_proj", "attn_pool.proj", MODULE),
    ("head.layernorm", "attn_pool.norm", MODULE),
    ("head.mlp.fc1", "attn_pool.mlp.fc1", MODULE),
    ("head.mlp.fc2", "attn_pool.mlp.fc2", MODULE),
)
OPEN_CLIP = (
    ("class_embedding", "cls_token", EMBEDDING),
    ("positional_embedding", "pos_embed", (("", "", MATRIX),)),
    ("conv1", "patch_embed.proj", MODULE),
    ("ln_pre", "norm_pre", MODULE),
    ("transformer.resblocks.{i}.ln_1", "blocks.{i}.norm1", MODULE),
    ("transformer.resblocks.{i}.attn.in_proj", "blocks.{i}.attn.qkv", PACKED),
    ("transformer.resblocks.{i}.attn.out_proj", "blocks.{i}.attn.proj", MODULE),
    ("transformer.resblocks.{i}.ls_1.gamma", "blocks.{i}.ls1.gamma", TENSOR),
    ("transformer.resblocks.{i}.ln_2", "blocks.{i}.norm2", MODULE),
    ("transformer.resblocks.{i}.mlp.c_fc", "blocks.{i}.mlp.fc1", MODULE),
    ("transformer.resblocks.{i}.mlp.c_proj", "blocks.{i}.mlp.fc2", MODULE),
    ("transformer.resblocks.{i}.ls_2.gamma", "blocks.{i}.ls2.gamma", TENSOR),
    ("ln_post", "norm", MODULE),
    ("proj", "head", (("", ".weight", KERNEL),)),
)


def _torchvision(fc1: str, fc2: str) -> tuple:
    layer = "encoder.layers.encoder_layer_{i}"
    return (
        ("class_token", "cls_token", TENSOR),
        ("encoder.pos_embedding", "pos_embed", TENSOR),
        ("conv_proj", "patch_embed.proj", MODULE),
        (f"{layer}.ln_1", "blocks.{i}.norm1", MODULE),
        (f"{layer}.self_attention.in_proj", "blocks.{i}.attn.qkv", PACKED),
        (f"{layer}.self_attention.out_proj", "blocks.{i}.attn.proj", MODULE),
        (f"{layer}.ln_2", "blocks.{i}.norm2", MODULE),
        (f"{layer}.mlp.{fc1}", "blocks.{i}.mlp.fc1", MODULE),
        (f"{layer}.mlp.{fc2}", "blocks.{i}.mlp.fc2", MODULE),
        ("encoder.ln", "norm", MODULE),
        ("heads.pre_logits", "pre_logits.fc", MODULE),
        ("heads.head", "head", MODULE),
    )


def _flax(pos: str, attention: int, norm2: int, mlp: int) -> tuple:
    layer = "Transformer/encoderblock_{i}"
    attn = f"{layer}/MultiHeadDotProductAttention_{attention}"
    return (
        ("cls", "cls_token", TENSOR),
        (pos, "pos_embed", TENSOR),
        ("embedding", "patch_embed.proj", CONV),
        (f"{layer}/LayerNorm_0", "blocks.{i}.norm1", NORM),
        (f"{attn}/{{query,key,value}}", "blocks.{i}.attn.qkv", QKV),
        (f"{attn}/out", "blocks.{i}.attn.proj", OUT),
        (f"{layer}/LayerNorm_{norm2}", "blocks.{i}.norm2", NORM),
        (f"{layer}/MlpBlock_{mlp}/Dense_0", "blocks.{i}.mlp.fc1", DENSE),
        (f"{layer}/MlpBlock_{mlp}/Dense_1", "blocks.{i}.mlp.fc2", DENSE),
        ("Transformer/encoder_norm", "norm", NORM),
        ("pre_logits", "pre_logits.fc", DENSE),
        ("head", "head", DENSE),
    )


_MAP_ATTENTION = "MAPHead_0/MultiHeadDotProductAttention_0"
MAP_HEAD = (
    ("MAPHead_0/probe", "attn_pool.latent", TENSOR),
    (f"{_MAP_ATTENTION}/query", "attn_pool.q", (("/kernel", ".weight", Q_KERNEL), ("/bias", ".bias", Q_BIAS))),
    (
        f"{_MAP_ATTENTION}/{{key,value}}",
        "attn_pool.kv",
        (("/kernel", ".weight", KV_KERNEL), ("/bias", ".bias", KV_BIAS)),
    ),
    (f"{_MAP_ATTENTION}/out", "attn_pool.proj", OUT),
    ("MAPHead_0/LayerNorm_0", "attn_pool.norm", NORM),
    ("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1", DENSE),
    ("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2", DENSE),
)

# Fields of `ViTConfig` that come from a checkpoint's library.
NUMERICS = ("norm_eps", "act_layer", "interpolation", "act_drop_rate")


class Dialect(NamedTuple):
    """The table of a library, and the numerics of its models."""

    rows: tuple
    optional: str  # regular expression of our tensors that a file may lack
    interpolation: str  # in forward, the nearest that our model has
    norm_eps: float = 1e-6
    act_layer: str = "gelu"
    act_drop_rate: float | None = None  # 0: the library has no dropout after the activation
    prefix_rows: str = "class"  # prefix tokens with a row in pos_embed, usual choice first: "all", "class", "none"
    resize: dict[str, Any] | None = None  # F.interpolate's arguments on load, if not ``interpolation``
    ignored: str = "$^"  # regular expression of their tensors that our models never need
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)  # of the images; None: depends on the model
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    head_bias: bool = True  # False: the head is a projection without bias, so ours is zero
    classifier: str | None = None  # what the library's classifier reads, if our head cannot
    dropout: tuple[tuple[str, str], ...] = ()  # our rates, and the words of Hugging Face's config.json
    prefix: str = ""  # of the ViT's names in a file


_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_HEAD = r"(pre_logits|head)\."
_HF = {
    "optional": rf"{_HEAD}|mask_token|.*qkv\.bias",
    "interpolation": "bicubic",
    "norm_eps": 1e-12,
    "act_drop_rate": 0.0,
    "ignored": r"decoder\.",
    "dropout": (
        ("pos_drop_rate", "hidden_dropout_prob"),
        ("proj_drop_rate", "hidden_dropout_prob"),
        ("attn_drop_rate", "attention_probs_dropout_prob"),
    ),
}
_HF_DINOV2 = {
    "optional": r"reg_token|mask_token|.*qkv\.bias",
    "act_drop_rate": 0.0,
    "ignored": r"classifier\.",
    "classifier": "the class token beside the mean of the patches",
    "dropout": (
        ("pos_drop_rate", "hidden_dropout_prob"),
        ("attn_drop_rate", "attention_probs_dropout_prob"),
        ("drop_path_rate", "drop_path_rate"),
    ),
} | _IMAGENET
_TORCHVISION = {
    "optional": _HEAD,
    "interpolation": "bicubic",
    "resize": {"mode": "bicubic", "align_corners": True},
} | _IMAGENET
_FLAX = {
    "optional": rf"{_HEAD}|cls_token|attn_pool\.",
    "interpolation": "bicubic",
    "act_layer": "gelu_tanh",
    "resize": {"mode": "bilinear", "align_corners": True},
}
DIALECTS = {
    "timm": Dialect(TIMM, ".*", "bicubic_antialias", prefix_rows="all none", mean=None, std=None),
    "hf": Dialect(_hf(*_ON_DISK), **_HF),
    "hf_memory": Dialect(_hf(*_IN_MEMORY), **_HF),
    "hf_deit": Dialect(HF_DEIT, **_HF, **_IMAGENET, prefix_rows="all", prefix="deit."),
    "torchvision": Dialect(_torchvision("0", "3"), **_TORCHVISION),
    "torchvision_old": Dialect(_torchvision("linear_1", "linear_2"), **_TORCHVISION),
    "google": Dialect(_flax("Transformer/posembed_input/pos_embedding", 1, 2, 3), **_FLAX),
    "big_vision": Dialect(_flax("pos_embedding", 0, 1, 0) + MAP_HEAD, **_FLAX, prefix_rows="none class"),
    "dinov2": Dialect(
        DINOV2, r"reg_token|mask_token|.*gamma|.*qkv\.bias", "bicubic_offset", **_IMAGENET
    ),
    "hf_dinov2": Dialect(HF_DINOV2, interpolation="bicubic", **_HF_DINOV2),
    "hf_dinov2_reg": Dialect(HF_DINOV2, interpolation="bicubic_antialias", **_HF_DINOV2),
    "hf_clip": Dialect(
        HF_CLIP, r"head\.|patch_embed\.proj\.bias", "bicubic", norm_eps=1e-5, act_layer="quick_gelu",
        act_drop_rate=0.0, ignored=r"classifier\.|embeddings\.position_ids", **_CLIP, head_bias=False,
        classifier="the mean of the patches", prefix="vision_model.",
        dropout=(("attn_drop_rate", "attention_dropout"),),
    ),
    "hf_siglip": Dialect(
        HF_SIGLIP, r"attn_pool\.", "bicubic", act_layer="gelu_tanh", act_drop_rate=0.0, prefix_rows="none",
        ignored=r"classifier\.|embeddings\.position_ids", classifier="the mean of the patches", prefix="vision_model.",
        dropout=(("attn_drop_rate", "attention_dropout"),),
    ),
    "open_clip": Dialect(
        OPEN_CLIP, r"head\.|.*gamma|patch_embed\.proj\.bias", "bicubic", norm_eps=1e-5, **_CLIP, head_bias=False,
        prefix="visual.",
    ),
}  # fmt: skip


def expand(dialect: Dialect, depth: int) -> Iterator[tuple[list[str], str, Layout]]:
    """Yields (their names, our name, layout) for every tensor of a model with ``depth`` blocks."""
    for theirs, ours, how in dialect.rows:
        for index in map(str, range(depth) if "{i}" in theirs else (0,)):
            name, own = theirs.replace("{i}", index), ours.replace("{i}", index)
            parts = re.search(r"\{(.+)\}", name)
            names = [name.replace(parts[0], part) for part in parts[1].split(",")] if parts else [name]
            for end, own_end, layout in how:
                yield [n + end for n in names], own + own_end, layout


# The patch projection, which locates a ViT inside a larger model; and the prefixes of wrappers.
_PATCHES = re.compile(
    r"(|.*?\.)(?:patch_embed\.proj|conv_proj|visual\.conv1|(?:vit\.|deit\.|dinov2\.|dinov2_with_registers\.|vision_model\.)?"
    r"embeddings\.(?:patch_embeddings\.projection|patch_embedding))\.weight"
)
# What a library puts before the names of a ViT, and a regular expression of what it puts beside it.
_TOWERS = {
    "vit.": ".*",
    "deit.": ".*",
    "dinov2.": r"classifier\.",
    "dinov2_with_registers.": r"classifier\.",
    "vision_model.": r"visual_projection\.|classifier\.",
    "visual.": "$^",
}
_INSIDE = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_COUNTERS = re.compile(r"(.*\.)?(n_averaged|num_batches_tracked)$")


# Names of transformers 5 in memory, and those on disk. Dinov2's MLP has one name.
_ATTENTION = {
    f"attention.{new}_proj.": f"attention.attention.{old}."
    for new, old in zip("qkv", ("query", "key", "value"), strict=True)
}
_ATTENTION |= {"attention.o_proj.": "attention.output.dense."}
_LAYER = {"layers.": "encoder.layer.", "mlp.fc1.": "intermediate.dense.", "mlp.fc2.": "output.dense."}


def plain(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """Removes the prefixes of wrappers and libraries, and splits stacked blocks.

    Returns:
        The tensors, and the names of tensors outside the prefix of the ViT.

    Raises:
        ValueError: the checkpoint has several models.
    """
    tensors = {_INSIDE.sub("", name): t for name, t in tensors.items() if not _COUNTERS.match(name)}
    for prefix in ("opt/target/", "params/img/", "params/"):
        if f"{prefix}embedding/kernel" in tensors:  # drops the optimiser's state and other towers
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if any(name.startswith("Transformer/encoderblock/") for name in tensors):  # scan=True
        tensors = dict(_unstack(tensors))
    prefixes = sorted({found[1] for found in map(_PATCHES.fullmatch, tensors) if found})
    outside = []
    if "" not in prefixes:
        if len(prefixes) > 1:
            advice = (
                f"{{k.removeprefix({prefixes[0]!r}): v for k, v in state.items() if k.startswith({prefixes[0]!r})}}"
            )
            raise ValueError(f"it holds several models, under {some(prefixes)}; save one of them alone: {advice}")
        for prefix in prefixes:
            outside = [name for name in tensors if not name.startswith(prefix)]
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for prefix, beside in _TOWERS.items():
        if any(name.startswith(prefix) and _PATCHES.fullmatch(name) for name in tensors):
            outside += [n for n in tensors if not n.startswith(prefix) and not re.match(beside, n)]
            tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n not in outside}
    if any(re.match(r"blocks\.\d+\.\d+\.", name) for name in tensors):  # block_chunks > 0; the index is the second
        tensors = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): t for name, t in tensors.items()}
    deit = "embeddings.distillation_token" in tensors
    if deit or "encoder.layer.0.layer_scale1.lambda1" in tensors:
        for new, old in (_ATTENTION | _LAYER if deit else _ATTENTION).items():
            tensors = {name.replace(new, old): t for name, t in tensors.items()}
    if "head.attention.in_proj_weight" in tensors:  # SigLIP of transformers
        for leaf in ("weight", "bias"):
            packed = tensors.pop(f"head.attention.in_proj_{leaf}", None)
            parts = () if packed is None else zip("qkv", packed.chunk(3), strict=True)
            tensors |= {f"head.attention.{part}_proj.{leaf}": tensor for part, tensor in parts}
    if "decoder.decoder_embed.weight" in tensors:  # MAE of transformers
        outside += [name for name in tensors if name.startswith("decoder.")]
        tensors = {name: t for name, t in tensors.items() if not name.startswith("decoder.")}
    if "decoder_embed.weight" in tensors:  # MAE: its mask token has the decoder's width
        tensors = {name: t for name, t in tensors.items() if not name.startswith(("decoder_", "mask_token"))}
    return tensors, outside


def _unstack(tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        if name.startswith("Transformer/encoderblock/"):
            for index, layer in enumerate(tensor):
                yield name.replace("encoderblock/", f"encoderblock_{index}/"), layer
        else:
            yield name, tensor


# Models of no dialect: (regular expression of a tensor's name, model, advice).
_ELSEWHERE = "load it with the library that it is from and call vit.accelerate"
_BY_TIMM = "load it with timm and call vit.accelerate"
_BY_TRANSFORMERS = "load it with transformers and call vit.accelerate"
_FAMILIES = (
    (
        r"(.*\.)?(rope_embed\..*|storage_tokens|embeddings\.patch_embeddings\.weight)",
        "DINOv3",
        _ELSEWHERE,
    ),
    (r".*mlp\.(weights_in|gate_proj)\.weight", "a Dinov2 with SwiGLU of transformers", _BY_TRANSFORMERS),
    (r"(.*\.)?distillation_classifier\.weight", "a DeiT of transformers with two classifiers", _BY_TRANSFORMERS),
    (r"encoder\.layers\.0\.self_attn\.qkv\.weight", "BLIP", _BY_TRANSFORMERS),
    (r"pre_layernorm\.weight", "OWL-ViT", _BY_TRANSFORMERS),
    (r"layer1\.0\.conv1\.weight", "a ResNet", _ELSEWHERE),
    (r"attn_pool\.(query|ln_q\.weight)", "CoCa", _ELSEWHERE),
    (r".*(beit|data2vec_vision)\..*|.*blocks\.0\.attn\.q_bias", "BEiT", _ELSEWHERE),
    (r".*blocks\.0\.gamma_1", "DeiT III or BEiT", _BY_TIMM),
    (r".*layers\.0\.blocks\.0\..*", "a Swin Transformer or another hierarchical model", _ELSEWHERE),
    (r".*blocks\.0\.mlp\.w12\.weight", "a model with SwiGLU, such as DINOv2 giant", _ELSEWHERE),
    (r"(.*\.)?(dist_token|head_dist\..*)", "a distilled DeiT", _BY_TIMM),
)
# Model types of transformers with the names of a dialect.
_TYPES = ("vit", "deit", "vit_mae", "vit_msn", "dinov2", "dinov2_with_registers", "clip", "clip_vision_model")
_TYPES += ("siglip", "siglip_vision_model", "")


def family(tensors: Tensors, config: dict[str, Any]) -> str | None:
    """Names the model of a checkpoint that no dialect covers, with advice; None if it is not recognised.

    It looks at the names of the tensors, then at the ``model_type`` of transformers' config.json.
    """
    for pattern, what, advice in _FAMILIES:
        if any(re.fullmatch(pattern, name) for name in tensors):
            return f"this is {what}, which load_pretrained does not read yet; {advice}"
    kind = config.get("model_type", "")
    if kind not in _TYPES:
        what = f"a {kind} checkpoint of transformers"
        return f"this is {what}, which load_pretrained does not read yet; {_BY_TRANSFORMERS}"
    return None


def detect(tensors: Tensors) -> str | None:
    """The dialect of tensors from `plain`, or None."""
    if "embeddings.patch_embeddings.projection.weight" in tensors and has(tensors, "encoder.layer.0.layer_scale1."):
        return "hf_dinov2_reg" if "embeddings.register_tokens" in tensors else "hf_dinov2"
    if "embeddings.patch_embedding.weight" in tensors and has(tensors, "encoder.layers.0.self_attn.q_proj."):
        if has(tensors, "pre_layrnorm."):
            return "hf_clip"
        return None if "embeddings.class_embedding" in tensors else "hf_siglip"
    if "conv1.weight" in tensors and has(tensors, "transformer.resblocks.0."):
        return "open_clip"
    if "embeddings.distillation_token" in tensors:
        return "hf_deit"
    if "embeddings.patch_embeddings.projection.weight" in tensors:
        return "hf" if has(tensors, "encoder.layer.0.") else "hf_memory"
    if "embedding/kernel" in tensors and has(tensors, "Transformer/"):
        return "google" if has(tensors, "Transformer/posembed_input/") else "big_vision"
    if "conv_proj.weight" in tensors and has(tensors, "encoder.layers.encoder_layer_0."):
        return "torchvision_old" if has(tensors, "encoder.layers.encoder_layer_0.mlp.linear_1.") else "torchvision"
    if "patch_embed.proj.weight" in tensors and has(tensors, "blocks.0."):
        mask_token = tensors.get("mask_token")
        dinov2 = "register_tokens" in tensors or (mask_token is not None and mask_token.ndim == 2)
        return "dinov2" if dinov2 else "timm"
    return None


def has(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def depth_of(dialect: Dialect, tensors: Tensors) -> int:
    block = next(theirs for theirs, _, _ in dialect.rows if "{i}" in theirs).partition("{i}")[0]
    pattern = re.compile(re.escape(block) + r"(\d+)[./]")
    return len({match[1] for match in map(pattern.match, tensors) if match})


def read(dialect: Dialect, tensors: Tensors, heads: int) -> tuple[Tensors, list[str]]:
    """Converts their tensors to ours. Also returns the names that were not used.

    Raises:
        ValueError: a tensor does not have the shape of the dialect.
    """
    ours, left = {}, dict.fromkeys(name for name in tensors if not re.match(dialect.ignored, name))
    for names, own, layout in expand(dialect, depth_of(dialect, tensors)):
        if all(name in tensors for name in names):
            try:
                ours[own] = layout.load([tensors[name] for name in names], heads)
            except (RuntimeError, IndexError, ValueError) as error:
                shapes = ", ".join(str(tuple(tensors[name].shape)) for name in names)
                raise ValueError(f"{names[0]} of shape {shapes} does not fit: {error}") from error
            for name in names:
                left.pop(name, None)
    return ours, list(left)


def write(name: str, ours: Tensors, depth: int, heads: int) -> Tensors:
    """Converts our tensors to theirs. They share storage if the layout allows.

    Raises:
        ValueError: the dialect has no name for one of our tensors, or needs a tensor that is missing.
    """
    dialect, theirs, left = DIALECTS[name], {}, set(ours)
    for names, own, layout in expand(dialect, depth):
        if own in ours:
            left.discard(own)
            theirs |= zip(names, layout.save(ours[own], heads), strict=True)
        elif not re.match(dialect.optional, own):
            raise ValueError(f"dialect {name!r} needs {own}, which the model does not have")
    if not dialect.head_bias and "head.bias" in ours and not ours["head.bias"].count_nonzero():
        left.discard("head.bias")
    if left:
        raise ValueError(f"dialect {name!r} has no place for {some(sorted(left))}; use dialect='timm'")
    if name == "big_vision":
        return {f"params/{key}": t for key, t in theirs.items()}
    if "classifier.weight" in theirs:
        return {
            key if key.startswith("classifier.") else f"{dialect.prefix or 'vit.'}{key}": t for key, t in theirs.items()
        }
    if name == "hf_siglip" and "attn_pool.latent" in ours:
        for leaf in ("weight", "bias"):
            parts = [theirs.pop(f"head.attention.{part}_proj.{leaf}") for part in "qkv"]
            theirs[f"head.attention.in_proj_{leaf}"] = torch.cat(parts)
    return {f"{'' if key == 'visual_projection.weight' else dialect.prefix}{key}": t for key, t in theirs.items()}


def some(names: list[str]) -> str:
    """The first four names as text, and the number of the others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
