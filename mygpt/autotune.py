"""`--micro-batch auto`: found once in the life of a run, and then stored in config.json.

Where memory runs out with an error, on CUDA, micro-batches are tried with real passes through the
model. Elsewhere the system would kill the process instead: there a rule decides.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor
from torch.optim import Optimizer

from mygpt import optim
from mygpt.distributed import DistributedContext
from mygpt.log import RunLog
from mygpt.model import GPT
from mygpt.run_config import RunRecord
from mygpt.schedule import grad_accum_steps, micro_batch_sizes
from mygpt.train_state import build_train_state, trial_pass
from shards.mixture import Mixture

# Tokens per micro-batch where nothing is tried. On a CPU core a token of the `tiny` model takes
# 16 % longer in micro-batches of 128 tokens than of 2,048, and 1 % less again in twice as many; a
# token of GPTConfigSmall takes as long in any.
UNTRIED_TOKENS = 2048
# Memory that a tried size may fill: validation, NCCL's buffers and fragmentation need the rest.
SHARE_OF_MEMORY = 0.9


def resolve_micro_batch(
    record: RunRecord, dataset: Mixture, ranks: DistributedContext, log: RunLog
) -> RunRecord:
    """Return the record with `--micro-batch auto` replaced by the largest that fits every rank.

    Raises ValueError if none fits, or if a step does not divide into micro-batches.
    """
    config = record.config
    if config.micro_batch:
        grad_accum_steps(config, ranks.world_size)  # fail fast
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
    try:
        trial_pass(model, micro_batch, device)
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
