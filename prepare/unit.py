"""One unit of input turned into its train and val shards."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from prepare.batch import Batch
from prepare.documents import read
from prepare.encode import AuditError, Encoded, document_hashes, encode
from prepare.plan import Plan, Unit, UnitResult
from prepare.quarantine import BadLimit, list_bad, total_bad
from prepare.split import VAL_SOURCE
from shards.encoder import string_buffers
from shards.manifest import DTYPE, INDEX_SCHEMA, SPLITS, Shard
from shards.tokenizer import Tokenizer
from shards.writer import ShardWriter, open_shard

# A stream of unknown length (a compressed file) continues in another shard after this many tokens.
MAX_SHARD_TOKENS = 1 << 27


@dataclass(frozen=True)
class Exclusions:
    """Documents to leave out as duplicates: those at some `indices` of the unit, (n,) int64, and
    training text with one of some content `hashes`, (n, 2) uint64, sorted."""

    indices: np.ndarray | None = None
    hashes: np.ndarray | None = None

    def mask(self, indices: np.ndarray, hashes: np.ndarray, is_val: np.ndarray) -> np.ndarray:
        """Return which documents of a batch are excluded, (n,) bool."""
        excluded = np.zeros(len(indices), bool)
        if self.indices is not None:
            excluded |= np.isin(indices, self.indices)
        if self.hashes is not None:
            first = np.searchsorted(self.hashes[:, 0], hashes[:, 0], "left")
            end = np.searchsorted(self.hashes[:, 0], hashes[:, 0], "right")
            for i in np.flatnonzero(~is_val & (first < end)):
                excluded[i] |= hashes[i, 1] in self.hashes[first[i] : end[i], 1]
        return excluded


@dataclass(frozen=True)
class UnitReader:
    """Documents of one unit: the split of each, and which of them are left out."""

    plan: Plan
    unit: Unit
    exclusions: Exclusions
    limit: BadLimit | None = None

    def read(self, result: UnitResult) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Yield batches with what is training and what validation text of them, (n,) bool.

        Notes in `result` what is neither. Where more than `limit` is bad it stops, and the result
        is `stopped`. Raises ValueError for a source that changed since it was planned, OSError for
        failing I/O.
        """
        documents = 0
        for batch in read(self.plan.files, self.unit.slices):
            # Not right after a batch: what has been read to its end is finished, and kept.
            result.stopped = bool(self.limit and self.limit.is_exceeded(*total_bad(result.bad)))
            if result.stopped:
                break
            list_bad(result.bad, batch.bad)
            result.read += sum(bad.documents for bad in batch.bad)
            if not len(batch.texts):
                continue
            hashes = document_hashes(batch)
            is_val = self._is_val(batch, hashes)
            # A continued piece has the index of the document that it continues.
            indices = np.arange(len(is_val)) + documents - int(batch.continued)
            nonempty = np.diff(string_buffers(batch.texts)[0]) > 0
            excluded = nonempty & self.exclusions.mask(indices, hashes, is_val)
            if not batch.continued:
                documents += len(nonempty)
                result.read += len(nonempty)
                result.empty += int(np.count_nonzero(~nonempty))
                result.duplicates += int(np.count_nonzero(excluded))
            kept = nonempty & ~excluded
            yield batch, kept & ~is_val, kept & is_val
        self._check_unchanged()

    def _is_val(self, batch: Batch, hashes: np.ndarray) -> np.ndarray:
        """Return which documents of a batch are validation text, (n,) bool."""
        if batch.split is not None:
            return np.full(len(batch.texts), batch.split == "val")
        if self.plan.rule.rule == VAL_SOURCE:
            return np.array([self.plan.files[source].val for source in batch.sources.tolist()])
        return self.plan.rule.is_val(hashes)

    def _check_unchanged(self) -> None:
        """Raise ValueError if a file of the unit has changed since it was planned."""
        for index in {part.file for part in self.unit.slices}:
            file = self.plan.files[index]
            status = file.status()
            if status != (file.size, file.mtime):
                raise ValueError(
                    f"expected {file.name} with {file.size} bytes as when the dataset was started, "
                    f"found that file {'changed' if status else 'gone'}: restore it and run again, "
                    "or prepare into another --out"
                )


def write_unit(reader: UnitReader, folder: Path, tokenizer: Tokenizer) -> UnitResult:
    """Write a unit's shards into `folder`. Raises as `UnitReader.read`.

    If the audit finds a difference, the whole unit is encoded by tiktoken, with a warning.
    """
    try:
        return _encode_unit(reader, folder, tokenizer)
    except AuditError as error:
        result = _encode_unit(reader, folder, tokenizer.reference_only())
        result.warnings.append(f"unit {result.unit} was encoded by tiktoken alone: {error}")
        return result


def _encode_unit(reader: UnitReader, folder: Path, tokenizer: Tokenizer) -> UnitResult:
    """Read, encode and write the unit's documents."""
    train, val = (
        SplitWriter(folder, f"{split}_{reader.unit.name}", reader.plan.first_source)
        for split in SPLITS
    )
    result = UnitResult(reader.unit.number, {"train": train.shards, "val": val.shards})
    with train, val:
        for number, (batch, in_train, in_val) in enumerate(reader.read(result)):
            encoded = encode(tokenizer, batch, audit_first=number == 0)
            train.write(batch, encoded, in_train)
            val.write(batch, encoded, in_val)
    return result


class SplitWriter(ExitStack):
    """Writer of one split of one unit: `STEM.npy`, then `STEM_001.npy` ... if it is long.

    A context manager; `shards` lists the finished shards. A shard is opened by its first document.
    `folder` is a staging area: the files are fsynced when they are published.
    """

    def __init__(self, folder: Path, stem: str, first_source: int) -> None:
        super().__init__()
        self.shards: list[Shard] = []
        self._folder, self._stem, self._first_source = folder, stem, first_source
        self._writer: ShardWriter | None = None

    def write(self, batch: Batch, encoded: Encoded, mask: np.ndarray) -> None:
        """Append the documents of a batch selected by `mask`, (n,) bool."""
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
            np.full(len(lengths), batch.continued),
        )
        arrays = [pa.array(*pair) for pair in zip(columns, INDEX_SCHEMA.types, strict=True)]
        writer.note(pa.record_batch(arrays, schema=INDEX_SCHEMA))
        writer.write(content[offsets[0] : offsets[-1]].view(DTYPE))

    def _current(self) -> ShardWriter:
        """Return the shard to append to: a further one if the last is full."""
        if self._writer is None or self._writer.tokens >= MAX_SHARD_TOKENS:
            self.close()
            suffix = f"_{len(self.shards):03d}" if self.shards else ""
            path = self._folder / f"{self._stem}{suffix}.npy"
            self._writer = self.enter_context(open_shard(path, self.shards))
        return self._writer
