"""Stopping in time: signals and --max-time, looked at often, and obeyed by all ranks at one place.

SIGINT, SIGTERM and SIGUSR1 only raise a flag. `Stop.asked` is called before every micro-step and
between the batches of a validation, on all ranks as often, and answers the same on all of them.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mygpt.distributed import Ranks

# --- Signals as a flag that is looked at where it is safe, instead of an exception anywhere.


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


EXIT_STOPPED = 75  # EX_TEMPFAIL: nothing is wrong, the same command goes on

# What the ranks tell one another: nothing, that the time is up, or 1 + the number of a signal.
_GO_ON, _TIME_IS_UP = 0, 1


class Stopped(Exception):
    """All ranks leave what they were doing; the message says what asked for it."""


class Stop:
    """Whether the run should end at its next boundary.

    `max_seconds` counts from `since`, a value of `time.monotonic()`; 0 is no limit.
    """

    def __init__(self, ranks: Ranks, max_seconds: float = 0, since: float = 0) -> None:
        self._ranks = ranks
        self._deadline = since + max_seconds if max_seconds else None
        self._interrupt = Interrupt()
        self._agreed = _GO_ON
        self._answer: Callable[[], int] | None = None

    def asked(self) -> bool:
        """True once any rank was asked to stop. All ranks must call this equally often.

        Over several ranks the answer is the one to the call before, so that no rank waits for the
        messages of this call, and a step takes no longer for being asked.
        """
        if self._agreed:
            return True
        if self._ranks.world_size == 1:
            self._agreed = self._own()
        else:
            answer, self._answer = self._answer, self._ranks.all_reduce_max_async(self._own())
            self._agreed = answer() if answer else _GO_ON
        return self._agreed != _GO_ON

    def _own(self) -> int:
        """What this rank has to say."""
        if self._interrupt.seen:
            return 1 + self._interrupt.seen
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return _TIME_IS_UP if is_late else _GO_ON

    def check(self) -> None:
        """Raise `Stopped` if `asked`."""
        if self.asked():
            raise Stopped(self.reason)

    @property
    def reason(self) -> str:
        """What asked for it, once `asked` is true."""
        is_late = self._agreed == _TIME_IS_UP
        return "--max-time" if is_late else signal.Signals(self._agreed - 1).name

    @contextmanager
    def watch(self) -> Iterator["Stop"]:
        """Catch the signals inside the block and give them back afterwards."""
        with self._interrupt.watch():
            yield self
