"""Folders, local or remote (s3://, gs://, hf:// ...), behind the same few calls."""

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from shards.atomic import atomic_file, move_durably, sync_folder, to_json


def is_remote(path: str) -> bool:
    """Whether a path is a URI."""
    return "://" in path


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the path as that filesystem names it."""
    if not is_remote(path):
        return fs.LocalFileSystem(), Path(path).absolute().as_posix()
    parts = urlsplit(path)
    system, root = _remote(f"{parts.scheme}://{parts.netloc}", parts.query, os.getpid())
    return system, (root + unquote(parts.path)).strip("/")


def path_of(source: str, inside: str) -> str:
    """The path or URI of what the filesystem of `source` calls `inside`."""
    if not is_remote(source):
        return inside
    parts = urlsplit(source)
    base = f"{parts.scheme}://{parts.netloc}"
    _, root = _remote(base, parts.query, os.getpid())
    query = f"?{parts.query}" if parts.query else ""
    return f"{base}/{quote(inside.removeprefix(root).lstrip('/'))}{query}"


@lru_cache
def _remote(base: str, query: str, process: int) -> tuple[fs.FileSystem, str]:
    """One client for each bucket and process: they are slow to make and don't survive a fork."""
    system, root = fs.FileSystem.from_uri(f"{base}/{'?' + query if query else ''}")
    return system, root.strip("/")


class Folder:
    """A folder that files are put into whole: renamed into place, or uploaded."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Wherever a worker runs, whatever its working directory: the same place.
        self.local = Path(path).absolute()
        self.remote = is_remote(path)
        self._system, self._root = filesystem(path)

    def __str__(self) -> str:
        return self.path

    def publish(self, file: Path) -> None:
        """Make a file of this machine part of the folder, durably; a local one is moved."""
        if not self.remote:
            move_durably(file, self.local / file.name)
            return
        target = self._at(file.name)
        with open(file, "rb") as local, self._system.open_output_stream(target) as out:
            shutil.copyfileobj(local, out, 1 << 22)

    def write(self, name: str, content: bytes) -> None:
        """Put `content` under `name`, all or nothing."""
        if self.remote:
            with self._system.open_output_stream(self._at(name)) as out:
                out.write(content)
            return
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)
        sync_folder(path.parent)

    def write_json(self, name: str, value: Any) -> None:
        """Put a value as JSON under `name`; the same value gives the same bytes."""
        self.write(name, to_json(value))

    def read(self, name: str) -> bytes | None:
        """What lies under `name`, or None."""
        if not self.exists(name):
            return None
        with self._system.open_input_stream(self._at(name), compression=None) as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        """The value of the JSON under `name`, or None where there is none."""
        content = self.read(name)
        return None if content is None else json.loads(content)

    def exists(self, name: str) -> bool:
        """Whether a file lies under `name`."""
        return self._system.get_file_info(self._at(name)).type == fs.FileType.File

    def names(self, inside: str = "") -> list[str]:
        """The names of what lies in the folder, or in one inside it, sorted."""
        selector = fs.FileSelector(self._at(inside), allow_not_found=True)
        return sorted(info.base_name for info in self._system.get_file_info(selector))

    def remove(self, inside: str) -> None:
        """Remove a folder inside this one."""
        self._system.delete_dir(self._at(inside))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")
