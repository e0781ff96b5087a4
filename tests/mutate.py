"""Seeded bugs: each is applied alone to a copy of the sources, and the tests named beside it must fail.

Run all of them with ``python tests/mutate.py``, some with ``python tests/mutate.py NAME …``.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
    """Replace ``old``, which stands exactly once in ``file``, by ``new``; ``tests`` are pytest arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LN, LINEAR, MLP = "tests/test_layer_norm.py", "tests/test_linear.py", "tests/test_mlp.py"
ATTENTION, PATCH, VIT = "tests/test_attention.py", "tests/test_patch_embed.py", "tests/test_vit.py"

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
        "branch *= tl.load(row_scale_ptr + offs_m // ROWS_PER_SCALE",
        "branch *= tl.load(row_scale_ptr + offs_m // (ROWS_PER_SCALE + 1)",
        (f"{LN}::test_residual_layer_norm",),
    ),
    Mutant(
        "attention: keys beyond the last one are not masked",
        "kernels/tile.py",
        'return tl.where(mask, dot_parts(a, b, PRECISION, ACC), float("-inf"))',
        "return dot_parts(a, b, PRECISION, ACC)",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: backward without delta",
        "kernels/attention.py",
        "ds = p * (tile.dot_parts(do, v, PRECISION, ACC) - delta[:, None])",
        "ds = p * tile.dot_parts(do, v, PRECISION, ACC)",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: lse in base 2",
        "kernels/attention.py",
        "tl.store(log_l_ptr + offs_stats, tl.log(l_i), mask=mask_m)",
        "tl.store(log_l_ptr + offs_stats, tl.log2(l_i), mask=mask_m)",
        (f"{ATTENTION}::test_lse",),
    ),
    Mutant(
        "attention: keys of head 0 for every head",
        "kernels/attention.py",
        "    k_rows = tile.head_rows(k_ptr, stride_k, b, h, ALIGN)\n",
        "    k_rows = tile.head_rows(k_ptr, stride_k, b, h * 0, ALIGN)\n",
        (f"{ATTENTION}::test_packed",),
    ),
    Mutant(
        "attention: softmax scale off by 0.3 %",
        "kernels/attention.py",
        "    out, m, log_l = attention_fwd(qkv, scale,",
        "    out, m, log_l = attention_fwd(qkv, 1.003 * scale,",
        (f"{ATTENTION}::test_packed",),
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
        "kernels/attention.py",
        "    pid = tl.program_id(0).to(tl.int64)\n    TILES: tl.constexpr",
        "    pid = tl.program_id(0)\n    TILES: tl.constexpr",
        (f"{ATTENTION}::test_offsets_beyond_32_bits",),
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
        "for start_k in range(0, K, BLOCK_K):",
        "for start_k in range(0, K - K % BLOCK_K, BLOCK_K):",
        (f"{LINEAR}::test_linear",),
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
        "            acc *= second\n",
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
        "model: gamma of the attention used for the MLP",
        "vit/layers.py",
        "gamma, path = self.ls2 and self.ls2.gamma",
        "gamma, path = self.ls1 and self.ls1.gamma",
        (f"{VIT}::test_cpu_path",),
    ),
]


def sources(mutant: Mutant, folder: Path) -> None:
    """Copies the sources into ``folder`` with the bug in place. ``kernels`` goes where it is imported from."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vit", folder / "vit", ignore=ignore)
    shutil.copytree(ROOT / "kernels", folder / "vit" / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    path = folder / mutant.file.replace("kernels/", "vit/kernels/", 1)
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))


def caught(mutant: Mutant) -> tuple[bool, str]:
    """Whether a test fails with the bug in place, and what pytest printed."""
    folder = ROOT / "build" / "mutants" / "".join(c if c.isalnum() else "-" for c in mutant.name)
    sources(mutant, folder)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in env.items() if not k.startswith("PYTEST_")}
    done = subprocess.run([*command, *mutant.tests], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    shutil.rmtree(folder, ignore_errors=True)
    # 1 means that tests ran and failed; a bug that breaks the import or matches no test was not caught by a test.
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    ok = done.returncode == 1 and " failed" in f" {summary}" and " error" not in summary
    return ok, done.stdout + done.stderr


def main() -> int:
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.name for word in sys.argv[1:])]
    survivors = []
    for mutant in chosen:
        ok, output = caught(mutant)
        print(f"{'caught' if ok else 'SURVIVED':<9} {mutant.name}", flush=True)
        if not ok:
            survivors.append(mutant.name)
            print(output[-2000:])
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} seeded bugs caught")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
