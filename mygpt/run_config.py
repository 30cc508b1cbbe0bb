"""`RUN/config.json`: the settings and datasets of a run, and what a resume may change.

    {"format": "mygpt-run", "version": 2, "fingerprint": "0a1b...", "generations": {"web": 0},
     "earlier": [], "horizons": [], "checksum": "51c0...",
     "config": {"max_steps": 700, "seed": 1337, ..., "model": {"n_layers": 4, ...}}}

Written before the first step with everything resolved: what was measured (micro-batch, number of
steps) is measured once in the life of a run (promise 7). A length that the clock decides on the way
(`mygpt/time_budget.py`) is added to "horizons" before the first step that it concerns.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mygpt import checkpoint
from mygpt.config import GPTConfig
from mygpt.log import end_torn_line
from mygpt.optim import Horizon, wsd_coefficient
from mygpt.pretrained import from_pretrained, read_tokenizer
from mygpt.settings import (
    LENGTHS,
    RETIRED,
    UNRESOLVED,
    TrainConfig,
    fits_micro_batch,
    only_dataset,
    shallow,
)
from shards import stored_json
from shards.files import atomic_file, write_json
from shards.mixture import Earlier, Mixture, parse_data_specs
from shards.tokenizer import GPT2, read_stored, tokenizer_beside
from shards.vocabulary import TOKENIZER_NAME

if TYPE_CHECKING:
    from mygpt.distributed import DistributedContext

FORMAT, VERSION = "mygpt-run", 2
OTHER_RUN = "take another --log-dir"
NO_FIELDS = frozenset({"format", "version", *RETIRED})

# Everything else is fixed from a run's first step to its last (promise 7). `data` is where the
# datasets lie: it is their fingerprint that is fixed.
FREE = {
    *("data", "generation", "verify", "log_dir", "stop_at", "max_time", "micro_batch"),
    *("skip_spikes", "log_interval", "val_interval", "checkpoint_interval", "keep", "keep_every"),
    *("sample_interval", "sample_prompt", "tensorboard", "wandb"),
    *("device", "compile", "deterministic", "gradient_checkpointing", "shard"),
}
# Settings that may differ between the hosts of one run.
PER_HOST = {"model", "data", "log_dir", "device"}


@dataclass(frozen=True)
class Extension:
    """A finished run of `max_steps` steps that --extend took up from step `since`."""

    since: int
    max_steps: int


@dataclass(frozen=True)
class RunRecord:
    """Content of `RUN/config.json`: the resolved settings and the identity of the datasets.

    `earlier` lists what the datasets were before `--generation latest` advanced them, oldest first;
    `horizons` the lengths of a run that follows the clock, the last one being that of `config`;
    `extensions` what --extend has lengthened.
    """

    config: TrainConfig
    fingerprint: str
    generations: dict[str, int]
    earlier: tuple[Earlier, ...] = ()
    horizons: tuple[Horizon, ...] = ()
    extensions: tuple[Extension, ...] = ()

    def __post_init__(self) -> None:
        since = [horizon.since for horizon in self.horizons]
        steps = [horizon.max_steps for horizon in self.horizons]
        if since and (since != sorted({0, *since}) or steps[-1] != self.config.max_steps):
            raise ValueError("expected horizons in ascending order, the last that of the config")
        if any(last <= first for first, last in zip(since, steps, strict=True)):
            raise ValueError("expected horizons that lie ahead of the step they begin with")

    @property
    def lengths(self) -> set[int]:
        """All lengths in steps that the run has had: its checkpoints name one of them."""
        return {horizon.max_steps for horizon in self.horizons}

    def before_decay(self, steps: Iterable[int]) -> int | None:
        """Return the last of `steps` before the decay of a "wsd" run: a longer one begins there."""
        if self.config.schedule != "wsd":
            return None
        horizons = self.horizons or [Horizon(0, self.config.max_steps)]
        return max((s for s in steps if wsd_coefficient(s, horizons) == 1), default=None)

    def extended(self, steps: int) -> "RunRecord":
        """Return the record of the run with `steps` more than its first length.

        Raises ValueError if it is not finished.
        """
        config, found = self.config, checkpoint.steps(self.config.log_dir)
        if not found or found[-1] < config.max_steps:
            raise ValueError(
                f"expected a finished run in {config.log_dir}, found step "
                f"{found[-1] if found else 0} of {config.max_steps}: the command without --extend "
                "finishes it"
            )
        since = self.before_decay(found)
        extension = Extension(found[-1] if since is None else since, config.max_steps)
        config = replace(config, max_steps=config.max_steps - config.extend + steps, extend=steps)
        return replace(self, config=config, horizons=(), extensions=(*self.extensions, extension))

    def with_horizon(self, since: int, max_steps: int) -> "RunRecord":
        """Return the record of a run whose length is `max_steps` from step `since` on."""
        config = replace(self.config, max_steps=max_steps)
        return replace(self, config=config, horizons=(*self.horizons, Horizon(since, max_steps)))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it is stored."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "generations": self.generations,
            "earlier": list(map(asdict, self.earlier)),
            "horizons": list(map(asdict, self.horizons)),
            "extensions": list(map(asdict, self.extensions)),
            "config": to_dict(self.config),
        }
        return stored_json.with_checksum(record)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as plain JSON values, the model's under "model"."""
    lists = {name: list(getattr(config, name)) for name in ("data", "sample_prompt")}
    return asdict(config) | lists | {"log_dir": str(config.log_dir)}


def from_dict(values: Any, where: str | Path = "config.json") -> TrainConfig:
    """Parse what `to_dict` returned; ValueError naming `where` for invalid or unknown settings."""
    return stored_json.build(TrainConfig, values, where, retired=NO_FIELDS)


def read_run(folder: Path) -> RunRecord | None:
    """Read the record of the run in `folder`; None if there is no run.

    Raises ValueError for a damaged record, one of another version, and checkpoints without one.
    """
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "checkpoints").is_dir():
            raise ValueError(f"{folder} has checkpoints but no config.json: {OTHER_RUN}")
        return None
    raw = stored_json.read(path, FORMAT, {VERSION}, OTHER_RUN)
    return stored_json.build(RunRecord, raw, path, retired=NO_FIELDS, remedy=OTHER_RUN)


def start_or_resume(requested: TrainConfig) -> tuple[RunRecord, Mixture]:
    """Return the record and the datasets of the run that `requested` starts or resumes.

    Raises ValueError, naming the first difference, if a run lies in the folder that `requested` or
    its datasets do not fit.
    """
    requested = _with_named_folder(requested)
    stored = read_run(requested.log_dir)
    if requested.extend and not stored:
        raise ValueError(f"expected a finished run in {requested.log_dir}, found none to --extend")
    if stored and requested.extend > stored.config.extend:
        moved = replace(stored.config, log_dir=requested.log_dir)
        stored = replace(stored, config=moved).extended(requested.extend)
    config = resume(stored.config, requested) if stored else requested
    if not requested.micro_batch and not fits_micro_batch(config, _world_size()):
        config = replace(config, micro_batch=0)  # measured for another number of ranks
    if not config.data:
        config = _with_only_dataset(config)
    if stored:
        dataset = Mixture.load(config.data, stored.generations, expect=stored.fingerprint)
    else:
        dataset = Mixture.load(config.data)
    if config.init_from and not stored:
        config = replace(config, model=_pretrained_shape(config))
        _check_vocabulary(config.init_from, dataset)
    elif config.model.vocab_size == GPTConfig.vocab_size and not stored:  # not given
        config = replace(config, model=replace(config.model, vocab_size=dataset.tokenizer.n_vocab))
    if dataset.tokenizer.n_vocab > config.model.vocab_size:
        raise ValueError(
            f"expected a vocabulary of at most {config.model.vocab_size}, the model's, found "
            f"{dataset.tokenizer.n_vocab} in {config.data[0]}: give --vocab-size "
            f"{dataset.tokenizer.n_vocab}"
        )
    if not stored:
        return RunRecord(config, dataset.fingerprint, dataset.generations), dataset
    record = replace(stored, config=config, generations=dataset.generations)
    if config.generation == "latest":
        return _advance_generation(record, dataset)
    return record, dataset


def set_aside_former_end(record: RunRecord) -> None:
    """Rename the checkpoints that an extended run made before, after the step it goes on from."""
    config = record.config
    for step in checkpoint.steps(config.log_dir) if record.extensions else ():
        folder = checkpoint.folder_of(config.log_dir, step)
        is_later = step > record.extensions[-1].since
        if is_later and checkpoint.read_state(folder)["config"].get("extend", 0) < config.extend:
            os.rename(folder, folder.with_name(f"{folder.name}.finished"))


def _with_named_folder(config: TrainConfig) -> TrainConfig:
    """Return the settings with the datasets' names for "{data}" in the name of the run's folder."""
    if "{data}" not in config.log_dir.name:
        return config
    config = config if config.data else _with_only_dataset(config)
    names = "-".join(component.name for component in parse_data_specs(config.data))
    name = config.log_dir.name.replace("{data}", names)
    return replace(config, log_dir=config.log_dir.with_name(name))


def _with_only_dataset(config: TrainConfig) -> TrainConfig:
    config = replace(config, data=(str(only_dataset()),))
    if os.environ.get("RANK", "0") == "0":
        print(f"no --data given: taking {config.data[0]}, the only dataset there")
    return config


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _pretrained_shape(config: TrainConfig) -> GPTConfig:
    """Return the shape of --init-from's model, with the run's dropout, cut to its block size."""
    shape = from_pretrained(config.init_from, dropout=config.model.dropout).config
    return replace(shape, block_size=min(shape.block_size, config.model.block_size))


def _check_vocabulary(init_from: str, dataset: Mixture) -> None:
    """Raise ValueError if --init-from's model has its tokenizer beside it, and it is another."""
    found = read_tokenizer(init_from)
    is_other = read_stored(dataset.manifests[0].location) is not None
    if not found and is_other and checkpoint.is_ours(Path(init_from)):
        found = tokenizer_beside(init_from)  # GPT-2's: only other ones are stored
    if found and found.identity != dataset.tokenizer:
        raise ValueError(
            f"expected a dataset in the vocabulary of {init_from}, {found.name}, found "
            f"{dataset.tokenizer.name} {dataset.tokenizer.hash[:12]}: prepare the text with "
            f"--tokenizer {init_from if found.name != GPT2 else GPT2}"
        )


def write(record: RunRecord, dataset: Mixture) -> None:
    """Write the record as `config.json`, and beside it the vocabulary, unless it is GPT-2's."""
    run_dir = record.config.log_dir
    content = read_stored(dataset.manifests[0].location)
    if content is not None and dataset.tokenizer.name != GPT2:
        with atomic_file(run_dir / TOKENIZER_NAME) as file:
            file.write(content)
    write_json(run_dir / "config.json", record.to_dict())


def _advance_generation(record: RunRecord, dataset: Mixture) -> tuple[RunRecord, Mixture]:
    """Move the record to the newest generation of every dataset, if any has grown."""
    latest = Mixture.load(record.config.data)
    if latest.fingerprint == dataset.fingerprint:
        return record, dataset
    until = max(checkpoint.newest_intact(record.config.log_dir)[0], 0)
    former = Earlier(until, record.fingerprint, record.generations)
    record = replace(record, fingerprint=latest.fingerprint, generations=latest.generations)
    return replace(record, earlier=(*record.earlier, former)), latest


def resume(stored: TrainConfig, requested: TrainConfig) -> TrainConfig:
    """Return the settings to resume a run with: as requested, where open as stored.

    Raises ValueError naming the first setting in which `requested` changes what is fixed.
    """
    if requested.init_from:  # the shape came from there and is not repeated on the command line
        block_size = min(requested.model.block_size, stored.model.block_size)
        shape = replace(stored.model, block_size=block_size, dropout=requested.model.dropout)
        requested = replace(requested, model=shape)
    if requested.model.vocab_size == GPTConfig.vocab_size:  # not given
        shape = replace(requested.model, vocab_size=stored.model.vocab_size)
        requested = replace(requested, model=shape)
    values = _flat(requested)
    if values["max_steps"] == stored.max_steps - stored.extend:  # its length before --extend
        values["max_steps"] = stored.max_steps
        requested = replace(requested, max_steps=stored.max_steps)
    for name, value in _flat(stored).items():
        is_open = name in UNRESOLVED and not values[name]
        if name not in FREE and not is_open and values[name] != value:
            raise _refusal(stored, requested, name, value, values[name])
    open_names = [name for name in UNRESOLVED if not values[name] and name != "stop_at"]
    resolved = {name: getattr(stored, name) for name in open_names}
    return replace(requested, data=requested.data or stored.data, **resolved)


def _flat(config: TrainConfig) -> dict[str, Any]:
    model = asdict(config.model)
    return model | {name: value for name, value in shallow(config).items() if name != "model"}


def _refusal(
    stored: TrainConfig, requested: TrainConfig, name: str, value: object, other: object
) -> ValueError:
    flag = name.replace("_", "-")
    remedy = f"--{flag} {value}"
    if value == "":
        value, remedy = "none", f"the command without --{flag}"
    elif isinstance(value, bool):
        remedy = f"--{flag}" if value else f"--no-{flag}"
    elif name in LENGTHS:
        remedy = f"--max-steps {stored.max_steps}"
    return ValueError(
        f"{requested.log_dir} holds a run with {name} {value}, this command asks for {other}: "
        f"give {remedy} to resume it, or another --log-dir"
    )


def check_ranks_agree(record: RunRecord, ranks: "DistributedContext") -> None:
    """Raise ValueError on all ranks, naming the first difference, if their records differ.

    Every rank has parsed its flags, config.json and manifests by itself; ranks with another seed or
    generation would train all the same, on sequences in another order.
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
    """Return what must be equal on all ranks; the name of a single dataset is its folder's."""
    generations = list(record.generations.values())
    datasets = {"dataset fingerprint": record.fingerprint[:12], "generations": generations}
    return datasets | {k: v for k, v in _flat(record.config).items() if k not in PER_HOST}


@dataclass(frozen=True)
class _Sample:
    step: int
    prompt: str
    text: str


def write_samples(run: Path, step: int, samples: Iterable[Mapping[str, str]]) -> None:
    """Append the samples drawn after `step` steps to RUN/samples.jsonl."""
    path = run / "samples.jsonl"
    end_torn_line(path)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)


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
