"""The attention op as a backend of transformers: ``attn_implementation="vit_kernels"``."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vit.adapters import parts


def register_attention(name: str = "vit_kernels", impl: str = "auto") -> str:
    """Registers the attention op with transformers, for every model that uses the attention registry.

        vit.register_attention()
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation="vit_kernels")

    With ``output_attentions=True`` it also returns the weights, like "eager" and unlike "sdpa". With a mask, causal
    attention, fewer key heads than query heads, or a dropout of 1, a layer uses transformers' "sdpa". `accelerate`
    fuses more than attention and needs no registration.

    Args:
        name: the name of the backend.
        impl: "auto", "fused", "triton" or "reference".

    Returns:
        ``name``.

    Raises:
        ImportError: transformers 5 is not installed.
    """
    try:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise ImportError("register_attention needs transformers 5: pip install 'transformers>=5'") from error

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """query, key, value [B, HEADS, N, HEAD_DIM] -> ([B, N, HEADS, HEAD_DIM], weights or None)."""
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is not None or causal or dropout >= 1.0 or key.shape[1] != query.shape[1]:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        options = parts.draw(dropout, query)  # only here, so that the library's draws stay what they are
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        config = getattr(module, "config", None)
        wanted = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
        o, weights = parts.attention_and_maps(q, k, v, wanted, scale=scaling, impl=impl, **options)
        return o.unflatten(2, q.shape[2:]), weights

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name
