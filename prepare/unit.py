"""One unit of input → its train shard and its val shard."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from prepare.documents import Bad, Batch, read
from prepare.encode import AuditError, Encoded, encode
from prepare.plan import Plan, Unit
from prepare.split import GIVEN
from shards.manifest import SPLITS, Shard
from shards.tokenizer import Tokenizer, string_buffers
from shards.writer import DTYPE, INDEX_SCHEMA, ShardWriter, open_shard

# --- Where a unit's documents go: one shard a side, opened by its first document.


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


@dataclass
class Record:
    """What a finished unit made and met; kept beside the shards until the manifest is written.

    `read` counts documents of every fate; `empty` ones and `duplicates` are not written.
    """

    unit: int
    shards: dict[str, list[Shard]]
    read: int = 0
    empty: int = 0
    duplicates: int = 0
    bad: list[Bad] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in all its shards."""
        return sum(shard.tokens for shards in self.shards.values() for shard in shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the documents in them."""
        return sum(shard.text_bytes for shards in self.shards.values() for shard in shards)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Record":
        """The record of its JSON."""
        shards = {side: [Shard(**shard) for shard in raw["shards"][side]] for side in SPLITS}
        return cls(**{**raw, "shards": shards, "bad": [Bad(**bad) for bad in raw["bad"]]})


@dataclass(frozen=True)
class Unwanted:
    """Documents to leave out as duplicates: those at some `places` of the unit, (n,) int64, and
    training text with one of some content `hashes`, (n, 2) uint64, in order."""

    places: np.ndarray | None = None
    hashes: np.ndarray | None = None

    def mask(self, places: np.ndarray, hashes: np.ndarray, is_val: np.ndarray) -> np.ndarray:
        """Which documents of a batch they are, (n,) bool."""
        found = np.zeros(len(places), bool)
        if self.places is not None:
            found |= np.isin(places, self.places)
        if self.hashes is not None:
            first = np.searchsorted(self.hashes[:, 0], hashes[:, 0], "left")
            end = np.searchsorted(self.hashes[:, 0], hashes[:, 0], "right")
            for row in np.flatnonzero(~is_val & (first < end)):
                found[row] |= hashes[row, 1] in self.hashes[first[row] : end[row], 1]
        return found


def run_unit(
    plan: Plan, unit: Unit, folder: Path, tokenizer: Tokenizer, unwanted: Unwanted | None = None
) -> Record:
    """Write the unit's shards into `folder` and describe them, without the `unwanted` documents.

    Where the audit finds a difference the whole unit is encoded by tiktoken, with a warning.
    Raises ValueError for a source that changed since it was planned, OSError for failing I/O.
    """
    try:
        record = _write_unit(plan, unit, folder, tokenizer, unwanted or Unwanted())
    except AuditError as error:
        reference = tokenizer.reference_only()
        record = _write_unit(plan, unit, folder, reference, unwanted or Unwanted())
        record.warnings.append(f"unit {unit.number} was encoded by tiktoken alone: {error}")
    check_unchanged(plan, unit)
    return record


def check_unchanged(plan: Plan, unit: Unit) -> None:
    """Raise ValueError if a file of the unit is no longer what was planned."""
    for index in {part.file for part in unit.slices}:
        file = plan.files[index]
        found = file.status()
        if found != (file.size, file.mtime):
            raise ValueError(
                f"expected {file.name} with {file.size} bytes as when the dataset was begun, found "
                f"it {'changed' if found else 'gone'}: restore it and run again, or prepare anew "
                "into another folder"
            )


def _write_unit(
    plan: Plan, unit: Unit, folder: Path, tokenizer: Tokenizer, unwanted: Unwanted
) -> Record:
    """Read, encode and write the unit's documents."""
    train, val = (Side(folder, f"{side}_{unit.number:05d}", plan.first_source) for side in SPLITS)
    record = Record(unit.number, {"train": train.shards, "val": val.shards})
    first, position = True, 0
    with train, val:
        for batch in read(plan.files, unit.slices):
            record.bad += batch.bad
            record.read += sum(bad.documents for bad in batch.bad)
            if not len(batch.texts):
                continue
            encoded = encode(tokenizer, batch, first)
            first = False
            wanted = encoded.text_bytes > 0
            # A piece that goes on has the place of the document that it goes on with.
            places = np.arange(len(wanted)) + (position if batch.begins else position - 1)
            is_val = _is_val(plan, batch, encoded.hashes)
            dropped = wanted & unwanted.mask(places, encoded.hashes, is_val)
            if batch.begins:
                position += len(wanted)
                record.empty += int(np.count_nonzero(~wanted))
                record.duplicates += int(np.count_nonzero(dropped))
            wanted &= ~dropped
            train.write(batch, encoded, wanted & ~is_val)
            val.write(batch, encoded, wanted & is_val)
    record.read += position
    return record


def _is_val(plan: Plan, batch: Batch, hashes: np.ndarray) -> np.ndarray:
    """Which documents of a batch are validation text, (n,) bool."""
    if batch.side is not None:
        return np.full(len(batch.texts), batch.side == "val")
    if plan.rule.rule == GIVEN:
        return np.array([plan.files[source].val for source in batch.sources.tolist()])
    return plan.rule.is_val(hashes)
