"""All-or-nothing files and folders: write under a temporary name, fsync, rename (promise 6).

A kill at any moment leaves either what was there before or the whole of what is new, beside
temporaries that no reader takes for results.
"""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import orjson
from filelock import AcquireReturnProxy, FileLock, Timeout

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends without an exception.

    The temporary name is unique, so two writers, even on two machines, never share one. With
    `durable=False` the content is not fsynced: the caller does that later. Raises OSError as the
    file system does; the temporary is removed on any exception.
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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an exception.

    Everything in it is fsynced before the rename. What a killed writer of the same `path` left is
    removed first; the temporary is removed on any exception. Raises ValueError if `path` exists
    and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"expected a new folder in {path}, found files there: give another one")
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            sync_folder(inside) if inside.is_dir() else sync_file(inside)
        sync_folder(temporary)
        if path.exists():
            path.rmdir()
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def move_durably(file: Path, target: Path) -> None:
    """Fsync a file, then rename it to `target`."""
    sync_file(file)
    os.replace(file, target)


def sync_file(path: Path) -> None:
    """Fsync the content of a file."""
    with open(path, "rb+") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that the renames in it survive a power cut (a no-op on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(path: Path, message: str, seconds: float = 0) -> AcquireReturnProxy:
    """Return the held lock of the file `path`, for a `with` statement; it ends with the process.

    Raises ValueError with `message` if another process holds it for so many seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(path).acquire(timeout=seconds)
    except Timeout:
        raise ValueError(message) from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, all or nothing."""
    with atomic_file(path) as file:
        file.write(json_bytes(value))
    sync_folder(path.parent)


def json_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys: the same value, the same bytes."""
    return orjson.dumps(
        value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    )


def remove_temporaries(folder: Path, name: str) -> None:
    """Remove what killed writers of files whose names start with `name` left in `folder`."""
    for leftover in folder.glob(f".{glob.escape(name)}*{TEMPORARY_SUFFIX}"):
        leftover.unlink(missing_ok=True)
