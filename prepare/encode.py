"""A batch of documents → token ids with their `<|endoftext|>`, audited against tiktoken."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prepare.documents import Batch
from prepare.split import content_hashes
from shards.tokenizer import Tokenizer, cut, string_buffers
from shards.writer import DTYPE, to_uint16

# One document in so many is encoded by tiktoken too, chosen by content, and the first of a unit;
# of a long one only the head. At a tenth of the encoder's speed this costs some two percent.
AUDITED_ONE_IN = 512
AUDITED_CHARACTERS = 1 << 12


class AuditError(Exception):
    """The fast encoder and tiktoken disagree on a document."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch of n documents, each but a continued one begun by `<|endoftext|>`.

    tokens: n byte strings, each the uint16 tokens of a document, for Arrow to join and filter;
    text_bytes: (n,) int64, UTF-8 bytes of each; hashes: (n, 2) uint64, of each one's content.
    """

    tokens: pa.LargeBinaryArray
    text_bytes: np.ndarray
    hashes: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n,) int64."""
        return np.diff(string_buffers(self.tokens)[0]) // DTYPE.itemsize


def encode(tokenizer: Tokenizer, batch: Batch, first: bool) -> Encoded:
    """Encode a batch; `first` says that it is its unit's first. Raises AuditError."""
    hashes = content_hashes(batch.texts) if batch.hashes is None else batch.hashes
    ids, offsets = tokenizer.encode_batch(batch.texts)
    chosen = hashes[:, 1] % np.uint64(AUDITED_ONE_IN) == 0
    chosen[:1] |= first
    for index in np.flatnonzero(chosen).tolist():
        found = ids[offsets[index] : offsets[index + 1]]
        if not _agrees(tokenizer, batch.texts[index].as_py(), found):
            where = f"source {batch.sources[index]} at {batch.rows[index]}"
            raise AuditError(f"gigatoken and tiktoken differ on the document of {where}")
    tokens = _as_bytes(to_uint16(ids), offsets)
    if batch.begins:
        eot = np.array(tokenizer.eot, DTYPE).tobytes()
        tokens = pc.binary_join_element_wise(
            pa.scalar(eot, tokens.type), tokens, pa.scalar(b"", tokens.type)
        )
    return Encoded(tokens, np.diff(string_buffers(batch.texts)[0]), hashes)


def _as_bytes(tokens: np.ndarray, offsets: np.ndarray) -> pa.LargeBinaryArray:
    """Tokens of n documents, where each one's begin, (n + 1,): the same memory, a string each."""
    places = pa.py_buffer(offsets * DTYPE.itemsize)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(offsets) - 1, [None, places, pa.py_buffer(tokens)]
    )


def _agrees(tokenizer: Tokenizer, text: str, found: np.ndarray) -> bool:
    """Whether tiktoken gives the same ids for the text, or for the head of a long one."""
    head = next(cut(text, AUDITED_CHARACTERS), "")
    expected = tokenizer.encode_reference(head)
    return np.array_equal(expected, found if head == text else found[: len(expected)])
