"""Shared by the tests of the benchmarks."""

from collections.abc import Callable
from typing import Any

from mygpt.config import GPTConfig

SHAPE = GPTConfig(block_size=8, vocab_size=131, n_layers=2, n_heads=2, n_embed=16)


class InThisProcess:
    """A `bench.worker.Worker` without a process of its own."""

    def __init__(self, name: str, make: Callable[..., Any], *args: Any) -> None:
        self.name, self.make, self.args, self.made = name, make, args, None

    def turn(self) -> Any:
        self.made = self.made or self.make(*self.args)
        return self.made()

    def end(self) -> None:
        pass
