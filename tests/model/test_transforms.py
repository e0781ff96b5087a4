"""torch.func transforms: `auto` runs the reference, `triton` raises instead of being wrong."""

import pytest
import torch
import torch.nn.functional as F

from vit.kernels import attention_qkvpacked, layer_norm, linear, mlp

W, H = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)), torch.eye(16, 24)
OPS = {
    "layer_norm": (layer_norm, lambda x: F.layer_norm(x, (16,), eps=1e-6), (5, 16)),
    "linear": (lambda x, **a: linear(x, W.to(x), **a), lambda x: F.linear(x, W.to(x)), (5, 16)),
    "mlp": (
        lambda x, **a: mlp(x, W.to(x), None, H.to(x), None, **a),
        lambda x: F.linear(F.gelu(F.linear(x, W.to(x))), H.to(x)),
        (5, 16),
    ),
    "attention_qkvpacked": (
        lambda x, **a: attention_qkvpacked(x[None], **a)[0],
        lambda x: F.scaled_dot_product_attention(*x.permute(1, 2, 0, 3)).transpose(0, 1).flatten(1),
        (5, 3, 2, 16),
    ),
}


def transforms(op):
    def loss(x):
        return op(x).square().sum()

    return {
        "grad": lambda x: torch.func.grad(loss)(x[0]),
        "vmap": torch.func.vmap(op),
        "gradients of each sample": torch.func.vmap(torch.func.grad(loss)),
        "Jacobian": lambda x: torch.func.jacrev(op)(x[0]),
    }


@pytest.mark.parametrize("transform", transforms(None))
@pytest.mark.parametrize("name", OPS)
def test_transform(name, transform, device):
    op, torchs, shape = OPS[name]
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    torch.testing.assert_close(transforms(op)[transform](x), transforms(torchs)[transform](x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms are not defined for the Triton kernels"):
        transforms(lambda x: op(x, impl="triton"))[transform](x)
