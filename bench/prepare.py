"""Speed of prepare, beside its encoder alone and other ways of tokenising a corpus.

    python -m bench.prepare

The table gives medians of MB/s; prepare's are the time of the text less that of a tenth of it, so
without what a run costs once. Contenders that are ten times as slow are measured on an eighth of
the corpus, and marked so.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench import corpus, peers, rivals, table
from bench.corpus import Corpus

PACKAGES = (
    "gigatoken", "tiktoken", "pyarrow", "numpy", "orjson", "xxhash", "datatrove", "litdata",
    "datasets",
)  # fmt: skip
CEILING, POOL = "gigatoken, in memory", "tiktoken, plain pool *"
PARQUET, JSONL, TXT = "prepare, parquet", "prepare, jsonl", "prepare, txt"
FORMS = {PARQUET: "parquet", JSONL: "jsonl", TXT: "txt"}
PEERS = {
    "datatrove": "datatrove's DocumentTokenizer",
    "litdata": "litdata's optimize",
    "nanogpt": "nanoGPT's recipe",
}
COMMAND = ("-m", "prepare")
# Runs a command and prints the peak memory of its largest process, in KiB. From a small process:
# what is started inherits the peak of its parent.
MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
COLUMNS: table.Columns = {
    "": ("what", ""),
    "processes": ("processes", ""),
    "MB/s": ("mb_s", ""),
    "low to high": ("mb_s", ""),
    "× encoder": ("of_ceiling", ".2f"),
    "× pool": ("of_pool", ".1f"),
    "whole MB/s": ("mb_s_whole", ""),
    "MiB": ("mib", ".0f"),
}
NOTES = """\
MB/s of UTF-8 text, without the start of interpreters and encoders; whole MB/s is with it.
MiB: peak resident memory of the largest process.
* measured on an eighth of the documents, chosen evenly"""


@dataclass(frozen=True)
class Options:
    """Measure prepare beside other ways of tokenising."""

    megabytes: float = 200
    """Text to measure with, in millions of bytes."""
    text: corpus.Kind = "mixed"
    """Files of this machine, mixed or code alone; or made: cjk, or long-tail, with new words."""
    rounds: int = 5
    """How often each contender is measured."""
    peers: bool = True
    """Measure other projects too, where they are installed (the extra bench); takes minutes."""
    json: bool = False
    """Print one JSON object on one line."""


class Contender(NamedTuple):
    """One way of tokenising, on a number of processes."""

    what: str
    processes: int


Records = dict[Contender, list[table.Record]]


def main() -> None:
    """Run the command."""
    table.command("prepare", Options, run, as_text, __doc__ or "")


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, as JSON."""
    text, tenth = (
        corpus.build(size, options.text) for size in (options.megabytes, options.megabytes / 10)
    )
    records, failed = table.alternately(contenders(text, tenth, options.peers), options.rounds)
    return {
        "machine": table.machine("prepare", PACKAGES),
        "corpus": {name: value for name, value in asdict(text).items() if name != "folder"},
        "rounds": options.rounds,
        "rows": [row(records, contender) for contender in records],
        "failed": failed,
    }


def contenders(
    text: Corpus, tenth: Corpus, with_peers: bool
) -> dict[Contender, Callable[[], dict[str, float]]]:
    """Everything to measure."""
    cores = os.cpu_count() or 1
    made: dict[Contender, Callable[[], dict[str, float]]] = {}
    for n in sorted({1, cores}):
        made[Contender(CEILING, n)] = partial(_rival, rivals.encoder, text.parquet, n)
        made[Contender(POOL, n)] = partial(_rival, rivals.tiktoken_pool, text.sample, n)
        for what, form in FORMS.items():
            made[Contender(what, n)] = partial(_prepare, text, tenth, form, n)
    for name, what in PEERS.items():
        if with_peers and table.installed(peers.PACKAGES.get(name, name)):
            made[Contender(what, cores)] = partial(_peer, name, text, cores)
    return made


def _rival(
    measure: Callable[[Path, int], float], parquet: Path, processes: int
) -> dict[str, float]:
    os.sync()  # pending writes of the contender before must not slow this one
    return {"mb_s": measure(parquet, processes)}


def _peer(name: str, text: Corpus, processes: int) -> dict[str, float]:
    os.sync()
    return {"mb_s": text.text_bytes / 1e6 / peers.seconds(name, text.parquet, processes)}


def _prepare(text: Corpus, tenth: Corpus, form: str, processes: int) -> dict[str, float]:
    """MB/s of the text less a tenth of it, and of the whole command; peak memory in MiB."""
    (seconds, mib), (fewer, _) = (
        _run(getattr(corpus, form), processes) for corpus in (text, tenth)
    )
    # Of less than a millisecond: there was too little text to measure anything.
    rate = (text.text_bytes - tenth.text_bytes) / 1e6 / max(seconds - fewer, 1e-3)
    return {"mb_s": rate, "mb_s_whole": text.text_bytes / 1e6 / seconds, "mib": mib}


def _run(source: Path, processes: int) -> tuple[float, float]:
    """Seconds and MiB of the command in a process of its own."""
    os.sync()
    with tempfile.TemporaryDirectory(dir=source.parents[1]) as temporary:
        flags = [str(source), "--out", f"{temporary}/out", "--workers", str(processes)]
        command = [sys.executable, "-c", MEASURED, sys.executable, *COMMAND, *flags]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"expected prepare to succeed, found: {done.stderr.splitlines()[-1]}")
    return seconds, int(done.stdout.split()[-1]) / 1024


def row(records: Records, contender: Contender) -> dict[str, Any]:
    """A row of the table: rates, and ratios to the encoder and the pool on as many processes."""
    own = records[contender]
    ceiling, pool = (
        table.column(records.get(contender._replace(what=what), []), "mb_s")
        for what in (CEILING, POOL)
    )
    return {
        **contender._asdict(),
        "of_ceiling": table.ratio(table.column(own, "mb_s"), ceiling),
        "of_pool": table.ratio(table.column(own, "mb_s"), pool),
        **{name: table.spread(table.column(own, name)) for name in own[0]},
    }


def as_text(results: Mapping[str, Any]) -> str:
    """The results of `run` for people."""
    text = results["corpus"]
    return table.page(
        results,
        f"{text['text_bytes'] / 1e6:.1f} MB of text, {text['documents']:,} documents; "
        f"medians of {results['rounds']} rounds",
        COLUMNS,
        [NOTES],
    )


if __name__ == "__main__":
    main()
