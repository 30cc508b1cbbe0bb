"""A split in another vocabulary: the same documents, for a model that has other tokens.

Bits per byte of two vocabularies can be compared, document by document, since the text is the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards.manifest import Manifest, Shard, Split
from shards.reader import open_tokens, read_index
from shards.tokenizer import Tokenizer, open_tokenizer
from shards.writer import open_shard


def retokenize(
    manifests: Sequence[Manifest], split: str, tokenizer: Tokenizer, folder: Path
) -> list[Manifest]:
    """Write a split of datasets into `folder` in another vocabulary; return the manifests there.

    Shards and rows of their indexes stay what they are. Raises ValueError for tokens that are not
    UTF-8 text, and as `open_tokenizer` does.
    """
    written = []
    for number, manifest in enumerate(manifests):
        vocabulary = np.array(
            open_tokenizer(manifest.tokenizer, manifest.location).vocabulary(), object
        )
        place, shards = folder / str(number), list[Shard]()
        place.mkdir()
        for shard in manifest.splits[split].shards:
            _rewrite(manifest, shard, vocabulary, tokenizer, place, shards)
        splits = {split: Split(tuple(shards))}
        identity = tokenizer.identity
        written.append(replace(manifest, tokenizer=identity, splits=splits, folder=place, uri=""))
    return written


def _rewrite(
    manifest: Manifest,
    shard: Shard,
    vocabulary: np.ndarray,
    tokenizer: Tokenizer,
    place: Path,
    shards: list[Shard],
) -> None:
    """Write one shard; `vocabulary`, (n_vocab,), holds the bytes of each id that it has now."""
    index, tokens = read_index(manifest, shard), open_tokens(manifest, shard)
    bounds = pairwise([*index["offset"].to_pylist(), len(tokens)])
    offsets = []
    with open_shard(place / shard.file, shards) as writer:
        for (start, end), continued in zip(bounds, index["continued"].to_pylist(), strict=True):
            try:
                text = b"".join(vocabulary[tokens[start:end]]).decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"expected UTF-8 from token {start} of {manifest.location_of(shard.file)} on, "
                    f"found {error.reason}: a model of another vocabulary can't read it; leave out "
                    "--reference"
                ) from None
            offsets.append(writer.tokens)
            writer.write(np.array([] if continued else [tokenizer.eot], np.uint16))
            writer.write(np.array(tokenizer.encode(text), np.uint32))
        moved = index.set_column(0, index.schema.field(0), pa.array(offsets, pa.int64()))
        for batch in moved.to_batches():
            writer.note(batch)
