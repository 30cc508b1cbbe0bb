"""All-or-nothing files: write to a temporary name, fsync, rename (promise 6)."""

import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` whole, on leaving the block, or not at all.

    The temporary name carries the process id, so two writers never share one; a rename replaces
    what was there. Raises OSError as the file system does; the temporary is then removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the renames inside `folder` survive a power cut (a no-op on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, all or nothing."""
    with atomic_file(path) as file:
        file.write(to_json(value))
    sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    """Indented JSON with sorted keys: the same value, the same bytes."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed writers of files whose names begin with `name` left behind."""
    for leftover in folder.glob(f".{glob.escape(name)}*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)
