"""Datasets whose every token is known, written through the project's own writer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from shards import tokenizer
from shards.manifest import INDEX_SCHEMA, Manifest, Shard, Source, Split, TokenizerIdentity
from shards.writer import open_shard

# A document of the index: (offset, source, row, text_bytes, continued).
Row = tuple[int, int, int, int, bool]

# The ids of `arange_dataset` say where in the dataset a token lies, so all of uint16 is used.
PLACES = TokenizerIdentity("places", 1 << 16, (1 << 16) - 1, "0" * 64)


def write_shard(folder: Path, name: str, ids: ArrayLike, rows: Sequence[Row]) -> Shard:
    """One shard and its index."""
    done: list[Shard] = []
    with open_shard(folder / f"{name}.npy", done) as writer:
        writer.write(np.asarray(ids, np.int64))
        columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * len(INDEX_SCHEMA)
        writer.note(pa.record_batch(columns, schema=INDEX_SCHEMA))
    return done[0]


def write_manifest(
    folder: Path,
    splits: Mapping[str, Sequence[Shard]],
    identity: TokenizerIdentity = PLACES,
    sources: Sequence[Source] = (Source("made/for.test", 1),),
) -> Manifest:
    """The manifest of these shards, saved and read back."""
    written = sum(shard.documents for shards in splits.values() for shard in shards)
    Manifest(
        tokenizer=identity,
        split_rule={"rule": "hash", "val_fraction": 0.1},
        sources=tuple(sources),
        splits={name: Split(tuple(splits.get(name, ()))) for name in ("train", "val")},
        counts={"read": written, "written": written, "empty": 0, "quarantined": 0},
    ).save(folder)
    return Manifest.load(folder)


def write_dataset(
    folder: Path,
    splits: Mapping[str, Sequence[ArrayLike]],
    identity: TokenizerIdentity = PLACES,
) -> Manifest:
    """A dataset of these token ids: per split a shard for each array, holding one document."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {
        split: [
            write_shard(folder, f"{split}_{number:05d}", ids, [(0, 0, number, 0, False)])
            for number, ids in enumerate(arrays)
        ]
        for split, arrays in splits.items()
    }
    return write_manifest(folder, shards, identity)


def arange_dataset(folder: Path, train: Sequence[int], val: Sequence[int] = (2,)) -> Manifest:
    """Shards of these lengths whose ids count on from 0, so that no id occurs twice."""
    ends = np.cumsum([*train, *val])
    assert ends[-1] <= PLACES.n_vocab
    arrays = np.split(np.arange(ends[-1]), ends[:-1])
    return write_dataset(folder, {"train": arrays[: len(train)], "val": arrays[len(train) :]})


def text_dataset(
    folder: Path, train: Sequence[Sequence[str]], val: Sequence[Sequence[str]] = (("v",),)
) -> Manifest:
    """Shards of these documents in GPT-2's tokens, each after its `<|endoftext|>`.

    Every shard is its own source, a document's row its place in the shard.
    """
    gpt2 = tokenizer.load()
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[Shard]] = {"train": [], "val": []}
    sources = []
    for split, documents in (*(("train", d) for d in train), *(("val", d) for d in val)):
        name = f"{split}_{len(shards[split]):05d}"
        ids = [[gpt2.eot, *gpt2.encode(text)] for text in documents]
        rows = list(_rows(ids, documents, len(sources)))
        shards[split].append(
            write_shard(folder, name, [token for document in ids for token in document], rows)
        )
        sources.append(Source(f"texts/{name}", sum(len(text.encode()) for text in documents)))
    identity = gpt2.identity
    return write_manifest(folder, shards, identity, sources)


def _rows(ids: Sequence[list[int]], documents: Sequence[str], source: int) -> Iterator[Row]:
    offset = 0
    for row, (document, text) in enumerate(zip(ids, documents, strict=True)):
        yield offset, source, row, len(text.encode()), False
        offset += len(document)


def grown(manifest: Manifest, generations: Sequence[int]) -> Manifest:
    """The same dataset, saved anew with its train shards said to be of these generations."""
    shards = zip(manifest.splits["train"].shards, generations, strict=True)
    train = Split(tuple(replace(shard, generation=generation) for shard, generation in shards))
    folder = manifest.folder
    splits = manifest.splits | {"train": train}
    replace(manifest, generation=max(generations), splits=splits).save(folder)
    return Manifest.load(folder)
