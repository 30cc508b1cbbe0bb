"""Folders, local or remote (s3://, gs://, hf:// ...), behind the same few calls."""

import json
import shutil
from pathlib import Path
from typing import Any

from pyarrow import fs

from shards.atomic import atomic_file, move_durably, sync_folder, to_json
from shards.remote import filesystem, is_remote


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

    def remove_file(self, name: str) -> None:
        """Remove a file of the folder, if it is there."""
        if self.exists(name):
            self._system.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")
