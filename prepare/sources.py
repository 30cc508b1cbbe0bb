"""Input files: SOURCE arguments resolved to the files they name, in a fixed order.

A source is a file, a folder (searched recursively, hidden files left out), a glob, a .zip archive,
a URI of a filesystem that pyarrow knows (s3://, gs://, hf://), or the word `stdlib`: the source
code of the running Python's standard library, a corpus that every installation has. What the name
of a file does not tell is read as plain text if its content is.
"""

import fnmatch
import os
import posixpath
import shlex
import sysconfig
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from urllib.parse import unquote

from pyarrow import fs

from prepare.file_types import (
    FIRST_KINDS,
    HEAD_BYTES,
    KINDS,
    TEXT,
    ZIP,
    by_name,
    describe_left_out,
    is_of_first_kinds,
    is_stream_by_name,
    not_text,
    unreadable,
)
from prepare.input_file import SCHEME, InputFile, byte_stream, inode_of, members
from shards.remote import filesystem, is_remote, path_of

STDLIB = "stdlib"
STDLIB_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
# What `datasets.save_to_disk` writes beside the data-*.arrow of a dataset, and above several.
DATASET_STATE = {"state.json", "dataset_info.json"}
DATASET_DICT = "dataset_dict.json"
DATASET_DATA = "data-"
# Files inspected concurrently: most of that time is waiting, for a network above all.
INSPECTED_AT_ONCE = 16


def find_files(
    sources: Iterable[str],
    val: bool = False,
    all_text: bool = True,
    left_out: Counter[str] | None = None,
) -> list[InputFile]:
    """Return the files that the sources name, each once: sources in their order, names sorted.

    Without `all_text` folders give only files of the types that myGPT 0.2 read. What folders,
    globs and archives hold beside is counted in `left_out`, by type. Raises FileNotFoundError for a
    source without files, ValueError for one that is no text.
    """
    files: dict[Hashable, InputFile] = {}
    for source in sources:
        search = _Search(source, val, all_text)
        of_source = list(_standard_library(val) if source == STDLIB else search.files())
        if not of_source:
            raise search.nothing_found()
        for file in sorted(of_source, key=lambda file: file.name):
            files.setdefault(file.identity, file)
        if left_out is not None:
            left_out.update(search.left_out)
    return list(files.values())


@dataclass
class _Search:
    """Search for the files of one file, folder, glob or archive."""

    source: str
    val: bool
    all_text: bool
    left_out: Counter[str] = field(default_factory=Counter)  # files by type
    reason: str = ""  # why the first of them was left out, and what to do
    met: set[Hashable] = field(default_factory=set)  # identities of the files found
    listed: dict[str, fs.FileInfo] = field(default_factory=dict)  # files of a remote folder

    def files(self) -> Iterator[InputFile]:
        """Yield the files. Raises ValueError or OSError for a bad source."""
        if self.source.startswith("file:///"):
            self.source = unquote(self.source.removeprefix("file://"))
        source = self.source
        if not source.strip():
            raise ValueError("expected a SOURCE, found an empty one: give a file, folder or stdlib")
        if source.startswith(("http://", "https://")):
            raise ValueError(
                f"expected a file, folder, glob, s3://, gs:// or hf:// URI, found {source}: "
                f"download it first (curl -LO {shlex.quote(source)})"
            )
        system, path, info = _file_info(source)
        _check_regular(info)
        if info.type == fs.FileType.File:
            yield from self._named(info)
            return
        pattern = ""
        if info.type == fs.FileType.NotFound:
            if not any(mark in path for mark in "*?["):
                raise FileNotFoundError(
                    f"expected input in {source}, found no such file or folder: check the path"
                )
            path, pattern = _split_glob(path)
        yield from self._below(system, path, pattern)

    def nothing_found(self) -> Exception:
        """Return the error to raise if there is no file."""
        if self.reason:
            found = describe_left_out(self.left_out)
            return ValueError(f"expected text in {self.source}, found {found}: {self.reason}")
        types, why = "text files, " + ", ".join(KINDS), ""
        if not self.all_text:
            types = f"{', '.join(FIRST_KINDS)}, for a dataset that myGPT 0.2 started"
            why = f" ('{self.source.rstrip('/')}/**', say, for all text)"
        return FileNotFoundError(
            f"expected input in {self.source}, found no file with text: give a file, folder or "
            f"glob{why} of {types}, or `{STDLIB}`"
        )

    def _named(self, info: fs.FileInfo) -> Iterator[InputFile]:
        """Yield the file that the source names, or the members of that archive."""
        path = path_of(self.source, info.path)
        if not by_name(info.path)[0] and (reason := _not_text(info.path, path)):
            raise ValueError(f"expected text, found {path}, {reason}")
        yield from self._found(info, posixpath.basename(info.path))

    def _below(self, system: fs.FileSystem, folder: str, pattern: str) -> Iterator[InputFile]:
        """Yield the files below a folder, or those of them that match a glob.

        Files whose type only their content tells come last: a link may give them a better name.
        """
        if isinstance(system, fs.LocalFileSystem):
            found = _paths_below(folder)
        else:
            selector = fs.FileSelector(folder, recursive=True, allow_not_found=True)
            infos = system.get_file_info(selector)
            self.listed = {info.path: info for info in infos if info.type == fs.FileType.File}
            found = iter(self.listed)
        inside = {path: posixpath.relpath(path, folder) for path in found}
        paths = [
            path
            for path, name in inside.items()
            if not _is_hidden(name) and (not pattern or _matches(name, pattern))
        ]
        if self.all_text or pattern:
            paths = self._without_dataset_state(paths)
            known = [path for path in paths if by_name(path)[0]]
        else:
            known = [path for path in paths if is_of_first_kinds(path)]
        top = posixpath.basename(folder)
        for path in known:
            yield from self._checked(system, path, f"{top}/{inside[path]}")
        if self.all_text or pattern:
            others = [path for path in paths if not by_name(path)[0]]
            others = [path for path in others if unreadable(path) or self._is_new(system, path)]
            for path in self._texts({path: path_of(self.source, path) for path in others}):
                yield from self._checked(system, path, f"{top}/{inside[path]}")

    def _is_new(self, system: fs.FileSystem, path: str) -> bool:
        """True for a regular file that has not been found under another name."""
        is_file = self._info(system, path).type == fs.FileType.File
        return is_file and (is_remote(self.source) or inode_of(path) not in self.met)

    def _texts(self, paths: dict[str, str]) -> Iterator[str]:
        """Yield those of some names, given with their paths, that hold text; note the others."""
        with ThreadPoolExecutor(INSPECTED_AT_ONCE) as pool:
            for name, reason in zip(paths, pool.map(_not_text, paths, paths.values()), strict=True):
                if not reason:
                    yield name
                    continue
                self.reason = self.reason or f"{name} is {reason}"
                suffix = posixpath.splitext(name.lower())[1] or "without a suffix"
                self.left_out[suffix] += 1

    def _without_dataset_state(self, paths: list[str]) -> list[str]:
        """Leave out what `datasets.save_to_disk` writes beside the data, and cached results."""
        folders = [
            {posixpath.dirname(path) for path in paths if posixpath.basename(path) == name}
            for name in DATASET_STATE
        ]
        datasets = set.intersection(*folders)
        state = {f"{folder}/{name}" for folder in datasets for name in DATASET_STATE}
        state |= {f"{posixpath.dirname(folder)}/{DATASET_DICT}" for folder in datasets}
        kept = []
        for path in paths:
            folder, name = posixpath.split(path)
            if folder in datasets and name.endswith(".arrow") and not name.startswith(DATASET_DATA):
                self.left_out[".arrow (cached by datasets)"] += 1
            elif path not in state:
                kept.append(path)
        return kept

    def _checked(self, system: fs.FileSystem, path: str, name: str) -> Iterator[InputFile]:
        """Yield the file at a path, or its members if it is an archive."""
        info = self._info(system, path)
        _check_regular(info)
        if info.type == fs.FileType.File:
            yield from self._found(info, name)

    def _info(self, system: fs.FileSystem, path: str) -> fs.FileInfo:
        """Return what is at a path; of a remote one the listing has told that already."""
        _check_utf8(path)
        return self.listed.get(path) or system.get_file_info(path)

    def _found(self, info: fs.FileInfo, name: str) -> Iterator[InputFile]:
        """Yield a file that is there, unless it was met before, or the members of an archive."""
        kind, compression, _ = by_name(info.path)
        path, mtime = path_of(self.source, info.path), info.mtime_ns or 0
        file = InputFile(name, path, info.size, mtime, kind or TEXT, compression, self.val)
        if file.identity in self.met:
            return
        self.met.add(file.identity)
        if kind != ZIP:
            yield file
            return
        inside = {key: value for key, value in members(path).items() if not _is_hidden(key)}
        known = [member for member in inside if is_stream_by_name(member)]
        others = {member: inside[member][0] for member in inside.keys() - known}
        for member in [*known, *self._texts(others)]:
            path, size = inside[member]
            kind = by_name(member)[0] or TEXT
            yield InputFile(f"{name}/{member}", path, size, mtime, kind, ZIP, self.val)


def _is_hidden(inside: str) -> bool:
    return any(part.startswith(".") for part in inside.split("/"))


def _not_text(name: str, path: str) -> str:
    """Return why the file of that name and path is no text, and what to do; "" if it is.

    What can't be read is taken for text here, and reported when it is read.
    """
    kind, compression, _ = by_name(name)
    if path.startswith(SCHEME) and (kind or compression):
        return "a file that can't be read inside an archive: unzip it and give the folder"
    try:
        if reason := unreadable(name):
            return reason
        with byte_stream(path, compression) as stream:
            return not_text(name, stream.read(HEAD_BYTES))
    except OSError:
        return ""


def _check_utf8(path: str) -> None:
    """Raise ValueError for a path that is not UTF-8: it could not be stored."""
    if path != path.encode(errors="replace").decode():
        folder, name = posixpath.split(path)
        raise ValueError(
            f"expected file names in UTF-8, found {os.fsencode(name)!r} in {folder}: rename it"
        )


def _check_regular(info: fs.FileInfo) -> None:
    """Raise ValueError for a pipe, which would be waited for, or a device."""
    if info.type == fs.FileType.Unknown:
        raise ValueError(
            f"expected a file or folder, found {info.path}, a pipe, socket or device: write its "
            "content to a file"
        )


def _paths_below(folder: str) -> Iterator[str]:
    """Yield the paths of the files below a local folder.

    Links are followed last, the shallowest first, and only to what was not met before, so a file
    has its real path if that is below the folder, and a loop ends.
    """
    seen: set[tuple[int, int]] = set()
    links = [(0, folder)]
    while links:
        _, link = heappop(links)
        is_folder = os.path.isdir(link)
        found = [] if is_folder else [link]
        for parent, names, files in os.walk(link, onerror=_raise) if is_folder else ():
            names[:] = [name for name in names if not name.startswith(".")]
            if inode_of(parent) in seen:
                names.clear()
                continue
            seen.add(inode_of(parent))
            for path in (f"{parent.rstrip('/')}/{name}" for name in [*names, *files]):
                if os.path.islink(path):
                    heappush(links, (path.count("/"), path))
                elif not os.path.isdir(path):
                    found.append(path)
        yield from sorted(found)


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


def _standard_library(val: bool) -> Iterator[InputFile]:
    """Yield the .py files of the running interpreter's library, without its test suites."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if not STDLIB_LEFT_OUT & set(inside.parts):
            stat, name = path.stat(), f"{STDLIB}/{inside.as_posix()}"
            yield InputFile(name, path.as_posix(), stat.st_size, stat.st_mtime_ns, TEXT, val=val)
