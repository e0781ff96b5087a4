"""Triton kernels of a Vision Transformer: functions on tensors, each with an eager reference of the same signature.

The folder is imported as ``vit.kernels``. From the repository's root it is also importable as ``kernels``, the name of
an unrelated package that transformers looks for: under that name it stays empty, so that no op registers twice.
"""

if __name__ == "vit.kernels":
    from .layer_norm import layer_norm, residual_layer_norm

    __all__ = ["layer_norm", "residual_layer_norm"]
