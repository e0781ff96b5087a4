"""What a run prints, and its model card."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vit.training.options import PAPER

if TYPE_CHECKING:
    from vit.training.loop import Result, Trainer

_EVERY = 10.0  # seconds between two lines


class Progress:
    """The lines during an epoch: loss and accuracy of this process's images since the last line."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._note()

    def _note(self) -> None:
        self.clock, self.step, self.sums = time.perf_counter(), self.trainer.step, self.trainer.sums.clone()

    def tell(self) -> None:
        """Prints a line if it is time to."""
        seconds, t, o = time.perf_counter() - self.clock, self.trainer, self.trainer.options
        if seconds < _EVERY:
            return
        loss, right, count = (t.sums - self.sums).tolist()
        steps = t.step - self.step
        left = 60 * o.max_minutes - t.elapsed if o.max_minutes else (t.schedule.total - t.step) * seconds / steps
        speed = steps * o.grad_accum_steps * o.batch_size / seconds
        t.say(
            f"{_place(t, t.epoch + 1)}  loss {loss / count:.4f}  accuracy {100 * right / count:.1f} %  "
            f"{speed:.0f} images/s  ETA {int(left) // 60}:{int(left) % 60:02d}"
        )
        self._note()


def _place(t: Trainer, epoch: int) -> str:
    epochs, steps = (
        f"/{t.options.epochs}" if t.options.epochs else "",
        f"/{t.schedule.total}" if t.schedule.total else "",
    )
    return f"epoch {epoch}{epochs}  step {t.step}{steps}"


def row_line(t: Trainer, row: dict[str, float]) -> str:
    """A row of summary.csv as a line."""
    words = f"{_place(t, row['epoch'] + 1)}  train loss {row['train_loss']:.4f}"
    if "eval_loss" in row:
        words += f"  validation loss {row['eval_loss']:.4f}  accuracy {row['eval_top1']:.2f} %"
    return f"{words}  lr {row['lr']:.2e}"


def introduce(t: Trainer) -> None:
    """Prints the recipe, the data and the model."""
    o, data = t.options, t.data
    if o.recipe in PAPER:
        t.say(PAPER[o.recipe])
    train, val = t.counts
    tests = f"{len(data.test):,} test images, read once at the end" if data.test is not None else "no test images"
    t.say(f"{data.name}: {len(data.classes)} classes, {train:,} training and {val:,} validation images, {tests}")
    config, sizes = getattr(t.vit, "config", None), sum(param.numel() for param in t.model.parameters())
    shape = f", patch {config.patch_size[0]}, dim {config.embed_dim}, depth {config.depth}, {config.num_heads} heads"
    pixels = f"{t.img_size[0]} x {t.img_size[1]} x {data.channels}"
    t.say(f"model: {sizes:,} parameters{shape if config else ''}, images of {pixels}, {t.ranks.device}")
    length = f"{t.schedule.total:,} steps" if t.schedule.total else f"{o.max_minutes:g} minutes"
    words = f"batch {o.batch_size * o.grad_accum_steps}, {length}, {t.per_epoch:,} steps an epoch"
    t.say(f"recipe {o.recipe}: {o.opt}, learning rate {o.lr:g} ({o.sched}), weight decay {o.weight_decay:g}, {words}")
    if t.run is not None and t.run.best.suffix == ".npz":
        t.say("best.npz is written, because safetensors is missing; pip install safetensors for best.safetensors")
    if t.step:
        t.say(f"continues after step {t.step}")


def summary(t: Trainer, result: Result) -> None:
    """Prints the result."""
    what = "best accuracy on the validation images" if t.selects else "last step"
    t.say(f"selected: {what}, epoch {int(result.best['epoch']) + 1}, step {result.best['step']}")
    if result.test is not None:
        t.say(f"test: {_scores(t, result)}")
    if t.run is not None:
        t.say(f"{t.run.best}: {t.run.best.stat().st_size / 1e6:.2f} MB, SHA-256 of the tensors {result.weights_digest}")
    t.say(f"SHA-256 of all tensors after step {result.steps}: {result.digest}")


def _scores(t: Trainer, result: Result) -> str:
    test = result.test
    top5 = f", top-5 {test.top5:.2f} %" if t.selects and len(t.data.classes) > 5 else ""
    what, of = ("accuracy of the colours", "patches") if t.options.objective == "masked" else ("accuracy", "images")
    return f"{what} {test.top1:.2f} %{top5}, loss {test.loss:.4f}, {test.count:,} {of}"


def card(t: Trainer, result: Result) -> str:
    """The model card."""
    record, data, config = t.record, t.data, getattr(t.vit, "config", None)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    shape = "" if config is None else (
        f"A Vision Transformer: patch {config.patch_size[0]}, width {config.embed_dim}, {config.depth} blocks, "
        f"{config.num_heads} heads, images of {t.img_size[0]} x {t.img_size[1]} x {data.channels}.\n"
    )  # fmt: skip
    rows = {
        "command": f"`{record['command']}`" if record["command"] else "none, made from Python",
        "data": f"{data.name}, {t.counts[0]:,} training and {t.counts[1]:,} validation images, SHA-256 {data.digest}",
        "licence of the data": data.licence or "unknown",
        "seed": t.options.seed,
        "selected": f"step {result.best['step']} of {result.steps}",
        "test": "no test images" if result.test is None else _scores(t, result),
        "commit": record["commit"] or "unknown",
        "versions": versions,
        "normalisation": f"mean {_few(t.mean)}, std {_few(t.std)}, of pixels from 0 to 1",
        "SHA-256 of the weights": result.weights_digest,
        "SHA-256 of all tensors after the last step": result.digest,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    use = f'import vit\nmodel = vit.load_pretrained("{t.run.best.name}").eval()'
    return (
        f"# ViT trained on {data.name}\n\n{shape}\n| what | value |\n|---|---|\n{table}\n\n"
        f"The test images were read once, after the weights had been selected.\n\n```python\n{use}\n```\n"
    )


def _few(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4f}" for value in values)
