"""Files of remote datasets, kept on this machine: one cache for all processes, of bounded size.

A file lies under the hash of its content, so it is right whatever wrote it, and datasets share what
they have in common. The least recently used go when room is needed. Where it lies and how large it
may grow: `MYGPT_CACHE` (~/.cache/mygpt/shards) and `MYGPT_CACHE_GB` (100).
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

DEFAULT_GIGABYTES = 100.0
PARTIAL = ".part"
# Locks are files: a handful for all content, so that they need not be cleared away.
LOCKS = 64
FETCHING_THREADS = 4
BLOCK_BYTES = 1 << 24
ROOM_PAUSE_SECONDS = 0.1


def folder() -> Path:
    """Where the cache lies."""
    chosen = os.environ.get("MYGPT_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mygpt" / "shards"


def limit_bytes() -> int:
    """How large the cache may grow. Raises ValueError for a `MYGPT_CACHE_GB` that is no size."""
    given = os.environ.get("MYGPT_CACHE_GB", str(DEFAULT_GIGABYTES))
    try:
        size = int(float(given) * 1e9)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ValueError(f"expected MYGPT_CACHE_GB above 0, found {given!r}: give gigabytes")
    return size


def open_file(uri: str, name: str, sha256: str) -> IO[bytes]:
    """A file of the remote folder `uri`, whole and of this hash, from the cache if it is there.

    What is open stays readable when it is evicted. Raises FileNotFoundError where there is no such
    file, OSError after several attempts to read it, and ValueError for other content.
    """
    if file := _open_kept(sha256):
        return file
    folder().mkdir(parents=True, exist_ok=True)
    with _lock_of(sha256):
        # Another process may have fetched it while this one waited.
        return _open_kept(sha256) or remote.retried(
            lambda: _fetch(uri, name, sha256), f"{uri}/{name}"
        )


def keep(sha256: str) -> bool:
    """Mark a file as used now; False if it is not, or no longer, in the cache."""
    try:
        os.utime(folder() / sha256)
    except FileNotFoundError:
        return False
    return True


def fetch_ahead(files: Iterable[tuple[str, str, str]]) -> None:
    """Begin to bring files (uri, name, sha256) into the cache, on threads, in this order.

    Only the first few that are not there: call it again and again. One that can't be had is passed
    over: whoever comes to need it is told why.
    """
    threads, fetching = _threads(os.getpid())
    for uri, name, sha256 in files:
        if len(fetching) >= 2 * FETCHING_THREADS:
            return
        if sha256 not in fetching and not keep(sha256):
            fetching.add(sha256)
            threads.submit(_bring, uri, name, sha256, fetching)


def _bring(uri: str, name: str, sha256: str, fetching: set[str]) -> None:
    with suppress(OSError, ValueError):
        open_file(uri, name, sha256).close()
    fetching.discard(sha256)


@cache
def _threads(process: int) -> tuple[ThreadPoolExecutor, set[str]]:
    """The threads of a process, a fork has none of its parent's, and the hashes they are after."""
    return ThreadPoolExecutor(FETCHING_THREADS, "fetch"), set()


def _open_kept(sha256: str) -> IO[bytes] | None:
    """A file that is in the cache, marked as used; else None."""
    if not keep(sha256):
        return None
    try:
        return open(folder() / sha256, "rb")
    except FileNotFoundError:
        return None  # evicted since


def _fetch(uri: str, name: str, sha256: str) -> IO[bytes]:
    """Download one file, check it, and let it appear; called with its lock held."""
    partial = folder() / f"{sha256}{PARTIAL}"
    try:
        with remote.opened(uri, name) as source:
            _make_room(source.seek(0, os.SEEK_END), partial)
            for _ in range(2):  # what came over a network may have been altered on the way
                source.seek(0)
                if (found := _copy(source, partial)) == sha256:
                    file = open(partial, "rb")  # noqa: SIM115 - opened before it may be evicted
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
    """Copy all of a file; returns its sha256."""
    digest = hashlib.sha256()
    with open(partial, "r+b") as out:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            out.write(block)
    return digest.hexdigest()


def _make_room(size: int, partial: Path) -> None:
    """Evict until `size` bytes fit, and take them by making `partial` that long.

    Files being fetched count in full. Raises ValueError for a file that can't ever fit.
    """
    limit = limit_bytes()
    if size > limit:
        raise ValueError(
            f"expected room for a file of {size / 1e9:.3g} GB in the cache {folder()}, found a "
            f"limit of {limit / 1e9:.3g} GB: set MYGPT_CACHE_GB"
        )
    while True:
        with FileLock(folder() / "room.lock"):
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
        time.sleep(ROOM_PAUSE_SECONDS)  # what others are fetching can be evicted soon


def _kept() -> Iterator[tuple[Path, os.stat_result]]:
    """The files in the cache, those being fetched too."""
    with os.scandir(folder()) as entries:
        for entry in entries:
            if not entry.name.endswith(".lock"):
                with suppress(FileNotFoundError):
                    yield Path(entry.path), entry.stat()


def _evict(path: Path, partial: Path) -> bool:
    """Remove a file; one being fetched only if whoever fetched it is gone."""
    try:
        # Under the lock that is held for `partial` nobody else can be fetching.
        if path.suffix == PARTIAL and _lock_number(path.stem) != _lock_number(partial.stem):
            with _lock_of(path.stem, timeout=0):
                path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
    except (Timeout, PermissionError):
        return False  # still written to, or, on Windows, still open
    return True


def _lock_number(sha256: str) -> int:
    return int(sha256[:8], 16) % LOCKS


def _lock_of(sha256: str, timeout: float = -1) -> FileLock:
    """The lock under which a file is fetched; it raises Timeout after `timeout` seconds."""
    return FileLock(folder() / f"fetch-{_lock_number(sha256):02}.lock", timeout=timeout)
