"""The training loop, with exact resume.

    result = Trainer(Options(epochs=3), open_data("fashion-mnist")).fit()

A batch, mixup and masks depend on (seed, epoch, place). Dropout draws from PyTorch's generator, whose state is in
last.pt with all else that a step changes. So a run that was killed and continued has the bits of one that was not,
on the same machine with the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vit.kernels import runtime
from vit.training import optim, run
from vit.training.augment import Augment
from vit.training.data import Data, Split, split_validation, subset
from vit.training.errors import TrainingError
from vit.training.loader import Batches
from vit.training.objective import Labels, Masked, Scores, evaluate
from vit.training.options import Options
from vit.training.ranks import Ranks
from vit.training.report import Progress, card, row_line, summary
from vit.training.start import start
from vit.training.stop import Interrupted, Signals

_CHECK_EVERY = 50  # steps between two looks at a GPU's losses; each waits for the GPU


@dataclasses.dataclass
class Result:
    """What `Trainer.fit` returns.

    Attributes:
        test: scores of the selected weights on the test images; None without test images.
        rows: the rows of summary.csv.
        best: the row that selected the weights.
        steps: number of optimizer steps.
        digest: SHA-256 of all tensors after the last step.
        weights_digest: SHA-256 of the selected weights.
    """

    test: Scores | None
    rows: list[dict[str, float]]
    best: dict[str, float]
    steps: int
    digest: str
    weights_digest: str


class Trainer:
    """A training run.

    It seeds PyTorch's global generators. ``model`` has the weights of the last step, and after `fit` the selected ones:
    those with the best accuracy on the validation images, or the last ones without these images.

    Args:
        options: the options.
        data: the data.
        output: folder of the run; None writes nothing.
        resume: continue the run in ``output``, or begin it if there is none.
        model: the model to train, on the CPU, in place of the one that the options name. It returns logits [B, K].
        command: what args.json and the card name as the command.
        say: prints a line.

    Raises:
        TrainingError: the options do not fit the data, or the folder holds another run; the message says what to do.
    """

    def __init__(
        self,
        options: Options,
        data: Data,
        *,
        output: str | os.PathLike[str] | None = None,
        resume: bool = False,
        model: nn.Module | None = None,
        command: str = "",
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.options, self.data = options, data
        self.ranks = ranks = Ranks(options.device)
        self.say = say if ranks.first else lambda line: None
        self.run = None if output is None else run.Run(Path(output))
        self.record = run.record(options, data, ranks.world, command)
        old = None if self.run is None else ranks.on_first(lambda: self.run.check(self.record, resume))

        torch.manual_seed(options.seed + ranks.rank)
        self._make_model(model, old)
        self._make_batches()
        self.schedule = optim.Schedule(options, self.per_epoch)
        self.writer = self._tensorboard() if options.tensorboard else None

        self.step = self.epoch = self.batch = 0  # steps; epochs; batches of this epoch that are done
        self.elapsed = 0.0  # seconds
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)  # loss, right and count since a row
        self.bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)  # the first step that is not finite
        self._last: tuple[Tensor, Tensor] | None = None  # the last batch
        self.saved_step: int | None = None
        self.signals = Signals()
        self._kept: dict[str, Tensor] = {}  # the best weights of a run without a folder
        if old is not None:
            self.record = old
            self._restore(self.run.state())
        elif self.run is not None:
            ranks.on_first(lambda: self.run.begin(self.record))

    def _make_model(self, model: nn.Module | None, old: dict[str, Any] | None) -> None:
        """The model with its optimizer, and how its images are normalised."""
        o, data, device = self.options, self.data, self.ranks.device
        self.model = (model or start(o, data, old and old["config"])).to(device)
        self.vit = getattr(self.model, "encoder", self.model)  # without the head for masked patches
        config, cfg = getattr(self.vit, "config", None), old or getattr(self.vit, "_source", {})
        told = old or (o.weights and len(cfg.get("mean", ())) == data.channels)
        self.mean, self.std = (tuple(cfg["mean"]), tuple(cfg["std"])) if told else (data.mean, data.std)
        self.img_size = config.img_size if config else o.img_size or data.image_size or (224, 224)
        self.record |= {"config": dataclasses.asdict(config) if config else None, "mean": self.mean, "std": self.std}
        try:
            runtime.use_triton("--impl", getattr(config, "impl", "auto"), [torch.zeros(1, device=device)])
        except RuntimeError as error:
            raise TrainingError(str(error)) from error
        masked = o.objective == "masked"
        self.objective = Labels(len(data.classes), o)
        if masked:
            self.objective = Masked(self.mean, self.std, config.patch_size, self.ranks.rank, self.ranks.world)
        if o.grad_checkpointing:
            self.vit.set_grad_checkpointing()

        self.optimizer = optim.optimizer(self.model, o)
        self.ema = optim.running_average(self.model, o.model_ema_decay) if o.model_ema_decay else None
        self.amp_dtype = getattr(torch, o.amp_dtype) if o.amp_dtype else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=o.amp_dtype == "float16")
        self.net = torch.compile(self.model) if o.compile else self.model
        if self.ranks.world > 1:
            self.net = DistributedDataParallel(self.net)

    def _make_batches(self) -> None:
        """The batches of training, and of validation if there is any."""
        o, data, ranks = self.options, self.data, self.ranks
        train, val = split_validation(data.train, o.val_split, o.seed)
        if o.max_train_samples is not None:
            train = subset(train, data.train.labels, o.max_train_samples, o.seed)
        self.counts = len(train), len(val)
        augment = None if o.augment == "none" else Augment(o.augment)
        self.batches = Batches(
            data.train, train, augment=augment, shuffle=True, drop_last=True, rank=ranks.rank, world=ranks.world,
            **self._how,
        )  # fmt: skip
        self.val = self._in_order(data.train, val) if len(val) else None
        self.selects = self.val is not None and o.objective == "labels"
        self.per_epoch = self.batches.steps // o.grad_accum_steps  # steps
        if not self.per_epoch:
            what = f"--grad-accum-steps {o.grad_accum_steps} is more than the {self.batches.steps} batches of an epoch"
            raise TrainingError(f"{what}; lower it or the batch size")

    def _in_order(self, split: Split, indices: np.ndarray) -> Batches:
        """Batches for evaluation, of the first process alone."""
        return Batches(split, indices, augment=None, shuffle=False, drop_last=False, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        o = self.options
        size = {"batch_size": o.batch_size, "img_size": self.img_size, "mean": self.mean, "std": self.std}
        return size | {"seed": o.seed, "workers": o.workers, "device": self.ranks.device}

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError("--tensorboard needs tensorboard; pip install tensorboard, or leave it out") from error
        if self.run is None or not self.ranks.first:
            return None
        return SummaryWriter(self.run.folder / "tensorboard", purge_step=0)

    def fit(self) -> Result:
        """Trains, then reads the test images once.

        Raises:
            TrainingError: the loss is not finite, an image cannot be read, or a file cannot be written.
            Interrupted: SIGINT or SIGTERM came, and the state is saved. A second one acts at once.
        """
        self._since = time.perf_counter() - self.elapsed
        with self.signals:
            while self.batch or not self._done():  # a state can be that of an epoch whose row is still to come
                self._train_epoch()
                self._end_epoch()
        return self._finish()

    def _done(self) -> bool:
        return self.schedule.progress(self.step, self.elapsed) >= 1.0

    def _train_epoch(self) -> None:
        """Trains to the end of the epoch or of the run."""
        self.model.train()
        progress = Progress(self)
        with contextlib.closing(self.batches.epoch(self.epoch, self.batch)) as batches:
            while self.batch < self.per_epoch * self.options.grad_accum_steps and not self._done():
                self._train_step(batches)
                self.elapsed, stop = self.ranks.largest(time.perf_counter() - self._since, self.signals.number)
                if self.ranks.device.type == "cpu" or self.step % _CHECK_EVERY == 0:
                    self._check_losses()
                if stop:
                    self._stop(int(stop))
                if self.options.checkpoint_every and self.step % self.options.checkpoint_every == 0:
                    self._save()
                progress.tell()

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimizer. Returns the mean loss of this process's images."""
        o, losses = self.options, []
        optim.set_rate(self.optimizer, self.schedule.rate(self.step, self.elapsed))
        for index in range(o.grad_accum_steps):
            images, labels = next(batches)
            key = (o.seed, self.epoch, self.batch)
            waits = self.ranks.world > 1 and index < o.grad_accum_steps - 1  # the processes add gradients once
            with self.net.no_sync() if waits else contextlib.nullcontext():
                with self._autocast():
                    loss, right, count = self.objective(self.net, images, labels, key)
                self.scaler.scale(loss / o.grad_accum_steps).backward()
            losses.append(loss.detach())
            self.sums += torch.stack([loss.detach().double() * count, right.double(), right.new_tensor(count).double()])
            self.batch += 1
        self._last = images, labels
        loss = torch.stack(losses).mean()
        self.scaler.unscale_(self.optimizer)
        grads = [param.grad for param in self.model.parameters() if param.grad is not None]
        norm = nn.utils.get_total_norm(grads)
        if o.clip_grad:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), o.clip_grad, norm)
        self.step += 1
        # The scaler skips steps whose gradients are not finite.
        finite = torch.isfinite(loss) & (torch.isfinite(norm) | self.scaler.is_enabled())
        self.bad = torch.where((self.bad < 0) & ~finite, self.step, self.bad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return loss

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def _check_losses(self) -> None:
        """Raises TrainingError if a loss or a gradient was not finite."""
        bad = int(self.ranks.largest(self.bad.item())[0])
        if bad >= 0:
            rate = f"lower --lr {self.options.lr:g}" + (" or use --clip-grad 1" if not self.options.clip_grad else "")
            kept = "nothing was saved yet" if self.saved_step is None else f"last.pt keeps step {self.saved_step}"
            raise TrainingError(f"the loss or its gradient is not finite at step {bad}; {rate}; {kept}")

    def _check_weights(self) -> None:
        """The same for the loss after the step: bad weights are never saved."""
        if self._last is not None:
            with torch.no_grad(), self._autocast():
                sums, _right = self.objective.score(self.model.eval(), *self._last, (0, 0, 0))
            self.model.train()
            self.bad = torch.where((self.bad < 0) & ~torch.isfinite(sums[0]), self.step, self.bad)
        self._check_losses()

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate: the running average of the weights, if there is one."""
        return self.model if self.ema is None else self.ema.module

    def _end_epoch(self) -> None:
        """Evaluates if it is time to, and saves."""
        o, self.epoch, self.batch = self.options, self.epoch + 1, 0
        if self.epoch % o.val_interval and not self._done():
            return
        self._check_weights()
        sums = sum(self.ranks.gather(self.sums.cpu()))
        row = {"epoch": self.epoch - 1, "train_loss": (sums[0] / sums[2]).item()}
        if self.val is not None:
            scores = self.ranks.on_first(lambda: self._evaluate(self.averaged, self.val))
            row |= {"eval_loss": scores.loss, "eval_top1": scores.top1}
            row |= {"eval_top5": scores.top5} if self.selects and len(self.data.classes) > 5 else {}
        row["lr"] = max(group["lr"] / group["lr_scale"] for group in self.optimizer.param_groups)
        self.say(row_line(self, row))
        self.rows.append(row)
        self.sums.zero_()
        better = not self.selects or self.best is None or row["eval_top1"] > self.best["eval_top1"]
        self.best = row | {"step": self.step} if better else self.best
        # last.pt first: it has the weights to write best.safetensors again, if the process is killed between the two.
        self._save()
        if better:
            self._save_best()
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, value, self.step)
            self.writer.flush()
        if stop := self.ranks.largest(self.signals.number)[0]:
            self._stop(int(stop))

    def _evaluate(self, model: nn.Module, batches: Batches) -> Scores:
        with self._autocast():
            return evaluate(self.objective, model, batches, len(self.data.classes))

    def _state(self) -> dict[str, Any]:
        """All that the next steps depend on, as plain data. Every process must call it."""
        own = {"rng": torch.get_rng_state(), "sums": self.sums.cpu()}
        if self.ranks.device.type == "cuda":
            own["cuda_rng"] = torch.cuda.get_rng_state(self.ranks.device)
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ranks": self.ranks.gather(own),
            "rows": self.rows,
            **{name: getattr(self, name) for name in ("step", "epoch", "batch", "elapsed", "best")},
        }

    def _save(self) -> None:
        if self.run is None:
            return
        self._check_weights()
        state = self._state()

        def write() -> None:
            self.run.save(state)
            self.run.save_summary(self.rows)

        self.ranks.on_first(write)
        self.saved_step = self.step

    def _save_best(self) -> None:
        if self.run is None:
            self._kept = {name: tensor.detach().cpu().clone() for name, tensor in self.averaged.state_dict().items()}
        else:
            vit = getattr(self.averaged, "encoder", self.averaged)
            self.ranks.on_first(lambda: self.run.save_best(vit, self._cfg()))

    def _cfg(self, **more: Any) -> dict[str, Any]:
        """The note in the file of the weights."""
        record, data = self.record, self.data
        training = {"command": record["command"], "seed": self.options.seed, "data": data.name}
        training |= {"licence": data.licence, "commit": record["commit"], "step": self.best["step"]} | more
        cfg = {"mean": list(self.mean), "std": list(self.std), "training": training}
        return cfg | ({"label_names": list(data.classes)} if self.options.objective == "labels" else {})

    def _restore(self, state: dict[str, Any] | None) -> None:
        """Continues from a state; None starts from the beginning."""
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        own = state["ranks"][self.ranks.rank]
        torch.set_rng_state(own["rng"])
        if "cuda_rng" in own and self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.ranks.device)
        self.sums.copy_(own["sums"])
        self.rows = state["rows"]
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.elapsed, self.best, self.saved_step = state["elapsed"], state["best"], state["step"]
        if self.best is not None and self.best["step"] == self.step:
            self._save_best()

    def _finish(self) -> Result:
        """Reads the test images and writes what describes the result."""
        digest = run.digest({name: value for name, value in self._state().items() if name != "elapsed"})
        return self.ranks.on_first(lambda: self._conclude(digest))

    def _conclude(self, digest: str) -> Result:
        data, test, best = self.data, None, self.averaged.state_dict()
        if self.selects:
            best = self._kept if self.run is None else self.run.best_weights()
        self.model.load_state_dict(best)
        if data.test is not None:
            test = self._evaluate(self.model, self._in_order(data.test, np.arange(len(data.test))))
        weights = run.digest(self.vit.state_dict())
        result = Result(test, self.rows, self.best, self.step, digest, weights)
        if self.run is not None:
            scores = {} if test is None else {"test_top1": test.top1, "test_images": test.count}
            self.run.save_best(self.vit, self._cfg(sha256=weights, **scores))
            self.run.save_summary(self.rows)  # again, if the process was killed before it
            self.run.save_card(card(self, result))
            if not self.run.save_curves(self.rows):
                self.say("curves.png needs matplotlib and was left out; pip install matplotlib")
        summary(self, result)
        return result

    def _stop(self, number: int) -> None:
        """Saves, unless this step is saved, and raises Interrupted."""
        if self.saved_step != self.step:
            self._save()
        name = signal.Signals(number).name
        where = f"; {self.run.last} is saved, --resume continues" if self.run else ""
        self.say(f"{name}: stopped after step {self.step}{where}")
        raise Interrupted(number)
