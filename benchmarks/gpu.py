"""``make gpu``: what a GPU has to show, stage by stage, each stage's JSON written as soon as it is known.

Stages, each in a process of its own so that one that fails or hangs does not stop the next:

1. ``smoke``: every op once, forward and backward, at ViT shapes in bf16: does each kernel launch, is it about right.
2. ``ops``: the kernel tests, compiled: parity of every op in fp32, fp16 and bf16, at every size they cover.
3. ``vit``: ViT-B/16 against `vit.reference`: logits and every gradient, bf16, fp16 and fp32, judged against fp64.
4. ``time``: ViT-B/16 forward and forward + backward, ours beside the eager reference, and the card's own ceilings.

``BUDGET`` (seconds, default 450) bounds the whole; ``STAGE`` or ``--stage`` picks one. ``--rehearse`` runs the same
code without a GPU on tiny shapes through the interpreter: it proves the script, not the speed; it writes to ``build/``.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"smoke": 0.2, "ops": 0.4, "vit": 0.2, "time": 0.2}  # of the budget; what a stage leaves, the next ones get
OP_TESTS = ("patch_embed", "layer_norm", "linear", "mlp", "attention")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=SHARES, default=os.environ.get("STAGE") or None, help="one stage only")
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default benchmarks/results/<gpu>)")
    parser.add_argument("--budget", type=float, default=float(os.environ.get("BUDGET", 450)), help="seconds in all")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, tiny, interpreted, into build/")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before torch or vit are imported
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing was run. `python -m benchmarks.gpu --rehearse` runs the script without one.")
        return 2
    gpu = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    args.out = args.out or ROOT / ("build/rehearsal" if args.rehearse else f"benchmarks/results/{_slug(gpu)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.in_process:
        return _run_in_process(args, gpu)

    deadline = time.monotonic() + args.budget
    stages = [args.stage] if args.stage else list(SHARES)
    failed = []
    for i, stage in enumerate(stages):
        share = SHARES[stage] / sum(SHARES[s] for s in stages[i:])
        limit = max(share * (deadline - time.monotonic()), 1.0)
        print(f"== {stage} (at most {limit:.0f} s)", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--in-process", "--stage", stage, "--out", str(args.out)]
        if args.rehearse:
            command.append("--rehearse")
        start = time.monotonic()
        # A session of its own, so that a stage that is stopped takes its test processes along, off the GPU.
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            ok = process.wait(timeout=limit) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ok = False
            print(f"{stage}: stopped after {limit:.0f} s; what it had found is in its file", flush=True)
        print(f"== {stage}: {'ok' if ok else 'FAILED'} in {time.monotonic() - start:.0f} s", flush=True)
        failed += [] if ok else [stage]
    print(f"{len(stages) - len(failed)} of {len(stages)} stages ok{': failed ' + ', '.join(failed) if failed else ''}")
    print(f"results in {args.out}")
    return 1 if failed else 0


def _run_in_process(args: argparse.Namespace, gpu: str) -> int:
    sys.path.insert(0, str(ROOT / "tests"))  # the strict interpreter, for a rehearsal
    if args.rehearse:
        import strict

        strict.install()
    log = Log(args.out / f"{args.stage}.json", gpu)
    try:
        {"smoke": smoke, "ops": ops, "vit": vit_parity, "time": timing}[args.stage](log, args.rehearse)
    except Exception:
        log.add(ok=False, error=traceback.format_exc(limit=8))
    return 0 if log.ok else 1


class Log:
    """Records of one stage; the file on disk is whole after every record."""

    def __init__(self, path: Path, gpu: str) -> None:
        import torch
        import triton

        self.path = path
        self.about = {
            "gpu": gpu,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
            "command": f"python -m benchmarks.gpu --stage {path.stem}",
            "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self.records: list[dict[str, Any]] = []
        self.write()

    @property
    def ok(self) -> bool:
        return bool(self.records) and all(r["ok"] for r in self.records)

    def add(self, *, ok: bool, **record: Any) -> None:
        self.records.append({"ok": ok, **record})
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items() if k != "tensors"}
        print(f"{'ok    ' if ok else 'FAILED'} {' '.join(f'{k}={v}' for k, v in shown.items())}", flush=True)
        self.write()

    def write(self) -> None:
        lines = ",\n".join(json.dumps(r) for r in self.records)
        self.path.write_text(f'{{"about": {json.dumps(self.about)},\n"records": [\n{lines}\n]}}\n')


# ---- the stages ------------------------------------------------------------------------------------------------------


def smoke(log: Log, rehearse: bool) -> None:
    """One launch of every kernel, forward and backward, head_dim 64 and 80."""
    import torch

    from vit import kernels
    from vit.kernels import reference

    device, dtype = _device(rehearse), torch.bfloat16
    batch, grid, patch = (1, 2, 16) if rehearse else (8, 14, 16)
    tokens = 1 + grid * grid
    for head_dim, heads in ((64, 1), (80, 1)) if rehearse else ((64, 12), (80, 16)):
        dim = head_dim * heads
        hidden = 2 * dim if rehearse else 4 * dim

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        x, square = rand(batch, tokens, dim), rand(dim, dim) * dim**-0.5
        wide, narrow = rand(hidden, dim) * dim**-0.5, rand(dim, hidden) * hidden**-0.5
        table, prefix = rand(1, tokens, dim), rand(1, 1, dim)
        image, filters = rand(batch, 3, grid * patch, grid * patch), rand(dim, 3, patch, patch) * 0.04
        qkv = rand(batch, tokens, 3, heads, head_dim)
        cases: dict[str, tuple[list[torch.Tensor | None], dict[str, Any]]] = {
            "patch_embed": ([image, filters, rand(dim), table, prefix], {}),
            "layer_norm": ([x, rand(dim), rand(dim)], {}),
            "residual_layer_norm": ([x, rand(batch, tokens, dim), rand(dim), rand(dim)], {"gamma": rand(dim)}),
            "linear": ([x, square, rand(dim)], {}),
            "mlp": ([x, wide, rand(hidden), narrow, rand(dim)], {}),
            "attention": ([qkv], {}),
            "attention_qkv": ([t.contiguous() for t in qkv.unbind(2)], {}),
        }
        for op, (tensors, options) in cases.items():
            start = time.perf_counter()
            try:
                ours = _outputs_and_grads(getattr(kernels, op), tensors, options | {"impl": "triton"})
                _synchronize(device)
                seconds = time.perf_counter() - start
                eager = _outputs_and_grads(getattr(reference, op), tensors, options)
                errors = [_relative_error(a, b) for a, b in zip(ours, eager, strict=True)]
                log.add(ok=max(errors) < 0.03, op=op, head_dim=head_dim, error_rms=max(errors), first_call_s=seconds)
            except Exception as error:
                log.add(ok=False, op=op, head_dim=head_dim, error=f"{type(error).__name__}: {error}"[:2000])


def ops(log: Log, rehearse: bool) -> None:
    """The kernel tests, one file after another; several processes, because most of the time is compilation."""
    workers = ["-n", str(min(os.cpu_count() or 1, 8))] if importlib.util.find_spec("xdist") else []
    for op in OP_TESTS:
        command = [sys.executable, "-m", "pytest", f"tests/test_{op}.py", "-q", "--tb=short", *workers]
        command.append("--basetemp=.pytest-tmp-ops")  # not that of a test run which this is a part of
        if rehearse:
            command += ["-k", "bad_", "-n", "0"] if workers else ["-k", "bad_"]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        summary = next((line for line in reversed(done.stdout.splitlines()) if " in " in line), done.stderr[-300:])
        failures = [line[:400] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
        log.add(
            ok=done.returncode == 0, op=op, summary=summary.strip("= "), seconds=time.perf_counter() - start,
            failures=failures[:60],
        )  # fmt: skip


def vit_parity(log: Log, rehearse: bool) -> None:
    """Logits and every gradient of ViT-B/16, each tensor judged by the policy for whole models."""
    import torch

    from vit.testing import measure

    device = _device(rehearse)
    name = _model(rehearse)
    for dtype in (torch.bfloat16,) if rehearse else (torch.bfloat16, torch.float16, torch.float32):
        ours, eager = _pair(name, device, dtype, rehearse)
        _, exact = _pair(name, device, torch.float64, rehearse)
        exact.load_state_dict(eager.state_dict())
        image = torch.randn(2, 3, *ours.config.img_size, device=device, dtype=dtype)
        cotangent = torch.randn(2, ours.config.num_classes, device=device, dtype=dtype)

        a, b, c = (_model_gradients(m, image, cotangent) for m in (ours, eager, exact))
        reports = [measure(a[k], b[k], c[k], scope="model", name=k) for k in c]
        worst = max(reports, key=lambda r: r.rms / max(r.rms_limit, 1e-30))
        log.add(
            ok=all(r.ok for r in reports), shape=name, dtype=_name(dtype), tensors=[str(r) for r in reports],
            count=len(reports), failed=[r.name for r in reports if not r.ok][:40], worst=str(worst),
        )  # fmt: skip
        del ours, eager, exact, a, b, c


def timing(log: Log, rehearse: bool) -> None:
    """ViT-B/16 in bf16, ours and eager in turn, after a check of the logits; the card's ceilings first."""
    import torch

    device, batch = _device(rehearse), 2 if rehearse else 256
    name = _model(rehearse)
    size = 256 if rehearse else 8192
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    ms = _median(functools.partial(torch.mm, x, x), device)[1]
    ceiling = 2 * size**3 / ms / 1e9
    log.add(ok=True, bench="ceiling", op="matmul", shape=f"{size}^3", dtype="bfloat16", ms_p50=ms, tflops=ceiling)
    source = torch.empty(2**20 if rehearse else 2**30, device=device, dtype=torch.int32).random_()
    target = torch.empty_like(source)
    ms = _median(functools.partial(target.copy_, source), device)[1]
    log.add(ok=True, bench="ceiling", op="copy", ms_p50=ms, gbps=2 * source.numel() * 4 / ms / 1e6)
    del x, source, target

    ours, eager = _pair(name, device, torch.bfloat16, rehearse)
    image = torch.randn(batch, 3, *ours.config.img_size, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        error = _relative_error(ours(image[:2]), eager(image[:2]))
    if not error < 0.03:
        log.add(ok=False, bench="vit", shape=name, error_rms=error, error="logits differ from eager: not timed")
        return
    for mode in ("fwd", "full"):
        for provider, model in [("ours", ours), ("reference", eager)] * (1 if rehearse else 2):

            def step(model: torch.nn.Module = model, mode: str = mode) -> None:
                if mode == "fwd":
                    with torch.no_grad():
                        model(image)
                else:
                    model.zero_grad()
                    model(image).float().square().mean().backward()

            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            p20, p50, p80 = _median(step, device)
            flops = _forward_flops(ours.config) * batch * (1 if mode == "fwd" else 3)
            log.add(
                ok=True, bench="vit", op="vit", shape=f"{name}/b{batch}", dtype="bfloat16", mode=mode,
                provider=provider, ms_p20=p20, ms_p50=p50, ms_p80=p80, img_s=1e3 * batch / p50,
                tflops=flops / p50 / 1e9, sol_fraction=flops / p50 / 1e9 / ceiling, error_rms=error,
                peak_mem_mb=torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None,
            )  # fmt: skip


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _model(rehearse: bool) -> str:
    return "vit_tiny_patch16_224" if rehearse else "vit_base_patch16_224"


def _pair(name: str, device: Any, dtype: Any, rehearse: bool) -> tuple[Any, Any]:
    """Our model and the eager reference with the same weights."""
    import vit

    small = {"img_size": 32, "depth": 1, "num_classes": 10, "impl": "triton"} if rehearse else {}
    ours = vit.create_model(name, seed=0, **small).to(device, dtype)
    eager = vit.reference.VisionTransformer(ours.config).to(device, dtype)
    eager.load_state_dict(ours.state_dict())
    return ours, eager


def _forward_flops(config: Any) -> float:
    """2 per multiply-add: per block 24·N·D² (at mlp_ratio 4) + 4·N²·D, patches and head."""
    n, d, hidden = config.num_tokens, config.embed_dim, config.mlp_hidden_dim
    patch = config.in_chans * config.patch_size[0] * config.patch_size[1]
    block = 2 * n * (4 * d * d + 2 * d * hidden) + 4 * n * n * d
    return config.depth * block + 2 * config.num_patches * patch * d + 2 * d * config.num_classes


def _outputs_and_grads(fn: Callable[..., Any], tensors: list[Any], options: dict[str, Any]) -> list[Any]:
    import torch

    leaves = [t.detach().requires_grad_() for t in tensors]
    out = fn(*leaves, **options)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if o.dtype == leaves[0].dtype]  # without the lse
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, cotangents)]


def _model_gradients(model: Any, image: Any, cotangent: Any) -> dict[str, Any]:
    import torch

    params = dict(model.named_parameters())
    image = image.to(next(model.parameters()).dtype).requires_grad_()
    out = model(image)
    grads = torch.autograd.grad(out, [image, *params.values()], cotangent.to(out.dtype))
    return {"logits": out.detach(), "image": grads[0]} | dict(zip(params, grads[1:], strict=True))


def _relative_error(a: Any, b: Any) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _median(fn: Callable[[], Any], device: Any) -> tuple[float, float, float]:
    """Milliseconds at the 20th, 50th and 80th percentile."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return tuple(do_bench(fn, warmup=200, rep=1000, quantiles=[0.2, 0.5, 0.8]))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        fn()
        times.append(1e3 * (time.perf_counter() - start))
    cuts = quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def _device(rehearse: bool) -> Any:
    import torch

    return torch.device("cpu" if rehearse else "cuda")


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _slug(gpu: str) -> str:
    return "-".join(gpu.lower().split())


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except OSError:
        return None


if __name__ == "__main__":
    sys.exit(main())
