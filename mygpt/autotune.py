"""Settings found by measuring: `--micro-batch auto` and the steps that fit into `--time-budget`.

Each is measured once in the life of a run and then stored in config.json.

Where memory runs out with an error, on CUDA, micro-batches are tried with real passes through the
model. Elsewhere the system would kill the process instead: there a rule decides.
"""

import math
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
from mygpt.time_budget import BudgetClock
from mygpt.train_state import TrainState, build_train_state, save_checkpoint
from shards.mixture import Mixture

Result = TypeVar("Result")

# Tokens per micro-batch where nothing is tried. On a CPU core a token of the `tiny` model takes
# 16 % longer in micro-batches of 128 tokens than of 2,048, and 1 % less again in twice as many; a
# token of GPTConfigSmall takes as long in any.
UNTRIED_TOKENS = 2048
MIN_STEPS = 20  # for which a time budget must be enough: a step is then a twentieth of it at most
# Share of the budget, and least number of steps, to measure. "cosine" has this one calibration.
_MEASURED = {"cosine": (0.02, 3), "wsd": (0.002, 0)}
# Memory that a tried size may fill: validation, NCCL's buffers and fragmentation need the rest.
SHARE_OF_MEMORY = 0.9


def resolve(
    record: RunRecord,
    dataset: Mixture,
    ranks: DistributedContext,
    log: RunLog,
    stop: Stop,
    clock: BudgetClock,
    train_step: Callable[[TrainState, Stop], object],
    validate: Callable[[TrainState, Stop], object],
) -> RunRecord:
    """Return the record with micro-batch, number of steps and intervals resolved.

    Raises `Stopped` on a stop request while measuring, and ValueError if no micro-batch fits or
    too few steps fit into --time-budget.
    """
    record = resolve_micro_batch(record, dataset, ranks, log)
    config = record.config
    settings.grad_accum_steps(config, ranks.world_size)  # fail fast
    windows = None
    if len(dataset.manifests) == 1:
        windows = dataset.manifests[0].splits["train"].windows(config.model.block_size)
    if max_steps := settings.steps_of(config, windows):
        return replace(record, config=config.resolved(max_steps))
    log.write(f"measuring how many steps fit into {config.time_budget:g} seconds")
    trial = replace(record, config=config.resolved(max(1000, config.warmup_steps)))
    max_steps, validations = steps_in_budget(
        config,
        clock,
        lambda: build_train_state(trial, dataset, ranks),
        lambda state: train_step(state, stop),
        lambda state: validate(state, stop),
        log,
    )
    record = replace(record, config=config.resolved(max_steps, validations))
    return record.with_horizon(0, max_steps) if config.schedule == "wsd" else record


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
    clock: BudgetClock,
    build: Callable[[], TrainState],
    train_step: Callable[[TrainState], object],
    validate: Callable[[TrainState], object],
    log: RunLog,
) -> tuple[int, int]:
    """Return the steps and validations that fit into --time-budget, the same on all ranks.

    Measured on states that `build` makes and that are thrown away. What a process pays once, such
    as compilation, is paid first; then a start, some steps, a validation and a checkpoint are
    timed. A "wsd" run corrects the number later, so little is measured. Raises ValueError as soon
    as it shows that less than `MIN_STEPS` fit.
    """
    state, start_seconds = build(), 0.0
    ranks = state.ranks
    _check_budget(config, clock, ranks, _estimate_step(state))
    train_step(state)
    if ranks.device.type == "cuda":
        validate(state)
    if config.schedule == "cosine":
        del state  # there may be no room for two

        def start() -> TrainState:
            state = build()
            train_step(state)
            return state

        start_seconds, state = _timed(start)

    def validate_and_save() -> None:
        validate(state)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, Path(folder), None)

    step_seconds, _ = _timed(lambda: train_step(state))
    _check_budget(config, clock, ranks, step_seconds)
    # All ranks must take equally many steps: rank 0 decides, here and below.
    share, least = _MEASURED[config.schedule]
    count = ranks.broadcast_object(int(share * config.time_budget / step_seconds))
    more = [_timed(lambda: train_step(state))[0] for _ in range(max(least, min(count, 100)))]
    step_seconds = median([step_seconds, *more])
    log.write(f"a step takes {step_seconds:.3g} s, now measuring a validation and a checkpoint")
    round_seconds, _ = _timed(validate_and_save)
    left = clock.left() - start_seconds
    validations = validations_that_fit(left, round_seconds)
    steps = steps_that_fit(left, step_seconds, round_seconds, config.val_interval, validations)
    log.write(f"these take {round_seconds:.3g} s: about {steps} steps fit")
    if config.schedule == "wsd":
        steps = max(steps, MIN_STEPS)
        if ranks.is_main:
            clock.begin(round_seconds)
    return ranks.broadcast_object((steps, validations))


def _estimate_step(state: TrainState) -> float:
    """Return the seconds of a step, extrapolated from a pass of one micro-batch."""
    size, device = state.config.micro_batch, state.ranks.device
    seconds, _ = _timed(lambda: _fits(state.model, size, device))
    if device.type == "cuda" or seconds < 10:  # a first pass compiles, or allocates memory
        seconds, _ = _timed(lambda: _fits(state.model, size, device))
    state.zero_grad()
    return seconds * state.grad_accum_steps


def _check_budget(
    config: TrainConfig, clock: BudgetClock, ranks: DistributedContext, step_seconds: float
) -> None:
    """Raise ValueError, on all ranks, if less than `MIN_STEPS` steps fit into the time left."""
    step_seconds, left = ranks.broadcast_object((step_seconds, clock.left()))
    if MIN_STEPS * step_seconds > left:
        least = math.ceil(1.25 * MIN_STEPS * step_seconds + config.time_budget - left)
        raise ValueError(
            f"one step takes about {step_seconds:.2g} s here: --time-budget "
            f"{config.time_budget:g} is too short for {MIN_STEPS} steps; give --time-budget "
            f"{least}, a --total-batch-size below {config.total_batch_size}, or a smaller model: "
            "the preset tiny is for CPUs"
        )


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def validations_that_fit(seconds: float, round_seconds: float) -> int:
    """Return the number of validations of a run of `seconds`, each taking `round_seconds`.

    At least 1; `VALIDATIONS` unless they would take more than a fifth of the time.
    """
    most = 0.2 * max(0.0, seconds)
    return max(1, min(VALIDATIONS, int(most / round_seconds) if round_seconds else VALIDATIONS))


def steps_that_fit(
    seconds: float,
    step_seconds: float,
    round_seconds: float,
    val_interval: int,
    validations: int = VALIDATIONS,
) -> int:
    """Return how many steps fit into `seconds`, at least 1, leaving a twentieth of it unused.

    `round_seconds`: a validation with its checkpoint, once per `val_interval` steps or, if that is
    0, `validations` times in the run.
    """
    if not val_interval:
        return max(1, int((0.95 * seconds - validations * round_seconds) / step_seconds))
    return max(1, int(0.95 * seconds / (step_seconds + round_seconds / val_interval)))
