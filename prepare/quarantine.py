"""Bad documents: listed in quarantine.jsonl, and too many of them refused."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from prepare.input_file import BadDocuments
from prepare.plan import BAD_BYTES, BadLimit, Plan, UnitResult, list_bad, total_bad
from prepare.text import BROKEN
from prepare.workspace import QUARANTINE, REFUSED, Folder
from shards import stored_json
from shards.cli import printable

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


def stop_early(
    results: Iterable[UnitResult], plan: Plan, folder: Folder, limit: BadLimit
) -> Iterator[UnitResult]:
    """Yield the results. Raises ValueError once too much is bad, whatever is still to come."""
    documents, lost = total_bad(plan.bad)
    seen = [plan.inspection()]
    for result in results:
        seen.append(result)
        more_documents, more_lost = total_bad(result.bad)
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
        list_bad(listed, result.bad)
    values = [asdict(one) | {"source": plan.files[one.source].name} for one in listed]
    entries = [Entry(**one, generation=plan.generation) for one in values]
    earlier = [entry for entry in _stored(folder) if entry.generation < plan.generation]
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in earlier + entries]
    folder.write(QUARANTINE, "".join(lines).encode())
    documents, text = sum(result.read for result in results), text_bytes(results)
    try:
        check_bad(entries, documents, text, limit)
    except ValueError:
        print(*losses(entries, text), sep="\n")
        folder.write(REFUSED, b"")
        raise
    return entries


def _stored(folder: Folder) -> list[Entry]:
    """Return the entries of quarantine.jsonl. Raises ValueError if it is damaged."""
    content, name = folder.read(QUARANTINE) or b"", f"{folder}/{QUARANTINE}"
    remedy = "restore it, or remove it: then only what is bad from now on is listed"
    lines = [stored_json.parse(line, name, remedy) for line in content.splitlines()]
    return [stored_json.build(Entry, line, name, remedy=remedy) for line in lines]


def text_bytes(results: Sequence[UnitResult]) -> int:
    """Return the bytes of text in the shards of some units."""
    return sum(shard.text_bytes for result in results for shard in result.all_shards())


def check_bad(entries: list[Entry], documents: int, text: int, limit: BadLimit) -> None:
    """Raise ValueError if more of the documents read, or of their text, is bad than allowed.

    `entries` lists what is bad; `text` is the bytes of the other documents.
    """
    bad, lost = sum(entry.documents for entry in entries), sum(entry.bytes for entry in entries)
    allowed, allowed_bytes = limit.allowed(documents, text + lost)
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
