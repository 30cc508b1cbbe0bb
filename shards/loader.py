"""The rank-aware streaming loader: token windows of one split in one global, seeded order.

There is one stream of windows, a function of the datasets, the seed and the block size. A position
counted in windows says where in it a run is; ranks are offsets. World size, micro-batch and
accumulation only decide who reads which row, so any of them may change on resume (promise 5).
"""

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import cache
from shards.checks import Sweep
from shards.order import ORDER_VERSION
from shards.reader import ShardReader
from shards.stream import MixedStream, Mixture

# --- The rows that one rank reads of the global stream, batch after batch, as they lie on disk.


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


STATE_VERSION = 2
# Batches read ahead for a GPU, which computes while the next one is brought to it.
AHEAD = 2


class TokenLoader(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """Endless iterator of (x, y), each (batch_size, block_size) int64 on `device`.

    `data` is the folder of a dataset, or several as `shards.stream.parse` reads them. y is x one
    token later. Together the ranks' k-th batches hold the windows
    [k * batch_size * world_size, (k + 1) * batch_size * world_size) of the stream; rank r holds
    its r-th part. Every window of the split is served once an epoch, of several sources in each
    one's own epochs; batches may straddle epochs. With `shuffle_shards` only that many shards are
    shuffled together at a time. With `verify` every byte is read and hashed before the first batch.
    `wait_seconds` counts the time spent inside `next`.

    Raises FileNotFoundError or ValueError for a dataset that is missing, altered or shorter than
    one block, and ValueError for sizes and ranks that can't be.
    """

    def __init__(
        self,
        data: Mixture | str | Path | Sequence[str],
        split: str,
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
        shuffle_shards: int = 0,
    ) -> None:
        sizes = (batch_size, block_size, world_size)
        if min(sizes) < 1 or not 0 <= rank < world_size or min(seed, shuffle_shards) < 0:
            raise ValueError(
                "expected batch_size, block_size, world_size >= 1, 0 <= rank < world_size and "
                f"seed, shuffle_shards >= 0, found {batch_size}, {block_size}, {world_size}, "
                f"{rank}, {seed} and {shuffle_shards}"
            )
        if not isinstance(data, Mixture):
            data = Mixture.load([str(data)] if isinstance(data, str | Path) else data)
        self.mixture = data
        self._rows = RankRows(
            self.mixture, split, batch_size, block_size, rank, world_size, seed, shuffle_shards
        )
        self.split, self.seed, self.shuffle_shards = split, seed, shuffle_shards
        self.batch_size, self.block_size = batch_size, block_size
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.wait_seconds = 0.0
        self._position = 0
        self._pinned = PinnedRows(self._rows, self.device) if self.device.type == "cuda" else None

    @property
    def windows_per_epoch(self) -> int:
        """Windows of the split, all sources together."""
        return sum(stream.windows_per_epoch for stream in self._rows.stream.streams)

    @property
    def unused_tokens(self) -> int:
        """Tokens that no window of an epoch holds."""
        return sum(stream.unused_tokens for stream in self._rows.stream.streams)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        started = time.perf_counter()
        if self._pinned:
            window = self._pinned.next()
        else:
            window = widened(torch.from_numpy(self._rows.read()), self.device)  # (B, T + 1)
        self._position += self.batch_size * self.world_size
        self.wait_seconds += time.perf_counter() - started
        return window[:, :-1], window[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last batch handed out: JSON, one position in windows."""
        return {
            "version": STATE_VERSION,
            "order": ORDER_VERSION,
            "fingerprint": self.mixture.fingerprint,
            "generations": list(self.mixture.generations.values()),
            "split": self.split,
            "seed": self.seed,
            "block_size": self.block_size,
            "shuffle_shards": self.shuffle_shards,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any], earlier: Collection[str] = ()) -> None:
        """Seek to the position of a state.

        `earlier` are the fingerprints of former generations of the same datasets: a state with one
        of these is accepted, and its position kept in the stream of the grown datasets. Raises
        ValueError if the state is of another stream.
        """
        own, position = self.state_dict(), state.get("position")
        free = {"position"}
        if state.get("fingerprint") in earlier:
            free |= {"fingerprint", "generations"}
        for name in own:
            if name not in free and state.get(name) != own[name]:
                raise ValueError(
                    f"expected a loader state with {name} {own[name]}, found {state.get(name)}: "
                    "resume with the datasets and the settings with which the run was started"
                )
        if type(position) is not int or position < 0:
            raise ValueError(
                f"expected a loader state with a position from 0, found {position!r}: resume from "
                "another checkpoint"
            )
        self._position = position
        if self._pinned:
            self._pinned.clear()
        self._rows.seek(self._position)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, shard, first token) of the stream's windows at `positions`, each int64 (n,)."""
        return self._rows.stream.locate(positions)


class PinnedRows:
    """Batches read on a thread of their own into memory from which a GPU copies by itself."""

    def __init__(self, rows: RankRows, device: torch.device) -> None:
        # The thread must not make a context of its own on another GPU: it would take memory there.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._thread = ThreadPoolExecutor(1, "loader", torch.cuda.set_device, (index,))
        self._rows, self._device = rows, device
        self._ahead: deque[Future[torch.Tensor]] = deque()

    def next(self) -> torch.Tensor:
        """The next batch, (B, T + 1) int64 on the GPU."""
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._thread.submit(self._read))
        return widened(self._ahead.popleft().result(), self._device)

    def clear(self) -> None:
        """Drop what was read ahead."""
        for batch in self._ahead:
            if not batch.cancel():
                batch.exception()  # wait for the one under way
        self._ahead.clear()

    def _read(self) -> torch.Tensor:
        # torch gives pinned memory out again only when the copy from it is done.
        return torch.from_numpy(self._rows.read()).pin_memory()


def widened(narrow: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint16 as int64 on the device."""
    if device.type == "cpu":
        return narrow.long()
    # Two bytes a token cross the bus. Few devices compute with uint16, so the bits go as int16,
    # and the sign is taken off where they arrive.
    is_pinned = device.type == "cuda"
    return narrow.view(torch.int16).to(device, non_blocking=is_pinned).long() & 0xFFFF
