"""How fast rows of tokens come from disk, beside other ways of doing the same.

    python -m bench.loader

Batches of 16 rows of 1,024 tokens as int64, everything in the page cache, one process, one thread.
All are measured in one run, in turn, other projects after the rest. Rates are those of
one core: tokens a second of the process's CPU time, which other work on the machine changes less
than the time on the clock; that stands beside it.
"""

import importlib.util
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from bench import feeds, table
from shards.cli import one_line_errors

PACKAGES = ("torch", "numpy", "litdata", "mosaicml-streaming")
# MosaicML's own requirements ask for an older transformers than ours.
INSTALL = {
    "litdata": "pip install 'mygpt[bench]'",
    "mosaicml-streaming": "pip install mosaicml-streaming --no-deps, and what it then asks for",
}
OURS, NANOGPT = "this loader", "nanoGPT's get_batch"
ON_GPU = "this loader, to a GPU"
HEADERS = ("", "M tokens/core-s", "low to high", "× nanoGPT", "by the clock", "order")
# Enough for a reader that reads ahead more and more; then so many between two looks at the clock.
WARM_BATCHES, TIMED_AT_ONCE = 600, 20


@dataclass(frozen=True)
class Options:
    """Measure the loader beside others."""

    megatokens: int = 64
    """Size of the dataset, in millions of tokens."""
    shards: int = 64
    """Shards that it lies in."""
    seconds: float = 1.0
    """How long each is measured in a round."""
    rounds: int = 5
    """How often each is measured."""
    peers: bool = True
    """Measure other projects too, where they are installed (the extra bench)."""
    json: bool = False
    """Answer with one JSON object on one line."""


class Figure(NamedTuple):
    """Whose rate, and whether by the clock or by CPU time."""

    what: str
    by_the_clock: bool = False


@dataclass(frozen=True)
class Contender:
    """A way to feed, the order in which it does, and the module it needs."""

    feed: Callable[[Path], Iterator[feeds.Batch]]
    order: str
    module: str = "torch"


CONTENDERS = {
    OURS: Contender(feeds.ours, "random, over all shards"),
    ON_GPU: Contender(partial(feeds.ours, device="cuda"), "random, over all shards"),
    "a strided view": Contender(feeds.strided, "random, in one file"),
    "torch's DataLoader": Contender(feeds.torch_loader, "random, over all shards"),
    NANOGPT: Contender(feeds.nanogpt, "random, with replacement"),
    "litdata": Contender(feeds.litdata, "shuffled by chunks", "litdata"),
    "MosaicML Streaming": Contender(feeds.streaming, "shuffled by blocks", "streaming"),
}


def main() -> None:
    """Measure, and print the table."""
    options = tyro.cli(Options, prog="python -m bench.loader", description=__doc__)
    with one_line_errors():
        found = run(options)
    print(json.dumps(found) if options.json else as_text(found))


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError or OSError where it can't be."""
    if min(options.megatokens, options.shards, options.seconds, options.rounds) <= 0:
        raise ValueError("expected --megatokens, --shards, --seconds and --rounds above 0")
    torch.set_num_threads(1)
    # What peers tell goes to stderr: stdout is for the answer.
    with tempfile.TemporaryDirectory() as temporary, redirect_stdout(sys.stderr):
        folder = Path(temporary)
        feeds.build(folder, options.megatokens * 10**6, options.shards)
        rates: dict[Figure, list[float]] = {}
        # Peers come last: their threads go on reading while another's turn is.
        for names in (
            [name for name in CONTENDERS if CONTENDERS[name].module == "torch"],
            [name for name in CONTENDERS if CONTENDERS[name].module != "torch"],
        ):
            rates |= measured(
                folder, [name for name in names if is_measured(name, options)], options
            )
    return {
        "command": shlex.join(["python", "-m", "bench.loader", *sys.argv[1:]]),
        "machine": table.machine(PACKAGES),
        "dataset": {"megatokens": options.megatokens, "shards": options.shards},
        "rounds": options.rounds,
        "rows": [row(rates, name) for name in CONTENDERS if Figure(name) in rates],
        "marks": [
            {
                "what": "million tokens/s of one core",
                "found": table.spread(rates[Figure(OURS)])["median"],
                "wanted": 400,
            },
            {
                "what": "÷ nanoGPT's get_batch",
                "found": round(table.ratio(rates[Figure(OURS)], rates[Figure(NANOGPT)]), 1),
                "wanted": 15,
            },
        ],
    }


def row(rates: Mapping[Figure, list[float]], name: str) -> dict[str, Any]:
    """A row of the table."""
    own = rates[Figure(name)]
    return {
        "what": name,
        "million_tokens_s": table.spread(own),
        "million_tokens_s_by_the_clock": table.spread(rates[Figure(name, True)]),
        "of_nanogpt": round(table.ratio(own, rates[Figure(NANOGPT)]), 2),
        "order": CONTENDERS[name].order,
    }


def measured(folder: Path, names: Sequence[str], options: Options) -> dict[Figure, list[float]]:
    """The rates of some contenders, in turn."""
    running = {name: CONTENDERS[name].feed(folder) for name in names}
    for feed in running.values():
        next(islice(feed, WARM_BATCHES, None))
    turns = {name: partial(_rates, name, feed, options.seconds) for name, feed in running.items()}
    return table.alternately(turns, options.rounds)


def is_measured(name: str, options: Options) -> bool:
    """Whether it can be measured here: a GPU's row needs a GPU, a peer's that it is installed."""
    if name == ON_GPU and not torch.cuda.is_available():
        return False
    module = CONTENDERS[name].module
    return module == "torch" or (options.peers and importlib.util.find_spec(module) is not None)


def _rates(name: str, feed: Iterator[feeds.Batch], seconds: float) -> dict[Figure, float]:
    """Millions of tokens a second of one feed, over at least so many seconds."""
    batches, passed = 0, 0.0
    begun, begun_cpu = time.perf_counter(), time.process_time()
    while not batches or passed < seconds:
        for _ in islice(feed, TIMED_AT_ONCE):
            batches += 1
        if name == ON_GPU:
            torch.cuda.synchronize()
        passed = time.perf_counter() - begun
    tokens = batches * feeds.BATCH * feeds.BLOCK / 1e6
    spent = time.process_time() - begun_cpu
    return {Figure(name): tokens / spent, Figure(name, True): tokens / passed}


def as_text(found: Mapping[str, Any]) -> str:
    """What `run` found, for people."""
    machine, dataset = found["machine"], found["dataset"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rows = [
        (
            row["what"],
            str(row["million_tokens_s"]["median"]),
            f"{row['million_tokens_s']['low']} to {row['million_tokens_s']['high']}",
            f"{row['of_nanogpt']:.2f}",
            str(row["million_tokens_s_by_the_clock"]["median"]),
            row["order"],
        )
        for row in found["rows"]
    ]
    missing = [
        name for name in ("litdata", "mosaicml-streaming") if name not in machine["packages"]
    ]
    lines = [
        f"$ {found['command']}",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"Python {machine['python']}, {versions}",
        f"{dataset['megatokens']} million tokens in {dataset['shards']} shards, batches of "
        f"{feeds.BATCH} × {feeds.BLOCK} as int64, one thread; medians of {found['rounds']} rounds",
        "",
        table.as_text(HEADERS, rows),
        "",
        *(f"not installed, so not measured: {command}" for command in missing),
        table.as_text(
            ("", "found", "wanted"),
            [(mark["what"], str(mark["found"]), f"≥ {mark['wanted']}") for mark in found["marks"]],
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
