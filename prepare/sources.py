"""What is to be read: SOURCE arguments → the files they name, in one fixed order.

A source is a file, a folder (searched through, supported types, hidden files left out), a glob,
a URI of a filesystem that pyarrow knows (s3://, gs://, hf://), or the word `stdlib`: the source
text of the running Python's standard library, which every Python install carries.
"""

import fnmatch
import os
import posixpath
import sysconfig
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from shards.remote import filesystem, is_remote, path_of

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
STDLIB = "stdlib"
STDLIB_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """One file to read. `name` is what the manifest calls it, relative to the SOURCE given.

    `size` in bytes as stored; `mtime` in nanoseconds, to notice a change between two runs;
    `val` says that it came by --val-source; `column` is the field with
    the text, where it has fields.
    """

    name: str
    path: str
    size: int
    mtime: int
    kind: str
    compression: str | None = None
    val: bool = False
    column: str = "text"

    @property
    def remote(self) -> bool:
        """Whether it is read over a network."""
        return is_remote(self.path)

    @property
    def identity(self) -> Hashable:
        """The same for every name of one file, so that a link does not make it two."""
        if self.remote:
            return self.path
        stat = os.stat(self.path)
        return stat.st_dev, stat.st_ino

    def status(self) -> tuple[int, int] | None:
        """Its size and mtime now, or None where it is gone."""
        system, path = filesystem(self.path)
        info = system.get_file_info(path)
        return (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


def find_files(sources: Iterable[str], val: bool = False) -> list[InputFile]:
    """The files that the sources name, each once, sources in the order given, names sorted.

    Raises FileNotFoundError for a source that names nothing and ValueError for a file of a type
    that is not supported.
    """
    found: dict[Hashable, InputFile] = {}
    for source in sources:
        files = list(_standard_library(val) if source == STDLIB else _expand(source, val))
        if not files:
            raise FileNotFoundError(
                f"expected input in {source}, found no file of a supported type: give a file, "
                f"folder or glob of {_supported()}, or `{STDLIB}`"
            )
        for file in sorted(files, key=lambda file: file.name):
            found.setdefault(file.identity, file)
    return list(found.values())


def _look_at(source: str) -> tuple[fs.FileSystem, str, fs.FileInfo]:
    """The filesystem of a source, the path in it, and what lies there.

    Raises OSError where an object store or a hub can't be reached.
    """
    try:
        system, path = filesystem(source)
        return system, path, system.get_file_info(path)
    except Exception as error:  # each client has errors of its own
        if not is_remote(source):
            raise
        raise OSError(
            f"expected to look into {source}, found {type(error).__name__} ({error}): check the "
            "address, the credentials and the network"
        ) from None


def _expand(source: str, val: bool) -> Iterator[InputFile]:
    """The files of one source."""
    system, path, info = _look_at(source)
    if info.type == fs.FileType.File:
        yield _input_file(source, info, posixpath.basename(path), val)
        return
    pattern = ""
    if info.type == fs.FileType.NotFound and any(mark in path for mark in "*?["):
        path, pattern = _split_glob(path)
    folder = fs.FileSelector(path, recursive=True, allow_not_found=True)
    for info in system.get_file_info(folder):
        inside = posixpath.relpath(info.path, path)
        hidden = any(part.startswith(".") for part in inside.split("/"))
        if info.type != fs.FileType.File or hidden:
            continue
        # fnmatch's `*` crosses folders; a glob's does so only as `**`.
        wanted = _matches(inside, pattern) if pattern else _kind(info.path)[0] is not None
        if wanted:
            yield _input_file(source, info, f"{posixpath.basename(path)}/{inside}", val)


def _split_glob(path: str) -> tuple[str, str]:
    """The folder above the first wildcard, and the pattern below it."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _matches(inside: str, pattern: str) -> bool:
    """Whether a relative path fits a glob in which `**` stands for any number of folders."""
    names, marks = inside.split("/"), pattern.split("/")
    if "**" in marks:
        at = marks.index("**")
        head, tail = "/".join(marks[:at]), "/".join(marks[at + 1 :]) or "*"
        return _matches("/".join(names[:at]), head) and any(
            _matches("/".join(names[start:]), tail) for start in range(at, len(names))
        )
    return len(names) == len(marks) and all(map(fnmatch.fnmatchcase, names, marks))


def _input_file(source: str, info: fs.FileInfo, name: str, val: bool) -> InputFile:
    """An InputFile of what the filesystem says of it."""
    kind, compression = _kind(info.path)
    if kind is None:
        raise ValueError(
            f"expected a file of type {_supported()}, found {info.path}: rename or convert it"
        )
    path = path_of(source, info.path)
    return InputFile(name, path, info.size, info.mtime_ns or 0, kind, compression, val)


def _kind(path: str) -> tuple[str | None, str | None]:
    """(kind, compression) by the file's name; kind is None for an unsupported type."""
    stem, suffix = posixpath.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = KINDS.get(suffix)
    # Parquet is read from its end, which a compressed stream has last; it compresses inside.
    return (None if compression and kind == "parquet" else kind), compression


def _supported() -> str:
    return f"{', '.join(KINDS)} (all but .parquet also as {', '.join(COMPRESSIONS)})"


def _standard_library(val: bool) -> Iterator[InputFile]:
    """The .py files of the running interpreter's library, without its test suites."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not STDLIB_LEFT_OUT & set(inside.parts):
            stat = path.stat()
            name = f"{STDLIB}/{inside.as_posix()}"
            size, mtime = stat.st_size, stat.st_mtime_ns
            yield InputFile(name, path.as_posix(), size, mtime, "text", val=val)
