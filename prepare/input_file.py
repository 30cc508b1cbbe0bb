"""Input files: what they are, and their bytes: plain, compressed, or inside a .zip archive.

The path of an archive's member is `zip://MEMBER::ARCHIVE`, as fsspec and Hugging Face's datasets
write it. Files and archives may be local or remote.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote, unquote

from pyarrow import NativeFile, fs

from prepare.file_types import PARQUET, ZIP
from shards.remote import filesystem, is_remote

READ_BYTES = 4 << 20
# Estimated size of compressed text relative to its file.
COMPRESSION_RATIO = 4
SCHEME = "zip://"
ENCRYPTED = 1  # bit of a member's flags
# Methods that zipfile undoes in bounded memory; bzip2 and LZMA it undoes all at once.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# Raised by zipfile for archives that are damaged.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError),
    *(RuntimeError, ValueError, OverflowError),
)


@dataclass(frozen=True)
class InputFile:
    """One file to read."""

    name: str  # relative to its SOURCE, as in the manifest
    path: str
    size: int  # bytes as stored
    mtime: int  # nanoseconds, to notice a change between two runs
    kind: str  # of those in prepare/file_types.py
    compression: str | None = None
    val: bool = False  # from --val-source
    column: str = "text"  # column or field with the text

    @property
    def text_bytes(self) -> int:
        """Estimated bytes of text in the file."""
        packed = self.compression not in (None, ZIP) or self.kind == PARQUET
        return self.size * (COMPRESSION_RATIO if packed else 1)

    @property
    def stored_path(self) -> str:
        """Path or URI of the file itself, or of the archive that holds it."""
        return archive_of(self.path)

    @property
    def remote(self) -> bool:
        """True if the file is read over a network."""
        return is_remote(self.stored_path)

    @property
    def identity(self) -> Hashable:
        """The same for every name of one file, so that a link does not make it two."""
        stored = self.stored_path
        inode = stored if self.remote else inode_of(stored)
        return inode if stored == self.path else (inode, self.path.removesuffix(stored))

    @property
    def real_path(self) -> str:
        """The same for every path to a local file, also after the file is gone."""
        if self.remote:
            return self.path
        stored = self.stored_path
        return self.path.removesuffix(stored) + os.path.realpath(stored)

    def status(self) -> tuple[int, int] | None:
        """Current size and mtime, or None if the file is gone."""
        if self.compression == ZIP:
            return member_status(self.path)
        system, path = filesystem(self.path)
        info = system.get_file_info(path)
        return (info.size, info.mtime_ns or 0) if info.type == fs.FileType.File else None


def inode_of(path: str) -> tuple[int, int]:
    """Return device and inode, the same for every name of a local file or folder."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


@dataclass(frozen=True)
class Slice:
    """Part of a file: row groups of parquet, else bytes of (decompressed) text."""

    file: int  # index into the plan's files
    start: int = 0
    end: int = -1  # -1: to the end of the file
    split: str | None = None  # set if it does not depend on the documents
    continued: bool = False  # continues the document of the slice before
    digest: tuple[int, int] | None = None  # content hash of a document in several slices


def bytes_lost(file: InputFile, position: int = 0) -> int:
    """Estimate the bytes of text from `position` of a broken file on.

    Nothing tells how much a file that ends too early has lost: then take its own size.
    """
    return max(file.text_bytes - position, file.size if file.compression else 0)


# --- bytes


def byte_stream(
    path: str, compression: str | None = None, offset: int = 0
) -> "NativeFile | MemberStream":
    """Open a file's (decompressed) bytes from `offset` on; the caller closes the stream."""
    if path.startswith(SCHEME):
        stream = MemberStream(path)
    else:
        system, path = filesystem(path)
        if compression is None:
            stream = system.open_input_file(path)
            stream.seek(offset)
            return stream
        stream = system.open_input_stream(path, compression=compression)
    while offset:  # a compressed stream can only be read forward
        skipped = len(stream.read(min(offset, READ_BYTES)))
        offset = offset - skipped if skipped else 0
    return stream


def byte_blocks(path: str, compression: str | None = None, offset: int = 0) -> Iterator[bytes]:
    """Yield a file's bytes from `offset` on, up to where it is damaged. Raises OSError there.

    A read that fails returns nothing, so what precedes the damage is read in smaller blocks.
    """
    size = READ_BYTES
    while True:
        try:
            with byte_stream(path, compression, offset) as stream:
                while block := stream.read(size):
                    offset += len(block)
                    yield block
            return
        except OSError:
            if compression is None or size == 1:
                raise
            size = max(size // 64, 1)


# --- members of .zip archives


def archive_of(path: str) -> str:
    """Return the archive that holds a member; any other path as it is."""
    return path.partition("::")[2] if path.startswith(SCHEME) else path


def members(archive: str) -> dict[str, tuple[str, int]]:
    """Return the path and the uncompressed bytes of each file in an archive, by its name there.

    Raises ValueError for an archive that can't be read.
    """
    remedy = f"unzip it and give the folder (unzip {archive})"
    try:
        entries = _opened(archive).infolist()
    except DAMAGE as error:
        raise ValueError(
            f"expected a zip archive in {archive}, found {type(error).__name__} ({error}): "
            "restore it"
        ) from None
    files = [entry for entry in entries if not entry.is_dir()]
    for entry in files:
        if entry.flag_bits & ENCRYPTED:
            raise ValueError(f"expected no password on {archive}, found {entry.filename}: {remedy}")
        if entry.compress_type not in METHODS:
            raise ValueError(
                f"expected deflated files in {archive}, found {entry.filename} compressed by "
                f"method {entry.compress_type}: {remedy}"
            )
    return {
        entry.filename: (f"{SCHEME}{quote(entry.filename)}::{archive}", entry.file_size)
        for entry in files
    }


def member_status(path: str) -> tuple[int, int] | None:
    """Return a member's uncompressed bytes and its archive's mtime; None if either is gone."""
    archive, name = _split(path)
    system, inside = filesystem(archive)
    info = system.get_file_info(inside)
    if info.type != fs.FileType.File:
        return None
    try:
        return _opened(archive).getinfo(name).file_size, info.mtime_ns or 0
    except (KeyError, *DAMAGE):
        return None


class MemberStream(io.RawIOBase):
    """Uncompressed bytes of a member, from its start on; damage is an OSError."""

    def __init__(self, path: str) -> None:
        super().__init__()
        archive, name = _split(path)
        try:
            self._file = _opened(archive).open(name)
        except (KeyError, *DAMAGE) as error:
            raise OSError(f"{type(error).__name__}: {error}") from None

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes, at most as many as the archive declares. Raises OSError."""
        try:
            return self._file.read(size)
        except DAMAGE as error:
            raise OSError(f"{type(error).__name__}: {error}") from None

    def readable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Close the member; its archive stays open for the next one."""
        if not self.closed:
            self._file.close()
        super().close()


def _split(path: str) -> tuple[str, str]:
    """Return the archive and the member's name in it."""
    member, _, archive = path.removeprefix(SCHEME).partition("::")
    return archive, unquote(member)


def _opened(archive: str) -> zipfile.ZipFile:
    """Return an archive, opened once as long as it stays the same. Raises OSError or `DAMAGE`."""
    system, path = filesystem(archive)
    info = system.get_file_info(path)
    return _open(archive, info.size, info.mtime_ns, os.getpid())


@lru_cache(maxsize=8)
def _open(archive: str, size: int, mtime: int, process: int) -> zipfile.ZipFile:
    """Open an archive: per process, since a fork would share its position."""
    system, path = filesystem(archive)
    return zipfile.ZipFile(system.open_input_file(path))
