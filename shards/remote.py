"""Object stores by URI (s3://, gs://, hf:// ...): pyarrow's filesystems, and retried reads."""

import os
import random
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

Result = TypeVar("Result")

# The client tries a few times by itself first; these pauses, doubled each time, are for outages.
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5


def is_remote(path: str) -> bool:
    """Whether a path is a URI."""
    return "://" in path


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path as that filesystem names it."""
    if not is_remote(path):
        return fs.LocalFileSystem(), Path(path).absolute().as_posix()
    parts = urlsplit(path)
    system, root = client(f"{parts.scheme}://{parts.netloc}", parts.query, os.getpid())
    return system, (root + unquote(parts.path)).strip("/")


def path_of(source: str, inside: str) -> str:
    """The path or URI of what the filesystem of `source` calls `inside`."""
    if not is_remote(source):
        return inside
    parts = urlsplit(source)
    base = f"{parts.scheme}://{parts.netloc}"
    _, root = client(base, parts.query, os.getpid())
    query = f"?{parts.query}" if parts.query else ""
    return f"{base}/{quote(inside.removeprefix(root).lstrip('/'))}{query}"


@lru_cache
def client(base: str, query: str, process: int) -> tuple[fs.FileSystem, str]:
    """One client for each bucket and process: they are slow to make and don't survive a fork."""
    system, root = fs.FileSystem.from_uri(f"{base}/{'?' + query if query else ''}")
    return system, root.strip("/")


def read(folder: str, name: str) -> bytes:
    """The whole of a file in a remote folder.

    Raises FileNotFoundError where there is none, OSError after `ATTEMPTS` that failed.
    """
    system, root = filesystem(folder)

    def whole() -> bytes:
        with system.open_input_stream(f"{root}/{name}", compression=None) as stream:
            return stream.read()

    return retried(whole, f"{folder}/{name}")


def sizes(folder: str) -> dict[str, int]:
    """The sizes in bytes of the files in a remote folder, by name. Raises OSError as `read`."""
    system, root = filesystem(folder)

    def listed() -> dict[str, int]:
        found = system.get_file_info(fs.FileSelector(root))
        return {info.base_name: info.size for info in found if info.type == fs.FileType.File}

    return retried(listed, folder)


def opened(folder: str, name: str) -> IO[bytes]:
    """A file of a remote folder, to be read from once. Raises OSError at the first failure."""
    system, root = filesystem(folder)
    return system.open_input_file(f"{root}/{name}")


def retried(attempt: Callable[[], Result], what: str) -> Result:
    """What `attempt` returns, tried `ATTEMPTS` times with growing pauses while it raises OSError.

    Raises FileNotFoundError at once, and OSError with the last reason in the end.
    """
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"expected {what}, found no such file ({' '.join(str(error).split())}): "
                "check the address"
            ) from None
        except OSError as error:
            reason = " ".join(str(error).split())
        if number < ATTEMPTS - 1:
            # Many ranks fail at the same moment and should not come back at the same moment.
            time.sleep(FIRST_PAUSE_SECONDS * 2**number * random.uniform(0.5, 1))
    raise OSError(
        f"expected to read {what}, found in {ATTEMPTS} attempts: {reason}: "
        "check the network and run the command again"
    )
