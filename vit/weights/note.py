"""The note in files from `save_pretrained`: the configuration of the model, and the normalisation of its images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from vit.config import HF_ACTIVATIONS, HF_WORDS, ViTConfig
from vit.weights.dialects import some
from vit.weights.files import NOTE, Checkpoint


def write(config: ViTConfig, cfg: dict[str, Any] | None) -> dict[str, Any]:
    """The note as plain data for JSON."""
    return dataclasses.asdict(config) | ({"pretrained_cfg": cfg} if cfg else {})


def read(checkpoint: Checkpoint) -> tuple[ViTConfig | None, list[str]]:
    """Reads the configuration from the note. Also returns messages for the user.

    The configuration is None for a file of another library. It is also None if config.json was changed after our save.
    Then the note is removed from ``checkpoint``, because the keys of transformers are newer.

    Raises:
        ValueError: the note is not a valid configuration.
        TypeError: the note is not a valid configuration.
    """
    said = {field: value for field, value in checkpoint.note.items() if field != "pretrained_cfg"}
    fields = {field: said.pop(field) for field in ViTConfig.__dataclass_fields__ if field in said}
    notes = [f"it says {some(sorted(said))} of its model, which this version does not know"] if said else []
    if "embed_dim" not in fields:  # early versions wrote only some numerics
        return None, notes
    config = ViTConfig(**fields)
    ours, theirs = hf_config(config), checkpoint.config or {}
    if not any(_differ(ours, theirs, word) for word in ours.keys() & theirs.keys()):
        return config, notes
    checkpoint.note = {}
    return None, [f"its config.json was changed after it was written: what it has under {NOTE!r} is not read"]


def _differ(ours: dict[str, Any], theirs: dict[str, Any], word: str) -> bool:
    if word in ("id2label", "label2id"):
        return not isinstance(theirs[word], Mapping) or len(theirs[word]) != len(ours[word])
    return word != "architectures" and ours[word] != theirs[word]


def hf_config(config: ViTConfig, labels: list[str] | None = None) -> dict[str, Any]:
    """The content of Hugging Face's config.json for the same model; `ViTConfig.from_hf` reads it."""
    names = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}
    words = {theirs: getattr(config, ours) for ours, (theirs, _default) in HF_WORDS.items()}
    for word in ("image_size", "patch_size"):
        words[word] = words[word][0] if len(set(words[word])) == 1 else list(words[word])
    if config.pos_drop_rate == config.proj_drop_rate and not config.hidden_drop_rate:
        words["hidden_dropout_prob"] = config.proj_drop_rate
    kind = "ViTForImageClassification" if config.num_classes else "ViTModel"
    words |= {
        "architectures": [kind],
        "model_type": "vit",
        "hidden_act": names[config.act_layer],
        "intermediate_size": config.mlp_hidden_dim,
        "encoder_stride": config.patch_size[0],
    }
    if config.num_classes:
        if labels is None or len(labels) != config.num_classes:
            labels = [f"LABEL_{index}" for index in range(config.num_classes)]
        words["id2label"] = {str(index): label for index, label in enumerate(labels)}
        words["label2id"] = {label: index for index, label in enumerate(labels)}
    if config.representation_size:
        words |= {"pooler_output_size": config.representation_size, "pooler_act": "tanh"}
    return words
