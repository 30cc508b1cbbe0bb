"""A contender in a process of its own: it waits, takes a turn when it is told to, and waits again.

So its memory is its own, and what one contender set up can't help or hinder another.
"""

import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

Turn = Callable[[], Mapping[str, Any]]


class Worker:
    """`make(*args)` in a new process, which answers each `turn` with what the made turn returns.

    `make` and `args` must be importable and picklable. What fails there is a ValueError here.
    """

    def __init__(self, name: str, make: Callable[..., Turn], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, make, args), daemon=True)
        self._process.start()
        other.close()

    def turn(self) -> dict[str, Any]:
        """One turn. Raises ValueError if the process fails, which has said why on stderr."""
        try:
            self._pipe.send("turn")
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ValueError(
                f"expected {self.name} to run, found its process ended with exit code "
                f"{self._process.exitcode}: what it said stands above; if memory ran out, take a "
                "smaller --micro-batch"
            ) from None

    def end(self) -> None:
        """Let the process go."""
        self._pipe.close()
        self._process.join()


def peak_megabytes() -> float:
    """The most memory that this process has had resident, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _work(pipe: Connection, make: Callable[..., Turn], args: tuple[Any, ...]) -> None:
    """Make the contender at the first turn, take turns until nobody asks any more."""
    turn: Turn | None = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        turn = turn or make(*args)
        pipe.send(dict(turn()))
