"""The largest micro-batch that fits: `train.py --micro-batch auto`.

Where memory runs out with an error, on CUDA, sizes are tried with real passes through the model.
Elsewhere the system would rather end the process: there a rule decides, and speed decided the rule.
"""

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.optim import Optimizer

from mygpt import optim, settings
from mygpt.distributed import Ranks, autocast
from mygpt.model import GPT
from mygpt.step import train_step, validate
from mygpt.stopping import Stop
from mygpt.train_state import Job, save

# Tokens in a micro-batch where nothing is tried. On a CPU core a token of the `tiny` model takes
# 16 % longer in batches of 128 than of 2,048, and 1 % less again in twice as many; of
# GPTConfigSmall it takes as long in any batch.
UNTRIED_TOKENS = 2048
# What tried sizes may fill, so that validation, NCCL's buffers and fragments have room beside them.
SHARE_OF_MEMORY = 0.9


def sizes(total_batch_size: int, block_size: int, world_size: int) -> list[int]:
    """The micro-batches, in rows and ascending, that make up a rank's part of a step exactly.

    Raises ValueError if the step's tokens can't be shared out over that many ranks.
    """
    row_tokens = block_size * world_size
    rows, rest = divmod(total_batch_size, row_tokens)
    if rest or not rows:
        raise ValueError(
            f"--total-batch-size must be a multiple of block_size * ranks = {block_size} * "
            f"{world_size} = {row_tokens}, got {total_batch_size}: nearest is "
            f"{max(row_tokens, total_batch_size - rest)}"
        )
    return [size for size in range(1, rows + 1) if rows % size == 0]


def by_rule(sizes: Sequence[int], block_size: int) -> int:
    """The largest of ascending sizes with at most `UNTRIED_TOKENS` tokens; if none, the first."""
    return max((size for size in sizes if size * block_size <= UNTRIED_TOKENS), default=sizes[0])


def by_trying(
    model: GPT,
    optimizers: Sequence[Optimizer],
    sizes: Sequence[int],
    ranks: Ranks,
    own: Collection[Tensor] | None = None,
) -> int:
    """The largest of ascending sizes with which no rank runs out of memory, the same on all.

    Optimizers will remember something of the parameters in `own`; of all, if None. They and the
    model are of no further use afterwards. The model should be uncompiled: compiled it needs less.
    Raises ValueError if not even the first size fits.
    """

    def fits(rows: int) -> bool:
        # No rank talks to others while it may run out: they would wait for it.
        return ranks.all_reduce_sum([has_room(model, rows, ranks.device)])[0] == ranks.world_size

    with _less_memory(ranks.device):
        # A step has all of it at once: the optimizers fill their part first, and the first size is
        # tried once more when the gradients are there, which stay.
        begun = (
            ranks.all_reduce_sum([has_room_for_state(optimizers, model, own)])[0]
            == ranks.world_size
        )
        fitting = list(takewhile(fits, [sizes[0], *sizes]))[1:] if begun else []
    if not fitting:
        raise ValueError(
            f"not even --micro-batch {sizes[0]} fits into the memory of {ranks.device}: give "
            "--gradient-checkpointing, --shard optimizer or full, or take a smaller model"
        )
    return fitting[-1]


def has_room(model: GPT, rows: int, device: torch.device) -> bool:
    """Whether a forward and a backward pass over that many full rows fit into memory."""
    shape = (rows, model.config.block_size + 1)
    try:
        tokens = torch.randint(model.config.vocab_size, shape, device=device)  # (B, T + 1)
        with autocast(device):
            _, loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
    except torch.OutOfMemoryError:
        return False
    return True


def has_room_for_state(
    optimizers: Sequence[Optimizer], model: GPT, own: Collection[Tensor] | None
) -> bool:
    """Whether what optimizers remember of those parameters fits into memory; if so, it is there."""
    try:
        optim.allocate_state(optimizers, model, own)
    except torch.OutOfMemoryError:
        return False
    return True


@contextmanager
def _less_memory(device: torch.device) -> Iterator[None]:
    """Inside the block, memory runs out early; after it, nothing that was tried is kept."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(SHARE_OF_MEMORY, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


# --- How many steps fit into --time-budget, measured before a run on a copy that is thrown away.


def measured_steps(build: Callable[[], Job], stop: Stop) -> int:
    """The steps that fit, the same on all ranks. `build` makes the copy.

    It pays once for all that a run pays for at its start, then takes steps for a fiftieth of the
    budget, then validates and writes a checkpoint. What it learned, drew and read goes with it.
    """
    begun = time.perf_counter()
    job = build()
    config = job.config
    train_step(job, stop)
    start_seconds = time.perf_counter() - begun

    def seconds_of_step() -> float:
        started = time.perf_counter()
        train_step(job, stop)
        return time.perf_counter() - started

    # Every rank must take as many steps as the others, so the main one decides how many.
    count = job.ranks.broadcast_object(int(config.time_budget / 50 / seconds_of_step()))
    step_seconds = median(seconds_of_step() for _ in range(max(3, min(count, 100))))
    started = time.perf_counter()
    validate(job, stop)
    with tempfile.TemporaryDirectory() as folder:
        save(job, Path(folder), None)
    round_seconds = time.perf_counter() - started
    left = config.time_budget - (time.perf_counter() - begun) - start_seconds
    return job.ranks.broadcast_object(
        settings.steps_that_fit(left, step_seconds, round_seconds, config.val_interval)
    )
