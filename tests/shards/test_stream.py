"""The order of windows, against the same rule written with lists."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from shards.manifest import Shard, Split
from shards.order import key_of, permute
from shards.stream import (
    GROUP_KEY,
    WITHIN_GROUP_KEY,
    MixedStream,
    WindowStream,
    count_before,
    interleave,
)

# Tokens of the shards: some without a window, some without slack, one much larger than the others.
TOKENS = (3, 65, 1, 250, 17, 33, 16, 2, 129)
BLOCK, SEED = 16, 1337
GROUPS = (0, 1, 2, 4, 9, 20)


def shards_of(tokens: Sequence[int]) -> tuple[Shard, ...]:
    return tuple(Shard("a.npy", "a.parquet", n, 1, n, "0" * 64, "0" * 64) for n in tokens)


def stream_of(groups: int, tokens: Sequence[int] = TOKENS) -> WindowStream:
    return WindowStream(shards_of(tokens), BLOCK, SEED, groups)


def permuted(values: Sequence, *parts: int) -> list:
    """The values in the order that a key of these parts gives."""
    indices = permute(np.arange(len(values)), len(values), key_of(*parts))
    return [values[index] for index in indices.tolist()]


def groups_of(epoch: int, groups: int) -> list[list[int]]:
    """The shards of each group of an epoch."""
    if not groups:
        return [list(range(len(TOKENS)))]
    order = permuted(range(len(TOKENS)), SEED, epoch, GROUP_KEY)
    return [order[first : first + groups] for first in range(0, len(order), groups)]


def windows_of(epoch: int, groups: int) -> Iterator[tuple[int, int]]:
    """The (shard, first token) of an epoch, one by one."""
    for number, group in enumerate(groups_of(epoch, groups)):
        windows = [(s, block) for s in group for block in range((TOKENS[s] - 1) // BLOCK)]
        key = (SEED, epoch, WITHIN_GROUP_KEY, number) if groups else (SEED, epoch)
        for shard, block in permuted(windows, *key):
            slack = (TOKENS[shard] - 1) % BLOCK
            yield shard, block * BLOCK + int(key_of(SEED, epoch, shard)[0]) % (slack + 1)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("epoch", [0, 10**15])
def test_windows_are_where_the_rule_says(groups: int, epoch: int) -> None:
    stream, size = stream_of(groups), sum((n - 1) // BLOCK for n in TOKENS)
    assert stream.windows_per_epoch == size == 30
    expected = [window for e in range(epoch, epoch + 3) for window in windows_of(e, groups)]
    asked = np.random.default_rng(0).permutation(len(expected))
    shards, starts = stream.locate(epoch * size + asked)
    assert shards.dtype == starts.dtype == np.int64
    assert list(zip(shards.tolist(), starts.tolist(), strict=True)) == [expected[i] for i in asked]


def test_no_window_holds_these_tokens() -> None:
    assert stream_of(0).unused_tokens == 3 + 1 + 9 + 16 + 2
    assert stream_of(0, (16,)).windows_per_epoch == 0


@pytest.mark.parametrize("groups", GROUPS)
def test_the_shards_of_this_group_and_the_next(groups: int) -> None:
    stream = stream_of(groups)
    coming = [group for epoch in range(3) for group in groups_of(epoch, groups)]
    ends = np.cumsum([sum((TOKENS[s] - 1) // BLOCK for s in group) for group in coming]).tolist()
    for index in range(2 * stream.windows_per_epoch):
        now = next(number for number, end in enumerate(ends) if index < end)
        following = coming[now + 1] if groups else []
        assert list(stream.upcoming_shards(index)) == coming[now] + following


def test_few_epochs_are_held_in_memory() -> None:
    stream = stream_of(2)
    stream.locate(np.arange(20 * stream.windows_per_epoch))
    assert stream._epoch_groups.cache_info().currsize == 4


def sources_of(count: int, weights: Sequence[int]) -> list[int]:
    """The source of each of the first positions: recursive halving in whole numbers."""
    if len(weights) == 1:
        return [0] * count
    middle, total = len(weights) // 2, sum(weights)
    shares = [(2 * p * sum(weights[:middle]) + total) // (2 * total) for p in range(count + 1)]
    left = iter(sources_of(shares[count], weights[:middle]))
    right = iter(sources_of(count - shares[count], weights[middle:]))
    return [
        next(left) if after > before else middle + next(right) for before, after in pairwise(shares)
    ]


@pytest.mark.parametrize(
    "weights", [(1,), (7, 3), (1, 1), (2, 1, 4), (5, 1, 3, 2), (1, 2, 3, 4, 5, 60, 1, 9, 2)]
)
def test_positions_go_to_sources_by_the_rule(weights: tuple[int, ...]) -> None:
    expected = sources_of(300, weights)
    asked = np.random.default_rng(0).permutation(300)
    sources, indices = interleave(asked, weights)
    assert sources.dtype == indices.dtype == np.int64
    assert sources.tolist() == [expected[position] for position in asked]
    assert indices.tolist() == [expected[:p].count(expected[p]) for p in asked]
    for position in range(300):
        counts = [expected[:position].count(number) for number in range(len(weights))]
        assert count_before(position, weights) == counts


def test_counts_of_far_positions_are_exact() -> None:
    weights = (2**30 + 1, 2**30 - 4)  # an odd sum: no position lies halfway
    for position in (10**18, 2**62):
        left = round(Fraction(position * weights[0], sum(weights)))
        assert count_before(position, weights) == [left, position - left]


def mixed(tokens: Sequence[Sequence[int]], groups: int = 0) -> MixedStream:
    manifests = [
        SimpleNamespace(splits={"train": Split(shards_of(own))}, location=f"data/{number}")
        for number, own in enumerate(tokens)
    ]
    return MixedStream(manifests, (2, 1)[: len(tokens)], "train", BLOCK, SEED, groups)


@pytest.mark.parametrize("groups", [0, 2])
def test_each_source_has_its_own_stream(groups: int) -> None:
    tokens = (TOKENS, TOKENS[::-1])
    stream, alone = mixed(tokens, groups), [stream_of(groups, own) for own in tokens]
    asked = np.append(np.random.default_rng(0).permutation(200), 10**17 + 1)
    found = [part.tolist() for part in stream.locate(asked)]
    sources, indices = interleave(asked, (2, 1))
    pairs = list(zip(sources.tolist(), indices.tolist(), strict=True))
    places = [alone[source].locate(np.array([index])) for source, index in pairs]
    assert found == [sources.tolist(), *([int(p[i][0]) for p in places] for i in (0, 1))]
    for position in range(0, 200, 7):
        ahead = [list(shards) for shards in stream.upcoming_shards(position)]
        counts = count_before(position, (2, 1))
        assert ahead == [list(own.upcoming_shards(n)) for own, n in zip(alone, counts, strict=True)]


def test_the_order_never_changes_under_its_version() -> None:
    # Checkpoints point into it. Another order needs another ORDER_VERSION.
    places = mixed((TOKENS, TOKENS[::-1]), 2).locate(np.arange(12))
    assert list(zip(*(part.tolist() for part in places), strict=True)) == [
        (0, 5, 0),
        (1, 5, 147),
        (0, 5, 16),
        (0, 4, 0),
        (1, 5, 131),
        (0, 8, 64),
        (0, 8, 96),
        (1, 5, 99),
        (0, 8, 32),
        (0, 8, 16),
        (1, 4, 0),
        (0, 8, 48),
    ]


def test_a_dataset_without_a_window_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        mixed((TOKENS, (5, 16, 2)))
    assert str(caught.value) == (
        "expected a train shard with more than 16 tokens in data/1, found at most 16: prepare more "
        "text, or use a shorter --block-size, or choose the validation text by --split position, "
        "--val-fraction or --val-source"
    )
