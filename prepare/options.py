"""The flags of `python -m prepare`; nothing heavy is imported here, so `--help` answers at once."""

import os
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Options:
    """Tokenise text files into training and validation shards."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs, URIs (s3://, gs://, hf://), or the word stdlib."""
    out: str
    """The dataset's folder, data/NAME say, or a URI."""
    workers: int = os.cpu_count() or 1
    """Processes to work with."""
    split: Literal["auto", "hash", "position"] = "auto"
    """hash: by document; position: one text file, at a line end; auto: position for one text file,
    else hash."""
    val_fraction: float = 0.1
    """Share of the text that becomes validation text."""
    val_source: tuple[str, ...] = ()
    """Sources of validation text; then no other text becomes validation text."""
    text_column: str | None = None
    """The column or field with the text; by default text, else content."""
    max_bad: int | None = None
    """Documents that may be unreadable; by default 10, or 0.1 % of them if that is more."""
    dedup: bool = False
    """Drop exact duplicates of an earlier document."""
    append: bool = False
    """Add the sources to the complete dataset in --out, as its next generation."""
    plan: bool = False
    """Say what would be done, and do nothing."""
    engine: Literal["local", "ray"] = "local"
    """Where the work runs: this machine's processes, or a Ray cluster."""
    address: str | None = None
    """The Ray cluster's address; without one Ray starts one here."""
    task: str | None = None
    """i/n: do the i-th of n parts of the work, for job arrays; --finish comes after them."""
    finish: bool = False
    """Write the manifest once all tasks are done."""
