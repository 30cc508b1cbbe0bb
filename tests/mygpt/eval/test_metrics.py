"""Figures of groups and positions against loops over documents."""

import math

import numpy as np
import pytest

from mygpt.eval import metrics
from mygpt.eval.documents import Losses

NOWHERE = np.empty(0)


def some_losses(count: int) -> tuple[Losses, np.ndarray]:
    random = np.random.default_rng(0)
    tokens = random.integers(0, 50, count)
    nats = tokens * random.gamma(9, 0.3, count)
    return Losses(nats, tokens, NOWHERE, NOWHERE), random.integers(1, 200, count)


def test_the_whole() -> None:
    losses, text_bytes = some_losses(40)
    found = metrics.of_documents(losses, text_bytes)
    assert found["loss"] == pytest.approx(losses.nats.sum() / losses.tokens.sum())
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    bits = losses.nats.sum() / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / text_bytes.sum())
    assert found["bits_per_byte_se"] > 0 < found["loss_se"]
    assert (found["tokens"], found["documents"]) == (losses.tokens.sum(), 40)


@pytest.mark.parametrize("most", [1000, 3])
def test_groups_hold_every_document_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_GROUPS", most)
    losses, text_bytes = some_losses(200)
    groups = np.random.default_rng(1).choice([0, 2, 3, 7, 8], 200, p=[0.1, 0.2, 0.3, 0.35, 0.05])
    found = metrics.by_group(losses, text_bytes, groups, [f"n{i}" for i in range(9)])
    sizes = {f"n{group}": losses.tokens[groups == group].sum() for group in set(groups.tolist())}
    expected = sorted(sizes, key=lambda name: -sizes[name])
    if most == 3:
        expected = [*expected[:3], metrics.OTHERS]
    assert [row["name"] for row in found] == expected
    for row in found:
        if row["name"] != metrics.OTHERS:
            inside = groups == int(row["name"][1:])
            only = Losses(losses.nats[inside], losses.tokens[inside], NOWHERE, NOWHERE)
            assert row == {"name": row["name"], **metrics.of_documents(only, text_bytes[inside])}
    for key, total in (("tokens", losses.tokens.sum()), ("documents", 200)):
        assert sum(row[key] for row in found) == total
    nats = sum(row["loss"] * row["tokens"] for row in found)
    assert nats == pytest.approx(losses.nats.sum(), rel=1e-12)


def test_one_group_is_no_table() -> None:
    losses, text_bytes = some_losses(5)
    assert metrics.by_group(losses, text_bytes, np.full(5, 3), list("abcd")) == []


@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 11])
def test_bins_double_and_cover_the_block(block_size: int) -> None:
    nats, tokens = np.arange(1.0, block_size + 1), np.arange(block_size, 0, -1)
    found = metrics.by_position(Losses(NOWHERE, NOWHERE, nats, tokens))
    assert [place for bin_ in found["bins"] for place in range(bin_["from"], bin_["to"] + 1)] == [
        *range(1, block_size + 1)
    ]
    for bin_ in found["bins"]:
        here = slice(bin_["from"] - 1, bin_["to"])
        assert bin_["loss"] == pytest.approx(nats[here].sum() / tokens[here].sum())
        assert bin_["to"] <= 2 * (bin_["from"] - 1) or bin_["from"] == 1
    assert found["loss"] == pytest.approx((nats / tokens).tolist())


def test_a_position_without_targets_has_no_loss() -> None:
    found = metrics.by_position(Losses(NOWHERE, NOWHERE, np.array([2.0, 0.0]), np.array([1, 0])))
    assert found["loss"] == [2.0, None]


def test_models_are_compared_document_by_document() -> None:
    losses, _ = some_losses(60)
    other = Losses(losses.nats + 0.1 * losses.tokens, losses.tokens, NOWHERE, NOWHERE)
    found = metrics.compared(losses, other)
    assert found["difference"] == pytest.approx(-0.1)
    assert found["difference_se"] == pytest.approx(0, abs=1e-9)  # it is the same in each of them
