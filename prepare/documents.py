"""Slices of files → batches of documents, as Arrow text, with what had to be left out.

Nothing is dropped unsaid: a document that can't be read as text becomes a `Bad` with its source,
position and reason, an empty one is counted, and every other is in a batch.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from prepare.sources import InputFile
from prepare.text import (
    PIECE_BYTES,
    byte_blocks,
    damage,
    one_line,
    pieces,
    survey,
    utf8_error,
)
from shards.remote import filesystem
from shards.tokenizer import repair_surrogates

# Text per batch: large enough for the encoder to run at full speed, small enough for memory.
BATCH_BYTES = 4 << 20
MOST_ROWS = 1 << 12
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Slice:
    """A part of a file: row groups of parquet, else bytes of its (decompressed) text; end -1: all.

    `side` is set where the split does not depend on the documents in it. `begins` is False where
    the slice goes on with the document of the slice before. `digest` is the content hash, two
    uint64, of a text that is one document in several slices.
    """

    file: int
    start: int = 0
    end: int = -1
    side: str | None = None
    begins: bool = True
    digest: tuple[int, int] | None = None


@dataclass(frozen=True)
class Bad:
    """A document, or `documents` of them from `position` on, that could not be read as text."""

    source: int
    position: int
    reason: str
    documents: int = 1


@dataclass
class Batch:
    """Documents in order: `texts` without nulls, `rows` their places in `sources`.

    Where `begins` is False, `texts` is one piece that goes on with the document before. `hashes`,
    (n, 2) uint64, is given where a text is not whole.
    """

    texts: pa.Array = field(default_factory=lambda: pa.array([], pa.large_string()))
    sources: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    side: str | None = None
    begins: bool = True
    hashes: np.ndarray | None = None
    bad: list[Bad] = field(default_factory=list)


def read(files: Sequence[InputFile], parts: Iterable[Slice]) -> Iterator[Batch]:
    """The documents of some slices, in order. Neighbouring small text files share a batch."""
    small: list[Slice] = []
    waiting = 0
    for part in parts:
        file = files[part.file]
        if _is_small_text(file, part):
            small.append(part)
            waiting += file.size
            if waiting < BATCH_BYTES:
                continue
        if small:
            yield _read_small_texts(files, small)
        if not _is_small_text(file, part):
            yield from READERS[file.kind](file, part)
        small, waiting = [], 0
    if small:
        yield _read_small_texts(files, small)


def _is_small_text(file: InputFile, part: Slice) -> bool:
    plain = file.kind == "text" and file.compression is None
    return plain and part.side is None and file.size <= PIECE_BYTES


def _read_small_texts(files: Sequence[InputFile], parts: list[Slice]) -> Batch:
    """Plain-text files of moderate size, each a document."""
    contents = []
    for part in parts:
        system, path = filesystem(files[part.file].path)
        with system.open_input_file(path) as stream:
            contents.append(stream.read())
    sources = np.array([part.file for part in parts], np.int32)
    return _batch(pa.array(contents, pa.large_binary()), sources, np.zeros(len(parts), np.int64))


def _read_text(file: InputFile, part: Slice) -> Iterator[Batch]:
    """One large or compressed text file, or a range of one: a single document, in pieces."""
    hashes = None if part.digest is None else np.array([part.digest], np.uint64)
    if part.side is None:
        found = survey(file)
        if found.error:
            yield Batch(bad=[Bad(part.file, 0, found.error)])
            return
        hashes = found.digest
    begins = part.begins
    for offset, piece in pieces(file, part.start, part.end):
        yield Batch(
            texts=pa.array([piece], pa.large_binary()).cast(pa.large_string()),
            sources=np.array([part.file], np.int32),
            rows=np.array([offset], np.int64),
            side=part.side,
            begins=begins,
            hashes=hashes,
        )
        begins = False


@dataclass
class _Lines:
    """Lines of jsonl gathered into a batch."""

    source: int
    column: str
    texts: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    size: int = 0

    def add(self, offset: int, line: bytes) -> None:
        try:
            text = _text_of(line, self.column)
        except ValueError as error:
            self.bad.append(Bad(self.source, offset, one_line(error)))
            return
        self.texts.append(text)
        self.rows.append(offset)
        self.size += len(text)

    def batch(self) -> Batch:
        return Batch(
            texts=pa.array(self.texts, pa.large_string()),
            sources=np.full(len(self.texts), self.source, np.int32),
            rows=np.array(self.rows, np.int64),
            bad=self.bad,
        )


def _read_jsonl(file: InputFile, part: Slice) -> Iterator[Batch]:
    """The lines that begin in a byte range, one JSON object each; blank lines are no documents."""
    gathered = _Lines(part.file, file.column)
    offset = part.start
    try:
        for offset, line in _lines(file, part):
            gathered.add(offset, line)
            if gathered.size >= BATCH_BYTES:
                yield gathered.batch()
                gathered = _Lines(part.file, file.column)
    except OSError as error:
        gathered.bad.append(Bad(part.file, offset, damage(file, error)))
    yield gathered.batch()


def _lines(file: InputFile, part: Slice) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines, blank ones left out, that begin from `start` to before `end`."""
    # A line that begins at `start` is ours; whether one does is seen from the byte before.
    offset = max(part.start - 1, 0)
    rest = b""
    blocks = chain(byte_blocks(file, offset), [b"\n"])
    if part.start:
        for block in blocks:
            offset += len(block)
            _, newline, rest = block.partition(b"\n")
            if newline:
                offset -= len(rest)
                break
    for block in blocks:
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            if 0 <= part.end <= offset:
                return
            if line.strip():
                yield offset, line
            offset += len(line) + 1


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises ValueError, saying why there is none.

    orjson is fast and strict; what it refuses and JSON allows (lone surrogates, say) goes to the
    standard library's parser.
    """
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode())
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found a {type(value).__name__}")
    return value


def _text_of(line: bytes, column: str) -> str:
    """The text in a line of JSON. Raises ValueError, saying why there is none."""
    value = json_object(line)
    text = value.get(column)
    if not isinstance(text, str):
        found = "null" if text is None else f"a {type(text).__name__}"
        found = found if column in value else "no such field"
        raise ValueError(f"expected a string in {column!r}, found {found}")
    return repair_surrogates(text)


def _read_parquet(file: InputFile, part: Slice) -> Iterator[Batch]:
    """The rows of some row groups, straight from Arrow's buffers."""
    system, path = filesystem(file.path)
    try:
        # Of one column nothing is left to read ahead; on a core of one's own, threads only cost.
        table = pq.ParquetFile(system.open_input_file(path), pre_buffer=False)
    except (OSError, pa.ArrowInvalid) as error:
        yield Batch(bad=[Bad(part.file, 0, damage(file, error))])
        return
    with table:
        rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        first = sum(rows[: part.start])
        for group in range(part.start, len(rows) if part.end < 0 else part.end):
            yield from _read_row_group(table, file, part.file, group, first)
            first += rows[group]


def _read_row_group(
    table: pq.ParquetFile, file: InputFile, source: int, group: int, first: int
) -> Iterator[Batch]:
    """The rows of one row group, the first of which is row `first` of the file."""
    metadata = table.metadata.row_group(group)
    size = column_bytes(metadata, file.column)
    # A repeated text is stored once: of its rows the size says nothing.
    at_once = min(max(1, BATCH_BYTES * metadata.num_rows // max(1, size)), MOST_ROWS)
    row = first
    try:
        for batch in table.iter_batches(
            at_once, row_groups=[group], columns=[file.column], use_threads=False
        ):
            for values in _cut(batch.column(0)):
                yield _parquet_batch(values, source, row)
                row += len(values)
    except (OSError, pa.ArrowInvalid) as error:
        lost = first + metadata.num_rows - row
        yield Batch(bad=[Bad(source, row, damage(file, error), lost)])


def _cut(values: pa.Array) -> Iterator[pa.Array]:
    """A text column in stretches of not much more than `BATCH_BYTES`, were it by far larger."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    rows = -(-len(values) // (values.nbytes // (2 * BATCH_BYTES) + 1))
    for start in range(0, len(values), max(rows, 1)):
        yield values.slice(start, rows)


def column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Bytes of a column in a row group before compression. The metadata lists leaves."""
    leaves = (group.column(number) for number in range(group.num_columns))
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == column)


def _parquet_batch(values: pa.Array, source: int, first: int) -> Batch:
    """A stretch of a text column: nulls are bad."""
    rows = np.arange(first, first + len(values))
    bad = []
    if values.null_count:
        present = values.is_valid().to_numpy(zero_copy_only=False)
        bad = [Bad(source, int(row), "expected a string, found null") for row in rows[~present]]
        values, rows = values.drop_null(), rows[present]
    batch = _batch(values, np.full(len(values), source, np.int32), rows)
    batch.bad += bad
    return batch


def _batch(values: pa.Array, sources: np.ndarray, rows: np.ndarray) -> Batch:
    """A batch of what is UTF-8 among `values`, strings or bytes without nulls."""
    bad = []
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        values = values.cast(pa.large_binary())
    try:
        # Parquet's reader does not look inside strings; a cast from bytes does.
        values.validate(full=True)
        texts = values if _is_text(values.type) else values.cast(pa.large_string())
    except pa.ArrowInvalid:
        reasons = [utf8_error(value) for value in values.cast(pa.large_binary()).to_pylist()]
        good = np.array([reason is None for reason in reasons])
        for index in np.flatnonzero(~good):
            bad.append(Bad(int(sources[index]), int(rows[index]), str(reasons[index])))
        texts = values.filter(pa.array(good)).cast(pa.large_binary()).cast(pa.large_string())
        sources, rows = sources[good], rows[good]
    return Batch(texts, sources, rows, bad=bad)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


READERS: dict[str, Callable[[InputFile, Slice], Iterator[Batch]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
