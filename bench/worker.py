"""Contenders in processes of their own, each waiting for its turn.

So each contender's memory is its own, its set-up can neither help nor hinder another, and one that
fails ends only its own process.
"""

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from bench import table
from bench.table import Key, Record

Turn = Callable[[], Record]


class Worker:
    """`make(*args)` in a new process, which answers each `turn` with a record of the made turn.

    `make` and `args` must be picklable. What the process prints goes to stderr.
    """

    def __init__(self, name: str, make: Callable[..., Turn], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, other = context.Pipe()
        # Not a daemon: some contenders have worker processes of their own.
        self._process = context.Process(target=_serve, args=(other, make, args))
        self._process.start()
        other.close()

    def turn(self) -> Record:
        """Take one turn. Raises ValueError if the process fails; its traceback is on stderr."""
        try:
            self._pipe.send("turn")
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ValueError(
                f"expected {self.name} to run, found its process ended with exit code "
                f"{self._process.exitcode}: see the traceback above; if memory ran out, take a "
                "smaller batch"
            ) from None

    def end(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def measure(
    makers: Mapping[Key, tuple[Any, ...]],
    rounds: int,
    note: Callable[[Record], None] = table.to_stderr,
) -> tuple[dict[Key, list[Record]], dict[str, str]]:
    """`table.alternately` over contenders given as (make, *args), each in its own process."""
    workers = {key: Worker(table.name_of(key), *maker) for key, maker in makers.items()}
    try:
        turns = {key: worker.turn for key, worker in workers.items()}
        return table.alternately(turns, rounds, note)
    finally:
        for worker in workers.values():
            worker.end()


def peak_megabytes() -> float:
    """Peak resident memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _serve(pipe: Connection, make: Callable[..., Turn], args: tuple[Any, ...]) -> None:
    """Make the contender at the first turn, and take turns until the pipe is closed."""
    os.dup2(sys.stderr.fileno(), 1)
    turn: Turn | None = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        turn = turn or make(*args)
        pipe.send(dict(turn()))
