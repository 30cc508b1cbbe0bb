"""Rows of .arrow files: Arrow's IPC format, as a stream or as a file, which holds a stream.

Memory is bounded by the largest record batch, as it is by the largest row group of parquet.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from prepare.batch import BATCH_ROWS, Batch, column_batch, cut_column
from prepare.columns import Columns, column_at, schema_columns
from prepare.input_file import InputFile, Slice, byte_stream, bytes_lost
from prepare.quarantine import BadDocuments
from prepare.text import damage

MAGIC = b"ARROW1\0\0"  # begins the file format; the stream follows
AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def columns(file: InputFile) -> Columns | None:
    """Return the columns of a file; None if it is unreadable."""
    try:
        with _open(file) as reader:
            return schema_columns(reader.schema)
    except (OSError, pa.ArrowException):
        return None


def read(file: InputFile, part: Slice) -> Iterator[Batch]:
    """Read the rows of a file; `rows` of a batch count from its start."""
    row = 0
    try:
        with _open(file) as reader:
            for batch in reader:
                for values in _texts(batch, file.column):
                    yield column_batch(values, part.file, row)
                    row += len(values)
    except (OSError, pa.ArrowException) as error:
        reason = damage(file.path, error)
        yield Batch(bad=[BadDocuments(part.file, row, reason, bytes=bytes_lost(file))])


@contextmanager
def _open(file: InputFile) -> Iterator[pa.RecordBatchReader]:
    """Open a file as a stream of record batches, whatever it is compressed or archived by."""
    with byte_stream(file.path, file.compression) as stream:
        head = stream.read(len(MAGIC))
    offset = len(MAGIC) if head == MAGIC else 0
    options = pa.ipc.IpcReadOptions(use_threads=False)
    with (
        byte_stream(file.path, file.compression, offset) as stream,
        pa.ipc.open_stream(stream, options=options) as reader,
    ):
        yield reader


def _texts(batch: pa.RecordBatch, column: str) -> Iterator[pa.Array]:
    """Yield the text column in parts of moderate size, as bytes: nothing in it was checked."""
    batch.validate()  # or a negative length ends the process
    values = column_at(batch, column)
    if pa.types.is_dictionary(values.type):
        values = pa.DictionaryArray.from_arrays(values.indices, _as_bytes(values.dictionary))
    else:
        values = _as_bytes(values)
    for start in range(0, len(values), BATCH_ROWS):
        yield from cut_column(values.slice(start, BATCH_ROWS))


def _as_bytes(values: pa.Array) -> pa.Array:
    """Return a text column as bytes, its offsets checked."""
    values = values.view(AS_BYTES.get(values.type, values.type))
    values.validate(full=True)
    return values
