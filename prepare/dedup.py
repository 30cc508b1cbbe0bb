"""Documents to leave out: exact duplicates, and training text that is also validation text.

Both compare content hashes (128-bit xxh3). With --dedup the hashes of all documents are stored,
one file per unit, and compared one range of hash values at a time, so that memory does not grow
with the corpus; the first occurrence in plan order is kept. With --val-source training documents
are compared with the hashes of all validation text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import xxhash

from prepare.plan import Plan, Unit
from prepare.text import digest_array
from prepare.workspace import DUPLICATES, HASHES, HELD_OUT, HELD_OUT_HASHES, Workspace
from shards.manifest import Manifest
from shards.reader import open_tokens, read_index
from shards.tokenizer import open_tokenizer

# Documents compared at once: some 40 bytes each.
AT_ONCE = 1 << 22
TOKENS_AT_ONCE = 1 << 18


def find_duplicates(workspace: Workspace, units: Sequence[Unit]) -> None:
    """Store the indices of each unit's duplicates. All units must be hashed."""
    total = sum(len(_hashes(workspace, HASHES, unit)) for unit in units)
    ranges = -(-total // AT_ONCE) or 1
    parts = [_duplicates_in(workspace, units, number, ranges) for number in range(ranges)]
    owners, indices = np.concatenate(parts, axis=1)
    order = np.lexsort((indices, owners))
    bounds = np.searchsorted(owners[order], np.arange(len(units) + 1))
    for unit, (start, end) in zip(units, pairwise(bounds), strict=True):
        workspace.save_array(f"{DUPLICATES}/{unit.name}", indices[order[start:end]])


def _duplicates_in(
    workspace: Workspace, units: Sequence[Unit], number: int, ranges: int
) -> np.ndarray:
    """Find the duplicates whose hash lies in one of the ranges.

    Returns (2, n) int64: for each the index of its unit in `units` and its own in the unit.
    """
    hashes, documents = [], []
    for owner, unit in enumerate(units):
        of_unit = _hashes(workspace, HASHES, unit)
        inside = of_unit.any(axis=1) & (of_unit[:, 1] % np.uint64(ranges) == number)
        indices = np.flatnonzero(inside)
        hashes.append(of_unit[indices])
        documents.append(np.stack([np.full_like(indices, owner), indices]))
    values = np.concatenate(hashes)
    # A stable sort: of equal hashes the one that is first in plan order stays first.
    order = np.lexsort((values[:, 1], values[:, 0]))
    repeated = (values[order[1:]] == values[order[:-1]]).all(axis=1)
    return np.concatenate(documents, axis=1)[:, order[1:][repeated]]


def validation_units(plan: Plan) -> Iterator[Unit]:
    """Yield the units that read --val-source files, reduced to those files."""
    for unit in plan.units:
        parts = tuple(part for part in unit.slices if plan.files[part.file].val)
        if parts:
            yield replace(unit, slices=parts)


def collect_held_out(
    plan: Plan, manifest: Manifest | None, workspace: Workspace, units: Sequence[Unit]
) -> None:
    """Store the hashes of all validation text, (n, 2) uint64, sorted. `units` must be hashed."""
    hashes = [_hashes(workspace, HELD_OUT, unit) for unit in units]
    if manifest and plan.generation:
        earlier = manifest.prefix(plan.generation - 1)
        hashes.append(digest_array(b"".join(_stored_validation_text(earlier))))
    hashes.append(np.empty((0, 2), np.uint64))
    workspace.save_array(HELD_OUT_HASHES, np.unique(np.concatenate(hashes), axis=0))


def _stored_validation_text(manifest: Manifest) -> Iterator[bytes]:
    """Yield the content hash, 16 bytes, of each validation document of a dataset.

    The text is decoded from the tokens; a document may continue in the shards after its first.
    """
    vocabulary = open_tokenizer(manifest.tokenizer, manifest.location).vocabulary()
    hasher = None
    for shard in manifest.splits["val"].shards:
        index, tokens = read_index(manifest, shard), open_tokens(manifest, shard)
        ranges = pairwise([*index["offset"].to_pylist(), len(tokens)])
        for (start, end), continued in zip(ranges, index["continued"].to_pylist(), strict=True):
            if not continued:
                if hasher is not None:
                    yield hasher.digest()
                hasher, start = xxhash.xxh3_128(), start + 1  # skip <|endoftext|>
            assert hasher is not None, "the first row of a dataset begins a document"
            for at in range(start, end, TOKENS_AT_ONCE):
                part = tokens[at : min(at + TOKENS_AT_ONCE, end)].tolist()
                hasher.update(b"".join([vocabulary[token] for token in part]))
    if hasher is not None:
        yield hasher.digest()


def _hashes(workspace: Workspace, folder: str, unit: Unit) -> np.ndarray:
    """Return the stored hashes of a unit's documents, (n, 2) uint64."""
    hashes = workspace.load_array(f"{folder}/{unit.name}")
    assert hashes is not None
    return hashes
