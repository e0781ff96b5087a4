"""Checks rules of CONTRIBUTING.md in the source of the kernels that no test of results can check.

`problems` needs the sources of all kernel files, because it tracks through names, tuples and calls whether a value
still has the dtype in which it was loaded.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

NARROW, WIDE = "narrow", "wide"  # the loaded dtype, maybe 16 bits; the accumulator's; None: a scalar, or unknown
REDUCTIONS = {"sum", "cumsum", "cumprod", "reduce", "associative_scan"}
FORBIDDEN = {
    "make_block_ptr": "block pointers are deprecated; use a pointer or a tensor descriptor",
    "libdevice": "libdevice is not interpreted; use tl",
    "debug_barrier": "programs may not wait for each other; write partials and sum them in order",
    "autotune": "nothing tunes at run time; pin a configuration in kernels/configs.py",
    "heuristics": "launch parameters come from kernels/configs.py",
}


def problems(sources: Mapping[str, str]) -> list[str]:
    """Violations as ``file:line: what`` in kernel files, which are given as file name -> source."""
    trees = {file: ast.parse(source) for file, source in sources.items()}
    kernels = [(file, f) for file, tree in trees.items() for f in ast.walk(tree) if _is_jit(f)]
    found = [(file, line, what) for file, tree in trees.items() for line, what in _forbidden(tree)]
    for file, kernel in kernels:
        found += [(file, line, what) for line, what in _calls(kernel, file == "tile.py" and kernel.name == "dot")]
        found += [(file, line, what) for line, what in _multiplied_ids(kernel)]
        found += [(file, kernel.lineno, what) for what in _specialised(kernel)]
    found += _Widths(kernels).narrow_reductions()
    return [f"{file}:{line}: {what}" for file, line, what in sorted(set(found))]


def _is_jit(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(_name(d) == "jit" for d in node.decorator_list)


def _name(node: ast.AST) -> str:
    """The last part of a name, an attribute or a call: ``load`` of ``tl.load(…)``."""
    if isinstance(node, ast.Call):
        return _name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_tl(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in {f"tl.{name}" for name in names}


def _forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names = [_name(node)]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [word for alias in node.names for word in f"{alias.name}.{alias.asname}".split(".")]
            names += (getattr(node, "module", None) or "").split(".")
        for name in names:
            if name.startswith("atomic_"):
                yield node.lineno, f"{name}: sums in no fixed order; write partials and sum them in order"
            elif name in FORBIDDEN:
                yield node.lineno, f"{name}: {FORBIDDEN[name]}"


def _calls(kernel: ast.FunctionDef, is_tile_dot: bool) -> Iterator[tuple[int, str]]:
    """Violations in a single call or loop."""
    widened = set()
    for node in ast.walk(kernel):
        if _is_int64(node):
            widened.add(node.func.value)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.FloorDiv, ast.Mod)):
            widened.add(node.left)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "tile.grouped_tile":
            widened.add(node.args[0])
    for node in ast.walk(kernel):
        if isinstance(node, ast.While):
            yield node.lineno, "while: a loop with no bound may wait for another program; use range"
        elif _is_tl(node, "load"):
            given = {k.arg for k in node.keywords} | set(["pointer", "mask", "other"][: len(node.args)])
            if "mask" in given and "other" not in given:
                yield node.lineno, "tl.load with a mask and without other=: what it reads there is undefined"
        elif _is_tl(node, "dot", "dot_scaled") and not is_tile_dot:
            yield node.lineno, "tl.dot: every dot goes through tile.dot"
        elif _is_tl(node, "program_id", "num_programs") and node not in widened:
            yield node.lineno, f"{ast.unparse(node)} is 32 bits; follow it with .to(tl.int64), or divide it, at once"


def _is_int64(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and _name(node) == "to" and [ast.unparse(a) for a in node.args] == ["tl.int64"]


def _multiplied_ids(kernel: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    """32-bit products with a program id or with a quotient of one."""
    narrow: set[str] = set()

    def is_narrow(node: ast.AST) -> bool:
        if _is_int64(node):
            return False
        if _is_tl(node, "program_id", "num_programs") or (isinstance(node, ast.Name) and node.id in narrow):
            return True
        return any(map(is_narrow, ast.iter_child_nodes(node)))

    for node in (n for n in ast.walk(kernel) if isinstance(n, ast.Assign)):
        if is_narrow(node.value):
            narrow |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    for node in ast.walk(kernel):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and is_narrow(node):
            yield node.lineno, f"{ast.unparse(node)} may need more than 32 bits; cast the id with .to(tl.int64) first"


def _specialised(kernel: ast.FunctionDef) -> Iterator[str]:
    """The offset of a dropout differs per block, and Triton would compile another kernel for multiples of 16."""
    drops = kernel.name.endswith("_kernel") and "OFFSET" in [a.arg for a in kernel.args.args]
    if drops and not any("'OFFSET'" in ast.unparse(d) for d in kernel.decorator_list):
        yield 'OFFSET is specialised; decorate with @triton.jit(do_not_specialize=["OFFSET"])'


class _Widths:
    """Finds the values that still have their loaded dtype, in all functions until nothing changes."""

    def __init__(self, kernels: list[tuple[str, ast.FunctionDef]]) -> None:
        self.kernels = kernels
        self.parameters = {kernel.name: [a.arg for a in kernel.args.args] for _, kernel in kernels}
        self.known: dict[tuple[str, str], str | None] = {}  # (function, parameter or "return") -> width
        self.found: set[tuple[str, int, str]] = set()

    def narrow_reductions(self) -> set[tuple[str, int, str]]:
        before = None
        while before != self.known:
            before, self.found = dict(self.known), set()
            for file, kernel in self.kernels:
                self.file, self.function = file, kernel.name
                self.names = {a.arg: self.known.get((kernel.name, a.arg)) for a in kernel.args.args}
                self.run(kernel.body)
        return self.found

    def join(self, function: str, what: str, width: str | None) -> None:
        """A parameter or result is narrow if one caller or one return is narrow."""
        if self.known.get((function, what)) != NARROW and width is not None:
            self.known[function, what] = width

    def run(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.If, ast.For, ast.While)):
                for _ in range(2):  # the second round sees assignments of the first
                    self.width(node.test if hasattr(node, "test") else node.iter)
                    self.run(node.body)
                self.run(node.orelse)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                width = self.width(node.value)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, width)
            elif isinstance(node, ast.AugAssign):
                self.assign(node.target, self.mixed([node.target, node.value]))
            elif isinstance(node, ast.Return) and node.value is not None:
                self.join(self.function, "return", self.width(node.value))
            elif isinstance(node, ast.Expr):
                self.width(node.value)

    def assign(self, target: ast.AST, width: str | None) -> None:
        for name in (n for n in ast.walk(target) if isinstance(n, ast.Name)):
            self.names[name.id] = width

    def mixed(self, nodes: list[ast.AST]) -> str | None:
        """The width of an operation is that of its widest operand."""
        widths = [self.width(n) for n in nodes]
        return WIDE if WIDE in widths else NARROW if NARROW in widths else None

    def width(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, (ast.Subscript, ast.Attribute)):
            return self.width(node.value)
        if not isinstance(node, ast.Call):
            widths = {self.width(child) for child in ast.iter_child_nodes(node)}
            if isinstance(node, ast.Tuple):  # narrow if one of its values is
                return NARROW if NARROW in widths else WIDE if WIDE in widths else None
            return WIDE if WIDE in widths else NARROW if NARROW in widths else None
        return self.call(node)

    def call(self, node: ast.Call) -> str | None:
        name, values = _name(node), [*node.args, *(k.value for k in node.keywords)]
        method = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) not in ("tl", "tile")
        widths = [self.width(v) for v in ([node.func.value] if method else []) + values]
        if name in REDUCTIONS and (_is_tl(node, name) or method) and widths[0] == NARROW:
            what = f"{ast.unparse(node)[:60]}: of values in their loaded dtype; widen them with .to(ACC) first"
            self.found.add((self.file, node.lineno, what))
        if name == "load":
            return NARROW
        if name in ("to", "zeros", "full"):
            return self.of_type(values[-1])
        if name == "dot":
            return WIDE
        if name in self.parameters and not method:
            named = [*zip(self.parameters[name], node.args, strict=False), *((k.arg, k.value) for k in node.keywords)]
            for parameter, value in named:
                self.join(name, parameter, self.width(value))
            return self.known.get((name, "return"))
        return WIDE if WIDE in widths else NARROW if NARROW in widths else None

    def of_type(self, dtype: ast.AST) -> str | None:
        """The width of a type. ACC, tl.float32, tl.float64 and the dtype of a wide value are wide."""
        text = ast.unparse(dtype)
        if text == "ACC" or text in ("tl.float32", "tl.float64"):
            return WIDE
        if text.startswith(("tl.int", "tl.uint")):
            return None
        return NARROW if text.endswith("element_ty") or text in ("tl.float16", "tl.bfloat16") else self.width(dtype)
