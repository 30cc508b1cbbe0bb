"""The loss is that of a model asked one token at a time, whatever the batch and the ranks."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.distributed import Ranks
from mygpt.evaluate import Loss, evaluate, unigram_loss
from mygpt.model import GPT

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
SHAPE = GPTConfig(block_size=8, vocab_size=19, n_layers=2, n_heads=2, n_embed=16, dropout=0.5)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    for parameter in model.parameters():
        parameter.data.mul_(8)  # far from uniform, so that every position matters
    return model


def some_windows(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, SHAPE.vocab_size, length, dtype=np.uint16) for length in lengths]


WINDOWS = some_windows(9, 9, 2, 9, 5, 9, 3, 9, 9, 9, 4)


def one_at_a_time(model: GPT, windows: Sequence[np.ndarray]) -> float:
    """Nats of all targets, each from a forward pass of its own over what precedes it."""
    total = 0.0
    model.eval()
    with torch.no_grad():
        for window in windows:
            ids = torch.from_numpy(window.astype(np.int64))
            for place in range(1, len(ids)):
                logits, _ = model(ids[None, :place])
                assert logits is not None
                total -= logits[0, -1].double().log_softmax(0)[ids[place]].item()
    return total


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 7, 100])
def test_the_loss_is_exact_in_any_batch(model: GPT, batch_size: int | None) -> None:
    loss = evaluate(model, WINDOWS, ALONE, batch_size)
    assert loss.tokens == sum(len(window) - 1 for window in WINDOWS)
    assert loss.nats == pytest.approx(one_at_a_time(model, WINDOWS), rel=1e-6)
    assert loss.mean == loss.nats / loss.tokens


@pytest.mark.parametrize("world_size", [2, 3, 20])
def test_ranks_share_the_windows_and_lose_none(
    model: GPT, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "sums", lambda self, values: list(values))
    shares = [
        evaluate(model, WINDOWS, Ranks(rank, rank, world_size, ALONE.device), batch_size=2)
        for rank in range(world_size)
    ]
    whole = evaluate(model, WINDOWS, ALONE)
    assert sum(share.nats for share in shares) == pytest.approx(whole.nats, rel=1e-6)
    assert sum(share.tokens for share in shares) == whole.tokens


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode_and_dropout_is_off(model: GPT, training: bool) -> None:
    model.train(training)
    assert evaluate(model, WINDOWS, ALONE) == evaluate(model, WINDOWS, ALONE)
    assert model.training is training


def test_nothing_to_evaluate_is_an_error(model: GPT) -> None:
    with pytest.raises(ValueError, match="no windows"):
        evaluate(model, [], ALONE)


def test_the_unigram_baseline_counts_and_adds_one() -> None:
    train = [3, 3, 3, 5, 18, 0]
    counts = np.bincount(train, minlength=SHAPE.vocab_size)
    windows = some_windows(*[9] * 1500, 4)  # more than are counted at once
    frequency = Counter(train)
    targets = [int(token) for window in windows for token in window[1:]]
    nats = sum(-math.log((frequency[t] + 1) / (len(train) + SHAPE.vocab_size)) for t in targets)
    loss = unigram_loss(counts, windows)
    assert loss.tokens == len(targets)
    assert loss.nats == pytest.approx(nats)


def test_units() -> None:
    loss = Loss(nats=80 * math.log(2), tokens=40)
    assert loss.perplexity == pytest.approx(4)
    assert loss.bits_per_byte(text_bytes=100) == pytest.approx(0.8)
    assert Loss(1e6, 1).perplexity == math.inf
