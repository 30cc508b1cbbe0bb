"""The global order of windows: of one dataset, and of several mixed by their weights.

A position of the stream is mapped to a window by computation, not by a table, so seeking is O(1)
and no order is held in memory. Functions take arrays of P positions; all arrays are int64.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from shards.manifest import Manifest, Shard
from shards.order import key_of, permute

# Parts of a key: the order of the groups of an epoch, and the order inside one of them.
GROUP_KEY, WITHIN_GROUP_KEY = 1, 2


def interleave(positions: np.ndarray, weights: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (source, index in that source's own stream) of each position, both (P,).

    Recursive halving: of the first p positions, round(p * left / total) belong to the left half of
    the sources, where left and total are sums of weights; a position is the left half's if that
    count grows there. So a source's count differs from its exact share by at most 1/2 for two
    sources, and by 1/2 more for each doubling of their number.
    """
    if len(weights) == 1:
        return np.zeros_like(positions), positions
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    before = _rounded_share(positions, left, total)
    is_left = _rounded_share(positions + 1, left, total) > before
    sources, indices = np.empty_like(positions), np.empty_like(positions)
    sources[is_left], indices[is_left] = interleave(before[is_left], weights[:middle])
    is_right = ~is_left
    right, inside = interleave((positions - before)[is_right], weights[middle:])
    sources[is_right], indices[is_right] = right + middle, inside
    return sources, indices


def count_before(position: int, weights: Sequence[int]) -> list[int]:
    """Return the number of positions of each source before `position`."""
    if len(weights) == 1:
        return [position]
    middle = len(weights) // 2
    left = int(_rounded_share(np.array(position), sum(weights[:middle]), sum(weights)))
    return count_before(left, weights[:middle]) + count_before(position - left, weights[middle:])


def _rounded_share(counts: np.ndarray, part: int, total: int) -> np.ndarray:
    """Return counts * part / total rounded to the nearest integer, without overflow of 64 bits."""
    periods, rest = np.divmod(counts, total)
    return periods * part + (rest * part + total // 2) // total


class WindowStream:
    """Endless stream of the windows of some shards, in a seeded order that differs each epoch.

    With `shuffle_shards` K an epoch is a sequence of groups of K shards, redrawn each epoch and
    shuffled inside; with 0 all shards are one group.
    """

    def __init__(
        self, shards: Sequence[Shard], block_size: int, seed: int, shuffle_shards: int
    ) -> None:
        tokens = np.array([shard.tokens for shard in shards], np.int64)
        self._windows = np.array([shard.windows(block_size) for shard in shards], np.int64)
        self._ends = np.cumsum(self._windows)
        self._slack = np.maximum(tokens - 1 - self._windows * block_size, 0)
        self.block_size, self.seed, self.shuffle_shards = block_size, seed, shuffle_shards
        self.windows_per_epoch = int(self._ends[-1])
        served = np.where(self._windows, self._windows * block_size + 1, 0)
        self.unused_tokens = int((tokens - served).sum())
        self._epoch_groups = lru_cache(maxsize=4)(self._group_epoch)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (shard, first token) of the windows at `indices` of the stream, each (P,)."""
        epochs, within_epoch = np.divmod(indices.astype(np.int64), self.windows_per_epoch)
        if self.shuffle_shards:
            shards, windows = self._locate_in_groups(epochs, within_epoch)
        else:
            keys = key_of(self.seed, epochs)
            chosen = permute(within_epoch, self.windows_per_epoch, keys).astype(np.int64)
            shards = np.searchsorted(self._ends, chosen, side="right")
            windows = chosen - (self._ends - self._windows)[shards]
        # The first window of a shard starts anywhere within the slack, elsewhere in each epoch, so
        # that other tokens are left out and block boundaries move.
        offsets = key_of(self.seed, epochs, shards) % (self._slack[shards] + 1).astype(np.uint64)
        return shards, windows * self.block_size + offsets.astype(np.int64)

    def upcoming_shards(self, index: int) -> Iterator[int]:
        """Yield the shards to fetch: of the group of window `index`, then of the next group."""
        if not self.shuffle_shards:
            yield from range(len(self._ends))
            return
        epoch, within_epoch = divmod(index, self.windows_per_epoch)
        order, _, group_ends = self._epoch_groups(epoch)
        group = int(np.searchsorted(group_ends, within_epoch, side="right"))
        first = group * self.shuffle_shards
        yield from order[first : first + 2 * self.shuffle_shards].tolist()
        if group + 1 >= len(group_ends):
            yield from self._epoch_groups(epoch + 1)[0][: self.shuffle_shards].tolist()

    def _locate_in_groups(
        self, epochs: np.ndarray, within_epoch: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (shard, window in it) of positions within their epochs, each (P,)."""
        shards, windows = np.empty_like(within_epoch), np.empty_like(within_epoch)
        for epoch in np.unique(epochs).tolist():
            order, ends, group_ends = self._epoch_groups(epoch)
            in_epoch = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(group_ends, within_epoch[in_epoch], side="right")
            for group in np.unique(groups).tolist():
                in_group = in_epoch[groups == group]
                start = int(group_ends[group - 1]) if group else 0
                size = int(group_ends[group]) - start
                key = key_of(self.seed, epoch, WITHIN_GROUP_KEY, group)
                shuffled = permute(within_epoch[in_group] - start, size, key).astype(np.int64)
                window_in_epoch = start + shuffled
                slot = np.searchsorted(ends, window_in_epoch, side="right")
                shards[in_group] = order[slot]
                windows[in_group] = window_in_epoch - (ends - self._windows[order])[slot]
        return shards, windows

    def _group_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the shards in an epoch's order, and the window at which each shard, group ends."""
        count = len(self._ends)
        order = permute(np.arange(count), count, key_of(self.seed, epoch, GROUP_KEY)).astype(
            np.int64
        )
        ends = np.cumsum(self._windows[order])
        lasts = np.arange(self.shuffle_shards, count + self.shuffle_shards, self.shuffle_shards)
        return order, ends, ends[np.minimum(lasts, count) - 1]


class MixedStream:
    """Endless stream of one split of datasets mixed by their weights, each in its own order.

    Raises ValueError for a dataset without a window.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        weights: Sequence[int],
        split: str,
        block_size: int,
        seed: int,
        shuffle_shards: int,
    ) -> None:
        self._weights = weights
        self.streams = [
            WindowStream(manifest.splits[split].shards, block_size, seed, shuffle_shards)
            for manifest in manifests
        ]
        for manifest, stream in zip(manifests, self.streams, strict=True):
            if not stream.windows_per_epoch:
                longest = max(shard.tokens for shard in manifest.splits[split].shards)
                raise ValueError(
                    f"expected a {split} shard with more than {block_size} tokens in "
                    f"{manifest.location}, found at most {longest}: prepare more text, or use a "
                    "shorter --block-size, or choose the validation text by --split position, "
                    "--val-fraction or --val-source"
                )

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (source, shard, first token) of the windows at `positions`, each (P,)."""
        sources, indices = interleave(positions.astype(np.int64), self._weights)
        shards, starts = np.empty_like(sources), np.empty_like(sources)
        for number, stream in enumerate(self.streams):
            own = sources == number
            shards[own], starts[own] = stream.locate(indices[own])
        return sources, shards, starts

    def upcoming_shards(self, position: int) -> list[Iterator[int]]:
        """Return, for each source, the shards that are read next from `position`."""
        counts = count_before(position, self._weights)
        return [
            stream.upcoming_shards(count)
            for stream, count in zip(self.streams, counts, strict=True)
        ]
