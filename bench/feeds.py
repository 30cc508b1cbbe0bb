"""Ways of feeding a model with sequences of tokens: ours, and those it is compared with.

Each takes the folder that `build` filled and yields (x, y), int64, (BATCH, BLOCK), without end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.stride_tricks import sliding_window_view

from shards.loader import TokenLoader
from shards.manifest import INDEX_SCHEMA, Manifest, Shard, Source, Split, TokenizerIdentity
from shards.reader import ShardReader
from shards.writer import open_shard

BATCH, BLOCK = 16, 1024
Batch = tuple[torch.Tensor, torch.Tensor]


def build(folder: Path, tokens: int, shards: int, vocab_size: int = 50257) -> None:
    """Write a dataset of random tokens, and the training tokens in one file as nanoGPT has them."""
    rng = np.random.default_rng(0)
    written: dict[str, list[Shard]] = {"train": [], "val": []}
    with open(folder / "train.bin", "wb") as binary:
        for split, number in [*(("train", n) for n in range(shards)), ("val", 0)]:
            size = tokens // shards if split == "train" else 2 * BLOCK
            ids = rng.integers(0, vocab_size, size).astype(np.uint16)
            with open_shard(folder / f"{split}_{number:05d}.npy", written[split]) as writer:
                writer.write(ids)
                document = [[0], [0], [number], [0], [False]]
                writer.note(pa.record_batch(document, schema=INDEX_SCHEMA))
            if split == "train":
                binary.write(ids.data)
    identity = TokenizerIdentity("gpt2", vocab_size, vocab_size - 1, "0" * 64)
    counts = dict.fromkeys(("read", "written"), shards + 1)
    splits = {split: Split(tuple(parts)) for split, parts in written.items()}
    Manifest(identity, {"rule": "hash"}, (Source("random", tokens),), splits, counts).save(folder)


def ours(folder: Path) -> Iterator[Batch]:
    """This project's loader."""
    return TokenLoader(folder, "train", BATCH, BLOCK)


def ours_on_gpu(folder: Path) -> Iterator[Batch]:
    """This project's loader, with its batches on a GPU."""
    return TokenLoader(folder, "train", BATCH, BLOCK, device="cuda")


def nanogpt(folder: Path) -> Iterator[Batch]:
    """nanoGPT's get_batch: random starts with replacement, each sequence converted by itself.

    The memory map is opened anew for every batch, as nanoGPT does to avoid a memory leak.
    """
    while True:
        data = np.memmap(folder / "train.bin", np.uint16, "r")
        starts = torch.randint(len(data) - BLOCK, (BATCH,))
        x = [torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts]
        y = [torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts]
        yield torch.stack(x), torch.stack(y)


def strided(folder: Path) -> Iterator[Batch]:
    """NumPy's upper bound: all windows of one file as a strided view, gathered and converted."""
    data = np.asarray(np.memmap(folder / "train.bin", np.uint16, "r"))
    windows = sliding_window_view(data, BLOCK + 1)[::BLOCK]
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(windows))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            sequences = torch.from_numpy(windows[order[first : first + BATCH]]).long()
            yield sequences[:, :-1], sequences[:, 1:]


class _Windows(torch.utils.data.Dataset[Batch]):
    """The windows of all shards, fetched a batch at a time."""

    def __init__(self, folder: Path) -> None:
        self._reader = ShardReader(Manifest.load(folder), "train")
        windows = [shard.windows(BLOCK) for shard in self._reader.shards]
        self._ends = np.cumsum(windows)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        sequences = np.empty((len(indices), BLOCK + 1), np.uint16)
        shards = np.searchsorted(self._ends, indices, side="right")
        firsts = np.concatenate([[0], self._ends])[shards]
        starts = (np.array(indices) - firsts) * BLOCK
        for sequence, shard, start in zip(sequences, shards.tolist(), starts.tolist(), strict=True):
            sequence[:] = self._reader.tokens(shard)[start : start + BLOCK + 1]
        return torch.from_numpy(sequences).long()


def torch_loader(folder: Path) -> Iterator[Batch]:
    """torch's DataLoader over the same shards, a new permutation of their windows each epoch."""
    loader: Any = torch.utils.data.DataLoader(
        _Windows(folder),
        BATCH,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda sequences: sequences,
    )
    while True:
        for sequences in loader:
            yield sequences[:, :-1], sequences[:, 1:]


def litdata(folder: Path) -> Iterator[Batch]:
    """litdata's TokensLoader over chunks of 64 MB, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    chunks = folder / "litdata"
    if not chunks.exists():
        optimize(
            fn=_litdata_tokens,
            inputs=[str(path) for path in sorted(folder.glob("train_*.npy"))],
            output_dir=str(chunks),
            num_workers=1,
            chunk_bytes="64MB",
            item_loader=TokensLoader(),
        )
    loader = TokensLoader(block_size=BLOCK + 1)
    dataset = StreamingDataset(str(chunks), item_loader=loader, shuffle=True, drop_last=True)
    while True:
        for sequences in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0):
            sequences = sequences.long()
            yield sequences[:, :-1], sequences[:, 1:]


def _litdata_tokens(file: str) -> Iterator[torch.Tensor]:
    yield torch.from_numpy(np.load(file).astype(np.int32))
