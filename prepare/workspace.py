"""The folder of a dataset while it is being made: lock, plan, and the result of each finished unit.

They lie in `.prepare/` beside the shards. A unit whose result is stored is finished, so running the
same command again resumes.
"""

import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from pyarrow import fs

from prepare.plan import Plan, Unit, UnitResult, read_plan
from shards import stored_json
from shards.files import atomic_file, move_durably, remove_temporaries, sync_folder, to_json
from shards.manifest import FILE_NAME, Manifest
from shards.remote import filesystem, is_remote

WORK = ".prepare"
PLAN = f"{WORK}/plan.json"
# Folders in the work area: results, shards being written, and arrays: content hashes of documents,
# indices of duplicates, content hashes of validation text that came by --val-source.
UNITS, STAGING, HASHES, DUPLICATES, HELD_OUT = "units", "staging", "hashes", "drops", "held_out"
WORK_FOLDERS = {UNITS, STAGING, HASHES, DUPLICATES, HELD_OUT}
LOG, QUARANTINE = "prepare.log", "quarantine.jsonl"
# An ending run releases the lock within moments; so do orphaned workers that inherited it.
LOCK_SECONDS = 5.0
# Results read concurrently: from an object store each takes its time, and there may be many.
READ_AT_ONCE = 16


class Folder:
    """A local or remote (s3://, gs:// ...) folder to which files are written all or nothing."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.local = Path(path).absolute()  # a worker may have another working directory
        self.remote = is_remote(path)
        self._system, self._root = filesystem(path)

    def __str__(self) -> str:
        return self.path

    def publish(self, file: Path) -> None:
        """Move a local file into the folder, durably, or upload it."""
        if not self.remote:
            move_durably(file, self.local / file.name)
            return
        target = self._at(file.name)
        with open(file, "rb") as local, self._system.open_output_stream(target) as out:
            shutil.copyfileobj(local, out, 1 << 22)

    def write(self, name: str, content: bytes) -> None:
        """Write `content` under `name`, all or nothing."""
        if self.remote:
            with self._system.open_output_stream(self._at(name)) as out:
                out.write(content)
            return
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)
        sync_folder(path.parent)

    def read(self, name: str) -> bytes | None:
        """Return the content under `name`, or None."""
        if not self.exists(name):
            return None
        with self._system.open_input_stream(self._at(name), compression=None) as stream:
            return stream.read()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object under `name`, or None. Raises ValueError if it is damaged."""
        content = self.read(name)
        return None if content is None else stored_json.parse(content, f"{self}/{name}")

    def exists(self, name: str) -> bool:
        """True if there is a file of that name."""
        return self._system.get_file_info(self._at(name)).type == fs.FileType.File

    def names(self, inside: str = "") -> list[str]:
        """List the folder, or one inside it, sorted."""
        selector = fs.FileSelector(self._at(inside), allow_not_found=True)
        return sorted(info.base_name for info in self._system.get_file_info(selector))

    def remove(self, inside: str) -> None:
        """Remove a folder inside this one."""
        self._system.delete_dir(self._at(inside))

    def remove_file(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._system.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")


@dataclass(frozen=True)
class Workspace:
    """The work area of the dataset in `folder`."""

    folder: Folder

    @contextmanager
    def locked(self, task: str | None = None) -> Iterator[None]:
        """Hold the lock of the folder, or of task `i/n` in it; it is released with the process.

        Tasks share the folder with each other, and with nothing else. Raises ValueError if it is
        held. Object stores have no locks: there the user must take care.
        """
        if self.folder.remote:
            yield
            return
        path = self.folder.local / WORK
        path.mkdir(parents=True, exist_ok=True)
        name = f"lock-{task.replace('/', '-of-')}" if task else "lock"
        with self._lock(path / name):
            # Take the own lock before testing the others, so that two runs can't miss each other.
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

    def check_folder(self) -> None:
        """Raise ValueError if the folder holds files but no dataset."""
        names = self.folder.names()
        others = [name for name in names if name not in (QUARANTINE, LOG)]
        if others and WORK not in names and FILE_NAME not in names:
            raise ValueError(
                f"expected a new or empty folder in {self.folder}, found other files there "
                f"({others[0]}, ...): give another --out"
            )

    def manifest(self) -> Manifest | None:
        """Return the manifest of the complete dataset in the folder, or None."""
        content = self.folder.read(FILE_NAME)
        return None if content is None else Manifest.parse(content, self.folder.path)

    def stored_plan(self) -> Plan | None:
        """Return the plan last stored here, or None. Raises ValueError if it is damaged."""
        record = self.folder.read_json(PLAN)
        return None if record is None else read_plan(record, f"{self.folder}/{PLAN}")

    def store_plan(self, plan: Plan) -> None:
        """Store the plan, so that every later run can be compared with it."""
        self.folder.write(PLAN, to_json(plan.to_json()))

    def results(self, units: Sequence[Unit]) -> dict[int, UnitResult]:
        """Return the results of those of the units that are finished, by number."""
        stored = set(self.folder.names(f"{WORK}/{UNITS}"))
        finished = [unit for unit in units if f"{unit.name}.json" in stored]
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            return {result.unit: result for result in pool.map(self._result, finished)}

    def _result(self, unit: Unit) -> UnitResult:
        name = f"{WORK}/{UNITS}/{unit.name}.json"
        return stored_json.build(UnitResult, self.folder.read_json(name), f"{self.folder}/{name}")

    @contextmanager
    def staging(self, unit: Unit) -> Iterator[Path]:
        """Yield a new folder for a unit's shards. `finish_unit` or an exception removes it."""
        parent = None if self.folder.remote else self.folder.local / WORK / STAGING
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{unit.name}-", dir=parent))
        try:
            yield staged
        except BaseException:
            shutil.rmtree(staged)
            raise

    def remove_staged(self, units: Sequence[Unit]) -> None:
        """Remove the staging folders that killed runs left for some units."""
        unfinished = {unit.name for unit in units}
        for name in self.folder.names(f"{WORK}/{STAGING}"):
            if name.partition("-")[0] in unfinished:
                self.folder.remove(f"{WORK}/{STAGING}/{name}")

    def finish_unit(self, result: UnitResult, staged: Path) -> None:
        """Publish a unit's staged shards, then store its result, which marks it as finished."""
        for shard in result.all_shards():
            self.folder.publish(staged / shard.index)
            self.folder.publish(staged / shard.file)
        if not self.folder.remote:
            sync_folder(self.folder.local)  # a result on disk must not outlive its shards
        self.folder.write(f"{WORK}/{UNITS}/{result.unit:05d}.json", to_json(asdict(result)))
        shutil.rmtree(staged)

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Store an array in the work area, all or nothing."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self.folder.write(f"{WORK}/{name}.npy", buffer.getvalue())

    def load_array(self, name: str) -> np.ndarray | None:
        """Return an array of the work area, or None."""
        content = self.folder.read(f"{WORK}/{name}.npy")
        return None if content is None else np.load(io.BytesIO(content), allow_pickle=False)

    def abandon(self, results: Iterable[UnitResult]) -> None:
        """Remove the plan and everything made by it, so that another may be started here."""
        self.close()
        self.folder.remove_file(PLAN)
        for shard in (shard for result in results for shard in result.all_shards()):
            self.folder.remove_file(shard.file)
            self.folder.remove_file(shard.index)

    def close(self) -> None:
        """Remove results and arrays, once the manifest holds them; the plan stays for reruns."""
        for name in set(self.folder.names(WORK)) & WORK_FOLDERS:
            self.folder.remove(f"{WORK}/{name}")
        if not self.folder.remote:
            for path in (self.folder.local, self.folder.local / WORK):
                remove_temporaries(path, "")

    def log(self, *lines: str) -> None:
        """Append to prepare.log, where times, warnings and figures of this run go."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        new = "".join(f"{stamp} {part}\n" for line in lines for part in line.splitlines())
        self.folder.write(LOG, (self.folder.read(LOG) or b"") + new.encode())
