"""Ways to feed a model with rows of tokens: ours, and those it is measured against.

Each takes the folder that `build` made and yields (x, y), int64, (BATCH, BLOCK), without end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.lib.stride_tricks import sliding_window_view

from shards.loader import TokenLoader
from shards.manifest import Manifest, Shard, Source, Split, TokenizerIdentity
from shards.reader import ShardReader
from shards.writer import INDEX_SCHEMA, open_shard

BATCH, BLOCK = 16, 1024
Batch = tuple[torch.Tensor, torch.Tensor]


def build(folder: Path, tokens: int, shards: int) -> None:
    """A dataset of random tokens, and the same tokens in one file as nanoGPT has them."""
    rng = np.random.default_rng(0)
    made: dict[str, list[Shard]] = {"train": [], "val": []}
    with open(folder / "train.bin", "wb") as binary:
        for side, number in [*(("train", n) for n in range(shards)), ("val", 0)]:
            size = tokens // shards if side == "train" else 2 * BLOCK
            ids = rng.integers(0, 50257, size).astype(np.uint16)
            with open_shard(folder / f"{side}_{number:05d}.npy", made[side], False) as writer:
                writer.write(ids)
                document = [[0], [0], [number], [0], [False]]
                writer.note(pa.record_batch(document, schema=INDEX_SCHEMA))
            if side == "train":
                binary.write(ids.data)
    identity = TokenizerIdentity("gpt2", 50257, 50256, "0" * 64)
    counts = dict.fromkeys(("read", "written"), shards + 1)
    splits = {side: Split(tuple(parts)) for side, parts in made.items()}
    Manifest(identity, {"rule": "hash"}, (Source("random", tokens),), splits, counts).save(folder)


def ours(folder: Path, device: str = "cpu") -> Iterator[Batch]:
    """The loader of this project."""
    return TokenLoader(folder, "train", BATCH, BLOCK, device=device)


def nanogpt(folder: Path) -> Iterator[Batch]:
    """As nanoGPT does it: random places with replacement, each row widened by itself, stacked.

    The memory map is made anew for every batch, as there, since it would else seem to leak.
    """
    while True:
        data = np.memmap(folder / "train.bin", np.uint16, "r")
        starts = torch.randint(len(data) - BLOCK, (BATCH,))
        x = [torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts]
        y = [torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts]
        yield torch.stack(x), torch.stack(y)


def strided(folder: Path) -> Iterator[Batch]:
    """What NumPy can do at best: all windows of one file as a view, rows taken, widened at once."""
    data = np.asarray(np.memmap(folder / "train.bin", np.uint16, "r"))
    windows = sliding_window_view(data, BLOCK + 1)[::BLOCK]
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(windows))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = torch.from_numpy(windows[order[first : first + BATCH]]).long()
            yield rows[:, :-1], rows[:, 1:]


class _Windows(torch.utils.data.Dataset[Batch]):
    """The windows of all shards, taken a batch at a time."""

    def __init__(self, folder: Path) -> None:
        self._reader = ShardReader(Manifest.load(folder), "train")
        windows = [shard.windows(BLOCK) for shard in self._reader.shards]
        self._ends = np.cumsum(windows)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        rows = np.empty((len(indices), BLOCK + 1), np.uint16)
        shards = np.searchsorted(self._ends, indices, side="right")
        firsts = np.concatenate([[0], self._ends])[shards]
        starts = (np.array(indices) - firsts) * BLOCK
        for row, shard, start in zip(rows, shards.tolist(), starts.tolist(), strict=True):
            row[:] = self._reader.tokens(shard)[start : start + BLOCK + 1]
        return torch.from_numpy(rows).long()


def torch_loader(folder: Path) -> Iterator[Batch]:
    """torch's DataLoader over the same shards, a permutation of their windows each epoch."""
    loader: Any = torch.utils.data.DataLoader(
        _Windows(folder), BATCH, shuffle=True, drop_last=True, collate_fn=lambda rows: rows
    )
    while True:
        for rows in loader:
            yield rows[:, :-1], rows[:, 1:]


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
        for rows in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0):
            rows = rows.long()
            yield rows[:, :-1], rows[:, 1:]


def _litdata_tokens(file: str) -> Iterator[torch.Tensor]:
    yield torch.from_numpy(np.load(file).astype(np.int32))


def streaming(folder: Path) -> Iterator[Batch]:
    """MosaicML Streaming's MDS, a row a sample, shuffled."""
    from streaming import MDSWriter, StreamingDataset

    samples = folder / "mds"
    if not samples.exists():
        columns = {"tokens": f"ndarray:uint16:{BLOCK + 1}"}
        windows = sliding_window_view(np.fromfile(folder / "train.bin", np.uint16), BLOCK + 1)
        with MDSWriter(out=str(samples), columns=columns) as out:
            for row in windows[::BLOCK]:
                out.write({"tokens": row})
    dataset = StreamingDataset(local=str(samples), shuffle=True, batch_size=BATCH)
    loader: Any = torch.utils.data.DataLoader(dataset, BATCH, drop_last=True, collate_fn=_stacked)
    while True:
        for rows in loader:
            yield rows[:, :-1], rows[:, 1:]


def _stacked(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples])).long()
