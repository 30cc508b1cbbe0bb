"""Members of .zip archives, local or remote, as files of their own.

The path of a member is `zip://MEMBER::ARCHIVE`, as fsspec and Hugging Face's datasets write it.
"""

import io
import os
import struct
import zipfile
import zlib
from functools import lru_cache
from urllib.parse import quote, unquote

from pyarrow import fs

from shards.remote import filesystem

SCHEME = "zip://"
ENCRYPTED = 1  # bit of a member's flags
# Methods that zipfile undoes in bounded memory; bzip2 and LZMA it undoes all at once.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# Raised by zipfile for archives that are damaged.
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError),
    *(RuntimeError, ValueError, OverflowError),
)


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


def open_member(path: str) -> "MemberStream":
    """Open a member's uncompressed bytes; the caller closes the stream. Raises OSError."""
    archive, name = _split(path)
    return MemberStream(archive, name)


class MemberStream(io.RawIOBase):
    """Uncompressed bytes of a member, from its start on; damage is an OSError."""

    def __init__(self, archive: str, name: str) -> None:
        super().__init__()
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
