"""Reading of shards: memory maps, indexes, checks, and the exact cover of a split for evaluation.

Anything not as the manifest says is a ValueError.
"""

import mmap
import os
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import cache, remote
from shards.manifest import DTYPE, INDEX_SCHEMA, Manifest, Shard, npy_header

# Maps open at once at most; each holds a file descriptor.
MAX_OPEN = 4096
# Pages of a map that were read count as memory of this process. Of a split of more tokens they are
# released from time to time; the operating system still has them in its page cache.
LARGE_TOKENS = 1 << 29
COUNTED_AT_ONCE = 1 << 22
# Between two shards of a background check: the batches come first.
PAUSE_SECONDS = 0.001
REMEDY = "restore it, or prepare the dataset again"
# What `row` of an index counts in sources of these types; bytes in all others.
COUNTED_IN = {".parquet": "row", ".arrow": "row", ".bin": "token"}


def position(source: str, row: int) -> str:
    """Return where a document begins in its source, for people: `row 5`, `byte 1,024`."""
    suffixes = PurePosixPath(source.lower()).suffixes[-2:]  # the last may be a compression's
    units = [COUNTED_IN[suffix] for suffix in suffixes if suffix in COUNTED_IN]
    return f"{units[0] if units else 'byte'} {row:,}"


class ShardReader:
    """Memory maps of the shards of one split, opened on first use, the oldest closed first.

    All readers of the process share one limit on open maps. Raises ValueError for a split without
    shards, FileNotFoundError if one is missing from the folder.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        if split not in manifest.splits or not manifest.splits[split].shards:
            raise ValueError(
                f"expected shards for the split {split!r} in {manifest.location}, found none: "
                "splits are train and val"
            )
        self.manifest = manifest
        self.shards = manifest.splits[split].shards
        if not manifest.uri:
            _check_presence(manifest, self.shards)
        self._open: dict[int, np.ndarray] = {}
        with _opening:
            _readers.add(self)
        self._is_large = sum(shard.tokens for shard in self.shards) > LARGE_TOKENS

    def tokens(self, index: int) -> np.ndarray:
        """Return token ids of shard `index`, (n_tokens,) uint16, a read-only view of the file."""
        view = self._open.get(index)
        if view is None:
            view = open_tokens(self.manifest, self.shards[index])
            with _opening:
                self._open[index] = view
                if sum(len(reader._open) for reader in _readers) > max_open():
                    fullest = max(_readers, key=lambda reader: len(reader._open))
                    fullest._open.pop(next(iter(fullest._open)), None)
        return view

    def fetch_ahead(self, indices: Iterable[int]) -> None:
        """Start to fetch shards of a remote dataset into the cache, in this order."""
        if self.manifest.uri:
            shards = (self.shards[index] for index in indices)
            cache.fetch_ahead((self.manifest.uri, shard.file, shard.sha256) for shard in shards)

    def close_evicted(self) -> None:
        """Close the maps of files evicted from the cache, to free their space; mark the others."""
        if self.manifest.uri:
            for index in list(self._open):
                if not cache.keep(self.shards[index].sha256):
                    self._open.pop(index, None)

    def release_pages(self) -> None:
        """Release the memory of a large split with madvise(MADV_DONTNEED); the maps stay valid."""
        if self._is_large and hasattr(mmap, "MADV_DONTNEED"):
            for view in list(self._open.values()):
                _map_of(view).madvise(mmap.MADV_DONTNEED)


_readers: "weakref.WeakSet[ShardReader]" = weakref.WeakSet()
_opening = threading.Lock()


def max_open() -> int:
    """Return the limit on open maps: at most half of the files that this process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if soft < 0 else max(1, min(MAX_OPEN, soft // 2))


def _check_presence(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise FileNotFoundError for the first shard whose name is not in the folder."""
    present = set(os.listdir(manifest.folder))
    missing = [shard.file for shard in shards if shard.file not in present]
    if missing:
        raise FileNotFoundError(
            f"expected the shard {manifest.path(missing[0])}, found no such file ({len(missing)} "
            f"of {len(shards)} are missing): {REMEDY}"
        )


def open_file(
    manifest: Manifest, file: str, sha256: str = "", size: int | None = None
) -> IO[bytes]:
    """Open one of the dataset's files; a remote one is fetched, checked and kept in the cache.

    Raises FileNotFoundError if there is none; for a remote one also ValueError if its content has
    another hash, and OSError if it can't be read.
    """
    if manifest.uri:
        return cache.open_file(manifest.uri, file, sha256, size)
    path = manifest.path(file)
    if not path.is_file():  # a FIFO would be waited for
        found = "something else" if path.exists() else "no such file"
        raise FileNotFoundError(f"expected the file {path}, found {found}: {REMEDY}")
    return open(path, "rb")


def open_tokens(manifest: Manifest, shard: Shard) -> np.ndarray:
    """Map one shard, (n_tokens,) uint16, after checking its header and exact size.

    Raises as `open_file`, and ValueError if the file is not as the manifest says.
    """
    with open_file(manifest, shard.file, shard.sha256, shard.file_bytes) as file:
        start = len(read_header(manifest, shard, file))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, DTYPE, shard.tokens, start)


def read_header(manifest: Manifest, shard: Shard, file: IO[bytes]) -> bytes:
    """Read the header of an open token file, up to its first token.

    Raises ValueError if the header or the file's size is not as the manifest says.
    """
    # Compared, not parsed: NumPy parses headers as Python, which fails in threads of Python 3.11.
    header = npy_header(shard.tokens)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_header = file.read(len(header)) == header
    if (size, is_header) != (shard.file_bytes, True):
        raise ValueError(
            f"expected {shard.tokens} tokens of {DTYPE} in {manifest.location_of(shard.file)}, a "
            f".npy file of {shard.file_bytes} bytes, found {size}"
            f"{'' if is_header else ' with another header'}: {REMEDY}"
        )
    return header


def _map_of(view: np.ndarray) -> mmap.mmap:
    """Return the map that a shard's tokens are a view of."""
    content = view.base.obj if isinstance(view.base, memoryview) else view.base
    assert isinstance(content, mmap.mmap)
    return content


def read_index(manifest: Manifest, shard: Shard) -> pa.Table:
    """Return the document index of one shard, with the columns of `shards.manifest.INDEX_SCHEMA`.

    Raises as `open_file`, and ValueError if the file is not such an index.
    """
    with open_file(manifest, shard.index, shard.index_sha256) as file:
        return parse_index(file, manifest.location_of(shard.index))


def parse_index(content: IO[bytes], name: str) -> pa.Table:
    """Return the index in an open file, called `name` in errors. Raises as `read_index`."""
    try:
        with pq.ParquetFile(content) as file:
            # A thread that lets go of a Python file while the interpreter ends aborts the process.
            index = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"expected a whole index in {name}, found {error}: {REMEDY}") from None
    if index.schema != INDEX_SCHEMA:
        raise ValueError(
            f"expected the columns {', '.join(INDEX_SCHEMA.names)} in {name}, found "
            f"{', '.join(index.schema.names)}: {REMEDY}"
        )
    return index


class BackgroundCheck(threading.Thread):
    """Check of the size and header of shards; of a remote dataset, of the sizes in its listing.

    `check` raises the first FileNotFoundError or ValueError found so far.
    """

    def __init__(self, parts: Sequence[tuple[Manifest, Sequence[Shard]]]) -> None:
        super().__init__(name="background-check", daemon=True)
        self.fault: Exception | None = None
        self._parts = parts
        self.start()

    def check(self) -> None:
        """Raise the fault, if one was found so far."""
        if self.fault is not None:
            raise self.fault

    def run(self) -> None:
        """Check all shards, up to the first fault."""
        try:
            for manifest, shards in self._parts:
                if manifest.uri:
                    _compare_sizes(manifest, shards)
                    continue
                for shard in shards:
                    open_tokens(manifest, shard)
                    time.sleep(PAUSE_SECONDS)
        except (ValueError, OSError) as error:
            self.fault = error


def _compare_sizes(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise FileNotFoundError or ValueError for a shard that is missing or of another size."""
    sizes = remote.sizes(manifest.uri)
    for shard in shards:
        path = manifest.location_of(shard.file)
        if (found := sizes.get(shard.file)) is None:
            raise FileNotFoundError(f"expected the shard {path}, found no such file: {REMEDY}")
        if found != shard.file_bytes:
            raise ValueError(
                f"expected {shard.file_bytes} bytes in {path}, found {found}: {REMEDY}"
            )


def token_counts(manifest: Manifest, split: str) -> np.ndarray:
    """Count the occurrences of each token id in a split, (n_vocab,) int64."""
    reader = ShardReader(manifest, split)
    counts = np.zeros(manifest.tokenizer.n_vocab, np.int64)
    for index in range(len(reader.shards)):
        tokens = reader.tokens(index)
        for start in range(0, len(tokens), COUNTED_AT_ONCE):  # bincount copies to eight bytes each
            counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=len(counts))
    return counts


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` indices of range(total), evenly spaced, the first being 0."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


class EvalWindows(Sequence[np.ndarray]):
    """Consecutive windows of a split in which each target occurs exactly once (promise 9).

    Window i holds 2 to `block_size` + 1 token ids, uint16; all but the first are targets. The first
    token of a shard, an `<|endoftext|>` unless a long document continues there, is never one.
    """

    def __init__(self, manifest: Manifest, split: str, block_size: int) -> None:
        self.block_size = block_size
        self._reader = ShardReader(manifest, split)
        targets = np.array([max(shard.tokens - 1, 0) for shard in self._reader.shards])
        self._ends = np.cumsum(-(-targets // block_size))
        self.n_targets = int(targets.sum())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        shard, start = self.locate(index)
        self._reader.fetch_ahead(range(shard + 1, min(shard + 2, len(self._ends))))
        return self._reader.tokens(shard)[start : start + self.block_size + 1]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (shard, first token) of window `index`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, window = locate_part(self._ends, index)
        return shard, window * self.block_size

    def spread(self, n_tokens: int) -> list[int]:
        """Return indices of evenly spaced windows with about `n_tokens` targets, at least one."""
        return evenly_spaced(len(self), max(1, n_tokens // self.block_size))


def locate_part(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Return (part, index within it) of an index into parts that end at `ends`, (n_parts,)."""
    part = int(np.searchsorted(ends, index, side="right"))
    return part, index - (int(ends[part - 1]) if part else 0)
