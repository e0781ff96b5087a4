"""Configurations other than the pinned one: what they compile to, and how one is put in its place for a while.

Compiling needs no GPU. Each call compiles in a process of its own, because some configurations crash the compiler; all
of them share the Triton cache of `benchmarks.compiled`, where a run on a GPU then finds the kernels ready.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from unittest.mock import patch

from vit.kernels import configs
from vit.kernels.configs import Config

# Children of a process that has imported all of this already, which takes longer than most compilations. First what
# sees to it that kernels are not interpreted.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["benchmarks.compiled", "benchmarks.harness", "vit.kernels", "torch._dynamo"])

Kernels = list[dict[str, Any]]  # figures of each kernel that a call launches; one without figures has an "error"


@contextlib.contextmanager
def configured(function: str, config: Config, role: str | None = None) -> Iterator[None]:
    """Inside, ``configs.<function>`` returns ``config``; with a ``role`` only when asked for that role."""
    pinned = getattr(configs, function)

    def chosen(*args: Any, **kwargs: Any) -> Config:
        return config if role is None or role in (*args, *kwargs.values()) else pinned(*args, **kwargs)

    with patch.object(configs, function, chosen):
        yield


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_all(
    calls: Mapping[str, Callable[[], Any]], arch: int, *, jobs: int, seconds: float
) -> Iterator[tuple[str, Kernels]]:
    """(name, what it compiles to) of every call that compiles within ``seconds``, as soon as it is known.

    The calls run ops on CPU tensors and can be pickled.
    """
    import benchmarks.compiled  # noqa: F401 (this process takes its kernels from the same cache)

    deadline = time.monotonic() + seconds
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_in_process, call, arch, deadline): name for name, call in calls.items()}
        for future in as_completed(futures):
            if (kernels := future.result()) is not None:
                yield futures[future], kernels


def _in_process(call: Callable[[], Any], arch: int, deadline: float) -> Kernels | None:
    left = deadline - time.monotonic()
    if left < 1:
        return None
    receive, send = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_compile, args=(call, arch, send), daemon=True)
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(left) else None
    except EOFError:
        return [{"kernel": "?", "error": "crashes the compiler"}]
    finally:
        process.kill()
        process.join()


def _compile(call: Callable[[], Any], arch: int, send: Any) -> None:
    from benchmarks.compiled import compiling, figures

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Triton prints the whole program that it could not compile
    found: dict[str, dict[str, Any]] = {}

    def report(kernel: str, arguments: dict[str, Any], compiled: Any) -> None:
        if isinstance(compiled, Exception):
            said = (str(compiled).strip().splitlines() or [type(compiled).__name__])[-1]
            found[f"{kernel} {len(found)}"] = {"kernel": kernel, "error": f"does not compile: {said[:100]}"}
        else:
            found[compiled.hash] = {"kernel": kernel, **figures(compiled)}

    try:
        with compiling(arch, report):
            call()
    except Exception as error:
        found["call"] = {"kernel": "?", "error": f"{type(error).__name__}: {error}"[:200]}
    send.send(list(found.values()))


def why_not(arch: int, kernels: Kernels) -> str | None:
    """Why kernels that compile like this are not worth a run, or may not have one; None if they are."""
    from benchmarks.compiled import ASYNC_DOT, SHARED_LIMIT

    instruction = ASYNC_DOT.get(arch)
    for k in kernels:
        if "error" in k:
            return k["error"]
        if k["spill"]:
            return f"spills {k['spill']} bytes"
        if k["shared"] > SHARED_LIMIT[arch]:
            return f"needs {k['shared']:,} of {SHARED_LIMIT[arch]:,} bytes of shared memory"
        if k["atomics"]:
            return "has atomics: sums in no fixed order"
        if "ptxas_warnings" in k:
            return f"ptxas serialises its {instruction}"
        if k.get(f"dots_without_{instruction}"):
            return f"dots without {instruction}"
    return None if kernels else "launches nothing"


def summary(kernels: Kernels) -> dict[str, int]:
    """The largest figure of these kernels, where they compiled."""
    compiled = [k for k in kernels if "error" not in k]
    names = ("registers", "spill", "shared", "wgmma", "tma")
    return {name: max(k[name] for k in compiled) for name in names} if compiled else {}
