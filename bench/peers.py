"""Other projects that tokenise a corpus, each by its own documented recipe, in its own process.

    python -m bench.peers datatrove|litdata|nanogpt PARQUET PROCESSES

Prints the seconds it took, without the start of the interpreter and its imports, but with the start
of the project's own worker processes.
"""

import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from mygpt.hub.export import save_tokenizer
from shards import tokenizer

CHUNK_BYTES = "64MB"  # as litdata's own documentation has it
NANOGPT_BATCHES, NANOGPT_VAL_FRACTION = 1024, 0.0005


def seconds(name: str, parquet: Path, processes: int) -> float:
    """Run a peer on a corpus and return its seconds. Raises ValueError if it fails."""
    command = ["-m", "bench.peers", name, str(parquet), str(processes)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no output").splitlines()[-1]
        raise ValueError(f"expected {name} to run, found: {last}: see python {' '.join(command)}")
    return float(done.stdout.splitlines()[-1])


def datatrove(files: list[Path], out: Path) -> None:
    """DocumentTokenizer, one task per file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    save_tokenizer(out.parent, tokenizer.load(), block_size=1024)
    vocabulary, eos = str(out.with_name("tokenizer.json")), tokenizer.END_OF_TEXT
    steps: list[Any] = [
        ParquetReader(str(files[0].parent), glob_pattern="*.parquet"),
        DocumentTokenizer(str(out), vocabulary, eos_token=eos, shuffle_documents=False),
    ]
    logs = str(out.with_name("logs"))
    LocalPipelineExecutor(steps, len(files), workers=len(files), logging_dir=logs).run()


def litdata(files: list[Path], out: Path) -> None:
    """optimize with tiktoken, one worker per file."""
    from litdata import TokensLoader, optimize

    optimize(
        fn=_litdata_documents,
        inputs=[str(file) for file in files],
        output_dir=str(out),
        num_workers=len(files),
        chunk_bytes=CHUNK_BYTES,
        item_loader=TokensLoader(),
    )


def _litdata_documents(file: str) -> Iterator[Any]:
    import torch

    gpt2 = tokenizer.load()._reference
    for batch in pq.ParquetFile(file).iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            yield torch.tensor([*gpt2.encode_ordinary(text), gpt2.eot_token])


def nanogpt(files: list[Path], out: Path) -> None:
    """nanoGPT's recipe: `datasets` maps documents to ids; a memory map takes them all."""
    from datasets import load_dataset

    names, count = [str(file) for file in files], len(files)
    cache = str(out.with_name("cache"))
    whole = load_dataset("parquet", data_files=names, split="train", cache_dir=cache)
    splits = whole.train_test_split(test_size=NANOGPT_VAL_FRACTION, seed=0)
    mapped = splits.map(_nanogpt_ids, remove_columns=["text"], num_proc=count)
    for name, rows in mapped.items():
        total = int(np.sum(rows["len"], dtype=np.uint64))
        ids = np.memmap(out.with_name(f"{name}.bin"), np.uint16, "w+", shape=(total,))
        start = 0
        for number in range(batches := min(NANOGPT_BATCHES, len(rows))):
            batch = rows.shard(batches, number, contiguous=True).with_format("numpy")
            part = np.concatenate(list(batch["ids"]))
            ids[start : start + len(part)] = part
            start += len(part)
        ids.flush()


def _nanogpt_ids(row: dict[str, Any]) -> dict[str, Any]:
    gpt2 = tokenizer.load()._reference
    ids = [*gpt2.encode_ordinary(row["text"]), gpt2.eot_token]
    return {"ids": ids, "len": len(ids)}


def _split(parquet: Path, folder: Path, count: int) -> list[Path]:
    """Split a corpus into as many files as there are processes."""
    table, files = pq.read_table(parquet), []
    rows = -(-table.num_rows // count)
    for number in range(count):
        files.append(folder / f"{number:03d}.parquet")
        pq.write_table(table.slice(number * rows, rows), files[-1], compression="zstd")
    return files


# The package to install, if its name is another.
PACKAGES = {"nanogpt": "datasets"}
PEERS: dict[str, Callable[[list[Path], Path], None]] = {
    "datatrove": datatrove,
    "litdata": litdata,
    "nanogpt": nanogpt,
}


def main() -> None:
    """Run one peer."""
    name, parquet, processes = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "in")
        folder.mkdir()
        files = _split(Path(parquet), folder, int(processes))
        importlib.import_module(PACKAGES.get(name, name))
        tokenizer.load()
        start = time.perf_counter()
        PEERS[name](files, Path(temporary, "out"))
        taken = time.perf_counter() - start
    print()
    print(taken)


if __name__ == "__main__":
    main()
