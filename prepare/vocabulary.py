"""A vocabulary of one's own: byte-level BPE, trained on the training split by `tokenizers`.

Pre-tokens are those of GPT-2's pattern. The trainer merges the most frequent pair of tokens, of
equally frequent ones the pair with the lowest first id, then the lowest second id: so the same text
gives the same vocabulary, in whatever order it was read.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash
from tokenizers import Tokenizer as Trainable
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from prepare.documents import read
from prepare.encode import content_hashes
from prepare.plan import Plan, Unit
from prepare.unit import check_unchanged, validation_mask
from prepare.unit_functions import UnitFunction
from prepare.workspace import Workspace
from shards.cuts import cut
from shards.tokenizer import Tokenizer, of_vocabulary
from shards.vocabulary import Vocabulary, parse

# Of more text a sample of about this much is taken, in pieces of documents whose hash is low. That
# bounds time and memory; the frequencies of pairs change little beyond.
SAMPLE_BYTES = 64 << 20
PIECE_CHARACTERS = 1 << 16
HASHES = 1 << 64
Piece = tuple[int, str]  # its hash, and its text


def train_tokenizer(
    plan: Plan, workspace: Workspace, vocab_size: int, run: Callable[..., Iterator[list[Piece]]]
) -> Tokenizer:
    """Train a vocabulary on a sample of the plan's training split, showing progress.

    `run` calls a function on units and yields the results in any order. The documents to leave out
    must be in the workspace.
    """
    text = sum(unit.weight for unit in plan.units)
    limit = HASHES * min(SAMPLE_BYTES, text) // max(text, 1)
    found = run(SampleText(plan, workspace, limit), plan.units)
    texts = choose(tqdm(found, "sample", len(plan.units), unit="unit"), limit)
    characters = sum(map(len, texts))
    print(f"Training a vocabulary of {vocab_size:,} ids on {characters:,} characters of the text.")
    tokenizer = of_vocabulary(train(texts, vocab_size))
    if tokenizer.n_vocab < vocab_size:
        print(f"It has {tokenizer.n_vocab:,} ids: no pair of tokens is left that occurs twice.")
    return tokenizer


@dataclass(frozen=True)
class SampleText(UnitFunction[list[Piece]]):
    """The pieces of a unit's training documents that belong to the sample."""

    limit: int

    def run(self, unit: Unit) -> list[Piece]:
        """Read one unit."""
        pieces = [
            (digest, piece)
            for texts in self._training_texts(unit)
            for text in texts.to_pylist()
            for piece in cut(text, PIECE_CHARACTERS)
            if (digest := xxhash.xxh3_64_intdigest(piece.encode())) < self.limit
        ]
        check_unchanged(self.plan, unit)
        return pieces

    def _training_texts(self, unit: Unit) -> Iterator[pa.Array]:
        """Yield the documents that the unit's train shard will hold, in batches."""
        exclusions, documents = self.exclusions(unit), 0
        for batch in read(self.plan.files, unit.slices):
            hashes = content_hashes(batch.texts) if batch.hashes is None else batch.hashes
            val = validation_mask(self.plan, batch, hashes)
            indices = np.arange(len(val)) + documents - int(batch.continued)
            documents += 0 if batch.continued else len(val)
            yield batch.texts.filter(pa.array(~val & ~exclusions.mask(indices, hashes, val)))


def choose(found: Iterable[list[Piece]], limit: int) -> list[str]:
    """Return the pieces of a sample in an order of its own, whichever units come first.

    The size of compressed text was estimated: of far too much the half of lower hash is kept.
    """
    chosen: list[Piece] = []
    for pieces in found:
        chosen += [piece for piece in pieces if piece[0] < limit]
        while sum(len(text) for _, text in chosen) > 2 * SAMPLE_BYTES:
            limit //= 2
            chosen = [piece for piece in chosen if piece[0] < limit]
    return [text for _, text in sorted(chosen)]


def train(texts: list[str], vocab_size: int) -> Vocabulary:
    """Return a vocabulary of `vocab_size` ids, of fewer if the text has no pair twice any more.

    The last id is `<|endoftext|>`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not outlive a fork
    tokenizer = Trainable(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stdout.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer, len(texts))
    return parse(tokenizer.to_str().encode(), "the trained vocabulary")
