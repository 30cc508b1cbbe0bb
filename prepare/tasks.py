"""The tasks run on units: write or restore their shards, or (for --dedup) hash their documents.

Each is a small picklable value called with a unit, on whatever process or machine runs it.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from prepare.documents import read
from prepare.encode import content_hashes
from prepare.plan import Plan, Unit, UnitResult
from prepare.unit import Exclusions, check_unchanged, run_unit
from prepare.workspace import DUPLICATES, HELD_OUT, Workspace
from shards import tokenizer
from shards.manifest import Shard
from shards.remote import retried
from shards.tokenizer import string_buffers

Result = TypeVar("Result")

# Units whose files are fsynced concurrently; a file system does several nearly as fast as one.
PUBLISHERS = 8


class Written(NamedTuple):
    """A unit's result and the folder where its shards are staged; None if they are published."""

    result: UnitResult
    staged: Path | None


@dataclass(frozen=True)
class WriteShards:
    """Task that turns a unit into shards; if it fails, nothing of the unit is left.

    Unless `publish`, publishing is left to `publish_meanwhile`.
    """

    plan: Plan
    workspace: Workspace
    publish: bool

    def __call__(self, unit: Unit) -> Written:
        """Write one unit. Raises ValueError for a changed source, OSError for failing I/O."""
        return _with_retries(self._write, unit, self.plan, self.workspace)

    def _write(self, unit: Unit) -> Written:
        exclusions = _exclusions(self.workspace, unit)
        with self.workspace.staging(unit) as staged:
            result = run_unit(self.plan, unit, staged, tokenizer.load(), exclusions)
            if self.publish:
                self.workspace.finish_unit(result, staged)
        return Written(result, None if self.publish else staged)


def _exclusions(workspace: Workspace, unit: Unit) -> Exclusions:
    return Exclusions(
        indices=workspace.load_array(f"{DUPLICATES}/{unit.name}"),
        hashes=workspace.load_array(f"{HELD_OUT}/hashes"),
    )


@dataclass(frozen=True)
class RestoreShards:
    """Task that prepares a unit of a complete dataset again and publishes its `faulty` files.

    shards: those of the manifest, by unit, which the new ones must equal; touched: indices of the
    files to name if they don't.
    """

    plan: Plan
    workspace: Workspace
    shards: dict[int, list[Shard]]
    faulty: set[str]
    touched: set[int]

    def __call__(self, unit: Unit) -> None:
        """Restore one unit. Raises ValueError for a changed source, OSError for failing I/O."""
        _with_retries(self._restore, unit, self.plan, self.workspace)

    def _restore(self, unit: Unit) -> None:
        exclusions = _exclusions(self.workspace, unit)
        with self.workspace.staging(unit) as staged:
            result = run_unit(self.plan, unit, staged, tokenizer.load(), exclusions)
            stored = self.shards.get(unit.number, [])
            if [self._identity(new) for new in result.all_shards()] != [
                *map(self._identity, stored)
            ]:
                numbers = [part.file for part in unit.slices]
                number = next((n for n in numbers if n in self.touched), numbers[0])
                raise ValueError(
                    f"expected the tokens of unit {unit.number} again from "
                    f"{self.plan.files[number].name}, found others: a source changed, or tiktoken "
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


def publish_meanwhile(written: Iterator[Written], workspace: Workspace) -> Iterator[UnitResult]:
    """Publish each written unit on a thread while more are being written; yield the results.

    fsync takes a fifth of the time and no core, so the workers don't wait for it.
    """

    def publish(unit: Written) -> UnitResult:
        if unit.staged:
            workspace.finish_unit(unit.result, unit.staged)
        return unit.result

    with ThreadPoolExecutor(PUBLISHERS) as pool:
        pending: deque[Future[UnitResult]] = deque()
        for unit in written:
            pending.append(pool.submit(publish, unit))
            while pending and (pending[0].done() or len(pending) > 2 * PUBLISHERS):
                yield pending.popleft().result()
        for future in pending:
            yield future.result()


@dataclass(frozen=True)
class HashDocuments:
    """Task that stores the content hash of each document of a unit, (n, 2) uint64, in `folder` of
    the work area."""

    plan: Plan
    workspace: Workspace
    folder: str

    def __call__(self, unit: Unit) -> None:
        """Hash one unit. Raises ValueError for a changed source, OSError for failing I/O."""
        _with_retries(self._hash, unit, self.plan, self.workspace)

    def _hash(self, unit: Unit) -> None:
        parts = [np.empty((0, 2), np.uint64)]
        for batch in read(self.plan.files, unit.slices):
            if batch.continued:
                continue
            hashes = content_hashes(batch.texts) if batch.hashes is None else batch.hashes
            # Zero: no duplicate of any other. An empty document is dropped anyway, and a part of
            # the one text that is split by position is no document of its own.
            skipped = np.diff(string_buffers(batch.texts)[0]) == 0
            skipped |= batch.split is not None and batch.hashes is None
            parts.append(np.where(skipped[:, None], np.uint64(0), hashes))
        check_unchanged(self.plan, unit)
        self.workspace.save_array(f"{self.folder}/{unit.name}", np.concatenate(parts))


def _with_retries(
    task: Callable[[Unit], Result], unit: Unit, plan: Plan, workspace: Workspace
) -> Result:
    """Retry what a network may have broken; errors of a local file system are final."""
    if workspace.folder.remote or any(plan.files[part.file].remote for part in unit.slices):
        name = plan.files[unit.slices[0].file].name
        action = f"read and write unit {unit.number} ({name} ...)"
        return retried(lambda: task(unit), action, "finished units are kept; run the command again")
    return task(unit)
