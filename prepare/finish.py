"""Records of all units → the manifest, what was left out, and the closing summary."""

from dataclasses import asdict, replace
from typing import Any

from prepare.plan import Plan
from prepare.unit import Record
from prepare.workspace import QUARANTINE
from shards.manifest import SPLITS, Manifest, Source, Split, TokenizerIdentity
from shards.tokenizer import Tokenizer

# How many documents may be bad unless --max-bad says: so many, or this share of them if more.
BAD_DOCUMENTS = 10
BAD_SHARE = 0.001


def build_manifest(
    plan: Plan, records: list[Record], tokenizer: Tokenizer, base: Manifest | None = None
) -> Manifest:
    """The manifest of a finished plan; `records` in the order of their units, after `base`.

    Raises RuntimeError if the documents read are not all accounted for.
    """
    generation = plan.generation
    splits = {
        side: Split(
            tuple(
                replace(shard, generation=generation)
                for record in records
                for shard in record.shards[side]
            )
        )
        for side in SPLITS
    }
    counts = _counts(plan, records, sum(split.documents for split in splits.values()))
    sources = tuple(Source(file.name, file.size, generation) for file in plan.files)
    if base is not None:
        counts = {name: base.counts.get(name, 0) + count for name, count in counts.items()}
        sources = base.sources + sources
        splits = {side: Split(base.splits[side].shards + splits[side].shards) for side in SPLITS}
    return Manifest(
        tokenizer=TokenizerIdentity(
            tokenizer.name, tokenizer.n_vocab, tokenizer.eot, tokenizer.hash
        ),
        split_rule=plan.rule.record(),
        sources=sources,
        splits=splits,
        counts=counts,
        generation=generation,
    )


def _counts(plan: Plan, records: list[Record], written: int) -> dict[str, int]:
    """What became of each document that was read."""
    unreadable = sum(bad.documents for bad in plan.bad)
    counts = {
        "read": unreadable + sum(record.read for record in records),
        "written": written,
        "empty": sum(record.empty for record in records),
        "quarantined": unreadable + sum(bad.documents for record in records for bad in record.bad),
        "duplicates": sum(record.duplicates for record in records),
    }
    if counts["read"] != sum(counts.values()) - counts["read"]:
        raise RuntimeError(f"not every document is accounted for: {counts}")
    return counts


def check_bad(manifest: Manifest, entries: list[dict[str, Any]], max_bad: int | None) -> None:
    """Raise ValueError if more documents are bad than allowed; `entries` lists them."""
    counts = manifest.counts
    allowed = max(BAD_DOCUMENTS, int(BAD_SHARE * counts["read"])) if max_bad is None else max_bad
    if counts["quarantined"] > allowed:
        first = entries[0]
        raise ValueError(
            f"expected at most {allowed} bad documents of {counts['read']}, found "
            f"{counts['quarantined']}, the first in {first['source']} at {first['position']} "
            f"({first['reason']}): {QUARANTINE} lists them; mend them, or raise --max-bad and run "
            "again (finished work is kept)"
        )


def check_splits(manifest: Manifest) -> None:
    """Raise ValueError if a split is too short to be used."""
    if not manifest.counts["written"]:
        raise ValueError(
            f"expected text in the sources, found none ({manifest.counts['empty']} empty and "
            f"{manifest.counts['quarantined']} bad documents): give sources with text"
        )
    for name, split in manifest.splits.items():
        if not any(shard.tokens > 1 for shard in split.shards):
            raise ValueError(
                f"expected {name} text, found none among {manifest.counts['written']} documents: "
                "give more documents, or choose what is validation text by --split position (one "
                "text file), another --val-fraction, or --val-source, and run again"
            )


def quarantine(
    plan: Plan, records: list[Record], before: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What was left out, in plan order, after the entries of earlier generations."""
    entries = [entry for entry in before if entry["generation"] < plan.generation]
    for bad in [*plan.bad, *(bad for record in records for bad in record.bad)]:
        name = plan.files[bad.source].name
        entries.append(asdict(bad) | {"source": name, "generation": plan.generation})
    return entries


def summary(manifest: Manifest, records: list[Record], seconds: float) -> str:
    """What was prepared, for people; `seconds` is the time that the records' units took."""
    counts, splits = manifest.counts, manifest.splits
    tokens = sum(split.tokens for split in splits.values())
    text = sum(split.text_bytes for split in splits.values())
    new = sum(record.text_bytes for record in records)
    duplicates = f" + {counts['duplicates']:,} duplicates" if counts.get("duplicates") else ""
    lines = [
        f"documents  {counts['read']:,} read = {counts['written']:,} written + "
        f"{counts['empty']:,} empty + {counts['quarantined']:,} quarantined{duplicates}",
        f"text       {new / 1e6:,.1f} MB in {seconds:.1f} s, {new / 1e6 / seconds:,.1f} MB/s",
        f"tokens     {tokens:,}, {text / tokens:.2f} bytes each",
    ]
    for name, split in splits.items():
        lines.append(
            f"{name:9}  {split.tokens:,} tokens ({split.tokens / tokens:.1%}), "
            f"{split.documents:,} documents, {len(split.shards)} shards"
        )
    return "\n".join(lines)
