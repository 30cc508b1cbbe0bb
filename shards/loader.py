"""The rank-aware streaming loader: windows of one split in one global, seeded order.

The stream of windows is a function of the datasets, the seed and the block size. A run's place in
it is one position, counted in windows; ranks are offsets. World size, micro-batch and gradient
accumulation only decide which rank reads which window, so any of them may change on resume
(promise 5). B: batch size, T: block size, N: windows in the buffer.
"""

import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import cache
from shards.mixture import Mixture
from shards.order import ORDER_VERSION
from shards.reader import BackgroundCheck, ShardReader
from shards.stream import MixedStream

STATE_VERSION = 2
MAX_POSITION = 1 << 62  # positions, and sums of them with a batch, are computed in 64 bits
# Tokens read at once, sorted by shard: one call per window would take as long as the window. The
# first read is one batch, each later one twice as many, so that the first batch need not wait.
READ_TOKENS = 1 << 22
# Windows after which the pages of the maps are released, at most 64 KB each.
HELD_WINDOWS = 1 << 14
# Batches prepared for a GPU, which computes while the next one is copied to it.
PREFETCH = 2


class BatchReader:
    """Batches of one rank in the shards' uint16, read from any position of the stream.

    Raises ValueError or FileNotFoundError for datasets that can't be served, and from `read` for a
    faulty shard, whether it is being read or was found by the check in the background.
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
        self.stream = MixedStream(
            mixture.manifests, mixture.weights, split, block_size, seed, shuffle_shards
        )
        _check_cache(self._readers, shuffle_shards)
        self._check: BackgroundCheck | None = None
        self._buffer = np.empty((0, self.width), np.uint16)
        self._max_batches = max(1, READ_TOKENS // (batch_size * self.width))
        self._held_windows = 0
        self.seek(0)

    def seek(self, position: int) -> None:
        """Go to a position of the stream, counted in windows of all ranks."""
        self._position = position  # of the first window that is not in the buffer
        self._used, self._buffer, self._batches = 0, self._buffer[:0], 1

    def read(self) -> np.ndarray:
        """Return the next batch, (B, T + 1) uint16, valid until the next call."""
        if self._check is not None:
            self._check.check()
        if self._used == len(self._buffer):
            self._fill_buffer()
        batch = self._buffer[self._used : self._used + self.batch_size]
        self._used += self.batch_size
        return batch

    def _fill_buffer(self) -> None:
        """Read this rank's part of the next global batches."""
        if self._check is None:
            # Each rank checks a part of the shards: a fault found by one ends them all.
            own = slice(self.rank, None, self.world_size)
            parts = [(reader.manifest, reader.shards[own]) for reader in self._readers]
            self._check = BackgroundCheck(parts)
        self._manage_files()
        global_batch = self.batch_size * self.world_size
        first = self._position + self.rank * self.batch_size + np.arange(self.batch_size)
        positions = (np.arange(self._batches)[:, None] * global_batch + first).ravel()  # (N,)
        buffer = self._buffer
        if len(buffer) != len(positions):
            buffer = np.empty((len(positions), self.width), np.uint16)
        self._copy_windows(buffer, *self.stream.locate(positions))
        # Assigned last: after an error, the next call reads the same batch.
        self._buffer = buffer
        self._position += self._batches * global_batch
        self._used, self._batches = 0, min(2 * self._batches, self._max_batches)
        self._held_windows += len(positions)

    def _copy_windows(
        self, buffer: np.ndarray, sources: np.ndarray, shards: np.ndarray, starts: np.ndarray
    ) -> None:
        """Copy windows, each given by its source, shard and first token (N,), shard by shard."""
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
            # Overlapping windows from every token on, a view without a copy.
            shape, strides = (len(tokens) - self.width + 1, self.width), tokens.strides * 2
            windows = np.ndarray(shape, tokens.dtype, tokens, 0, strides)
            buffer[order[first:end]] = windows[starts[first:end]]

    def _manage_files(self) -> None:
        """Fetch the shards that are read next, and release the memory of what was read."""
        for reader, shards in zip(
            self._readers, self.stream.upcoming_shards(self._position), strict=True
        ):
            reader.close_evicted()
            reader.fetch_ahead(shards)
            if self._held_windows >= HELD_WINDOWS:
                reader.release_pages()
        self._held_windows %= HELD_WINDOWS


def _check_cache(readers: list[ShardReader], shuffle_shards: int) -> None:
    """Raise ValueError if remote shards that are shuffled together don't fit into the cache."""
    needed = 0
    for reader in readers:
        if reader.manifest.uri:
            sizes = sorted((2 * shard.tokens for shard in reader.shards), reverse=True)
            # The group being read and the next one, which is being fetched.
            needed += sum(sizes[: 2 * shuffle_shards] if shuffle_shards else sizes)
    if needed and needed > cache.limit_bytes():
        raise ValueError(
            f"expected {needed / 1e9:.3g} GB in the cache {cache.folder()} for the shards that are "
            f"shuffled together, found a limit of {cache.limit_bytes() / 1e9:.3g}: set "
            "MYGPT_CACHE_GB, or shuffle fewer with --shuffle-shards"
        )


class TokenLoader(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """Endless iterator of (x, y), each (B, T) int64 on `device`; y is x one token later.

    `data` is an opened mixture, the folder or URI of a dataset, or several specs that
    `shards.mixture.parse_data_specs` reads. Together the ranks' k-th batches hold the windows
    [k * batch_size * world_size, (k + 1) * batch_size * world_size) of the stream, rank r the r-th
    part of them. Every window of the split is served once per epoch, each source of a mixture
    having epochs of its own; batches may straddle epochs. With `shuffle_shards` only that many
    shards are shuffled together. x and y share memory: clone one before writing to it. Threads may
    share a loader: each batch goes to one of them. Pickled, as for a spawned process, it is opened
    again at its position.

    Attributes: `windows_per_epoch`, of all sources; `unused_tokens`, which no window of an epoch
    holds; `wait_seconds`, the time spent inside `next`.

    Raises FileNotFoundError or ValueError for a dataset that is missing, altered or shorter than
    one block, and ValueError for impossible sizes and ranks.
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
        sizes = (batch_size, block_size, world_size, rank, seed, shuffle_shards)
        if (
            any(type(size) is not int or size < 0 for size in sizes)
            or min(batch_size, block_size) < 1
            or batch_size * block_size * world_size > MAX_POSITION
            or seed >= 1 << 64
            or rank >= world_size
        ):
            raise ValueError(
                "expected batch_size, block_size, world_size >= 1, 0 <= rank < world_size and "
                f"seed, shuffle_shards >= 0, all int, found {', '.join(map(repr, sizes))}"
            )
        if not isinstance(data, Mixture):
            data = Mixture.load([str(data)] if isinstance(data, str | Path) else data)
        self.mixture = data
        self._reader = BatchReader(
            data, split, batch_size, block_size, rank, world_size, seed, shuffle_shards
        )
        streams = self._reader.stream.streams
        self.windows_per_epoch = sum(stream.windows_per_epoch for stream in streams)
        self.unused_tokens = sum(stream.unused_tokens for stream in streams)
        self.split, self.seed, self.shuffle_shards = split, seed, shuffle_shards
        self.batch_size, self.block_size = batch_size, block_size
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self.wait_seconds = 0.0
        self._position = 0
        self._lock = threading.Lock()
        self._thread = _reading_thread(self.device) if self.device.type == "cuda" else None
        self._prefetched: deque[Future[torch.Tensor]] = deque()

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        started = time.perf_counter()
        with self._lock:
            if self._thread:
                while len(self._prefetched) <= PREFETCH:
                    self._prefetched.append(self._thread.submit(self._read_pinned))
                batch = self._prefetched.popleft().result()
            else:
                batch = torch.from_numpy(self._reader.read())
            windows = to_int64(batch, self.device)  # (B, T + 1)
            self._position += self.batch_size * self.world_size
            self.wait_seconds += time.perf_counter() - started
        return windows[:, :-1], windows[:, 1:]

    def _read_pinned(self) -> torch.Tensor:
        # torch's allocator reuses pinned memory only after the copy from it has finished.
        return torch.from_numpy(self._reader.read()).pin_memory()

    def state_dict(self) -> dict[str, Any]:
        """Return, as JSON, the position after the last batch handed out and the stream's identity.

        Batches that were only prefetched don't count.
        """
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
        if type(position) is not int or not 0 <= position <= MAX_POSITION:
            raise ValueError(
                f"expected a loader state with a position from 0, found {position!r}: resume from "
                "another checkpoint"
            )
        with self._lock:
            for batch in self._prefetched:
                if not batch.cancel():
                    batch.exception()  # wait for the one being read
            self._prefetched.clear()
            self._reader.seek(position)
            self._position = position

    __setstate__ = load_state_dict

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments and the state, not the open files."""
        sizes = (self.batch_size, self.block_size, self.rank, self.world_size)
        more = (self.seed, self.device, self.shuffle_shards)
        return TokenLoader, (self.mixture, self.split, *sizes, *more), self.state_dict()


def _reading_thread(device: torch.device) -> ThreadPoolExecutor:
    """Return a thread that reads ahead for a GPU."""
    # Set its GPU: otherwise pinning would create a context on GPU 0, which takes memory there.
    index = torch.cuda.current_device() if device.index is None else device.index
    return ThreadPoolExecutor(1, "loader", torch.cuda.set_device, (index,))


def to_int64(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return uint16 token ids as int64 on the device."""
    if device.type == "cpu":
        return tokens.long()
    # Copied as 2 bytes each. Few devices compute with uint16, so the bits travel as int16, and the
    # mask undoes the sign extension on the device.
    is_pinned = device.type == "cuda"
    return tokens.view(torch.int16).to(device, non_blocking=is_pinned).long() & 0xFFFF
