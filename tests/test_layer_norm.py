"""layer_norm and residual_layer_norm: accuracy, gradients, determinism, strides."""

import pytest
import torch
from compare import check_op

from vit.kernels import layer_norm, reference, residual_layer_norm

WIDTHS = [1, 48, 100, 192, 257]


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(randn, dtype, width):
    inputs = {"x": randn(3, 17, width) * 2 + 1, "weight": randn(width) + 1, "bias": randn(width)}
    check_op(lambda **a: layer_norm(**a, impl="triton"), reference.layer_norm, inputs, dtype)


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_layer_norm(randn, dtype, gamma, scaled):
    B, N, D = 3, 17, 192
    inputs = {
        "residual": randn(B, N, D), "branch": randn(B, N, D), "weight": randn(D) + 1, "bias": randn(D),
        "gamma": randn(D) if gamma else None,
    }  # fmt: skip
    row_scale = torch.tensor([0.0, 1.25, 1.25]).to(inputs["residual"].device) if scaled else None

    def ours(**a):
        scale = None if row_scale is None else row_scale.to(a["residual"].dtype)
        return residual_layer_norm(**a, row_scale=scale, impl="triton")

    def ref(**a):
        scale = None if row_scale is None else row_scale.to(a["residual"].dtype)
        return reference.residual_layer_norm(**a, row_scale=scale)

    check_op(ours, ref, inputs, dtype)
