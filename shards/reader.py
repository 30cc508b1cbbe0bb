"""Shards as windows: opening them, and the exact cover of a split that evaluation uses."""

import mmap
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import IO, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import cache
from shards.manifest import Manifest, Shard
from shards.writer import DTYPE, INDEX_SCHEMA, npy_header

# Maps kept open by one reader at most; each holds a file descriptor.
MAX_OPEN = 4096
# A map's pages count as this process's memory once they were read, 16 at a time. Of a split beyond
# a gigabyte they are let go from time to time; the system still has them in its cache.
LARGE_TOKENS = 1 << 29
COUNTED_AT_ONCE = 1 << 22
REMEDY = "restore it, or prepare the dataset again"


class ShardReader:
    """The shards of one split, memory-mapped when first used; so many `readers` share `max_open()`.

    Raises ValueError for a split without shards, FileNotFoundError where one is not in the folder.
    """

    def __init__(self, manifest: Manifest, split: str, readers: int = 1) -> None:
        if split not in manifest.splits or not manifest.splits[split].shards:
            raise ValueError(
                f"expected shards for the split {split!r} in {manifest.location}, found none: "
                "splits are train and val"
            )
        self.manifest = manifest
        self.shards = manifest.splits[split].shards
        if not manifest.uri:
            _check_presence(manifest, self.shards)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._max_open = max(1, max_open() // readers)
        self._is_large = sum(shard.tokens for shard in self.shards) > LARGE_TOKENS

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of shard `index`, a read-only view of the file, (n_tokens,) uint16."""
        view = self._open.get(index)
        if view is None:
            view = self._open[index] = open_tokens(self.manifest, self.shards[index])
            if len(self._open) > self._max_open:
                self._open.popitem(last=False)
        return view

    def fetch_ahead(self, indices: Iterable[int]) -> None:
        """Bring shards of a remote dataset into the cache, on threads, in this order."""
        if self.manifest.uri:
            shards = (self.shards[index] for index in indices)
            cache.fetch_ahead((self.manifest.uri, shard.file, shard.sha256) for shard in shards)

    def forget_evicted(self) -> None:
        """Close what is no longer in the cache, to free its space; mark the rest as used."""
        if self.manifest.uri:
            for index in list(self._open):
                if not cache.keep(self.shards[index].sha256):
                    del self._open[index]

    def let_go(self) -> None:
        """Give back the memory of what was read of a large split; it is mapped as before."""
        if self._is_large and hasattr(mmap, "MADV_DONTNEED"):
            for view in self._open.values():
                _map_of(view).madvise(mmap.MADV_DONTNEED)


def max_open() -> int:
    """How many maps readers may hold together: at most half of the files a process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN if soft < 0 else max(1, min(MAX_OPEN, soft // 2))


def _check_presence(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise FileNotFoundError for the first shard whose name is not in the folder."""
    there = set(os.listdir(manifest.folder))
    missing = [shard.file for shard in shards if shard.file not in there]
    if missing:
        raise FileNotFoundError(
            f"expected the shard {manifest.path(missing[0])}, found no such file ({len(missing)} "
            f"of {len(shards)} are missing): {REMEDY}"
        )


def open_file(manifest: Manifest, file: str, sha256: str) -> IO[bytes]:
    """Open one of the dataset's files; a remote one is fetched, checked and kept in the cache.

    Raises FileNotFoundError if there is none; for a remote one also ValueError if its content has
    another hash, and OSError if it can't be read.
    """
    if manifest.uri:
        return cache.open_file(manifest.uri, file, sha256)
    try:
        return open(manifest.path(file), "rb")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected {manifest.path(file)}, found no such file: {REMEDY}"
        ) from None


def open_tokens(manifest: Manifest, shard: Shard) -> np.ndarray:
    """Map one shard, (n_tokens,) uint16, after checking its header and exact size.

    Raises FileNotFoundError for a missing file, ValueError for one not as the manifest says, and
    OSError for a remote one that can't be read.
    """
    # Compared, not parsed: NumPy parses headers as Python, which fails in threads of Python 3.11.
    header = _header(shard.tokens)
    size = len(header) + shard.tokens * DTYPE.itemsize
    with open_file(manifest, shard.file, shard.sha256) as file:
        found = (os.fstat(file.fileno()).st_size, file.read(len(header)) == header)
        if found != (size, True):
            raise ValueError(
                f"expected {shard.tokens} tokens of {DTYPE} in {manifest.location_of(shard.file)}, "
                f"a .npy file of {size} bytes, found {found[0]}"
                f"{'' if found[1] else ' with another header'}: {REMEDY}"
            )
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, DTYPE, shard.tokens, len(header))


_header = lru_cache(npy_header)


def _map_of(view: np.ndarray) -> mmap.mmap:
    """The map that a shard's tokens are a view of."""
    content = view.base.obj if isinstance(view.base, memoryview) else view.base
    assert isinstance(content, mmap.mmap)
    return content


def read_index(manifest: Manifest, shard: Shard) -> pa.Table:
    """The index of one shard, as `shards.writer.INDEX_SCHEMA` says.

    Raises FileNotFoundError for a missing file, ValueError for one that is no index, and OSError
    for a remote one that can't be read.
    """
    name = manifest.location_of(shard.index)
    with open_file(manifest, shard.index, shard.index_sha256) as content:
        try:
            with pq.ParquetFile(content) as file:
                index = file.read()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"expected a whole index in {name}, found {error}: {REMEDY}") from None
    if index.schema != INDEX_SCHEMA:
        raise ValueError(
            f"expected the columns {', '.join(INDEX_SCHEMA.names)} in {name}, found "
            f"{', '.join(index.schema.names)}: {REMEDY}"
        )
    return index


class EvalWindows(Sequence[np.ndarray]):
    """A split cut into consecutive windows so that each target occurs exactly once (promise 9).

    Window i holds 2 to `block_size` + 1 token ids, uint16; its targets are all but the first.
    The first token of a shard, an `<|endoftext|>` unless a long document goes on, has no target.
    """

    def __init__(self, manifest: Manifest, split: str, block_size: int) -> None:
        self._reader = ShardReader(manifest, split)
        self.block_size = block_size
        targets = np.array([max(shard.tokens - 1, 0) for shard in self._reader.shards])
        self._ends = np.cumsum(-(-targets // block_size))
        self.n_targets = int(targets.sum())

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        start = (index - first) * self.block_size
        self._reader.fetch_ahead(range(shard + 1, min(shard + 2, len(self._ends))))
        return self._reader.tokens(shard)[start : start + self.block_size + 1]

    def spread(self, n_tokens: int) -> list[int]:
        """Indices of evenly spaced windows with about `n_tokens` targets, at least one window."""
        return evenly_spaced(len(self), max(1, n_tokens // self.block_size))


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` indices of range(total), evenly spaced, the first being 0."""
    count = min(total, count)
    return [i * total // count for i in range(count)]


def token_counts(manifest: Manifest, split: str) -> np.ndarray:
    """How often each token id occurs in the split, (n_vocab,) int64."""
    reader = ShardReader(manifest, split)
    counts = np.zeros(manifest.tokenizer.n_vocab, np.int64)
    for index in range(len(reader.shards)):
        tokens = reader.tokens(index)
        for start in range(0, len(tokens), COUNTED_AT_ONCE):  # bincount widens to eight bytes
            counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=len(counts))
    return counts


# --- Whose tokens an evaluation scores: the document and the source of every target of a split.


class DocumentWindows:
    """The exact cover of a split of one or several datasets, and the document of each target.

    Windows are those of `EvalWindows`, one dataset after the other. A target belongs to the
    document of the token before it: so a document has its text and the `<|endoftext|>` that ends
    it. One that goes on in the next shard is still one, though the first token there is no target.

    Attributes, D documents: `n_documents`; `text_bytes`, int64 (D,); `dataset`, int64 (D,), the
    index into `manifests`; `source`, int64 (D,), the index into the sources of all manifests, one
    list after the other. Raises FileNotFoundError or ValueError for shards and indexes that are
    missing or not as their manifest says.
    """

    def __init__(self, manifests: Sequence[Manifest], split: str, block_size: int) -> None:
        self.block_size = block_size
        self._parts = [_Part(manifest, split, block_size) for manifest in manifests]
        self._ends = np.cumsum([len(part.windows) for part in self._parts])
        sizes = [len(part.source) for part in self._parts]
        self._first_documents = np.cumsum([0, *sizes])
        self.n_documents = int(self._first_documents[-1])
        self.text_bytes = np.concatenate([part.text_bytes for part in self._parts])
        self.dataset = np.repeat(np.arange(len(sizes)), sizes)
        first_sources = np.cumsum([0, *(len(manifest.sources) for manifest in manifests)])
        self.source = np.concatenate([part.source for part in self._parts])
        self.source = self.source + first_sources[self.dataset]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[np.ndarray]:
        return chain.from_iterable(part.windows for part in self._parts)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part, within = self._place(index)
        return self._parts[part].windows[within]

    def documents(self, index: int) -> np.ndarray:
        """The document of each target of window `index`, int64, ascending."""
        part, within = self._place(index)
        return self._first_documents[part] + self._parts[part].documents(within)

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)


class _Part:
    """One dataset of them; documents are counted from 0."""

    def __init__(self, manifest: Manifest, split: str, block_size: int) -> None:
        self.windows = EvalWindows(manifest, split, block_size)
        self.block_size = block_size
        shards = manifest.splits[split].shards
        # Where each shard's windows end, as EvalWindows cuts it.
        targets = np.array([max(shard.tokens - 1, 0) for shard in shards])
        self._window_ends = np.cumsum(-(-targets // block_size))
        indexes = [read_index(manifest, shard) for shard in shards]
        self._row_ends = np.cumsum([len(index) for index in indexes])
        columns = {
            name: np.concatenate([index[name].to_numpy() for index in indexes])
            for name in ("offset", "source", "text_bytes", "continued")
        }
        self._offsets = columns["offset"]
        begins = ~columns["continued"]
        begins[:1] = True
        self._documents = np.cumsum(begins) - 1
        self.source = columns["source"][begins]
        self.text_bytes = np.bincount(self._documents, columns["text_bytes"]).astype(np.int64)

    def documents(self, index: int) -> np.ndarray:
        """The document of each target of one window."""
        shard = int(np.searchsorted(self._window_ends, index, side="right"))
        first_window = int(self._window_ends[shard - 1]) if shard else 0
        first_row = int(self._row_ends[shard - 1]) if shard else 0
        rows = slice(first_row, int(self._row_ends[shard]))
        start = (index - first_window) * self.block_size
        before = np.arange(start, start + len(self.windows[index]) - 1)
        found = np.searchsorted(self._offsets[rows], before, side="right") - 1
        return self._documents[rows][found]
