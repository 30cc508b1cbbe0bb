"""What a run's `config.json` records, and with which settings the run may go on.

    {"format": "mygpt-run", "version": 1, "fingerprint": "0a1b...", "generation": 0,
     "config": {"max_steps": 700, "seed": 1337, ..., "model": {"n_layers": 4, ...}}}

It is written before the first step: what was measured or worked out is so once and for all.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mygpt.config import GPTConfig
from mygpt.settings import OPEN, TrainConfig, shallow

FORMAT, VERSION = "mygpt-run", 1

# What a run is made of stays fixed from its first step to its last (promise 7); these may differ
# from one start to the next. `data` is where the dataset lies: its fingerprint is what is fixed.
FREE = {
    *("data", "log_dir", "time_budget", "stop_at", "micro_batch", "log_interval", "val_interval"),
    *("checkpoint_interval", "keep", "device", "compile", "deterministic"),
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain JSON values; the model's own lie under "model"."""
    paths = {"log_dir": str(config.log_dir), "data": config.data and str(config.data)}
    return asdict(config) | paths


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """What `to_json` wrote. Raises ValueError for a setting that this version does not know."""
    known = {f.name for f in fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"unknown setting {unknown[0]!r} in the run's configuration: expected that of this "
            "version of myGPT; use the version that wrote it, or start anew with another --log-dir"
        )
    typed = {
        "model": GPTConfig(**values["model"]),
        "log_dir": Path(values["log_dir"]),
        "data": values["data"] and Path(values["data"]),
    }
    return TrainConfig(**{**values, **typed})


@dataclass(frozen=True)
class RunRecord:
    """What `RUN/config.json` says: the settings as resolved, and the dataset's identity."""

    config: TrainConfig
    fingerprint: str
    generation: int

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "generation": self.generation,
            "config": to_json(self.config),
        }


def read_run(folder: Path) -> RunRecord | None:
    """The record of the run in `folder`, or None where there is none.

    Raises ValueError for one of another version, and for checkpoints without a record.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "checkpoints").is_dir():
            raise ValueError(f"{folder} has checkpoints but no config.json: take another --log-dir")
        return None
    try:
        raw = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): take another --log-dir") from None
    if (found := (raw.get("format"), raw.get("version"))) != (FORMAT, VERSION):
        raise ValueError(
            f"{path}: expected format {FORMAT} version {VERSION}, found {found[0]} {found[1]}: "
            "use the version of myGPT that wrote it, or take another --log-dir"
        )
    return RunRecord(from_json(raw["config"]), raw["fingerprint"], raw["generation"])


def continued(stored: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """The settings with which the run of `stored` goes on when `asked` is the command.

    Raises ValueError if `asked` changes what must not change, naming the first such setting. What
    `asked` leaves open is as the run has it.
    """
    if not asked.max_steps and asked.time_budget != stored.time_budget:
        raise _refusal(asked, "time_budget", stored.time_budget, asked.time_budget)
    wanted = _flat(asked)
    for name, value in _flat(stored).items():
        is_open = name in OPEN and not wanted[name]
        if name not in FREE and not is_open and wanted[name] != value:
            raise _refusal(asked, name, value, wanted[name])
    left_open = [name for name in OPEN if not wanted[name] and name != "stop_at"]
    filled = {name: getattr(stored, name) for name in left_open}
    return replace(asked, data=asked.data or stored.data, **filled)


def _flat(config: TrainConfig) -> dict[str, Any]:
    model = asdict(config.model)
    return model | {name: value for name, value in shallow(config).items() if name != "model"}


def _refusal(asked: TrainConfig, name: str, stored: object, wanted: object) -> ValueError:
    flag = name.replace("_", "-")
    remedy = f"--{flag} {stored}"
    if isinstance(stored, bool):
        remedy = f"--{flag}" if stored else f"--no-{flag}"
    return ValueError(
        f"{asked.log_dir} holds a run with {name} {stored}, this command asks for {wanted}: "
        f"give {remedy} to go on with it, or another --log-dir"
    )
