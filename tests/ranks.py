"""Processes that are the ranks of one another, as torchrun starts them but without its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONG = 250  # seconds: a busy machine, not a slow program
# As train.py ends.
RUN = """
import sys
from shards.cli import end_with

script = sys.argv.pop(1)
end_with(lambda: exec(script, {"__name__": "__main__"}) or 0)
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(count: int, script: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """`count` processes of a Python script given as text, each with one thread."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RUN, script, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def ends_of_ranks(count: int, script: str, *arguments: str) -> list[tuple[int, str]]:
    """The same, to their end: exit code and stderr of each."""
    processes = start_ranks(count, script, *arguments)
    try:
        errors = [process.communicate(timeout=LONG)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


def run_ranks(count: int, script: str, *arguments: str) -> None:
    """The same, whose end must be a good one."""
    for code, errors in ends_of_ranks(count, script, *arguments):
        assert code == 0, errors
