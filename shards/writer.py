"""Writing of shards: tokens as a standard .npy file, and beside it the index of its documents."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.files import atomic_file
from shards.manifest import DTYPE, INDEX_SCHEMA, Shard, npy_header

INDEX_SUFFIX = ".docs.parquet"


def to_uint16(ids: np.ndarray) -> np.ndarray:
    """Return the ids as uint16. Raises ValueError if one does not fit; ids never wrap."""
    if ids.dtype == DTYPE:
        return ids
    high = int(ids.max(initial=0))
    low = 0 if ids.dtype.kind == "u" else int(ids.min(initial=high))
    if low < 0 or high > np.iinfo(DTYPE).max:
        raise ValueError(
            f"expected token ids from 0 to {np.iinfo(DTYPE).max}, found {low} to {high}: "
            "a vocabulary of this size does not fit the shards' 16 bits"
        )
    return ids.astype(DTYPE)


@dataclass
class ShardWriter:
    """One shard being written. `open_shard` makes one."""

    _file: IO[bytes]
    tokens: int = 0
    _index: list[pa.RecordBatch] = field(default_factory=list)

    def write(self, ids: np.ndarray) -> None:
        """Append token ids, (n,). Raises ValueError as `to_uint16`."""
        self._file.write(np.ascontiguousarray(to_uint16(ids)).data)
        self.tokens += len(ids)

    def note(self, documents: pa.RecordBatch) -> None:
        """Append rows to the index, offsets counted from the start of the shard."""
        self._index.append(documents)

    def finish(self) -> pa.Table:
        """Write the header, now that the length is known, and return the index."""
        self._file.seek(0)
        self._file.write(npy_header(self.tokens))
        return pa.Table.from_batches(self._index, schema=INDEX_SCHEMA)


@contextmanager
def open_shard(path: Path, result: list[Shard]) -> Iterator[ShardWriter]:
    """Write the shard `path` and its index; both appear whole when the block ends, or not at all.

    Appends the description of the finished shard to `result`. The index is renamed first, so a
    shard that exists has its index. Neither is fsynced: that is for who publishes their folder.
    """
    index_path = path.with_name(path.stem + INDEX_SUFFIX)
    with atomic_file(path, durable=False) as file:
        file.write(npy_header(0))
        writer = ShardWriter(file)
        yield writer
        index = writer.finish()
        with atomic_file(index_path, durable=False) as index_file:
            # Values hardly ever repeat: with a dictionary the file is larger and slower to write.
            pq.write_table(index, index_file, compression="zstd", use_dictionary=False)
            index_hash = _sha256(index_file)
        result.append(
            Shard(
                file=path.name,
                index=index_path.name,
                tokens=writer.tokens,
                documents=index.num_rows - sum(index["continued"].to_pylist()),
                text_bytes=sum(index["text_bytes"].to_pylist()),
                sha256=_sha256(file),
                index_sha256=index_hash,
            )
        )


def _sha256(file: IO[bytes]) -> str:
    """Return the hex sha256 of a whole open file."""
    file.seek(0)
    return hashlib.file_digest(cast(io.BufferedRandom, file), "sha256").hexdigest()
