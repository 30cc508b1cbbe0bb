"""Run prepare on a Ray cluster of two nodes, of which one dies while it works.

    python tests/prepare/lose_a_node.py UNIT_BYTES FLAG...

Prints how many units were finished when the node was killed, and ends as prepare does.
"""

import sys
import threading
import time
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from prepare import __main__ as command
from prepare import plan

FINISHED_BEFORE = 4


def main() -> None:
    """Start the cluster and prepare."""
    unit_bytes, *flags = sys.argv[1:]
    plan.MIN_UNIT_BYTES = int(unit_bytes)
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    units = Path(flags[flags.index("--out") + 1], ".prepare", "units")
    threading.Thread(target=kill, args=(cluster, second, units), daemon=True).start()
    sys.argv[1:] = [*flags, "--engine", "ray", "--address", cluster.address]
    try:
        command.main()
    finally:
        cluster.shutdown()


def kill(cluster: Cluster, node: Any, units: Path) -> None:
    """Kill a node, without a chance to say so, once it has had its share of the work."""
    while not units.is_dir() or len(list(units.glob("*.json"))) < FINISHED_BEFORE:
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)
    print("killed with", len(list(units.glob("*.json"))), "units finished", flush=True)


if __name__ == "__main__":
    main()
