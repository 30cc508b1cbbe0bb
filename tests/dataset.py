"""A small dataset of random tokens, written through the project's own writer."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.manifest import INDEX_SCHEMA, Manifest, Shard, Split, TokenizerIdentity
from shards.writer import open_shard

VOCABULARY = 64
LENGTHS = {"train": (1500, 1003), "val": (200, 37, 131)}


def write_dataset(
    folder: Path,
    lengths: dict[str, tuple[int, ...]] = LENGTHS,
    tokenizer: TokenizerIdentity | None = None,
    seed: int = 0,
) -> Manifest:
    """Shards of `lengths` tokens, one document each; token i follows i - 1 more often than not.

    The tokenizer is one of 64 ids that exists nowhere, unless given; eot is 0.
    """
    folder.mkdir(parents=True)
    tokenizer = tokenizer or TokenizerIdentity("random", VOCABULARY, eot=0, hash="0" * 64)
    random = np.random.default_rng(seed)
    splits = {
        split: Split(
            tuple(
                _shard(folder / f"{split}_{number:05d}.npy", tokens, tokenizer, random)
                for number, tokens in enumerate(lengths[split])
            )
        )
        for split in ("train", "val")
    }
    Manifest(tokenizer, {"rule": "content"}, (), splits, {}).save(folder)
    return Manifest.load(folder)


def _shard(
    path: Path, tokens: int, tokenizer: TokenizerIdentity, random: np.random.Generator
) -> Shard:
    steps = np.where(random.random(tokens) < 0.7, 1, random.integers(0, VOCABULARY, tokens))
    ids = np.cumsum(steps) % VOCABULARY
    ids[0] = tokenizer.eot
    row = {"offset": 0, "source": 0, "row": 0, "text_bytes": 3 * tokens, "continued": False}
    result: list[Shard] = []
    with open_shard(path, result) as writer:
        writer.write(ids.astype(np.uint16))
        writer.note(pa.RecordBatch.from_pylist([row], schema=INDEX_SCHEMA))
    return result[0]
