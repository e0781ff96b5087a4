"""The error for whoever types a command."""

from __future__ import annotations


class TrainingError(ValueError):
    """Something that the user can fix. The message is one line that says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))
