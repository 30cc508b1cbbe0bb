"""Standard errors against brute force: written out, and drawn again and again."""

import math

import numpy as np
import pytest

from mygpt.eval.metrics import proportion, ratio


def some_documents(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Nats and tokens of documents of very different lengths, each with a level of its own."""
    random = np.random.default_rng(seed)
    tokens = random.geometric(0.02, count)
    return tokens * random.gamma(9, 0.3, count), tokens


def test_the_ratio_is_that_of_the_sums_and_its_error_as_written_out() -> None:
    nats, tokens = some_documents(57)
    value = sum(nats) / sum(tokens)
    squares = sum((y - value * n) ** 2 for y, n in zip(nats, tokens, strict=True))
    error = math.sqrt(57 / 56 * squares) / sum(tokens)
    found = ratio(nats, tokens)
    assert (found.value, found.error) == pytest.approx((value, error), rel=1e-12)


def test_the_error_is_the_spread_of_the_ratio_over_samples_of_documents() -> None:
    means, errors = [], []
    for seed in range(1000):
        found = ratio(*some_documents(200, seed))
        means.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)
    # A token-wise error would be far too small: tokens of a document are alike.
    nats, tokens = some_documents(200)
    as_if_independent = np.std(np.repeat(nats / tokens, tokens)) / math.sqrt(tokens.sum())
    assert np.mean(errors) > 3 * as_if_independent


def test_the_error_agrees_with_the_jackknife() -> None:
    nats, tokens = some_documents(300)
    without = [ratio(np.delete(nats, d), np.delete(tokens, d)).value for d in range(300)]
    jackknife = math.sqrt(299 / 300 * np.sum((np.array(without) - np.mean(without)) ** 2))
    assert ratio(nats, tokens).error == pytest.approx(jackknife, rel=0.05)


def test_documents_without_targets_are_none() -> None:
    nats, tokens = some_documents(20)
    padded = ratio(np.append(nats, 0.0), np.append(tokens, 0))
    assert padded == ratio(nats, tokens)


def test_a_single_document_cannot_tell() -> None:
    assert ratio(np.array([6.0]), np.array([2])).value == 3.0
    assert ratio(np.array([6.0]), np.array([2])).error is None
    assert proportion(np.array([True])).error is None


def test_a_proportion_has_the_error_of_the_mean() -> None:
    correct = np.array([True, False, False, True, True, False, False, False])
    found = proportion(correct)
    assert found.value == 3 / 8
    assert found.error == pytest.approx(correct.std(ddof=1) / math.sqrt(8))
