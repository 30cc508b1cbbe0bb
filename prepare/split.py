"""Which side of the split a document lies on: a function of its content alone (promise 3)."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shards.tokenizer import string_buffers

HASH, POSITION, GIVEN = "hash", "position", "given"


@dataclass(frozen=True)
class SplitRule:
    """How documents are split, as the manifest records it and appends follow it.

    `hash`: by the document's content, `val_fraction` of them to validation. `position`: the one
    text file is cut at a line end, its last `val_fraction` to validation. `given`: validation
    text comes from sources of its own.
    """

    rule: str
    val_fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"expected a --val-fraction between 0 and 1, found {self.val_fraction}: 0.1 keeps "
                "a tenth of the documents for validation"
            )

    def is_val(self, hashes: np.ndarray) -> np.ndarray:
        """For content hashes, (n, 2) uint64, which documents are validation text, (n,) bool."""
        return hashes[:, 0] < np.uint64(self.val_fraction * 2**64)

    def record(self) -> dict[str, Any]:
        """The rule as JSON."""
        return asdict(self)


def content_hashes(texts: pa.Array) -> np.ndarray:
    """128-bit xxh3 of each text's UTF-8 bytes, (n, 2) uint64; the first half decides the split."""
    offsets, data = string_buffers(texts)
    view, ends = memoryview(data.data), offsets.tolist()
    digests = [xxhash.xxh3_128_digest(view[start:end]) for start, end in pairwise(ends)]
    return digest_array(b"".join(digests))


def digest_array(digests: bytes) -> np.ndarray:
    """Digests of 16 bytes each, one after the other, as (n, 2) uint64."""
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
