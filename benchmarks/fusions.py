"""What a whole ViT has to move with and without each fusion: the plan of its steps, from shapes alone.

Bytes in units of u = 2·N·D, one bf16 token matrix of one image. Per layer and image, forward: everything apart 38u,
with the fusions that are built 28u, with residual epilogues 26u, with LN-fold too 22u. Each step reads its inputs once
and writes its outputs once; statistics of 4 bytes a row and partial sums are left out. `benchmarks.trace` counts what
the code really does; the tests hold the two against each other.
"""

from __future__ import annotations

import dataclasses

from benchmarks.harness import Ceilings, Work
from benchmarks.shapes import Shape


@dataclasses.dataclass(frozen=True)
class Fusion:
    """``modes``: where it makes a difference, in "fwd" (nothing is kept for a backward) or "full" (with a backward)."""

    what: str
    built: bool
    modes: tuple[str, ...] = ("fwd", "full")


FUSIONS = {
    "patch": Fusion("patch projection with class token and position embedding", True),
    "add_norm": Fusion("residual + LayerNorm in one pass", True),
    "gelu": Fusion("GELU in fc1's epilogue", True),
    "dgelu": Fusion("dGELU in fc2's dgrad", True, ("full",)),
    "attention": Fusion("attention, instead of softmax written out", True),
    "residual": Fusion("residual in proj's and fc2's epilogue", False),
    "ln_fold": Fusion("LayerNorm folded into qkv and fc1", False, ("fwd",)),
    "ln_dgrad": Fusion("LayerNorm backward inside dgrad", False, ("full",)),
    "bias": Fusion("bias gradients from passes that read the data", False, ("full",)),
    "cls_only": Fusion("last block for the class token alone (less work than the floor)", False),
}
BUILT = frozenset(name for name, fusion in FUSIONS.items() if fusion.built)
ALL = frozenset(FUSIONS)


@dataclasses.dataclass(frozen=True)
class Step:
    """One kernel."""

    name: str
    phase: str
    work: Work


class _Plan:
    def __init__(self, shape: Shape, fused: frozenset[str], train: bool, e: int) -> None:
        self.shape, self.fused, self.train, self.e = shape, fused, train, e
        self.D, self.F, self.M = shape.width, shape.hidden, shape.rows
        self.steps: list[Step] = []

    def u(self, rows: int) -> int:
        """Bytes of a token matrix of so many rows."""
        return self.e * rows * self.D

    def add(self, name: str, phase: str, bytes: float, flops: float = 0.0) -> None:
        if bytes:
            self.steps.append(Step(name, phase, Work(flops, bytes)))

    def product(self, name: str, phase: str, m: int, n: int, k: int, extra: float = 0.0) -> None:
        self.add(name, phase, self.e * (m * k + n * k + m * n) + extra, 2.0 * m * n * k)

    def rows(self, layer: int) -> int:
        """Of the tokens that a layer has to finish."""
        return self.shape.batch if "cls_only" in self.fused and layer == self.shape.config.depth - 1 else self.M

    # ---- forward

    def forward(self) -> None:
        c, batch, depth = self.shape.config, self.shape.batch, self.shape.config.depth
        patch, image = self.e * self.D * self.pixels, self.e * batch * c.num_patches * self.pixels
        flops = 2.0 * batch * c.num_patches * self.pixels * self.D
        self.add("patches", "fwd", image + patch + self.u(self.M), flops)
        if "patch" not in self.fused:
            self.add("class token", "fwd", 2 * self.u(self.M))
            self.add("position", "fwd", 2 * self.u(self.M))
        self.norm("norm", self.M, residual=False)
        for layer in range(depth):
            self.block(self.rows(layer))
        self.product("head", "fwd", batch, c.num_classes, self.D)

    @property
    def pixels(self) -> int:
        c = self.shape.config
        return c.in_chans * c.patch_size[0] * c.patch_size[1]

    def norm(self, name: str, rows: int, residual: bool) -> None:
        """The residual add, unless an epilogue did it, and the LayerNorm behind it, unless it is folded away."""
        u, folded = self.u(rows), "ln_fold" in self.fused
        if residual and "residual" not in self.fused:
            if "add_norm" in self.fused:
                return self.add(f"add + {name}", "fwd", 3 * u if folded else 4 * u)
            self.add("add", "fwd", 3 * u)
        if not folded:
            self.add(name, "fwd", 2 * u)

    def block(self, rows: int) -> None:
        D, F, M, fused = self.D, self.F, self.M, self.fused
        u, wide, scores = self.u(rows), self.e * rows * F, self.e * self.scores(rows)
        added = u if "residual" in fused else 0
        self.qkv("fwd", rows)
        if "attention" in fused:
            self.add("attention", "fwd", 2 * self.u(M) + 2 * u, 4.0 * self.scores(rows) * self.shape.head_dim)
        else:
            half = 2.0 * self.scores(rows) * self.shape.head_dim
            self.add("q·kT", "fwd", self.u(M) + u + scores, half)
            self.add("softmax", "fwd", 2 * scores)
            self.add("p·v", "fwd", self.u(M) + u + scores, half)
        self.product("proj", "fwd", rows, D, D, added)
        self.norm("norm", rows, residual=True)
        self.product("fc1", "fwd", rows, F, D, wide if self.train and "gelu" in fused else 0)
        if "gelu" not in fused:
            self.add("gelu", "fwd", 2 * wide)
        self.product("fc2", "fwd", rows, D, F, added)
        self.norm("norm", rows, residual=True)

    def qkv(self, phase: str, rows: int, name: str = "qkv") -> None:
        """Forward, dgrad and wgrad alike: [M, 3·D] · [D]; where only some rows matter, only these have queries."""
        if rows == self.M:
            return self.product(name, phase, rows, 3 * self.D, self.D)
        self.product(f"{name} of k, v", phase, self.M, 2 * self.D, self.D)
        self.product(f"{name} of q", phase, rows, self.D, self.D)

    def scores(self, rows: int) -> int:
        """Elements of the attention matrices."""
        return rows * self.shape.tokens * self.shape.heads

    # ---- backward

    def backward(self) -> None:
        c, batch, depth = self.shape.config, self.shape.batch, self.shape.config.depth
        self.product("head dgrad", "bwd", batch, self.D, c.num_classes)
        self.product("head wgrad", "bwd", c.num_classes, self.D, batch)
        last = self.rows(depth - 1)
        self.add("pick class token", "bwd", self.u(last))
        self.norm_backward(last, joins=False)
        for layer in reversed(range(depth)):
            self.block_backward(self.rows(layer), first=layer == 0)
        self.column_sum("patches db", self.u(self.M), always=True)  # and the position embedding's gradient
        image = self.e * batch * c.num_patches * self.pixels
        flops = 2.0 * batch * c.num_patches * self.pixels * self.D
        self.add("patches wgrad", "bwd", image + self.u(self.M) + self.e * self.D * self.pixels, flops)

    def norm_backward(self, rows: int, joins: bool = True, alone: bool = False) -> None:
        """``joins``: the gradient of the residual stream is added; ``alone``: by a pass of its own in any case."""
        u = self.u(rows)
        if joins and not alone and "ln_dgrad" in self.fused:
            return self.add("norm bwd in dgrad", "bwd", 2 * u)
        together = joins and not alone and "add_norm" in self.fused
        self.add("norm bwd", "bwd", 4 * u if together else 3 * u)
        if joins and not together:
            self.add("add gradients", "bwd", 3 * u)

    def column_sum(self, name: str, bytes: int, always: bool = False) -> None:
        if always or "bias" not in self.fused:
            self.add(name, "bwd", bytes)

    def block_backward(self, rows: int, first: bool) -> None:
        D, F, M, fused = self.D, self.F, self.M, self.fused
        u, wide, scores = self.u(rows), self.e * rows * F, self.e * self.scores(rows)
        self.product("fc2 dgrad", "bwd", rows, F, D, 2 * wide if "dgelu" in fused else 0)
        if "dgelu" not in fused:
            self.add("dgelu", "bwd", 3 * wide)
        self.product("fc2 wgrad", "bwd", D, F, rows)
        self.column_sum("fc2 db", u)
        self.product("fc1 dgrad", "bwd", rows, D, F)
        self.product("fc1 wgrad", "bwd", F, D, rows)
        self.column_sum("fc1 db", wide)
        self.norm_backward(rows)
        self.product("proj dgrad", "bwd", rows, D, D)
        self.product("proj wgrad", "bwd", D, D, rows)
        self.column_sum("proj db", u)
        product = 2.0 * self.scores(rows) * self.shape.head_dim
        if "attention" in fused:  # reads q, k, v, o, do and writes dq, dk, dv; computes the logits again
            self.add("attention bwd", "bwd", 4 * u + 4 * self.u(M), 5 * product)
        else:
            for name in ("dv", "dp", "dq", "dk"):
                self.add(name, "bwd", u + self.u(M) + scores, product)
            self.add("softmax bwd", "bwd", 3 * scores)
            self.add("pack dq, dk, dv", "bwd", 2 * (u + 2 * self.u(M)))
        self.qkv("bwd", rows, "qkv dgrad")
        self.qkv("bwd", rows, "qkv wgrad")
        self.column_sum("qkv db", u + 2 * self.u(M))
        self.norm_backward(M, alone=first)


def _possible(fused: frozenset[str], train: bool) -> frozenset[str]:
    return frozenset(name for name in fused if ("full" if train else "fwd") in FUSIONS[name].modes)


def plan(shape: Shape, fused: frozenset[str] = BUILT, train: bool = False, e: int = 2) -> list[Step]:
    """The steps of a forward, or with ``train`` of a forward and its backward, for elements of ``e`` bytes."""
    made = _Plan(shape, _possible(fused, train), train, e)
    made.forward()
    if train:
        made.backward()
    return made.steps


def milliseconds(steps: list[Step], ceilings: Ceilings) -> float:
    """Predicted time: every step at its own floor, one after another."""
    return sum(step.work.floor_ms(ceilings) for step in steps)


def layer_units(shape: Shape, fused: frozenset[str], train: bool = False) -> float:
    """Bytes of a layer in u, those of its weights left out (by a batch beside which they are nothing)."""
    made = _Plan(dataclasses.replace(shape, batch=2**24), _possible(fused, train), train, 2)
    made.block(made.M)
    if train:
        made.block_backward(made.M, first=False)
    return sum(step.work.bytes for step in made.steps) / made.u(made.M)
