"""The functions that are run on units: write or restore shards, hash or sample text.

Each is a small picklable value called with a unit, on whatever process or machine runs it.
"""

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pyarrow as pa
import xxhash

from prepare.encode import document_hashes
from prepare.plan import Plan, Unit, UnitResult, unit_number
from prepare.quarantine import BadLimit
from prepare.split import POSITION
from prepare.unit import Exclusions, UnitReader, write_unit
from prepare.workspace import DUPLICATES, HELD_OUT_HASHES, Workspace
from shards.encoder import cut, string_buffers
from shards.manifest import Shard
from shards.remote import retried

Result = TypeVar("Result")
# A unit's result, and the folder of its staged shards if they are still to be published.
Written = tuple[UnitResult, Path | None]

# Units whose files are fsynced concurrently; a file system does several nearly as fast as one.
PUBLISHERS = 8
# Of a document, pieces of about this many characters are sampled.
SAMPLED_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class UnitFunction(Generic[Result]):
    """Function of a unit. If it fails, nothing of the unit is left."""

    plan: Plan
    workspace: Workspace

    def __call__(self, unit: Unit) -> Result:
        """Run on one unit. Raises ValueError for a changed source, OSError for failing I/O.

        Retries what a network may have broken; errors of a local file system are final.
        """
        files = [self.plan.files[part.file] for part in unit.slices]
        if not self.workspace.folder.remote and not any(file.remote for file in files):
            return self.run(unit)
        action = f"read and write unit {unit.number} ({files[0].name} ...)"
        remedy = "finished units are kept; run the command again"
        return retried(lambda: self.run(unit), action, remedy)

    def run(self, unit: Unit) -> Result:
        """Run on one unit, once."""
        raise NotImplementedError

    @contextmanager
    def staged_shards(
        self, unit: Unit, limit: BadLimit | None = None
    ) -> Iterator[tuple[UnitResult, Path]]:
        """Yield a unit's result and the folder where its shards are staged, gone on an error."""
        reader = UnitReader(self.plan, unit, self.exclusions(unit), limit)
        tokenizer = self.workspace.tokenizer(self.plan)
        with self.workspace.staging(unit) as staged:
            yield write_unit(reader, staged, tokenizer), staged

    def exclusions(self, unit: Unit) -> Exclusions:
        """Return which documents of a unit to leave out."""
        return Exclusions(
            indices=self.workspace.load_array(f"{DUPLICATES}/{unit.name}"),
            hashes=self.workspace.load_array(HELD_OUT_HASHES),
        )


@dataclass(frozen=True)
class WriteShards(UnitFunction[Written]):
    """Turn a unit into shards."""

    publish: bool  # if False, that is left to `publish_in_background`
    limit: BadLimit

    def run(self, unit: Unit) -> Written:
        """Write one unit."""
        with self.staged_shards(unit, self.limit) as (result, staged):
            if result.stopped:
                shutil.rmtree(staged)
            elif not self.publish:
                return result, staged
            else:
                self.workspace.finish_unit(result, staged)
        return result, None


@dataclass(frozen=True)
class RestoreShards(UnitFunction[None]):
    """Prepare a unit of a complete dataset again, compare, and publish its faulty files."""

    shards: list[Shard]  # those of the manifest, which the new ones must equal
    faulty: set[str]  # files to publish
    touched: set[int]  # indices of the input files to name first if the tokens are others

    def run(self, unit: Unit) -> None:
        """Restore one unit."""
        with self.staged_shards(unit) as (result, staged):
            stored = [shard for shard in self.shards if unit_number(shard) == unit.number]
            if list(map(self._identity, result.all_shards())) != list(map(self._identity, stored)):
                indices = [part.file for part in unit.slices]
                source = min(indices, key=lambda index: index not in self.touched)
                raise ValueError(
                    f"expected the tokens of unit {unit.number} again from "
                    f"{self.plan.files[source].name}, found others: a source changed, or tiktoken "
                    "or pyarrow is of another version; restore it, or give another --out"
                )
            for shard in stored:
                if shard.file in self.faulty:
                    self.workspace.publish(shard, staged)
            shutil.rmtree(staged)

    def _identity(self, shard: Shard) -> tuple[str, ...]:
        """Return what must be the same; an index differs from version to version of pyarrow."""
        index = (shard.index_sha256,) if shard.file in self.faulty else ()
        return (shard.file, shard.sha256, *index)


@dataclass(frozen=True)
class HashDocuments(UnitFunction[UnitResult]):
    """Store the content hash of each document of a unit, (n, 2) uint64; list what can't be read."""

    folder: str  # of the work area
    limit: BadLimit | None

    def run(self, unit: Unit) -> UnitResult:
        """Hash one unit, or less of it where more than the limit can't be read."""
        result = UnitResult(unit.number, {})
        parts = [np.empty((0, 2), np.uint64)]
        reader = UnitReader(self.plan, unit, Exclusions(), self.limit)
        for batch, in_train, in_val in reader.read(result):
            result.hashed_bytes += int(np.diff(string_buffers(batch.texts)[0]).sum())
            if batch.continued:
                continue
            # Zero: no duplicate of any other. An empty document is dropped anyway, and a part of
            # the one text that is split by position is no document of its own.
            kept = (in_train | in_val) & (self.plan.rule.rule != POSITION)
            parts.append(np.where(kept[:, None], document_hashes(batch), np.uint64(0)))
        if not result.stopped:
            self.workspace.save_array(f"{self.folder}/{unit.name}", np.concatenate(parts))
        return result


@dataclass(frozen=True)
class SampleText(UnitFunction[list[tuple[int, str]]]):
    """Pieces of a unit's training documents whose hash is below `limit`, each with its hash."""

    limit: int

    def run(self, unit: Unit) -> list[tuple[int, str]]:
        """Read one unit."""
        reader = UnitReader(self.plan, unit, self.exclusions(unit))
        return [
            (digest, piece)
            for batch, in_train, _ in reader.read(UnitResult(unit.number, {}))
            for text in batch.texts.filter(pa.array(in_train)).to_pylist()
            for piece in cut(text, SAMPLED_CHARACTERS)
            if (digest := xxhash.xxh3_64_intdigest(piece.encode())) < self.limit
        ]


def publish_in_background(written: Iterator[Written], workspace: Workspace) -> Iterator[UnitResult]:
    """Publish each written unit on a thread while more are being written; yield the results.

    fsync takes a fifth of the time and no core, so the workers don't wait for it.
    """

    def publish(unit: Written) -> UnitResult:
        result, staged = unit
        if staged:
            workspace.finish_unit(result, staged)
        return result

    with ThreadPoolExecutor(PUBLISHERS) as pool:
        pending: deque[Future[UnitResult]] = deque()
        for unit in written:
            pending.append(pool.submit(publish, unit))
            while pending and (pending[0].done() or len(pending) > 2 * PUBLISHERS):
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
