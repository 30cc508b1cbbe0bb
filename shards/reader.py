"""Shards as windows: opening them, and the exact cover of a split that evaluation uses."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.manifest import Manifest, Shard
from shards.writer import DTYPE, INDEX_SCHEMA, npy_header

# Maps kept open by one reader; each costs a file mapping, and reopening costs some 50 us.
MAX_OPEN = 256
COUNTED_AT_ONCE = 1 << 22


class ShardReader:
    """The shards of one split, memory-mapped when first used; at most `MAX_OPEN` at a time.

    Raises ValueError for a split without shards.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        if split not in manifest.splits or not manifest.splits[split].shards:
            raise ValueError(
                f"expected shards for the split {split!r} in {manifest.folder}, found none: "
                "splits are train and val"
            )
        self.manifest = manifest
        self.shards = manifest.splits[split].shards
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of shard `index`, a read-only view of the file, (n_tokens,) uint16."""
        view = self._open.get(index)
        if view is None:
            view = self._open[index] = open_tokens(self.manifest, self.shards[index])
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return view


def open_tokens(manifest: Manifest, shard: Shard) -> np.ndarray:
    """Map one shard, (n_tokens,) uint16, after checking its header and exact size.

    Raises FileNotFoundError for a missing file, ValueError for one not as the manifest says.
    """
    path = manifest.path(shard.file)
    remedy = "restore it, or prepare the dataset again"
    if not path.exists():
        raise FileNotFoundError(f"expected the shard {path}, found no such file: {remedy}")
    # Compared, not parsed: NumPy parses headers as Python, which fails in threads of Python 3.11.
    header = npy_header(shard.tokens)
    size = len(header) + shard.tokens * DTYPE.itemsize
    with open(path, "rb") as file:
        found = (os.fstat(file.fileno()).st_size, file.read(len(header)) == header)
        if found != (size, True):
            raise ValueError(
                f"expected {shard.tokens} tokens of {DTYPE} in {path}, a .npy file of {size} "
                f"bytes, found {found[0]}{'' if found[1] else ' with another header'}: {remedy}"
            )
        view = np.memmap(file, DTYPE, "r", len(header), (shard.tokens,))
    # A plain array over the same memory: indexing np.memmap costs three times as much.
    return np.asarray(view)


def read_index(manifest: Manifest, shard: Shard) -> pa.Table:
    """The index of one shard, as `shards.writer.INDEX_SCHEMA` says.

    Raises FileNotFoundError for a missing file, ValueError for one that is no index.
    """
    path = manifest.path(shard.index)
    remedy = "restore it, or prepare the dataset again"
    if not path.exists():
        raise FileNotFoundError(f"expected the index {path}, found no such file: {remedy}")
    try:
        with pq.ParquetFile(path) as file:
            index = file.read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"expected a whole index in {path}, found {error}: {remedy}") from None
    if index.schema != INDEX_SCHEMA:
        raise ValueError(
            f"expected the columns {', '.join(INDEX_SCHEMA.names)} in {path}, found "
            f"{', '.join(index.schema.names)}: {remedy}"
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
        return self._reader.tokens(shard)[start : start + self.block_size + 1]

    def spread(self, n_tokens: int) -> list[int]:
        """Indices of evenly spaced windows with about `n_tokens` targets, at least one window."""
        count = min(len(self), max(1, n_tokens // self.block_size))
        return [i * len(self) // count for i in range(count)]


def token_counts(manifest: Manifest, split: str) -> np.ndarray:
    """How often each token id occurs in the split, (n_vocab,) int64."""
    reader = ShardReader(manifest, split)
    counts = np.zeros(manifest.tokenizer.n_vocab, np.int64)
    for index in range(len(reader.shards)):
        tokens = reader.tokens(index)
        for start in range(0, len(tokens), COUNTED_AT_ONCE):  # bincount widens to eight bytes
            counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=len(counts))
    return counts
