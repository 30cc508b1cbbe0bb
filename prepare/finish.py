"""Results of all units turned into the manifest, the quarantine list and the closing summary."""

from dataclasses import asdict, replace
from typing import Any

from prepare.plan import Plan, UnitResult
from prepare.workspace import QUARANTINE
from shards.manifest import SPLITS, Manifest, Source, Split, TokenizerIdentity
from shards.tokenizer import Tokenizer

# Bad documents allowed without --max-bad: so many, or this share of all documents if that is more.
BAD_DOCUMENTS = 10
BAD_SHARE = 0.001


def build_manifest(
    plan: Plan, results: list[UnitResult], tokenizer: Tokenizer, base: Manifest | None = None
) -> Manifest:
    """Return the manifest of a finished plan; `results` in the order of their units.

    With `base`, the dataset appended to, its sources, shards and counts come first. Raises
    RuntimeError if the documents read are not all accounted for.
    """
    generation = plan.generation
    splits = {}
    for name in SPLITS:
        shards = (shard for result in results for shard in result.shards[name])
        splits[name] = Split(tuple(replace(shard, generation=generation) for shard in shards))
    counts = _counts(plan, results, sum(split.documents for split in splits.values()))
    sources = tuple(Source(file.name, file.size, generation) for file in plan.files)
    if base is not None:
        counts = {name: base.counts.get(name, 0) + count for name, count in counts.items()}
        sources = base.sources + sources
        splits = {name: Split(base.splits[name].shards + splits[name].shards) for name in SPLITS}
    identity = TokenizerIdentity(tokenizer.name, tokenizer.n_vocab, tokenizer.eot, tokenizer.hash)
    return Manifest(identity, asdict(plan.rule), sources, splits, counts, generation)


def _counts(plan: Plan, results: list[UnitResult], written: int) -> dict[str, int]:
    """Count the documents by what became of them."""
    unreadable = sum(bad.documents for bad in plan.bad)
    counts = {
        "read": unreadable + sum(result.read for result in results),
        "written": written,
        "empty": sum(result.empty for result in results),
        "quarantined": unreadable + sum(bad.documents for result in results for bad in result.bad),
        "duplicates": sum(result.duplicates for result in results),
    }
    if counts["read"] != sum(counts.values()) - counts["read"]:
        raise RuntimeError(f"not every document is accounted for: {counts}")
    return counts


def quarantine(
    plan: Plan, results: list[UnitResult], earlier: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """List the bad documents in plan order, after those of `earlier` generations."""
    entries = [entry for entry in earlier if entry["generation"] < plan.generation]
    for bad in [*plan.bad, *(bad for result in results for bad in result.bad)]:
        name = plan.files[bad.source].name
        entries.append(asdict(bad) | {"source": name, "generation": plan.generation})
    return entries


def check_bad(manifest: Manifest, entries: list[dict[str, Any]], max_bad: int | None) -> None:
    """Raise ValueError if more documents are bad than allowed; `entries` lists them."""
    counts = manifest.counts
    allowed = max(BAD_DOCUMENTS, int(BAD_SHARE * counts["read"])) if max_bad is None else max_bad
    if counts["quarantined"] > allowed:
        first = entries[0]
        raise ValueError(
            f"expected at most {allowed} bad documents of {counts['read']}, found "
            f"{counts['quarantined']}, the first in {first['source']} at {first['position']} "
            f"({first['reason']}): {QUARANTINE} lists them; fix them, or raise --max-bad and run "
            "again (finished work is kept)"
        )


def check_splits(manifest: Manifest) -> None:
    """Raise ValueError if a split has no text."""
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


def summary(manifest: Manifest, results: list[UnitResult], seconds: float) -> str:
    """Describe the dataset for people; `seconds` is the time that this run took."""
    counts, splits = manifest.counts, manifest.splits
    tokens = sum(split.tokens for split in splits.values())
    text = sum(split.text_bytes for split in splits.values())
    new = sum(shard.text_bytes for result in results for shard in result.all_shards()) / 1e6
    duplicates = f" + {counts['duplicates']:,} duplicates" if counts.get("duplicates") else ""
    lines = [
        f"documents  {counts['read']:,} read = {counts['written']:,} written + "
        f"{counts['empty']:,} empty + {counts['quarantined']:,} quarantined{duplicates}",
        f"text       {new:,.1f} MB in {seconds:.1f} s, {new / seconds:,.1f} MB/s",
        f"tokens     {tokens:,}, {text / tokens:.2f} bytes each",
    ]
    for name, split in splits.items():
        lines.append(
            f"{name:9}  {split.tokens:,} tokens ({split.tokens / tokens:.1%}), "
            f"{split.documents:,} documents, {len(split.shards)} shards"
        )
    return "\n".join(lines)
