"""Does the runs of an experiment, several at a time, and keeps each finished one in a file.

DIR/runs/NAME.json describes a finished run; a run whose file is there is not done again. The pre-training of transfer
has a folder too, which `vit finetune` reads.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from vit.experiments import tables
from vit.experiments.models import build, training_flops
from vit.experiments.sources import sources
from vit.experiments.tables import VAL_SPLIT, Run, Settings
from vit.model import VisionTransformer
from vit.training import run as folders
from vit.training.data import Data, split_validation, subset
from vit.training.errors import TrainingError
from vit.training.loop import Interrupted, Trainer
from vit.training.options import Options
from vit.training.probe import features_of, probe, raw_pixels
from vit.training.ranks import Ranks
from vit.training.start import explained, load
from vit.weights import files

Say = Callable[[str], None]


class Runs:
    """The runs of an experiment.

    Args:
        settings: settled, see `tables.settle`.
        folder: DIR.

    Raises:
        TrainingError: the data cannot be read or do not fit.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.commit = settings, folder, folders.commit()
        how = {"transfer": settings.name == "transfer", "pretrain": settings.pretrain, "quick": settings.quick}
        self.data, self.pretrain = sources(settings.data, **how)
        with explained():
            self.table = tables.table(settings, self.data, self.pretrain)

    def told(self, run: Run) -> dict[str, Any]:
        """What determines a run. It is kept with the result."""
        s, data = self.settings, [d.digest for d in (self.data, self.pretrain) if d is not None]
        how = {"impl": s.impl, "amp_dtype": s.amp_dtype, "quick": s.quick}
        fields = dataclasses.asdict(run)
        fields |= fields.pop("model")
        return json.loads(json.dumps(fields | how | {"data": data}))

    def result(self, run: Run) -> dict[str, Any] | None:
        """What the file of a run holds; None if the run is not done.

        Raises:
            TrainingError: the file is of a run that differs, or cannot be read.
        """
        path = self.folder / "runs" / f"{run.name}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            old, new = found["run"], self.told(run)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{path} cannot be read; remove it, and the run is done again") from error
        for name, value in new.items():
            if old.get(name) != value:
                raise TrainingError(f"{path} was made with {name} {old.get(name)}, not {value}; choose another -o")
        return found

    def results(self) -> list[dict[str, Any]]:
        """The results in the order of the table.

        Raises:
            TrainingError: runs are missing.
        """
        found = [self.result(run) for run in self.table]
        if missing := found.count(None):
            raise TrainingError(
                f"{missing} of {len(found)} runs in {self.folder} are not done; run it without --plot-only"
            )
        return found

    def do(self, jobs: int, say: Say) -> None:
        """Does what is missing, ``jobs`` runs at a time. One job is this process; more are processes of one thread.

        Raises:
            TrainingError: a run failed.
            Interrupted: a signal came. What is finished is kept.
        """
        todo, place = [run for run in self.table if self.result(run) is None], self.folder / "runs"
        with folders.writing(place, "choose another -o"):
            place.mkdir(parents=True, exist_ok=True)
        if kept := len(self.table) - len(todo):
            say(f"{kept} of {len(self.table)} runs are done")
        for stage in ([run for run in todo if not run.needs], [run for run in todo if run.needs]):
            if jobs == 1 or len(stage) <= 1:
                for run in stage:
                    say(self.perform(run))
            else:
                self._in_processes(stage, min(jobs, len(stage)), say)

    def _in_processes(self, stage: Sequence[Run], jobs: int, say: Say) -> None:
        context = multiprocessing.get_context("spawn")
        box, taken = context.Queue(), context.Value("q", 0)
        args = self.settings, self.folder, stage, taken, box
        workers = [context.Process(target=_work, args=args, daemon=True) for _ in range(jobs)]
        try:
            for worker in workers:
                worker.start()
            while jobs:
                try:
                    line = box.get(timeout=1)
                except queue.Empty:
                    if any(worker.exitcode for worker in workers):
                        reason = "a process died, perhaps memory is short"
                        raise TrainingError(f"{reason}; lower -j, and the same command continues") from None
                    continue
                if isinstance(line, TrainingError):
                    raise line
                if line is None:
                    jobs -= 1
                else:
                    say(line)
        finally:
            for worker in workers:
                if worker.pid:
                    worker.join(2)  # Ctrl-C stops it too
                    worker.terminate()
                    worker.join()

    def perform(self, run: Run) -> str:
        """Does a run and writes its file. Returns a line about it."""
        since, data = time.perf_counter(), self.pretrain if run.task == "pretrain" else self.data
        if run.task in ("train", "pretrain", "finetune"):
            found = self._train(run, data)
        else:
            found = {"test": 100 * self._probe(run, data), "validation": None}
        found |= {"test_images": len(data.test or ()), "torch": torch.__version__, "commit": self.commit}
        path = self.folder / "runs" / f"{run.name}.json"
        text = json.dumps({"run": self.told(run)} | found, indent=1) + "\n"
        with folders.writing(path, "free some space, and the same command continues"), files.replacing(path) as file:
            file.write_text(text, encoding="utf-8")
        seconds = time.perf_counter() - since
        validation = "" if found["validation"] is None else f", validation {found['validation']:.2f} %"
        return f"{run.name}: test {found['test']:.2f} %{validation} ({seconds:.0f} s)"

    def _train(self, run: Run, data: Data) -> dict[str, Any]:
        """The weights are those of the last step, so that nothing but the learning rate is chosen."""
        s, model, output = self.settings, None, None
        options = Options(
            steps=run.steps, batch_size=run.batch_size, lr=run.lr, max_train_samples=run.size, seed=run.seed,
            val_split=VAL_SPLIT, val_interval=10**9, img_size=run.model.img_size, impl=s.impl, amp_dtype=s.amp_dtype,
            device=s.device, weights=str(self._weights(run.needs)) if run.task == "finetune" else "",
        )  # fmt: skip
        if run.task == "pretrain":
            output = self._weights(run.name).parent
        if run.task != "finetune":
            model = build(run.model, data.channels, len(data.classes), run.seed, s.impl)
        cost = training_flops(run.model, data.channels, len(data.classes))
        trainer = Trainer(options, data, model=model, output=output, resume=True)
        result = trainer.fit()
        return {
            "test": result.test.top1,
            "validation": result.best["eval_top1"],
            "train_loss": result.best["train_loss"],
            "parameters": sum(param.numel() for param in trainer.model.parameters() if param.requires_grad),
            "training_gflops": cost * run.steps * run.batch_size / 1e9,
        }

    def _probe(self, run: Run, data: Data) -> float:
        train, _ = split_validation(data.train, VAL_SPLIT, run.seed)
        chosen = subset(train, data.train.labels, run.size, run.seed)  # those of fine-tuning
        how = {"img_size": run.model.img_size, "mean": data.mean, "std": data.std}
        device, encode = Ranks(self.settings.device).device, raw_pixels
        if run.task != "raw pixels":
            model = load(self._weights(run.needs), impl=self.settings.impl)
            how |= {name: tuple(model.pretrained_cfg[name]) for name in ("mean", "std")}
            if run.task == "random features":
                model = VisionTransformer(model.config, run.seed + 1_000_000)  # not those that were trained
            encode = features_of(model.eval().to(device))
        return probe(encode, data, [chosen], device=device, **how)[0].accuracy

    def _weights(self, name: str) -> Path:
        return folders.Run(self.folder / "runs" / name).best


def _work(settings: Settings, folder: Path, stage: Sequence[Run], taken: Any, box: Any) -> None:
    """A process: takes the next run until none is left or its parent is gone."""
    torch.set_num_threads(1)
    try:
        runs = Runs(settings, folder)
        while multiprocessing.parent_process().is_alive():
            with taken.get_lock():
                index, taken.value = taken.value, taken.value + 1
            if index >= len(stage):
                break
            box.put(runs.perform(stage[index]))
    except (Interrupted, KeyboardInterrupt):
        pass
    except (TrainingError, OSError, RuntimeError) as error:
        box.put(TrainingError(str(error)))
    box.put(None)
