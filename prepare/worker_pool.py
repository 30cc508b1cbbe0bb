"""A function called on each unit: by worker processes of this machine, or by a Ray cluster.

Each local worker has its own pipe and shares no lock with another, so when one is killed, at any
moment, nobody waits for it forever (concurrent.futures' pool does if it is killed while shutting
down). The nodes of a Ray cluster all see the sources and the output:

    pip install 'mygpt[ray]'
    ray start --head                 on the first machine; it prints the command for the others
    python -m prepare SOURCE... --out FOLDER --engine ray --address auto
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

import prepare
import shards
from prepare.plan import Unit

Result = TypeVar("Result")

# On Ray: times that a unit is run again elsewhere if its node dies, and units submitted per core of
# the cluster, so that no core waits for the next one.
RETRIES = 5
UNITS_PER_CORE = 2


def run_local(
    function: Callable[[Unit], Result],
    units: Sequence[Unit],
    workers: int,
    start_method: str | None = None,
) -> Iterator[Result]:
    """Call `function` on each unit in `workers` processes and yield the results in any order.

    `start_method` is multiprocessing's; by default fork on Linux, where workers inherit what is
    loaded, and spawn elsewhere. Raises the ValueError or OSError that `function` raised, and
    ChildProcessError if a worker died; the other workers finish their units first.
    """
    count = min(workers, len(units))
    if count <= 1:
        yield from map(function, units)
        return
    method = start_method or ("fork" if sys.platform == "linux" else "spawn")
    pending = iter(units)
    with ExitStack() as stack:
        busy: list[Connection] = []
        for unit in islice(pending, count):
            busy.append(stack.enter_context(_worker(function, method, busy)))
            _exchange(busy[-1].send, unit)
        while busy:
            for worker in wait_for(busy):
                assert isinstance(worker, Connection)
                result = _exchange(worker.recv)
                if isinstance(result, Exception):
                    raise result
                following = next(pending, None)
                if following is None:
                    busy.remove(worker)
                else:
                    _exchange(worker.send, following)
                yield result


def _exchange(call: Callable[..., Any], *arguments: Unit) -> Any:
    """Send to a worker or receive from it. Raises ChildProcessError if it died."""
    try:
        return call(*arguments)
    except (EOFError, OSError):
        raise ChildProcessError(
            "a worker process died (killed for want of memory, perhaps): finished units are kept; "
            "run the same command again, with fewer --workers if memory is short"
        ) from None


@contextmanager
def _worker(
    function: Callable[[Unit], Any], method: str, others: list[Connection]
) -> Iterator[Connection]:
    """Start a worker and yield the parent's end of its pipe; on exit join it after its unit."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    # A forked worker inherits our ends of all pipes; left open in it, they would never read EOF.
    inherited = [*others, ours] if method == "fork" else []
    process = context.Process(target=_serve, args=(function, theirs, inherited), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join()


def _serve(
    function: Callable[[Unit], Any], parent: Connection, inherited: list[Connection]
) -> None:
    """Call `function` on each unit that the parent sends, until it closes the pipe."""
    for connection in inherited:
        connection.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    process = multiprocessing.parent_process()
    assert process is not None
    threading.Thread(target=_exit_with, args=(process.sentinel,), daemon=True).start()
    while True:
        try:
            unit = parent.recv()
        except (EOFError, ConnectionError):
            return
        try:
            outcome: Any = function(unit)
        except (ValueError, OSError) as error:
            outcome = error
        with suppress(ConnectionError):  # the parent has closed the pipe; the next recv ends this
            parent.send(outcome)


def _exit_with(sentinel: int) -> None:
    """Exit when the parent is gone: a killed parent can't stop its workers."""
    wait_for([sentinel])
    os._exit(1)


def run_ray(
    function: Callable[[Unit], Result], units: Sequence[Unit], address: str | None
) -> Iterator[Result]:
    """Call `function` on each unit on the cluster and yield the results in any order.

    Raises what `function` raised, and ValueError if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError(
            "expected the package ray for --engine ray, found none: pip install 'mygpt[ray]'"
        ) from None
    modules = [module.__path__[0] for module in (prepare, shards)]
    ray.init(address=address, runtime_env={"py_modules": modules}, log_to_driver=False)
    try:

        @ray.remote(num_cpus=1, max_retries=RETRIES)
        def run_one(unit: Unit) -> Result:
            return function(unit)

        limit = UNITS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        pending = deque(units)
        running: list[ray.ObjectRef[Result]] = []
        while pending or running:
            while pending and len(running) < limit:
                running = [*running, run_one.remote(pending.popleft())]
            done, running = ray.wait(running)
            for result in done:
                try:
                    yield ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # the function's own error, without Ray's traceback
    finally:
        ray.shutdown()
