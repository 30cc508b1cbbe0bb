"""Stop requests: signals and --max-time, polled often and honoured by all ranks at the same point.

SIGINT, SIGTERM and SIGUSR1 only set a flag. `Stop.requested` is called before every micro-step and
between the batches of a validation, equally often on all ranks, and returns the same on all.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mygpt.distributed import DistributedContext, LaggedMax
from shards.cli import EXIT_INTERRUPTED

EXIT_STOPPED = 75  # EX_TEMPFAIL: nothing is wrong, run the same command again
ANSWER = "stopping at a checkpoint once this micro-step is done; again to end at once"
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows lacks the last one
REPEATED_AFTER = 1.0  # seconds after which the same signal again is another request
# Ranks exchange the number of a signal, 0 for no request, or this: no number in SIGNALS is lower.
_MAX_TIME = 1


class Interrupt:
    """Flag set by signals: `seen` is the number of the first one inside `watch`, 0 before.

    `answer` is written to stderr at once after the signal's name: it may take long to be obeyed.
    """

    def __init__(self, answer: str = "") -> None:
        self.seen, self._answer = 0, answer
        self._first_times: dict[int, float] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first_times.setdefault(number, now)
        if self._answer and not self.seen:  # not print: another one may have been interrupted
            os.write(2, f"\n{signal.Signals(number).name}: {self._answer}\n".encode())
        self.seen = self.seen or number
        if now - first > REPEATED_AFTER:
            # A repeated signal ends the process at once. Not within a second: torchrun forwards
            # a Ctrl-C that its ranks have already got from the terminal. Nor is another signal a
            # repetition: a scheduler announces its SIGTERM by SIGUSR1.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @contextmanager
    def watch(self) -> Iterator["Interrupt"]:
        """Handle the signals inside the block and restore their handlers afterwards."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


class Stopped(Exception):
    """Raised on all ranks to abandon a step or a validation; the message names the cause."""


class Stop:
    """Stop request that all ranks agree on.

    `max_seconds` counts from `since`, a value of `time.monotonic()`; 0 is no limit.
    """

    def __init__(self, ranks: DistributedContext, max_seconds: float = 0, since: float = 0) -> None:
        self._ranks = ranks
        self._deadline = since + max_seconds if max_seconds else None
        self._interrupt = Interrupt(ANSWER if ranks.is_main else "")
        self._agreed = 0
        self._lagged = LaggedMax()

    def requested(self) -> bool:
        """Return True once any rank has a stop request. All ranks must call this equally often.

        With several ranks the result is that of the previous call, whose messages have arrived in
        the meantime, so that a step takes no longer for it.
        """
        if self._agreed:
            return True
        self._agreed = self._lagged.exchange(self._local(), self._ranks)
        return self._agreed != 0

    def _local(self) -> int:
        """Return this rank's own request."""
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return self._interrupt.seen or (_MAX_TIME if is_late else 0)

    def check(self) -> None:
        """Raise `Stopped` if `requested`."""
        if self.requested():
            raise Stopped(self.reason)

    @property
    def reason(self) -> str:
        """The cause, once `requested` is true: "--max-time" or the name of a signal."""
        return "--max-time" if self._agreed == _MAX_TIME else signal.Signals(self._agreed).name

    @property
    def exit_code(self) -> int:
        """The exit code that says so: of Ctrl-C the one that ends a shell's loop, else 75."""
        return EXIT_INTERRUPTED if self._agreed == signal.SIGINT else EXIT_STOPPED

    @contextmanager
    def watch(self) -> Iterator["Stop"]:
        """Handle the signals inside the block and restore their handlers afterwards."""
        with self._interrupt.watch():
            yield self
