"""The plan: input files cut into units of work, a function of the input and the options alone.

A unit is small enough to keep all cores busy on a small corpus, and makes a shard of some 100M
tokens on a large one. Units share no state, so they run anywhere and in any order (promise 2).
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prepare.columns import column_bytes, with_column
from prepare.file_types import JSONL, PARQUET, TEXT
from prepare.input_file import InputFile, Slice, byte_stream, bytes_lost
from prepare.options import Options
from prepare.quarantine import BadDocuments
from prepare.sources import INSPECTED_AT_ONCE, find_files
from prepare.split import POSITION, VAL_SOURCE, SplitRule, choose_rule, follow_rule
from prepare.text import PIECE_BYTES, next_cut, next_line, survey
from shards import stored_json
from shards.manifest import SPLITS, Manifest, Shard
from shards.remote import is_remote
from shards.tokenizer import GPT2, Tokenizer, load, open_tokenizer

FORMAT, VERSION = "mygpt-plan", 1
REMEDY = "restore it, or give another --out (beside a complete dataset it may be removed)"
MIN_UNIT_BYTES = 4 << 20
MAX_UNIT_BYTES = 400 << 20
TARGET_UNITS = 64
TRAINED = "trained"

WeightedSlice = tuple[Slice, int]


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    number: int
    slices: tuple[Slice, ...]
    weight: int  # estimated bytes of text

    @property
    def name(self) -> str:
        """The number as in the names of the unit's files."""
        return f"{self.number:05d}"


@dataclass
class UnitResult:
    """Result of one unit, stored as JSON beside the shards until the manifest is written."""

    unit: int
    shards: dict[str, list[Shard]]  # by split
    read: int = 0  # all documents
    empty: int = 0  # of them, not written, as are the bad ones
    duplicates: int = 0  # of them, not written
    bad: list[BadDocuments] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # Never stored: too much was bad, so the rest was not read; and text that was only hashed.
    stopped: bool = False
    hashed_bytes: int = 0

    def all_shards(self) -> list[Shard]:
        """The shards of both splits."""
        return [shard for shards in self.shards.values() for shard in shards]


@dataclass(frozen=True)
class Plan:
    """All units, the files they read, and how documents are split."""

    files: tuple[InputFile, ...]
    rule: SplitRule
    units: tuple[Unit, ...]
    bad: tuple[BadDocuments, ...]  # found bad while planning
    dedup: bool = False  # drop exact duplicates
    generation: int = 0  # above 0: append to the dataset
    first_source: int = 0  # index of the first file in the dataset's sources
    # Of two plans the files are compared, not how they were found.
    all_text: bool = field(default=False, compare=False)  # folders give all text; not in myGPT 0.2
    left_out: dict[str, int] = field(default_factory=dict, compare=False)  # other files, by type
    vocabulary: str = GPT2  # name or hash; of one that is trained on the text, TRAINED and its size

    def inspection(self) -> UnitResult:
        """Return what planning found bad, as the result of a unit before the first."""
        read = sum(one.documents for one in self.bad)
        return UnitResult(-1, {split: [] for split in SPLITS}, read, bad=list(self.bad))

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `plan.json`."""
        return {"format": FORMAT, "version": VERSION} | asdict(self)


def read_plan(record: dict[str, Any], name: str) -> Plan:
    """Return the plan that `Plan.to_dict` made; `name` is its file. Raises ValueError."""
    if "format" not in record:  # as myGPT 0.2 stored it
        record = _upgraded(record, name)
    stored_json.check_version(record, FORMAT, (VERSION,), name, REMEDY)
    return stored_json.build(Plan, record, name, remedy=REMEDY)


def _upgraded(record: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a plan of myGPT 0.2 with today's field names."""
    try:
        for part in (part for unit in record["units"] for part in unit["slices"]):
            part["split"], part["continued"] = part.pop("side"), not part.pop("begins")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a plan in {name}, found {error!r}: {REMEDY}") from None
    return record | {"format": FORMAT, "version": VERSION}


def make_plan(options: Options, base: Manifest | None = None, all_text: bool = True) -> Plan:
    """Inspect the sources and plan the work; with `base`, to be appended to that dataset.

    With `all_text` folders give everything that is text. Raises ValueError or OSError for bad
    input.
    """
    vocabulary = _vocabulary(options, base)  # first: fail fast if there is none
    left_out = Counter[str]()
    val_files = find_files(options.val_source, True, all_text, left_out)
    known = {file.identity for file in val_files}
    others = find_files(options.sources, False, all_text, left_out)
    others = [file for file in others if file.identity not in known]
    # Validation text first: of duplicates the first is kept.
    files = _outside(options.out, [*val_files, *others])
    rule = follow_rule(base.split_rule, options, files) if base else choose_rule(options, files)
    first_unit = max(map(unit_number, base.shards), default=-1) + 1 if base else 0
    with ThreadPoolExecutor(INSPECTED_AT_ONCE) as pool:
        files = list(pool.map(with_column, files, repeat(options.text_column)))
        target = sum(file.text_bytes for file in files) // TARGET_UNITS
        target = min(max(target, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
        inspect = partial(_inspect, rule, target, options.dedup)
        parts = list(pool.map(inspect, range(len(files)), files))
    slices = [pair for of_file, _ in parts for pair in of_file]
    return Plan(
        files=tuple(files),
        rule=rule,
        units=tuple(_units(slices, target, first_unit)),
        bad=tuple(bad for _, of_file in parts for bad in of_file),
        dedup=options.dedup,
        generation=base.generation + 1 if base else 0,
        first_source=len(base.sources) if base else 0,
        all_text=all_text,
        left_out=dict(left_out),
        vocabulary=vocabulary,
    )


def _vocabulary(options: Options, base: Manifest | None) -> str:
    """Return the vocabulary requested, or that of the dataset to append to."""
    tokenizer = requested_tokenizer(options, base)
    if tokenizer is None:
        return f"{TRAINED} {options.vocab_size}"
    return GPT2 if tokenizer.name == GPT2 else tokenizer.hash


def requested_tokenizer(options: Options, base: Manifest | None = None) -> Tokenizer | None:
    """Return the tokenizer of the options, or of the dataset to append to; None: to be trained."""
    if base:
        return open_tokenizer(base.tokenizer, base.location)
    return None if options.vocab_size else load(options.tokenizer)


def unit_number(shard: Shard) -> int:
    """Return the number of the unit that made a shard."""
    return int(re.findall(r"\d+", shard.file)[0])


def _outside(out: str, files: Sequence[InputFile]) -> list[InputFile]:
    """Return the files that are not in the folder `out`. Raises ValueError if none is left."""
    real = lru_cache(lambda path: path if is_remote(path) else os.path.realpath(path))
    inside = real(out).rstrip("/") + "/"
    outside = [
        file
        for file in files
        if not f"{real(os.path.dirname(file.stored_path))}/".startswith(inside)
    ]
    if not outside:
        raise ValueError(f"expected sources outside --out {out}, found none: give others")
    return outside


def _inspect(
    rule: SplitRule, target: int, dedup: bool, number: int, file: InputFile
) -> tuple[list[WeightedSlice], list[BadDocuments]]:
    """Return the slices of file `number`, for units of `target` bytes, and what is bad in it."""
    if file.kind == PARQUET:
        return list(_row_groups(number, file)), []
    if file.kind == JSONL and file.compression is None:
        starts = range(0, max(file.size, 1), target)
        return [(Slice(number, i, i + target), min(target, file.size - i)) for i in starts], []
    # With dedup a document stays in one unit, so that it can be compared as a whole.
    is_large = file.size > PIECE_BYTES and not dedup
    if file.kind == TEXT and (rule.rule == POSITION or is_large):
        return _inspect_text(rule, target, number, file)
    return [(Slice(number), file.text_bytes)], []


def _row_groups(number: int, file: InputFile) -> Iterator[WeightedSlice]:
    """Yield one slice per row group, or one in all if the footer is unreadable.

    Why it is unreadable is reported when that slice is read.
    """
    try:
        metadata = pq.ParquetFile(byte_stream(file.path)).metadata
    except (OSError, pa.ArrowException):
        yield Slice(number), file.text_bytes
        return
    for group in range(metadata.num_row_groups):
        yield Slice(number, group, group + 1), column_bytes(metadata.row_group(group), file.column)


def _inspect_text(
    rule: SplitRule, target: int, number: int, file: InputFile
) -> tuple[list[WeightedSlice], list[BadDocuments]]:
    """Read a text that goes over several slices once: for its hash, its size and its errors."""
    result = survey(file.path, file.compression)
    if result.error:
        return [], [BadDocuments(number, 0, result.error, bytes=bytes_lost(file))]
    if rule.rule == POSITION:
        middle = int(result.size * (1 - rule.val_fraction))
        middle = next_line(file.path, file.compression, middle)
        texts = [Slice(number, 0, middle, "train"), Slice(number, middle, result.size, "val")]
    else:
        is_val = file.val if rule.rule == VAL_SOURCE else rule.is_val(result.digest)[0]
        digest = (int(result.digest[0, 0]), int(result.digest[0, 1]))
        texts = [Slice(number, 0, result.size, "val" if is_val else "train", digest=digest)]
    return [pair for text in texts for pair in _text_ranges(file, text, target)], []


def _text_ranges(file: InputFile, text: Slice, target: int) -> Iterator[WeightedSlice]:
    """Cut one text document into byte ranges, where the tokens of the pieces are the whole's."""
    start = text.start
    while start < text.end:
        end = text.end
        if file.compression is None and end - start > 2 * target:
            end = min(next_cut(file.path, start + target), end)
        yield replace(text, start=start, end=end, continued=start > text.start), end - start
        start = end


def _units(slices: Sequence[WeightedSlice], target: int, number: int) -> Iterator[Unit]:
    """Join neighboring slices into units of about `target` bytes, numbered from `number`."""
    weight = 0
    joined: list[Slice] = []
    for part, part_weight in slices:
        last = joined[-1] if joined else None
        # Neighboring row groups become one slice, so that a file is opened once for them.
        if last and last.end == part.start and part == replace(last, start=last.end, end=part.end):
            joined[-1] = replace(last, end=part.end)
        else:
            joined.append(part)
        weight += part_weight
        if weight >= target:
            yield Unit(number, tuple(joined), weight)
            number, weight, joined = number + 1, 0, []
    if joined:
        yield Unit(number, tuple(joined), weight)
