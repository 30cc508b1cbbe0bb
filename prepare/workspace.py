"""The folder of a dataset while it is being made: lock, plans and the results of finished units.

They lie in `.prepare/` beside the shards. A unit whose result is stored is finished, so running the
same command again resumes.
"""

import io
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs

from prepare.plan import REMEDY, Plan, Unit, UnitResult, read_plan
from prepare.quarantine import QUARANTINE
from shards import stored_json
from shards.files import (
    atomic_file,
    json_bytes,
    lock,
    move_durably,
    remove_temporaries,
    sync_folder,
)
from shards.manifest import MANIFEST_NAME, Manifest, Shard, npy_header
from shards.remote import filesystem, is_remote
from shards.tokenizer import GPT2, Tokenizer, from_json, load
from shards.vocabulary import TOKENIZER_NAME

WORK = ".prepare"
PLAN = f"{WORK}/plan.json"
# Written when a run was refused for its input: a corrected command may start over.
REFUSED = f"{WORK}/refused"
SHARD_FILE = re.compile(r"(train|val)_\d{5,}(_\d+)?(\.npy|\.docs\.parquet)")
PARQUET_END = b"PAR1"
# Folders in the work area.
UNITS = "units"  # results
STAGING = "staging"  # shards being written
HASHES = "hashes"  # arrays: content hashes of documents, for --dedup
DUPLICATES = "drops"  # arrays: indices of duplicates
HELD_OUT = "held_out"  # arrays: content hashes of validation text from --val-source
ARRAYS = {HASHES, DUPLICATES, HELD_OUT}
HELD_OUT_HASHES = f"{HELD_OUT}/hashes"
LOG = "prepare.log"
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
        return None if content is None else stored_json.parse(content, f"{self}/{name}", REMEDY)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as JSON under `name`, all or nothing."""
        self.write(name, json_bytes(value))

    def exists(self, name: str) -> bool:
        """True if there is a file of that name."""
        return self._system.get_file_info(self._at(name)).type == fs.FileType.File

    def listing(self, inside: str = "") -> dict[str, int | None]:
        """Return the sizes of what is in the folder, or in one inside it, by name."""
        selector = fs.FileSelector(self._at(inside), allow_not_found=True)
        return {info.base_name: info.size for info in self._system.get_file_info(selector)}

    def remove(self, inside: str) -> None:
        """Remove a folder inside this one."""
        self._system.delete_dir(self._at(inside))

    def remove_file(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._system.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return posixpath.join(self._root, name).rstrip("/") or "/"


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
        with self._lock(f"lock-{task.replace('/', '-of-')}" if task else "lock"):
            # Acquire the own lock before testing others, so that two runs can't miss each other.
            tasks = sorted(path.name for path in (self.folder.local / WORK).glob("lock-*"))
            for other in ["lock"] if task else tasks:
                with self._lock(other):
                    pass
            yield

    def plan_locked(self) -> AbstractContextManager[object]:
        """Hold the lock under which the plan is stored, for tasks that start at the same moment."""
        return nullcontext() if self.folder.remote else self._lock("plan.lock")

    def _lock(self, name: str) -> AbstractContextManager[object]:
        message = (
            f"expected to be alone in {self.folder}, found another prepare at work there: "
            "wait for it to end, or give another --out"
        )
        return lock(self.folder.local / WORK / name, message, LOCK_SECONDS)

    def check_folder(self) -> None:
        """Raise ValueError if the folder holds files but no dataset."""
        others = self.folder.listing().keys() - {QUARANTINE, LOG, WORK}
        if others and MANIFEST_NAME not in others and not self.folder.exists(PLAN):
            raise ValueError(
                f"expected a new or empty folder in {self.folder}, found other files there "
                f"({min(others)}, ...): give another --out"
            )

    def manifest(self) -> Manifest | None:
        """Return the manifest of the complete dataset in the folder, or None."""
        content = self.folder.read(MANIFEST_NAME)
        return None if content is None else Manifest.parse(content, self.folder.path)

    def tokenizer(self, plan: Plan) -> Tokenizer:
        """Return the tokenizer of a plan, whose `tokenizer.json` is in the folder unless it is
        GPT-2's. Raises ValueError if that is damaged."""
        content = None if plan.vocabulary == GPT2 else self.folder.read(TOKENIZER_NAME)
        return load() if content is None else from_json(content, self.folder.path, known=True)

    def store_tokenizer(self, tokenizer: Tokenizer, manifest: Manifest | None) -> None:
        """Write `tokenizer.json`. Raises ValueError if it is not that of the complete dataset."""
        if manifest and tokenizer.identity != manifest.tokenizer:
            raise ValueError(
                f"expected the vocabulary {manifest.tokenizer.hash[:12]} again, found "
                f"{tokenizer.hash[:12]}: a source or the package tokenizers changed; restore "
                f"{TOKENIZER_NAME}, or give another --out"
            )
        self.folder.write(TOKENIZER_NAME, tokenizer.to_json())

    def stored_plan(self, generation: int) -> Plan | None:
        """Return the plan that made a generation, or None. Raises ValueError if it is damaged."""
        for name, record in self._plans(generation):
            return read_plan(record, f"{self.folder}/{name}")
        return None

    def _plans(self, generation: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (file, record) of the stored plan of a generation."""
        for name in (_plan_name(generation), PLAN):  # myGPT 0.2 kept only the last one
            record = self.folder.read_json(name)
            if record is not None and record.get("generation", 0) == generation:
                yield name, record

    def store_plan(self, plan: Plan) -> None:
        """Store the plan, so that every later run can be compared with it."""
        self.folder.write_json(_plan_name(plan.generation), plan.to_dict())

    def results(self, units: Sequence[Unit]) -> dict[int, UnitResult]:
        """Return the results of those of the units that are finished, by number.

        A unit whose result is damaged, or one of whose shards is, is not finished.
        """
        stored = self.folder.listing(f"{WORK}/{UNITS}")
        finished = [unit for unit in units if f"{unit.name}.json" in stored]
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            results = [result for result in pool.map(self._result, finished) if result]
        faulty = self.faulty(shard for result in results for shard in result.all_shards())
        return {
            result.unit: result
            for result in results
            if not any(shard.file in faulty for shard in result.all_shards())
        }

    def _result(self, unit: Unit) -> UnitResult | None:
        """Return the stored result of a unit, or None if it is damaged."""
        name = f"{WORK}/{UNITS}/{unit.name}.json"
        try:
            record = self.folder.read_json(name) or {}
            stored_json.verify_checksum(record, name, REMEDY)  # myGPT 0.2 wrote none
            result = stored_json.build(UnitResult, record, name)
        except ValueError:
            return None
        return result if result.unit == unit.number else None

    def faulty(self, shards: Iterable[Shard]) -> set[str]:
        """Return the files of the shards that are missing or cut, or whose index is.

        Their contents are not read, but for the header and the end of the index.
        """
        sizes = self.folder.listing()
        return {shard.file for shard in shards if not self._is_whole(shard, sizes)}

    def _is_whole(self, shard: Shard, sizes: dict[str, int | None]) -> bool:
        if sizes.get(shard.file) != shard.file_bytes or not sizes.get(shard.index):
            return False
        if self.folder.remote:  # there an object appears whole or not at all
            return True
        header = npy_header(shard.tokens)
        with open(self.folder.local / shard.file, "rb") as tokens:
            start = tokens.read(len(header))
        with open(self.folder.local / shard.index, "rb") as index:
            index.seek(-min(len(PARQUET_END), sizes[shard.index] or 0), io.SEEK_END)
            return start == header and index.read() == PARQUET_END

    @contextmanager
    def staging(self, unit: Unit) -> Iterator[Path]:
        """Yield a new folder for a unit's shards. `finish_unit` or an exception removes it."""
        parent = None if self.folder.remote else self.folder.local / WORK / STAGING
        if parent:
            parent.mkdir(parents=True, exist_ok=True)
            for left_by_killed_run in parent.glob(f"{unit.name}-*"):
                shutil.rmtree(left_by_killed_run)
        staged = Path(tempfile.mkdtemp(prefix=f"{unit.name}-", dir=parent))
        try:
            yield staged
        except BaseException:
            shutil.rmtree(staged)
            raise

    def finish_unit(self, result: UnitResult, staged: Path) -> None:
        """Publish a unit's staged shards, then store its result, which marks it as finished."""
        for shard in result.all_shards():
            self.publish(shard, staged)
        if not self.folder.remote:
            sync_folder(self.folder.local)  # a result on disk must not outlive its shards
        record = stored_json.with_checksum(asdict(result))
        self.folder.write_json(f"{WORK}/{UNITS}/{result.unit:05d}.json", record)
        shutil.rmtree(staged)

    def publish(self, shard: Shard, staged: Path) -> None:
        """Move a staged shard into the folder: its index first, so a shard has its index."""
        self.folder.publish(staged / shard.index)
        self.folder.publish(staged / shard.file)

    def save_array(self, name: str, array: np.ndarray) -> None:
        """Store an array in the work area, all or nothing."""
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        self.folder.write(f"{WORK}/{name}.npy", buffer.getvalue())

    def load_array(self, name: str) -> np.ndarray | None:
        """Return an array of the work area, or None. Raises ValueError if it is damaged."""
        content = self.folder.read(f"{WORK}/{name}.npy")
        try:
            return None if content is None else np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"expected an array in {self.folder}/{WORK}/{name}.npy, found {error}: remove that "
                "file and run again"
            ) from None

    def discard_plan(self, plan: Plan) -> None:
        """Remove an unfinished plan and everything made by it, so that another may be started."""
        self.remove_intermediates()
        manifest = self.manifest()
        kept = {name for s in manifest.shards for name in (s.file, s.index)} if manifest else set()
        for name in self.folder.listing().keys() - kept:
            if SHARD_FILE.fullmatch(name) or (name == TOKENIZER_NAME and not manifest):
                self.folder.remove_file(name)
        for name, _ in self._plans(plan.generation):
            self.folder.remove_file(name)

    def remove(self, folders: set[str]) -> None:
        """Remove some folders of the work area."""
        for name in self.folder.listing(WORK).keys() & folders:
            self.folder.remove(f"{WORK}/{name}")

    def remove_intermediates(self) -> None:
        """Remove results and arrays, once the manifest holds them; the plan stays for reruns."""
        self.remove({UNITS, STAGING} | ARRAYS)
        self.folder.remove_file(REFUSED)
        if not self.folder.remote:
            for path in (self.folder.local, self.folder.local / WORK):
                remove_temporaries(path, "")

    def log(self, *lines: str) -> None:
        """Append to prepare.log, where times, warnings and figures of this run go."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        new = "".join(f"{stamp} {part}\n" for line in lines for part in line.splitlines())
        self.folder.write(LOG, (self.folder.read(LOG) or b"") + new.encode())


def _plan_name(generation: int) -> str:
    """Return the file of the plan of a generation; that of the first is `plan.json`."""
    return f"{WORK}/plan_{generation:05d}.json" if generation else PLAN
