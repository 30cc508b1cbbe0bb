"""Speed of the loader, beside other ways of reading sequences of tokens from disk.

    python -m bench.loader

Batches of 16 sequences of 1,024 tokens as int64, everything in the page cache, one thread.
Rates are tokens per second of the process's CPU time, which other work on the machine changes less
than the time on the clock; that stands beside it.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bench import feeds, table, worker

PACKAGES = ("torch", "numpy", "litdata")
OURS, NANOGPT = "this loader", "nanoGPT's get_batch"
ON_GPU = "this loader, to a GPU"
COLUMNS: table.Columns = {
    "": ("what", ""),
    "M tokens/core-s": ("million_tokens_s", ""),
    "low to high": ("million_tokens_s", ""),
    "× nanoGPT": ("of_nanogpt", ".2f"),
    "by the clock": ("million_tokens_s_by_the_clock", ""),
    "order": ("order", ""),
}
# Enough to fill any read-ahead; then so many batches between two looks at the clock.
WARM_BATCHES, TIMED_AT_ONCE = 600, 20


@dataclass(frozen=True)
class Options:
    """Measure the loader beside others."""

    megatokens: int = 64
    """Size of the dataset, in millions of tokens."""
    shards: int = 64
    """Shards of the dataset."""
    seconds: float = 1.0
    """Length of a turn."""
    rounds: int = 5
    """How often each contender is measured."""
    peers: bool = True
    """Measure other projects too, where they are installed (the extra bench)."""
    json: bool = False
    """Print one JSON object on one line."""


@dataclass(frozen=True)
class Contender:
    """One way of reading, the order in which it serves sequences, and the module it needs."""

    feed: Callable[[Path], Iterator[feeds.Batch]]
    order: str
    module: str = "torch"


CONTENDERS = {
    OURS: Contender(feeds.ours, "random, over all shards"),
    ON_GPU: Contender(feeds.ours_on_gpu, "random, over all shards"),
    "a strided view": Contender(feeds.strided, "random, in one file"),
    "torch's DataLoader": Contender(feeds.torch_loader, "random, over all shards"),
    NANOGPT: Contender(feeds.nanogpt, "random, with replacement"),
    "litdata": Contender(feeds.litdata, "shuffled by chunks", "litdata"),
}


def main() -> None:
    """Run the command."""
    table.command("loader", Options, run, as_text, __doc__ or "")


def run(options: Options) -> dict[str, Any]:
    """Everything that was measured, as JSON. Raises ValueError for options out of range."""
    if min(options.megatokens, options.shards, options.seconds, options.rounds) <= 0:
        raise ValueError("expected --megatokens, --shards, --seconds and --rounds above 0")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        feeds.build(folder, options.megatokens * 10**6, options.shards)
        names = [name for name in CONTENDERS if is_measured(name, options)]
        makers = {name: (turns_of, name, folder, options.seconds) for name in names}
        records, failed = worker.measure(makers, options.rounds)
    return {
        "machine": table.machine("loader", PACKAGES),
        "dataset": {"megatokens": options.megatokens, "shards": options.shards},
        "rounds": options.rounds,
        "rows": [row(records, name) for name in records],
        "failed": failed,
    }


def row(records: Mapping[str, list[table.Record]], name: str) -> dict[str, Any]:
    """A row of the table."""
    rates = table.column(records[name], "million_tokens_s")
    beside = table.column(records.get(NANOGPT, []), "million_tokens_s")
    return {
        "what": name,
        "million_tokens_s": table.spread(rates),
        "million_tokens_s_by_the_clock": table.spread(table.column(records[name], "by_the_clock")),
        "of_nanogpt": table.ratio(rates, beside),
        "order": CONTENDERS[name].order,
    }


def is_measured(name: str, options: Options) -> bool:
    """True if the contender can run here: with a GPU, or with another project's package."""
    if name == ON_GPU and not torch.cuda.is_available():
        return False
    module = CONTENDERS[name].module
    return module == "torch" or (options.peers and importlib.util.find_spec(module) is not None)


def turns_of(name: str, folder: Path, seconds: float) -> worker.Turn:
    """Start a contender in this process, read ahead, and return its turns."""
    torch.set_num_threads(1)
    feed = CONTENDERS[name].feed(folder)
    next(islice(feed, WARM_BATCHES, None))
    return lambda: rates_of(feed, seconds, on_gpu=name == ON_GPU)


def rates_of(feed: Iterator[Any], seconds: float, on_gpu: bool = False) -> dict[str, float]:
    """Millions of tokens per second of CPU time and by the clock, over at least so many seconds."""
    batches, elapsed = 0, 0.0
    start, start_cpu = time.perf_counter(), time.process_time()
    while not batches or elapsed < seconds:
        for _ in islice(feed, TIMED_AT_ONCE):
            batches += 1
        if on_gpu:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    tokens = batches * feeds.BATCH * feeds.BLOCK / 1e6
    cpu_seconds = time.process_time() - start_cpu
    return {"million_tokens_s": tokens / cpu_seconds, "by_the_clock": tokens / elapsed}


def as_text(results: Mapping[str, Any]) -> str:
    """The results of `run` for people."""
    dataset = results["dataset"]
    return table.page(
        results,
        f"{dataset['megatokens']} million tokens in {dataset['shards']} shards, batches of "
        f"{feeds.BATCH} × {feeds.BLOCK} as int64; medians of {results['rounds']} rounds",
        COLUMNS,
    )


if __name__ == "__main__":
    main()
