"""Input files: SOURCE arguments resolved to the files they name, in a fixed order.

A source is a file, a folder (searched recursively for supported types, hidden files left out), a
glob, a URI of a filesystem that pyarrow knows (s3://, gs://, hf://), or the word `stdlib`: the
source code of the running Python's standard library, a corpus that every installation has.
"""

import fnmatch
import os
import posixpath
import sysconfig
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from urllib.parse import unquote

from pyarrow import fs

from shards.remote import filesystem, is_remote, path_of

TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
KINDS = {".txt": TEXT, ".md": TEXT, ".jsonl": JSONL, ".ndjson": JSONL, ".parquet": PARQUET}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
# Estimated size of compressed text relative to its file.
COMPRESSION_RATIO = 4
STDLIB = "stdlib"
STDLIB_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    name: str  # relative to its SOURCE, as in the manifest
    path: str
    size: int  # bytes as stored
    mtime: int  # nanoseconds, to notice a change between two runs
    kind: str  # TEXT, JSONL or PARQUET
    compression: str | None = None
    val: bool = False  # from --val-source
    column: str = "text"  # column or field with the text

    @property
    def text_bytes(self) -> int:
        """Estimated bytes of text in the file."""
        packed = self.compression is not None or self.kind == PARQUET
        return self.size * (COMPRESSION_RATIO if packed else 1)

    @property
    def remote(self) -> bool:
        """True if the file is read over a network."""
        return is_remote(self.path)

    @property
    def identity(self) -> Hashable:
        """The same for every name of one file, so that a link does not make it two."""
        if self.remote:
            return self.path
        return _inode(self.path)

    @property
    def real_path(self) -> str:
        """The same for every path to a local file, also after the file is gone."""
        return self.path if self.remote else os.path.realpath(self.path)

    def status(self) -> tuple[int, int] | None:
        """Current size and mtime, or None if the file is gone."""
        system, path = filesystem(self.path)
        info = system.get_file_info(path)
        return (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


def find_files(sources: Iterable[str], val: bool = False) -> list[InputFile]:
    """Return the files that the sources name, each once: sources in their order, names sorted.

    Raises FileNotFoundError for a source without files, ValueError for an unsupported type.
    """
    files: dict[Hashable, InputFile] = {}
    for source in sources:
        of_source = list(_standard_library(val) if source == STDLIB else _expand(source, val))
        if not of_source:
            raise FileNotFoundError(
                f"expected input in {source}, found no file of a supported type: give a file, "
                f"folder or glob of {_supported()}, or `{STDLIB}`"
            )
        for file in sorted(of_source, key=lambda file: file.name):
            files.setdefault(file.identity, file)
    return list(files.values())


def _expand(source: str, val: bool) -> Iterator[InputFile]:
    """Yield the files of one file, folder or glob. Raises ValueError or OSError for bad ones."""
    if not source.strip():
        raise ValueError("expected a SOURCE, found an empty one: give a file, a folder, or stdlib")
    if source.startswith("file:///"):
        source = unquote(source.removeprefix("file://"))
    system, path, info = _file_info(source)
    _check_regular(info)
    if info.type == fs.FileType.File:
        yield _input_file(source, info, posixpath.basename(path), val)
        return
    pattern = ""
    if info.type == fs.FileType.NotFound:
        if not any(mark in path for mark in "*?["):
            raise FileNotFoundError(
                f"expected input in {source}, found no such file or folder: check the path"
            )
        path, pattern = _split_glob(path)
    met = set[Hashable]()
    for found in _paths_below(system, path):
        inside = posixpath.relpath(found, path)
        hidden = any(part.startswith(".") for part in inside.split("/"))
        if hidden or not (_matches(inside, pattern) if pattern else _kind(found)[0]):
            continue
        if inside != inside.encode(errors="replace").decode():
            raise ValueError(
                f"expected file names in UTF-8, found {os.fsencode(inside)!r} in {path}: rename it"
            )
        info = system.get_file_info(found)
        _check_regular(info)
        if info.type == fs.FileType.File:
            file = _input_file(source, info, f"{posixpath.basename(path)}/{inside}", val)
            if file.identity not in met:
                met.add(file.identity)
                yield file


def _check_regular(info: fs.FileInfo) -> None:
    """Raise ValueError for a pipe, which would be waited for, or a device."""
    if info.type == fs.FileType.Unknown:
        raise ValueError(
            f"expected a file or folder, found {info.path}, a pipe, socket or device: write its "
            "content to a file"
        )


def _paths_below(system: fs.FileSystem, folder: str) -> Iterator[str]:
    """Yield the paths of the files below a folder.

    On a local disk links are followed last, the shallowest first, and only to what was not met
    before, so a file has its real path if that is below the folder, and a loop ends.
    """
    if not isinstance(system, fs.LocalFileSystem):
        selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
        found = system.get_file_info(selector)
        yield from (info.path for info in found if info.type == fs.FileType.File)
        return
    seen: set[tuple[int, int]] = set()
    links = [(0, folder)]
    while links:
        _, link = heappop(links)
        is_folder = os.path.isdir(link)
        found = [] if is_folder else [link]
        for parent, names, files in os.walk(link, onerror=_raise) if is_folder else ():
            names[:] = [name for name in names if not name.startswith(".")]
            if _inode(parent) in seen:
                names.clear()
                continue
            seen.add(_inode(parent))
            for path in (f"{parent.rstrip('/')}/{name}" for name in [*names, *files]):
                if os.path.islink(path):
                    heappush(links, (path.count("/"), path))
                elif not os.path.isdir(path):
                    found.append(path)
        yield from sorted(found)


def _inode(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _file_info(source: str) -> tuple[fs.FileSystem, str, fs.FileInfo]:
    """Return the filesystem of a source, its path there, and what is at that path.

    Raises OSError if an object store or a hub can't be reached.
    """
    try:
        system, path = filesystem(source)
        return system, path, system.get_file_info(path)
    except Exception as error:  # each client has its own exception types
        if not is_remote(source):
            raise
        raise OSError(
            f"expected to look into {source}, found {type(error).__name__} ({error}): check the "
            "address, the credentials and the network"
        ) from None


def _split_glob(path: str) -> tuple[str, str]:
    """Split a glob into the folder above its first wildcard and the pattern below."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
    return "/".join(parts[:first]), "/".join(parts[first:])


def _matches(inside: str, pattern: str) -> bool:
    """Match a relative path against a glob, `**` standing for any number of folders.

    fnmatch alone won't do: its `*` crosses folders.
    """
    names, marks = inside.split("/"), pattern.split("/")
    if "**" in marks:
        at = marks.index("**")
        head, tail = "/".join(marks[:at]), "/".join(marks[at + 1 :]) or "*"
        return _matches("/".join(names[:at]), head) and any(
            _matches("/".join(names[start:]), tail) for start in range(at, len(names))
        )
    return len(names) == len(marks) and all(map(fnmatch.fnmatchcase, names, marks))


def _input_file(source: str, info: fs.FileInfo, name: str, val: bool) -> InputFile:
    kind, compression = _kind(info.path)
    if kind is None:
        raise ValueError(
            f"expected a file of type {_supported()}, found {info.path}: rename or convert it"
        )
    path = path_of(source, info.path)
    return InputFile(name, path, info.size, info.mtime_ns or 0, kind, compression, val)


def _kind(path: str) -> tuple[str | None, str | None]:
    """Return (kind, compression) by a file's suffixes; kind is None for an unsupported type."""
    stem, suffix = posixpath.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = posixpath.splitext(stem)[1]
    kind = KINDS.get(suffix)
    # Parquet is read from its end, which a compressed stream reaches last; it compresses inside.
    return (None if compression and kind == PARQUET else kind), compression


def _supported() -> str:
    return f"{', '.join(KINDS)} (all but .parquet also as {', '.join(COMPRESSIONS)})"


def _standard_library(val: bool) -> Iterator[InputFile]:
    """Yield the .py files of the running interpreter's library, without its test suites."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not STDLIB_LEFT_OUT & set(inside.parts):
            stat, name = path.stat(), f"{STDLIB}/{inside.as_posix()}"
            yield InputFile(name, path.as_posix(), stat.st_size, stat.st_mtime_ns, TEXT, val=val)
