"""torchrun, with the faults of the ranks in one line and their exit code as its own.

    python -m mygpt.launch --standalone --nproc-per-node=4 train.py gpt2 --data data/web

Takes torchrun's options and does what it does, except for what is seen: what rank 0 of this machine
writes is shown as it comes, the errors of the others only where they differ. torchrun itself prints
a traceback of its own for any exit code of a rank but 0, and then ends with 1.
"""

import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mygpt.stopping import EXIT_STOPPED
from shards.cli import EXIT_INTERRUPTED, one_line_errors

PATIENCE = 600  # seconds for the ranks to reach a checkpoint after a signal, instead of 30


@one_line_errors()
def main() -> int:
    """Start the ranks of this machine and wait for them. Returns their highest exit code."""
    args = run.parse_args(None)
    ranks = run.determine_local_world_size(args.nproc_per_node)
    if ranks < 1:
        raise ValueError(f"expected at least 1 rank, found --nproc_per_node={ranks}: give a number")
    logging.disable(logging.CRITICAL)  # torchrun's own
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, with a notice of six lines
    if getattr(args, "shutdown_timeout", 0) is None:  # torch 2.11 has no such option
        args.shutdown_timeout = PATIENCE
    with tempfile.TemporaryDirectory() as folder, _remembered_stderr() as seen:
        args.log_dir = folder
        args.redirects = ",".join(f"{rank}:2" for rank in range(1, ranks)) or "0"
        try:
            run.run(args)
            return 0
        except SignalException as stopped:
            return EXIT_INTERRUPTED if stopped.sigval == signal.SIGINT else EXIT_STOPPED
        except ChildFailedError as error:
            failures = list(error.failures.values())
            texts = [_stderr_of(failure, Path(folder)) for failure in failures]
    told = {_anonymous(b"".join(seen).decode(errors="replace"))}
    for text in texts:
        if not any(_anonymous(text) in other for other in told):
            told.add(_anonymous(text))
            sys.stderr.write(text)
    return max([1, *(failure.exitcode for failure in failures)])


@contextmanager
def _remembered_stderr() -> Iterator[list[bytes]]:
    """Pass on what is written to stderr, by processes started in the block too, and yield it."""
    seen: list[bytes] = []
    terminal, (source, sink) = os.dup(2), os.pipe()
    os.dup2(sink, 2)
    os.close(sink)

    def pass_on() -> None:
        while data := os.read(source, 1 << 16):
            os.write(terminal, data)
            seen.append(data)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        os.dup2(terminal, 2)  # the last writer but for processes that were left behind
        thread.join(timeout=1)


def _stderr_of(failure: ProcessFailure, folder: Path) -> str:
    """Return what a failed rank wrote, or by which signal it was ended if it wrote nothing."""
    files = folder.rglob(f"{failure.local_rank}/stderr.log")
    text = "".join(file.read_text("utf-8", errors="replace") for file in files)
    if text or failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM:  # torchrun's own
        return text
    name = signal.Signals(-failure.exitcode).name
    return f"error: rank {failure.local_rank} was ended by {name}\n"


def _anonymous(text: str) -> str:
    """Return the text without ranks: "rank 2 of 4 lost the others" is told once."""
    return re.sub(r"rank \d+", "rank", text)


if __name__ == "__main__":
    sys.exit(main())
