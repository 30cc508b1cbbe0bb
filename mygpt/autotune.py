"""Settings found by measuring: `--micro-batch auto` and the steps that fit into `--time-budget`.

Each is measured once in the life of a run and then stored in config.json.

Where memory runs out with an error, on CUDA, micro-batches are tried with real passes through the
model. Elsewhere the system would kill the process instead: there a rule decides.
"""

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from mygpt import optim, settings
from mygpt.distributed import DistributedContext, autocast
from mygpt.log import RunLog
from mygpt.model import GPT
from mygpt.run_config import RunRecord
from mygpt.settings import VALIDATIONS, TrainConfig
from mygpt.stopping import Stop
from mygpt.train_state import TrainState, build_train_state, save_checkpoint
from shards.mixture import Mixture

Result = TypeVar("Result")

# Tokens per micro-batch where nothing is tried. On a CPU core a token of the `tiny` model takes
# 16 % longer in micro-batches of 128 tokens than of 2,048, and 1 % less again in twice as many; a
# token of GPTConfigSmall takes as long in any.
UNTRIED_TOKENS = 2048
# Memory that a tried size may fill: validation, NCCL's buffers and fragmentation need the rest.
SHARE_OF_MEMORY = 0.9


def resolve(
    record: RunRecord,
    dataset: Mixture,
    ranks: DistributedContext,
    log: RunLog,
    stop: Stop,
    train_step: Callable[[TrainState, Stop], object],
    validate: Callable[[TrainState, Stop], object],
) -> RunRecord:
    """Return the record with micro-batch, number of steps and intervals resolved.

    Raises `Stopped` on a stop request while measuring, and ValueError if no micro-batch fits.
    """
    record = resolve_micro_batch(record, dataset, ranks, log)
    config = record.config
    settings.grad_accum_steps(config, ranks.world_size)  # fail fast
    windows = None
    if len(dataset.manifests) == 1:
        shards = dataset.manifests[0].splits["train"].shards
        windows = sum(shard.windows(config.model.block_size) for shard in shards)
    max_steps = settings.steps_of(config, windows)
    if not max_steps:
        log.write(f"measuring how many steps fit into {config.time_budget:g} seconds")
        trial = replace(record, config=config.resolved(max(1000, config.warmup_steps)))
        max_steps = steps_in_budget(
            config,
            lambda: build_train_state(trial, dataset, ranks),
            lambda state: train_step(state, stop),
            lambda state: validate(state, stop),
        )
    return replace(record, config=config.resolved(max_steps))


def resolve_micro_batch(
    record: RunRecord, dataset: Mixture, ranks: DistributedContext, log: RunLog
) -> RunRecord:
    """Return the record with `--micro-batch auto` replaced by the largest that fits every rank."""
    config = record.config
    if config.micro_batch:
        return record
    sizes = micro_batch_sizes(config.total_batch_size, config.model.block_size, ranks.world_size)
    if ranks.device.type == "cuda":
        log.write("trying which micro-batch fits into memory")
        # Uncompiled, a model needs the most memory.
        trial = replace(config, micro_batch=sizes[0], compile=False)
        state = build_train_state(replace(record, config=trial), dataset, ranks)
        size = by_trying(state.model, state.optimizers, sizes, ranks, state.own_parameters)
    else:
        size = by_rule(sizes, config.model.block_size)
    return replace(record, config=replace(config, micro_batch=size))


def micro_batch_sizes(total_batch_size: int, block_size: int, world_size: int) -> list[int]:
    """Return, ascending, the micro-batches that divide a rank's part of a step.

    Raises ValueError if the step's tokens don't divide among that many ranks.
    """
    sequence_tokens = block_size * world_size
    sequences, rest = divmod(total_batch_size, sequence_tokens)
    if rest or not sequences:
        raise ValueError(
            f"--total-batch-size must be a multiple of block_size * ranks = {block_size} * "
            f"{world_size} = {sequence_tokens}, got {total_batch_size}: nearest is "
            f"{max(sequence_tokens, total_batch_size - rest)}"
        )
    return [size for size in range(1, sequences + 1) if sequences % size == 0]


def by_rule(sizes: Sequence[int], block_size: int) -> int:
    """Return the largest size of at most `UNTRIED_TOKENS` tokens; the first if there is none."""
    return max((size for size in sizes if size * block_size <= UNTRIED_TOKENS), default=sizes[0])


def by_trying(
    model: GPT,
    optimizers: Sequence[Optimizer],
    sizes: Sequence[int],
    ranks: DistributedContext,
    own: Collection[Tensor] | None = None,
) -> int:
    """Return the largest of ascending sizes with which no rank runs out of memory.

    `own`: the parameters whose optimizer state lies on this rank; None: all. Model and optimizers
    are of no further use afterwards. Raises ValueError if not even the first size fits.
    """

    def on_all_ranks(fits: bool) -> bool:
        return ranks.all_reduce_sum([fits])[0] == ranks.world_size

    with _limited_memory(ranks.device):
        # A step needs everything at once: the optimizer state is allocated first, and the first
        # size is tried a second time when the gradients, which stay, are allocated.
        fitting = []
        if on_all_ranks(_fits_optimizer_state(optimizers, model, own)):
            attempts = [sizes[0], *sizes]
            fits = lambda size: on_all_ranks(_fits(model, size, ranks.device))  # noqa: E731
            fitting = list(takewhile(fits, attempts))[1:]
    if not fitting:
        raise ValueError(
            f"not even --micro-batch {sizes[0]} fits into the memory of {ranks.device}: give "
            "--gradient-checkpointing, --shard optimizer or full, or take a smaller model"
        )
    return fitting[-1]


def _fits(model: GPT, micro_batch: int, device: torch.device) -> bool:
    """Try a forward and a backward pass; without communication, since a rank may fail alone."""
    shape = (micro_batch, model.config.block_size + 1)
    try:
        tokens = torch.randint(model.config.vocab_size, shape, device=device)  # (B, T + 1)
        with autocast(device):
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    except torch.OutOfMemoryError:
        return False
    return True


def _fits_optimizer_state(
    optimizers: Sequence[Optimizer], model: GPT, own: Collection[Tensor] | None
) -> bool:
    """Try to allocate the optimizer state of `own`, and keep it."""
    try:
        optim.allocate_state(optimizers, model, own)
    except torch.OutOfMemoryError:
        return False
    return True


@contextmanager
def _limited_memory(device: torch.device) -> Iterator[None]:
    """Let CUDA run out of memory at `SHARE_OF_MEMORY`, and free what was tried at the end."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def steps_in_budget(
    config: TrainConfig,
    build: Callable[[], TrainState],
    train_step: Callable[[TrainState], object],
    validate: Callable[[TrainState], object],
) -> int:
    """Return how many steps fit into --time-budget, the same on all ranks.

    Measured on states that `build` makes and that are thrown away. What a process pays once, such
    as compilation, is paid first; then a start, steps for a fiftieth of the budget, a validation
    and a checkpoint are timed.
    """
    started = time.perf_counter()
    state = build()
    train_step(state)
    validate(state)
    del state  # there may be no room for two

    def start() -> TrainState:
        state = build()
        train_step(state)
        return state

    def validate_and_save() -> None:
        validate(state)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, Path(folder), None)

    start_seconds, state = _timed(start)
    step_seconds, _ = _timed(lambda: train_step(state))
    # All ranks must take the same number of steps: rank 0 decides.
    count = state.ranks.broadcast_object(int(config.time_budget / 50 / step_seconds))
    step_seconds = median(
        _timed(lambda: train_step(state))[0] for _ in range(max(3, min(count, 100)))
    )
    round_seconds, _ = _timed(validate_and_save)
    left = config.time_budget - (time.perf_counter() - started) - start_seconds
    return state.ranks.broadcast_object(
        steps_that_fit(left, step_seconds, round_seconds, config.val_interval)
    )


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def steps_that_fit(
    seconds: float, step_seconds: float, round_seconds: float, val_interval: int
) -> int:
    """Return how many steps fit into `seconds`, at least 1, leaving a twentieth of it unused.

    `round_seconds`: a validation with its checkpoint, once per `val_interval` steps or, if that is
    0, `VALIDATIONS` times in the run.
    """
    if not val_interval:
        return max(1, int((0.95 * seconds - VALIDATIONS * round_seconds) / step_seconds))
    return max(1, int(0.95 * seconds / (step_seconds + round_seconds / val_interval)))
