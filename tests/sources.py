"""A small dataset of several documents and sources, one of them going on in the next shard."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.manifest import INDEX_SCHEMA, Manifest, Shard, Source, Split, TokenizerIdentity
from shards.writer import open_shard

VOCABULARY = 64
# Of each shard the documents: (source, tokens, bytes of text, goes on from the shard before).
DOCUMENTS = {
    "train": [[(0, 300, 900, False), (1, 310, 500, False)]],
    "val": [
        [(0, 40, 100, False), (0, 3, 4, False), (1, 1, 0, False), (1, 50, 90, False)],
        [(1, 21, 60, True), (1, 30, 45, False), (2, 2, 7, False)],
        [(2, 5, 11, False)],
    ],
}


def write_sources(
    folder: Path, tokenizer: TokenizerIdentity | None = None, seed: int = 0
) -> Manifest:
    """`DOCUMENTS` of random tokens; the tokenizer is one of 64 ids, eot 0, unless given."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or TokenizerIdentity("random", VOCABULARY, eot=0, hash="0" * 64)
    random = np.random.default_rng(seed)
    splits = {}
    for split, shards in DOCUMENTS.items():
        written: list[Shard] = []
        for number, documents in enumerate(shards):
            path = folder / f"{split}_{number:05d}.npy"
            with open_shard(path, written) as writer:
                for source, tokens, text_bytes, continued in documents:
                    ids = random.integers(1, VOCABULARY, tokens).astype(np.uint16)
                    if not continued:
                        ids[0] = tokenizer.eot
                    row = {"offset": writer.tokens, "source": source, "row": 0}
                    row |= {"text_bytes": text_bytes, "continued": continued}
                    writer.note(pa.RecordBatch.from_pylist([row], schema=INDEX_SCHEMA))
                    writer.write(ids)
        splits[split] = Split(tuple(written))
    sources = tuple(Source(f"part_{number}.jsonl", 1000) for number in range(3))
    Manifest(tokenizer, {"rule": "content"}, sources, splits, {}).save(folder)
    return Manifest.load(folder)
