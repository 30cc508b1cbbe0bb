"""What will be done: input files → units of work, a function of the input and options alone.

A unit is small enough to keep all cores busy on a small corpus and makes a shard of some 100M
tokens on a large one. Units share no state, so they run anywhere and in any order (promise 2).
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from prepare.documents import Bad, Slice, column_bytes, json_object
from prepare.request import Request, rule_of, rule_of_append
from prepare.sources import InputFile, find_files
from prepare.split import GIVEN, POSITION, SplitRule
from prepare.text import PIECE_BYTES, READ_BYTES, byte_stream, next_cut, next_line, survey
from shards.manifest import Manifest
from shards.remote import filesystem

MIN_UNIT_BYTES = 4 << 20
MAX_UNIT_BYTES = 400 << 20
UNITS_AIMED_AT = 64
# Files looked at together: what takes long there is waiting, for a network above all.
LOOKED_AT_ONCE = 16
TEXT_COLUMNS = ("text", "content")
# How much larger compressed text is guessed to be than its file.
COMPRESSION_RATIO = 4


@dataclass(frozen=True)
class Unit:
    """One piece of work. `number` names its shards; `weight` is its text in bytes, about."""

    number: int
    slices: tuple[Slice, ...]
    weight: int


@dataclass(frozen=True)
class Plan:
    """All units, the files they read, how documents are split, and files known to be bad.

    A plan that appends is of a later `generation`; its first file is source `first_source` of the
    dataset. `dedup`: exact duplicates are dropped.
    """

    files: tuple[InputFile, ...]
    rule: SplitRule
    units: tuple[Unit, ...]
    bad: tuple[Bad, ...]
    dedup: bool = False
    generation: int = 0
    first_source: int = 0

    def record(self) -> dict[str, Any]:
        """The plan as JSON; equal records mean the same work on unchanged files."""
        return orjson.loads(orjson.dumps(asdict(self)))


def make_plan(request: Request, base: Manifest | None = None) -> Plan:
    """Look at the sources and plan the work, after that of `base` where it appends to one.

    Raises ValueError or OSError for bad input.
    """
    held_out = find_files(request.val_sources, val=True)
    known = {file.identity for file in held_out}
    files = [file for file in find_files(request.sources) if file.identity not in known]
    # Validation text first: of duplicates the first is kept.
    files = [*held_out, *files]
    with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
        files = list(pool.map(with_column, files, repeat(request.text_column)))
    rule = rule_of_append(request, files, base) if base else rule_of(request, files)
    target = min(max(sum(map(_weight, files)) // UNITS_AIMED_AT, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
        looks = list(
            pool.map(partial(_look_at, rule, target, request.dedup), range(len(files)), files)
        )
    slices = [part for look in looks for part in look.slices]
    return Plan(
        files=tuple(files),
        rule=rule,
        units=tuple(_units(slices, target, _units_before(base))),
        bad=tuple(bad for look in looks for bad in look.bad),
        dedup=request.dedup,
        generation=base.generation + 1 if base else 0,
        first_source=len(base.sources) if base else 0,
    )


def _units_before(base: Manifest | None) -> int:
    """The first unit number that no shard of the dataset bears."""
    shards = [shard for split in base.splits.values() for shard in split.shards] if base else []
    return max((int(re.findall(r"\d+", shard.file)[0]) for shard in shards), default=-1) + 1


def _weight(file: InputFile) -> int:
    """About how many bytes of text a file holds, from its size alone."""
    packed = file.compression is not None or file.kind == "parquet"
    return file.size * (COMPRESSION_RATIO if packed else 1)


@dataclass
class _Look:
    """What there is to read in one file, each slice with its weight, and what is bad in it."""

    slices: list[tuple[Slice, int]] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def _look_at(rule: SplitRule, target: int, dedup: bool, source: int, file: InputFile) -> _Look:
    """Look at one file, of a plan whose units are to have `target` bytes."""
    look = _Look()
    look.slices += _slices(source, file, rule, target, dedup, look.bad)
    return look


def _slices(
    source: int, file: InputFile, rule: SplitRule, target: int, dedup: bool, bad: list[Bad]
) -> Iterator[tuple[Slice, int]]:
    """The slices of one file, each with its weight."""
    if file.kind == "parquet":
        yield from _row_groups(source, file)
    elif file.kind == "jsonl" and file.compression is None:
        for start in range(0, max(file.size, 1), target):
            yield Slice(source, start, start + target), min(target, file.size - start)
    elif file.kind == "text" and (
        rule.rule == POSITION
        # To find a duplicate, the document must stay in one unit.
        or (file.size > PIECE_BYTES and not dedup)
    ):
        found = survey(file)
        if found.error:
            bad.append(Bad(source, 0, found.error))
        elif rule.rule == POSITION:
            middle = next_line(file, int(found.size * (1 - rule.val_fraction)))
            yield from _text_ranges(source, file, 0, middle, "train", target)
            yield from _text_ranges(source, file, middle, found.size, "val", target)
        else:
            val = file.val if rule.rule == GIVEN else rule.is_val(found.digest)[0]
            side = "val" if val else "train"
            digest = (int(found.digest[0, 0]), int(found.digest[0, 1]))
            for part, weight in _text_ranges(source, file, 0, found.size, side, target):
                yield replace(part, digest=digest), weight
    else:
        yield Slice(source), _weight(file)


def _row_groups(source: int, file: InputFile) -> Iterator[tuple[Slice, int]]:
    """One slice a row group; a file whose footer can't be read is left to the reader to report."""
    try:
        metadata = _parquet(file).metadata
    except (OSError, pa.ArrowInvalid):
        yield Slice(source), _weight(file)
        return
    for group in range(metadata.num_row_groups):
        yield Slice(source, group, group + 1), column_bytes(metadata.row_group(group), file.column)


def _text_ranges(
    source: int, file: InputFile, start: int, end: int, side: str, target: int
) -> Iterator[tuple[Slice, int]]:
    """Byte ranges of one text document, cut where its tokens stay what they are."""
    begins = True
    while start < end:
        stop = end
        if file.compression is None and end - start > 2 * target:
            stop = min(next_cut(file, start + target), end)
        yield Slice(source, start, stop, side, begins), stop - start
        start, begins = stop, False


def _units(slices: Sequence[tuple[Slice, int]], target: int, number: int) -> Iterator[Unit]:
    """Neighbouring slices put together until they weigh as much as a unit should."""
    weight = 0
    taken: list[Slice] = []
    for part, part_weight in slices:
        # Neighbouring row groups are one slice: a file is opened once for them.
        joined = replace(taken[-1], end=part.end) if taken else part
        if taken and joined == replace(part, start=joined.start) and taken[-1].end == part.start:
            taken[-1] = joined
        else:
            taken.append(part)
        weight += part_weight
        if weight >= target:
            yield Unit(number, tuple(taken), weight)
            number, weight, taken = number + 1, 0, []
    if taken:
        yield Unit(number, tuple(taken), weight)


def with_column(file: InputFile, wanted: str | None) -> InputFile:
    """The file with the name of its text column. Raises ValueError where it has no such column."""
    wanted_names = (wanted,) if wanted else TEXT_COLUMNS
    names = _columns(file, wanted_names)
    if names is None:
        return replace(file, column=wanted_names[0])
    for name in wanted_names:
        if name in names:
            return replace(file, column=name)
    raise ValueError(
        f"expected a text column {' or '.join(wanted_names)} in {file.name}, found "
        f"{', '.join(names) or 'no column'}: name it by --text-column"
    )


def _columns(file: InputFile, wanted: Sequence[str]) -> list[str] | None:
    """Names of the columns that may hold text; None where the file has none or can't tell."""
    if file.kind == "parquet":
        try:
            schema = _parquet(file).schema_arrow
        except (OSError, pa.ArrowInvalid):
            return None
        return [field.name for field in schema if _may_hold_text(field.type)]
    if file.kind == "jsonl":
        return _first_fields(file, wanted)
    return None


def _may_hold_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    return any(getattr(pa.types, f"is_{test}")(kind) for test in tests)


def _first_fields(file: InputFile, wanted: Sequence[str]) -> list[str] | None:
    """The fields of JSON objects near the head of a jsonl file, up to one that has a wanted one.

    None where there is no object.
    """
    try:
        with byte_stream(file) as stream:
            head = stream.read(READ_BYTES)
    except OSError:
        return None
    names: dict[str, None] = {}
    for line in head.split(b"\n"):
        with suppress(ValueError):
            names |= dict.fromkeys(json_object(line))
        if any(name in names for name in wanted):
            break
    return list(names) or None


def _parquet(file: InputFile) -> pq.ParquetFile:
    system, path = filesystem(file.path)
    return pq.ParquetFile(system.open_input_file(path))
