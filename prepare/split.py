"""The rule by which documents are split into training and validation text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prepare.file_types import TEXT
from prepare.input_file import InputFile
from prepare.options import DEFAULT_VAL_FRACTION, Options

HASH = "hash"  # by a document's content: `val_fraction` of the documents are validation text
POSITION = "position"  # the one text file is cut at a line end: its last `val_fraction`
VAL_SOURCE = "given"  # validation text has sources of its own


@dataclass(frozen=True)
class SplitRule:
    """Rule of the split, recorded in the manifest and followed by appends (promise 3)."""

    rule: str  # HASH, POSITION or VAL_SOURCE
    val_fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(
                f"expected a --val-fraction between 0 and 1, found {self.val_fraction}: 0.1 keeps "
                "a tenth of the documents for validation"
            )

    def is_val(self, hashes: np.ndarray) -> np.ndarray:
        """Return which documents are validation text, (n,) bool, by content hash, (n, 2) uint64."""
        return hashes[:, 0] < np.uint64(self.val_fraction * 2**64)


def choose_rule(options: Options, files: Sequence[InputFile]) -> SplitRule:
    """Return the split rule of a new dataset. Raises ValueError if the files don't allow it."""
    one_text = len(files) == 1 and files[0].kind == TEXT
    if options.val_source:
        return SplitRule(VAL_SOURCE, options.val_fraction)
    if options.split == POSITION and not one_text:
        raise ValueError(
            f"expected one plain text file for --split position, found {len(files)} files "
            f"({files[0].name}, ...): use --split hash, or --val-source for validation text"
        )
    named_directly = one_text and options.sources[0].rstrip("/").endswith(files[0].name)
    by_position = options.split == POSITION or (options.split == "auto" and named_directly)
    return SplitRule(POSITION if by_position else HASH, options.val_fraction)


def follow_rule(stored: dict[str, Any], options: Options, files: Sequence[InputFile]) -> SplitRule:
    """Return the `stored` rule of the dataset to append to.

    Raises ValueError if the options contradict it or the files can't be split by it.
    """
    if stored.get("rule") not in (HASH, POSITION, VAL_SOURCE):
        raise ValueError(
            f"expected a dataset split by prepare for --append, found {stored}: prepare the new "
            "sources into another --out"
        )
    rule = SplitRule(**stored)
    requested = (options.split, options.val_fraction)
    if requested not in {("auto", DEFAULT_VAL_FRACTION), (rule.rule, rule.val_fraction)}:
        raise ValueError(
            f"expected the split rule of the dataset, {rule.rule} and {rule.val_fraction}, found "
            f"{options.split} and {options.val_fraction}: leave out --split and --val-fraction"
        )
    if rule.rule == POSITION and any(file.kind != TEXT for file in files):
        raise ValueError(
            "expected plain text files to append to a dataset that is split by position, found "
            "another type: prepare everything together into another --out"
        )
    if rule.rule != VAL_SOURCE and options.val_source:
        raise ValueError(
            f"expected no --val-source for a dataset split by {rule.rule}, found one: append it as "
            "a source, or prepare everything together into another --out"
        )
    return rule
