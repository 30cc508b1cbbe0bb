"""Running the same units on a Ray cluster, every node of which sees the sources and the output.

pip install 'mygpt[ray]'
ray start --head                 on the first machine; it prints the command for the others
python -m prepare SOURCE... --out FOLDER --engine ray --address auto
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import prepare
import shards
from prepare.plan import Unit

Result = TypeVar("Result")

# A unit whose node died is run again elsewhere; one that fails everywhere is given up.
RETRIES = 5
# Units under way for each core of the cluster: enough that no core waits for the next one.
WAITING_PER_CORE = 2


def run_ray(
    work: Callable[[Unit], Result], units: Sequence[Unit], address: str | None
) -> Iterator[Result]:
    """Call `work` on each unit on the cluster and yield what it returns, in any order.

    Raises what `work` raised, and ValueError where Ray is not installed.
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
            return work(unit)

        ahead = WAITING_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = deque(units)
        running: list[ray.ObjectRef[Result]] = []
        while waiting or running:
            while waiting and len(running) < ahead:
                running = [*running, run_one.remote(waiting.popleft())]
            done, running = ray.wait(running)
            for result in done:
                try:
                    yield ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # what `work` raised, without Ray's own pages
    finally:
        ray.shutdown()
