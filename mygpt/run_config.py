"""`RUN/config.json`: the settings and datasets of a run, and what a resume may change.

    {"format": "mygpt-run", "version": 2, "fingerprint": "0a1b...", "generations": {"web": 0},
     "earlier": [], "horizons": [], "checksum": "51c0...",
     "config": {"max_steps": 700, "seed": 1337, ..., "model": {"n_layers": 4, ...}}}

Written before the first step with everything resolved: what was measured (micro-batch, number of
steps) is measured once in the life of a run (promise 7). A length that the clock decides on the way
(`mygpt/time_budget.py`) is added to "horizons" before the first step that it concerns.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mygpt import checkpoint
from mygpt.config import GPTConfig
from mygpt.schedule import Horizon, wsd_coefficient
from mygpt.settings import LENGTHS, RETIRED, UNRESOLVED, TrainConfig, shallow
from shards import stored_json
from shards.files import atomic_file, write_json
from shards.mixture import Earlier, Mixture
from shards.tokenizer import GPT2, read_stored
from shards.vocabulary import TOKENIZER_NAME

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

    def prune(self, run_dir: Path) -> None:
        """Remove the checkpoints of a folder but for those to keep; the last before a decay is."""
        before_decay = self.before_decay(checkpoint.steps(run_dir))
        checkpoint.prune(run_dir, self.config.keep, self.config.keep_every, before_decay)

    def lacks_validation(self, step: int) -> bool:
        """Return whether the checkpoint of `step` was saved before its validation was finished."""
        config = self.config
        if step < 1 or (step % config.val_interval and step != config.max_steps):
            return False
        return checkpoint.read_state(checkpoint.folder_of(config.log_dir, step))["val_loss"] is None

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
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return stored_json.with_checksum(record | {"config": to_dict(self.config)})


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


def write(record: RunRecord, dataset: Mixture) -> None:
    """Write the record as `config.json`, and beside it the vocabulary, unless it is GPT-2's."""
    run_dir = record.config.log_dir
    content = read_stored(dataset.manifests[0].location)
    if content is not None and dataset.tokenizer.name != GPT2:
        with atomic_file(run_dir / TOKENIZER_NAME) as file:
            file.write(content)
    write_json(run_dir / "config.json", record.to_dict())


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
    values = flat(requested)
    if values["max_steps"] == stored.max_steps - stored.extend:  # its length before --extend
        values["max_steps"] = stored.max_steps
        requested = replace(requested, max_steps=stored.max_steps)
    for name, value in flat(stored).items():
        is_open = name in UNRESOLVED and not values[name]
        if name not in FREE and not is_open and values[name] != value:
            raise _refusal(stored, requested, name, value, values[name])
    open_names = [name for name in UNRESOLVED if not values[name] and name != "stop_at"]
    resolved = {name: getattr(stored, name) for name in open_names}
    return replace(requested, data=requested.data or stored.data, **resolved)


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return {setting: value}, those of the model among them."""
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
