"""Rows of .csv and .tsv files as RFC 4180 has them; the first row names the columns.

csv.reader gets the bytes as Latin-1, in which each character is a byte: a field's bytes come back
exactly, and what is not UTF-8 is found per text, as in other formats.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa

from prepare.batch import BATCH_BYTES, MAX_BATCH_ROWS, Batch, text_batch
from prepare.columns import BYTE_ORDER_MARK, Columns, text_head
from prepare.input_file import READ_BYTES, InputFile, Slice, byte_blocks, bytes_lost
from prepare.quarantine import BROKEN, MAX_DOCUMENT_BYTES, BadDocuments, too_large
from prepare.text import damage, one_line

BYTES = "latin-1"
# Content of a field, doubled quotes included, between what tells where fields and rows end.
CONTENT = re.compile(rb'[^",\t\r\n]+(?:""[^",\t\r\n]*)*')
LINE_END = re.compile(rb"\r\n?|\n")
Row = tuple[int, int, list[str] | str]


def columns(file: InputFile) -> Columns | None:
    """Return the columns that the first row names; None if there is no row to be read."""
    try:
        text_head(file)
        _, _, header = next(_rows(file))
    except (OSError, StopIteration):
        return None
    return None if isinstance(header, str) else Columns(_names(header))


def _names(header: list[str]) -> list[str]:
    return [name.encode(BYTES).decode(errors="replace") for name in header]


def read(file: InputFile, part: Slice) -> Iterator[Batch]:
    """Read the texts of all rows; `rows` of a batch are the offsets where they begin, in bytes."""
    column, width = -1, 0
    texts: list[bytes] = []
    offsets: list[int] = []
    bad: list[BadDocuments] = []
    size = 0
    for offset, length, row in _rows(file):
        if isinstance(row, list) and column < 0:
            width, names = len(row), _names(row)
            column = names.index(file.column) if file.column in names else 0
            continue
        if isinstance(row, list) and len(row) != width:
            row = f"expected {width} fields as in the first row, found {len(row)}"
        if isinstance(row, str):
            bad.append(BadDocuments(part.file, offset, row, bytes=length))
        else:
            texts.append(row[column].encode(BYTES))
            offsets.append(offset)
            size += len(texts[-1])
        if size >= BATCH_BYTES or len(texts) + len(bad) >= MAX_BATCH_ROWS:
            yield _batch(part.file, texts, offsets, bad)
            texts, offsets, bad, size = [], [], [], 0
    yield _batch(part.file, texts, offsets, bad)


def _batch(source: int, texts: list[bytes], rows: list[int], bad: list[BadDocuments]) -> Batch:
    sources = np.full(len(texts), source, np.int32)
    batch = text_batch(pa.array(texts, pa.large_binary()), sources, np.array(rows, np.int64))
    batch.bad = sorted(batch.bad + bad, key=lambda one: one.position)
    return batch


def _rows(file: InputFile) -> Iterator[Row]:
    """Yield (offset, bytes, fields) of the rows that are not blank; of a bad one the reason."""
    csv.field_size_limit(MAX_DOCUMENT_BYTES + MAX_DOCUMENT_BYTES // 4)
    lines = _Lines(byte_blocks(file.path, file.compression))
    delimiter = "\t" if ".tsv" in file.name.lower()[-8:] else ","
    open_reader = partial(csv.reader, lines, delimiter=delimiter, strict=True)
    reader = open_reader()
    while True:
        row: list[str] | str
        begin = lines.begin = lines.offset
        try:
            row = next(reader)
        except StopIteration:
            return
        except OSError as error:
            yield begin, bytes_lost(file, begin), damage(file.path, error)
            return
        except csv.Error as error:
            row = one_line(error)
            if lines.ended or "limit" in row:
                yield begin, bytes_lost(file, begin), f"{BROKEN}: {row}"
                return
        length = lines.offset - begin
        if length > MAX_DOCUMENT_BYTES:
            row = too_large(f"a row of {length:,} bytes")
        if length > READ_BYTES:
            reader = open_reader()  # the old one keeps four times the largest field that it met
        if row:
            yield begin, length, row


class _Lines(Iterator[str]):
    """Lines of a file as Latin-1, with how far they were read.

    Inside of a quoted field lines have no meaning: all up to the line of the next quote is handed
    on at once. Of a row above `MAX_DOCUMENT_BYTES` only the structure is handed on from there:
    where it ends is found, and its content not held.
    """

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.offset = self.begin = 0  # bytes handed on, and where the row begins
        self.ended = False
        self._lines = self._split(blocks)

    def __next__(self) -> str:
        try:
            size, line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        if not self.offset:
            line = line.removeprefix(BYTE_ORDER_MARK)
        self.offset += size
        if self.offset - self.begin > MAX_DOCUMENT_BYTES:
            line = CONTENT.sub(b"x", line)
        return line.decode(BYTES)

    def _split(self, blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
        """Yield (size, line); of a line that is too long the content is dropped on the way."""
        held: list[bytes] = []
        size = kept = 0
        is_inside = False  # a row that goes on after the end of a line is inside of a quoted field
        for block in blocks:
            at = 0
            while at < len(block):
                quote = block.find(b'"', at) if is_inside else at
                end = LINE_END.search(block, quote) if quote >= 0 else None
                stop = end.end() if end else len(block)
                part, at = block[at:stop], stop
                size += len(part)
                held.append(part if size <= MAX_DOCUMENT_BYTES else CONTENT.sub(b"x", part))
                kept += len(held[-1])
                if kept > 2 * MAX_DOCUMENT_BYTES:
                    raise csv.Error(f"a line beyond the limit of {MAX_DOCUMENT_BYTES:,} bytes")
                if end or quote < 0:
                    yield size, b"".join(held)
                    held, size, kept = [], 0, 0
                is_inside = not held and self.offset > self.begin
        if held:
            yield size, b"".join(held)
