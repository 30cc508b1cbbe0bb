"""The rows that one rank reads of the global stream, batch after batch, as they lie on disk."""

import numpy as np

from shards import cache
from shards.mixture import Mixture
from shards.reader import ShardReader
from shards.stream import MixedStream
from shards.sweep import Sweep

# Tokens read at once, shard by shard: a call for each row would take as long as the row. The first
# time it is one batch, then twice as many each time, so that the first one need not wait.
READ_TOKENS = 1 << 22
# Rows after which the memory of the maps is given back, at most 64 KB each.
HELD_ROWS = 1 << 14


class RankRows:
    """Windows of T + 1 tokens, uint16: those of this rank's batches, from any position on.

    Raises ValueError or FileNotFoundError for datasets that can't be served, and from `read` for a
    shard that is found to be wrong, be it by the look over all of them in the background.
    """

    def __init__(
        self,
        mixture: Mixture,
        split: str,
        batch_size: int,
        block_size: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle_shards: int,
    ) -> None:
        self.batch_size, self.width = batch_size, block_size + 1
        self.rank, self.world_size = rank, world_size
        count = len(mixture.manifests)
        self._readers = [ShardReader(manifest, split, count) for manifest in mixture.manifests]
        self.stream = MixedStream(mixture, split, block_size, seed, shuffle_shards)
        _check_cache(self._readers, shuffle_shards)
        self._sweep: Sweep | None = None
        self._position = self._next = 0
        self._rows = np.empty((0, self.width), np.uint16)
        self._most = max(1, READ_TOKENS // (batch_size * self.width))
        self._batches = 1
        self._rows_held = 0

    def seek(self, position: int) -> None:
        """Go to a position of the stream, counted in windows of all ranks."""
        self._position = position
        self._next, self._rows, self._batches = 0, self._rows[:0], 1

    def read(self) -> np.ndarray:
        """The next batch, (batch_size, T + 1) uint16, in memory that the next one may take."""
        if self._sweep is not None:
            self._sweep.check()
        if self._next == len(self._rows):
            self._read_ahead()
        batch = self._rows[self._next : self._next + self.batch_size]
        self._next += self.batch_size
        return batch

    def _read_ahead(self) -> None:
        """Bring this rank's rows of the next batches into memory."""
        if self._sweep is None:
            # Each rank looks at a share of the shards: what one finds ends all.
            own = slice(self.rank, None, self.world_size)
            self._sweep = Sweep([(reader.manifest, reader.shards[own]) for reader in self._readers])
        self._house_keeping()
        step = self.batch_size * self.world_size
        own_rows = self._position + self.rank * self.batch_size + np.arange(self.batch_size)
        positions = (np.arange(self._batches)[:, None] * step + own_rows).ravel()
        rows = self._rows
        if len(rows) != len(positions):
            rows = np.empty((len(positions), self.width), np.uint16)
        self._gather(rows, *self.stream.locate(positions))
        # Only now: who tries again after an error gets the same batch.
        self._rows = rows
        self._position += self._batches * step
        self._next, self._batches = 0, min(2 * self._batches, self._most)
        self._rows_held += len(positions)

    def _gather(
        self, rows: np.ndarray, sources: np.ndarray, shards: np.ndarray, starts: np.ndarray
    ) -> None:
        """Copy rows from where they lie, those of a shard together, to their places in `rows`."""
        order = np.lexsort((starts, shards, sources))
        sources, shards, starts = sources[order], shards[order], starts[order]
        is_first = (np.diff(shards, prepend=-1) != 0) | (np.diff(sources, prepend=-1) != 0)
        firsts = np.flatnonzero(is_first)
        ends = [*firsts[1:].tolist(), len(order)]
        parts = zip(
            sources[firsts].tolist(), shards[firsts].tolist(), firsts.tolist(), ends, strict=True
        )
        for source, shard, first, end in parts:
            tokens = self._readers[source].tokens(shard)
            # Every place as the beginning of a row, without a copy.
            shape, strides = (len(tokens) - self.width + 1, self.width), tokens.strides * 2
            windows = np.ndarray(shape, tokens.dtype, tokens, 0, strides)
            rows[order[first:end]] = windows[starts[first:end]]

    def _house_keeping(self) -> None:
        """Fetch what comes next, and give back what was used."""
        for reader, shards in zip(self._readers, self.stream.ahead(self._position), strict=True):
            reader.forget_evicted()
            reader.fetch_ahead(shards)
            if self._rows_held >= HELD_ROWS:
                reader.let_go()
        self._rows_held %= HELD_ROWS


def _check_cache(readers: list[ShardReader], shuffle_shards: int) -> None:
    """Raise ValueError where remote shards that are shuffled together don't fit into the cache."""
    needed = 0
    for reader in readers:
        if reader.manifest.uri:
            sizes = sorted((2 * shard.tokens for shard in reader.shards), reverse=True)
            # Those being read, and those fetched meanwhile.
            needed += sum(sizes[: 2 * shuffle_shards] if shuffle_shards else sizes)
    if needed and needed > cache.limit_bytes():
        raise ValueError(
            f"expected {needed / 1e9:.3g} GB in the cache {cache.folder()} for the shards that are "
            f"shuffled together, found a limit of {cache.limit_bytes() / 1e9:.3g}: set "
            "MYGPT_CACHE_GB, or shuffle fewer with --shuffle-shards"
        )
