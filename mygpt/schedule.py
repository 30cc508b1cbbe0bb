"""Arithmetic of a run: its length in steps, micro-batches per step, the learning rate of each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mygpt.settings import TrainConfig

_DECAY_FRACTION = 0.5  # part of a "wsd" run over which the learning rate falls


@dataclass(frozen=True)
class Horizon:
    """The length of a run, `max_steps`, as it was fixed before step `since`."""

    since: int
    max_steps: int


def learning_rate(step: int, config: TrainConfig, horizons: Sequence[Horizon] = ()) -> float:
    """Return the learning rate of step `step`, counted from 0.

    It rises linearly to max_lr during the warm-up. "cosine" then falls along half a cosine until
    max_steps, as for GPT-3; "wsd" (warm-up, stable, decay; MiniCPM, section 4) stays at max_lr and
    falls linearly over the last half of the steps. From max_steps on the rate is min_lr.
    `horizons`: those of a "wsd" run whose length was revised on its way; max_steps is the last.
    """
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    if step >= config.max_steps:
        return config.min_lr
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        coeff = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        coeff = wsd_coefficient(step, horizons or [Horizon(0, config.max_steps)])
    return config.min_lr + coeff * (config.max_lr - config.min_lr)


def wsd_coefficient(step: int, horizons: Sequence[Horizon]) -> float:
    """Return the height of a "wsd" schedule after its warm-up, from 1 down to 0.

    The decay begins at half of the horizon in force. From then on a new horizon changes its slope,
    and never raises the learning rate.
    """
    passed = [h for h in horizons if h.since <= step]
    coeff = 1.0
    for horizon, until in zip(passed, [*(h.since for h in passed[1:]), step], strict=True):
        begins: float = horizon.since
        if coeff == 1.0:
            begins = max(begins, (1 - _DECAY_FRACTION) * horizon.max_steps)
        left = (horizon.max_steps - until) / (horizon.max_steps - begins)
        coeff *= min(1.0, max(0.0, left))
    return coeff


def steps_of(config: TrainConfig, windows: Sequence[int]) -> int:
    """Convert --max-steps, --max-tokens or --epochs to steps, rounded up; 0 for --time-budget.

    `windows`: those of an epoch, by dataset. Each dataset of a mixture has epochs of its own, so
    --epochs is a ValueError for several of them.
    """
    if config.max_steps or config.max_tokens:
        return config.max_steps or math.ceil(config.max_tokens / config.total_batch_size)
    if not config.epochs:
        return 0
    if len(windows) > 1:
        raise ValueError("--epochs is not defined for several datasets: give --max-tokens instead")
    tokens = config.epochs * windows[0] * config.model.block_size
    # Rounded before ceil: 0.1 * 300 is a little more than 30.
    return math.ceil(round(tokens / config.total_batch_size, 6))


def fits_micro_batch(config: TrainConfig, world_size: int) -> bool:
    """Return whether a step divides into whole micro-batches on this many ranks."""
    tokens = config.micro_batch * config.model.block_size * world_size
    return not tokens or config.total_batch_size % tokens == 0


def grad_accum_steps(config: TrainConfig, world_size: int) -> int:
    """Return total_batch_size / (micro_batch * block_size * world_size): micro-batches per step.

    Raises ValueError with the nearest valid values if this is not an integer.
    """
    sequence_tokens = config.model.block_size * world_size
    micro_tokens = config.micro_batch * sequence_tokens
    steps, rest = divmod(config.total_batch_size, micro_tokens)
    if not rest:
        return steps
    below = config.total_batch_size - rest
    nearest = f"{below} or {below + micro_tokens}" if below else f"{micro_tokens}"
    message = (
        f"--total-batch-size must be a multiple of micro_batch * block_size * ranks = "
        f"{config.micro_batch} * {config.model.block_size} * {world_size} = {micro_tokens}, got "
        f"{config.total_batch_size}: nearest are {nearest}"
    )
    sequences, rest = divmod(config.total_batch_size, sequence_tokens)
    if not rest:
        most = min(config.micro_batch, sequences)
        fits = next(m for m in range(most, 0, -1) if sequences % m == 0)
        message += f"; or keep it and give --micro-batch {fits}"
    raise ValueError(message)


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
