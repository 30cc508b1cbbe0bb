"""Running one piece of work for every unit on this machine's cores; results come in any order.

Each worker has a pipe of its own and shares no lock with another, so whichever is killed, and
whenever, nobody waits for it for ever (concurrent.futures' pool does, when killed at its end).
"""

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from os import _exit
from typing import Any, TypeVar

from prepare.plan import Unit

Result = TypeVar("Result")


def run_local(
    work: Callable[[Unit], Result],
    units: Sequence[Unit],
    workers: int,
    start_method: str | None = None,
) -> Iterator[Result]:
    """Call `work` on each unit in `workers` processes and yield what it returns.

    `start_method` is multiprocessing's; by default processes are forked on Linux, where they share
    what is loaded, and spawned elsewhere. Raises the ValueError or OSError that `work` raised, and
    ChildProcessError for a worker that died; units under way are finished first.
    """
    count = min(workers, len(units))
    if count <= 1:
        yield from map(work, units)
        return
    method = start_method or ("fork" if sys.platform == "linux" else "spawn")
    waiting = iter(units)
    with ExitStack() as stack:
        busy: list[Connection] = []
        for unit in islice(waiting, count):
            busy.append(stack.enter_context(_worker(work, method, busy)))
            _exchange(busy[-1].send, unit)
        while busy:
            for worker in wait_for(busy):
                assert isinstance(worker, Connection)
                result = _exchange(worker.recv)
                if isinstance(result, Exception):
                    raise result
                following = next(waiting, None)
                if following is None:
                    busy.remove(worker)
                else:
                    _exchange(worker.send, following)
                yield result


def _exchange(call: Callable[..., Any], *given: Unit) -> Any:
    """Send to a worker, or receive from it. Raises ChildProcessError if it is no more."""
    try:
        return call(*given)
    except (EOFError, OSError):
        raise ChildProcessError(
            "a worker process died (killed for want of memory, perhaps): finished units are kept; "
            "run the same command again, with fewer --workers if memory is short"
        ) from None


@contextmanager
def _worker(work: Callable[[Unit], Any], method: str, others: list[Connection]) -> Iterator[Any]:
    """A worker, by our end of its pipe. On leaving it ends, once it has finished its unit."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    # A forked worker holds our ends of all pipes so far; open in it, they would never seem closed.
    inherited = [*others, ours] if method == "fork" else []
    process = context.Process(target=_serve, args=(work, theirs, inherited), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(work: Callable[[Unit], Any], parent: Connection, inherited: list[Connection]) -> None:
    """Call `work` on each unit that the parent sends, until it closes the pipe."""
    for connection in inherited:
        connection.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to act on
    process = multiprocessing.parent_process()
    assert process is not None
    threading.Thread(target=_end_with, args=(process.sentinel,), daemon=True).start()
    while True:
        try:
            unit = parent.recv()
        except (EOFError, ConnectionError):
            return
        with suppress(ConnectionError):  # nobody listens any more, as the next recv will say
            parent.send(_outcome(work, unit))


def _outcome(work: Callable[[Unit], Any], unit: Unit) -> Any:
    """What `work` returns, or the error in the input that it raises."""
    try:
        return work(unit)
    except (ValueError, OSError) as error:
        return error


def _end_with(sentinel: int) -> None:
    """End with the parent: killed, it can't stop its workers, which would go on for nobody."""
    wait_for([sentinel])
    _exit(1)
