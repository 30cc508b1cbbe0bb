"""The two things done to every unit: hashing its documents (for --dedup) and writing its shards.

Each is a small picklable value that is called with a unit, on whatever machine the engine chose.
"""

import io
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from prepare.documents import read
from prepare.plan import Plan, Unit
from prepare.split import content_hashes
from prepare.unit import Record, Unwanted, check_unchanged, run_unit
from prepare.workspace import WORK, Workspace
from shards import tokenizer
from shards.tokenizer import string_buffers

Result = TypeVar("Result")

# Reads and writes over a network are tried so often, with growing pauses.
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 1.0
# Of all validation text that was given, (n, 2) uint64.
HELD_OUT = "held_out/hashes.npy"
# Units whose files are brought to the disk at once; a file system does several nearly as one.
PUBLISHERS = 8


@dataclass(frozen=True)
class Written:
    """A unit's record, and where its shards are staged; None where they are published already."""

    record: Record
    staged: Path | None


@dataclass(frozen=True)
class WriteShards:
    """Turn a unit into shards and its record; nothing of it is left if it fails.

    Where `publish` is False, that is left to `publish_meanwhile`.
    """

    plan: Plan
    workspace: Workspace
    publish: bool

    def __call__(self, unit: Unit) -> Written:
        """Write one unit. Raises ValueError for a changed source, OSError for failing I/O."""
        return _retried(self._once, unit, self.plan, self.workspace)

    def _once(self, unit: Unit) -> Written:
        unwanted = Unwanted(
            places=load_array(self.workspace, f"drops/{unit.number:05d}.npy"),
            hashes=load_array(self.workspace, HELD_OUT),
        )
        with self.workspace.staging(unit) as staged:
            record = run_unit(self.plan, unit, staged, tokenizer.load(), unwanted)
            if not self.publish:
                return Written(record, staged)
            self.workspace.finish_unit(record, staged)
        return Written(record, None)


def publish_meanwhile(written: Iterator[Written], workspace: Workspace) -> Iterator[Record]:
    """Publish what has been written while more is being written; yields the records.

    Waiting for the disk takes a fifth of the time and no core, so the workers don't.
    """
    with ThreadPoolExecutor(PUBLISHERS) as pool:
        under_way: deque[Future[Record]] = deque()
        for unit in written:
            under_way.append(pool.submit(_publish, unit, workspace))
            while under_way and (under_way[0].done() or len(under_way) > 2 * PUBLISHERS):
                yield under_way.popleft().result()
        for future in under_way:
            yield future.result()


def _publish(unit: Written, workspace: Workspace) -> Record:
    if unit.staged:
        workspace.finish_unit(unit.record, unit.staged)
    return unit.record


@dataclass(frozen=True)
class HashDocuments:
    """Note the content hash of each document of a unit, (n, 2) uint64, in a folder of the work
    area."""

    plan: Plan
    workspace: Workspace
    folder: str

    def __call__(self, unit: Unit) -> int:
        """Hash one unit; returns its number."""
        return _retried(self._once, unit, self.plan, self.workspace)

    def _once(self, unit: Unit) -> int:
        parts = [np.empty((0, 2), np.uint64)]
        for batch in read(self.plan.files, unit.slices):
            if not batch.begins:
                continue
            hashes = content_hashes(batch.texts) if batch.hashes is None else batch.hashes
            # Nobody's duplicate: an empty document, dropped anyway, and a part of the one text.
            alone = np.diff(string_buffers(batch.texts)[0]) == 0
            alone |= batch.side is not None and batch.hashes is None
            parts.append(np.where(alone[:, None], np.uint64(0), hashes))
        check_unchanged(self.plan, unit)
        save_array(self.workspace, f"{self.folder}/{unit.number:05d}.npy", np.concatenate(parts))
        return unit.number


def save_array(workspace: Workspace, name: str, array: np.ndarray) -> None:
    """Put an array into the work area, all or nothing."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    workspace.folder.write(f"{WORK}/{name}", buffer.getvalue())


def load_array(workspace: Workspace, name: str) -> np.ndarray | None:
    """An array of the work area, or None where there is none of that name."""
    content = workspace.folder.read(f"{WORK}/{name}")
    return None if content is None else np.load(io.BytesIO(content), allow_pickle=False)


def _retried(
    once: Callable[[Unit], Result], unit: Unit, plan: Plan, workspace: Workspace
) -> Result:
    """Try again what a network may have broken; a local file system is believed at once."""
    remote = workspace.folder.remote or any(plan.files[part.file].remote for part in unit.slices)
    for attempt in range(ATTEMPTS):
        try:
            return once(unit)
        except FileNotFoundError:
            raise
        except OSError as error:
            if not remote:
                raise
            if attempt == ATTEMPTS - 1:
                file = plan.files[unit.slices[0].file].name
                raise OSError(
                    f"expected unit {unit.number} ({file} ...) to be read and written, found "
                    f"{ATTEMPTS} times: {error}: finished units are kept; run the command again"
                ) from error
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
    raise AssertionError("unreachable")
