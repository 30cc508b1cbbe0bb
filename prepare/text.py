"""Plain text of any size as bytes: surveys, pieces, and positions where it may be cut."""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

from prepare.batch import as_text
from prepare.file_types import HEAD_BYTES, encoding_remedy
from prepare.input_file import READ_BYTES, archive_of, byte_blocks, byte_stream
from prepare.quarantine import BROKEN, MAX_DOCUMENT_BYTES, too_large
from shards.encoder import SAFE_CUT_BYTES

# A text document above this size is handed on in pieces of about this size.
PIECE_BYTES = 32 << 20
CONTINUING = bytes(range(0x80, 0xC0))  # bytes of a character after its first one
NON_ASCII = bytes(range(0x80, 0x100))
LOOKBEHIND = 3  # bytes before a cut that the pattern looks at


def digest_array(digests: bytes) -> np.ndarray:
    """128-bit digests of 16 bytes each, one after the other, as (n, 2) uint64."""
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class Survey:
    """Result of reading a text file once: the content's hash, (1, 2) uint64, its size in bytes, and
    the reason why it is not UTF-8 text, or None."""

    digest: np.ndarray
    size: int
    error: str | None


def survey(path: str, compression: str | None) -> Survey:
    """Read a text file once, in bounded memory. Raises OSError for a file that can't be read."""
    hasher, size, stretch = xxhash.xxh3_128(), 0, 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    error = None
    try:
        with byte_stream(path, compression) as stream:
            while block := stream.read(READ_BYTES):
                hasher.update(block)
                size += len(block)
                _check_utf8(decoder, block)
                first = SAFE_CUT_BYTES.search(block)
                stretch += first.start() if first else len(block)
                if stretch > MAX_DOCUMENT_BYTES:
                    error = too_large(f"a stretch without white space up to byte {size}")
                    break
                stretch = len(block) - last_cut(block) if first else stretch
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as failure:
        error = f"invalid UTF-8 shortly before byte {size}: {failure.reason}: "
        error += encoding_remedy(path, failure.object[:HEAD_BYTES])
    except OSError as failure:
        error = damage(path, failure)
    return Survey(digest_array(hasher.digest()), size, error)


def _check_utf8(decoder: codecs.IncrementalDecoder, block: bytes) -> None:
    """Decode a block, all but its ends by Arrow, which is far faster. Raises UnicodeDecodeError."""
    start = len(block) - len(block.lstrip(CONTINUING))
    end = max(start, len(block.rstrip(NON_ASCII)))
    decoder.decode(block[:start])
    inside, (unfinished, _) = block[start:end], decoder.getstate()
    if unfinished or not _is_utf8(inside):
        decoder.decode(inside)  # tells what is wrong where
    decoder.decode(block[end:])


def _is_utf8(content: bytes) -> bool:
    try:
        as_text(content)
    except pa.ArrowInvalid:
        return False
    return True


def damage(path: str, error: Exception) -> str:
    """Return the reason to record for a damaged file; raise OSError if its raw bytes can't be read.

    A broken disk or connection is no property of the data: it must fail or retry the unit.
    """
    try:
        for _ in byte_blocks(archive_of(path)):
            pass
    except OSError as failure:
        raise failure from error
    return f"{BROKEN}: {one_line(error)}"


def one_line(error: Exception) -> str:
    """An error's message with its white space collapsed."""
    return " ".join(str(error).split())


def pieces(
    path: str, compression: str | None, start: int = 0, end: int = -1
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of a range of a text file, cut where no token runs across."""
    rest = b""
    offset = start
    with byte_stream(path, compression, start) as stream:
        while True:
            size = READ_BYTES if end < 0 else min(READ_BYTES, end - offset - len(rest))
            block = stream.read(size) if size else b""
            if not block:
                break
            rest += block
            if len(rest) >= PIECE_BYTES and (cut := last_cut(rest)):
                yield offset, rest[:cut]
                offset, rest = offset + cut, rest[cut:]
    if rest or offset == start:
        yield offset, rest


def last_cut(content: bytes) -> int:
    """The last safe cut in the final stretch of `content`, or 0."""
    for stretch in (1 << 12, 1 << 16, READ_BYTES):
        first = max(1, len(content) - stretch)
        cut = max((match.start() for match in SAFE_CUT_BYTES.finditer(content, first)), default=0)
        if cut:
            return cut
    return 0


def next_cut(path: str, offset: int) -> int:
    """The first safe cut of an uncompressed text from `offset` on, or its end."""
    content, begin = b"", max(offset - LOOKBEHIND, 0)
    for block in byte_blocks(path, offset=begin):
        seen = content[-LOOKBEHIND:]
        begin += len(content) - len(seen)
        content = seen + block
        if match := SAFE_CUT_BYTES.search(content, max(offset - begin, len(seen))):
            return begin + match.start()
    return begin + len(content)


def next_line(path: str, compression: str | None, offset: int) -> int:
    """The start of the first line that begins after `offset`, or the text's end."""
    for block in byte_blocks(path, compression, offset):
        if (newline := block.find(b"\n")) >= 0:
            return offset + newline + 1
        offset += len(block)
    return offset
