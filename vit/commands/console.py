"""Progress output of the commands."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Prints ``text``, a dot every two seconds, and finally the duration."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(2):
            print(".", end="", flush=True)

    print(f"  {text} ...", end="", flush=True)
    start, ticker = time.perf_counter(), threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        done.set()
        ticker.join()
        say(f" {time.perf_counter() - start:.1f} s")
