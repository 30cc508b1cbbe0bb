"""Running units on this machine's cores; records come back as units finish, in any order."""

import multiprocessing
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from os import _exit

from prepare.plan import Plan, Unit
from prepare.unit import Record, run_unit
from prepare.workspace import Workspace
from shards import tokenizer

# Units handed to the pool ahead of the workers, so that none waits and few are lost on an error.
WAITING_PER_WORKER = 2

_plan: Plan
_workspace: Workspace


def run_local(
    plan: Plan,
    units: Sequence[Unit],
    workspace: Workspace,
    workers: int,
    start_method: str | None = None,
) -> Iterator[Record]:
    """Run `units` in `workers` processes and yield each one's record, which is then on disk.

    `start_method` is multiprocessing's; by default processes are forked on Linux, where they share
    the loaded tokenizer, and spawned elsewhere. Raises what a unit raised, and RuntimeError for a
    worker that died.
    """
    if min(workers, len(units)) <= 1:
        for unit in units:
            yield _run(plan, unit, workspace)
        return
    tokenizer.load()  # once, before the fork; in spawned workers it finds its caches filled
    method = start_method or ("fork" if sys.platform == "linux" else "spawn")
    context = multiprocessing.get_context(method)
    count = min(workers, len(units))
    with ProcessPoolExecutor(count, context, _start_worker, (plan, workspace)) as pool:
        waiting = list(units)
        running: set[Future[Record]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < count * WAITING_PER_WORKER:
                    running.add(pool.submit(_run_in_worker, waiting.pop(0)))
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


def _run(plan: Plan, unit: Unit, workspace: Workspace) -> Record:
    record = run_unit(plan, unit, workspace.folder, tokenizer.load())
    workspace.save_record(record)
    return record


def _start_worker(plan: Plan, workspace: Workspace) -> None:
    """Keep the plan in the worker, and end the worker when its parent is gone."""
    global _plan, _workspace
    _plan, _workspace = plan, workspace
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A killed parent can't stop its workers: they would wait for work for ever."""
    wait_for([sentinel])
    _exit(1)


def _run_in_worker(unit: Unit) -> Record:
    return _run(_plan, unit, _workspace)
