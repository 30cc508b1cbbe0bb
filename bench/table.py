"""What every bench does with its figures: measure alternately, compare, say on which machine."""

import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Key = TypeVar("Key")
Figure = TypeVar("Figure")


def alternately(
    contenders: Mapping[str, Callable[[], Mapping[Key, Figure]]], rounds: int
) -> dict[Key, list[Figure]]:
    """Measure each contender once a round, all in turn, so that what drifts drifts for all.

    A contender returns its figures by name; of each the rounds' values are returned in order. Says
    on stderr what is under way.
    """
    found: dict[Key, list[Figure]] = {}
    for number in range(1, rounds + 1):
        for name, measure in contenders.items():
            print(
                f"\r\033[Kround {number} of {rounds}: {name}", end="", file=sys.stderr, flush=True
            )
            for key, value in measure().items():
                found.setdefault(key, []).append(value)
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return found


def ratio(these: Sequence[float], others: Sequence[float]) -> float:
    """How many times as large these values are as those: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(these, others, strict=True))


def spread(values: Sequence[float], digits: int = 1) -> dict[str, Any]:
    """Median, lowest, highest and all of some values, rounded for people."""
    rounded = [round(value, digits) for value in values]
    return {
        "median": round(statistics.median(values), digits),
        "low": min(rounded),
        "high": max(rounded),
        "runs": rounded,
    }


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """The processor, its cores, the system, and the versions of some packages."""
    versions = {name: importlib.metadata.version(name) for name in packages if installed(name)}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": versions,
    }


def installed(package: str) -> bool:
    """Whether a distribution of this name is installed."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_text(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned to be read as it is: the first column left, the others right."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(headers), line(rule), *map(line, rows)])
