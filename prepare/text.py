"""Plain text of any size as bytes: streams, what is in them, and where they may be cut."""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from pyarrow import NativeFile

from prepare.sources import InputFile
from prepare.split import digest_array
from shards.remote import filesystem

READ_BYTES = 4 << 20
# A text document above this size is handed on in pieces of about this size.
PIECE_BYTES = 32 << 20
# The rule of shards.tokenizer.SAFE_CUT, on bytes: the tokens of the pieces are those of the whole.
# Before a cut stands a printing ASCII character, or the end of another that is no white space.
SAFE_CUT = re.compile(
    rb"(?<=[!-~\x80-\xbf])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe1\xa0\x8e)"
    rb"(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)(?<!\xe3\x80\x80)(?=[ \t\n\r\f\v])"
)
SEEN_BEFORE = 3  # bytes before a cut that the rule looks at


@dataclass(frozen=True)
class Survey:
    """What one pass over a text file found: the content's hash, (1, 2) uint64, its size in bytes,
    and why it is not UTF-8 text (None where it is)."""

    digest: np.ndarray
    size: int
    error: str | None


def byte_stream(file: InputFile, offset: int = 0, raw: bool = False) -> NativeFile:
    """The file's bytes from `offset` on, decompressed unless `raw`. To be closed by the caller."""
    system, path = filesystem(file.path)
    if raw or file.compression is None:
        stream = system.open_input_file(path)
        stream.seek(offset)
        return stream
    stream = system.open_input_stream(path, compression=file.compression)
    while offset:  # a compressed stream can only be read forward
        skipped = len(stream.read(min(offset, READ_BYTES)))
        offset = offset - skipped if skipped else 0
    return stream


def byte_blocks(file: InputFile, offset: int = 0) -> Iterator[bytes]:
    """The file's bytes from `offset` on, up to where it is damaged. Raises OSError there.

    A read that fails gives nothing, so what stands before the damage is read by smaller ones.
    """
    size = READ_BYTES
    while True:
        try:
            with byte_stream(file, offset) as stream:
                while block := stream.read(size):
                    offset += len(block)
                    yield block
            return
        except OSError:
            if file.compression is None or size == 1:
                raise
            size = max(size // 64, 1)


def survey(file: InputFile) -> Survey:
    """Read a text file once, in bounded memory. Raises OSError for a file that can't be read."""
    hasher, size = xxhash.xxh3_128(), 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    error = None
    try:
        with byte_stream(file) as stream:
            while block := stream.read(READ_BYTES):
                hasher.update(block)
                size += len(block)
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as failure:
        error = f"invalid UTF-8 shortly before byte {size}: {failure.reason}"
    except OSError as failure:
        error = damage(file, failure)
    return Survey(digest_array(hasher.digest()), size, error)


def damage(file: InputFile, error: Exception) -> str:
    """The reason to give for a damaged file; raises where it can't even be read as bytes.

    A broken disk or connection is no property of the data: it must end or retry the unit.
    """
    try:
        with byte_stream(file, raw=True) as stream:
            while stream.read(READ_BYTES):
                pass
    except OSError as failure:
        raise failure from error
    return f"unreadable from here on: {one_line(error)}"


def one_line(error: Exception) -> str:
    """An error's message, its white space folded."""
    return " ".join(str(error).split())


def utf8_error(content: bytes) -> str | None:
    """Why some bytes are not UTF-8, or None."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}: {error.reason}"
    return None


def pieces(file: InputFile, start: int = 0, end: int = -1) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a range of a text file, cut where no token runs across."""
    rest = b""
    offset = start
    with byte_stream(file, start) as stream:
        while True:
            wanted = READ_BYTES if end < 0 else min(READ_BYTES, end - offset - len(rest))
            block = stream.read(wanted) if wanted else b""
            if not block:
                break
            rest += block
            if len(rest) >= PIECE_BYTES and (cut := last_cut(rest)):
                yield offset, rest[:cut]
                offset, rest = offset + cut, rest[cut:]
    if rest or offset == start:
        yield offset, rest


def last_cut(content: bytes) -> int:
    """The last place in the final stretch of `content` where it may be cut, or 0."""
    for stretch in (1 << 12, 1 << 16, READ_BYTES):
        first = max(1, len(content) - stretch)
        cut = max((found.start() for found in SAFE_CUT.finditer(content, first)), default=0)
        if cut:
            return cut
    return 0


def next_cut(file: InputFile, offset: int) -> int:
    """The first place from `offset` on where a plain text may be cut, or its end."""
    content, begin = b"", max(offset - SEEN_BEFORE, 0)
    with byte_stream(file, begin) as stream:
        while block := stream.read(READ_BYTES):
            seen = content[-SEEN_BEFORE:]
            begin += len(content) - len(seen)
            content = seen + block
            if found := SAFE_CUT.search(content, max(offset - begin, len(seen))):
                return begin + found.start()
    return begin + len(content)


def next_line(file: InputFile, offset: int) -> int:
    """Where the first line that begins after `offset` begins; the text's end where none does."""
    with byte_stream(file, offset) as stream:
        while block := stream.read(READ_BYTES):
            if (newline := block.find(b"\n")) >= 0:
                return offset + newline + 1
            offset += len(block)
    return offset
