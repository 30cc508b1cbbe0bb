"""An unfinished dataset's folder: the lock, the plan it follows, and the records of its units.

They lie in `.prepare/` beside the shards. A unit whose record exists is finished, so running the
same command again resumes.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
from pyarrow import fs

from prepare.plan import Plan, Unit
from prepare.unit import Record
from shards.files import atomic_file, move_durably, remove_temporaries, sync_folder, to_json
from shards.manifest import FILE_NAME, Manifest
from shards.remote import filesystem, is_remote

# --- Folders, local or remote (s3://, gs://, hf:// ...), behind the same few calls.


class Folder:
    """A folder that files are put into whole: renamed into place, or uploaded."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Wherever a worker runs, whatever its working directory: the same place.
        self.local = Path(path).absolute()
        self.remote = is_remote(path)
        self._system, self._root = filesystem(path)

    def __str__(self) -> str:
        return self.path

    def publish(self, file: Path) -> None:
        """Make a file of this machine part of the folder, durably; a local one is moved."""
        if not self.remote:
            move_durably(file, self.local / file.name)
            return
        target = self._at(file.name)
        with open(file, "rb") as local, self._system.open_output_stream(target) as out:
            shutil.copyfileobj(local, out, 1 << 22)

    def write(self, name: str, content: bytes) -> None:
        """Put `content` under `name`, all or nothing."""
        if self.remote:
            with self._system.open_output_stream(self._at(name)) as out:
                out.write(content)
            return
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)
        sync_folder(path.parent)

    def write_json(self, name: str, value: Any) -> None:
        """Put a value as JSON under `name`; the same value gives the same bytes."""
        self.write(name, to_json(value))

    def read(self, name: str) -> bytes | None:
        """What lies under `name`, or None."""
        if not self.exists(name):
            return None
        with self._system.open_input_stream(self._at(name), compression=None) as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        """The value of the JSON under `name`, or None where there is none."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def exists(self, name: str) -> bool:
        """Whether a file lies under `name`."""
        return self._system.get_file_info(self._at(name)).type == fs.FileType.File

    def names(self, inside: str = "") -> list[str]:
        """The names of what lies in the folder, or in one inside it, sorted."""
        selector = fs.FileSelector(self._at(inside), allow_not_found=True)
        return sorted(info.base_name for info in self._system.get_file_info(selector))

    def remove(self, inside: str) -> None:
        """Remove a folder inside this one."""
        self._system.delete_dir(self._at(inside))

    def remove_file(self, name: str) -> None:
        """Remove a file of the folder, if it is there."""
        if self.exists(name):
            self._system.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


WORK = ".prepare"
PLAN = f"{WORK}/plan.json"
UNITS = f"{WORK}/units"
STAGING = f"{WORK}/staging"
LOG, QUARANTINE = "prepare.log", "quarantine.jsonl"
WORK_FOLDERS = {"units", "hashes", "drops", "held_out", "staging"}
# A run that is just ending lets go within moments; so do the workers of one that was killed, where
# they inherit the lock.
LOCK_SECONDS = 5.0
# Records read together: from an object store each takes its time, and there may be many.
READ_AT_ONCE = 16


@dataclass(frozen=True)
class Workspace:
    """The work area of the dataset in `folder`."""

    folder: Folder

    @contextmanager
    def locked(self, task: str = "") -> Iterator[None]:
        """Hold the folder, or one task's part of it; the lock dies with its process.

        Tasks share the folder with each other, and with nobody else. Raises ValueError where it is
        held. Object stores have no locks: there it is up to the user.
        """
        if self.folder.remote:
            yield
            return
        path = self.folder.local / WORK
        path.mkdir(parents=True, exist_ok=True)
        with self._lock(path / f"lock{task}"):
            # Each takes its own before it looks at the others', so that two can't miss each other.
            for other in [path / "lock"] if task else sorted(path.glob("lock-*")):
                with self._lock(other):
                    pass
            yield

    def _lock(self, path: Path) -> filelock.AcquireReturnProxy:
        try:
            return filelock.FileLock(path).acquire(timeout=LOCK_SECONDS)
        except filelock.Timeout:
            raise ValueError(
                f"expected to be alone in {self.folder}, found another prepare at work there: "
                "wait for it to end, or give another --out"
            ) from None

    def refuse_strangers(self) -> None:
        """Raise ValueError where the folder holds something that is not a dataset of ours."""
        names = self.folder.names()
        others = [name for name in names if name not in (QUARANTINE, LOG)]
        if others and WORK not in names and FILE_NAME not in names:
            raise ValueError(
                f"expected a new or empty folder in {self.folder}, found other files there "
                f"({others[0]}, ...): give another --out"
            )

    def manifest(self) -> Manifest | None:
        """The manifest of what is complete in the folder, or None."""
        content = self.folder.read(FILE_NAME)
        return None if content is None else Manifest.parse(content, self.folder.path)

    def stored_plan(self) -> dict[str, Any] | None:
        """The record of the plan that was last begun here, or None."""
        return self.folder.read_json(PLAN)

    def holds(self, name: str) -> bool:
        """Whether a file of that name lies in the work area."""
        return self.folder.exists(f"{WORK}/{name}")

    def is_growing(self) -> bool:
        """Whether an append was begun that is not in the manifest yet."""
        plan, manifest = self.stored_plan(), self.manifest()
        return bool(plan and manifest and plan["generation"] > manifest.generation)

    def begin(self, plan: Plan) -> None:
        """Record the plan, so that every later run can be held to it."""
        self.folder.write_json(PLAN, plan.record())

    def records(self, units: tuple[Unit, ...]) -> dict[int, Record]:
        """The records of those of the units that are finished, by number."""
        there = set(self.folder.names(UNITS))
        names = {unit.number: _record_name(unit.number) for unit in units}
        done = [number for number, name in names.items() if name in there]
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            found = pool.map(lambda n: self.folder.read_json(f"{UNITS}/{names[n]}"), done)
            return {n: Record.from_json(raw) for n, raw in zip(done, found, strict=True)}

    @contextmanager
    def staging(self, unit: Unit) -> Iterator[Path]:
        """A folder for a unit's shards until `finish_unit`; removed on an error."""
        above = None if self.folder.remote else self.folder.local / STAGING
        if above:
            above.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{unit.number:05d}-", dir=above))
        try:
            yield staged
        except BaseException:
            shutil.rmtree(staged)
            raise

    def remove_staged(self, units: Sequence[Unit]) -> None:
        """Remove what killed runs left in the staging areas of some units."""
        numbers = {f"{unit.number:05d}" for unit in units}
        for name in self.folder.names(STAGING):
            if name.partition("-")[0] in numbers:
                self.folder.remove(f"{STAGING}/{name}")

    def finish_unit(self, record: Record, staged: Path) -> None:
        """Publish a unit's staged shards and then, with its record, say that it is finished."""
        for shards in record.shards.values():
            for shard in shards:
                self.folder.publish(staged / shard.index)
                self.folder.publish(staged / shard.file)
        if not self.folder.remote:
            sync_folder(self.folder.local)  # a record on disk must not outlive its shards
        self.folder.write_json(f"{UNITS}/{_record_name(record.unit)}", record.to_json())
        shutil.rmtree(staged)

    def abandon(self, records: Iterable[Record]) -> None:
        """Remove the plan and all that it made, so that another may be begun here."""
        self.close()
        self.folder.remove_file(PLAN)
        for record in records:
            for shard in (shard for shards in record.shards.values() for shard in shards):
                self.folder.remove_file(shard.file)
                self.folder.remove_file(shard.index)

    def close(self) -> None:
        """Remove the records once the manifest holds what they say; the plan stays for reruns."""
        for name in set(self.folder.names(WORK)) & WORK_FOLDERS:
            self.folder.remove(f"{WORK}/{name}")
        if not self.folder.remote:  # what killed runs left half-written; units remove their own
            for path in (self.folder.local, self.folder.local / WORK):
                remove_temporaries(path, "")

    def log(self, *lines: str) -> None:
        """Append to prepare.log, where times, warnings and figures of this run go."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        new = "".join(f"{stamp} {part}\n" for line in lines for part in line.splitlines())
        self.folder.write(LOG, (self.folder.read(LOG) or b"") + new.encode())


def _record_name(number: int) -> str:
    return f"{number:05d}.json"
