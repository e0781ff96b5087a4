"""Compiles configurations other than the pinned one, and replaces the pinned one temporarily.

Compilation needs no GPU. Each call compiles in a separate process, because some configurations crash the compiler. All
share the Triton cache of `benchmarks.compiled`, so a run on a GPU does not compile again.
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

# Children of a process that has already imported these modules, because imports take longer than most compilations.
# benchmarks.compiled is first, so that kernels are not interpreted.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["benchmarks.compiled", "benchmarks.harness", "vit.kernels", "torch._dynamo"])

Kernels = list[dict[str, Any]]  # figures or an "error" of each kernel that a call launches


@contextlib.contextmanager
def configured(function: str, config: Config, role: str | None = None) -> Iterator[None]:
    """Inside, ``configs.<function>`` returns ``config``, with a ``role`` only for that role."""
    pinned = getattr(configs, function)

    def chosen(*args: Any, **kwargs: Any) -> Config:
        return config if role is None or role in (*args, *kwargs.values()) else pinned(*args, **kwargs)

    with patch.object(configs, function, chosen):
        yield


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_all(
    calls: Mapping[str, Callable[[], Any]], arch: int, *, jobs: int, seconds: float
) -> Iterator[tuple[str, Kernels]]:
    """(name, kernels) of every call that compiles within ``seconds``, as soon as they are known.

    The calls run ops on CPU tensors and can be pickled.
    """
    import benchmarks.compiled  # noqa: F401 (this process uses the same cache)

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

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Triton prints a program that does not compile
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
    """The reason why these kernels should not run, or None."""
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
    """The largest figures of the kernels that compiled."""
    compiled = [k for k in kernels if "error" not in k]
    names = ("registers", "spill", "shared", "wgmma", "tma")
    return {name: max(k[name] for k in compiled) for name in names} if compiled else {}
