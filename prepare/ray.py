"""The same functions on a Ray cluster, whose nodes all see the sources and the output.

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

# Times that a unit is run again elsewhere if its node dies.
RETRIES = 5
# Units submitted per core of the cluster, so that no core waits for the next one.
UNITS_PER_CORE = 2


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
