"""Slices of files read as batches of documents, with what could not be read.

Nothing is dropped silently: a document that is not readable text becomes a `BadDocuments` entry
with its source, position and reason; every other document is in a batch, empty ones included.
A byte order mark is no part of a JSON object, so it is dropped; in a .txt file it is text.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prepare.batch import (
    BATCH_BYTES,
    BATCH_ROWS,
    MAX_BATCH_BYTES,
    MAX_BATCH_ROWS,
    Batch,
    as_text,
    column_batch,
    cut_column,
    longest,
    text_batch,
)
from prepare.columns import column_at, column_bytes, json_object
from prepare.file_types import (
    HEAD_BYTES,
    JSONL,
    PARQUET,
    TEXT,
    ZIP,
    encoding_remedy,
    format_module,
)
from prepare.input_file import InputFile, Slice, byte_blocks, byte_stream, bytes_lost
from prepare.quarantine import MAX_DOCUMENT_BYTES, BadDocuments, too_large
from prepare.text import PIECE_BYTES, damage, one_line, pieces, survey

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read(files: Sequence[InputFile], parts: Iterable[Slice]) -> Iterator[Batch]:
    """Yield the documents of some slices, in order. Neighboring small text files share a batch."""
    small: list[Slice] = []
    size = 0
    for part in parts:
        file = files[part.file]
        if _is_small_text(file, part):
            small.append(part)
            size += file.size
            if size < BATCH_BYTES:
                continue
        if small:
            yield _read_small_texts(files, small)
        if not _is_small_text(file, part):
            yield from reader(file.kind)(file, part)
        small, size = [], 0
    if small:
        yield _read_small_texts(files, small)


def _is_small_text(file: InputFile, part: Slice) -> bool:
    known_size = file.kind == TEXT and file.compression in (None, ZIP)
    return known_size and part.split is None and file.size <= PIECE_BYTES


def _read_small_texts(files: Sequence[InputFile], parts: list[Slice]) -> Batch:
    """Read plain-text files of moderate size, each a document."""
    contents, sources, bad = [], [], []
    for part in parts:
        file = files[part.file]
        try:
            with byte_stream(file.path) as stream:
                contents.append(stream.read())
            sources.append(part.file)
        except OSError as error:
            if file.compression is None:
                raise
            bad.append(BadDocuments(part.file, 0, damage(file.path, error), bytes=file.size))
    rows = np.zeros(len(sources), np.int64)
    batch = text_batch(pa.array(contents, pa.large_binary()), np.array(sources, np.int32), rows)
    for one in batch.bad:
        head = contents[sources.index(one.source)][:HEAD_BYTES]
        remedy = encoding_remedy(files[one.source].path, head)
        bad.append(replace(one, reason=f"{one.reason}: {remedy}"))
    batch.bad = bad
    return batch


def _read_text(file: InputFile, part: Slice) -> Iterator[Batch]:
    """Read a large or compressed text file, or a range of one: a single document, in pieces."""
    hashes = None if part.digest is None else np.array([part.digest], np.uint64)
    if part.split is None:
        result = survey(file.path, file.compression)
        if result.error:
            lost = bytes_lost(file)
            yield Batch(bad=[BadDocuments(part.file, 0, result.error, bytes=lost)])
            return
        hashes = result.digest
    continued = part.continued
    for offset, piece in pieces(file.path, file.compression, part.start, part.end):
        yield Batch(
            texts=as_text(piece),
            sources=np.array([part.file], np.int32),
            rows=np.array([offset], np.int64),
            split=part.split,
            continued=continued,
            hashes=hashes,
        )
        continued = True


def _read_jsonl(file: InputFile, part: Slice) -> Iterator[Batch]:
    """Read the lines that begin in a byte range, one JSON object each; blank lines don't count."""
    texts: list[str] = []
    rows: list[int] = []
    bad: list[BadDocuments] = []
    size, offset = 0, part.start
    try:
        for offset, length, line in _lines(file, part):
            try:
                if length > MAX_DOCUMENT_BYTES:
                    raise ValueError(too_large(f"a line of {length:,} bytes"))
                texts.append(_text_of(line, file.column))
                rows.append(offset)
                size += len(texts[-1])
            except ValueError as error:
                bad.append(BadDocuments(part.file, offset, one_line(error), bytes=length))
            if size >= BATCH_BYTES or len(rows) + len(bad) >= MAX_BATCH_ROWS:
                yield _jsonl_batch(part.file, texts, rows, bad)
                texts, rows, bad, size = [], [], [], 0
    except OSError as error:
        reason = damage(file.path, error)
        bad.append(BadDocuments(part.file, offset, reason, bytes=bytes_lost(file, offset)))
    yield _jsonl_batch(part.file, texts, rows, bad)


def _jsonl_batch(source: int, texts: list[str], rows: list[int], bad: list[BadDocuments]) -> Batch:
    try:
        values = pa.array(texts, pa.large_string())
    except UnicodeEncodeError:  # JSON can spell lone surrogates; tiktoken takes them as U+FFFD
        repaired = [LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        values = pa.array(repaired, pa.large_string())
    sources = np.full(len(texts), source, np.int32)
    return Batch(values, sources, np.array(rows, np.int64), bad=bad)


def _lines(file: InputFile, part: Slice) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, size, line) of the non-blank lines that begin in [part.start, part.end).

    Of a line above `MAX_DOCUMENT_BYTES` the content is dropped while it is read.
    """
    # A line that begins at `start` is ours; the byte before tells if one does.
    offset = max(part.start - 1, 0)
    rest = b""
    blocks = chain(byte_blocks(file.path, file.compression, offset), [b"\n"])
    if part.start:
        for block in blocks:
            offset += len(block)
            _, newline, rest = block.partition(b"\n")
            if newline:
                offset -= len(rest)
                break
            if 0 <= part.end <= offset:  # the line goes on, beyond the slice
                return
    held: list[bytes] = []
    size = 0
    for block in chain([rest], blocks):
        first, newline, rest = block.partition(b"\n")
        size += len(first)
        held = [*held, first] if size <= MAX_DOCUMENT_BYTES else []
        if not newline:
            continue
        *lines, rest = rest.split(b"\n")
        for line in [b"".join(held), *lines]:
            if 0 <= part.end <= offset:
                return
            size = max(size, len(line))  # it counts what was dropped
            if line.strip() or size > MAX_DOCUMENT_BYTES:
                yield offset, size, line
            offset += size + 1
            size = 0
        held, size = [rest], len(rest)


def _text_of(line: bytes, column: str) -> str:
    """Return the text in a line of JSON. Raises ValueError with the reason if there is none."""
    value = json_object(line)
    text = value.get(column)
    return text if isinstance(text, str) else _text_at(value, column)


def _text_at(value: dict[str, Any], column: str) -> str:
    """Return the text at a path of fields, `meta.text`. Raises ValueError if there is none."""
    leaf: Any = value
    for name in (column,) if column in value else column.split("."):
        if not isinstance(leaf, dict) or name not in leaf:
            actual = "a list on the way" if isinstance(leaf, list) else "no such field"
            raise ValueError(f"expected a string in {column!r}, found {actual}")
        leaf = leaf[name]
    if not isinstance(leaf, str):
        actual = "null" if leaf is None else f"a {type(leaf).__name__}"
        raise ValueError(f"expected a string in {column!r}, found {actual}")
    return leaf


def _read_parquet(file: InputFile, part: Slice) -> Iterator[Batch]:
    """Read the rows of some row groups, straight from Arrow's buffers."""
    try:
        # With one column there is nothing to pre-buffer.
        plain = pq.ParquetFile(byte_stream(file.path), pre_buffer=False)
        by_dictionary = pq.ParquetFile(
            byte_stream(file.path),
            metadata=plain.metadata,
            pre_buffer=False,
            read_dictionary=[file.column],
        )
    except (OSError, pa.ArrowException) as error:
        reason = damage(file.path, error)
        yield Batch(bad=[BadDocuments(part.file, 0, reason, bytes=bytes_lost(file))])
        return
    with plain, by_dictionary:
        rows = [plain.metadata.row_group(i).num_rows for i in range(plain.num_row_groups)]
        row = sum(rows[: part.start])
        for group in range(part.start, len(rows) if part.end < 0 else part.end):
            first, end = row, row + rows[group]
            try:
                for values in _read_row_group(plain, by_dictionary, group, file.column):
                    yield column_batch(values, part.file, row)
                    row += len(values)
            except (OSError, pa.ArrowException) as error:
                size = column_bytes(plain.metadata.row_group(group), file.column)
                lost = size * (end - row) // max(1, end - first)
                reason = damage(file.path, error)
                yield Batch(bad=[BadDocuments(part.file, row, reason, end - row, lost)])
            row = end


def _read_row_group(
    plain: pq.ParquetFile, by_dictionary: pq.ParquetFile, group: int, column: str
) -> Iterator[pa.Array]:
    """Yield the text column of a row group in parts of moderate size.

    A text that occurs in several rows is stored once, in a dictionary, so the stored size does not
    bound the text. A small group is read as a dictionary, which is cut before it is decoded.
    Of a large one, where that is slow, the longest text of the dictionary gives a bound.
    """
    metadata = plain.metadata.row_group(group)
    size = column_bytes(metadata, column)

    def batches(table: pq.ParquetFile, rows: int) -> Iterator[pa.Array]:
        # Each worker has one core: Arrow's threads would only cost.
        for batch in table.iter_batches(max(1, rows), [group], [column], use_threads=False):
            yield column_at(batch, column)

    if size <= 2 * BATCH_BYTES:
        parts = batches(by_dictionary, MAX_BATCH_ROWS)
    else:
        rows = min(BATCH_BYTES * metadata.num_rows // size, BATCH_ROWS)
        for first in batches(by_dictionary, 1):
            if pa.types.is_dictionary(first.type):
                rows = min(rows, MAX_BATCH_BYTES // longest(first.dictionary))
            break
        parts = batches(plain, rows)
    for values in parts:
        yield from cut_column(values)


def reader(kind: str) -> Callable[[InputFile, Slice], Iterator[Batch]]:
    """Return the function that reads a slice of a file of that kind."""
    return READERS[kind] if kind in READERS else format_module(kind).read


READERS: dict[str, Callable[[InputFile, Slice], Iterator[Batch]]] = {
    TEXT: _read_text,
    JSONL: _read_jsonl,
    PARQUET: _read_parquet,
}
