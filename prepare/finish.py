"""Results of units turned into quarantine.jsonl, the manifest and the closing summary."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from prepare import quarantine
from prepare.file_types import describe_left_out
from prepare.plan import Plan, UnitResult
from prepare.quarantine import BadDocuments, BadLimit, Entry
from prepare.split import HASH, POSITION, VAL_SOURCE, SplitRule
from prepare.workspace import REFUSED, Folder
from shards import stored_json
from shards.cli import counted, printable
from shards.manifest import SPLITS, Manifest, Source, Split
from shards.tokenizer import Tokenizer

# Losses named on the terminal; the list has all of them.
NAMED = 10


def stop_early(
    results: Iterable[UnitResult], plan: Plan, folder: Folder, limit: BadLimit
) -> Iterator[UnitResult]:
    """Yield the results. Raises ValueError once too much is bad, whatever is still to come."""
    documents, lost = quarantine.total_bad(plan.bad)
    seen = [plan.inspection()]
    for result in results:
        seen.append(result)
        more_documents, more_lost = quarantine.total_bad(result.bad)
        documents, lost = documents + more_documents, lost + more_lost
        if limit.is_exceeded(documents, lost):
            store_quarantine(seen, plan, folder, limit)
        yield result


def store_quarantine(
    results: Sequence[UnitResult], plan: Plan, folder: Folder, limit: BadLimit
) -> list[Entry]:
    """Write quarantine.jsonl and return the entries of the plan's generation.

    Raises ValueError if too much of what was read for it is bad.
    """
    listed: list[BadDocuments] = []
    for result in sorted(results, key=lambda result: result.unit):
        quarantine.list_bad(listed, result.bad)
    values = [asdict(one) | {"source": plan.files[one.source].name} for one in listed]
    entries = [Entry(**one, generation=plan.generation) for one in values]
    earlier = [entry for entry in _stored(folder) if entry.generation < plan.generation]
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in earlier + entries]
    folder.write(quarantine.QUARANTINE, "".join(lines).encode())
    documents, text = sum(result.read for result in results), _text_bytes(results)
    try:
        quarantine.check_bad(entries, documents, text, limit)
    except ValueError:
        print(*losses(entries, text), sep="\n")
        folder.write(REFUSED, b"")
        raise
    return entries


def _stored(folder: Folder) -> list[Entry]:
    """Return the entries of quarantine.jsonl. Raises ValueError if it is damaged."""
    content, name = folder.read(quarantine.QUARANTINE) or b"", f"{folder}/{quarantine.QUARANTINE}"
    remedy = "restore it, or remove it: then only what is bad from now on is listed"
    lines = [stored_json.parse(line, name, remedy) for line in content.splitlines()]
    return [stored_json.build(Entry, line, name, remedy=remedy) for line in lines]


def _text_bytes(results: Sequence[UnitResult]) -> int:
    """Return the bytes of text in the shards of some units, or that were hashed."""
    written = sum(shard.text_bytes for result in results for shard in result.all_shards())
    return written + sum(result.hashed_bytes for result in results)


def losses(entries: list[Entry], text: int) -> list[str]:
    """Describe how much text is bad beside `text` bytes that are not; name broken files."""
    if not entries:
        return []
    _, lost = quarantine.total_bad(entries)
    share = lost / (text + lost or 1)
    lines = [f"left out   {lost:,} of {text + lost:,} bytes of text ({share:.1%})"]
    large = [
        one
        for one in entries
        if one.reason.startswith(quarantine.BROKEN) or one.bytes > quarantine.BAD_BYTES
    ]
    for entry in large[:NAMED]:
        line = f"{entry.source} at {entry.position}: {entry.reason}"
        lines.append(f"           {printable(line)}")
    if large[NAMED:]:
        lines.append(f"           and {len(large) - NAMED} more: see {quarantine.QUARANTINE}")
    return lines


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


def check_splits(manifest: Manifest, entries: Sequence[Entry]) -> None:
    """Raise ValueError if a split has no text; `entries` list what is bad."""
    if not manifest.counts["written"]:
        bad = counted(manifest.counts["quarantined"], "bad document")
        first = f", the first {entries[0].source} ({entries[0].reason})" if entries else ""
        raise ValueError(
            f"expected text in the sources, found none ({manifest.counts['empty']} empty and {bad})"
            f"{first}: give sources with text"
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
    text, new = manifest.text_bytes, _text_bytes(results)
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
            f"other      {describe_left_out(plan.left_out)}: not read; naming one as SOURCE "
            "says why, and what to do"
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
