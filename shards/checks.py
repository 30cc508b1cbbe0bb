"""Verification of a dataset against its manifest, every byte of it."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import IO, cast

import numpy as np

from shards import remote
from shards.manifest import DTYPE, Manifest, Shard, Split
from shards.reader import REMEDY, open_file, parse_index, read_header
from shards.tokenizer import BPE, P50K, open_tokenizer, read_stored
from shards.vocabulary import TOKENIZER_NAME

BLOCK_BYTES = 1 << 22


def tokenizer_faults(manifest: Manifest) -> list[str]:
    """Return the faults of `tokenizer.json`, which is there unless the vocabulary is GPT-2's."""
    if not manifest.tokenizer.name.startswith((P50K, BPE)):
        return []
    try:
        tokenizer = open_tokenizer(manifest.tokenizer, manifest.location)
    except (ValueError, OSError) as error:
        return [str(error)]
    if read_stored(manifest.location) != tokenizer.to_json():
        path = manifest.location_of(TOKENIZER_NAME)
        return [f"expected {path} as prepare wrote it, found another: {REMEDY}"]
    return []


def verify(manifest: Manifest) -> Iterator[tuple[Shard, list[str]]]:
    """Yield each shard of the dataset, in order, with its faults and its index's, a line each.

    A remote dataset is read from its store, not from the cache. Hashing and NumPy release the
    interpreter's lock, so as many threads read as there are cores.
    """
    shards = manifest.shards
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from zip(shards, pool.map(partial(faults, manifest), shards), strict=True)


def check(manifest: Manifest, split: str, part: slice = slice(None)) -> None:
    """Raise ValueError for the first faulty shard of a split, or of a part of its shards."""
    only = replace(manifest, splits={split: Split(manifest.splits[split].shards[part])})
    for _, found in verify(only):
        if found:
            raise ValueError(found[0] if found[0].endswith(REMEDY) else f"{found[0]}: {REMEDY}")


def check_local_part(manifests: Sequence[Manifest]) -> None:
    """Check every split of some datasets; the ranks of a machine, as torchrun says, divide them."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for manifest in manifests:
        for split in manifest.splits:
            check(manifest, split, slice(local_rank, None, local_world_size))


def faults(manifest: Manifest, shard: Shard) -> list[str]:
    """Return the faults of one shard and its index: hash, size, id range, documents."""
    found: list[str] = []
    for check, name in ((_token_faults, shard.file), (_index_faults, shard.index)):
        attempt = partial(check, manifest, shard)
        try:
            if manifest.uri:
                found += remote.retried(attempt, f"read {manifest.location_of(name)}")
            else:
                found += attempt()
        except (ValueError, OSError) as error:
            found.append(str(error))
    return found


def _open(manifest: Manifest, name: str) -> IO[bytes]:
    """Open a file of the dataset; a remote one in its store."""
    if manifest.uri:
        return io.BufferedReader(cast(io.RawIOBase, remote.open_file(manifest.uri, name)))
    return open_file(manifest, name)


def _token_faults(manifest: Manifest, shard: Shard) -> list[str]:
    path, highest, start, at = manifest.location_of(shard.file), 0, 0, 0
    with _open(manifest, shard.file) as file:
        digest = hashlib.sha256(read_header(manifest, shard, file))
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            tokens = np.frombuffer(block, DTYPE)
            if tokens.max() > highest:
                highest, at = int(tokens.max()), start + int(tokens.argmax())
            start += len(tokens)
    found = _hash_faults(path, shard.sha256, digest.hexdigest())
    if highest >= manifest.tokenizer.n_vocab:
        found.append(
            f"expected ids below {manifest.tokenizer.n_vocab} in {path}, found {highest} at token "
            f"{at}"
        )
    return found


def _index_faults(manifest: Manifest, shard: Shard) -> list[str]:
    path = manifest.location_of(shard.index)
    with _open(manifest, shard.index) as file:
        content = file.read()
    index = parse_index(io.BytesIO(content), path)
    found = _hash_faults(path, shard.index_sha256, hashlib.sha256(content).hexdigest())
    documents = int(np.count_nonzero(~index["continued"].to_numpy()))
    text_bytes = int(index["text_bytes"].to_numpy().sum())
    if (documents, text_bytes) != (shard.documents, shard.text_bytes):
        found.append(
            f"expected {shard.documents} documents of {shard.text_bytes} bytes in {path}, found "
            f"{documents} of {text_bytes}"
        )
    offsets = index["offset"].to_numpy()
    if offsets[:1].tolist() != [0] or (np.diff(offsets, append=shard.tokens) < 1).any():
        found.append(
            f"expected rising offsets from 0 to below {shard.tokens} in {path}, found others"
        )
    return found


def _hash_faults(path: str, expected: str, actual: str) -> list[str]:
    if actual == expected:
        return []
    return [f"expected sha256 {expected[:12]} of {path}, found {actual[:12]}"]
