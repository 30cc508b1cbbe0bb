"""The figures of an evaluation for people: on the terminal, and as Markdown to paste."""

from collections.abc import Iterator, Mapping
from typing import Any

SHOWN_SOURCES = 12  # the largest; eval.json has them all
ERRORS = (
    "± one standard error, over documents. Bits per byte: of all nats, those of <|endoftext|> too, "
    "over the UTF-8 bytes of the text."
)
POSITIONS = "Windows begin anywhere in a document, so short contexts are often the middle of one."
CHOICES = "± one standard error, over questions. A character: log-probability divided by length."
Rows = list[tuple[str, ...]]  # of a table; the first is its head


def text(report: Mapping[str, Any]) -> str:
    """Everything but the samples, for a terminal."""
    width = max(len(name) for name, _ in _identity(report)) + 2
    lines = [f"{name:{width}}{value}" for name, value in _identity(report)]
    for rows, note in tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append("")
        for row in rows:
            cells = [cell.rjust(size) for cell, size in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
        lines += [note] if note else []
    return "\n".join(lines)


def markdown(report: Mapping[str, Any]) -> str:
    """Everything, samples included."""
    parts = ["# Evaluation", "\n".join(f"- {name}: {value}" for name, value in _identity(report))]
    for (head, *body), note in tables(report):
        bar = ("---", *["---:"] * (len(head) - 1))
        lines = ["| " + " | ".join(map(_escaped, row)) + " |" for row in (head, bar, *body)]
        parts += ["\n".join(lines), *([note.replace("<", "\\<")] if note else [])]
    for number, sample in enumerate(report["samples"], start=1):
        lines = [f"    {line}".rstrip() for line in sample["text"].split("\n")]
        parts += [f"## {_escaped(title(sample, number))}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def title(sample: Mapping[str, Any], number: int) -> str:
    """What stands above a sample: its prompt, and how it was drawn from what."""
    how = [f"temperature {sample['temperature']:g}"]
    how += [f"top-k {sample['top_k']}"] if sample["top_k"] else []
    how += [f"top-p {sample['top_p']:g}"] if sample["top_p"] < 1 else []
    how += [f"seed {sample['seed']}"]
    how += [f"{sample['weights']} weights"] if sample["weights"] != "fp32" else []
    step = "" if sample["step"] is None else f", step {sample['step']}"
    return f"sample {number}, prompt {sample['prompt']!r}, {', '.join(how)}{step}"


def _identity(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "checkpoint", f"{_model(report)}, {report['parameters']:,} parameters"
    if "loss" in report:
        yield (
            "data",
            f"{report['data']} ({report['fingerprint'][:12]}), whole validation split: "
            f"{report['tokens']:,} targets, {report['documents']:,} documents, "
            f"{report['text_bytes']:,} bytes",
        )
    yield "context", f"{report['block_size']:,} tokens"
    yield "code", f"{report['version']}, {report['device']}, {report['precision']}"


def _model(facts: Mapping[str, Any]) -> str:
    if facts["step"] is None:
        return facts["checkpoint"]
    return f"{facts['checkpoint']}, step {facts['step']} of {facts['max_steps']}"


def tables(report: Mapping[str, Any]) -> Iterator[tuple[Rows, str]]:
    """The tables of a report (an eval.json), the losses' first, each with the note below it."""
    if "loss" in report:
        yield _losses(report), ERRORS
        for key in ("components", "sources"):
            # Sources of one document each, as files of code are, tell little: eval.json has them.
            if any(group["documents"] > 1 for group in report[key]):
                yield _groups(key.removesuffix("s"), report[key])
        yield _positions(report), POSITIONS
    for name in report["choices"]:
        yield _choices(report, name), CHOICES


def _losses(report: Mapping[str, Any]) -> Rows:
    rows: Rows = [("", "nats a token", "perplexity", "bits per byte")]
    models = {"this model": report}
    if reference := report.get("reference"):
        name = _model(reference)
        if reference["trained_on"] not in (None, report["fingerprint"]):
            name += f", trained on {reference['trained_on'][:12]}"
        models[name] = reference
    models["unigram: token frequencies"] = report["baselines"]["unigram"]
    models["uniform: nothing known"] = report["baselines"]["uniform"]
    for name, found in models.items():
        nats, bits = _pm(found, "loss"), _pm(found, "bits_per_byte")
        rows.append((name, nats, f"{found['perplexity']:,.2f}", bits))
    if reference:
        rows.append(("this model less the other", _pm(reference, "difference", "+"), "", ""))
    return rows


def _groups(kind: str, found: list[dict[str, Any]]) -> tuple[Rows, str]:
    rows: Rows = [(kind, "nats a token", "bits per byte", "targets", "documents")]
    for group in found[:SHOWN_SOURCES]:
        counts = (f"{group['tokens']:,}", f"{group['documents']:,}")
        rows.append((group["name"], _pm(group, "loss"), _pm(group, "bits_per_byte"), *counts))
    left = len(found) - SHOWN_SOURCES
    return rows, f"and {left} smaller ones, in eval.json" if left > 0 else ""


def _positions(report: Mapping[str, Any]) -> Rows:
    rows: Rows = [("tokens read before", "nats a token", "targets")]
    for place in report["positions"]["bins"]:
        low, high = place["from"], place["to"]
        if place["tokens"]:
            name = f"{low:,}" if low == high else f"{low:,} to {high:,}"
            rows.append((name, f"{place['loss']:.4f}", f"{place['tokens']:,}"))
    return rows


def _choices(report: Mapping[str, Any], name: str) -> Rows:
    rows: Rows = [(name, "accuracy", "by a character", "questions")]
    models = {"this model": report}
    if reference := report.get("reference"):
        models[_model(reference)] = reference
    for title_, model in models.items():
        found = model["choices"][name]
        figures = (_pm(found, "accuracy"), _pm(found, "accuracy_norm"))
        rows.append((title_, *figures, f"{found['questions']:,}"))
    rows.append(("guessing", f"{report['choices'][name]['chance']:.4f}", "", ""))
    return rows


def _pm(found: Mapping[str, Any], name: str, sign: str = "") -> str:
    """A figure with its standard error, where that is known."""
    error = found.get(f"{name}_se")
    return f"{found[name]:{sign}.4f}" + ("" if error is None else f" ±{error:.4f}")


def _escaped(cell: str) -> str:
    """Text that Markdown leaves as it is."""
    return cell.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")
