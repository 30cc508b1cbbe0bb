"""A manifest of many shards: how large it is, and how long it and a loader on it take to open.

    python -m bench.scale [--shards 150000] [--json]

The shards are described and named, not written: only their names are looked at when a loader is
opened, files are opened one by one as training comes to them.
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from shards.loader import TokenLoader
from shards.manifest import FILE_NAME, Manifest, Shard, Source, Split, TokenizerIdentity

TOKENS_PER_SHARD = 100_000_000
BLOCK_SIZE = 1024
BATCH_SIZE = 512


@dataclass(frozen=True)
class Options:
    """Measure a simulated dataset."""

    shards: int = 150_000
    """Training shards of 100M tokens; a ninth as many validation shards come with them."""
    json: bool = False
    """Print one JSON object."""


def main() -> None:
    """Simulate, measure, print."""
    options = tyro.cli(Options, prog="python -m bench.scale")
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), options.shards)
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:28} {value:,.2f}")


def measure(folder: Path, shards: int) -> dict[str, float]:
    """The figures for a dataset of that many training shards, times in seconds."""
    simulated = simulate(shards)
    save_seconds = timed(lambda: simulated.save(folder))
    for shard in simulated.splits["train"].shards:
        (folder / shard.file).touch()
    load_seconds = timed(lambda: Manifest.load(folder))
    loader = TokenLoader(folder, "train", BATCH_SIZE, BLOCK_SIZE)
    open_seconds = timed(lambda: TokenLoader(folder, "train", BATCH_SIZE, BLOCK_SIZE))
    positions = np.arange(BATCH_SIZE) + 10**9
    return {
        "shards": shards,
        "tokens_in_billions": simulated.splits["train"].tokens / 1e9,
        "manifest_megabytes": (folder / FILE_NAME).stat().st_size / 1e6,
        "manifest_save_seconds": save_seconds,
        "manifest_load_seconds": load_seconds,
        "loader_open_seconds": open_seconds,
        "locate_batch_milliseconds": 1e3 * timed(lambda: loader.locate(positions)),
        "peak_memory_megabytes": _peak_memory() / 1e6,
    }


def simulate(shards: int) -> Manifest:
    """The manifest of a dataset with `shards` training shards of about 100M tokens."""
    rng = np.random.default_rng(0)

    def split(side: str, count: int) -> Split:
        sizes = rng.integers(TOKENS_PER_SHARD * 9 // 10, TOKENS_PER_SHARD, count).tolist()
        return Split(tuple(_shard(side, i, size) for i, size in enumerate(sizes)))

    return Manifest(
        tokenizer=TokenizerIdentity("gpt2", 50257, 50256, "0" * 64),
        split_rule={"rule": "hash", "val_fraction": 0.1},
        sources=tuple(Source(f"web/part-{i:06d}.parquet", 10**9) for i in range(shards // 3)),
        splits={"train": split("train", shards), "val": split("val", -(-shards // 9))},
        counts={"read": shards, "written": shards, "empty": 0, "quarantined": 0, "duplicates": 0},
    )


def _shard(side: str, number: int, tokens: int) -> Shard:
    name = f"{side}_{number:05d}"
    hashes = f"{number:064x}"
    return Shard(f"{name}.npy", f"{name}.docs.parquet", tokens, 100_000, 4 * tokens, hashes, hashes)


def timed(call: object) -> float:
    """Seconds that a call takes."""
    assert callable(call)
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _peak_memory() -> int:
    """Bytes that the process had resident at most; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
