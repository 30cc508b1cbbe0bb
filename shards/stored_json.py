"""The one rule for JSON records that are stored: `manifest.json`, `config.json`, `state.json` ...

A record names its format and version and is read into a frozen dataclass by the annotations of its
fields. A field that is absent takes the dataclass's default, so a new one needs nothing else for
older records to be read; a retired one is ignored. Anything else that is not as expected (damaged
JSON, another format or version, an unknown field, a value of another type) is a ValueError of one
line: what was expected, what was found, what to do. So is an edit of a record with a "checksum",
which those of version 0.2 don't have.
"""

import dataclasses
import json
import math
import types
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import orjson
import xxhash

Record = TypeVar("Record")

REMEDY = "restore it, or use the version of myGPT that wrote it"
SHOWN_CHARACTERS = 60
# JSON has no integers of its own: a float that is whole may be stored as one.
PLAIN: dict[Any, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}


def read(path: Path, kind: str, versions: Collection[int], remedy: str) -> dict[str, Any]:
    """Return the record in a file, of format `kind` and one of `versions`.

    `remedy` says what to do if it is damaged. Raises FileNotFoundError or ValueError.
    """
    record = parse(path.read_bytes(), path, remedy)
    check_version(record, kind, versions, path, remedy)
    verify_checksum(record, path, remedy)
    return record


def verify_checksum(record: dict[str, Any], name: str | Path, remedy: str) -> None:
    """Remove a record's checksum, if it has one. Raises ValueError if it is of other content."""
    if record.pop("checksum", actual := _checksum(record)) != actual:
        raise ValueError(f"{name} was altered: its checksum is another; {remedy}")


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with a checksum of everything else in it; see `verify_checksum`."""
    return {**record, "checksum": _checksum(record)}


def _checksum(record: Mapping[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def parse(content: bytes, name: str | Path, remedy: str = REMEDY) -> dict[str, Any]:
    """Return the JSON object that `content` spells, `name` being its file in a ValueError."""
    try:
        value = orjson.loads(content)
    except ValueError:
        try:
            value = json.loads(content)  # accepts NaN, the loss of a diverged run
            orjson.dumps(value)  # but nothing else that can't be written again
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"expected a JSON object in {name}, found {error}: {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {name}, found {_cut(repr(value))}: {remedy}")
    return value


def check_version(
    record: dict[str, Any], kind: str, versions: Collection[int], name: str | Path, remedy: str
) -> None:
    """Raise ValueError unless a record is of format `kind` and one of `versions`."""
    found, version = record.get("format"), record.get("version")
    if found != kind or type(version) is not int or version not in versions:
        raise ValueError(
            f"expected format {kind} version {' or '.join(map(str, versions))} in {name}, found "
            f"{_cut(found)} version {_cut(version)}: use the version of myGPT that wrote it, or "
            f"{remedy}"
        )


def build(
    kind: type[Record],
    values: Any,
    name: str | Path,
    *,
    retired: Collection[str] = (),
    ignore_unknown: bool = False,
    remedy: str = REMEDY,
) -> Record:
    """Return the dataclass `kind` made of JSON values, nested dataclasses included.

    Ignored are "format", "version" and the fields named in `retired`, with `ignore_unknown` all
    that `kind` does not have. What its `__post_init__` refuses is a ValueError that names the file.
    """
    ignored = {"format", "version", *retired}
    return _Builder(str(name), ignored, ignore_unknown, remedy).record(kind, values, "")


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Conversion of the values of one file; `at` is the path of a value in it, for messages."""

    name: str
    ignored: Collection[str]
    ignore_unknown: bool
    remedy: str

    def record(self, kind: type[Record], values: Any, at: str) -> Record:
        """Return a dataclass, each value converted by the annotation of its field."""
        if not isinstance(values, dict):
            raise self._wrong("an object", at, values)
        known = _fields(kind)  # type: ignore[arg-type]
        unknown = [key for key in values if key not in known and key not in self.ignored]
        if unknown and not self.ignore_unknown:
            raise ValueError(
                f"expected only fields of this version in {self.name}, found "
                f"{_cut(_join(at, unknown[0]))}: {self.remedy}"
            )
        arguments = {}
        for key, (hint, is_required) in known.items():
            if key in values:
                arguments[key] = self.value(hint, values[key], _join(at, key))
            elif is_required:
                raise self._wrong("a value", _join(at, key), "none")
        try:
            return kind(**arguments)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def value(self, hint: Any, value: Any, at: str) -> Any:
        """Return `value` as the annotation `hint` has it."""
        origin, inner = get_origin(hint), get_args(hint)
        if hint is Any or (value is None and types.NoneType in inner):
            return value
        if hint is Path:
            return Path(self.value(str, value, at))
        if dataclasses.is_dataclass(hint):
            return self.record(hint, value, at)  # type: ignore[arg-type]
        if origin in (Union, types.UnionType):  # X | None
            return self.value(next(x for x in inner if x is not types.NoneType), value, at)
        if origin is Literal:
            if any(value == word and type(value) is type(word) for word in inner):
                return value
            raise self._wrong(" or ".join(map(repr, inner)), at, value)
        if origin in (tuple, list):
            if isinstance(value, list):
                return origin(self._items(inner[0], value, at))
            raise self._wrong("a list", at, value)
        if origin is dict:
            if isinstance(value, dict):
                return {key: self.value(inner[1], x, _join(at, key)) for key, x in value.items()}
            raise self._wrong("an object", at, value)
        if type(value) in PLAIN[hint] and (hint is not float or abs(value) < math.inf):
            return value
        raise self._wrong(f"a value of type {hint.__name__}", at, value)

    def _items(self, hint: Any, values: list[Any], at: str) -> list[Any]:
        if dataclasses.is_dataclass(hint) and _are_plain(hint, values):
            return [hint(**row) for row in values]  # type: ignore[operator]
        return [self.value(hint, value, f"{at}[{i}]") for i, value in enumerate(values)]

    def _wrong(self, expected: str, at: str, found: Any) -> ValueError:
        place = f"{at} in {self.name}" if at else self.name
        return ValueError(
            f"expected {expected} for {place}, found {_cut(repr(found))}: {self.remedy}"
        )


@lru_cache
def _fields(kind: type) -> dict[str, tuple[Any, bool]]:
    """Return the annotation of each field, and True for those without a default."""
    hints, absent = get_type_hints(kind), dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is absent is field.default_factory)
        for field in dataclasses.fields(kind)
        if field.init
    }


def _are_plain(kind: Any, rows: Sequence[Any]) -> bool:
    """Return True if each row has all fields, of plain types, and each value is of its type.

    A dataset has up to 100,000 shards, for which one check per value would take seconds; these are
    of whole columns.
    """
    hints = {key: hint for key, (hint, _) in _fields(kind).items()}
    if hasattr(kind, "__post_init__") or not {*hints.values()} <= {int, str}:
        return False
    if {*map(type, rows)} != {dict} or {*map(len, rows)} != {len(hints)}:
        return False
    try:
        return all({*map(type, map(itemgetter(key), rows))} == {hints[key]} for key in hints)
    except KeyError:
        return False


def _join(at: str, key: str) -> str:
    key = key if key.isidentifier() else repr(key)
    return f"{at}.{key}" if at else key


def _cut(value: Any) -> str:
    """Return a value as text on one line, of limited length."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
