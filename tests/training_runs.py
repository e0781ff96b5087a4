"""Runs of `vit train` in forked processes, which are killed and continued. `test_resume.py` runs it.

    python tests/training_runs.py FOLDER

PyTorch is imported once, and the parent never computes a gradient, so it can fork. Prints one JSON line per case.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure  # noqa: F401 (before the forks)
import numpy as np
import torch

from vit.commands import cli
from vit.training.data import open_data
from vit.training.loop import Trainer
from vit.training.options import Options

SHAPE = ["--set", "embed_dim=32", "depth=2", "num_heads=2", "patch_size=4", "patch_drop_rate=0.25"]
#: Everything that draws random numbers or keeps a state.
ALL = [
    *SHAPE, "-b", "8", "--steps", "30", "--drop", ".1", "--drop-path", ".1", "--mixup", ".2", "--cutmix", ".5",
    "--model-ema-decay", ".9", "--grad-accum-steps", "2", "--val-split", ".2",
]  # fmt: skip
FORK = multiprocessing.get_context("fork")


def images(count: int, seed: int = 0, classes: int = 6) -> dict[str, np.ndarray]:
    """Noisy copies of one picture per class, 8 x 8 pixels, as arrays of an .npz file."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    pictures = np.random.default_rng(99).integers(0, 200, (classes, 8, 8, 1))
    pixels = (pictures[labels] + rng.integers(0, 55, (count, 8, 8, 1))).astype(np.uint8)
    cut = count * 4 // 5
    return {"x_train": pixels[:cut], "y_train": labels[:cut], "x_test": pixels[cut:], "y_test": labels[cut:]}


def start(work: Callable[[], int], output: Path, environment: dict[str, str]) -> multiprocessing.Process:
    """Runs ``work`` in a process, with its output in a file."""
    output.write_text("")

    def child() -> None:
        os.environ |= environment
        file = output.open("a", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        os._exit(work())

    process = FORK.Process(target=child)
    process.start()
    return process


def nothing() -> None:
    pass


def train(
    folder: Path, *args: str, before: Callable[[], None] = nothing, environment: dict[str, str] | None = None
) -> multiprocessing.Process:
    """Starts ``vit train``; its output is in FOLDER.log."""

    def work() -> int:
        before()
        return cli.main(["train", str(folder.parent / "data.npz"), "-o", str(folder), *args])

    return start(work, folder.with_suffix(".log"), environment or {})


def finished(folder: Path, *args: str, before: Callable[[], None] = nothing) -> tuple[str, str]:
    """Runs to the end. Returns the printed SHA-256 and summary.csv."""
    process = train(folder, *args, before=before)
    process.join()
    text = folder.with_suffix(".log").read_text()
    assert process.exitcode == 0, text
    return re.search(r"SHA-256 of all tensors after step \d+: (\w+)", text)[1], (folder / "summary.csv").read_text()


def kill_in_save(number: int) -> Callable[[], None]:
    """Makes save ``number`` of a process write half of its bytes, and then kill the process."""
    saves, save = [0], torch.save

    def half(state: object, file: io.BufferedWriter) -> None:
        saves[0] += 1
        if saves[0] < number:
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        torch.save = half

    return before


def killed(top: Path, workers: int) -> dict:
    """Kills in the middle of a save and at random moments, against a run that nothing stopped."""
    args = [*ALL, "-j", str(workers)]
    expected = finished(top / f"whole{workers}", *args)
    folder, steps, rng = top / f"killed{workers}", [], random.Random(workers)
    train(folder, *args, "--checkpoint-every", "4", before=kill_in_save(3)).join()
    half_written = len(list(folder.glob(".last.pt.*.tmp")))
    if not workers:
        shutil.copytree(folder, top / "forgetful")
    for attempt in range(2):
        process = train(folder, *args, "--resume", "--checkpoint-every", str(1 + attempt))
        steps.append(int(wait_for(process, folder, r"continues after step (\d+)")))
        time.sleep(rng.uniform(0.0, 0.5))
        process.kill()
        process.join()
    found = finished(folder, *args, "--resume")
    record = {
        "case": f"killed, -j {workers}", "same": found == expected, "steps": steps, "half_written": half_written,
        "left": [p.name for p in folder.glob(".*")],
    }  # fmt: skip
    if not workers:
        forgetful = finished(top / "forgetful", *args, "--resume", before=forget)
        record["same_without_generator"] = forgetful[0] == expected[0]
    return record


def forget() -> None:
    """The state of the generator is not restored."""
    torch.set_rng_state = lambda state: None


def wait_for(process: multiprocessing.Process, folder: Path, pattern: str) -> str:
    """Waits until the process has printed the pattern, and returns its group."""
    found = None
    while found is None:
        assert process.is_alive(), folder.with_suffix(".log").read_text()
        time.sleep(0.005)
        found = re.search(pattern, folder.with_suffix(".log").read_text())
    return found[1]


def last_save(folder: Path) -> int:
    """When last.pt was written; 0 if it was not."""
    return (folder / "last.pt").stat().st_mtime_ns if (folder / "last.pt").exists() else 0


def wait_for_save(process: multiprocessing.Process, folder: Path, before: int) -> None:
    """Waits until the process has saved after ``before``."""
    while last_save(folder) == before:
        assert process.is_alive(), folder.with_suffix(".log").read_text()
        time.sleep(0.002)


def stopped(top: Path) -> dict:
    """SIGTERM and Ctrl-C save the step at which they came."""
    args, codes = [*ALL, "--steps", "40", "--checkpoint-every", "5"], []
    expected = finished(top / "unstopped", *args)
    folder, said = top / "stopped", []
    for number in (signal.SIGTERM, signal.SIGINT):
        before = last_save(folder)
        process = train(folder, *args, "--resume")
        wait_for_save(process, folder, before)
        os.kill(process.pid, number)
        process.join()
        codes.append(process.exitcode)
        said.append(folder.with_suffix(".log").read_text().splitlines()[-1])
    return {"case": "stopped", "same": finished(folder, *args, "--resume") == expected, "codes": codes, "said": said}


def ranks(world: int) -> list[dict[str, str]]:
    """The variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def distributed_resume(top: Path) -> dict:
    """SIGTERM reaches one of two processes. Both stop after the same step, and together continue exactly."""
    found = {}
    for name, stop in (("pair", False), ("stopped_pair", True)):
        folder = top / name
        for attempt in range(1 + stop):
            pair = [train(folder, *ALL, "--resume", "--checkpoint-every", "5", environment=rank) for rank in ranks(2)]
            if stop and attempt == 0:
                wait_for_save(pair[0], folder, 0)
                os.kill(pair[1].pid, signal.SIGTERM)
            for process in pair:
                process.join()
            codes = [process.exitcode for process in pair]
            found[name, attempt] = codes, re.findall(r"after step .*", folder.with_suffix(".log").read_text())
    return {"case": "distributed, stopped", "runs": list(found.values())}


def distributed(top: Path, case: str, **how: object) -> dict:
    """Two processes against one, for 20 steps without dropout; the second process writes nothing."""
    options = Options(
        set=("embed_dim=32", "depth=2", "num_heads=2", "patch_size=4"), batch_size=8, steps=20, val_split=0.2,
        grad_accum_steps=2, **how,
    )  # fmt: skip
    data, top = open_data(str(top / "data.npz")), top / case
    top.mkdir()

    def work(rank: int, world: int) -> int:
        losses, own = [], Trainer._train_step

        def step(self: Trainer, batches: object) -> torch.Tensor:
            losses.append(own(self, batches))
            return losses[-1]

        Trainer._train_step = step
        trainer = Trainer(options, data, output=top / f"world{world}_rank{rank}")
        result = trainer.fit()
        values = torch.stack(losses)
        if world > 1:
            torch.distributed.all_reduce(values)
        if rank == 0:
            weights = {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}
            rows = [list(row.values()) for row in result.rows]
            (top / f"world{world}.json").write_text(json.dumps([(values / world).tolist(), rows, weights]))
        return 0

    for world in (1, 2):
        processes = []
        for rank, environment in enumerate(ranks(world)):
            log = top / f"world{world}_{rank}.log"
            processes.append(start(functools.partial(work, rank, world), log, environment))
        for process in processes:
            process.join()
            assert process.exitcode == 0, "".join(path.read_text() for path in top.glob(f"world{world}_*.log"))
    one, two = (json.loads((top / f"world{world}.json").read_text()) for world in (1, 2))
    errors = [max(abs(a - b) for a, b in zip(one[0], two[0], strict=True))]
    errors += [(torch.tensor(one[1]) - torch.tensor(two[1])).abs().max().item()]
    for weights in (one[2], two[2]):  # the exact gradient of a key's bias is 0, and Adam amplifies its rounding
        for name in (n for n in weights if n.endswith("qkv.bias")):
            del weights[name][32:64]
    errors += [max((torch.tensor(one[2][n]) - torch.tensor(two[2][n])).abs().max().item() for n in one[2])]
    return {
        "case": f"distributed, {case}", "steps": len(one[0]),
        "losses": errors[0], "rows": errors[1], "weights": errors[2],
        "learnt": one[0][0] - one[0][-1], "second_wrote": (top / "world2_rank1").exists(),
    }  # fmt: skip


def main() -> None:
    top = Path(sys.argv[1])
    np.savez(top / "data.npz", **images(150))
    cases = [lambda: killed(top, 0), lambda: killed(top, 2), lambda: stopped(top)]
    cases += [lambda: distributed(top, "labels", mixup=0.5, cutmix=0.5)]
    cases += [lambda: distributed(top, "masked", objective="masked"), lambda: distributed_resume(top)]
    for case in cases:
        begin = time.perf_counter()
        record = case()
        print(json.dumps(record | {"seconds": round(time.perf_counter() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main()
