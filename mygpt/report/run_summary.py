"""What is known of a run, gathered for its report and for the card of an exported model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mygpt import log, run_config
from mygpt.log import History
from mygpt.settings import TrainConfig
from shards.stream import Mixture


@dataclass(frozen=True)
class Facts:
    """A run as its files tell it; what is not there is empty or None."""

    run: Path
    config: TrainConfig
    fingerprint: str  # of the dataset it was trained on
    earlier: Sequence[Mapping[str, Any]]  # what that was before: until, fingerprint, generations
    history: History
    dataset: Mixture | None
    missing: str  # why there is no dataset, else empty
    evaluation: dict[str, Any] | None  # what eval.py wrote
    samples: list[dict[str, Any]]  # what it wrote while it was trained


def of_run(run: Path, data: Sequence[str] = ()) -> Facts:
    """Read the run's folder. `data` says where its dataset lies, if that has moved.

    Raises FileNotFoundError or ValueError, in one line, where there is no run.
    """
    record = run_config.read_run(run)
    if record is None:
        raise FileNotFoundError(f"expected a run with config.json in {run}, found none: name a run")
    return gather(run, run_config.to_json(record.config), record.to_json(), data)


def gather(
    run: Path, config: Mapping[str, Any], identity: Mapping[str, Any], data: Sequence[str] = ()
) -> Facts:
    """The facts of the settings `config`; `identity` is the JSON that says which dataset."""
    settings = run_config.from_json(config)
    dataset, missing = open_dataset(
        data or settings.data, identity["fingerprint"], identity["generations"]
    )
    return Facts(
        run=run,
        config=settings,
        fingerprint=identity["fingerprint"],
        earlier=identity.get("earlier", ()),
        history=log.read(run) if (run / "log.txt").is_file() else History(),
        dataset=dataset,
        missing=missing,
        evaluation=read_evaluation(run),
        samples=run_config.read_samples(run),
    )


def open_dataset(
    specs: Sequence[str], fingerprint: str, generations: Mapping[str, int]
) -> tuple[Mixture | None, str]:
    """(the dataset with that fingerprint, "") or (None, why it is not to be had)."""
    if not specs:
        return None, "the run does not say where its dataset lay"
    try:
        found = Mixture.load(specs, generations)
    except (OSError, ValueError) as error:
        return None, " ".join(str(error).split())
    if found.fingerprint != fingerprint:
        return None, (
            f"expected the dataset {fingerprint[:12]}, found {found.fingerprint[:12]} in "
            f"{', '.join(specs)}"
        )
    return found, ""


def spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` (2 or more) of `count`, evenly spaced, the first and last too."""
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """What `eval.py RUN` wrote into the run's folder; None where it has not run.

    Raises ValueError where the file is damaged.
    """
    path = run / "eval.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run eval.py {run} again") from None
