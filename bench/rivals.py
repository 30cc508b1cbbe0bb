"""Lower and upper bound for prepare: a plain pool of tiktoken processes, and the encoder alone.

Each returns millions of bytes of text per second, without the start of processes and encoders.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import tokenizer
from shards.encoder import string_buffers

_barrier: Barrier


def encoder(parquet: Path, processes: int) -> float:
    """gigatoken in so many processes, from Arrow text in memory to uint16 in memory.

    Each process has its row groups in memory and its encoder ready before the clock starts for all.
    """
    return _together(_encode_in_memory, parquet, processes)


def tiktoken_pool(parquet: Path, processes: int) -> float:
    """A plain pool of tiktoken processes, which share the row groups; one file for each."""
    return _together(_encode_to_files, parquet, processes)


def _together(encode: Callable[[Path, int, int], tuple[int, float]], path: Path, n: int) -> float:
    """Text per second of `encode` in n processes that start at the same time."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(n, _set_barrier, (context.Barrier(n),)) as pool:
        done = pool.starmap(encode, [(path, share, n) for share in range(n)], chunksize=1)
    return sum(size for size, _ in done) / 1e6 / max(seconds for _, seconds in done)


def _set_barrier(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _encode_in_memory(parquet: Path, share: int, shares: int) -> tuple[int, float]:
    """(bytes, seconds) of one process, for every `shares`-th row group."""
    fast = tokenizer.load()._fast
    with pq.ParquetFile(parquet) as file:
        groups = range(share, file.num_row_groups, shares)
        texts = [_texts(file, group) for group in groups]
    assert fast is not None
    fast.encode_batch(pa.array(["warm"]))
    _barrier.wait()
    start = time.perf_counter()
    for text in texts:
        fast.encode_batch(text)[0].astype(np.uint16)
    return sum(map(_size, texts)), time.perf_counter() - start


def _texts(file: pq.ParquetFile, group: int) -> pa.Array:
    return file.read_row_group(group, ["text"])["text"].combine_chunks()


def _size(texts: pa.Array) -> int:
    """UTF-8 bytes of Arrow text."""
    offsets, _ = string_buffers(texts)
    return int(offsets[-1] - offsets[0])


def _encode_to_files(parquet: Path, share: int, shares: int) -> tuple[int, float]:
    """(bytes, seconds) of one process: read every `shares`-th row group and write its tokens."""
    gpt2, size = tokenizer.load()._reference, 0
    with tempfile.TemporaryDirectory() as folder, pq.ParquetFile(parquet) as file:
        _barrier.wait()
        start = time.perf_counter()
        for group in range(share, file.num_row_groups, shares):
            ids: list[int] = []
            texts = _texts(file, group)
            for text in texts.to_pylist():
                ids.append(gpt2.eot_token)
                ids += gpt2.encode_ordinary(text)
            np.array(ids, np.uint16).tofile(Path(folder, f"{group}.bin"))
            size += _size(texts)
        return size, time.perf_counter() - start
