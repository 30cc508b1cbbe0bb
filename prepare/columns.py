"""The column with the text: its name, found in a schema, header or JSON object, and its values."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prepare.file_types import FORMATS, JSONL, PARQUET, encoding_remedy, format_module, utf16
from prepare.input_file import READ_BYTES, InputFile, byte_stream

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TEXT_COLUMNS = ("text", "content")
# Turns lists of messages into texts.
JOIN_LIST = "jq -c '{text: ([.%s[].%s] | join(\"\\n\"))}'"


@dataclass
class Columns:
    """Names of columns or fields; those of nested ones are paths: `meta.text`."""

    texts: list[str]  # may hold text
    lists: list[str] = field(default_factory=list)  # hold lists, into which no path leads


def with_column(file: InputFile, requested: str | None) -> InputFile:
    """Return the file with its text column set. Raises ValueError if it has no such column."""
    candidates = (requested,) if requested else TEXT_COLUMNS
    columns = _columns(file, candidates)
    for name in candidates:
        if columns is None or name in columns.texts:
            return replace(file, column=name)
    assert columns
    remedy = "name it by --text-column"
    for name in columns.lists:
        if requested and requested.startswith(f"{name}."):
            inner = requested.removeprefix(f"{name}.")
            remedy = (
                f"{name} is a list, so write one text per row first: {JOIN_LIST % (name, inner)} "
                "IN.jsonl > OUT.jsonl, for example"
            )
    raise ValueError(
        f"expected a text column {' or '.join(candidates)} in {file.name}, found "
        f"{', '.join(columns.texts) or 'no column'}: {remedy}"
    )


def _columns(file: InputFile, candidates: Sequence[str]) -> Columns | None:
    """Return the columns of a file; None if it has none or is unreadable."""
    if file.kind == PARQUET:
        try:
            return schema_columns(pq.ParquetFile(byte_stream(file.path)).schema_arrow)
        except (OSError, pa.ArrowException):
            return None
    if file.kind == JSONL:
        return _first_fields(file, candidates)
    if file.kind in FORMATS:
        return format_module(file.kind).columns(file)
    return None


def schema_columns(schema: pa.Schema) -> Columns:
    """Return the columns of an Arrow schema that may hold text, and those that are lists."""
    columns = Columns([])
    for path, kind in _leaves(schema):
        if _may_hold_text(kind):
            columns.texts.append(path)
        elif pa.types.is_nested(kind):
            columns.lists.append(path)
    return columns


def _leaves(fields: Iterable[pa.Field], above: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Yield (path, type) of all columns, those inside of structs instead of the structs."""
    for one in fields:
        if pa.types.is_struct(one.type):
            yield from _leaves(one.type, f"{above}{one.name}.")
        else:
            yield above + one.name, one.type


def _may_hold_text(kind: pa.DataType) -> bool:
    texts = {pa.string(), pa.large_string(), pa.string_view()}
    texts |= {pa.binary(), pa.large_binary(), pa.binary_view()}
    return (kind.value_type if pa.types.is_dictionary(kind) else kind) in texts


def text_head(file: InputFile) -> bytes:
    """Return the beginning of a file of rows. Raises ValueError for UTF-16, else OSError."""
    with byte_stream(file.path, file.compression) as stream:
        head = stream.read(READ_BYTES)
    if utf16(head):
        raise ValueError(f"expected UTF-8, found {file.name}, {encoding_remedy(file.path, head)}")
    return head


def _first_fields(file: InputFile, candidates: Sequence[str]) -> Columns | None:
    """Return the fields of the first JSON objects of a file, up to one that has a candidate.

    None if there is no object.
    """
    try:
        head = text_head(file)
    except OSError:
        return None
    names: dict[str, None] = {}
    lists: dict[str, None] = {}
    for line in head.split(b"\n"):
        with suppress(ValueError):
            for path, value in _paths(json_object(line)):
                (lists if isinstance(value, list) else names)[path] = None
        if any(name in names for name in candidates):
            break
    return Columns([*names, *lists], list(lists)) if names or lists else None


def _paths(value: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of all fields of a JSON object, in any depth."""
    pending = list(value.items())[::-1]
    while pending:
        path, inner = pending.pop()
        if isinstance(inner, dict):
            pending += [(f"{path}.{name}", one) for name, one in reversed(inner.items())]
        else:
            yield path, inner


def json_object(line: bytes) -> dict[str, Any]:
    """Parse the JSON object in a line. Raises ValueError with the reason if there is none.

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


def column_at(batch: pa.RecordBatch, path: str) -> pa.Array:
    """Return a column by its name, or a nested one by its path, `meta.text`."""
    name, *inner = [path] if path in batch.schema.names else path.split(".")
    values = batch.column(batch.schema.get_all_field_indices(name)[0])
    return pc.struct_field(values, inner) if inner else values


def column_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    """Uncompressed bytes of a column in a row group, whose metadata lists leaf columns."""
    leaves = (group.column(number) for number in range(group.num_columns))
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == column)
