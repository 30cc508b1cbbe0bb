"""Have all ranks the same run in mind? Each has read its flags, config.json and manifests alone."""

from dataclasses import asdict
from typing import Any

from mygpt.distributed import Ranks
from mygpt.runs import RunRecord
from mygpt.settings import shallow

# Where things lie, and what they run on, may differ from host to host.
HOSTS_OWN = {"model", "data", "log_dir", "device"}


def check(record: RunRecord, ranks: Ranks) -> None:
    """Raise ValueError on all ranks, naming the first difference, if one has another run in mind.

    They would train all the same: on rows that another seed or generation put in another order.
    """
    first, *others = ranks.of_each(_identity(record))
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other.get(name) != value:
                raise ValueError(
                    f"expected the same run on all ranks, found {name} {value} on rank 0 and "
                    f"{other.get(name)} on rank {rank}: give all hosts the same command, the same "
                    "data and the same run folder"
                )


def _identity(record: RunRecord) -> dict[str, Any]:
    """What has to be equal, by name; the name of an only dataset is that of its folder."""
    generations = list(record.generations.values())
    names = {"dataset fingerprint": record.fingerprint[:12], "generations": generations}
    settings = asdict(record.config.model) | shallow(record.config)
    return names | {name: value for name, value in settings.items() if name not in HOSTS_OWN}
