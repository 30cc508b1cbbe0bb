"""Which documents are exact duplicates of an earlier one, in memory that does not grow with them.

The hashes of all documents lie on disk, one file a unit. They are gone through by ranges of the
hash, so that each range fits in memory; the first occurrence in plan order is kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import xxhash

from prepare.plan import Plan, Unit
from prepare.split import digest_array
from prepare.tasks import HELD_OUT, load_array, save_array
from prepare.workspace import Workspace
from shards import tokenizer
from shards.manifest import Manifest
from shards.reader import open_tokens, read_index

# Documents compared at once: some 40 bytes each.
AT_ONCE = 1 << 22
HASHES = "hashes"


def find_duplicates(workspace: Workspace, units: Sequence[Unit]) -> None:
    """Write, for each unit, the places of the documents to drop. All units must be hashed."""
    total = sum(len(_hashes(workspace, unit)) for unit in units)
    ranges = -(-total // AT_ONCE) or 1
    drops: dict[int, list[np.ndarray]] = {unit.number: [] for unit in units}
    for number in range(ranges):
        for unit, places in _duplicates_in(workspace, units, number, ranges):
            drops[unit].append(places)
    for number, parts in drops.items():
        places = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
        save_array(workspace, f"drops/{number:05d}.npy", places)


def _duplicates_in(
    workspace: Workspace, units: Sequence[Unit], number: int, ranges: int
) -> list[tuple[int, np.ndarray]]:
    """(unit, places) of the duplicates whose hash lies in one range of several."""
    hashes, owners, places = [], [], []
    for unit in units:
        of_unit = _hashes(workspace, unit)
        inside = of_unit[:, 1] % np.uint64(ranges) == number
        inside &= of_unit.any(axis=1)
        hashes.append(of_unit[inside])
        places.append(np.flatnonzero(inside))
        owners.append(np.full(len(places[-1]), unit.number))
    together = np.concatenate(hashes)
    # A stable sort: of equal hashes the one that is first in plan order stays first.
    order = np.lexsort((together[:, 1], together[:, 0]))
    again = np.zeros(len(order), bool)
    again[order[1:]] = (together[order[1:]] == together[order[:-1]]).all(axis=1)
    owner, place = np.concatenate(owners)[again], np.concatenate(places)[again]
    return [(int(unit), place[owner == unit]) for unit in np.unique(owner)]


def _hashes(workspace: Workspace, unit: Unit) -> np.ndarray:
    found = load_array(workspace, f"{HASHES}/{unit.number:05d}.npy")
    assert found is not None
    return found


# --- Validation text that came by --val-source: training text with the same content is left out.


OF_UNITS = "held_out"
HASHED_AT_ONCE = 1 << 18  # tokens


def validation_units(plan: Plan) -> Iterator[Unit]:
    """The units of the plan that read validation text, without the rest of what they read."""
    for unit in plan.units:
        parts = tuple(part for part in unit.slices if plan.files[part.file].val)
        if parts:
            yield replace(unit, slices=parts)


def note_held_out(plan: Plan, workspace: Workspace, units: Sequence[Unit]) -> None:
    """Put together the hashes of all validation text, once those of its `units` are noted."""
    found = [np.empty((0, 2), np.uint64)]
    for unit in units:
        hashes = load_array(workspace, f"{OF_UNITS}/{unit.number:05d}.npy")
        assert hashes is not None
        found.append(hashes)
    if plan.generation:
        manifest = workspace.manifest()
        assert manifest is not None
        digests = b"".join(_digests_of(manifest))
        found.append(digest_array(digests))
    save_array(workspace, HELD_OUT, np.unique(np.concatenate(found), axis=0))


def _digests_of(manifest: Manifest) -> Iterator[bytes]:
    """Content hashes of a dataset's validation documents, 16 bytes each: their tokens spell them.

    A document may go on in the shards after the one that it begins in.
    """
    vocabulary = tokenizer.load().vocabulary()
    hasher = None
    for shard in manifest.splits["val"].shards:
        index, tokens = read_index(manifest, shard), open_tokens(manifest, shard)
        offsets = [*index["offset"].to_pylist(), len(tokens)]
        for (start, end), goes_on in zip(
            pairwise(offsets), index["continued"].to_pylist(), strict=True
        ):
            if not goes_on:
                if hasher is not None:
                    yield hasher.digest()
                hasher, start = xxhash.xxh3_128(), start + 1  # without its <|endoftext|>
            assert hasher is not None, "the first row of a dataset begins a document"
            for at in range(start, end, HASHED_AT_ONCE):
                part = tokens[at : min(at + HASHED_AT_ONCE, end)].tolist()
                hasher.update(b"".join([vocabulary[token] for token in part]))
    if hasher is not None:
        yield hasher.digest()
