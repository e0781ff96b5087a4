"""SIGINT and SIGTERM end a run after a step, when its state is whole."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupted(Exception):
    """A signal stopped the run after a step. ``number`` is the signal's. The state is saved if the run has a folder."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Notes the first SIGINT or SIGTERM in ``number`` while the context is open. A second one acts as before it."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python sets handlers there only
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self.__exit__()
