"""Results of all units turned into the manifest, the quarantine list and the closing summary."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from prepare.documents import BadDocuments
from prepare.plan import Plan, UnitResult, list_bad
from prepare.sources import describe_left_out
from prepare.split import HASH, POSITION, VAL_SOURCE, SplitRule
from prepare.text import BROKEN
from prepare.workspace import QUARANTINE
from shards import stored_json
from shards.cli import counted, printable
from shards.manifest import SPLITS, Manifest, Source, Split
from shards.tokenizer import Tokenizer

# Bad documents and bytes of text lost with them that are allowed without --max-bad, or a share of
# all documents and of all text, if that is more.
BAD_DOCUMENTS = 10
BAD_BYTES = 64 << 10
BAD_SHARE = 0.001
# The size of text that is not read yet is an estimate, which may be too low by this factor.
ESTIMATE_MARGIN = 10
# Losses named on the terminal; the list has all of them.
NAMED = 10


@dataclass(frozen=True)
class Entry:
    """A line of quarantine.jsonl: `BadDocuments` of the dataset."""

    source: str  # name of the file
    position: int
    reason: str
    documents: int
    generation: int
    bytes: int = 0  # myGPT 0.2 did not note it


def read_quarantine(content: bytes, name: str) -> list[Entry]:
    """Return the entries of quarantine.jsonl; `name` is its file. Raises ValueError."""
    remedy = "restore it, or remove it: then only what is bad from now on is listed"
    lines = [stored_json.parse(line, name, remedy) for line in content.splitlines()]
    return [stored_json.build(Entry, line, name, remedy=remedy) for line in lines]


def build_manifest(
    plan: Plan, results: Sequence[UnitResult], tokenizer: Tokenizer, base: Manifest | None
) -> Manifest:
    """Return the manifest of a finished plan; `results` in the order of their units.

    With `base`, the dataset appended to, its sources, shards and counts come first. Raises
    RuntimeError if the documents read are not all accounted for.
    """
    generation = plan.generation
    sources = tuple(Source(file.name, file.size, generation) for file in plan.files)
    splits = {}
    for name in SPLITS:
        shards = (shard for result in results for shard in result.shards[name])
        splits[name] = Split(tuple(replace(shard, generation=generation) for shard in shards))
    counts = {
        "read": sum(result.read for result in results),
        "written": sum(split.documents for split in splits.values()),
        "empty": sum(result.empty for result in results),
        "quarantined": sum(bad.documents for result in results for bad in result.bad),
        "duplicates": sum(result.duplicates for result in results),
    }
    if counts["read"] != sum(counts.values()) - counts["read"]:
        raise RuntimeError(f"not every document is accounted for: {counts}")
    if base is not None:
        counts = {name: base.counts.get(name, 0) + count for name, count in counts.items()}
        sources = base.sources + sources
        splits = {name: Split(base.splits[name].shards + splits[name].shards) for name in SPLITS}
    return Manifest(tokenizer.identity, asdict(plan.rule), sources, splits, counts, generation)


def quarantine(plan: Plan, results: Sequence[UnitResult]) -> list[Entry]:
    """List the bad documents in plan order."""
    listed: list[BadDocuments] = []
    for result in sorted(results, key=lambda result: result.unit):
        list_bad(listed, result.bad)
    values = [asdict(one) | {"source": plan.files[one.source].name} for one in listed]
    return [Entry(**one, generation=plan.generation) for one in values]


def text_bytes(results: Sequence[UnitResult]) -> int:
    """Return the bytes of text in the shards of some units."""
    return sum(shard.text_bytes for result in results for shard in result.all_shards())


def _allowed(max_bad: int | None, documents: int, text: int) -> tuple[int, int]:
    """Return how many of the documents, and how many bytes of their text, may be bad."""
    if max_bad is not None:
        return max_bad, max(BAD_BYTES, text * max_bad // max(documents, 1))
    return max(BAD_DOCUMENTS, int(BAD_SHARE * documents)), max(BAD_BYTES, int(BAD_SHARE * text))


def is_hopeless(bad: int, lost: int, text: int, max_bad: int | None) -> bool:
    """True if there are too many bad documents, or bytes lost, whatever is still to come.

    `text` is the estimated size of all text; a document has at least one byte.
    """
    if max_bad is not None:
        return bad > max_bad
    allowed, allowed_bytes = _allowed(None, text, ESTIMATE_MARGIN * text)
    return bad > allowed or lost > allowed_bytes


def check_bad(entries: list[Entry], documents: int, text: int, max_bad: int | None) -> None:
    """Raise ValueError if more of the documents read, or of their text, is bad than allowed.

    `entries` lists what is bad; `text` is the bytes of the other documents.
    """
    bad, lost = sum(entry.documents for entry in entries), sum(entry.bytes for entry in entries)
    allowed, allowed_bytes = _allowed(max_bad, documents, text + lost)
    if bad <= allowed and lost <= allowed_bytes:
        return
    if bad > allowed:
        first, needed = entries[0], bad
        counts = f"at most {allowed} bad documents of {documents}, found {bad}, the first"
    else:
        first = max(entries, key=lambda entry: entry.bytes)
        needed = -(-lost * documents // (text + lost))
        counts = (
            f"at most {allowed_bytes:,} of {text + lost:,} bytes of text in bad documents, found "
            f"{lost:,}, most of them"
        )
    raise ValueError(
        f"expected {counts} in {first.source} at {first.position} ({first.reason}): "
        f"{QUARANTINE} lists them; fix them, or raise --max-bad to {needed} and run again "
        "(finished work is kept)"
    )


def losses(entries: list[Entry], text: int) -> list[str]:
    """Describe how much text is bad beside `text` bytes that are not; name broken files."""
    if not entries:
        return []
    lost = sum(entry.bytes for entry in entries)
    share = lost / (text + lost or 1)
    lines = [f"left out   {lost:,} of {text + lost:,} bytes of text ({share:.1%})"]
    large = [one for one in entries if one.reason.startswith(BROKEN) or one.bytes > BAD_BYTES]
    for entry in large[:NAMED]:
        line = f"{entry.source} at {entry.position}: {entry.reason}"
        lines.append(f"           {printable(line)}")
    if large[NAMED:]:
        lines.append(f"           and {len(large) - NAMED} more: see {QUARANTINE}")
    return lines


def check_splits(manifest: Manifest, entries: Sequence[Entry]) -> None:
    """Raise ValueError if a split has no text; `entries` list what is bad."""
    if not manifest.counts["written"]:
        first = f"; {entries[0].source}: {entries[0].reason}" if entries else ""
        raise ValueError(
            f"expected text in the sources, found none ({manifest.counts['empty']} empty and "
            f"{manifest.counts['quarantined']} bad documents{first}): give sources with text"
        )
    written = counted(manifest.counts["written"], "document")
    for name, split in manifest.splits.items():
        if not any(shard.tokens > 1 for shard in split.shards):
            raise ValueError(
                f"expected {name} text, found none among {written}: "
                "give more documents, or choose what is validation text by --split position (one "
                "text file), another --val-fraction, or --val-source, and run again"
            )


def summary(
    plan: Plan,
    manifest: Manifest,
    results: Sequence[UnitResult],
    entries: list[Entry],
    seconds: float,
) -> str:
    """Describe the dataset for people; `seconds` is the time that this run took."""
    counts, splits = manifest.counts, manifest.splits
    tokens = sum(split.tokens for split in splits.values())
    text, new = manifest.text_bytes, text_bytes(results)
    duplicates = f" + {counts['duplicates']:,} duplicates" if counts.get("duplicates") else ""
    lines = [
        f"documents  {counts['read']:,} read = {counts['written']:,} written + "
        f"{counts['empty']:,} empty + {counts['quarantined']:,} quarantined{duplicates}"
        + (" (the two parts of a text count as two)" if plan.rule.rule == POSITION else ""),
        *losses(entries, new),
        f"text       {new / 1e6:,.1f} MB in {seconds:.1f} s, {new / 1e6 / seconds:,.1f} MB/s",
        f"tokens     {tokens:,}, {text / tokens:.2f} bytes each",
    ]
    for name, split in splits.items():
        lines.append(
            f"{name:9}  {counted(split.tokens, 'token')} ({split.tokens / tokens:.1%}), "
            f"{counted(split.documents, 'document')}, {counted(len(split.shards), 'shard')}"
        )
    if plan.left_out:
        lines.append(
            f"other      {describe_left_out(plan.left_out)}: no text; name such a file as SOURCE, "
            "and its type and what to do are said"
        )
    return "\n".join([*lines, *_far_split(plan.rule, splits)])


def _far_split(rule: SplitRule, splits: Mapping[str, Split]) -> Iterator[str]:
    """Yield a line if the validation split is far from the size that was requested."""
    documents = sum(split.documents for split in splits.values())
    requested = rule.val_fraction
    actual = splits["val"].tokens / sum(split.tokens for split in splits.values())
    if rule.rule == VAL_SOURCE or abs(actual - requested) < min(requested, 1 - requested) / 2:
        return
    why = "it is cut at the end of a line, and some lines are long: break them"
    if rule.rule == HASH:
        why = (
            f"whole documents are drawn, and there are few or very unequal ones "
            f"({counted(documents, 'document')}): cut long ones, or give --val-source, another "
            "--val-fraction, or --split position for one text file, and another --out"
        )
    yield f"note       {actual:.1%} of the tokens are validation text, not {requested:.0%}: {why}"
