"""Validation text that came by --val-source: training text with the same content is left out.

Identical documents must not lie on both sides (promise 3). The given validation text stays as it
is; so does what a dataset had before an append, its training text as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import xxhash

from prepare.plan import Plan, Unit
from prepare.split import digest_array
from prepare.work import HELD_OUT, load_array, save_array
from prepare.workspace import Workspace
from shards import tokenizer
from shards.manifest import Manifest
from shards.reader import open_tokens, read_index

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
