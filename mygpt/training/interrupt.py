"""Signals as a flag that is looked at where it is safe, instead of an exception anywhere."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows lacks the last one


class Interrupt:
    """`seen` is the number of the first signal that came inside `watch`, 0 before that."""

    def __init__(self) -> None:
        self.seen = 0
        self._since: dict[int, float] = {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number not in self._since:
            self._since[number] = now
            self.seen = self.seen or number
        elif now - self._since[number] > 1:
            # Whoever asks again does not want to wait. Not so at once: torchrun passes on a Ctrl-C
            # that its ranks have had from the terminal already. Nor is another signal the same
            # wish again: a scheduler's SIGUSR1 announces its SIGTERM.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def watch(self) -> Iterator["Interrupt"]:
        """Catch the signals inside the block and give them back afterwards."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = [signal.signal(number, self._hear) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
