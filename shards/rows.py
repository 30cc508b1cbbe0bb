"""The rows that one rank reads of the global stream, batch after batch, as they lie on disk."""

from collections import deque

import numpy as np

from shards import cache
from shards.mixture import Mixture
from shards.reader import ShardReader
from shards.stream import MixedStream
from shards.sweep import Sweep

# Rows whose places are worked out at once: the permutation's cost per call is that of one row.
PLANNED_ROWS = 4096
# Rows after which the memory of what was read is given back, at most 64 KB each.
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
        self._readers = [ShardReader(manifest, split) for manifest in mixture.manifests]
        self.stream = MixedStream(mixture, split, block_size, seed, shuffle_shards)
        _check_cache(self._readers, shuffle_shards)
        self._sweep: Sweep | None = None
        self._planned: deque[tuple[list[int], ...]] = deque()
        self._position = 0
        self._rows_held = 0

    def seek(self, position: int) -> None:
        """Go to a position of the stream, counted in windows of all ranks."""
        self._position = position
        self._planned.clear()

    def read(self, out: np.ndarray) -> None:
        """Put the next batch into `out`, (batch_size * (T + 1),) uint16."""
        if not self._planned:
            self._plan()
        if self._sweep is not None:
            self._sweep.check()
        readers, width = self._readers, self.width
        rows = [
            readers[source].tokens(shard)[start : start + width]
            for source, shard, start in zip(*self._planned.popleft(), strict=True)
        ]
        np.concatenate(rows, out=out)

    def _plan(self) -> None:
        """Work out the places of this rank's rows in the next batches."""
        if self._sweep is None:
            # Each rank looks at a share of the shards: what one finds ends all.
            own = slice(self.rank, None, self.world_size)
            self._sweep = Sweep([(reader.manifest, reader.shards[own]) for reader in self._readers])
        self._house_keeping()
        batches = max(1, PLANNED_ROWS // self.batch_size)
        step = self.batch_size * self.world_size
        own_rows = self._position + self.rank * self.batch_size + np.arange(self.batch_size)
        positions = (np.arange(batches)[:, None] * step + own_rows).ravel()
        columns = [column.tolist() for column in self.stream.locate(positions)]
        for first in range(0, len(positions), self.batch_size):
            last = first + self.batch_size
            self._planned.append(tuple(column[first:last] for column in columns))
        self._position += batches * step
        self._rows_held += len(positions)

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
