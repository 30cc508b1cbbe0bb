"""Validation text that came by --val-source: training text with the same content is left out.

Identical documents must not lie on both sides (promise 3). The given validation text stays as it
is; so does what a dataset had before an append, its training text as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from prepare.plan import Plan, Unit
from prepare.split import content_hashes
from prepare.work import HELD_OUT, load_array, save_array
from prepare.workspace import Workspace
from shards import tokenizer
from shards.manifest import Manifest, Shard
from shards.reader import open_tokens, read_index

OF_UNITS = "held_out"


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
        found += [_of_shard(manifest, shard) for shard in manifest.splits["val"].shards]
    save_array(workspace, HELD_OUT, np.unique(np.concatenate(found), axis=0))


def _of_shard(manifest: Manifest, shard: Shard) -> np.ndarray:
    """Content hashes of the documents that begin in a shard; their tokens spell their text."""
    index, tokens = read_index(manifest, shard), open_tokens(manifest, shard)
    vocabulary = tokenizer.load().vocabulary()
    begins = index["offset"].to_numpy()[~index["continued"].to_numpy()]
    texts = [
        b"".join(vocabulary[token] for token in tokens[start + 1 : end].tolist())
        for start, end in pairwise([*begins.tolist(), len(tokens)])
    ]
    return content_hashes(pa.array(texts, pa.large_binary()))
