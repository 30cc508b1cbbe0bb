"""A batch of documents, and the making of one from a column of text: Arrow arrays all the way."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prepare.quarantine import MAX_DOCUMENT_BYTES, BadDocuments, too_large

# Text per batch: large enough for the encoder to run at full speed, small enough for memory.
BATCH_BYTES = 4 << 20
BATCH_ROWS = 1 << 12
# Rows of a batch, however short: blank or bad ones have no text.
MAX_BATCH_ROWS = 1 << 16
# Text that one batch may decode to where the file stores a repeated text once.
MAX_BATCH_BYTES = 64 << 20


@dataclass
class Batch:
    """n documents in order: `texts` without nulls, each at `rows[i]` of file `sources[i]`."""

    texts: pa.Array = field(default_factory=lambda: pa.array([], pa.large_string()))
    sources: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    split: str | None = None
    continued: bool = False  # `texts` is one piece, which continues the document before
    # (n, 2) uint64, content hashes: given where a text is only a piece of its document, else None
    # until they are computed.
    hashes: np.ndarray | None = None
    bad: list[BadDocuments] = field(default_factory=list)


def as_text(content: bytes) -> pa.LargeStringArray:
    """View UTF-8 bytes as an Arrow array of one text. Raises pa.ArrowInvalid for other bytes."""
    offsets = np.array([0, len(content)], np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    text = pa.Array.from_buffers(pa.large_string(), 1, buffers)
    text.validate(full=True)
    return text


def longest(texts: pa.Array) -> int:
    """Return the bytes of the longest text, at least 1."""
    return max(1, pc.max(pc.binary_length(texts)).as_py() or 0)


def cut_column(values: pa.Array) -> Iterator[pa.Array]:
    """Cut a text column that is far larger than `BATCH_BYTES` into parts of about that size.

    What a dictionary decodes to is at most `MAX_BATCH_BYTES` at a time.
    """
    if pa.types.is_dictionary(values.type):
        rows = max(1, min(BATCH_ROWS, MAX_BATCH_BYTES // longest(values.dictionary)))
        for start in range(0, len(values), rows):
            yield from cut_column(pc.take(values.dictionary, values.indices.slice(start, rows)))
        return
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        values = values.cast(pa.large_binary())  # views can't be filtered
    rows = -(-len(values) // (values.nbytes // (2 * BATCH_BYTES) + 1))
    for start in range(0, len(values), max(rows, 1)):
        yield values.slice(start, rows)


def column_batch(values: pa.Array, source: int, first: int) -> Batch:
    """Make a batch of part of a text column; nulls are bad."""
    rows = np.arange(first, first + len(values))
    bad = []
    if values.null_count:
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        reason = "expected a string, found null"
        bad = [BadDocuments(source, int(row), reason) for row in rows[~valid]]
        values, rows = values.drop_null(), rows[valid]
    if values.nbytes > MAX_DOCUMENT_BYTES:
        sizes = pc.binary_length(values).to_numpy(zero_copy_only=False)
        for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):
            if size > MAX_DOCUMENT_BYTES:
                bad.append(BadDocuments(source, row, too_large(f"{size:,} bytes"), bytes=size))
        good = sizes <= MAX_DOCUMENT_BYTES
        values, rows = values.filter(pa.array(good)), rows[good]
    batch = text_batch(values, np.full(len(values), source, np.int32), rows)
    batch.bad += bad
    return batch


def text_batch(values: pa.Array, sources: np.ndarray, rows: np.ndarray) -> Batch:
    """Make a batch of what is UTF-8 among `values`, strings or bytes without nulls."""
    bad = []
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    try:
        # The parquet reader does not check that strings are UTF-8; a cast from bytes does.
        values.validate(full=True)
        texts = values if is_text else values.cast(pa.large_string())
    except pa.ArrowInvalid:
        contents = values.cast(pa.large_binary()).to_pylist()
        reasons = [utf8_error(content) for content in contents]
        good = np.array([reason is None for reason in reasons])
        for i in np.flatnonzero(~good).tolist():
            where = int(sources[i]), int(rows[i])
            bad.append(BadDocuments(*where, str(reasons[i]), bytes=len(contents[i])))
        texts = values.filter(pa.array(good)).cast(pa.large_binary()).cast(pa.large_string())
        sources, rows = sources[good], rows[good]
    return Batch(texts, sources, rows, bad=bad)


def utf8_error(content: bytes) -> str | None:
    """The reason why `content` is not UTF-8, or None."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"invalid UTF-8 at byte {error.start}: {error.reason}"
    return None
