"""Triton compiles one kernel for a kind of call, whatever the batch, the tokens and the size of the image."""

import json
import os
import subprocess
import sys

import pytest

# Counts the keys under which Triton's JIT would compile and cache each launch. It compiles nothing.
KEYS = """
import collections, json
import torch
from triton.runtime import driver
from triton.runtime.jit import compute_cache_key
from vit import kernels
from vit.kernels.dry_run import dry_run

found = collections.defaultdict(set)

def on_launch(kernel, grid, args, options):
    _, known, _, _, binder = kernel.device_caches[driver.active.get_current_device()]
    _, specialization, options = binder(**args, **options)
    found[kernel.__name__].add(compute_cache_key(known, specialization, options))

def count(calls):
    found.clear()
    with dry_run(90, on_launch):
        for call in calls:
            inputs = []

            def make(*shape, dtype=torch.bfloat16):
                inputs.append(torch.empty(shape, dtype=dtype).requires_grad_())
                return inputs[-1]

            outs = call(make)
            outs = [o for o in (outs if isinstance(outs, tuple) else (outs,))]
            learning = [t for t in inputs if t.requires_grad]
            torch.autograd.grad(outs, learning, [torch.empty_like(o) for o in outs])
    return {name: len(keys) for name, keys in found.items()}

SIZES = [(batch, tokens) for batch in range(34) for tokens in (1, 2, 7, 16, 17, 33)]
GRIDS = [(1, 1), (1, 2), (2, 3), (4, 4), (3, 5), (16, 1)]
seed = torch.zeros(1, dtype=torch.int64)

def layer_norm(batch, tokens):
    return lambda make: kernels.layer_norm(make(batch, tokens, 48), make(48), make(48))

def residual(batch, tokens):
    def call(make):
        rows, vectors = [make(batch, tokens, 48) for _ in range(2)], [make(48) for _ in range(4)]
        factors = {"branch_bias": vectors[2], "gamma": vectors[3], "row_scale": torch.empty(batch)}
        return kernels.residual_layer_norm(*rows, *vectors[:2], **factors, dropout_p=0.1, seed=seed, offset=batch)
    return call

def dropout(batch, tokens):
    return lambda make: kernels.dropout(make(batch, tokens, 48), 0.1, seed)

def patch_embed(batch, rows, columns, patch):
    def call(make):
        image, N = make(batch, 3, rows * patch, columns * patch), rows * columns
        tables = make(48), make(1, N + 1, 48), make(1, 1, 48)
        masked = {"mask_token": make(1, 1, 48), "bool_masked_pos": torch.zeros(batch, N, dtype=torch.bool)}
        return kernels.patch_embed(image, make(48, 3, patch, patch), *tables, **masked)
    return call

print(json.dumps({
    "layer_norm": count(layer_norm(*size) for size in SIZES),
    "residual": count(residual(*size) for size in SIZES),
    "dropout": count(dropout(*size) for size in SIZES),
    "patch_embed": count(patch_embed(batch, *grid, 16) for batch in range(1, 34) for grid in GRIDS),
    "patch_embed, 14": count(patch_embed(batch, 2, 3, 14) for batch in range(1, 34)),
    "other dtypes": count([layer_norm(2, 7), lambda make: kernels.layer_norm(make(2, 7, 48, dtype=torch.float16))]),
}))
"""


pytestmark = pytest.mark.xdist_group("compilations")  # one worker makes what they share


@pytest.fixture(scope="module")
def keys():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", KEYS], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


NORM = {"_layer_norm_fwd_kernel", "_layer_norm_bwd_kernel", "_partial_sums_kernel"}
PATCHES = {f"_patch_embed_{role}_kernel" for role in ("fwd", "dw", "dimage")} | {"_partial_sums_kernel"}


@pytest.mark.parametrize(
    ("calls", "kernels"),
    [
        ("layer_norm", NORM),
        ("residual", NORM),
        ("dropout", {"_dropout_kernel"}),
        ("patch_embed", PATCHES),
        ("patch_embed, 14", PATCHES),
    ],
)
def test_a_batch_never_compiles_anew(keys, calls, kernels):
    """The batches are 0 (or 1) to 33. So the number of rows may be 1, and 16 divides it or not."""
    assert keys[calls] == dict.fromkeys(kernels, 1)


def test_other_kernels_are_counted(keys):
    assert keys["other dtypes"]["_layer_norm_fwd_kernel"] == 2
