"""Shared by all benchmarks: measure in turn, compare round by round, print Markdown tables.

A contender answers each of its turns with a record: a dict of figures by name. All contenders are
measured once per round, one after the other, and ratios are taken within each round, so that drift
of the machine affects all alike.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro

from shards.cli import one_line_errors

Key = TypeVar("Key", bound=Hashable)
Record = Mapping[str, Any]
Columns = Mapping[str, tuple[str, str]]  # header -> name and format of a figure
Preset = Literal["gpt2", "small", "tiny", "gpt2-medium", "gpt2-large", "gpt2-xl"]
Device = Literal["cuda", "cpu"]


def command(
    name: str,
    options_type: Callable[..., Any],
    run: Callable[[Any], dict[str, Any]],
    as_text: Callable[[dict[str, Any]], str],
    description: str,
) -> None:
    """Parse the flags of `python -m bench.NAME`, measure, and print a table or, with --json, JSON.

    Leaves with exit code 1 if a contender failed; the results of the others are printed first.
    """
    options = tyro.cli(options_type, prog=f"python -m bench.{name}", description=description)
    with one_line_errors():
        results = run(options)
    print(json.dumps(results) if options.json else as_text(results))
    if results.get("failed"):
        sys.exit(1)


def to_stderr(line: Record) -> None:
    """Print a record at once, so that an interrupted benchmark leaves what it had measured."""
    print(json.dumps(line), file=sys.stderr, flush=True)


def alternately(
    contenders: Mapping[Key, Callable[[], Record]],
    rounds: int,
    note: Callable[[Record], None] = to_stderr,
) -> tuple[dict[Key, list[Record]], dict[str, str]]:
    """Measure each contender once per round: its records in order, and the failures by name.

    A contender that raises ValueError or OSError is left out from then on, and so are its earlier
    records. `note` gets each record when it is there, with "round" and "contender" or, of one that
    failed, "failed"; `records_of` takes them back.
    """
    records: dict[Key, list[Record]] = {key: [] for key in contenders}
    failed: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for key, measure in contenders.items():
            if key not in records:
                continue
            line = {"round": number, "contender": name_of(key)}
            try:
                record = measure()
                records[key].append(record)
            except (OSError, ValueError) as error:
                del records[key]
                record = {"failed": str(error)}
                failed[name_of(key)] = str(error)
            note(line | dict(record))
    return records, failed


def records_of(lines: Sequence[Record]) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Return what `alternately` does, by name, from what it noted, up to a kill perhaps."""
    failed = {line["contender"]: line["failed"] for line in lines if "failed" in line}
    records: dict[str, list[Record]] = {}
    for line in lines:
        if line["contender"] not in failed:
            records.setdefault(line["contender"], []).append(line)
    return records, failed


def name_of(key: Hashable) -> str:
    """A contender's key as text: the parts of a tuple joined by commas."""
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def column(records: Sequence[Record], name: str) -> list[float]:
    """One figure of every record."""
    return [record[name] for record in records]


def ratio(these: Sequence[float], others: Sequence[float]) -> float | None:
    """The median, over the rounds of both, of these values by those; None if one has no round."""
    if not these or not others:
        return None
    return round(statistics.median(a / b for a, b in zip(these, others, strict=False)), 3)


def spread(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Median, lowest, highest and all of some values, rounded."""
    rounded = [round(value, digits) for value in values]
    return {
        "median": round(statistics.median(values), digits),
        "low": min(rounded),
        "high": max(rounded),
        "runs": rounded,
    }


def machine(benchmark: str, packages: Sequence[str]) -> dict[str, Any]:
    """The command, the processor, its cores, the system and the versions of some packages."""
    versions = {name: importlib.metadata.version(name) for name in packages if installed(name)}
    return {
        "command": shlex.join(["python", "-m", f"bench.{benchmark}", *sys.argv[1:]]),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": versions,
    }


def installed(package: str) -> bool:
    """True if a distribution of this name is installed."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def page(
    results: Mapping[str, Any],
    about: str,
    columns: Columns,
    notes: Sequence[str] = (),
) -> str:
    """Results for people: the command, the machine, a table, notes and failures."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rows = [[cell(row, head, *of) for head, of in columns.items()] for row in results["rows"]]
    lines = [
        f"$ {machine['command']}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, {versions}",
        about,
        "",
        as_text(list(columns), rows),
        "",
        *notes,
        *(f"failed: {name}: {reason}" for name, reason in results["failed"].items()),
    ]
    return "\n".join(lines)


def shown(value: Any, form: str) -> str:
    """A figure in a table's cell: empty if there is none."""
    return "" if value is None else format(value, form)


def cell(row: Record, header: str, name: str, form: str) -> str:
    """One figure of a row; of a `spread` the median or, below "low to high", the extremes."""
    figure = row.get(name)
    if header == "low to high":
        return f"{row[name]['low']:{form}} to {row[name]['high']:{form}}"
    return shown(figure["median"] if isinstance(figure, dict) else figure, form)


def as_text(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format an aligned Markdown table: the first column left, the others right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headers), line(rule), *map(line, rows)])
