"""Atomic shard files: tokens to a standard .npy, and beside it the index of the documents in it."""

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
from shards.manifest import Shard

DTYPE = np.dtype("<u2")
INDEX_SUFFIX = ".docs.parquet"
INDEX_SCHEMA = pa.schema(
    [
        ("offset", pa.int64()),  # of the document's first token, its <|endoftext|>, in the shard
        ("source", pa.int32()),  # index into the manifest's sources
        ("row", pa.int64()),  # the document's place in its source: row, line or byte, from 0
        ("text_bytes", pa.int64()),  # its UTF-8 size
        # It goes on with the row before, maybe of the shard before: no <|endoftext|> stands here.
        ("continued", pa.bool_()),
    ]
)


def to_uint16(ids: np.ndarray) -> np.ndarray:
    """The same ids as uint16. Raises ValueError where one does not fit, and never wraps."""
    if ids.dtype == DTYPE:
        return ids
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high > np.iinfo(DTYPE).max:
        raise ValueError(
            f"expected token ids from 0 to {np.iinfo(DTYPE).max}, found {low} to {high}: "
            "a vocabulary of this size does not fit the shards' 16 bits"
        )
    return ids.astype(DTYPE)


@dataclass
class ShardWriter:
    """One shard being written. Get it from `open_shard`."""

    _file: IO[bytes]
    tokens: int = 0
    _index: list[pa.RecordBatch] = field(default_factory=list)

    def write(self, ids: np.ndarray) -> None:
        """Append token ids, (n,). Raises ValueError for an id that uint16 can't hold."""
        self._file.write(np.ascontiguousarray(to_uint16(ids)).data)
        self.tokens += len(ids)

    def note(self, documents: pa.RecordBatch) -> None:
        """Append rows of the index, offsets counted from the start of the shard."""
        self._index.append(documents)

    def finish(self) -> pa.Table:
        """Put the now known length into the header; returns the index."""
        self._file.seek(0)
        self._file.write(npy_header(self.tokens))
        return pa.Table.from_batches(self._index, schema=INDEX_SCHEMA)


@contextmanager
def open_shard(path: Path, result: list[Shard], durable: bool = True) -> Iterator[ShardWriter]:
    """Write the shard `path` and its index; both appear on leaving the block, or neither is whole.

    Appends the finished shard's description to `result`; the index file is renamed first, so a
    shard that exists has its index. `durable` is that of `atomic_file`.
    """
    index_path = path.with_name(path.stem + INDEX_SUFFIX)
    with atomic_file(path, durable) as file:
        file.write(npy_header(0))
        writer = ShardWriter(file)
        yield writer
        index = writer.finish()
        with atomic_file(index_path, durable) as index_file:
            # Numbers hardly ever repeat: with a dictionary the file is larger and takes longer.
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


def npy_header(tokens: int) -> bytes:
    """The .npy header of `(tokens,)` uint16; NumPy pads it so that any length takes as much."""
    buffer = io.BytesIO()
    description = {"descr": DTYPE.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def _sha256(file: IO[bytes]) -> str:
    """Hex sha256 of a whole open file."""
    file.seek(0)
    return hashlib.file_digest(cast(io.BufferedRandom, file), "sha256").hexdigest()
