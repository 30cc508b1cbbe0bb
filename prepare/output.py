"""Where a unit's documents go: one shard a side, opened by its first document."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa

from prepare.documents import Batch
from prepare.encode import Encoded
from shards.manifest import Shard
from shards.tokenizer import string_buffers
from shards.writer import DTYPE, INDEX_SCHEMA, ShardWriter, open_shard

# A stream of unknown length (a compressed file) goes on in a further shard after so many tokens.
MAX_SHARD_TOKENS = 1 << 27


class Side:
    """The shards of one side of one unit, `STEM.npy`, and `STEM_001.npy` ... where it is long.

    A context manager: what is open appears on leaving it, unless by an exception. `shards` lists
    what is finished. `folder` is a staging area: whoever publishes the files makes them durable.
    """

    def __init__(self, folder: Path, stem: str, first_source: int) -> None:
        self.shards: list[Shard] = []
        self._folder, self._stem, self._first_source = folder, stem, first_source
        self._open = ExitStack()
        self._writer: ShardWriter | None = None

    def __enter__(self) -> "Side":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def write(self, batch: Batch, encoded: Encoded, mask: np.ndarray) -> None:
        """Append the documents of a batch that the mask, (n,) bool, names."""
        if not mask.any():
            return
        writer = self._current()
        lengths = encoded.lengths[mask]
        offsets, content = string_buffers(encoded.tokens.filter(pa.array(mask)))
        columns = (
            writer.tokens + np.cumsum(lengths) - lengths,
            batch.sources[mask] + self._first_source,
            batch.rows[mask],
            encoded.text_bytes[mask],
            np.full(len(lengths), not batch.begins),
        )
        arrays = [pa.array(*pair) for pair in zip(columns, INDEX_SCHEMA.types, strict=True)]
        writer.note(pa.record_batch(arrays, schema=INDEX_SCHEMA))
        writer.write(content[offsets[0] : offsets[-1]].view(DTYPE))

    def _current(self) -> ShardWriter:
        """The shard that the next documents go to: a further one once it is full."""
        if self._writer is None or self._writer.tokens >= MAX_SHARD_TOKENS:
            self._open.close()
            suffix = f"_{len(self.shards):03d}" if self.shards else ""
            path = self._folder / f"{self._stem}{suffix}.npy"
            shard = open_shard(path, self.shards, durable=False)
            self._writer = self._open.enter_context(shard)
        return self._writer
