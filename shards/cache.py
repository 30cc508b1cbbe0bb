"""Cache of remote datasets' files on this machine, shared by all processes and of bounded size.

A file is named by the sha256 of its content, so a hit is always right and datasets share what they
have in common. The least recently used files are evicted when room is needed. `MYGPT_CACHE`
(~/.cache/mygpt/shards) is its folder, `MYGPT_CACHE_GB` (100) its limit.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from shards import remote
from shards.files import sync_file

DEFAULT_GIGABYTES = 100.0
PARTIAL = ".part"
# A fixed number of lock files for all content, so that none need be cleared away.
LOCKS = 64
FETCHING_THREADS = 4
BLOCK_BYTES = 1 << 24
ROOM_PAUSE_SECONDS = 0.1


def folder() -> Path:
    """Return the folder of the cache."""
    chosen = os.environ.get("MYGPT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mygpt" / "shards"


def limit_bytes() -> int:
    """Return the size limit of the cache. Raises ValueError unless `MYGPT_CACHE_GB` is above 0."""
    given = os.environ.get("MYGPT_CACHE_GB", str(DEFAULT_GIGABYTES))
    try:
        size = int(float(given) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"expected MYGPT_CACHE_GB above 0, found {given!r}: give gigabytes")
    return size


def open_file(uri: str, name: str, sha256: str, size: int | None = None) -> IO[bytes]:
    """Open a file of the remote folder `uri`, fetched and checked unless it is in the cache.

    One in the cache is checked by its `size`, by its hash if none is given, and fetched again if
    it is damaged. An open file stays readable when it is evicted. Raises FileNotFoundError if there
    is no such file, OSError after several attempts to read it, and ValueError if its content has
    another hash.
    """
    if file := _open_kept(sha256, size):
        return file
    folder().mkdir(parents=True, exist_ok=True)
    with _lock_of(sha256):
        # Another process may have fetched it while this one waited.
        return _open_kept(sha256, size) or remote.retried(
            lambda: _fetch(uri, name, sha256), f"read {uri}/{name}"
        )


def keep(sha256: str) -> bool:
    """Mark a file as used now; return False if it is not, or no longer, in the cache."""
    try:
        os.utime(folder() / sha256)
    except FileNotFoundError:
        return False
    return True


def fetch_ahead(files: Iterable[tuple[str, str, str]]) -> None:
    """Start to fetch files (uri, name, sha256) that are not in the cache, on threads, in order.

    Only a few at a time are queued: call it repeatedly. Errors are ignored here; `open_file` raises
    them when the file is needed.
    """
    threads, fetching = _threads(os.getpid())
    for uri, name, sha256 in files:
        if len(fetching) >= 2 * FETCHING_THREADS:
            return
        if sha256 not in fetching and not keep(sha256):
            fetching.add(sha256)
            threads.submit(_fetch_quietly, uri, name, sha256, fetching)


def _fetch_quietly(uri: str, name: str, sha256: str, fetching: set[str]) -> None:
    with suppress(OSError, ValueError):
        open_file(uri, name, sha256).close()
    fetching.discard(sha256)


@cache
def _threads(process: int) -> tuple[ThreadPoolExecutor, set[str]]:
    """Return a process's threads (a fork has none of its parent's) and the hashes being fetched."""
    return ThreadPoolExecutor(FETCHING_THREADS, "fetch"), set()


def _open_kept(sha256: str, size: int | None) -> IO[bytes] | None:
    """Open a file that is in the cache, whole, and mark it as used, or return None."""
    try:
        file = open(folder() / sha256, "rb")  # noqa: SIM115 - returned open
    except FileNotFoundError:
        return None
    keep(sha256)
    if size is None:
        is_whole = hashlib.file_digest(file, "sha256").hexdigest() == sha256
        file.seek(0)
    else:
        is_whole = os.fstat(file.fileno()).st_size == size
    if is_whole:
        return file
    file.close()
    return None


def _fetch(uri: str, name: str, sha256: str) -> IO[bytes]:
    """Download one file, check its hash and rename it into place; called with its lock held."""
    partial = folder() / f"{sha256}{PARTIAL}"
    try:
        with remote.open_file(uri, name) as source:
            _make_room(source.seek(0, os.SEEK_END), partial)
            for _ in range(2):  # a transfer may corrupt it once
                source.seek(0)
                if (found := _copy(source, partial)) == sha256:
                    file = open(partial, "rb")  # noqa: SIM115 - opened before it can be evicted
                    sync_file(partial)
                    # A listing may miss a file that is renamed meanwhile: not while one is made.
                    with _room_lock():
                        os.replace(partial, folder() / sha256)
                    return file
        raise ValueError(
            f"expected sha256 {sha256[:12]} of {uri}/{name}, found {found[:12]}: the file was "
            "altered; restore it, or prepare again"
        )
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _copy(source: IO[bytes], partial: Path) -> str:
    """Copy all of a file and return its sha256."""
    digest = hashlib.sha256()
    with open(partial, "r+b") as out:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


def _make_room(size: int, partial: Path) -> None:
    """Evict files until `size` bytes fit, and reserve them by making `partial` that long.

    Files being fetched count in full. Raises ValueError for a file larger than the limit.
    """
    limit = limit_bytes()
    if size > limit:
        raise ValueError(
            f"expected room for a file of {size / 1e9:.3g} GB in the cache {folder()}, found a "
            f"limit of {limit / 1e9:.3g} GB: set MYGPT_CACHE_GB"
        )
    while True:
        with _room_lock():
            partial.unlink(missing_ok=True)
            kept = sorted(_kept(), key=lambda item: item[1].st_mtime_ns)
            free = limit - sum(found.st_size for _, found in kept)
            for path, found in kept:
                if free >= size:
                    break
                if _evict(path, partial):
                    free += found.st_size
            if free >= size:
                with open(partial, "wb") as file:
                    file.truncate(size)
                return
        time.sleep(ROOM_PAUSE_SECONDS)  # files being fetched elsewhere can be evicted soon


def _kept() -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files in the cache, those being fetched included."""
    with os.scandir(folder()) as entries:
        for entry in entries:
            if not entry.name.endswith(".lock"):
                with suppress(FileNotFoundError):
                    yield Path(entry.path), entry.stat()


def _evict(path: Path, partial: Path) -> bool:
    """Remove a file, one being fetched only if its process is gone; return True if removed."""
    try:
        # Under the lock that is held for `partial` nobody else can be fetching.
        if path.suffix == PARTIAL and _lock_number(path.stem) != _lock_number(partial.stem):
            with _lock_of(path.stem, timeout=0):
                path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
    except (Timeout, PermissionError):
        return False  # still being written, or, on Windows, still open
    return True


def _room_lock() -> FileLock:
    """Return the lock held while the files are listed, and by what changes their names."""
    return FileLock(folder() / "room.lock")


def _lock_number(sha256: str) -> int:
    return int(sha256[:8], 16) % LOCKS


def _lock_of(sha256: str, timeout: float = -1) -> FileLock:
    """Return the lock held while a file is fetched; it raises Timeout after `timeout` seconds."""
    return FileLock(folder() / f"fetch-{_lock_number(sha256):02}.lock", timeout=timeout)
