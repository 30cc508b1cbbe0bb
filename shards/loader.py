"""The rank-aware streaming loader: token windows of one split in one global, seeded order.

There is one stream of windows, a function of the dataset, the seed and the block size. A position
counted in windows says where in it a run is; ranks are offsets. World size, micro-batch and
accumulation only decide who reads which row, so any of them may change on resume (promise 5).
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.manifest import Manifest
from shards.order import ORDER_VERSION, key_of, permute
from shards.reader import ShardReader

STATE_VERSION = 1
# Rows whose places are worked out at once: the permutation's cost per call is that of one row.
PLANNED_ROWS = 4096


class TokenLoader(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """Endless iterator of (x, y), each (batch_size, block_size) int64 on `device`.

    y is x one token later. Together the ranks' k-th batches hold the windows
    [k * batch_size * world_size, (k + 1) * batch_size * world_size) of the stream; rank r holds
    its r-th part. Every window of the split is served once an epoch; batches may straddle epochs.

    Raises FileNotFoundError or ValueError for a dataset that is missing, altered or shorter than
    one block, and ValueError for sizes and ranks that can't be.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        batch_size: int,
        block_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
        generation: int | None = None,
    ) -> None:
        if min(batch_size, block_size, world_size) < 1 or not 0 <= rank < world_size or seed < 0:
            raise ValueError(
                "expected batch_size, block_size, world_size >= 1, 0 <= rank < world_size and "
                f"seed >= 0, found {batch_size}, {block_size}, {world_size}, {rank} and {seed}"
            )
        manifest = Manifest.load(folder, generation)
        self._reader = ShardReader(manifest, split)
        self.split, self.seed = split, seed
        self.batch_size, self.block_size = batch_size, block_size
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        tokens = np.array([shard.tokens for shard in self._reader.shards], np.int64)
        windows = np.array([shard.windows(block_size) for shard in self._reader.shards], np.int64)
        self._ends = np.cumsum(windows)
        self._slack = np.maximum(tokens - 1 - windows * block_size, 0)
        self.windows_per_epoch = int(self._ends[-1])
        self.unused_tokens = int((tokens - np.where(windows, windows * block_size + 1, 0)).sum())
        if not self.windows_per_epoch:
            raise ValueError(
                f"expected a {split} shard with more than {block_size} tokens in {folder}, found "
                f"at most {tokens.max()}: prepare more text, or use a shorter --block-size, "
                "or choose the validation text by --split position, --val-fraction or --val-source"
            )
        self.manifest = manifest
        self._position = 0
        self._planned: deque[tuple[list[int], list[int]]] = deque()

    @property
    def epoch(self) -> float:
        """How often the split has been served so far."""
        return self._position / self.windows_per_epoch

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._planned:
            self._plan()
        shards, starts = self._planned.popleft()
        rows = np.empty((self.batch_size, self.block_size + 1), np.uint16)
        for row, (shard, start) in enumerate(zip(shards, starts, strict=True)):
            rows[row] = self._reader.tokens(shard)[start : start + self.block_size + 1]
        self._position += self.batch_size * self.world_size
        window = self._widen(rows)  # (B, T + 1)
        return window[:, :-1], window[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last batch handed out: JSON, one position in windows."""
        return {
            "version": STATE_VERSION,
            "order": ORDER_VERSION,
            "fingerprint": self.manifest.fingerprint,
            "generation": self.manifest.generation,
            "split": self.split,
            "seed": self.seed,
            "block_size": self.block_size,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state's position. Raises ValueError when the state is of another stream."""
        own = self.state_dict()
        for name in own:
            if name != "position" and state.get(name) != own[name]:
                raise ValueError(
                    f"expected a loader state with {name} {own[name]}, found {state.get(name)}: "
                    "resume with the dataset and the settings that the run began with"
                )
        self._position = int(state["position"])
        self._planned.clear()

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, first token) of the stream's windows at `positions`, each int64 (n,)."""
        epochs, indices = np.divmod(positions.astype(np.int64), self.windows_per_epoch)
        keys = key_of(self.seed, epochs)
        windows = permute(indices, self.windows_per_epoch, keys).astype(np.int64)
        shards = np.searchsorted(self._ends, windows, side="right")
        within = windows - np.where(shards > 0, self._ends[shards - 1], 0)
        # The tokens that no window holds are others in each epoch: the first window begins
        # anywhere within them, so that block boundaries move too.
        phases = key_of(self.seed, epochs, shards) % (self._slack[shards] + 1).astype(np.uint64)
        return shards, within * self.block_size + phases.astype(np.int64)

    def _plan(self) -> None:
        """Work out the places of this rank's rows in the next batches."""
        batches = max(1, PLANNED_ROWS // self.batch_size)
        firsts = np.arange(batches) * (self.batch_size * self.world_size)
        own = self._position + self.rank * self.batch_size + np.arange(self.batch_size)
        shards, starts = self.locate((firsts[:, None] + own).ravel())
        shape = (batches, self.batch_size)
        self._planned.extend(
            zip(shards.reshape(shape).tolist(), starts.reshape(shape).tolist(), strict=True)
        )

    def _widen(self, rows: np.ndarray) -> torch.Tensor:
        """(B, T + 1) uint16 rows as int64 on the device; two bytes a token cross the bus."""
        if self.device.type == "cpu":
            return torch.from_numpy(rows.astype(np.int64))
        # Not every device computes with uint16, so the same bits travel as int16.
        narrow = torch.from_numpy(rows.view(np.int16))
        if self.device.type == "cuda":
            narrow = narrow.pin_memory()
        return narrow.to(self.device, non_blocking=True).long() & 0xFFFF
