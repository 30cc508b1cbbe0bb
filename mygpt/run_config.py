"""What a run's folder records: its settings, with which it may go on, and the texts it wrote.

    {"format": "mygpt-run", "version": 2, "fingerprint": "0a1b...", "generations": {"web": 0},
     "earlier": [], "config": {"max_steps": 700, "seed": 1337, ..., "model": {"n_layers": 4, ...}}}

`config.json` is written before the first step: what was measured or worked out is so once and for
all. Version 1, which knew one dataset and its `generation`, is read as well.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mygpt.config import GPTConfig
from mygpt.log import end_torn_line
from mygpt.settings import LENGTHS, OPEN, RETIRED, TrainConfig, shallow

# --- JSON files of a run that say their format and version: `config.json` and `state.json`.


def read(path: Path, kind: str, newest: int, if_damaged: str, if_other: str) -> dict[str, Any]:
    """The record in a file, as version 2 has it; version 1 knew one dataset and its `generation`.

    `kind` is the format that it must have, in a version up to `newest`. Raises ValueError, ending
    in the remedy `if_damaged` or `if_other`, for a file that is no JSON, or another record.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {if_damaged}") from None
    found = (record.get("format"), record.get("version"))
    if found not in [(kind, version) for version in range(1, newest + 1)]:
        raise ValueError(
            f"{path}: expected format {kind} version 1 to {newest}, found {found[0]} {found[1]}: "
            f"{if_other}"
        )
    if "generation" in record:
        # The name of an only dataset is that of its folder, and not compared.
        record["generations"] = {"data": record.pop("generation")}
    return record


if TYPE_CHECKING:
    from mygpt.distributed import Ranks


FORMAT, VERSION = "mygpt-run", 2

# What a run is made of stays fixed from its first step to its last (promise 7); these may differ
# from one start to the next. `data` is where the datasets lie: their fingerprint is what is fixed.
FREE = {
    *("data", "generation", "verify", "log_dir", "stop_at", "max_time", "micro_batch"),
    *("skip_spikes", "log_interval", "val_interval", "checkpoint_interval", "keep", "keep_every"),
    *("sample_interval", "sample_prompt", "tensorboard", "wandb"),
    *("device", "compile", "deterministic", "gradient_checkpointing", "shard"),
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain JSON values; the model's own lie under "model"."""
    lists = {name: list(getattr(config, name)) for name in ("data", "sample_prompt")}
    return asdict(config) | lists | {"log_dir": str(config.log_dir)}


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """What `to_json` wrote, of version 1 too. Raises ValueError for an unknown setting."""
    values = {name: value for name, value in values.items() if name not in RETIRED}
    known = {f.name for f in fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"unknown setting {unknown[0]!r} in the run's configuration: expected that of this "
            "version of myGPT; use the version that wrote it, or start anew with another --log-dir"
        )
    data = values["data"]
    typed = {
        "model": GPTConfig(**values["model"]),
        "log_dir": Path(values["log_dir"]),
        "data": (data,) if isinstance(data, str) else tuple(data or ()),
        "sample_prompt": tuple(values.get("sample_prompt", ())),
    }
    return TrainConfig(**{**values, **typed})


@dataclass(frozen=True)
class RunRecord:
    """What `RUN/config.json` says: the settings as resolved, and the datasets' identity.

    `earlier` lists what the datasets were before `--generation latest` moved on, oldest first:
    {"until": step, "fingerprint": ..., "generations": ...}.
    """

    config: TrainConfig
    fingerprint: str
    generations: dict[str, int]
    earlier: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "generations": self.generations,
            "earlier": list(self.earlier),
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
    other = "take another --log-dir"
    remedies = (other, f"use the version of myGPT that wrote it, or {other}")
    raw = read(path, FORMAT, VERSION, *remedies)
    earlier = tuple(raw.get("earlier", ()))
    return RunRecord(from_json(raw["config"]), raw["fingerprint"], raw["generations"], earlier)


def continued(stored: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """The settings with which the run of `stored` goes on when `asked` is the command.

    Raises ValueError if `asked` changes what must not change, naming the first such setting. What
    `asked` leaves open is as the run has it.
    """
    if asked.init_from:  # the shape came from there, and is not spelt out on the command line
        block_size = min(asked.model.block_size, stored.model.block_size)
        shape = replace(stored.model, block_size=block_size, dropout=asked.model.dropout)
        asked = replace(asked, model=shape)
    wanted = _flat(asked)
    for name, value in _flat(stored).items():
        is_open = name in OPEN and not wanted[name]
        if name not in FREE and not is_open and wanted[name] != value:
            raise _refusal(stored, asked, name, value, wanted[name])
    left_open = [name for name in OPEN if not wanted[name] and name != "stop_at"]
    filled = {name: getattr(stored, name) for name in left_open}
    return replace(asked, data=asked.data or stored.data, **filled)


def _flat(config: TrainConfig) -> dict[str, Any]:
    model = asdict(config.model)
    return model | {name: value for name, value in shallow(config).items() if name != "model"}


def _refusal(
    stored: TrainConfig, asked: TrainConfig, name: str, value: object, wanted: object
) -> ValueError:
    flag = name.replace("_", "-")
    remedy = f"--{flag} {value}"
    if isinstance(value, bool):
        remedy = f"--{flag}" if value else f"--no-{flag}"
    elif name in LENGTHS:
        remedy = f"--max-steps {stored.max_steps}"
    return ValueError(
        f"{asked.log_dir} holds a run with {name} {value}, this command asks for {wanted}: "
        f"give {remedy} to go on with it, or another --log-dir"
    )


def write_samples(run: Path, step: int, samples: Iterable[Mapping[str, str]]) -> None:
    """Append texts that the model wrote after `step` steps to RUN/samples.jsonl."""
    path = run / "samples.jsonl"
    end_torn_line(path)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)


def read_samples(run: Path) -> list[dict[str, Any]]:
    """The texts of RUN/samples.jsonl, {"step", "prompt", "text"} each; none without the file.

    Those of steps that were trained again are there once, torn lines not at all.
    """
    path = run / "samples.jsonl"
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            sample = json.loads(line)
        except ValueError:
            continue
        found[sample["step"], sample["prompt"]] = sample
    return list(found.values())


# --- Have all ranks the same run in mind? Each has read its flags, config.json and manifests alone.


# Where things lie, and what they run on, may differ from host to host.
HOSTS_OWN = {"model", "data", "log_dir", "device"}


def check(record: RunRecord, ranks: "Ranks") -> None:
    """Raise ValueError on all ranks, naming the first difference, if one has another run in mind.

    They would train all the same: on rows that another seed or generation put in another order.
    """
    first, *others = ranks.all_gather_object(_identity(record))
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
