"""The training loop against plain PyTorch, formulas and the paper's figures."""

import contextlib
import copy
import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from training_runs import images

import vit
from vit.training import optim
from vit.training.augment import mix
from vit.training.data import open_data
from vit.training.errors import TrainingError
from vit.training.loop import Trainer
from vit.training.objective import Labels
from vit.training.options import PAPER, Options, resolve
from vit.training.run import Run
from vit.training.start import small, start

SHAPE = ("embed_dim=32", "depth=1", "num_heads=2", "patch_size=4")
TINY = {"set": SHAPE, "batch_size": 16, "val_split": 0.2, "augment": "none"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **images(250))
    return open_data(str(path))


class Recorded(Trainer):
    """Keeps the loss and the weights of each step."""

    def _train_step(self, batches):
        loss = super()._train_step(batches)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        self.weights = [*getattr(self, "weights", []), weights(self.model)]
        return loss


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the steps -------------------------------------------------------------------------------------------------------


def test_steps_are_those_of_plain_pytorch(data):
    options = Options(**TINY, steps=12, lr=3e-3, weight_decay=0.5, warmup_steps=4, clip_grad=0.3, grad_accum_steps=2)
    trainer = Recorded(options, data)
    model = vit.reference.VisionTransformer(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    named = dict(model.named_parameters())
    free = [n for n, p in named.items() if p.ndim == 1 or n in ("cls_token", "pos_embed")]
    groups = [{"params": [p for n, p in named.items() if (n in free) == is_free], "weight_decay": decay}
              for is_free, decay in ((True, 0.0), (False, 0.5))]  # fmt: skip
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {n: decays[id(p)] for n, p in trainer.model.named_parameters()} == {n: 0.5 * (n not in free) for n in named}
    adamw, losses = torch.optim.AdamW(groups, betas=(0.9, 0.999)), []
    even = trainer.batches.steps // 2 * 2  # the odd batch of an epoch is dropped
    batches = [batch for epoch in range(6) for batch in list(trainer.batches.epoch(epoch))[:even]]
    for step in range(12):
        x, y = (torch.cat(parts) for parts in zip(*batches[2 * step : 2 * step + 2], strict=True))
        loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for group in adamw.param_groups:
            group["lr"] = 3e-3 * min((step + 1) / 4, 1) * (1 + math.cos(math.pi * step / 12)) / 2
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    result = trainer.fit()
    assert trainer.losses == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.05
    assert result.rows[0]["train_loss"] == pytest.approx(np.mean(losses[: even // 2]), abs=1e-5)


@pytest.mark.interpreted
def test_interpreted_kernels_have_the_losses_of_the_cpu_path(data):
    options = {"set": SHAPE, "batch_size": 4, "steps": 3, "val_split": 0.0, "drop": 0.1, "drop_path": 0.1}
    found = []
    for impl in ("triton", "auto"):
        trainer = Recorded(Options(**options, impl=impl), dataclasses.replace(data, test=None))
        trainer.fit()
        found.append(trainer.losses)
    assert len(found[0]) == 3 and len(set(found[1])) == 3
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_rates():
    def rates(*places, **options):
        schedule = optim.Schedule(Options(lr=2.0, **options), per_epoch=50)
        return [schedule.rate(step, elapsed) for step, elapsed in places]

    warm = {"sched": "linear", "epochs": 4, "warmup_steps": 8}
    assert rates((1, 0), (50, 0), (100, 0), **warm) == [2 * 2 / 8 * 199 / 200, 1.5, 1.0]
    assert rates((0, 0), (50, 0), (99, 0), sched="constant", steps=100) == [pytest.approx(0.4), 2.0, 2.0]  # 5 %
    assert rates((49, 0), (199, 0), sched="constant", epochs=10, warmup_epochs=2) == [1.0, 2.0]
    assert rates((0, 0), sched="constant", steps=100, warmup_steps=0) == [2.0]
    assert rates((0, 0), sched="constant", steps=100, warmup_epochs=0) == [2.0]
    found = rates((7, 0), (7, 1.5), (7, 30), (9, 60), (9, 99), sched="linear", max_minutes=1)
    assert found == pytest.approx([0.0, 0.975, 1.0, 0.0, 0.0])


def test_layer_decay_scales_the_rate_of_each_layer(data):
    trainer = Recorded(Options(**TINY, steps=1, layer_decay=0.5, opt="sgd", momentum=0.0, clip_grad=0.0,
                               weight_decay=0.0, warmup_steps=0, lr=0.1), data)  # fmt: skip
    torch.nn.init.normal_(trainer.model.head.weight, generator=torch.Generator().manual_seed(0))
    before, (x, y) = weights(trainer.model), next(trainer.batches.epoch(0))
    model = copy.deepcopy(trainer.model)
    F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    trainer.fit()
    for name, scale in (("head.weight", 1.0), ("blocks.0.mlp.fc1.weight", 0.5), ("patch_embed.proj.weight", 0.25)):
        moved = before[name] - trainer.weights[0][name]
        torch.testing.assert_close(moved, 0.1 * scale * model.get_parameter(name).grad, rtol=1e-3, atol=1e-7)


def test_running_average_warms_up():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    ema, expected = optim.running_average(model, 0.9999), 1.0
    ema.update_parameters(model)
    torch.nn.init.zeros_(model.weight)
    for t in range(1, 500):
        ema.update_parameters(model)
        expected *= min(0.9999, (1 + t) / (10 + t))
    assert ema.module.weight.item() == pytest.approx(expected, rel=1e-3)
    assert expected < 1e-6 and 0.9999**500 > 0.95  # the share of the initial weights, with and without warm-up


@pytest.mark.parametrize("mixed", [False, True])
def test_binary_cross_entropy(data, mixed):
    options = Options(**TINY, bce_loss=True, smoothing=0.2, cutmix=0.0, mixup=1.0 if mixed else 0.0)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 5, 1])
    logits = torch.randn(4, 6)
    loss, right, count = Labels(6, options)(lambda images: logits, x, y, (0, 1, 2))
    targets = np.full((4, 6), 0.2 / 6)
    targets[range(4), y] += 0.8
    if mixed:
        targets = mix(x, y, 6, mixup=1.0, cutmix=0.0, smoothing=0.2, key=(0, 1, 2))[1].numpy()
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    assert loss.item() == pytest.approx(-(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean(), rel=1e-5)
    assert (int(right), count) == (int((logits.argmax(1) == y).sum()), 4)


def test_autocast_rounds_and_checkpointing_does_not(data):
    losses = {}
    for name in ("", "bfloat16", "float16", "recomputed"):
        how = {"grad_checkpointing": True} if name == "recomputed" else {"amp_dtype": name}
        trainer = Recorded(Options(**TINY, steps=4, drop=0.1, **how), data)
        trainer.fit()
        losses[name] = trainer.losses
    assert losses["recomputed"] == losses[""]
    for dtype in ("bfloat16", "float16"):
        assert losses[dtype] != losses[""] and losses[dtype] == pytest.approx(losses[""], abs=0.05)


# ---- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "RUN"
    options = Options(**TINY, epochs=8, lr=5e-3, model_ema_decay=0.8, drop=0.1)
    said = []
    trainer = Recorded(options, data, output=folder, command="vit train data.npz", say=said.append)
    return folder, trainer, trainer.fit(), said


def test_accuracy_is_that_of_the_file(finished, data):
    folder, _trainer, result, said = finished
    model = vit.load_pretrained(folder / "best.safetensors").eval()
    pixels = data.test.pixels()[..., 0].astype(np.float64) / 255
    train = data.train.pixels().astype(np.float64) / 255
    x = torch.tensor((pixels - train.mean()) / train.std(), dtype=torch.float32)[:, None]
    with torch.no_grad():
        right = (model(x).argmax(1).numpy() == data.test.labels).mean() * 100
    assert result.test.top1 == pytest.approx(right) and right > 60  # chance: 17
    assert any(f"accuracy {right:.2f} %" in line for line in said)
    assert f"accuracy {right:.2f} %" in (folder / "README.md").read_text()
    told = model.pretrained_cfg
    assert told["training"]["test_top1"] == pytest.approx(right) and told["training"]["command"] == "vit train data.npz"
    assert told["label_names"] == list(data.classes)
    assert model.config.impl == "auto"


def test_selected_weights_are_those_of_the_best_row(finished, data):
    folder, trainer, result, _said = finished
    assert result.best["eval_top1"] == max(row["eval_top1"] for row in result.rows)
    decays = [min(0.8, (1 + t) / (10 + t)) for t in range(len(trainer.weights))]
    average = {name: tensor.double() for name, tensor in trainer.weights[0].items()}
    for t in range(1, result.best["step"]):
        average = {n: decays[t] * a + (1 - decays[t]) * trainer.weights[t][n].double() for n, a in average.items()}
    with safe_open(folder / "best.safetensors", "pt") as file:
        for name, tensor in average.items():
            torch.testing.assert_close(file.get_tensor(name), tensor.float(), rtol=1e-4, atol=1e-6)
    images, labels = (torch.cat(parts) for parts in zip(*trainer.val.epoch(0), strict=True))
    with torch.no_grad():
        logits = vit.load_pretrained(folder / "best.safetensors").eval()(images)
    assert result.best["eval_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_summary_has_timms_columns(finished):
    folder, trainer, result, _said = finished
    lines = (folder / "summary.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,eval_loss,eval_top1,eval_top5,lr"
    assert [float(v) for v in lines[8].split(",")] == list(result.rows[7].values())
    assert len(lines) == 9 and result.rows[0]["train_loss"] == pytest.approx(np.mean(trainer.losses[:10]))


def test_files_of_a_run(finished):
    folder = finished[0]
    names = {"args.json", "summary.csv", "last.pt", "best.safetensors", "curves.png", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "args.json").read_text())
    assert record["options"]["lr"] == 5e-3 and record["versions"]["torch"] == torch.__version__
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_killed_after_any_file(data, tmp_path, monkeypatch):
    """Also at the last step, after it was saved and before the row of its epoch."""
    options = Options(**TINY | {"batch_size": 32}, epochs=2, lr=5e-3, checkpoint_every=5)
    monkeypatch.setattr(Run, "save_curves", lambda self, rows: True)  # it is slow
    expected = Trainer(options, data, output=tmp_path / "whole").fit()
    table, own, left, kills = (tmp_path / "whole/summary.csv").read_text(), os.replace, 0, 0

    class Killed(BaseException):
        pass

    def replace(*paths):
        nonlocal left
        own(*paths)
        left -= 1
        if not left:
            raise Killed

    monkeypatch.setattr(os, "replace", replace)
    while True:
        left, folder = kills + 1, tmp_path / f"killed{kills}"
        with contextlib.suppress(Killed):
            Trainer(options, data, output=folder).fit()
            break
        kills += 1
        found = Trainer(options, data, output=folder, resume=True).fit()
        assert dataclasses.replace(found, test=None) == dataclasses.replace(expected, test=None), kills
        assert found.test.loss == expected.test.loss and (folder / "summary.csv").read_text() == table
    assert kills == 12


def test_run_without_a_folder_has_the_same_result(data, tmp_path):
    options = Options(**TINY, epochs=3, lr=5e-3, val_interval=2)
    results = [Trainer(options, data, output=output).fit() for output in (None, tmp_path / "RUN")]
    assert results[0].weights_digest == results[1].weights_digest
    assert [row["epoch"] for row in results[0].rows] == [1, 2]  # every second one, and the last


def test_any_model_trains(data):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 6))
    result = Trainer(Options(**TINY | {"set": ()}, epochs=10, lr=0.02), data, model=model).fit()
    assert result.test.top1 > 90  # the classes are linearly separable


# ---- what stops a run ------------------------------------------------------------------------------------------------


def test_exploding_rate_names_the_step_and_keeps_good_weights(data, tmp_path, monkeypatch):
    options = Options(**TINY, steps=30, checkpoint_every=1, lr=1e-3, warmup_steps=0, sched="constant")
    monkeypatch.setattr(optim.Schedule, "rate", lambda self, step, elapsed: 1e38 if step == 14 else 1e-3)
    with pytest.raises(TrainingError, match=r"not finite at step 15; lower --lr 0\.001; last\.pt keeps step 14"):
        Trainer(options, data, output=tmp_path / "RUN").fit()
    state = torch.load(tmp_path / "RUN/last.pt", weights_only=True)
    assert state["step"] == 14 and all(tensor.isfinite().all() for tensor in state["model"].values())
    best = vit.load_pretrained(tmp_path / "RUN/best.safetensors")
    assert all(p.isfinite().all() for p in best.parameters())


def test_loss_that_is_not_finite_names_the_step(data, tmp_path):
    options = Options(**TINY, steps=30, lr=1e30, clip_grad=0.0, opt="sgd", momentum=0.0)
    with pytest.raises(
        TrainingError, match=r"not finite at step [23]; lower --lr 1e\+30 or use --clip-grad 1; nothing"
    ):
        Trainer(options, data, output=tmp_path / "RUN").fit()
    assert {path.name for path in (tmp_path / "RUN").iterdir()} == {"args.json"}


# ---- the start -------------------------------------------------------------------------------------------------------


def test_fine_tuning_replaces_the_whole_head_and_resizes_positions(data, tmp_path):
    config = vit.ViTConfig(img_size=8, patch_size=4, in_chans=1, num_classes=6, embed_dim=32, depth=1, num_heads=2,
                           representation_size=16, drop_path_rate=0.3, proj_drop_rate=0.2)  # fmt: skip
    old = vit.VisionTransformer(config, 1)
    vit.save_pretrained(old, tmp_path / "old.safetensors")
    options = Options(weights=str(tmp_path / "old.safetensors"), img_size=(16, 16), drop_path=0.1)
    new = start(options, data)
    assert isinstance(new.pre_logits, torch.nn.Identity) and new.head.weight.shape == (6, 32)
    assert not new.head.weight.any() and not new.head.bias.any()
    assert torch.equal(new.blocks[0].attn.qkv.weight, old.blocks[0].attn.qkv.weight)
    assert (new.config.drop_path_rate, new.config.proj_drop_rate) == (0.1, 0.0)
    resized = vit.load_pretrained(tmp_path / "old.safetensors", img_size=16)
    assert torch.equal(new.pos_embed, resized.pos_embed) and new.pos_embed.shape == (1, 17, 32)


def test_fine_tuning_learns_and_keeps_the_normalisation_of_the_file(finished, data, tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **{n: 255 - v if n.startswith("x") else v for n, v in images(100, seed=1).items()})
    options = Options(weights=str(finished[0] / "best.safetensors"), steps=30, batch_size=16, augment="none")
    trainer = Recorded(options, open_data(str(path)))
    assert (trainer.mean, trainer.std) == (data.mean, data.std)
    trainer.fit()
    assert trainer.losses[0] == pytest.approx(math.log(6), abs=1e-5)  # a head of zeros knows nothing
    assert trainer.losses[-1] < trainer.losses[0] - 0.3


def test_masked_patches_then_fine_tuning(data, tmp_path):
    options = Options(**TINY, objective="masked", epochs=12, lr=5e-3)
    trainer = Recorded(options, data, output=tmp_path / "RUN")
    result = trainer.fit()
    assert trainer.losses[-1] < trainer.losses[0] - 0.2
    assert result.best["step"] == result.steps and set(result.rows[0]) == {
        "epoch",
        "train_loss",
        "eval_loss",
        "eval_top1",
        "lr",
    }
    model = start(Options(weights=str(tmp_path / "RUN/best.safetensors")), data)
    assert model.mask_token is None and model.config.global_pool == "token"
    assert torch.equal(model.blocks[0].attn.qkv.weight, trainer.vit.blocks[0].attn.qkv.weight)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 6)


def test_small_recipe(data):
    config = Trainer(Options(), dataclasses.replace(data, image_size=(28, 28))).model.config
    assert (config.patch_size, config.embed_dim, config.depth, config.num_heads) == ((4, 4), 64, 4, 2)
    assert (config.in_chans, config.num_classes, config.img_size) == (1, 6, (28, 28))
    weight = vit.VisionTransformer(config, 0).blocks[0].mlp.fc1.weight  # Xavier's uniform: ±√(6 / (in + out))
    assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / (64 + 256)), rel=1e-3)
    sizes = {n: small((n, n), {"num_classes": 2}).patch_size[0] for n in (8, 14, 32, 56, 64, 224)}
    assert sizes == {8: 1, 14: 2, 32: 4, 56: 8, 64: 8, 224: 32}
    with pytest.raises(TrainingError, match="images of 37x37 pixels have no patches of a useful size; --img-size 35"):
        small((37, 37), {})


def test_recipes_are_the_papers():
    jft, i1k, tune = (resolve(recipe=f"paper-{name}") for name in ("jft", "i1k", "finetune"))
    assert (jft.epochs, jft.lr, jft.sched, jft.weight_decay, jft.drop, jft.clip_grad) == (7, 8e-4, "linear", 0.1, 0, 0)
    assert (i1k.epochs, i1k.lr, i1k.sched, i1k.weight_decay, i1k.drop, i1k.clip_grad) == (300, 3e-3, "cosine", 0.3, 0.1, 1)  # fmt: skip # noqa: E501
    assert jft.batch_size == i1k.batch_size == 4096 and jft.warmup_steps == i1k.warmup_steps == 10_000
    assert (tune.opt, tune.momentum, tune.batch_size, tune.weight_decay, tune.sched) == ("sgd", 0.9, 512, 0, "cosine")
    assert (tune.clip_grad, tune.model_ema_decay) == (1, 0.9999)
    assert resolve(recipe="paper-i1k", steps=9, warmup_epochs=1).epochs is None  # what is typed replaces the recipe's
    assert set(PAPER) == {"paper-jft", "paper-i1k", "paper-finetune"} and "4096" in PAPER["paper-jft"]
