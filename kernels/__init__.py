"""Triton kernels of a Vision Transformer: functions on tensors. `reference` has the eager formula of each.

The folder is imported as ``vit.kernels``. From the repository's root it is also importable as ``kernels``, the name of
an unrelated package that transformers looks for: under that name it stays empty, so that no op registers twice.
"""

if __name__ == "vit.kernels":
    from . import flops  # noqa: F401 (what PyTorch's counter counts of each op)
    from .attention import attention, attention_qkvpacked
    from .attention_maps import attention_probs
    from .attention_statistics import attention_statistics
    from .dropout import dropout, dropout_seed
    from .layer_norm import layer_norm, residual_layer_norm
    from .linear import linear
    from .mlp import mlp
    from .patch_embed import patch_embed

    __all__ = [
        "attention",
        "attention_probs",
        "attention_qkvpacked",
        "attention_statistics",
        "dropout",
        "dropout_seed",
        "layer_norm",
        "linear",
        "mlp",
        "patch_embed",
        "residual_layer_norm",
    ]  # fmt: skip
