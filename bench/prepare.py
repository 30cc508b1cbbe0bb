"""How fast prepare is, beside the encoder by itself and other ways of doing the same.

    python -m bench.prepare

Everything is measured in one run and alternately; the table gives medians, and ratios taken within
each round. What is ten times as slow is measured on an eighth of the corpus, and marked so.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from bench import corpus, peers, rivals, table
from bench.corpus import Corpus
from shards.cli import one_line_errors

PACKAGES = (
    "gigatoken", "tiktoken", "pyarrow", "numpy", "orjson", "xxhash", "datatrove", "litdata",
    "datasets",
)  # fmt: skip
CEILING, POOL = "gigatoken, in memory", "tiktoken, plain pool *"
PARQUET, JSONL, TXT = "prepare, parquet", "prepare, jsonl", "prepare, txt"
NO_AUDIT = "prepare, parquet, no audit"
PEERS = {
    "datatrove": "datatrove's DocumentTokenizer",
    "litdata": "litdata's optimize",
    "nanogpt": "nanoGPT's recipe",
}
COMMAND = "from prepare.__main__ import main; main()"
WITHOUT_AUDIT = "import prepare.encode as e; e._agrees = lambda *_: True; "
NOTES = """\
MB/s of UTF-8 text, the start of interpreters and encoders left out; in the last column included.
* measured on an eighth of the documents, chosen evenly"""


@dataclass(frozen=True)
class Options:
    """Measure prepare beside its rivals."""

    megabytes: float = 200
    """Text to measure with, in millions of bytes."""
    rounds: int = 5
    """How often each contender is measured."""
    peers: bool = True
    """Measure other projects too, where they are installed (the extra bench); takes minutes."""
    json: bool = False
    """Answer with one JSON object on one line."""


class Figure(NamedTuple):
    """What a rate is the rate of; `whole` if the start of the process is included."""

    what: str
    processes: int
    whole: bool = False


Rates = dict[Figure, list[float]]


def main() -> None:
    """Measure, and print the table."""
    options = tyro.cli(Options, prog="python -m bench.prepare", description=__doc__)
    with one_line_errors():
        found = run(options)
    print(json.dumps(found) if options.json else as_text(found))


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError or OSError where it can't be."""
    text = corpus.build(options.megabytes)
    rates = table.alternately(contenders(text, options.peers), options.rounds)
    return {
        "command": shlex.join(["python", "-m", "bench.prepare", *sys.argv[1:]]),
        "machine": table.machine(PACKAGES),
        "corpus": {name: value for name, value in asdict(text).items() if name != "folder"},
        "rounds": options.rounds,
        "rows": [row(rates, figure) for figure in rates if is_row(rates, figure)],
        "marks": marks(rates),
    }


def contenders(text: Corpus, with_peers: bool) -> dict[str, Callable[[], Mapping[Figure, float]]]:
    """Everything to measure, by a name that says what is under way."""
    cores = os.cpu_count() or 1
    found: dict[str, Callable[[], Mapping[Figure, float]]] = {}
    for n in sorted({1, cores}):
        found[f"{CEILING}, {n}"] = partial(_rival, rivals.encoder, CEILING, text.parquet, n)
        found[f"{POOL}, {n}"] = partial(_rival, rivals.tiktoken_pool, POOL, text.sample, n)
        for what, source in ((PARQUET, text.parquet), (JSONL, text.jsonl), (TXT, text.txt)):
            found[f"{what}, {n}"] = partial(_prepare, what, source, n, text)
    found[NO_AUDIT] = partial(_prepare, NO_AUDIT, text.parquet, cores, text, WITHOUT_AUDIT)
    for name, what in PEERS.items():
        if with_peers and table.installed(peers.PACKAGES.get(name, name)):
            found[what] = partial(_peer, name, what, text, cores)
    return found


def _rival(
    measure: Callable[[Path, int], float], what: str, parquet: Path, processes: int
) -> dict[Figure, float]:
    os.sync()  # what the one before left to be written should not slow this one
    return {Figure(what, processes): measure(parquet, processes)}


def _peer(name: str, what: str, text: Corpus, processes: int) -> dict[Figure, float]:
    os.sync()
    seconds = peers.seconds(name, text.parquet, processes)
    return {Figure(what, processes): text.text_bytes / 1e6 / seconds}


def _prepare(
    what: str, source: Path, processes: int, text: Corpus, before: str = ""
) -> dict[Figure, float]:
    """The whole command in a process of its own, by the clock and by its own log."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=text.folder.parent) as temporary:
        out = Path(temporary, "out")
        flags = [str(source), "--out", str(out), "--workers", str(processes)]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", before + COMMAND, *flags],
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise ValueError(f"expected prepare to succeed, found: {done.stderr.splitlines()[-1]}")
        found = re.search(r"text +([\d.,]+) MB in .* s, ([\d.,]+) MB/s", done.stdout)
    assert found is not None
    megabytes, own = (float(number.replace(",", "")) for number in found.groups())
    return {
        Figure(what, processes): own,
        Figure(what, processes, True): megabytes / seconds,
    }


def is_row(rates: Rates, figure: Figure) -> bool:
    """Whether a figure has a row of its own: a whole process is a column beside its own time."""
    return not figure.whole or figure._replace(whole=False) not in rates


def row(rates: Rates, figure: Figure) -> dict[str, Any]:
    """A row of the table: rates, and ratios to the ceiling and the pool on as many processes."""
    found: dict[str, Any] = {"what": figure.what, "processes": figure.processes}
    for name, other in (("of_ceiling", CEILING), ("of_pool", POOL)):
        against = rates[Figure(other, figure.processes)]
        found[name] = round(table.ratio(rates[figure], against), 3)
    for name, whole in (("mb_s", False), ("mb_s_whole", True)):
        if (key := figure._replace(whole=whole)) in rates:
            found[name] = table.spread(rates[key])
    return found


def marks(rates: Rates) -> list[dict[str, Any]]:
    """What the project asks of prepare, on all cores: what was found, and what is wanted."""
    cores = max(figure.processes for figure in rates)
    wanted = [
        ("parquet ÷ the encoder in memory", PARQUET, CEILING, 0.75),
        ("jsonl ÷ parquet", JSONL, PARQUET, 0.5),
        ("with the audit ÷ without", PARQUET, NO_AUDIT, 0.9),
        ("parquet ÷ tiktoken's plain pool", PARQUET, POOL, 9),
        ("parquet ÷ nanoGPT's recipe", PARQUET, PEERS["nanogpt"], 25),
        ("parquet ÷ litdata", PARQUET, PEERS["litdata"], 12),
    ]
    found = []
    for what, one, other, mark in wanted:
        these, others = (rates.get(Figure(name, cores)) for name in (one, other))
        if these and others:
            found.append(
                {"what": what, "found": round(table.ratio(these, others), 2), "at_least": mark}
            )
    return found


def as_text(found: Mapping[str, Any]) -> str:
    """What `run` found, for people."""
    machine, text = found["machine"], found["corpus"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    headers = ("", "processes", "MB/s", "low to high", "× encoder", "× pool", "whole MB/s")
    packages = [peers.PACKAGES.get(name, name) for name in PEERS]
    missing = [package for package in packages if package not in machine["packages"]]
    lines = [
        f"$ {found['command']}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, {versions}",
        f"{text['text_bytes'] / 1e6:.1f} MB of text, {text['documents']:,} documents; "
        f"medians of {found['rounds']} rounds",
        "",
        table.as_text(headers, [cells(row) for row in found["rows"]]),
        "",
        NOTES,
        *(f"{name} is not installed: pip install 'mygpt[bench]'" for name in missing),
        "",
        table.as_text(
            ("", "found", "wanted"),
            [(m["what"], str(m["found"]), f"≥ {m['at_least']}") for m in found["marks"]],
        ),
    ]
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text."""
    own, whole = row.get("mb_s"), row.get("mb_s_whole")
    return [
        row["what"],
        str(row["processes"]),
        str(own["median"]) if own else "",
        f"{own['low']} to {own['high']}" if own else "",
        f"{row['of_ceiling']:.2f}",
        f"{row['of_pool']:.1f}",
        str(whole["median"]) if whole else "",
    ]


if __name__ == "__main__":
    main()
