"""Losses over windows of tokens: exact, in any batch size, shared out over the ranks.

A window is an array of 2 to block_size + 1 token ids: all but the last are read, all but the first
are targets. B: windows at once, T: block size, D: documents.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mygpt.distributed import Ranks, autocast
from mygpt.loss import IGNORED
from mygpt.model import GPT

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Loss:
    """Nats summed over `tokens` targets."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(mean): as uncertain as a choice among that many tokens."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits for each byte of the text, the targets that only say <|endoftext|> included."""
        return self.nats / math.log(2) / text_bytes


class Windows(Protocol):
    """Windows by number, as a list has them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


class DocumentWindows(Windows, Protocol):
    """Windows that know their documents, as `shards.reader.DocumentWindows` does."""

    n_documents: int
    block_size: int
    text_bytes: np.ndarray  # of the documents, (D,)

    def documents(self, index: int) -> np.ndarray:
        """The document of each target of a window, (T,), ascending."""


@dataclass(frozen=True)
class Losses:
    """Nats and targets of every document, (D,), and of every position in the context, (T,).

    Position t holds the targets with t + 1 tokens before them. Nats are float64, targets int64.
    """

    nats: np.ndarray
    tokens: np.ndarray
    position_nats: np.ndarray
    position_tokens: np.ndarray

    @property
    def total(self) -> Loss:
        """All documents together."""
        return Loss(float(self.nats.sum()), int(self.tokens.sum()))

    def part(self, documents: np.ndarray) -> "Losses":
        """Some of the documents; where in the context their targets stood is not known."""
        nothing = np.empty(0)
        return Losses(self.nats[documents], self.tokens[documents], nothing, nothing)


def evaluate(
    model: GPT,
    windows: Windows,
    ranks: Ranks,
    batch_size: int | None = None,
    progress: bool = False,
) -> Loss:
    """The loss of every target of every window, once, token-weighted; the same on all ranks.

    Ranks take turns at the batches and add up what they found, in float64. `batch_size` is in
    windows and changes nothing but speed. The model is left in the mode it came in. Raises
    ValueError without windows.
    """
    nats, tokens = 0.0, 0
    for _, losses, counted in token_losses(model, windows, ranks, batch_size, progress):
        nats += losses.sum().item()
        tokens += int(counted.sum())
    total_nats, total_tokens = ranks.all_reduce_sum([nats, tokens])
    return Loss(total_nats, round(total_tokens))


def evaluate_documents(
    model: GPT,
    windows: DocumentWindows,
    ranks: Ranks,
    batch_size: int | None = None,
    progress: bool = False,
) -> Losses:
    """As `evaluate`, with the loss of each document and of each position in the context."""
    nats, tokens = np.zeros((2, windows.n_documents))
    position_nats, position_tokens = np.zeros((2, windows.block_size))
    for batch, losses, counted in token_losses(model, windows, ranks, batch_size, progress):
        owners = np.concatenate([windows.documents(i) for i in batch])
        first = owners[0]  # neighbouring windows hold neighbouring documents
        found = np.bincount(owners - first, weights=losses[counted])
        nats[first : first + len(found)] += found
        tokens[first : first + len(found)] += np.bincount(owners - first)
        position_nats[: losses.shape[1]] += losses.sum(0)
        position_tokens[: losses.shape[1]] += counted.sum(0)
    parts = (nats, tokens, position_nats, position_tokens)
    sums = np.array(ranks.all_reduce_sum(np.concatenate(parts).tolist()))
    nats, tokens, position_nats, position_tokens = np.split(
        sums, np.cumsum([len(part) for part in parts[:-1]])
    )
    return Losses(nats, tokens.astype(np.int64), position_nats, position_tokens.astype(np.int64))


def token_losses(
    model: GPT,
    windows: Windows,
    ranks: Ranks,
    batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
    """This rank's share, batch by batch: window numbers, nats (B, T), and which count (B, T).

    Nats are float64, 0 where nothing counts. A batch for which a GPU has no room is taken in
    halves, and so are those that follow. Raises ValueError without windows.
    """
    if not len(windows):
        raise ValueError("no windows to evaluate: the split is empty, prepare more text")
    size = batch_size or default_batch_size(model.config.block_size, ranks.device)
    firsts = range(ranks.rank * size, len(windows), ranks.world_size * size)
    batches = (range(first, min(first + size, len(windows))) for first in firsts)
    launched = _launched(
        model, windows, shown(batches, len(firsts), progress and ranks.is_main), ranks
    )
    # One batch ahead: a GPU works on the next while this one's losses are taken in.
    before = next(launched, None)
    while before is not None:
        after = next(launched, None)
        batch, losses, counted = before
        yield batch, losses.cpu().double().numpy(), counted
        before = after


def _launched(
    model: GPT, windows: Windows, batches: Iterable[range], ranks: Ranks
) -> Iterator[tuple[range, Tensor, np.ndarray]]:
    """The same with the losses where they are computed, or still are being computed."""
    room, was_training = None, model.training
    model.eval()
    try:
        for batch in batches:
            while batch:
                part = batch[:room]
                idx, targets = _padded([windows[i] for i in part])  # (B, T), (B, T)
                here = (torch.from_numpy(ids).to(ranks.device) for ids in (idx, targets))
                try:
                    with torch.inference_mode(), autocast(ranks.device):
                        losses = model.token_losses(*here)  # (B, T)
                except torch.cuda.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    room = len(part) // 2
                    continue
                yield part, losses, targets != IGNORED
                batch = batch[len(part) :]
    finally:
        model.train(was_training)


def default_batch_size(block_size: int, device: torch.device) -> int:
    """Windows at once: enough tokens to keep the device busy, few enough for any memory."""
    return max(1, (4096 if device.type == "cpu" else 65536) // block_size)


def shown(batches: Iterable[Batch], count: int, progress: bool) -> Iterable[Batch]:
    """The same `count` of them, with a bar on the terminal if `progress`."""
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="evaluating", total=count, leave=False, delay=2)


def _padded(windows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    longest = max(map(len, windows)) - 1
    idx = np.zeros((len(windows), longest), dtype=np.int64)
    targets = np.full((len(windows), longest), IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        idx[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    return idx, targets


def unigram_loss(train_counts: np.ndarray, windows: Iterable[np.ndarray]) -> Loss:
    """The loss of a model that knows only how often each token occurs in the training split.

    `train_counts` holds a count per token id; one is added to each, so that none is impossible.
    Scored on the targets of `windows`, as `evaluate` does.
    """
    targets = np.zeros(len(train_counts), dtype=np.int64)
    for chunk in _chunks(windows):
        targets += np.bincount(chunk, minlength=len(train_counts))
    smoothed = train_counts.astype(np.float64) + 1
    surprise = np.log(smoothed.sum()) - np.log(smoothed)
    return Loss(float(targets @ surprise), int(targets.sum()))


def _chunks(windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The targets of many windows at a time: a count per window would cost a vocabulary each."""
    held: list[np.ndarray] = []
    for window in windows:
        held.append(window[1:].copy())  # a view would keep its shard mapped
        if len(held) == 1024:
            yield np.concatenate(held)
            held.clear()
    if held:
        yield np.concatenate(held)
