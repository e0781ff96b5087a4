"""The experiments: each is a table of runs, and sentences of the article to hold against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from vit.experiments.models import PATCHES, POSITIONS, Model, training_flops
from vit.experiments.verdict import Cell, Claim
from vit.training.data import Data, split_validation
from vit.training.errors import TrainingError
from vit.training.start import small

VAL_SPLIT = 0.05  # of the training images; these choose the learning rate where there are several


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user chooses. An empty tuple and 0 mean the experiment's own value.

    Attributes:
        name: a key of `EXPERIMENTS`.
        data: the data set, see `open_data`.
        pretrain: of transfer: another data set to pre-train on; "" means half of the classes.
        seeds: of weights, subsets and batches.
        sizes: numbers of training images; of data-scale and transfer.
        images_seen: length of a training, or of the pre-training.
        steps: lengths of the fine-tuning; of transfer.
        lrs: learning rates; the validation images choose.
        batch_size: images of a batch; of fewer training images, all.
        img_size: (height, width); None means the data's.
        quick: a rehearsal of seconds, with few images.
        impl: path of every op.
        amp_dtype: autocast to this dtype.
        device: "" means the GPU if there is one.
    """

    name: str
    data: str
    pretrain: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[int, ...] = ()
    images_seen: int = 0
    steps: tuple[int, ...] = ()
    lrs: tuple[float, ...] = ()
    batch_size: int = 128
    img_size: tuple[int, int] | None = None
    quick: bool = False
    impl: str = "auto"
    amp_dtype: str = ""
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. ``series`` and ``x`` name its cell in the report; runs that differ in ``lr`` and ``seed`` share it."""

    series: str
    x: str
    seed: int
    task: str = "train"  # or "pretrain", "finetune", "frozen features", "random features", "raw pixels"
    model: Model = Model()  # noqa: RUF009 (it is frozen)
    size: int = 0  # training images
    steps: int = 0
    batch_size: int = 0
    lr: float = 0.0
    needs: str = ""  # name of the pre-training

    @property
    def name(self) -> str:
        """The name of its file, without the suffix."""
        words = [self.series, self.x, f"lr {self.lr:g}" if self.lr else "", f"seed {self.seed}"]
        return "-".join(" ".join(filter(None, words)).replace(",", "").split())


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A comparison.

    Attributes:
        title: what is compared.
        equal: at equal what.
        limits: what it cannot show.
        runs: makes the table.
        claims: makes the claims about the cells (series, x), given the x of each in the order of the table.
        axis: x of the plot: "size", "lr", or "" for a list of the cells.
        defaults: values of `Settings` that are not given.
        takes: the fields of `Settings` that only some experiments have.
    """

    title: str
    equal: str
    limits: str
    runs: Callable[[Settings, Data, Data | None], list[Run]]
    claims: Callable[[list[str]], list[Claim]]
    axis: str
    defaults: dict[str, Any]
    takes: tuple[str, ...] = ()


def settle(settings: Settings) -> Settings:
    """Fills in the values of the experiment, or those of a rehearsal.

    Raises:
        TrainingError: an option is out of range or of another experiment.
    """
    experiment = EXPERIMENTS[settings.name]
    for name in ("sizes", "steps", "pretrain"):
        if getattr(settings, name) and name not in experiment.takes:
            raise TrainingError(f"--{name} is not an option of {settings.name}; leave it out")
    values = experiment.defaults | (experiment.defaults.get("quick") if settings.quick else {})
    given = {name: values[name] for name in values if name != "quick" and not getattr(settings, name)}
    if settings.quick:
        given["seeds"] = settings.seeds[:2]
    settings = dataclasses.replace(settings, **given)
    for name in ("seeds", "sizes", "steps", "lrs"):
        if len(set(values := getattr(settings, name))) < len(values):
            raise TrainingError(f"--{name} has a value twice")
    if settings.images_seen < settings.batch_size:
        raise TrainingError(f"--images-seen {settings.images_seen} is no batch of {settings.batch_size}; raise it")
    return settings


# ---- parts of tables -------------------------------------------------------------------------------------------------


def _shape(s: Settings, data: Data) -> dict[str, tuple[int, int]]:
    config = small(data.image_size, {"img_size": s.img_size} if s.img_size else {})
    return {"img_size": config.img_size, "patch_size": config.patch_size}


def _available(data: Data) -> int:
    return len(split_validation(data.train, VAL_SPLIT, 0)[0])


def _trainings(s: Settings, data: Data, models: dict[tuple[str, str], Model]) -> list[Run]:
    """A run for each model, learning rate and seed, on all training images."""
    size = _available(data)
    batch = min(s.batch_size, size)
    shared = {"size": size, "steps": s.images_seen // batch, "batch_size": batch}
    return [
        Run(*cell, seed, model=dataclasses.replace(model, **_shape(s, data)), lr=lr, **shared)
        for cell, model in models.items()
        for lr in s.lrs
        for seed in s.seeds
    ]


# ---- data-scale ------------------------------------------------------------------------------------------------------

_VIT, _SAME_IMAGES, _SAME_FLOPS = "ViT", "ResNet, equal images seen", "ResNet, equal training FLOPs"


def _data_scale(s: Settings, data: Data, _: Data | None) -> list[Run]:
    most, shape, runs = _available(data), _shape(s, data), []
    vit, resnet = (Model(kind, **shape) for kind in ("vit", "resnet"))
    cost = {model: training_flops(model, data.channels, len(data.classes)) for model in (vit, resnet)}
    for size in sorted({min(size, most) for size in s.sizes}):
        batch = min(s.batch_size, size)
        for series, model, share in (
            (_VIT, vit, 1.0),
            (_SAME_IMAGES, resnet, 1.0),
            (_SAME_FLOPS, resnet, cost[vit] / cost[resnet]),
        ):
            how = {"size": size, "steps": round(share * s.images_seen / batch), "batch_size": batch}
            runs += [Run(series, str(size), seed, model=model, lr=lr, **how) for lr in s.lrs for seed in s.seeds]
    return runs


def _data_scale_claims(sizes: list[str]) -> list[Claim]:
    said = 'Fig. 4: "ResNets perform better with smaller pre-training datasets but plateau sooner than ViT, which performs better with larger pre-training."'  # noqa: E501
    few, many, claims = sizes[0], sizes[-1], []
    for resnet in (_SAME_IMAGES, _SAME_FLOPS):
        equal = resnet.removeprefix("ResNet, ")
        gap = {(resnet, few): 1.0, (_VIT, few): -1.0}
        claims.append(Claim(said, f"with {few} images, {equal}: ResNet above ViT", gap))
        if few != many:
            closing = gap | {(resnet, many): -1.0, (_VIT, many): 1.0}
            claims.append(Claim(said, f"from {few} to {many} images, {equal}: the ResNet's lead shrinks", closing))
            lead = {(_VIT, many): 1.0, (resnet, many): -1.0}
            claims.append(Claim(said, f"with {many} images, {equal}: ViT above ResNet", lead))
    return claims


# ---- transfer --------------------------------------------------------------------------------------------------------

_TUNED, _SCRATCH = "fine-tuned", "from scratch"
_PROBES = ("frozen features", "random features", "raw pixels")


def _transfer(s: Settings, data: Data, pretrain: Data | None) -> list[Run]:
    if s.img_size is None and data.image_size is None:
        raise TrainingError(f"the images of {s.data} have several sizes; choose one with --img-size")
    full = s.img_size or data.image_size
    if any(side % 2 for side in full):
        raise TrainingError(f"images of {full[0]}x{full[1]} pixels have no half size; choose another --img-size")
    half = Model(**_shape(dataclasses.replace(s, img_size=tuple(side // 2 for side in full)), data))
    whole, size, runs = dataclasses.replace(half, img_size=full), _available(pretrain), []
    first = min(s.batch_size, size)
    for seed in s.seeds:
        start = Run("pre-trained", "", seed, "pretrain", half, size, s.images_seen // first, first, 2e-3)
        runs.append(start)
        for labels in s.sizes:
            batch = min(50, labels)
            for steps in s.steps:
                x = f"{labels} labels, {steps} steps"
                shared = {"size": labels, "steps": steps, "batch_size": batch, "needs": start.name}
                for lr in s.lrs:
                    runs.append(Run(_TUNED, x, seed, "finetune", whole, lr=lr, **shared))
                    runs.append(Run(_SCRATCH, x, seed, "train", whole, lr=lr, **(shared | {"needs": ""})))
            for task in _PROBES:
                model = half if task != "raw pixels" else whole
                runs.append(Run(task, f"{labels} labels, probe", seed, task, model, labels, needs=start.name))
    return runs


def _transfer_claims(x: list[str]) -> list[Claim]:
    said = 'Section 3.2: "Typically, we pre-train ViT on large datasets, and fine-tune to (smaller) downstream tasks. [...] It is often beneficial to fine-tune at higher resolution than pre-training"'  # noqa: E501
    return [
        Claim(said, f"{at}: fine-tuned above from scratch", {(_TUNED, at): 1.0, (_SCRATCH, at): -1.0})
        for at in x
        if at.endswith("steps")
    ]


# ---- pos-embed, pooling, shuffle -------------------------------------------------------------------------------------


def _pos_embed(s: Settings, data: Data, _: Data | None) -> list[Run]:
    return _trainings(s, data, {(kind, ""): Model(positions=kind) for kind in POSITIONS})


def _pos_embed_claims(_: list[str]) -> list[Claim]:
    gap, same = (
        'D.4: "there is a large gap between the performances of the model with no positional embedding and models with '
        'positional embedding"',
        'D.4: "there is little to no difference between different ways of encoding positional information"',
    )
    with_one = POSITIONS[1:]
    claims = [Claim(gap, f"{kind} above none", {(kind, ""): 1.0, ("none", ""): -1.0}) for kind in with_one]
    pairs = [(a, b) for i, a in enumerate(with_one) for b in with_one[i + 1 :]]
    return claims + [Claim(same, f"{a} as good as {b}", {(a, ""): 1.0, (b, ""): -1.0}, "as good") for a, b in pairs]


_POOLS = {"class token": "token", "average pooling": "avg"}


def _pooling(s: Settings, data: Data, _: Data | None) -> list[Run]:
    return _trainings(s, data, {(name, ""): Model(pool=pool) for name, pool in _POOLS.items()})


def _pooling_claims(_: list[str]) -> list[Claim]:
    said = 'Fig. 9: "Comparison of class-token and global average pooling classifiers. Both work similarly well, but require different learning-rates."'  # noqa: E501
    first, second = _POOLS
    what = "class token as good as average pooling, each at its best learning rate"
    return [Claim(said, what, {(first, ""): 1.0, (second, ""): -1.0}, "as good")]


_SHUFFLED = {
    "ViT without position embedding": Model(positions="none", pool="avg"),
    "ViT with position embedding": Model(pool="avg"),
    "ResNet": Model("resnet"),
}


def _shuffle(s: Settings, data: Data, _: Data | None) -> list[Run]:
    cells = {(name, how): (model, how) for name, model in _SHUFFLED.items() for how in PATCHES}
    return _trainings(s, data, {cell: dataclasses.replace(m, patches=how) for cell, (m, how) in cells.items()})


def _shuffle_claims(_: list[str]) -> list[Claim]:
    said = (
        '3.1: "the position embeddings at initialization time carry no information about the 2D positions of the '
        'patches and all spatial relations between the patches have to be learned from scratch"',
        '3.1: "In CNNs, locality, two-dimensional neighborhood structure, and translation equivariance are baked into '
        'each layer throughout the whole model."',
    )
    plain, fixed, random = PATCHES
    none, vit, resnet = _SHUFFLED
    loss = {name: {(name, plain): 1.0, (name, random): -1.0} for name in _SHUFFLED}
    against = {cell: -c for cell, c in loss[vit].items()}
    return [
        Claim(said[0], f"{none}: {random} as good as {plain}", loss[none], "as good"),
        Claim(said[0], f"{vit}: {fixed} as good as {plain}", {(vit, plain): 1.0, (vit, fixed): -1.0}, "as good"),
        Claim(said[0], f"{vit}: {random} loses", loss[vit]),
        Claim(said[1], f"{resnet}: {fixed} loses", {(resnet, plain): 1.0, (resnet, fixed): -1.0}),
        Claim(said[1], f"{random}: {resnet} loses more than {vit}", loss[resnet] | against),
    ]


_SMALL = "The images are small and the trainings short, so a result that differs from the paper's does not refute it"
_QUICK = {"images_seen": 512, "lrs": (2e-3,)}
_TRAINED = "The same training images, the same number of images seen, the same batches for a seed"
EXPERIMENTS = {
    "data-scale": Experiment(
        "A ViT and a ResNet of comparable cost on growing subsets of the training images.",
        "The ViT sees as many images in every run, whatever the subset. The ResNet is trained twice: on as many images "
        "seen, and on as many FLOPs of training. A smaller subset is part of a larger one.",
        f"{_SMALL}. The paper's smallest set has 1.3 million images.",
        _data_scale, _data_scale_claims, "size",
        {"sizes": (200, 1000, 5000, 60_000), "images_seen": 80_000, "lrs": (2e-3,),
         "quick": _QUICK | {"sizes": (100, 1000)}},
        ("sizes",),
    ),
    "transfer": Experiment(
        "A ViT that was pre-trained at half the resolution and fine-tuned on few labels at the full one, against the "
        "same ViT from scratch; and linear probes on as many labels.",
        "Fine-tuned and from scratch: the same images, steps, batches, optimizer and candidates of the learning rate. "
        "The pre-training comes on top. Frozen and random features are those of the half size, raw pixels of the full.",
        f"{_SMALL}. Features that do not exceed raw pixels or random features say little about the pre-training.",
        _transfer, _transfer_claims, "",
        {"sizes": (200,), "images_seen": 200_000, "steps": (60, 200), "lrs": (1e-3, 2e-3),
         "quick": _QUICK | {"sizes": (100,), "steps": (4,)}},
        ("sizes", "steps", "pretrain"),
    ),
    "pos-embed": Experiment(
        "A ViT without position embedding, with one learned vector for each patch (1-D), with learned rows and columns "
        "(2-D), and with fixed sines and cosines.",
        f"{_TRAINED}.", f"{_SMALL}. Sines and cosines are not in the paper's table 8.",
        _pos_embed, _pos_embed_claims, "", {"images_seen": 100_000, "lrs": (2e-3,), "quick": _QUICK},
    ),
    "pooling": Experiment(
        "A ViT whose head reads the class token, and one without it whose head reads the mean of the patches.",
        f"{_TRAINED}.", f"{_SMALL}.",
        _pooling, _pooling_claims, "lr",
        {"images_seen": 50_000, "lrs": (5e-4, 1e-3, 2e-3, 4e-3), "quick": _QUICK | {"lrs": (1e-3, 2e-3)}},
    ),
    "shuffle": Experiment(
        "Models trained and tested on images whose patches are in their places, in one fixed random order, or in another "  # noqa: E501
        "random order for each image.",
        f"{_TRAINED}. The patches are those of the ViT, also for the ResNet.", f"{_SMALL}.",
        _shuffle, _shuffle_claims, "", {"images_seen": 40_000, "lrs": (2e-3,), "quick": _QUICK},
    ),
}  # fmt: skip


def table(s: Settings, data: Data, pretrain: Data | None) -> list[Run]:
    """The runs of a settled experiment, whose names differ."""
    return EXPERIMENTS[s.name].runs(s, data, pretrain)


def claims(name: str, cells: Iterable[Cell]) -> list[Claim]:
    """The claims about these cells."""
    return EXPERIMENTS[name].claims(list(dict.fromkeys(x for _, x in cells if x)))
