"""Start or resume: the record and the datasets of the run that a command asks for, or a refusal.

`start_or_resume` writes nothing, and what follows waits until all ranks agree: a mistyped command
leaves a run as it was.
"""

import os
from dataclasses import replace
from typing import Any

from mygpt import checkpoint, run_config
from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext
from mygpt.log import RunLog
from mygpt.pretrained import check_vocabulary, from_pretrained
from mygpt.run_config import RunRecord, flat, read_run, resume
from mygpt.schedule import fits_micro_batch
from mygpt.settings import TrainConfig, only_dataset
from shards.mixture import Earlier, Mixture, parse_data_specs

# Settings that may differ between the hosts of one run.
PER_HOST = {"model", "data", "log_dir", "device"}


def start_or_resume(requested: TrainConfig) -> tuple[RunRecord, Mixture]:
    """Return the record and the datasets of the run that `requested` starts or resumes.

    Raises ValueError, naming the first difference, if a run lies in the folder that `requested` or
    its datasets do not fit.
    """
    requested = _with_named_folder(requested)
    stored = read_run(requested.log_dir)
    return _resume(stored, requested) if stored else _start(requested)


def _start(config: TrainConfig) -> tuple[RunRecord, Mixture]:
    """Return the record of a new run; the model's shape, or its vocabulary, follows other files."""
    if config.extend:
        raise ValueError(f"expected a finished run in {config.log_dir}, found none to --extend")
    config = config if config.data else _with_only_dataset(config)
    dataset = Mixture.load(config.data)
    if config.init_from:
        config = replace(config, model=_pretrained_shape(config))
        check_vocabulary(config.init_from, dataset.tokenizer)
    elif config.model.vocab_size == GPTConfig.vocab_size:  # not given
        config = replace(config, model=replace(config.model, vocab_size=dataset.tokenizer.n_vocab))
    if dataset.tokenizer.n_vocab > config.model.vocab_size:
        raise ValueError(
            f"expected a vocabulary of at most {config.model.vocab_size}, the model's, found "
            f"{dataset.tokenizer.n_vocab} in {config.data[0]}: give --vocab-size "
            f"{dataset.tokenizer.n_vocab}"
        )
    return RunRecord(config, dataset.fingerprint, dataset.generations), dataset


def _resume(stored: RunRecord, requested: TrainConfig) -> tuple[RunRecord, Mixture]:
    """Return the record of a run that is there, with what `requested` may change changed."""
    if requested.extend > stored.config.extend:
        moved = replace(stored.config, log_dir=requested.log_dir)
        stored = replace(stored, config=moved).extended(requested.extend)
    config = resume(stored.config, requested)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not requested.micro_batch and not fits_micro_batch(config, world_size):
        config = replace(config, micro_batch=0)  # measured for another number of ranks
    dataset = Mixture.load(config.data, stored.generations, expect=stored.fingerprint)
    return replace(stored, config=config, generations=dataset.generations), dataset


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


def _pretrained_shape(config: TrainConfig) -> GPTConfig:
    """Return the shape of --init-from's model, with the run's dropout, cut to its block size."""
    shape = from_pretrained(config.init_from, dropout=config.model.dropout).config
    return replace(shape, block_size=min(shape.block_size, config.model.block_size))


def check_ranks_agree(record: RunRecord, ranks: DistributedContext) -> None:
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
    return datasets | {k: v for k, v in flat(record.config).items() if k not in PER_HOST}


def find_checkpoint(
    record: RunRecord, dataset: Mixture, ranks: DistributedContext, log: RunLog
) -> int:
    """Return the step to resume from, that of the newest checkpoint that is whole; -1 without one.

    The same on all ranks. Raises ValueError on all of them if every checkpoint is damaged.
    """
    if ranks.is_main and record.extensions:
        run_config.write(record, dataset)
        set_aside_former_end(record)
    newest, faults = checkpoint.agree_on_newest(record.config.log_dir, ranks)
    log.write(*(f"skipped a damaged checkpoint: {fault}" for fault in faults))
    return newest


def set_aside_former_end(record: RunRecord) -> None:
    """Rename the checkpoints that an extended run made before, after the step it goes on from."""
    config = record.config
    for step in checkpoint.steps(config.log_dir):
        folder = checkpoint.folder_of(config.log_dir, step)
        is_later = step > record.extensions[-1].since
        if is_later and checkpoint.read_state(folder)["config"].get("extend", 0) < config.extend:
            os.rename(folder, folder.with_name(f"{folder.name}.finished"))


def advance_generation(
    record: RunRecord, dataset: Mixture, newest: int, ranks: DistributedContext
) -> tuple[RunRecord, Mixture]:
    """Return the record and the datasets of --generation latest: all that they have grown to.

    The record notes that up to step `newest` the run read the generation of before. Raises
    ValueError on all ranks if they find different generations.
    """
    if record.config.generation != "latest":
        return record, dataset
    latest = Mixture.load(record.config.data)
    if latest.fingerprint != dataset.fingerprint:
        former = Earlier(max(newest, 0), record.fingerprint, record.generations)
        record = replace(record, fingerprint=latest.fingerprint, generations=latest.generations)
        record = replace(record, earlier=(*record.earlier, former))
    check_ranks_agree(record, ranks)
    return record, latest


def write_record(
    record: RunRecord, dataset: Mixture, newest: int, ranks: DistributedContext
) -> None:
    """Write config.json, from which a resume follows, and leave the checkpoints up to `newest`."""
    if ranks.is_main:
        run_dir = record.config.log_dir
        checkpoint.set_aside(run_dir, after=newest)  # damaged: their steps are trained again
        run_config.write(record, dataset)
        record.prune(run_dir)
    ranks.barrier()
