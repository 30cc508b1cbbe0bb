"""Everything that the files of a run say, for its report and for an exported model's card."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mygpt import checkpoint, log, run_config
from mygpt.eval import summary
from mygpt.log import History
from mygpt.run_config import RunRecord
from mygpt.settings import TrainConfig
from shards import stored_json
from shards.mixture import Mixture
from shards.reader import evenly_spaced


@dataclass(frozen=True)
class RunSummary:
    """Content of a run's folder; what is absent is empty or None."""

    run: Path
    record: RunRecord  # the settings and the identity of the dataset
    step: int  # the last one logged, or the checkpoint's
    history: History
    dataset: Mixture | None
    missing: str  # why there is no dataset, or ""
    evaluation: dict[str, Any] | None  # eval.json
    samples: list[dict[str, Any]]  # samples.jsonl

    @property
    def config(self) -> TrainConfig:
        """The run's settings."""
        return self.record.config


def of_run(run: Path, data: Sequence[str] = ()) -> RunSummary:
    """Read the folder of a run. `data` says where its dataset lies, if it has moved.

    Raises FileNotFoundError or ValueError, in one line, if there is no run.
    """
    record = run_config.read_run(run)
    if record is None:
        raise FileNotFoundError(f"expected a run with config.json in {run}, found none: name a run")
    return _read(run, record, None, data)


def of_checkpoint(folder: Path, data: Sequence[str] = ()) -> RunSummary:
    """Read a checkpoint's run as it was at that step. Raises as `of_run` does."""
    state, run = checkpoint.read_state(folder), folder.resolve().parents[1]
    config = run_config.from_dict(state["config"], folder)
    stored = run_config.read_run(run) if (run / "config.json").is_file() else None
    earlier = stored.earlier if stored else ()
    earlier = tuple(one for one in earlier if one.until < state["step"])
    record = RunRecord(config, state["fingerprint"], state["generations"], earlier)
    return _read(run, record, state["step"], data)


def _read(run: Path, record: RunRecord, step: int | None, data: Sequence[str]) -> RunSummary:
    history = log.read(run) if (run / "log.txt").is_file() else History()
    dataset, missing = _open(data or record.config.data, record)
    return RunSummary(
        run=run,
        record=record,
        step=max(history.train, default=0) if step is None else step,
        history=history,
        dataset=dataset,
        missing=missing,
        evaluation=read_evaluation(run),
        samples=read_samples(run),
    )


def _open(specs: Sequence[str], record: RunRecord) -> tuple[Mixture | None, str]:
    """The run's dataset and "", or None and the reason why it can't be opened."""
    try:
        return Mixture.load(specs, record.generations, expect=record.fingerprint), ""
    except (OSError, ValueError) as error:
        return None, " ".join(str(error).split())


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """Read RUN/eval.json; None if eval.py has not run, ValueError if the file is damaged."""
    path = run / "eval.json"
    return summary.read(path) if path.is_file() else None


@dataclass(frozen=True)
class _Sample:
    step: int
    prompt: str
    text: str


def read_samples(run: Path) -> list[dict[str, Any]]:
    """Read RUN/samples.jsonl: {"step", "prompt", "text"} each; an empty list without the file.

    Samples of steps that were trained again appear once; torn and damaged lines are passed over.
    """
    path = run / "samples.jsonl"
    samples: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            sample = stored_json.build(_Sample, stored_json.parse(line, path), path)
            samples[sample.step, sample.prompt] = asdict(sample)
    return list(samples.values())


def first_to_last(total: int, count: int) -> list[int]:
    """`count` (at least 2) evenly spaced indices from 0 to total - 1, both included."""
    if total <= count:
        return list(range(total))
    return [*evenly_spaced(total - 1, count - 1), total - 1]
