"""Every layout of every dialect, written out a second time.

All matrices are 4*4, so no shape reveals a transpose. Joined tensors are joined by hand.
"""

import pytest
import torch
from test_weights import bits, load, make, save

EQUAL = {"img_size": 8, "patch_size": 4, "in_chans": 4, "embed_dim": 4, "depth": 1, "num_heads": 2, "num_classes": 4}
EQUAL |= {"mlp_ratio": 1.0, "act_layer": "gelu_tanh"}
BLOCK = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
HANDS = {  # where the blocks are; the modules of BLOCK; queries; other modules and tensors
    "hf": (
        "vit.encoder.layer.0.",
        ("layernorm_before", "attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense"),
        [f"attention.attention.{name}" for name in ("query", "key", "value")],
        {
            "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
            "norm": "vit.layernorm",
            "head": "classifier",
        },
        {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"},
    ),
    "hf_memory": (
        "vit.layers.0.",
        ("layernorm_before", "attention.o_proj", "layernorm_after", "mlp.fc1", "mlp.fc2"),
        [f"attention.{name}_proj" for name in "qkv"],
        {
            "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
            "norm": "vit.layernorm",
            "head": "classifier",
        },
        {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"},
    ),
    "torchvision": (
        "encoder.layers.encoder_layer_0.",
        ("ln_1", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3"),
        ["self_attention.in_proj_"],
        {
            "patch_embed.proj": "conv_proj",
            "norm": "encoder.ln",
            "pre_logits.fc": "heads.pre_logits",
            "head": "heads.head",
        },
        {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"},
    ),
    "torchvision_old": (
        "encoder.layers.encoder_layer_0.",
        ("ln_1", "self_attention.out_proj", "ln_2", "mlp.linear_1", "mlp.linear_2"),
        ["self_attention.in_proj_"],
        {
            "patch_embed.proj": "conv_proj",
            "norm": "encoder.ln",
            "pre_logits.fc": "heads.pre_logits",
            "head": "heads.head",
        },
        {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"},
    ),
    "google": (
        "Transformer/encoderblock_0/",
        (
            "LayerNorm_0",
            "MultiHeadDotProductAttention_1/out",
            "LayerNorm_2",
            "MlpBlock_3/Dense_0",
            "MlpBlock_3/Dense_1",
        ),
        [f"MultiHeadDotProductAttention_1/{name}" for name in ("query", "key", "value")],
        {
            "patch_embed.proj": "embedding",
            "norm": "Transformer/encoder_norm",
            "pre_logits.fc": "pre_logits",
            "head": "head",
        },
        {"cls_token": "cls", "pos_embed": "Transformer/posembed_input/pos_embedding"},
    ),
    "big_vision": (
        "params/Transformer/encoderblock_0/",
        (
            "LayerNorm_0",
            "MultiHeadDotProductAttention_0/out",
            "LayerNorm_1",
            "MlpBlock_0/Dense_0",
            "MlpBlock_0/Dense_1",
        ),
        [f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value")],
        {
            "patch_embed.proj": "params/embedding",
            "norm": "params/Transformer/encoder_norm",
            "pre_logits.fc": "params/pre_logits",
            "head": "params/head",
        },
        {"cls_token": "params/cls", "pos_embed": "params/pos_embedding"},
    ),
    "dinov2": (
        "blocks.0.",
        BLOCK,
        ["attn.qkv."],
        {"patch_embed.proj": "patch_embed.proj", "norm": "norm"},
        {
            "cls_token": "cls_token",
            "pos_embed": "pos_embed",
            "reg_token": "register_tokens",
            "mask_token": "mask_token",
        },
    ),
}


def flax_leaf(own, leaf, tensor):
    """A leaf of a flax module, (end of its name, tensor)."""
    if leaf == "bias":
        return "/bias", tensor
    if "norm" in own:
        return "/scale", tensor
    if own == "patch_embed.proj":
        return "/kernel", torch.einsum("oihw->hwio", tensor)
    if own == "attn.proj":  # heads, their width, out
        return "/kernel", torch.einsum("ohk->hko", tensor.reshape(4, 2, 2))
    return "/kernel", torch.einsum("oi->io", tensor)


def by_hand(dialect, state):
    """Our tensors as the library of the dialect holds them."""
    block, modules, queries, others, tensors = HANDS[dialect]
    flax = dialect in ("google", "big_vision")
    out = {theirs: state[own] for own, theirs in tensors.items() if own in state}
    if dialect == "dinov2":
        out["mask_token"] = out["mask_token"].reshape(1, 4)
    names = {f"blocks.0.{own}": (own, block + theirs) for own, theirs in zip(BLOCK, modules, strict=True)}
    names |= {own: (own, theirs) for own, theirs in others.items() if f"{own}.weight" in state}
    for ours, (own, theirs) in names.items():
        for leaf in ("weight", "bias"):
            tensor = state[f"{ours}.{leaf}"]
            end, tensor = flax_leaf(own, leaf, tensor) if flax else (f".{leaf}", tensor)
            out[theirs + end] = tensor
    for leaf in ("weight", "bias"):
        packed = state[f"blocks.0.attn.qkv.{leaf}"]
        if len(queries) == 1:
            out[f"{block}{queries[0]}{leaf}"] = packed
            continue
        for index, query in enumerate(queries):
            part = packed[4 * index : 4 * index + 4]
            if flax and leaf == "weight":  # in, heads, their width
                out[f"{block}{query}/kernel"] = torch.einsum("hki->ihk", part.reshape(2, 2, 4))
            else:
                out[f"{block}{query}/bias" if flax else f"{block}{query}.{leaf}"] = part.reshape(2, 2) if flax else part
    return out


@pytest.mark.parametrize("dialect", HANDS)
def test_layouts_by_hand(dialect, tmp_path):
    hidden = {} if dialect.startswith("hf") else {"representation_size": 4}
    if dialect == "dinov2":
        hidden = {"num_classes": 0, "use_mask_token": True, "reg_tokens": 4, "no_embed_class": True}
    if dialect == "big_vision":
        hidden |= {"no_embed_class": True}
    model = make(**EQUAL | hidden)
    state = dict(model.state_dict())
    if dialect == "dinov2":
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 4), state["pos_embed"]], 1)
    want = by_hand(dialect, state)
    save(model, tmp_path / "m.pt", dialect)
    got = torch.load(tmp_path / "m.pt", weights_only=True)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
    torch.save({name: tensor.contiguous() for name, tensor in want.items()}, tmp_path / "theirs.pt")
    assert bits(load(make(seed=1, **EQUAL | hidden), tmp_path / "theirs.pt")) == bits(model)
