"""What the user asks prepare for, and which split rule follows from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from prepare.sources import InputFile
from prepare.split import GIVEN, HASH, POSITION, SplitRule
from shards.manifest import Manifest

AUTO = "auto"
DEFAULT_VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Request:
    """The sources and the options that a dataset is a function of; bad ones raise ValueError."""

    sources: tuple[str, ...]
    val_sources: tuple[str, ...] = ()
    split: str = AUTO
    val_fraction: float = DEFAULT_VAL_FRACTION
    text_column: str | None = None
    dedup: bool = False
    append: bool = False

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("expected a SOURCE, found none: give a file, a folder, or stdlib")
        if self.split not in (AUTO, HASH, POSITION):
            raise ValueError(f"expected --split auto, hash or position, found {self.split!r}")
        if self.val_sources and self.split != AUTO:
            raise ValueError(
                f"expected --split or --val-source, found both: {self.split} would move documents "
                "from one side to the other; leave one of them out"
            )
        if self.append and self.dedup:
            raise ValueError(
                "expected --append or --dedup, found both: the documents already there are not "
                "known to it; prepare everything together with --dedup into another --out"
            )
        SplitRule(HASH, self.val_fraction)


def rule_of(request: Request, files: Sequence[InputFile]) -> SplitRule:
    """The split rule of a new dataset. Raises ValueError where the one asked for can't be."""
    alone = len(files) == 1 and files[0].kind == "text"
    if request.val_sources:
        return SplitRule(GIVEN, request.val_fraction)
    if request.split == POSITION and not alone:
        raise ValueError(
            f"expected one plain text file for --split position, found {len(files)} files "
            f"({files[0].name}, ...): use --split hash, or --val-source for validation text"
        )
    itself = alone and request.sources[0].rstrip("/").endswith(files[0].name)
    by_position = request.split == POSITION or (request.split == AUTO and itself)
    return SplitRule(POSITION if by_position else HASH, request.val_fraction)


def rule_of_append(request: Request, files: Sequence[InputFile], base: Manifest) -> SplitRule:
    """The rule of the dataset that is appended to. Raises ValueError where it can't be followed."""
    if base.split_rule.get("rule") not in (HASH, POSITION, GIVEN):
        raise ValueError(
            f"expected a dataset split by prepare for --append, found {base.split_rule}: "
            "prepare the new sources into another --out"
        )
    rule = SplitRule(**base.split_rule)
    asked = (request.split, request.val_fraction)
    if asked not in {(AUTO, DEFAULT_VAL_FRACTION), (rule.rule, rule.val_fraction)}:
        raise ValueError(
            f"expected the split that the dataset was begun with, {rule.rule} and "
            f"{rule.val_fraction}, found {asked[0]} and {asked[1]}: leave out --split and "
            "--val-fraction"
        )
    if rule.rule == POSITION and any(file.kind != "text" for file in files):
        raise ValueError(
            "expected plain text files to append to a dataset that is split by position, found "
            "another type: prepare everything together into another --out"
        )
    if rule.rule != GIVEN and request.val_sources:
        raise ValueError(
            f"expected no --val-source for a dataset split by {rule.rule}, found one: append it as "
            "a source, or prepare everything together into another --out"
        )
    return rule
