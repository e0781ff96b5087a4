"""Attention on packed qkv [B, N, 3, HEADS, HEAD_DIM]. 197 and 257 tokens are bound by bytes, 577 by products.

"reference" stores the softmax, "eager" is PyTorch's choice, and "sdpa-…" are its backends. PyTorch and xformers get
views in their own layout. Their results are copied to [B, N, D] if needed, as in a model.
"""

import functools

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Bench, Work
from vit import kernels
from vit.kernels import reference


def inputs(s, rand):
    return {"qkv": rand(s.batch, s.tokens, 3, s.heads, s.head_dim)}


def work(s, e):
    x, product = s.rows * s.width, 2 * s.rows * s.tokens * s.width
    stats = s.rows * s.heads * 4
    # fwd: qkv -> o, two products. bwd: do, o, qkv and the logsumexp -> dqkv, four products and q·k again.
    return {"fwd": Work(2 * product, 4 * x * e), "bwd": Work(5 * product, 8 * x * e + stats)}


def eager(qkv):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sdpa(backend, qkv):
    with sdpa_kernel(backend):
        return eager(qkv)


def flash_attn(qkv):
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(qkv).flatten(2)


def xformers(qkv):
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2)).flatten(2)


PROVIDERS = {
    "ours": kernels.attention_qkvpacked,
    "eager": eager,
    "sdpa-flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": functools.partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "reference": reference.attention_qkvpacked,
    "flash-attn": flash_attn,
    "xformers": xformers,
}
BENCHES = [Bench("attention", "attention", inputs, work, reference.attention_qkvpacked, PROVIDERS)]
