"""Batches of documents encoded to token ids with `<|endoftext|>`, audited against tiktoken."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from prepare.batch import Batch
from prepare.text import digest_array
from shards.encoder import cut, string_buffers
from shards.manifest import DTYPE
from shards.tokenizer import Tokenizer
from shards.writer import to_uint16

# One document in 512, chosen by its hash, and the first of each unit are encoded by tiktoken too;
# of a long one only the head. At a tenth of the encoder's speed this costs some two percent.
AUDITED_ONE_IN = 512
AUDITED_CHARACTERS = 1 << 12
MAX_AUDITED_BYTES = 1 << 16


class AuditError(Exception):
    """The fast encoder and tiktoken disagree on a document."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a batch of n documents, each preceded by `<|endoftext|>` unless continued.

    tokens: n byte strings, each the uint16 tokens of a document, so that Arrow can join and filter
    them; text_bytes: (n,) int64, UTF-8 bytes of each.
    """

    tokens: pa.LargeBinaryArray
    text_bytes: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n,) int64."""
        return np.diff(string_buffers(self.tokens)[0]) // DTYPE.itemsize


def encode(tokenizer: Tokenizer, batch: Batch, audit_first: bool) -> Encoded:
    """Encode a batch; with `audit_first` its first document is audited in any case.

    Raises AuditError if the audit finds a difference.
    """
    ids, offsets = tokenizer.encode_batch(batch.texts)
    audited = document_hashes(batch)[:, 1] % np.uint64(AUDITED_ONE_IN) == 0
    audited[:1] |= audit_first
    for i in np.flatnonzero(audited).tolist():
        if not _agrees(
            tokenizer, memoryview(batch.texts[i].as_buffer()), ids[offsets[i] : offsets[i + 1]]
        ):
            where = f"source {batch.sources[i]} at {batch.rows[i]}"
            raise AuditError(f"gigatoken and tiktoken differ on the document of {where}")
    tokens = _as_bytes(to_uint16(ids), offsets)
    if not batch.continued:
        eot = np.array(tokenizer.eot, DTYPE).tobytes()
        tokens = pc.binary_join_element_wise(
            pa.scalar(eot, tokens.type), tokens, pa.scalar(b"", tokens.type)
        )
    return Encoded(tokens, np.diff(string_buffers(batch.texts)[0]))


def document_hashes(batch: Batch) -> np.ndarray:
    """Return the content hash of each document, (n, 2) uint64, computed once for a batch."""
    if batch.hashes is None:
        batch.hashes = content_hashes(batch.texts)
    return batch.hashes


def content_hashes(texts: pa.Array) -> np.ndarray:
    """128-bit xxh3 of each text's UTF-8 bytes, (n, 2) uint64; the first half decides the split."""
    offsets, data = string_buffers(texts)
    view, ends = memoryview(data.data), offsets.tolist()
    digests = [xxhash.xxh3_128_digest(view[start:end]) for start, end in pairwise(ends)]
    return digest_array(b"".join(digests))


def _as_bytes(tokens: np.ndarray, offsets: np.ndarray) -> pa.LargeBinaryArray:
    """View the tokens of n documents, with `offsets` (n + 1,), as n byte strings; no copy."""
    byte_offsets = pa.py_buffer(offsets * DTYPE.itemsize)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, byte_offsets, pa.py_buffer(tokens)]
    )


def _agrees(tokenizer: Tokenizer, text: memoryview, ids: np.ndarray) -> bool:
    """True if tiktoken gives the same ids for a UTF-8 text, or for the head of a long one."""
    start = bytes(text[:MAX_AUDITED_BYTES]).decode(errors="ignore")
    head = next(cut(start, AUDITED_CHARACTERS), "")
    if head == start and len(text) > MAX_AUDITED_BYTES:  # no cut in sight: as a text of its own
        head = head[:AUDITED_CHARACTERS]
        ids = np.array(tokenizer.encode(head))
    expected = tokenizer.encode_reference(head)
    return np.array_equal(expected, ids if head == start else ids[: len(expected)])
