"""Checks of every byte of a dataset against its manifest."""

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import cast

import numpy as np

from shards.manifest import Manifest, Shard, Split
from shards.reader import open_file, open_tokens, read_index


def verify(manifest: Manifest) -> Iterator[tuple[Shard, list[str]]]:
    """Yield each shard of the dataset, in order, with its faults and its index's, a line each.

    Hashing and NumPy release the interpreter's lock, so as many threads read as there are cores.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(shards, pool.map(lambda shard: faults(manifest, shard), shards), strict=True)


def check(manifest: Manifest, split: str, part: slice = slice(None)) -> None:
    """Raise ValueError for the first faulty shard of a split, or of a part of its shards."""
    only = replace(manifest, splits={split: Split(manifest.splits[split].shards[part])})
    for _, found in verify(only):
        if found:
            raise ValueError(f"{found[0]}: restore the shard, or prepare the dataset again")


def faults(manifest: Manifest, shard: Shard) -> list[str]:
    """Return the faults of one shard and its index: hash, size, id range, documents."""
    found: list[str] = []
    for check in (_check_tokens, _check_index):
        try:
            found += check(manifest, shard)
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found


def _check_tokens(manifest: Manifest, shard: Shard) -> Iterator[str]:
    tokens = open_tokens(manifest, shard)
    yield from _check_hash(manifest, shard.file, shard.sha256)
    highest = int(tokens.max(initial=0))
    if highest >= manifest.tokenizer.n_vocab:
        yield (
            f"expected ids below {manifest.tokenizer.n_vocab} in "
            f"{manifest.location_of(shard.file)}, found {highest} at token {np.argmax(tokens)}"
        )


def _check_index(manifest: Manifest, shard: Shard) -> Iterator[str]:
    index = read_index(manifest, shard)
    path = manifest.location_of(shard.index)
    yield from _check_hash(manifest, shard.index, shard.index_sha256)
    documents = int(np.count_nonzero(~index["continued"].to_numpy()))
    text_bytes = int(index["text_bytes"].to_numpy().sum())
    if (documents, text_bytes) != (shard.documents, shard.text_bytes):
        yield (
            f"expected {shard.documents} documents of {shard.text_bytes} bytes in {path}, found "
            f"{documents} of {text_bytes}"
        )
    offsets = index["offset"].to_numpy()
    if offsets[:1].tolist() != [0] or (np.diff(offsets, append=shard.tokens) < 1).any():
        yield f"expected rising offsets from 0 to below {shard.tokens} in {path}, found others"


def _check_hash(manifest: Manifest, name: str, expected: str) -> Iterator[str]:
    with open_file(manifest, name, expected) as file:
        found = hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()
    if found != expected:
        path = manifest.location_of(name)
        yield f"expected sha256 {expected[:12]} of {path}, found {found[:12]}"
