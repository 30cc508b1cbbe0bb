"""An unfinished dataset's folder: the lock, the plan it follows, and the records of its units.

They lie in `.prepare/` beside the shards. A unit whose record exists is finished, so running the
same command again resumes.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from prepare.plan import Plan
from prepare.unit import Record
from shards.atomic import remove_temporaries, write_json
from shards.manifest import FILE_NAME, Manifest

# A killed run's workers notice within moments and let go of the lock they inherited.
LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class Workspace:
    """The work area of the dataset in `folder`."""

    folder: Path

    @property
    def path(self) -> Path:
        """Where the lock, the plan and the records lie."""
        return self.folder / ".prepare"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; the lock dies with its process. Raises ValueError where it is held."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / "lock")
        try:
            held = lock.acquire(timeout=LOCK_SECONDS)
        except filelock.Timeout:
            raise ValueError(
                f"expected to be alone in {self.folder}, found another prepare at work there: "
                "wait for it to end, or give another --out"
            ) from None
        with held:
            for folder in (self.folder, self.path, self.path / "units"):
                remove_temporaries(folder)
            yield

    def refuse_strangers(self) -> None:
        """Raise ValueError where the folder holds something that is not a dataset of ours."""
        ours = (self.path.exists(), (self.folder / FILE_NAME).exists())
        if self.folder.exists() and not any(ours) and any(self.folder.iterdir()):
            raise ValueError(
                f"expected a new or empty folder in {self.folder}, found other files there: "
                "give another --out"
            )

    def is_complete(self) -> bool:
        """Whether the manifest is there, which comes last."""
        return (self.folder / FILE_NAME).exists()

    def begin(self, plan: Plan) -> None:
        """Record the plan, or check that it is the one that was begun here. Raises ValueError."""
        path = self.path / "plan.json"
        record = plan.record()
        if path.exists():
            self._compare(json.loads(path.read_bytes()), record)
        elif self.is_complete():
            self._compare_with_manifest(plan)
        else:
            (self.path / "units").mkdir(exist_ok=True)
            write_json(path, record)

    def _compare(self, begun: dict[str, Any], now: dict[str, Any]) -> None:
        """Raise ValueError, naming what differs, unless the two plans are the same."""
        if begun == now:
            return
        files = {file["name"]: file for file in now["files"]}
        for file in begun["files"]:
            if files.get(file["name"]) != file:
                found = "changed" if file["name"] in files else "gone"
                raise ValueError(
                    f"expected the source {file['name']} as it was when {self.folder} was begun, "
                    f"found it {found}: restore it, or give another --out"
                )
        raise ValueError(
            f"expected the sources and options with which {self.folder} was begun "
            f"({len(begun['files'])} files, split {begun['rule']}), found others "
            f"({len(now['files'])} files, split {now['rule']}): repeat them, or give another --out"
        )

    def _compare_with_manifest(self, plan: Plan) -> None:
        """The same for a finished dataset that came here without its plan."""
        manifest = Manifest.load(self.folder)
        begun = [(source.name, source.bytes) for source in manifest.sources]
        now = [(file.name, file.size) for file in plan.files]
        if (begun, manifest.rule) != (now, plan.rule.record()):
            raise ValueError(
                f"expected a new folder, found another dataset in {self.folder} ({len(begun)} "
                f"sources, split {manifest.rule}): give another --out"
            )

    def records(self) -> dict[int, Record]:
        """The records of finished units, by unit number."""
        paths = sorted((self.path / "units").glob("*.json"))
        records = [Record.from_json(json.loads(path.read_bytes())) for path in paths]
        return {record.unit: record for record in records}

    def save_record(self, record: Record) -> None:
        """Say that a unit is finished. Its shards are on disk by now."""
        write_json(self.path / "units" / f"{record.unit:05d}.json", record.to_json())

    def close(self) -> None:
        """Remove the records once the manifest holds what they say; the plan stays for reruns."""
        shutil.rmtree(self.path / "units")

    def log(self, *lines: str) -> None:
        """Append to prepare.log, where times, warnings and figures of this run go."""
        with open(self.folder / "prepare.log", "a", encoding="utf-8") as file:
            stamp = datetime.now(UTC).isoformat(timespec="seconds")
            file.writelines(f"{stamp} {part}\n" for line in lines for part in line.splitlines())
