"""A vocabulary of one's own: byte-level BPE, trained on the training split by `tokenizers`.

Pre-tokens are those of GPT-2's pattern. The trainer merges the most frequent pair of tokens, of
equally frequent ones the pair with the lowest first id, then the lowest second id: so the same text
gives the same vocabulary, in whatever order it was read.
"""

import os
import sys
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer as Trainable
from tokenizers import models, pre_tokenizers, trainers
from tqdm import tqdm

from shards.tokenizer import Tokenizer, of_vocabulary
from shards.vocabulary import Vocabulary, parse

# Of more text a sample of about this much is taken, in pieces of documents whose hash is low. That
# bounds time and memory; the frequencies of pairs change little beyond.
SAMPLE_BYTES = 64 << 20
HASHES = 1 << 64
Piece = tuple[int, str]  # its hash, and its text


def sample_limit(text_bytes: int) -> int:
    """Return the hash below which a piece of a text of that size belongs to the sample."""
    return HASHES * min(SAMPLE_BYTES, text_bytes) // max(text_bytes, 1)


def train_tokenizer(
    found: Iterator[list[Piece]], units: int, limit: int, vocab_size: int
) -> Tokenizer:
    """Train a vocabulary on the pieces that were found in each of the units, showing progress."""
    texts = choose(tqdm(found, "sample", units, unit="unit"), limit)
    characters = sum(map(len, texts))
    print(f"Training a vocabulary of {vocab_size:,} ids on {characters:,} characters of the text.")
    tokenizer = of_vocabulary(train(texts, vocab_size))
    if tokenizer.n_vocab < vocab_size:
        print(f"It has {tokenizer.n_vocab:,} ids: no pair of tokens is left that occurs twice.")
    return tokenizer


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
