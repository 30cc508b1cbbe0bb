"""Running one piece of work for every unit on this machine's cores; results come in any order."""

import multiprocessing
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from os import _exit
from typing import Any, TypeVar

from prepare.plan import Unit

Result = TypeVar("Result")

# Units handed to the pool ahead of the workers, so that none waits and few are lost on an error.
WAITING_PER_WORKER = 2

_work: Callable[[Unit], Any]


def run_local(
    work: Callable[[Unit], Result],
    units: Sequence[Unit],
    workers: int,
    start_method: str | None = None,
) -> Iterator[Result]:
    """Call `work` on each unit in `workers` processes and yield what it returns.

    `start_method` is multiprocessing's; by default processes are forked on Linux, where they share
    what is loaded, and spawned elsewhere. Raises what `work` raised, and RuntimeError for a worker
    that died.
    """
    count = min(workers, len(units))
    if count <= 1:
        yield from map(work, units)
        return
    context = multiprocessing.get_context(
        start_method or ("fork" if sys.platform == "linux" else "spawn")
    )
    waiting = deque(units)
    running: set[Future[Result]] = set()
    pool = ProcessPoolExecutor(count, context, _start_worker, (work,))
    try:
        while waiting or running:
            while waiting and len(running) < count * WAITING_PER_WORKER:
                running.add(pool.submit(_run_in_worker, waiting.popleft()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process died (out of memory, perhaps): finished units are kept; run the "
            "same command again, with fewer --workers if memory is short"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(work: Callable[[Unit], Any]) -> None:
    """Keep the work in the worker, and end the worker when its parent is gone."""
    global _work
    _work = work
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A killed parent can't stop its workers: they would wait for work for ever."""
    wait_for([sentinel])
    _exit(1)


def _run_in_worker(unit: Unit) -> Any:
    return _work(unit)
