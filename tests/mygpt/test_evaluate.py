"""The loss is that of a model asked one token at a time, whatever the batch and the ranks."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mygpt.config import GPTConfig
from mygpt.distributed import DistributedContext, padded_length
from mygpt.eval.documents import evaluate_documents
from mygpt.evaluate import Loss, evaluate, token_losses, unigram_loss
from mygpt.model import GPT
from tests.mygpt.support import decided

pytestmark = pytest.mark.usefixtures("quick")

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
SHAPE = GPTConfig(block_size=8, vocab_size=19, n_layers=2, n_heads=2, n_embed=16, dropout=0.5)


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    return decided(GPT(SHAPE))


def some_windows(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, SHAPE.vocab_size, length, dtype=np.uint16) for length in lengths]


WINDOWS = some_windows(9, 9, 2, 9, 5, 9, 3, 9, 9, 9, 4)


def target_losses(model: GPT, window: np.ndarray) -> list[float]:
    """Nats of each target, from a forward pass of its own over what precedes it."""
    ids, found = torch.from_numpy(window.astype(np.int64)), []
    model.eval()
    for place in range(1, len(ids)):
        with torch.no_grad():
            logits, _ = model(ids[None, :place])
        assert logits is not None
        found.append(-logits[0, -1].double().log_softmax(0)[ids[place]].item())
    return found


def one_at_a_time(model: GPT, windows: Sequence[np.ndarray]) -> float:
    """Nats of all targets."""
    return sum(sum(target_losses(model, window)) for window in windows)


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
    monkeypatch.setattr(DistributedContext, "all_reduce_sum", lambda self, values: list(values))
    shares = [
        evaluate(
            model, WINDOWS, DistributedContext(rank, rank, world_size, ALONE.device), batch_size=2
        )
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


class Owned(list[np.ndarray]):
    """Windows whose targets belong to documents of one to seven of them."""

    def __init__(self, windows: Sequence[np.ndarray]) -> None:
        super().__init__(windows)
        lengths = np.random.default_rng(1).integers(1, 8, 100)
        owners = np.repeat(np.arange(100), lengths)[: sum(len(w) - 1 for w in windows)]
        self.block_size = SHAPE.block_size
        self.n_documents = int(owners[-1]) + 2  # the last has no target at all
        self.text_bytes = np.ones(self.n_documents, np.int64)
        self.owners = np.split(owners, np.cumsum([len(w) - 1 for w in windows])[:-1])

    def documents(self, index: int) -> np.ndarray:
        return self.owners[index]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_documents_and_positions_are_those_of_a_naive_loop(model: GPT, batch_size: int) -> None:
    windows = Owned(WINDOWS)
    nats, tokens = np.zeros(windows.n_documents), np.zeros(windows.n_documents)
    at, count = np.zeros(8), np.zeros(8)
    for i, window in enumerate(windows):
        for place, loss in enumerate(target_losses(model, window)):
            nats[windows.owners[i][place]] += loss
            tokens[windows.owners[i][place]] += 1
            at[place] += loss
            count[place] += 1
    found = evaluate_documents(model, windows, ALONE, batch_size)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4, atol=1e-4)
    assert found.tokens.tolist() == tokens.tolist()
    np.testing.assert_allclose(found.position_nats, at, rtol=1e-4, atol=1e-4)
    assert found.position_tokens.tolist() == count.tolist()
    assert found.total.nats == pytest.approx(evaluate(model, WINDOWS, ALONE).nats, rel=1e-6)
    assert found.position_nats.sum() == pytest.approx(found.total.nats, rel=1e-12)


def test_a_batch_without_room_is_taken_in_halves(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes, whole = evaluate(model, WINDOWS, ALONE), [], GPT.token_losses

    def small(self: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sizes.append(len(idx))
        if len(idx) > room:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole(self, idx, targets)

    monkeypatch.setattr(GPT, "token_losses", small)
    room = 3
    found = evaluate(model, WINDOWS, ALONE, batch_size=10)
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert found.tokens == expected.tokens
    assert sizes[:3] == [10, 5, 2] and max(sizes[3:]) == 2  # what did not fit is not tried again
    room = 0
    with pytest.raises(torch.cuda.OutOfMemoryError):
        list(token_losses(model, WINDOWS, ALONE))


def test_a_gpu_sees_few_shapes(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new one would be compiled, and cost cuDNN a plan for its attention."""
    expected, shapes, whole = evaluate(model, WINDOWS, ALONE), [], GPT.token_losses
    room = 8

    def noted(self: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(idx.shape))
        if len(idx) > room:
            raise torch.cuda.OutOfMemoryError("no room")
        return whole(self, idx, targets)

    monkeypatch.setattr("mygpt.distributed._FIXED_SHAPES", {"cpu"})
    monkeypatch.setattr(GPT, "token_losses", noted)
    found = evaluate(model, WINDOWS, ALONE, batch_size=4)
    assert (found.nats, found.tokens) == (pytest.approx(expected.nats, rel=1e-6), expected.tokens)
    assert shapes == [(4, 8)] * 3
    room, shapes = 3, []
    assert evaluate(model, WINDOWS[2:3], ALONE, batch_size=4).tokens == 1  # one row of padding
    assert shapes == [(4, 8), (2, 8)]


def test_lengths_are_multiples_of_64_up_to_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    assert padded_length(65, 1000, ALONE.device) == 65
    monkeypatch.setattr("mygpt.distributed._FIXED_SHAPES", {"cpu"})
    lengths = [padded_length(n, 1000, ALONE.device) for n in (1, 64, 65, 960, 961, 1000)]
    assert lengths == [64, 64, 128, 960, 1000, 1000]


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
