"""All-or-nothing files: write to a temporary name, fsync, rename (promise 6)."""

import glob
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that appears under `path` whole, on leaving the block, or not at all.

    The temporary name is a new one each time, so two writers, on two machines, never share one; a
    rename replaces what was there. Raises OSError as the file system does; the temporary is then
    removed. Unless `durable`, the content is left for somebody else to bring to the disk.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_durably(file: Path, target: Path) -> None:
    """Bring a file's content to the disk, then rename it: what lies under `target` is whole."""
    with open(file, "rb+") as content:  # Windows flushes only what is open for writing
        os.fsync(content.fileno())
    os.replace(file, target)


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
    return orjson.dumps(
        value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    )


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed writers of files whose names begin with `name` left behind."""
    for leftover in folder.glob(f".{glob.escape(name)}*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)
