"""The flags of `python -m prepare`."""

import os
import re
from dataclasses import dataclass
from typing import Literal

import tyro

DEFAULT_VAL_FRACTION = 0.1
GPT2 = "gpt2"


@dataclass(frozen=True)
class Options:
    """Tokenize text files into training and validation shards."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs, URIs (s3://, gs://, hf://), or the word stdlib."""
    out: str
    """The dataset's folder, data/NAME say, or a URI."""
    workers: int = os.cpu_count() or 1
    """Worker processes."""
    split: Literal["auto", "hash", "position"] = "auto"
    """hash: by document; position: one text file, at a line end; auto: position for one text file,
    else hash."""
    val_fraction: float = DEFAULT_VAL_FRACTION
    """Share of the text that becomes validation text."""
    tokenizer: str = GPT2
    """gpt2, r50k_base, p50k_base, a dataset, or Hugging Face's tokenizer.json (byte-level BPE)."""
    vocab_size: int = 0
    """Train a vocabulary of so many ids on the training split, 4096 say; 0: take --tokenizer's."""
    val_source: tuple[str, ...] = ()
    """Sources of validation text; then no other text becomes validation text."""
    text_column: str | None = None
    """Column or field with the text, or a path to it (meta.text); by default text or content."""
    max_bad: int | None = None
    """Documents that may be unreadable, by default 10, or 0.1 % if that is more; of the text the
    same share, but at least 64 KB."""
    dedup: bool = False
    """Drop exact duplicates of an earlier document."""
    append: bool = False
    """Add the sources to the complete dataset in --out, as its next generation."""
    plan: bool = False
    """Print a forecast of the work and exit."""
    engine: Literal["local", "ray"] = "local"
    """Run on this machine's processes or on a Ray cluster."""
    address: str | None = None
    """The Ray cluster's address; by default Ray is started on this machine."""
    task: str | None = None
    """i/n: do the i-th of n parts of the work, for job arrays; --finish comes after them."""
    finish: bool = False
    """Write the manifest once all tasks are done."""

    def check(self) -> None:
        """Raise ValueError for values that are invalid, alone or together."""
        if not all((self.sources, *self.sources, *self.val_source)):
            raise ValueError("expected a SOURCE, found none: give a file, a folder, or stdlib")
        if not self.out:
            raise ValueError(
                "expected a folder for --out, found an empty name: give data/NAME, say"
            )
        if not 1 <= self.workers <= 1024:
            raise ValueError(f"expected --workers from 1 to 1024, found {self.workers}")
        if self.max_bad is not None and self.max_bad < 0:
            raise ValueError(f"expected --max-bad of at least 0, found {self.max_bad}")
        if self.val_source and self.split != "auto":
            raise ValueError(
                f"expected --split or --val-source, found both: {self.split} would move documents "
                "from one split to the other; leave one of them out"
            )
        if self.vocab_size and not 257 <= self.vocab_size <= 1 << 16:
            raise ValueError(
                f"expected --vocab-size from 257, the bytes and <|endoftext|>, to {1 << 16}, found "
                f"{self.vocab_size}"
            )
        if self.vocab_size and self.tokenizer != GPT2:
            raise ValueError(
                f"expected --vocab-size or --tokenizer, found {self.vocab_size} and "
                f"{self.tokenizer}: leave one of them out"
            )
        if self.append and (self.vocab_size or self.tokenizer != GPT2):
            raise ValueError(
                "expected --append without --tokenizer and --vocab-size, found one of them: the "
                "vocabulary is the dataset's; leave it out"
            )
        if self.append and self.dedup:
            raise ValueError(
                "expected --append or --dedup, found both: an append does not know the documents "
                "already there; prepare everything together with --dedup into another --out"
            )
        if self.dedup and (self.task or self.finish or self.engine != "local"):
            raise ValueError(
                "expected --dedup on one machine, found --task, --finish or --engine ray: which of "
                "two duplicates comes first is known only where all hashes are; leave one of them "
                "out"
            )
        if self.task is not None:
            match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.task)
            if match is None or int(match[1]) > int(match[2]) or self.finish:
                raise ValueError(
                    "expected --task i/n with i from 1 to n, and --finish in a run of its own, "
                    f"found --task {self.task}: --task 1/8 is the first of eight"
                )
