"""Which window lies at a position of the stream: of one dataset, and of several by their weights.

A position is worked out, not looked up, so seeking costs nothing and no order is held in memory.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from shards.manifest import Shard
from shards.mixture import Mixture, count_before, share_out
from shards.order import key_of, permute

# Told apart from the keys of windows and of phases.
GROUPS, INSIDE = 1, 2


class WindowStream:
    """The windows of some shards in a seeded order that is another in each epoch.

    With `shuffle_shards` K the order of an epoch is that of groups of K shards, put together anew
    in each epoch, one group after the other, shuffled inside; with 0 all shards are one group.
    """

    def __init__(
        self, shards: Sequence[Shard], block_size: int, seed: int, shuffle_shards: int = 0
    ) -> None:
        tokens = np.array([shard.tokens for shard in shards], np.int64)
        self._windows = np.maximum(tokens - 1, 0) // block_size
        self._ends = np.cumsum(self._windows)
        self._slack = np.maximum(tokens - 1 - self._windows * block_size, 0)
        self.block_size, self.seed, self.shuffle_shards = block_size, seed, shuffle_shards
        self.windows_per_epoch = int(self._ends[-1])
        served = np.where(self._windows, self._windows * block_size + 1, 0)
        self.unused_tokens = int((tokens - served).sum())
        self._grouped = lru_cache(maxsize=4)(self._group)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token) of the windows at `indices` of the stream, each int64 (n,)."""
        epochs, places = np.divmod(indices.astype(np.int64), self.windows_per_epoch)
        if self.shuffle_shards:
            shards, within = self._locate_in_groups(epochs, places)
        else:
            keys = key_of(self.seed, epochs)
            windows = permute(places, self.windows_per_epoch, keys).astype(np.int64)
            shards = np.searchsorted(self._ends, windows, side="right")
            within = windows - (self._ends - self._windows)[shards]
        # The tokens that no window holds are others in each epoch: the first window begins
        # anywhere within them, so that block boundaries move too.
        phases = key_of(self.seed, epochs, shards) % (self._slack[shards] + 1).astype(np.uint64)
        return shards, within * self.block_size + phases.astype(np.int64)

    def ahead(self, index: int) -> Iterator[int]:
        """The shards of the group that window `index` is in, then those of the next."""
        if not self.shuffle_shards:
            yield from range(len(self._ends))
            return
        epoch, place = divmod(index, self.windows_per_epoch)
        order, _, group_ends = self._grouped(epoch)
        group = int(np.searchsorted(group_ends, place, side="right"))
        first = group * self.shuffle_shards
        yield from order[first : first + 2 * self.shuffle_shards].tolist()
        if group + 1 >= len(group_ends):
            yield from self._grouped(epoch + 1)[0][: self.shuffle_shards].tolist()

    def _locate_in_groups(
        self, epochs: np.ndarray, places: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(shard, window within it) of places in an epoch."""
        shards, within = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            order, ends, group_ends = self._grouped(epoch)
            own = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(group_ends, places[own], side="right")
            for group in np.unique(groups).tolist():
                rows = own[groups == group]
                first = int(group_ends[group - 1]) if group else 0
                key = key_of(self.seed, epoch, INSIDE, group)
                inside = permute(places[rows] - first, int(group_ends[group]) - first, key)
                windows = first + inside.astype(np.int64)
                nth = np.searchsorted(ends, windows, side="right")
                shards[rows] = order[nth]
                within[rows] = windows - (ends - self._windows[order])[nth]
        return shards, within

    def _group(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the shards in an epoch; the windows up to the end of each, of each group."""
        count = len(self._ends)
        order = permute(np.arange(count), count, key_of(self.seed, epoch, GROUPS)).astype(np.int64)
        ends = np.cumsum(self._windows[order])
        lasts = np.arange(self.shuffle_shards, count + self.shuffle_shards, self.shuffle_shards)
        return order, ends, ends[np.minimum(lasts, count) - 1]


class MixedStream:
    """The windows of one split of a mixture, each source in the order of its own stream.

    Raises ValueError for a source without a window, since its turn would come.
    """

    def __init__(
        self, mixture: Mixture, split: str, block_size: int, seed: int, shuffle_shards: int = 0
    ) -> None:
        self._weights = mixture.weights
        self.streams = [
            WindowStream(manifest.splits[split].shards, block_size, seed, shuffle_shards)
            for manifest in mixture.manifests
        ]
        for manifest, stream in zip(mixture.manifests, self.streams, strict=True):
            if not stream.windows_per_epoch:
                longest = max(shard.tokens for shard in manifest.splits[split].shards)
                raise ValueError(
                    f"expected a {split} shard with more than {block_size} tokens in "
                    f"{manifest.folder}, found at most {longest}: prepare more text, or use a "
                    "shorter --block-size, or choose the validation text by --split position, "
                    "--val-fraction or --val-source"
                )

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, shard, first token) of the windows at `positions`, each int64 (n,)."""
        sources, indices = share_out(positions.astype(np.int64), self._weights)
        shards, starts = np.empty_like(sources), np.empty_like(sources)
        for number, stream in enumerate(self.streams):
            own = sources == number
            shards[own], starts[own] = stream.locate(indices[own])
        return sources, shards, starts

    def ahead(self, position: int) -> list[Iterator[int]]:
        """The shards of each source that are read from `position` on: its group's, the next's."""
        counts = count_before(position, self._weights)
        return [stream.ahead(count) for stream, count in zip(self.streams, counts, strict=True)]
