"""Seeded bugs: each is applied alone to a copy of the sources, and its tests must fail.

    python tests/mutate.py [--jobs 2] [NAME …]

runs all of them, or those whose name contains a NAME. It fails if fewer than 95 % are caught. First it runs controls:
the same tests must pass without a bug.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from strangers import STRANGERS

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not torch.cuda.is_available():  # before the preload below imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Children of a process that has imported PyTorch, but nothing of ours, because that takes longer than most tests.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "torch._dynamo", "pytest"])


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Replaces ``old``, which occurs exactly once in ``file``, by ``new``. ``tests`` are arguments of pytest.

    Without ``old``, ``new`` is appended.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LN, LINEAR, MLP = "tests/kernels/test_layer_norm.py", "tests/kernels/test_linear.py", "tests/kernels/test_mlp.py"
PINGPONG = "tests/kernels/test_gemm_pingpong.py"
DROPOUT, MIRROR = "tests/kernels/test_attention_dropout.py", "tests/kernels/test_attention_mirror.py"
CPU, RECOMPUTE = "tests/kernels/test_pytorch.py", "tests/kernels/test_recompute.py"
ATTENTION, PATCH = "tests/kernels/test_attention.py", "tests/kernels/test_patch_embed.py"
STATISTICS, LISTENER = "tests/kernels/test_attention_statistics.py", "tests/kernels/test_attention_listener.py"
VIT = "tests/model/test_vit.py"
WEIGHTS, FILES = "tests/weights/test_weights.py", "tests/weights/test_weights_files.py"
TOWERS = "tests/weights/test_weights_towers.py"
CONTRACT, RUNTIME = "tests/kernels/test_contract.py", "tests/kernels/test_runtime.py"
PROTOCOL = "tests/model/test_protocol.py"
INTERFACES = "tests/adapters/test_accelerate_interfaces.py"
LOOK, INSPECT = "tests/commands/test_attention_command.py", "tests/commands/test_inspect_command.py"
ANALYSIS, ANALYSIS_PEERS = "tests/model/test_analysis.py", "tests/adapters/test_analysis_peers.py"
HARNESS, COUNTS = "tests/benchmarks/test_bench_harness.py", "tests/benchmarks/test_bench_counts.py"

MUTANTS = [
    Mutant(
        "layer_norm: eps 1e-5 for 1e-6",
        "kernels/layer_norm.py",
        "EPS=eps,",
        "EPS=10 * eps,",
        (f"{LN}::test_extreme_rows",),
    ),
    Mutant(
        "layer_norm: backward without the term of the variance",
        "kernels/layer_norm.py",
        "ds = rstd * (dy - c1 - x_hat * c2)",
        "ds = rstd * (dy - c1)",
        (f"{LN}::test_layer_norm",),
    ),
    Mutant(
        "layer_norm: row scale of the wrong sample",
        "kernels/layer_norm.py",
        "offs_m.to(M.dtype) // ROWS_PER_SCALE",
        "offs_m.to(M.dtype) // (ROWS_PER_SCALE + 1)",
        (f"{LN}::test_residual_layer_norm",),
    ),
    Mutant(
        "attention: keys beyond the last one are not masked",
        "kernels/attention_tile.py",
        'logits = tl.where((offs < stop)[None, :], logits, float("-inf"))',
        "pass",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: backward without delta",
        "kernels/attention.py",
        "ds = p * (dp - stats[1])  # delta\n    return",
        "ds = p * dp\n    return",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: lse in base 2",
        "kernels/attention.py",
        "tl.store(log_l_ptr + rows, tl.log(l_i),",
        "tl.store(log_l_ptr + rows, tl.log2(l_i),",
        (f"{ATTENTION}::test_lse",),
    ),
    Mutant(
        "attention: keys of head 0 for every head",
        "kernels/attention.py",
        "head_rows(k_ptr, stride_k, b, h, ALIGN), head_rows(v_ptr, stride_v, b, h, ALIGN)\n    drop",
        "head_rows(k_ptr, stride_k, b, h * 0, ALIGN), head_rows(v_ptr, stride_v, b, h, ALIGN)\n    drop",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: softmax scale off by 0.3 %",
        "kernels/attention.py",
        "    out, m, log_l = attention_qkvpacked_fwd(qkv, scale,",
        "    out, m, log_l = attention_qkvpacked_fwd(qkv, 1.003 * scale,",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention on a CPU: the second derivative is lost",
        "kernels/pytorch.py",
        "        if torch.is_grad_enabled():\n",
        "        if torch.is_grad_enabled() and ctx is None:\n",
        (f"{CPU}::test_derivatives_to_any_order",),
    ),
    Mutant(
        "attention on a CPU: a counter of FLOPs misses it",
        "kernels/pytorch.py",
        "        or torch._C._len_torch_dispatch_stack() > 0\n",
        "",
        (f"{CPU}::test_the_formula_runs_where_the_operator_would_give_less",),
    ),
    Mutant(
        "attention on a CPU: another scale in the backward",
        "kernels/pytorch.py",
        "0.0, False, scale=ctx.scale",
        "0.0, False",
        (f"{CPU}::test_accuracy",),
    ),
    Mutant(
        "attention: the running sum is not rescaled",
        "kernels/attention.py",
        "l_i = l_i * alpha + tl.sum(p, axis=1)",
        "l_i = l_i + tl.sum(p, axis=1)",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: 32-bit offsets",
        "kernels/attention_tile.py",
        "offsets = offs.to(tl.int64) * rows[1]",
        "offsets = offs * rows[1]",
        (f"{ATTENTION}::test_offsets_beyond_32_bits",),
    ),
    Mutant(
        "attention: keys scaled in 16 bits before their product",
        "kernels/attention.py",
        "logits = attn_logits(q, k, offs_n, left, PRECISION, m_i.dtype)  # [BLOCK_M, WIDTH]",
        "k = ((k[0].to(tl.float32) * SCALE).to(k[0].dtype), (k[1].to(tl.float32) * SCALE).to(k[1].dtype))\n"
        "    logits = attn_logits(q, k, offs_n, left, PRECISION, m_i.dtype) / SCALE",
        (f"{MIRROR}::test_no_worse_than_the_mirror",),
    ),
    Mutant(
        "attention: 16-bit accumulators",
        "kernels/attention_tile.py",
        "y += (tile.dot(p.to(x[i].dtype), x[i], acc[i], PRECISION),)",
        "y += (tile.dot(p.to(x[i].dtype), x[i], acc[i], PRECISION).to(x[i].dtype).to(acc[i].dtype),)",
        (f"{MIRROR}::test_no_worse_than_the_mirror",),
    ),
    Mutant(
        "attention: every head drops the same",
        "kernels/attention.py",
        "drop = (tl.load(seed_ptr), OFFSET, rows)",
        "drop = (tl.load(seed_ptr), OFFSET, b * NQ + offs_m)",
        (f"{DROPOUT}::test_packed",),
    ),
    Mutant(
        "attention: dv of probabilities that were not dropped",
        "kernels/attention.py",
        "        kept *= drop_scale\n",
        "",
        (f"{DROPOUT}::test_packed",),
    ),
    Mutant(
        "attention: 32-bit rows of the dropout mask in the backward",
        "kernels/attention.py",
        "drop = (tl.load(seed_ptr), OFFSET, first_row + offs_m)",
        "drop = (tl.load(seed_ptr), OFFSET, (first_row + offs_m).to(tl.int32).to(tl.int64))",
        (f"{DROPOUT}::test_rows_beyond_32_bits",),
    ),
    Mutant(
        "attention: the last tile of keys is left out of the output",
        "kernels/attention.py",
        "    if WALK_K[1]:\n",
        "    if WALK_K[1] > 16:\n",
        (f"{ATTENTION}::test_every_kind_of_last_tile",),
    ),
    Mutant(
        "attention: every tile is the first one",
        "kernels/attention_tile.py",
        "y += ((tensors[i][0] + offset, tensors[i][1]),)",
        "y += ((tensors[i][0], tensors[i][1]),)",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: delta of the first queries for all",
        "kernels/attention_tile.py",
        "tl.load(ptrs[i] + start + offs)",
        "tl.load(ptrs[i] + offs)",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: one number a query for fp32 too",
        "kernels/attention.py",
        "exact = q.dtype not in runtime.HALF",
        "exact = False",
        (f"{ATTENTION}::test_extreme_logits",),
    ),
    Mutant(
        "attention: fp32 logits are scaled before the maximum is subtracted",
        "kernels/attention.py",
        "EXACT: tl.constexpr = k[0].dtype.primitive_bitwidth > 16",
        "EXACT: tl.constexpr = False",
        (f"{ATTENTION}::test_extreme_logits",),
    ),
    Mutant(
        "attention: the gradient of a bias sums rows that do not exist",
        "kernels/attention_tile.py",
        "total = tl.sum(tl.where((offs < stop)[:, None], x[i], 0.0), axis=0)",
        "total = tl.sum(x[i], axis=0)",
        (f"{ATTENTION}::test_column_sums_ignore_what_is_beyond_the_last_token",),
    ),
    Mutant(
        "attention: the gradient of a bias has keys and values exchanged",
        "kernels/attention.py",
        "store_column_sums(sums_ptr, row + HEADS, dk,",
        "store_column_sums(sums_ptr, row + HEADS, dv,",
        (f"{ATTENTION}::test_column_sums",),
    ),
    Mutant(
        "statistics: prefix keys have a place",
        "kernels/attention_statistics.py",
        "of_patches = tl.where((index >= 0)[None, :], p, 0.0)",
        "of_patches = p",
        (f"{STATISTICS}::test_uniform_attention_by_hand",),
    ),
    Mutant(
        "statistics: prefix queries have a distance",
        "kernels/attention_statistics.py",
        "distance = tl.where(offs_m < PREFIX, 0.0, _ratio(distance, total, ACC))",
        "distance = _ratio(distance, total, ACC)",
        (f"{STATISTICS}::test_masses",),
    ),
    Mutant(
        "statistics: keys beyond the last one count",
        "kernels/attention_statistics.py",
        "p = tl.where((offs_n < left)[None, :], p, 0.0)",
        "p += 0.0",
        (f"{STATISTICS}::test_every_kind_of_last_tile",),
    ),
    Mutant(
        "statistics: keys receive from queries beyond the last one",
        "kernels/attention_statistics.py",
        "p = tl.where((offs_m < left)[None, :], p, 0.0)",
        "p += 0.0",
        (f"{STATISTICS}::test_every_kind_of_last_tile",),
    ),
    Mutant(
        "statistics: heights and widths of patches exchanged",
        "kernels/attention_statistics.py",
        "return row, (x - row * GRID_W) * ASPECT",
        "return row * ASPECT, x - row * GRID_W",
        (f"{STATISTICS}::test_uniform_attention_by_hand",),
    ),
    Mutant(
        "statistics: a row from a quotient on its border",
        "kernels/attention_statistics.py",
        "row = tl.floor((x + 0.5) * (1.0 / GRID_W))",
        "row = tl.floor(x * (1.0 / GRID_W))",
        (f"{STATISTICS}::test_places_of_large_grids",),
    ),
    Mutant(
        "statistics: places count the prefix tokens",
        "kernels/attention_statistics.py",
        "place = _places(offs_m - PREFIX, GRID_W, ASPECT, ACC)",
        "place = _places(offs_m, GRID_W, ASPECT, ACC)",
        (f"{STATISTICS}::test_grids",),
    ),
    Mutant(
        "statistics: entropy below zero",
        "kernels/attention_statistics.py",
        "    entropy = tl.where(entropy < 0.0, 0.0, entropy)",
        "    entropy -= 1e-7",
        (f"{STATISTICS}::test_rows_almost_without_entropy",),
    ),
    Mutant(
        "statistics: entropy from logits, not from their distance to the largest",
        "kernels/attention_statistics.py",
        "    log2_sum += tl.sum(p * log2_p, axis=1)",
        "    log2_sum += tl.sum(p * ((log2_p + 64.0 * m[:, None]) - 64.0 * m[:, None]), axis=1)",
        (f"{STATISTICS}::test_large_logits",),
    ),
    Mutant(
        "statistics: received is a sum",
        "kernels/attention_statistics.py",
        "received / N, mask=offs_n < N)",
        "received, mask=offs_n < N)",
        (f"{STATISTICS}::test_masses",),
    ),
    Mutant(
        "statistics: saved log l is not used",
        "kernels/attention_statistics.py",
        " * tl.exp(-log_l)",
        "",
        (f"{STATISTICS}::test_saved_statistics_are_used",),
    ),
    Mutant(
        "statistics: the width of the grid is a compile-time constant",
        "kernels/attention_statistics.py",
        'do_not_specialize=["N", "PREFIX", "GRID_W"]',
        'do_not_specialize=["N", "PREFIX"]',
        (f"{STATISTICS}::test_a_new_grid_compiles_nothing",),
    ),
    Mutant(
        "statistics: every tile of the CPU starts at the first query",
        "kernels/attention_statistics.py",
        "first_query=start,",
        "first_query=0,",
        (f"{STATISTICS}::test_tiles_of_plain_pytorch",),
    ),
    Mutant(
        "statistics: the mean over tiles of the CPU is not weighted",
        "kernels/attention_statistics.py",
        "mass[b] += part.received[0] * (tile.shape[1] / N)",
        "mass[b] += part.received[0] * (step / N)",
        (f"{STATISTICS}::test_tiles_of_plain_pytorch",),
    ),
    Mutant(
        "statistics: places in fp32 for fp64 tensors",
        "kernels/reference.py",
        "(index // grid_size[1]).to(wide) * patch_size[0]",
        "index // grid_size[1] * patch_size[0]",
        (f"{STATISTICS}::test_the_reference_is_the_specification",),
    ),
    Mutant(
        "listener: it hears a backward compute the forward again",
        "kernels/runtime.py",
        " or torch._C._current_graph_task_id() != -1:",
        ":",
        (f"{LISTENER}::test_a_recomputation_tells_nothing",),
    ),
    Mutant(
        "listener: all threads share it",
        "kernels/runtime.py",
        "class _Listener(threading.local):",
        "class _Listener:",
        (f"{LISTENER}::test_another_thread_hears_nothing",),
    ),
    Mutant(
        "listener: an exception leaves it on",
        "kernels/runtime.py",
        "    try:\n        yield\n    finally:\n        _listener.call = previous",
        "    yield\n    _listener.call = previous",
        (f"{LISTENER}::test_exceptions_end_it",),
    ),
    Mutant(
        "listener: it hears keys as queries",
        "kernels/attention.py",
        "_tell(listener, q, k, scale, m, log_l)",
        "_tell(listener, k, q, scale, m, log_l)",
        (f"{LISTENER}::test_what_it_hears",),
    ),
    Mutant(
        "listener: it hears tensors that require grad",
        "kernels/attention.py",
        "listener(q.detach(), k.detach(), scale,",
        "listener(q, k, scale,",
        (f"{LISTENER}::test_outputs_and_gradients_are_the_same",),
    ),
    Mutant(
        "attention: a length is a compile-time constant",
        "kernels/attention.py",
        '@triton.jit(do_not_specialize=["NQ", "NK", "OFFSET"])\ndef _attention_fwd_kernel(',
        '@triton.jit(do_not_specialize=["OFFSET"])\ndef _attention_fwd_kernel(',
        (f"{ATTENTION}::test_a_new_length_compiles_nothing",),
    ),
    Mutant(
        "gelu: tanh for erf",
        "kernels/tile.py",
        "cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))",
        "cdf = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))",
        (f"{MLP}::test_mlp",),
    ),
    Mutant(
        "gemm: the last tile of K is dropped",
        "kernels/linear.py",
        "for start_k in tl.range(0, K, BLOCK_K,",
        "for start_k in tl.range(0, K - K % BLOCK_K, BLOCK_K,",
        (f"{LINEAR}::test_linear",),
    ),
    Mutant(
        "gemm: quarters of the columns in the wrong order",
        "kernels/linear.py",
        "_halves(pieces[0]) + _halves(pieces[1])",
        "_halves(pieces[1]) + _halves(pieces[0])",
        (f"{LINEAR}::test_forms_of_the_gemm_agree",),
    ),
    Mutant(
        "gemm: accumulates in 16 bits",
        "kernels/linear.py",
        "acc = tile.dot(a, b, acc, PRECISION)",
        "acc = tile.dot(a, b, acc, PRECISION).to(a.dtype).to(ACC)",
        (f"{LINEAR}::test_sums_over_many_rows",),
    ),
    Mutant(
        "mlp: the backward multiplies by gelu instead of its derivative",
        "kernels/linear.py",
        "            acc *= factor\n",
        "            acc *= aux\n",
        (f"{MLP}::test_mlp",),
    ),
    Mutant(
        "patch_embed: rows and columns of a patch exchanged",
        "kernels/patch_embed.py",
        "return tl.multiple_of(c * stride_c + i * stride_h, ALIGN) + j * stride_w",
        "return tl.multiple_of(c * stride_c + j * stride_h, ALIGN) + i * stride_w",
        (f"{PATCH}::test_patch_embed",),
    ),
    Mutant(
        "patch_embed: position embedding off by one token",
        "kernels/patch_embed.py",
        "offs_pos = (t - NO_POS).to(tl.int64)",
        "offs_pos = tl.maximum(t - NO_POS - 1, 0).to(tl.int64)",
        (f"{PATCH}::test_patch_embed",),
    ),
    Mutant(
        "patch_embed: masked patches multiplied by 0 in the gradient of the weight",
        "kernels/patch_embed.py",
        "mask_m = mask_m & (tl.load(masked_ptr + b * N + n, mask=mask_m, other=0) == 0)",
        "pass",
        (f"{PATCH}::test_masked_pixels_do_not_matter",),
    ),
    Mutant(
        "model: gamma of the attention used for the MLP",
        "vit/layers.py",
        "hidden, self.ls2, self.drop_path2",
        "hidden, self.ls1, self.drop_path2",
        (f"{VIT}::test_cpu_path",),
    ),
    Mutant(
        "layer_norm: the mean is not corrected",
        "kernels/tile.py",
        "return mean + shift, 1.0",
        "return mean, 1.0",
        (f"{LN}::test_extreme_rows",),
    ),
    Mutant(
        "layer_norm: the last row is not written",
        "kernels/layer_norm.py",
        "y.to(y_ptr.dtype.element_ty), mask=mask)",
        "y.to(y_ptr.dtype.element_ty), mask=mask & (offs_m < M - 1)[:, None])",
        (f"{LN}::test_layer_norm",),
    ),
    Mutant(
        "layer_norm: a masked load without other",
        "kernels/layer_norm.py",
        "stride_m + offs_d[None, :], mask=mask, other=0.0)",
        "stride_m + offs_d[None, :], mask=mask)",
        (f"{LN}::test_layer_norm",),
    ),
    Mutant(
        "layer_norm: the partial sums of the first program alone",
        "kernels/layer_norm.py",
        "sum_partials([(p, out) for",
        "sum_partials([(p[:1], out) for",
        (f"{LN}::test_layer_norm",),
    ),
    Mutant(
        "layer_norm: the gradient of the bias is summed in 16 bits",
        "kernels/layer_norm.py",
        "db += tl.sum(dy, axis=0)",
        "db = (db + tl.sum(dy, axis=0)).to(dy_ptr.dtype.element_ty).to(ACC)",
        (f"{LN}::test_sums_over_many_rows",),
    ),
    Mutant(
        "layer_norm: the gradient of the stream is left out",
        "kernels/layer_norm.py",
        "if ds_out_ptr is not None:",
        "if dw_ptr is None:",
        (f"{LN}::test_residual_layer_norm",),
    ),
    Mutant(
        "layer_norm: the gradient of the branch without gamma",
        "kernels/layer_norm.py",
        "ds *= gamma",
        "ds *= 1.0",
        (f"{LN}::test_residual_layer_norm",),
    ),
    Mutant(
        "layer_norm: an fp32 stream is rounded to the type of the branch",
        "kernels/layer_norm.py",
        "return x.new_empty(0 if branch is None else x.shape), ",
        "return x.new_empty(0 if branch is None else x.shape, dtype=out_dtype), ",
        (f"{LN}::test_fp32_stream_with_16_bit_branch",),
    ),
    Mutant(
        "layer_norm: the gradient of gamma without the bias of the branch",
        "kernels/layer_norm.py",
        "branch += branch_bias\n",
        "branch += 0.0 * branch_bias\n",
        (f"{LN}::test_residual_layer_norm",),
    ),
    Mutant(
        "layer_norm: the gradient of the branch's bias before gamma",
        "kernels/layer_norm.py",
        """        if gamma_ptr is not None:
            ds *= gamma
        dbranch_bias += tl.sum(ds, axis=0)
""",
        """        dbranch_bias += tl.sum(ds, axis=0)
        if gamma_ptr is not None:
            ds *= gamma
""",
        (f"{LN}::test_residual_layer_norm",),
    ),
    Mutant(
        "layer_norm: the bias of the branch after dropout",
        "kernels/layer_norm.py",
        """        if branch_bias_ptr is not None:
            branch += _load_row(branch_bias_ptr, offs_d, mask_d, ACC)
        if seed_ptr is not None:
            branch *= tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m, 0, BLOCK_D, P).to(ACC)
""",
        """        if seed_ptr is not None:
            branch *= tile.dropout_scale(tl.load(seed_ptr), OFFSET, offs_m, 0, BLOCK_D, P).to(ACC)
        if branch_bias_ptr is not None:
            branch += _load_row(branch_bias_ptr, offs_d, mask_d, ACC)
""",
        ("tests/kernels/test_dropout.py::test_residual_layer_norm",),
    ),
    Mutant(
        "layer_norm: y is the norm of the stream before it is rounded",
        "kernels/layer_norm.py",
        "        s = stream.to(ACC)\n",
        "        s += branch\n",
        (f"{LN}::test_backward_gives_y_again",),
    ),
    Mutant(
        "layer_norm: y of the backward without its bias",
        "kernels/layer_norm.py",
        "b_ptr=bias if need_y else None,",
        "b_ptr=None,",
        (f"{LN}::test_backward_gives_y_again",),
    ),
    Mutant(
        "recompute: y again without its bias",
        "kernels/recompute.py",
        "    args = None, None, None, None, weight, bias,",
        "    args = None, None, None, None, weight, None,",
        (f"{RECOMPUTE}::test_gradients",),
    ),
    Mutant(
        "recompute: what was changed in place since is not noticed",
        "kernels/recompute.py",
        " or versions != _versions(y, source) else source",
        " else source",
        (f"{RECOMPUTE}::test_changed_in_place",),
    ),
    Mutant(
        "linear: y is saved although it can be computed again",
        "kernels/linear.py",
        'path == "cublas" and has_source(x)',
        'path == "cublas" and False',
        ("tests/benchmarks/test_bench_memory.py::test_saved_by_a_block_by_hand",),
    ),
    Mutant(
        "model: the forward keeps what every block returned",
        "vit/model.py",
        "((_, y),) = collections.deque(blocks, maxlen=1)",
        "*_, (_, y) = blocks",
        ("tests/benchmarks/test_bench_memory.py::test_peak_beside_eager",),
    ),
    Mutant(
        "layer_norm: a kernel for each number of rows that 16 divides",
        "kernels/layer_norm.py",
        """@triton.jit(do_not_specialize=["M", "ROWS_PER_SCALE", "OFFSET"])
def _layer_norm_bwd_kernel(""",
        """@triton.jit(do_not_specialize=["ROWS_PER_SCALE", "OFFSET"])
def _layer_norm_bwd_kernel(""",
        ("tests/kernels/test_compilations.py",),
    ),
    Mutant(
        "partial sums: the last rows are left out",
        "kernels/partial_sums.py",
        "for start_m in range(0, M, BLOCK_M):",
        "for start_m in range(0, M - BLOCK_M + 1, BLOCK_M):",
        ("tests/kernels/test_partial_sums.py",),
    ),
    Mutant(
        "partial sums: the sums beyond the fifth are left out",
        "kernels/partial_sums.py",
        "for start in range(0, len(sums), _MAX_SUMS):",
        "for start in range(0, min(len(sums), 1), _MAX_SUMS):",
        ("tests/kernels/test_partial_sums.py",),
    ),
    Mutant(
        "attention: wrong head stride",
        "kernels/attention_tile.py",
        "h * stride[2]",
        "h * stride[1]",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: columns of the next head are read",
        "kernels/attention.py",
        "min(width, head_dim - start)",
        "width",
        (f"{ATTENTION}::test_every_head_dim",),
    ),
    Mutant(
        "attention: statistics of the first query are not written",
        "kernels/attention.py",
        "tl.store(m_ptr + rows, m_i, mask=offs_m < NQ)",
        "tl.store(m_ptr + rows, m_i, mask=(offs_m < NQ) & (offs_m > 0))",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: packed q and k exchanged",
        "kernels/attention.py",
        "q, k, v = unit_rows(qkv)[0].unbind(dim=2)",
        "k, q, v = unit_rows(qkv)[0].unbind(dim=2)",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: dk and dv exchanged",
        "kernels/attention.py",
        "dk_ptr=dk, dv_ptr=dv",
        "dk_ptr=dv, dv_ptr=dk",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: dq without the scale",
        "kernels/attention.py",
        "scale_parts(dq, SCALE)",
        "dq",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "gelu_tanh: slope off by a factor of three in x squared",
        "kernels/tile.py",
        "0.21406444881780076 * tl.minimum",
        "0.07135481627260025 * tl.minimum",
        ("tests/kernels/test_gelu.py::test_gelu_and_grad",),
    ),
    Mutant(
        "gelu: the cheap form's tail is off by 0.1 %",
        "kernels/tile.py",
        "ratio = ratio * t + 0.0050716971",
        "ratio = 0.999 * (ratio * t + 0.0050716971)",
        ("tests/kernels/test_gelu.py::test_every_number_of_16_bits",),
    ),
    Mutant(
        "gelu: the cheap form loses infinity",
        "kernels/tile.py",
        "cdf = tl.abs(tl.where(x < 0.0, 0.0, 1.0) - pdf * ratio)",
        "cdf = tl.maximum(x, 0.0) / x - tl.where(x < 0.0, -1.0, 1.0) * pdf * ratio",
        ("tests/kernels/test_gelu.py::test_infinity_and_nan",),
    ),
    Mutant(
        "gelu: 1/d by a division",
        "kernels/tile.py",
        "t = tl.rsqrt(d * d + 1.0)",
        "t = 1.0 / tl.sqrt(d * d + 1.0)",
        ("tests/kernels/test_linear_compiled.py::test_the_epilogue_of_a_product_with_gelu_is_short",),
    ),
    Mutant(
        "gemm: the sums of the columns leave half of the rows out",
        "kernels/linear.py",
        "tl.sum(sums[0] + sums[1], axis=0)",
        "tl.sum(sums[0], axis=0)",
        (f"{MLP}::test_mlp",),
    ),
    Mutant(
        "gemm: all partial sums of the columns at one place",
        "kernels/linear.py",
        "sum_ptr + pid_m.to(tl.int64) * N + offs_n",
        "sum_ptr + offs_n",
        (f"{LINEAR}::test_sums_of_the_columns",),
    ),
    Mutant(
        "gemm: partial sums of the columns are rounded before they are added",
        "kernels/linear.py",
        "partial.sum(dim=0).to(a.dtype)",
        "partial.to(a.dtype).sum(dim=0)",
        (f"{LINEAR}::test_sums_of_the_columns",),
    ),
    Mutant(
        "gemm: every other batch compiles a kernel",
        "kernels/linear.py",
        '@triton.jit(do_not_specialize=["M", "K", "OFFSET"])',
        '@triton.jit(do_not_specialize=["M", "OFFSET"])',
        ("tests/kernels/test_linear_compiled.py::test_no_batch_compiles_a_kernel_again",),
    ),
    Mutant(
        "gemm_pingpong: a consumer does not wait for its turn",
        "kernels/gemm_pingpong.py",
        "        mbarrier.wait(turn.index(WHO), phase if WHO == 1 else phase ^ 1)\n",
        "",
        (PINGPONG,),
    ),
    Mutant(
        "gemm_pingpong: buffers are empty before their product is done",
        "kernels/gemm_pingpong.py",
        "acc = warpgroup_mma_wait(1, deps=(acc,))",
        "acc = warpgroup_mma_wait(2, deps=(acc,))",
        (PINGPONG,),
    ),
    Mutant(
        "gemm_pingpong: results overwrite what still leaves",
        "kernels/gemm_pingpong.py",
        "        if preact_desc is None:\n            tma.store_wait(0)\n",
        "        if preact_desc is None:\n            pass\n",
        (PINGPONG,),
    ),
    Mutant(
        "gemm_pingpong: takes what its descriptors cannot describe",
        "kernels/gemm_pingpong.py",
        "aligned = out.shape[1] % 8 == 0",
        "aligned = out.shape[1] % 4 == 0",
        (PINGPONG,),
    ),
    Mutant(
        "gemm: rows and columns of a tile in 32 bits from the first element of the matrix",
        "kernels/linear.py",
        "first = start_m.to(tl.int64) * N",
        "first = start_m * N",
        ("tests/kernels/test_mlp_offsets.py::test_product",),
    ),
    Mutant(
        "gemm: the cheap erf in fp32",
        "kernels/linear.py",
        "primitive_bitwidth == 16",
        "primitive_bitwidth <= 32",
        ("tests/kernels/test_gelu.py::test_only_16_bit_results_take_the_cheap_form",),
    ),
    Mutant(
        "gemm: a ragged group of tiles is taken for a whole one",
        "kernels/tile.py",
        "rows = tl.minimum(TILES_M - first_m, GROUP_M)",
        "rows = GROUP_M",
        (f"{LINEAR}::test_linear",),
    ),
    Mutant(
        "gemm: the bias is read beyond its end",
        "kernels/linear.py",
        "tl.load(bias_ptr + offs_n, mask=mask_n,",
        "tl.load(bias_ptr + offs_n, mask=offs_n <= N,",
        (f"{LINEAR}::test_linear",),
    ),
    Mutant(
        "gemm: tf32 without being asked",
        "kernels/runtime.py",
        'else "ieee"',
        'else "tf32"',
        (f"{LINEAR}::test_fp32_precision_follows_pytorch",),
    ),
    Mutant(
        "linear: the gradient of the bias is summed in 16 bits",
        "kernels/linear.py",
        "return dy.sum(dim=0)",
        "return sum(some.sum(dim=0) for some in dy.split(64))",
        (f"{LINEAR}::test_sums_over_many_rows",),
    ),
    Mutant(
        "patch_embed: dW from rows of dy that are one prefix too early",
        "kernels/patch_embed.py",
        "(R + n).to(tl.int64) * stride_dyt)[None, :]",
        "n.to(tl.int64) * stride_dyt)[None, :]",
        (f"{PATCH}::test_patch_embed",),
    ),
    Mutant(
        "patch_embed: dW from the first image alone",
        "kernels/patch_embed.py",
        "offs_dy = (b * stride_dyb",
        "offs_dy = (0 * b * stride_dyb",
        (f"{PATCH}::test_patch_embed",),
    ),
    Mutant(
        "patch_embed: the first partial tile of dW alone",
        "kernels/patch_embed.py",
        "    return partials\n",
        "    return partials[:1]\n",
        (f"{PATCH}::test_sums_over_many_rows",),
    ),
    Mutant(
        "patch_embed: dimage at the pixels of a patch on its side",
        "kernels/patch_embed.py",
        "**_layout(dimage, PH, PW)",
        "**_layout(dimage, PW, PH)",
        (f"{PATCH}::test_patch_embed[float32-rectangular patch]",),
    ),
    Mutant(
        "patch_embed: dW accumulates in 16 bits",
        "kernels/patch_embed.py",
        "acc = tile.dot(dy, patches, acc, PRECISION)",
        "acc = tile.dot(dy, patches, acc, PRECISION).to(dy.dtype).to(ACC)",
        (f"{PATCH}::test_sums_over_many_rows",),
    ),
    Mutant(
        "patch_embed: prefix tokens in the gradient of the bias",
        "kernels/patch_embed.py",
        "(sums[num_prefix:], dbias)",
        "(sums, dbias)",
        (f"{PATCH}::test_patch_embed",),
    ),
    Mutant(
        "patch_embed: the gradient of the position embedding from the first rows",
        "kernels/patch_embed.py",
        "[None, -dpos.shape[1] :]",
        "[None, : dpos.shape[1]]",
        (f"{PATCH}::test_patch_embed[float32-position embedding of patches only]",),
    ),
    Mutant(
        "runtime: an explicit request falls back",
        "kernels/runtime.py",
        'if impl != "auto":',
        'if impl == "never":',
        (f"{ATTENTION}::test_unsupported_head_dim",),
    ),
    Mutant(
        "reference: tanh GELU for erf",
        "kernels/reference.py",
        'approximate="tanh" if activation == "gelu_tanh" else "none"',
        'approximate="tanh"',
        (f"{VIT}::test_cpu_path[plain]",),
    ),
    Mutant(
        "dropout: the mask ignores the offset",
        "kernels/tile.py",
        "(row >> 32).to(tl.int32), offset)",
        "(row >> 32).to(tl.int32), offset * 0)",
        ("tests/kernels/test_dropout.py::test_kernel_draws_the_mask_of_the_reference",),
    ),
    Mutant(
        "dropout: the words of a counter go to four neighbours",
        "kernels/tile.py",
        "    return fours.permute(0, 1, 3, 2, 4).reshape(",
        "    return fours.reshape(",
        ("tests/kernels/test_dropout.py::test_kernel_draws_the_mask_of_the_reference",),
    ),
    Mutant(
        "dropout: one word of a counter twice",
        "kernels/tile.py",
        "tl.join(_scale(w1, P), _scale(w3, P))",
        "tl.join(_scale(w1, P), _scale(w2, P))",
        ("tests/kernels/test_dropout.py::test_kernel_draws_the_mask_of_the_reference",),
    ),
    Mutant(
        "dropout: every tile of columns draws the first one's numbers",
        "kernels/dropout.py",
        "offs_m, start_d, BLOCK_D, P",
        "offs_m, 0, BLOCK_D, P",
        ("tests/kernels/test_dropout.py::test_kernel_draws_the_mask_of_the_reference",),
    ),
    Mutant(
        "dropout: the backward of residual_layer_norm does not drop",
        "kernels/layer_norm.py",
        "            ds *= tile.dropout_scale(",
        "            ds *= 1.0 + 0.0 * tile.dropout_scale(",
        ("tests/kernels/test_dropout.py::test_residual_layer_norm",),
    ),
    Mutant(
        "model: the MLP's stochastic depth draws that of the attention",
        "vit/layers.py",
        "offset + PATH2",
        "offset + PATH1",
        ("tests/model/test_training_options.py::test_fast_model_drops_where_the_reference_does",),
    ),
    Mutant(
        "model: norm1 of the block before",
        "vit/chain.py",
        "zip(links, norms[1:], strict=True)",
        "zip(links, norms[:-1], strict=True)",
        (f"{VIT}::test_cpu_path[plain]",),
    ),
    Mutant(
        "model: a hooked part is read, not called",
        "vit/plain.py",
        "not (hooked(module) or replaced",
        "not (replaced",
        ("tests/model/test_plain.py::test_counts",),
    ),
    Mutant(
        "adapters: a causal call of transformers sees all tokens",
        "vit/adapters/huggingface.py",
        'or given.get("is_causal") ',
        "",
        (f"{INTERFACES}::test_causal_and_masked_calls_take_the_librarys_attention",),
    ),
    Mutant(
        "adapters: a padding mask of transformers is ignored",
        "vit/adapters/huggingface.py",
        "drop = None if special or ",
        "drop = None if ",
        (f"{INTERFACES}::test_padded_images_take_the_librarys_attention_and_the_rest_is_fused",),
    ),
    Mutant(
        "adapters: a text tower is accelerated",
        "vit/adapters/__init__.py",
        "if _is_text_model(module):",
        "if False:",
        (f"{INTERFACES}::test_the_text_tower_beside_a_vision_tower_is_untouched",),
    ),
    Mutant(
        "adapters: RoPE in the other layout",
        "vit/adapters/timm.py",
        "rope, half=half)",
        "rope, half=not half)",
        ("tests/adapters/test_accelerate.py::test_cpu_path_fp32[timm DINOv3]",),
    ),
    Mutant(
        "adapters: grouped heads take the keys of another group",
        "vit/adapters/timm.py",
        "t.repeat_interleave(groups, dim=2)",
        "t.repeat(1, 1, groups, 1)",
        ("tests/adapters/test_accelerate.py::test_cpu_path_fp32[timm RoPE, grouped]",),
    ),
    Mutant(
        "adapters: parallel MLPs take the norm of the attentions",
        "vit/adapters/timm.py",
        "first_norm(self.ffns), impl)",
        "first_norm(self.attns), impl)",
        ("tests/adapters/test_accelerate.py::test_cpu_path_fp32[timm ParallelThings]",),
    ),
    Mutant(
        "adapters: a norm after the branch is before it",
        "vit/adapters/timm.py",
        "self.norm2(self.mlp(x))",
        "self.mlp(self.norm2(x))",
        ("tests/adapters/test_accelerate.py::test_cpu_path_fp32[timm ResPost]",),
    ),
    Mutant(
        "adapters: a masked call of a block with RoPE is fused",
        "vit/adapters/timm.py",
        "value is not None and value is not False for value",
        "False for value",
        (f"{INTERFACES}::test_calls_of_blocks_with_masks_and_positions",),
    ),
    Mutant(
        "adapters: attention=False fuses the attention of a block that is one part",
        "vit/adapters/__init__.py",
        ", *part.needs} <= wanted",
        "} <= wanted",
        ("tests/adapters/test_accelerate.py::test_a_block_that_is_one_part_is_fused_only_with_its_attention",),
    ),
    Mutant(
        "adapters: a part without a kernel is not named",
        "vit/adapters/__init__.py",
        'yield name, "no kernel computes it"',
        "pass",
        (f"{INTERFACES}::test_a_part_without_a_kernel_is_called_and_the_rest_of_the_block_is_fused",),
    ),
    Mutant(
        "adapters: hooks on the halves of an MLP are lost",
        "vit/adapters/huggingface.py",
        "is_fused(half) and plain(half)",
        "is_fused(half)",
        ("tests/adapters/test_accelerate_semantics.py::test_a_hook_sees_and_changes_what_it_did",),
    ),
    Mutant(
        "adapters: recorded attention maps of a layer without arguments are lost",
        "vit/adapters/huggingface.py",
        " or _recorded(self)",
        "",
        (f"{INTERFACES}::test_hidden_states_and_attention_maps_of_transformers",),
    ),
    Mutant(
        "model: a wrapped part is read, not called",
        "vit/plain.py",
        "type(module) in (nn.Linear, NonDynamicallyQuantizableLinear)",
        "True",
        ("tests/model/test_plain.py::test_counts",),
    ),
    Mutant(
        "model: a wrapped final norm is left out",
        "vit/model.py",
        "self.norm(stream) if y is None and index == depth else y",
        "stream if y is None and index == depth else y",
        ("tests/kernels/test_runtime.py::test_wrapped_modules",),
    ),
    Mutant(
        "graph: hands out what the next replay overwrites",
        "vit/cuda_graph.py",
        "return out.clone() if",
        "return out if",
        ("tests/kernels/test_runtime.py::test_graph_returns_the_models_outputs_and_keeps_them",),
    ),
    Mutant(
        "model: gamma is ignored where no norm follows",
        "vit/layers.py",
        "branch = branch if layer_scale is None else layer_scale(branch)",
        "branch = branch * 1.0",
        (f"{VIT}::test_cpu_path[LayerScale, avg pool]",),
    ),
    Mutant(
        "model: norm_eps is ignored",
        "vit/layers.py",
        "eps=config.norm_eps",
        "eps=1e-6",
        (f"{VIT}::test_cpu_path[norm_eps]",),
    ),
    Mutant(
        "model: tanh GELU is ignored",
        "vit/layers.py",
        "self.activation = config.act_layer",
        'self.activation = "gelu"',
        (f"{VIT}::test_cpu_path[tanh GELU]",),
    ),
    Mutant(
        "model: the pool takes a prefix token along",
        "vit/model.py",
        "self.config.num_prefix_tokens :].mean",
        "self.config.num_prefix_tokens - 1 :].mean",
        (f"{VIT}::test_cpu_path[avg pool]",),
    ),
    Mutant(
        "model: register tokens before the class token",
        "vit/model.py",
        "(self.cls_token, self.reg_token) if",
        "(self.reg_token, self.cls_token) if",
        (f"{VIT}::test_cpu_path[registers]",),
    ),
    Mutant(
        "model: the position embedding is resized in the other dialect",
        "vit/tokens.py",
        "(new + 0.1) / old",
        "new / old",
        (f"{VIT}::test_position_embedding_is_resized",),
    ),
    Mutant(
        "model: the resized position embedding is transposed",
        "vit/tokens.py",
        "ha,wb,abd->hwd",
        "ha,wb,abd->whd",
        (f"{VIT}::test_position_embedding_is_resized",),
    ),
    Mutant(
        "weights: flax's patch kernel transposed",
        "vit/weights/dialects.py",
        "t[0].permute(3, 2, 0, 1)",
        "t[0].permute(3, 2, 1, 0)",
        (f"{WEIGHTS}::test_flax_checkpoints",),
    ),
    Mutant(
        "weights: the row of the class token is lost",
        "vit/weights/fit.py",
        "torch.where(row == 0, head, head + row)",
        "head",
        (f"{WEIGHTS}::test_rows_of_the_prefix_tokens_move",),
    ),
    Mutant(
        "weights: norms keep the eps of the model",
        "vit/weights/__init__.py",
        "module.eps = config.norm_eps",
        "pass",
        (f"{WEIGHTS}::test_numerics_of_the_source_reach_every_module",),
    ),
    Mutant(
        "weights: pickles are executed",
        "vit/weights/files.py",
        "weights_only=True",
        "weights_only=False",
        (f"{FILES}::test_pickle_bombs_do_not_run",),
    ),
    Mutant(
        "weights: a file is written in place",
        "vit/weights/files.py",
        'path.with_name(f".{path.name}.{os.getpid()}.tmp")',
        "path",
        (f"{FILES}::test_saving_is_atomic",),
    ),
    Mutant(
        "weights: a changed model is not checked before it is loaded into",
        "vit/weights/__init__.py",
        "            _check_same(live, template)",
        "            pass",
        (f"{FILES}::test_wrong_arguments",),
    ),
    Mutant(
        "weights: square kernels of flax are not transposed",
        "vit/weights/dialects.py",
        "KERNEL = Layout(lambda t, h: t[0].mT, lambda t, h: [t.mT])",
        "turned = lambda t: t.mT if len({*t.shape}) > 1 else t\n"
        "KERNEL = Layout(lambda t, h: turned(t[0]), lambda t, h: [turned(t)])",
        ("tests/weights/test_weights_layouts.py::test_layouts_by_hand",),
    ),
    Mutant(
        "model: a 16-bit position embedding is resized in 16 bits",
        "vit/tokens.py",
        "wide = pos.to(torch.promote_types(pos.dtype, torch.float32))",
        "wide = pos",
        (f"{WEIGHTS}::test_16_bits_are_resized_in_32",),
    ),
    Mutant(
        "weights: mean and std are swapped in a saved preprocessor",
        "vit/weights/export.py",
        """"image_mean": list(cfg["mean"]),
        "image_std": list(cfg["std"]),""",
        """"image_mean": list(cfg["std"]),
        "image_std": list(cfg["mean"]),""",
        (f"{FILES}::test_a_folder_that_others_changed",),
    ),
    Mutant(
        "weights: the model's grid before a square",
        "vit/weights/fit.py",
        "[*(usual or []), *square, *same]",
        "[*same, *(usual or []), *square]",
        (f"{WEIGHTS}::test_a_grid_is_not_guessed",),
    ),
    Mutant(
        "weights: two readings of a grid, and one is taken",
        "vit/weights/fit.py",
        "and same[0][0] == prefixes[0])",
        "and False)",
        (f"{WEIGHTS}::test_a_grid_is_not_guessed",),
    ),
    Mutant(
        "weights: the heads that a file says are not compared",
        "vit/weights/fit.py",
        'if own.num_heads != start.num_heads and "num_heads" not in overrides:',
        "if False:",
        ("tests/weights/test_weights_infer.py::test_what_a_file_says_is_compared_with_the_model",),
    ),
    Mutant(
        "weights: a .npz does not say what it holds",
        "vit/weights/files.py",
        "archive.comment = _to_comment(note)",
        "pass",
        ("tests/weights/test_weights_infer.py::test_every_field_comes_back",),
    ),
    Mutant(
        "weights: a CLIP without config.json gets OpenAI's activation",
        "vit/weights/fit.py",
        """    if "clip" in name and not said:
        del""",
        """    if False:
        del""",
        (f"{TOWERS}::test_open_clip",),
    ),
    Mutant(
        "weights: the words of CLIP's text model are read",
        "vit/weights/fit.py",
        'config.get("vision_config")',
        'config.get("text_config")',
        (f"{TOWERS}::test_the_tower_of_two",),
    ),
    Mutant(
        "weights: Dinov2 with registers is resized without antialias",
        "vit/weights/dialects.py",
        'Dialect(HF_DINOV2, interpolation="bicubic_antialias", **_HF_DINOV2)',
        'Dialect(HF_DINOV2, interpolation="bicubic", **_HF_DINOV2)',
        (f"{TOWERS}::test_dinov2_at_another_size",),
    ),
    Mutant(
        "weights: queries and keys of SigLIP's pooling are swapped",
        "vit/weights/dialects.py",
        'zip("qkv", packed.chunk(3), strict=True)',
        'zip("kqv", packed.chunk(3), strict=True)',
        (f"{TOWERS}::test_siglip",),
    ),
    Mutant(
        "weights: a bias of the head is lost in a projection",
        "vit/weights/dialects.py",
        """and not ours["head.bias"].count_nonzero():""",
        """and True:""",
        (f"{TOWERS}::test_a_projection_has_no_place_for_a_bias",),
    ),
    Mutant(
        "weights: TorchScript is left to torch.load",
        "vit/weights/files.py",
        'name.endswith("/constants.pkl")',
        'name.endswith("/constants.txt")',
        (f"{TOWERS}::test_torchscript_archives_are_not_executed",),
    ),
    Mutant(
        "model: attention pooling reads the class token",
        "vit/model.py",
        "self.attn_pool(x[:, self.config.num_prefix_tokens :])",
        "self.attn_pool(x)",
        (f"{VIT}::test_cpu_path",),
    ),
    Mutant(
        "model: attention pooling drops the residual of its MLP",
        "vit/layers.py",
        "return (x + self.mlp(self.norm(x)))[:, 0]",
        "return self.mlp(self.norm(x))[:, 0]",
        (f"{VIT}::test_cpu_path",),
    ),
    Mutant(
        "preprocess: a photo lies as it was stored",
        "vit/preprocess.py",
        "ImageOps.exif_transpose(photo)",
        "photo",
        ("tests/commands/test_preprocess.py::test_a_photo_is_turned_the_right_way_up",),
    ),
    Mutant(
        "benchmarks: attention's backward without the product that it does again",
        "benchmarks/bench_attention.py",
        "Work(5 * product",
        "Work(4 * product",
        (f"{HARNESS}::test_flops_are_those_that_pytorch_counts",),
    ),
    Mutant(
        "benchmarks: the gate looks at outputs alone",
        "benchmarks/harness.py",
        "return [t.detach() for t in (*(o[: self.samples] for o in outs), *grads)]",
        "return [o[: self.samples].detach() for o in outs]",
        (f"{HARNESS}::test_who_is_wrong_is_not_timed_and_says_so",),
    ),
    Mutant(
        "benchmarks: a gate ten times as wide",
        "benchmarks/harness.py",
        "GATE = 2.0",
        "GATE = 20.0",
        (f"{HARNESS}::test_who_is_wrong_is_not_timed_and_says_so",),
    ),
    Mutant(
        "benchmarks: an operand that is given twice is counted twice",
        "benchmarks/trace.py",
        "tuple(sorted(sizes)), t.dtype)] = count",
        "tuple(sorted(sizes)), t.dtype, len(regions))] = count",
        (COUNTS,),
    ),
    Mutant(
        "benchmarks: the slowest peer is called the best",
        "benchmarks/report.py",
        "best = max(peers, key=lambda r: r.img_s, default=None)",
        "best = min(peers, key=lambda r: r.img_s, default=None)",
        ("tests/benchmarks/test_bench_report.py::test_table",),
    ),
    Mutant(
        "benchmarks: noise is compared with 0.2 %",
        "benchmarks/compare.py",
        "THRESHOLD = 1.02",
        "THRESHOLD = 1.002",
        ("tests/benchmarks/test_bench_report.py::test_rule_of_noise",),
    ),
    Mutant(
        "attention: the log-sum-exp without the scale",
        "kernels/attention.py",
        """*qkv.unbind(2)[:2], scale, m, log_l)
    return (out, scale * m + log_l)""",
        """*qkv.unbind(2)[:2], scale, m, log_l)
    return (out, qkv.shape[-1] ** -0.5 * m + log_l)""",
        (f"{CONTRACT}::test_lse_of_any_scale",),
    ),
    Mutant(
        "attention: alignment promised whatever the incoming gradient",
        "kernels/attention.py",
        "align(q, k, v, do, dq, dk, dv)",
        "align(q, k, v, dq, dk, dv)",
        (f"{CONTRACT}::test_layout_of_one_tensor_changes_no_bit",),
    ),
    Mutant(
        "linear: the result is a view that cannot be changed",
        "kernels/linear.py",
        "return torch.ops.aten._unsafe_view(x, shape)",
        "return x.view(shape)",
        (f"{CONTRACT}::test_results_can_be_changed_in_place",),
    ),
    Mutant(
        "layer_norm: dropout alone does not reach the gradient of the branch",
        "kernels/layer_norm.py",
        "for t in (gamma, row_scale, seed))",
        "for t in (gamma, row_scale))",
        (f"{CONTRACT}::test_gradients_are_those_of_the_reference",),
    ),
    Mutant(
        "layer_norm: the gradient has the strides of the input",
        "kernels/layer_norm.py",
        "return s.new_empty(s.shape), *rows, *sums",
        "return torch.empty_like(s), *rows, *sums",
        (f"{LN}::test_same_bits_of_layer_norm_alone",),
    ),
    Mutant(
        "runtime: kernels are launched on the current device",
        "kernels/runtime.py",
        'torch.cuda.device(device) if device.type == "cuda" else',
        'torch.cuda.device(device) if device.type == "never" else',
        (f"{RUNTIME}::test_launch_enters_the_device_of_its_tensors",),
    ),
    Mutant(
        "model: a wrapped norm loses the dropout before it",
        "vit/layers.py",
        "    if dropout:\n",
        "    if dropout and norm is None:\n",
        (f"{RUNTIME}::test_residual_add_without_the_fused_op",),
    ),
    Mutant(
        "model: a 16-bit position embedding is resized in 16 bits",
        "vit/tokens.py",
        "wide = pos.to(torch.promote_types(pos.dtype, torch.float32))",
        "wide = pos",
        (f"{VIT}::test_16_bit_position_embedding_is_rounded_once",),
    ),
    Mutant(
        "runtime: modules stay in the mode of the warm-up",
        "vit/unchanged.py",
        "module.training = training",
        "pass",
        (f"{RUNTIME}::test_nothing_changes",),
    ),
    Mutant(
        "runtime: statistics of a forward that is no step stay",
        "vit/unchanged.py",
        "t.copy_(value)",
        "pass",
        (f"{RUNTIME}::test_nothing_changes",),
    ),
    Mutant(
        "parity: a gradient that one side has as zero is left out",
        "vit/testing/parity.py",
        "if any(result[name].any() for result in found):",
        "if all(result[name].any() for result in found):",
        ("tests/commands/test_parity_command.py::test_a_gradient_that_is_zero_or_missing_on_one_side_fails",),
    ),
    Mutant(
        "benchmarks: expanded dimensions are counted in full",
        "benchmarks/trace.py",
        "if s != 0 and n != 1]",
        "if n != 1]",
        (f"{COUNTS}::test_regions_are_counted_once",),
    ),
    Mutant(
        "model: a watched row of blocks loses the seed",
        "vit/model.py",
        "self.blocks(x, *([seed, True] if self._recompute else seeded(seed)))",
        "self.blocks(x)",
        (f"{PROTOCOL}::test_a_watched_row_drops_the_same",),
    ),
    Mutant(
        "model: a watched patch projection loses the mask token",
        "vit/layers.py",
        "return reference.assemble_tokens(tokens, pos_embed, prefix, **mask)",
        "return reference.assemble_tokens(tokens, pos_embed, prefix)",
        (f"{PROTOCOL}::test_a_watched_patch_projection",),
    ),
    Mutant(
        "model: what wraps a block is handed a seed that it does not take",
        "vit/layers.py",
        'own = seed if getattr(block, "takes_seed", False) else None',
        "own = seed",
        (f"{PROTOCOL}::test_a_block_of_somebody_else",),
    ),
    Mutant(
        "preprocess: what is transparent becomes black",
        "vit/preprocess.py",
        'photo.size, "white")',
        'photo.size, "black")',
        (f"{LOOK}::test_modes_of_photographs",),
    ),
    Mutant(
        "attention: the sentence is of the head with most, not of the mean",
        "vit/commands/attention.py",
        "row = self.rows[self.depth - 1].mean(0)",
        "row = self.rows[self.depth - 1].max(0)",
        (f"{LOOK}::test_the_sentence_names_the_patch_with_most_of_the_mean_over_heads",),
    ),
    Mutant(
        "attention: --save keeps the rows of layers from the last to the first",
        "vit/commands/attention.py",
        "for layer in range(first.depth)])",
        "for layer in reversed(range(first.depth))])",
        (f"{LOOK}::test_saved_arrays_are_those_of_a_dense_softmax",),
    ),
    Mutant(
        "attention: the overlay stands on its head",
        "vit/commands/overlay.py",
        "smooth = smooth[: photo.height, : photo.width]",
        "smooth = smooth[: photo.height, : photo.width][::-1]",
        (f"{LOOK}::test_the_overlay_is_bright_where_the_level_is",),
    ),
    Mutant(
        "attention: a map is scaled to its largest patch",
        "vit/commands/overlay.py",
        "np.percentile(values, percentile)",
        "values.max()",
        (f"{LOOK}::test_levels_go_from_the_smallest_to_the_percentile",),
    ),
    Mutant(
        "attention: a file that could be written stays, though empty",
        "vit/commands/inside.py",
        "            if new:\n                path.unlink()\n",
        "",
        (f"{LOOK}::test_errors",),
    ),
    Mutant(
        "embeddings: components of filters that are not centred",
        "vit/embeddings.py",
        "filters - filters.mean(0)",
        "filters",
        (f"{INSPECT}::test_filters_are_principal_components",),
    ),
    Mutant(
        "embeddings: the class token's position among the patches'",
        "vit/embeddings.py",
        "table[len(table) - math.prod(grid) :]",
        "table[: math.prod(grid)]",
        (f"{INSPECT}::test_similarities_are_cosines_of_patches",),
    ),
    Mutant(
        "analysis: renormalised by what prefix tokens receive",
        "vit/analysis.py",
        "found.patch_mass.clamp_min",
        "found.prefix_mass.clamp_min",
        (f"{ANALYSIS}::test_statistics",),
    ),
    Mutant(
        "analysis: rollout reads rows of the next layer",
        "vit/analysis.py",
        "rolled = torch.empty_like(R)",
        "rolled = R",
        (f"{ANALYSIS}::test_rollout",),
    ),
    Mutant(
        "analysis: rollout rounded by autocast",
        "vit/analysis.py",
        '@autocasts("R", "q", "k")',
        "@torch.no_grad()",
        (f"{ANALYSIS}::test_autocast",),
    ),
    Mutant(
        "analysis: a recomputed forward counts",
        "vit/analysis.py",
        "torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1",
        "torch.compiler.is_compiling()",
        (f"{ANALYSIS}::test_recomputation_does_not_count",),
    ),
    Mutant(
        "analysis: a forward that failed counts",
        "vit/analysis.py",
        "if output is not None:",
        "if True:",
        (f"{ANALYSIS}::test_a_failed_forward_does_not_replace_the_one_before",),
    ),
    Mutant(
        "analysis: one of two nested blocks hears nothing",
        "vit/analysis.py",
        "[forward] if outer is None else [outer, forward]",
        "[forward]",
        (f"{ANALYSIS}::test_nested_blocks",),
    ),
    Mutant(
        "analysis: blocks that were not heard are not missed",
        "vit/analysis.py",
        "if layers < blocks:",
        "if layers > blocks:",
        (f"{ANALYSIS}::test_a_block_that_is_not_seen",),
    ),
    Mutant(
        "analysis: every model pads its images",
        "vit/analysis.py",
        "(side - 1) * pads",
        "side - 1",
        (f"{ANALYSIS_PEERS}::test_numbers[hf Dinov2 cut]",),
    ),
    *(Mutant(*row[:4], row[4:]) for row in STRANGERS),
]


def sources(mutant: Mutant, folder: Path) -> None:
    """Copies the sources into ``folder`` with the bug. The copy of the link ``vit/kernels`` is a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vit", folder / "vit", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)  # otherwise pytest uses the one above
    if mutant.file.startswith("benchmarks/"):
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=ignore)
    path = folder / mutant.file.replace("kernels/", "vit/kernels/", 1)
    text = path.read_text()
    if not mutant.old:
        path.write_text(text + mutant.new)
        return
    assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} occurs {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))


def _pytest(folder: Path, tests: tuple[str, ...]) -> None:
    """A child process: runs pytest in ``folder`` and writes its output to ``folder/log``."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(folder)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    import pytest

    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", *tests]))


def compares(mutant: Mutant) -> bool:
    """Whether its tests compare with another library, that is, have the mark `peers`."""
    for file, _, name in (test.partition("[")[0].partition("::") for test in mutant.tests):
        text = (ROOT / file).read_text()
        decorators = text.partition(f"def {name}(")[0].rpartition("\n\n\n")[2] if name else ""
        if "pytestmark = pytest.mark.peers" in text or "mark.peers" in decorators:
            return True
    return False


def controls(chosen: list[Mutant]) -> list[Mutant]:
    """For each folder that ``chosen`` changes, the tests of one of them with a comment instead of a bug."""
    areas = {m.file.split("/")[0] + (" beside libraries" if compares(m) else ""): m for m in reversed(chosen)}
    comment = "\n# This changes nothing.\n"
    return [dataclasses.replace(m, name=f"control of {area}", old="", new=comment) for area, m in areas.items()]


def run(mutant: Mutant) -> tuple[int | None, str]:
    """(exit code of pytest with the bug, its output)."""
    name = "".join(c if c.isalnum() else "-" for c in mutant.name)
    folder = ROOT / "build" / "mutants" / f"{name}-{os.getpid()}"
    sources(mutant, folder)
    (folder / "log").touch()
    child = FORK.Process(target=_pytest, args=(folder, mutant.tests))
    child.start()
    child.join(timeout=300)
    child.kill()
    output = (folder / "log").read_text()
    shutil.rmtree(folder, ignore_errors=True)
    return child.exitcode, output


def caught(mutant: Mutant) -> tuple[bool, str]:
    """(whether a test fails with the bug, the output of pytest)."""
    code, output = run(mutant)
    # 1 means that tests ran and failed. If a bug breaks the import or no test matches, no test has caught it.
    summary = output.strip().splitlines()[-1] if output.strip() else ""
    return code == 1 and " failed" in f" {summary}" and " error" not in summary, output


def timed(mutant: Mutant) -> tuple[bool, str, float]:
    start = time.time()
    return *caught(mutant), time.time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only bugs whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=2, help="number of bugs at a time")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if importlib.util.find_spec("timm") is None:
        there = len(chosen)
        chosen = [m for m in chosen if not compares(m)]
        print(f"{there - len(chosen)} bugs are left out: their tests need timm and transformers (make peers)")
    for control in controls(chosen):
        code, output = run(control)
        if code != 0:
            print(f"{output[-2000:]}\n{control.name}: its tests do not pass without a bug, so they cannot catch one")
            return 1
        print(f"passes    {control.name}", flush=True)
    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (ok, output, seconds) in zip(chosen, pool.map(timed, chosen), strict=True):
            print(f"{'caught' if ok else 'SURVIVED':<9}{seconds:5.1f} s  {mutant.name}", flush=True)
            if not ok:
                survivors.append(mutant.name)
                print(output[-2000:])
    print(f"seeded bugs: {len(chosen) - len(survivors)} of {len(chosen)} caught")
    print("".join(f"survived: {name}\n" for name in survivors), end="")
    return int(len(survivors) > 0.05 * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
