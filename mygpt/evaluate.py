"""Losses over windows of tokens: exact, in any batch size, shared out over the ranks.

A window is an array of 2 to block_size + 1 token ids: all but the last are read, all but the first
are targets. B: windows at once, T: block size.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mygpt.distributed import Ranks, compute_dtype
from mygpt.model import GPT, IGNORED


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


def evaluate(
    model: GPT,
    windows: Sequence[np.ndarray],
    ranks: Ranks,
    batch_size: int | None = None,
    progress: bool = False,
) -> Loss:
    """The loss of every target of every window, once, token-weighted; the same on all ranks.

    Ranks take turns at the batches and add up what they found, in float64. `batch_size` is in
    windows and changes nothing but speed. The model is left in the mode it came in. Raises
    ValueError without windows.
    """
    if not len(windows):
        raise ValueError("no windows to evaluate: the split is empty, prepare more text")
    size = batch_size or default_batch_size(model.config.block_size, ranks.device)
    firsts = range(ranks.rank * size, len(windows), ranks.world_size * size)
    was_training, nats, tokens = model.training, 0.0, 0
    model.eval()
    for first in _shown(firsts, progress and ranks.is_main):
        batch = [windows[i] for i in range(first, min(first + size, len(windows)))]
        idx, targets = _padded(batch, ranks.device)  # (B, T), (B, T)
        with torch.inference_mode(), autocast(ranks.device):
            losses = model.token_losses(idx, targets)  # (B, T)
        nats += losses[targets != IGNORED].cpu().double().sum().item()
        tokens += sum(len(window) - 1 for window in batch)
    model.train(was_training)
    total_nats, total_tokens = ranks.sums([nats, tokens])
    return Loss(total_nats, round(total_tokens))


def default_batch_size(block_size: int, device: torch.device) -> int:
    """Windows at once: enough tokens to keep the device busy, few enough for any memory."""
    return max(1, (4096 if device.type == "cpu" else 65536) // block_size)


def autocast(device: torch.device) -> torch.autocast | nullcontext[None]:
    """The precision of training on this device: matrix products in bf16 or fp16, or all in fp32."""
    dtype = compute_dtype(device)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _shown(firsts: range, progress: bool) -> Iterable[int]:
    if not progress:
        return firsts
    from tqdm import tqdm

    return tqdm(firsts, desc="evaluating", unit="batch", leave=False, delay=2)


def _padded(windows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, windows)) - 1
    idx = np.zeros((len(windows), longest), dtype=np.int64)
    targets = np.full((len(windows), longest), IGNORED, dtype=np.int64)
    for row, window in enumerate(windows):
        idx[row, : len(window) - 1] = window[:-1]
        targets[row, : len(window) - 1] = window[1:]
    return torch.from_numpy(idx).to(device), torch.from_numpy(targets).to(device)


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
        held.append(window[1:])
        if len(held) == 1024:
            yield np.concatenate(held)
            held.clear()
    if held:
        yield np.concatenate(held)
