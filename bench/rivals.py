"""What prepare is measured against: the encoder by itself, and the plain ways of doing the work.

Each returns millions of bytes of text a second, the start of processes and encoders left out.
"""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken

from shards import tokenizer

_barrier: Barrier


def encoder(parquet: Path, processes: int) -> float:
    """gigatoken in so many processes, from Arrow text in memory to uint16 in memory: the ceiling.

    Each has its row groups in memory and its encoder ready before the clock starts for all.
    """
    return _together(_encode_in_memory, parquet, processes)


def tiktoken_pool(parquet: Path, processes: int) -> float:
    """The plain pool: row groups to processes, each with files of its own, by tiktoken."""
    return _together(_encode_to_files, parquet, processes)


def _together(work: Callable[[Path, int, int], tuple[int, float]], path: Path, n: int) -> float:
    """Text per second of `work` in n processes that begin at the same time."""
    context = _context()
    with context.Pool(n, _meet_at, (context.Barrier(n),)) as pool:
        done = pool.starmap(work, [(path, share, n) for share in range(n)], chunksize=1)
    return sum(size for size, _ in done) / 1e6 / max(seconds for _, seconds in done)


def _context() -> Any:
    return multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def _meet_at(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _encode_in_memory(parquet: Path, share: int, shares: int) -> tuple[int, float]:
    """(bytes, seconds) of one process: every so-many-th row group."""
    encode = tokenizer.load()._fast.encode_batch
    with pq.ParquetFile(parquet) as file:
        groups = range(share, file.num_row_groups, shares)
        texts = [file.read_row_group(i, ["text"])["text"].combine_chunks() for i in groups]
    batches = [_awkward(text) for text in texts]
    encode(_awkward(pa.array(["warm"])), parallel=False)
    _barrier.wait()
    start = time.perf_counter()
    for batch in batches:
        np.asarray(encode(batch, parallel=False).layout.content.data).astype(np.uint16)
    return sum(map(_size, texts)), time.perf_counter() - start


def _size(texts: pa.Array) -> int:
    """UTF-8 bytes of Arrow text."""
    offsets, _ = tokenizer.string_buffers(texts)
    return int(offsets[-1] - offsets[0])


def _awkward(texts: pa.Array) -> Any:
    """Arrow text as gigatoken takes it, in the same memory."""
    import awkward as ak

    offsets, content = tokenizer.string_buffers(texts)
    characters = ak.contents.NumpyArray(content, parameters={"__array__": "char"})
    return ak.Array(
        ak.contents.ListOffsetArray(
            ak.index.Index64(offsets), characters, parameters={"__array__": "string"}
        )
    )


def _encode_to_files(parquet: Path, share: int, shares: int) -> tuple[int, float]:
    """(bytes, seconds) of one process: reads every so-many-th row group and writes its tokens."""
    gpt2, size = _tiktoken(), 0
    with tempfile.TemporaryDirectory() as folder, pq.ParquetFile(parquet) as file:
        _barrier.wait()
        start = time.perf_counter()
        for group in range(share, file.num_row_groups, shares):
            ids: list[int] = []
            texts = file.read_row_group(group, ["text"])["text"].combine_chunks()
            for text in texts.to_pylist():
                ids.append(gpt2.eot_token)
                ids += gpt2.encode_ordinary(text)
            np.array(ids, np.uint16).tofile(Path(folder, f"{group}.bin"))
            size += _size(texts)
        return size, time.perf_counter() - start


def _tiktoken() -> tiktoken.Encoding:
    """tiktoken's own encoding; what is loaded once, forked processes have too."""
    return tokenizer.load()._reference
