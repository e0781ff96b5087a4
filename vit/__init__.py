"""Vision Transformers in PyTorch on fused Triton kernels, forward and backward.

    import vit
    model = vit.create_model("vit_base_patch16_224", num_classes=10)
    logits = model(image)

`vit.kernels` has the ops, `vit.reference` the same network in plain PyTorch. The import does not use the GPU.
"""

from vit import kernels, reference
from vit.adapters import accelerate, restore
from vit.adapters.backend import register_attention
from vit.analysis import attention_statistics, rollout
from vit.config import ViTConfig, get_config, list_models
from vit.create import create_model
from vit.cuda_graph import graph
from vit.embeddings import embedding_filters, position_similarity
from vit.explanation import explain
from vit.groups import param_groups_layer_decay
from vit.masked import MaskedImageModel, MaskedPatchModel
from vit.model import VisionTransformer
from vit.weights import CheckpointError, load_pretrained, save_pretrained

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "MaskedImageModel",
    "MaskedPatchModel",
    "ViTConfig",
    "VisionTransformer",
    "accelerate",
    "attention_statistics",
    "create_model",
    "embedding_filters",
    "explain",
    "get_config",
    "graph",
    "kernels",
    "list_models",
    "load_pretrained",
    "param_groups_layer_decay",
    "position_similarity",
    "reference",
    "register_attention",
    "restore",
    "rollout",
    "save_pretrained",
]
