"""Object stores by URI (s3://, gs://, hf:// ...): pyarrow's filesystems, with retries."""

import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit

from pyarrow import NativeFile, fs

Result = TypeVar("Result")

# The client retries short failures by itself; these pauses, doubled each time, are for outages.
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5


def is_remote(path: str) -> bool:
    """Return True for a URI."""
    return "://" in path


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a path or URI, and the path inside that filesystem."""
    if not is_remote(path):
        return fs.LocalFileSystem(), Path(path).absolute().as_posix()
    parts = urlsplit(path)
    system, root = client(f"{parts.scheme}://{parts.netloc}", parts.query, os.getpid())
    return system, (root + unquote(parts.path)).strip("/")


def path_of(source: str, inside: str) -> str:
    """Return the path or URI of the path `inside` the filesystem of `source`."""
    if not is_remote(source):
        return inside
    parts = urlsplit(source)
    base = f"{parts.scheme}://{parts.netloc}"
    _, root = client(base, parts.query, os.getpid())
    query = f"?{parts.query}" if parts.query else ""
    return f"{base}/{quote(inside.removeprefix(root).lstrip('/'))}{query}"


@lru_cache
def client(base: str, query: str, process: int) -> tuple[fs.FileSystem, str]:
    """Return a bucket's client: one per process, since it is slow to make and not fork-safe."""
    system, root = fs.FileSystem.from_uri(f"{base}/{'?' + query if query else ''}")
    return system, root.strip("/")


def open_file(folder: str, name: str) -> NativeFile:
    """Open a file in a remote folder. Raises OSError without a retry."""
    system, root = filesystem(folder)
    return system.open_input_file(f"{root}/{name}")


def read(folder: str, name: str) -> bytes:
    """Return the content of a file in a remote folder. Raises as `retried`."""

    def read_all() -> bytes:
        with open_file(folder, name) as file:
            return file.read()

    return retried(read_all, f"read {folder}/{name}")


def sizes(folder: str) -> dict[str, int]:
    """Return the sizes in bytes of the files in a remote folder, by name. Raises as `retried`."""
    system, root = filesystem(folder)

    def list_files() -> dict[str, int]:
        found = system.get_file_info(fs.FileSelector(root))
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    return retried(list_files, f"list {folder}")


def retried(
    attempt: Callable[[], Result],
    action: str,
    remedy: str = "check the network and run the command again",
) -> Result:
    """Return `attempt()`, retried with exponential back-off while it raises OSError.

    `action` completes "expected to ..." in messages. Raises FileNotFoundError without a retry, and
    OSError with the last reason after `ATTEMPTS`.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"expected to {action}, found no such file ({' '.join(str(error).split())}): "
                "check the address"
            ) from None
        except OSError as error:
            reason = " ".join(str(error).split())
        if number < ATTEMPTS - 1:
            # Jitter: many ranks fail at the same moment and should not retry at the same moment.
            time.sleep(FIRST_PAUSE_SECONDS * 2**number * random.uniform(0.5, 1))
    raise OSError(f"expected to {action}, found in {ATTEMPTS} attempts: {reason}: {remedy}")
