"""One unit of input → its train shard and its val shard, audited against tiktoken as it goes."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prepare.documents import Bad, Batch, read
from prepare.plan import Plan, Unit
from prepare.split import GIVEN, content_hashes
from shards.manifest import SPLITS, Shard
from shards.tokenizer import Tokenizer, cut, string_buffers
from shards.writer import INDEX_SCHEMA, ShardWriter, open_shard, to_uint16

# One document in so many is encoded by tiktoken too, chosen by content, and the first of a unit;
# of a long one only the head. At a tenth of the encoder's speed this costs it some two percent.
AUDITED_ONE_IN = 512
AUDITED_CHARACTERS = 1 << 14
# A stream of unknown length (a compressed file) goes on in a further shard after so many tokens.
MAX_SHARD_TOKENS = 1 << 27


class AuditError(Exception):
    """The fast encoder and tiktoken disagree on a document."""


@dataclass
class Record:
    """What a finished unit made and met; kept beside the shards until the manifest is written."""

    unit: int
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {side: [] for side in SPLITS})
    read: int = 0
    empty: int = 0
    bad: list[Bad] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in all its shards."""
        return sum(shard.tokens for shards in self.shards.values() for shard in shards)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Record":
        """The record of its JSON."""
        shards = {side: [Shard(**shard) for shard in raw["shards"][side]] for side in SPLITS}
        return cls(**{**raw, "shards": shards, "bad": [Bad(**bad) for bad in raw["bad"]]})


def run_unit(plan: Plan, unit: Unit, folder: Path, tokenizer: Tokenizer) -> Record:
    """Write the unit's shards into `folder` and describe them.

    Where the audit finds a difference the whole unit is encoded by tiktoken, with a warning.
    Raises ValueError for a source that changed since it was planned, OSError for failing I/O.
    """
    try:
        record = _write_unit(plan, unit, folder, tokenizer)
    except AuditError as error:
        record = _write_unit(plan, unit, folder, tokenizer.reference_only())
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


def _write_unit(plan: Plan, unit: Unit, folder: Path, tokenizer: Tokenizer) -> Record:
    """Read, encode and write the unit's documents."""
    record = Record(unit.number)
    with ExitStack() as stack:
        sides = {
            side: _Side(stack, folder, side, unit.number, record.shards[side]) for side in SPLITS
        }
        first = True
        for batch in read(plan.files, unit.slices):
            record.read += batch.read
            record.empty += batch.empty
            record.bad += batch.bad
            if not len(batch.texts):
                continue
            hashes = content_hashes(batch.texts) if batch.hashes is None else batch.hashes
            ids, offsets = tokenizer.encode_batch(batch.texts)
            _audit(tokenizer, batch, hashes, ids, offsets, first)
            val = _is_val(plan, batch, hashes)
            _write_batch(batch, val, ids, offsets, tokenizer.eot, sides)
            first = False
    return record


def _is_val(plan: Plan, batch: Batch, hashes: np.ndarray) -> np.ndarray:
    """Which documents of a batch are validation text, (n,) bool."""
    if batch.side is not None:
        return np.full(len(batch.texts), batch.side == "val")
    if plan.rule.rule == GIVEN:
        return np.array([plan.files[source].val for source in batch.sources.tolist()])
    return plan.rule.is_val(hashes)


def _audit(
    tokenizer: Tokenizer,
    batch: Batch,
    hashes: np.ndarray,
    ids: np.ndarray,
    offsets: np.ndarray,
    first: bool,
) -> None:
    """Compare a sample of the batch with tiktoken's tokens; raises AuditError on a difference."""
    chosen = hashes[:, 1] % np.uint64(AUDITED_ONE_IN) == 0
    chosen[0] |= first
    for index in np.flatnonzero(chosen).tolist():
        text = batch.texts[index].as_py()
        head = next(cut(text, AUDITED_CHARACTERS))
        expected = tokenizer.encode_reference(head)
        found = ids[offsets[index] : offsets[index + 1]]
        if len(head) < len(text):
            found = found[: len(expected)]
        if not np.array_equal(expected, found):
            where = f"source {batch.sources[index]} at {batch.rows[index]}"
            raise AuditError(f"gigatoken and tiktoken differ on the document of {where}")


class _Side:
    """The shard being written of one side of the split; opened by its first document."""

    def __init__(
        self, stack: ExitStack, folder: Path, side: str, number: int, done: list[Shard]
    ) -> None:
        self._stack, self._folder, self._done = stack, folder, done
        self._stem = f"{side}_{number:05d}"
        self._parts = 0
        self._closing: ExitStack | None = None
        self._writer: ShardWriter | None = None

    def writer(self) -> ShardWriter:
        """Where the next documents go: a further shard once the present one is full."""
        if self._writer is not None and self._writer.tokens >= MAX_SHARD_TOKENS:
            assert self._closing is not None
            self._closing.close()
            self._writer = None
        if self._writer is None:
            suffix = f"_{self._parts:03d}" if self._parts else ""
            self._parts += 1
            self._closing = self._stack.enter_context(ExitStack())
            path = self._folder / f"{self._stem}{suffix}.npy"
            self._writer = self._closing.enter_context(open_shard(path, self._done))
        return self._writer


def _write_batch(
    batch: Batch,
    val: np.ndarray,
    ids: np.ndarray,
    offsets: np.ndarray,
    eot: int,
    sides: dict[str, _Side],
) -> None:
    """Put `<|endoftext|>` before each document and write each to its side's shard."""
    if batch.begins:
        starts = offsets[:-1]
        tokens = np.insert(to_uint16(ids), starts, eot)
        offsets = offsets + np.arange(len(offsets))
    else:
        tokens = to_uint16(ids)
    lengths = np.diff(offsets)
    for side, mask in (("train", ~val), ("val", val)):
        if not mask.any():
            continue
        writer = sides[side].writer()
        ends = np.cumsum(lengths[mask])
        writer.note(
            pa.record_batch(
                [
                    pa.array(writer.tokens + ends - lengths[mask], pa.int64()),
                    pa.array(batch.sources[mask], pa.int32()),
                    pa.array(batch.rows[mask], pa.int64()),
                    pa.array(_text_bytes(batch)[mask], pa.int64()),
                    pa.array(np.full(int(mask.sum()), not batch.begins)),
                ],
                schema=INDEX_SCHEMA,
            )
        )
        for start, end in _runs(mask):
            writer.write(tokens[offsets[start] : offsets[end]])


def _text_bytes(batch: Batch) -> np.ndarray:
    """UTF-8 bytes of each text of a batch, (n,) int64."""
    offsets, _ = string_buffers(batch.texts)
    return np.diff(offsets)


def _runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of True in a boolean array."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
