"""Records of all units → quarantine.jsonl, manifest.json and the closing summary."""

import json
from dataclasses import asdict
from pathlib import Path

from prepare.plan import Plan
from prepare.unit import Record
from shards.atomic import atomic_file
from shards.manifest import SPLITS, Manifest, Source, Split, TokenizerIdentity
from shards.tokenizer import Tokenizer

QUARANTINE = "quarantine.jsonl"
# How many documents may be bad unless --max-bad says: so many, or this share of them if more.
BAD_DOCUMENTS = 10
BAD_SHARE = 0.001


def build_manifest(plan: Plan, records: list[Record], tokenizer: Tokenizer) -> Manifest:
    """The manifest of a finished plan; `records` in the order of their units."""
    bad = sum(entry.documents for entry in plan.bad)
    read = bad + sum(record.read for record in records)
    bad += sum(entry.documents for record in records for entry in record.bad)
    splits = {
        side: Split(tuple(shard for record in records for shard in record.shards[side]))
        for side in SPLITS
    }
    written = sum(split.documents for split in splits.values())
    empty = sum(record.empty for record in records)
    if read != written + empty + bad:
        raise RuntimeError(
            f"{read} documents were read but {written} written, {empty} empty and {bad} bad"
        )
    return Manifest(
        tokenizer=TokenizerIdentity(
            tokenizer.name, tokenizer.n_vocab, tokenizer.eot, tokenizer.hash
        ),
        rule=plan.rule.record(),
        sources=tuple(Source(file.name, file.size) for file in plan.files),
        splits=splits,
        counts={"read": read, "written": written, "empty": empty, "quarantined": bad},
    )


def check_bad(manifest: Manifest, folder: Path, max_bad: int | None) -> None:
    """Raise ValueError if more documents are bad than allowed."""
    counts = manifest.counts
    allowed = max(BAD_DOCUMENTS, int(BAD_SHARE * counts["read"])) if max_bad is None else max_bad
    if counts["quarantined"] > allowed:
        first = json.loads((folder / QUARANTINE).read_text("utf-8").splitlines()[0])
        raise ValueError(
            f"expected at most {allowed} bad documents of {counts['read']}, found "
            f"{counts['quarantined']}, the first in {first['source']} at {first['position']} "
            f"({first['reason']}): see {folder / QUARANTINE}; mend them, or raise --max-bad and "
            "run again (finished work is kept)"
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
                "text file), another --val-fraction, or --val-source"
            )


def write_quarantine(plan: Plan, records: list[Record], folder: Path) -> None:
    """List what was left out, in plan order, one JSON object a line."""
    entries = [*plan.bad, *(bad for record in records for bad in record.bad)]
    with atomic_file(folder / QUARANTINE) as file:
        for entry in entries:
            line = asdict(entry) | {"source": plan.files[entry.source].name}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


def summary(manifest: Manifest, seconds: float) -> str:
    """What was prepared, for people."""
    counts, splits = manifest.counts, manifest.splits
    tokens = sum(split.tokens for split in splits.values())
    text = sum(split.text_bytes for split in splits.values())
    lines = [
        f"documents  {counts['read']:,} read = {counts['written']:,} written + "
        f"{counts['empty']:,} empty + {counts['quarantined']:,} quarantined",
        f"text       {text / 1e6:,.1f} MB in {seconds:.1f} s, {text / 1e6 / seconds:,.1f} MB/s",
        f"tokens     {tokens:,}, {text / tokens:.2f} bytes each",
    ]
    for name, split in splits.items():
        lines.append(
            f"{name:9}  {split.tokens:,} tokens ({split.tokens / tokens:.1%}), "
            f"{split.documents:,} documents, {len(split.shards)} shards"
        )
    return "\n".join(lines)
