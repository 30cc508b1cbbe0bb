"""Exact losses over windows of tokens, independent of batch size and number of ranks.

A window is an array of 2 to block_size + 1 token ids: all but the last are inputs, all but the
first are targets.

Shapes: B windows of a batch, T block size.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mygpt.distributed import DistributedContext, autocast, has_fixed_shapes, padded_length
from mygpt.loss import IGNORED
from mygpt.model import GPT

Item = TypeVar("Item")


@dataclass(frozen=True)
class Loss:
    """Sum of the losses, in nats, of `tokens` targets."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Return bits per byte of the text; the targets <|endoftext|> count, but have no bytes."""
        return self.nats / math.log(2) / text_bytes


def evaluate(
    model: GPT,
    windows: Sequence[np.ndarray],
    ranks: DistributedContext,
    batch_size: int | None = None,
) -> Loss:
    """Return the loss over every target of every window once; the same on all ranks.

    Ranks take batches in turn and sum in float64. `batch_size`, in windows, only affects speed.
    The model's train or eval mode is restored. Raises ValueError if there are no windows.
    """
    nats, tokens = 0.0, 0
    for _, losses, counted in token_losses(model, windows, ranks, batch_size):
        nats += losses.sum().item()
        tokens += int(counted.sum())
    total_nats, total_tokens = ranks.all_reduce_sum([nats, tokens])
    return Loss(total_nats, round(total_tokens))


def token_losses(
    model: GPT,
    windows: Sequence[np.ndarray],
    ranks: DistributedContext,
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
    """Yield this rank's batches: window indices, nats (B, T) and the mask of real targets (B, T).

    Nats are float64, 0 where the mask is False. A batch that does not fit into a GPU's memory is
    halved, and so are those that follow. Raises ValueError if there are no windows.
    """
    if not len(windows):
        raise ValueError("no windows to evaluate: the split is empty, prepare more text")
    size = batch_size or default_batch_size(model.config.block_size, ranks.device)
    firsts = range(ranks.rank * size, len(windows), ranks.world_size * size)
    shown = progress_bar(firsts, progress and ranks.is_main)
    batches = (range(first, min(first + size, len(windows))) for first in shown)
    launched = _launch(model, windows, batches, size, ranks)
    # One batch ahead, so that a GPU computes the next while this one's losses are summed.
    current = next(launched, None)
    while current is not None:
        following = next(launched, None)
        batch, losses, counted = current
        yield batch, losses.cpu().double().numpy(), counted
        current = following


def _launch(
    model: GPT,
    windows: Sequence[np.ndarray],
    batches: Iterable[range],
    size: int,
    ranks: DistributedContext,
) -> Iterator[tuple[range, Tensor, np.ndarray]]:
    """Yield the same with losses on the device, possibly not yet computed."""
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            while batch:
                part = batch[:size]
                idx, targets = _padded(model, [windows[i] for i in part], size, ranks.device)
                here = (torch.from_numpy(ids).to(ranks.device) for ids in (idx, targets))
                try:
                    with torch.inference_mode(), autocast(ranks.device):
                        losses = model.token_losses(*here)  # (B, T), or `size` rows
                except torch.cuda.OutOfMemoryError:
                    if len(idx) == 1:
                        raise
                    size = len(idx) // 2
                    continue
                yield part, losses[: len(part)], targets[: len(part)] != IGNORED
                batch = batch[len(part) :]
    finally:
        model.train(was_training)


def default_batch_size(block_size: int, device: torch.device) -> int:
    """Return windows per batch: enough to keep the device busy, few enough for any memory."""
    return max(1, (4096 if device.type == "cpu" else 65536) // block_size)


def progress_bar(items: Sequence[Item], enabled: bool) -> Iterable[Item]:
    """Return the items, with a progress bar on the terminal if `enabled`."""
    return tqdm(items, desc="evaluating", leave=False, delay=2) if enabled else items


def _padded(
    model: GPT, windows: Sequence[np.ndarray], size: int, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets (B, T), with fixed shapes of `size` rows."""
    rows = size if has_fixed_shapes(device) else len(windows)
    columns = padded_length(max(map(len, windows)) - 1, model.config.block_size, device)
    idx = np.zeros((rows, columns), dtype=np.int64)
    targets = np.full((rows, columns), IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        idx[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    return idx, targets


def unigram_loss(train_counts: np.ndarray, windows: Iterable[np.ndarray]) -> Loss:
    """Return the loss of a unigram model, add-one smoothed, on the targets of `windows`.

    `train_counts` holds a count per token id.
    """
    targets = np.zeros(len(train_counts), dtype=np.int64)
    for chunk in _chunks(windows):
        targets += np.bincount(chunk, minlength=len(train_counts))
    smoothed = train_counts.astype(np.float64) + 1
    surprise = np.log(smoothed.sum()) - np.log(smoothed)
    return Loss(float(targets @ surprise), int(targets.sum()))


def _chunks(windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the targets of 1,024 windows at a time: each bincount costs a whole vocabulary."""
    held: list[np.ndarray] = []
    for window in windows:
        held.append(window[1:].copy())  # a view would keep its shard mapped
        if len(held) == 1024:
            yield np.concatenate(held)
            held.clear()
    if held:
        yield np.concatenate(held)
