"""Checks of a dataset against its manifest: of every byte, or of sizes while training runs."""

import hashlib
import io
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import IO, cast

import numpy as np

from shards import remote
from shards.manifest import DTYPE, Manifest, Shard, Split
from shards.reader import REMEDY, open_file, open_tokens, parse_index, read_header
from shards.tokenizer import BPE, P50K, open_tokenizer, read_stored
from shards.vocabulary import TOKENIZER_NAME

BLOCK_BYTES = 1 << 22
# Between two shards of a background check: the batches come first.
PAUSE_SECONDS = 0.001


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


class BackgroundCheck(threading.Thread):
    """Check of the size and header of shards; of a remote dataset, of the sizes in its listing.

    `check` raises the first FileNotFoundError or ValueError found so far.
    """

    def __init__(self, parts: Sequence[tuple[Manifest, Sequence[Shard]]]) -> None:
        super().__init__(name="background-check", daemon=True)
        self.fault: Exception | None = None
        self._parts = parts
        self.start()

    def check(self) -> None:
        """Raise the fault, if one was found so far."""
        if self.fault is not None:
            raise self.fault

    def run(self) -> None:
        """Check all shards, up to the first fault."""
        try:
            for manifest, shards in self._parts:
                if manifest.uri:
                    _compare_sizes(manifest, shards)
                    continue
                for shard in shards:
                    open_tokens(manifest, shard)
                    time.sleep(PAUSE_SECONDS)
        except (ValueError, OSError) as error:
            self.fault = error


def _compare_sizes(manifest: Manifest, shards: Sequence[Shard]) -> None:
    """Raise FileNotFoundError or ValueError for a shard that is missing or of another size."""
    sizes = remote.sizes(manifest.uri)
    for shard in shards:
        path = manifest.location_of(shard.file)
        if (found := sizes.get(shard.file)) is None:
            raise FileNotFoundError(f"expected the shard {path}, found no such file: {REMEDY}")
        if found != shard.file_bytes:
            raise ValueError(
                f"expected {shard.file_bytes} bytes in {path}, found {found}: {REMEDY}"
            )
