"""Results of an evaluation for people: tables for the terminal, and Markdown to paste."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import stored_json
from shards.cli import counted, script

MAX_GROUPS = 12  # rows per table; eval.json has all of them
BITS_NOTE = (
    "Bits per byte: all nats, those of <|endoftext|> included, over the UTF-8 bytes of the text."
)
VOCABULARY_NOTE = (
    "The reference has another vocabulary, {}: compare bits per byte only. Nats and perplexities "
    "are per token of each model's own."
)
POSITION_NOTE = "Windows start anywhere in a document: a short context is often the middle of one."
CHOICE_NOTE = "Normalised: the log-probability of an ending divided by its characters."
Rows = list[tuple[str, ...]]  # of a table, the header first


@dataclass(frozen=True, kw_only=True)
class _Metrics:
    """Result of `metrics.of_documents`; None for a number that is not finite."""

    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    loss_se: float | None = None
    bits_per_byte_se: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Group(_Metrics):
    name: str
    tokens: int
    documents: int


@dataclass(frozen=True)
class _Baselines:
    unigram: _Metrics
    uniform: _Metrics


@dataclass(frozen=True)
class _Positions:
    bins: list[dict[str, float | None]]
    loss: list[float | None]

    def __post_init__(self) -> None:
        if any(not {"from", "to", "tokens", "loss"} <= bin_.keys() for bin_ in self.bins):
            raise ValueError("expected from, to, tokens and loss in each of positions.bins")


@dataclass(frozen=True)
class _Choices:
    questions: int
    accuracy: float | None
    accuracy_norm: float | None
    chance: float | None
    accuracy_se: float | None = None
    accuracy_norm_se: float | None = None


@dataclass(frozen=True)
class _Sample:
    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Model:
    checkpoint: str
    step: int | None
    max_steps: int | None
    parameters: int
    trained_on: str | None
    choices: dict[str, _Choices]


@dataclass(frozen=True, kw_only=True)
class _Reference(_Model, _Metrics):
    difference: float | None = None  # absent if the vocabularies differ
    difference_se: float | None = None
    difference_bits_per_byte: float | None = None  # absent in files of 0.2
    difference_bits_per_byte_se: float | None = None
    tokenizer: str = ""  # the reference's, if it is another


@dataclass(frozen=True, kw_only=True)
class _WithoutLoss(_Model):
    """The types of what is read of an eval.json that --no-loss wrote."""

    reference: _Model | None = None
    block_size: int
    version: str
    device: str
    precision: str
    samples: tuple[_Sample, ...] = ()

    def __post_init__(self) -> None:
        if self.reference and self.reference.choices.keys() != self.choices.keys():
            raise ValueError("expected the same choices for the model and its reference")


@dataclass(frozen=True, kw_only=True)
class _WithLoss(_WithoutLoss, _Group):
    """The types of what is read of an eval.json."""

    reference: _Reference | None = None
    name: str = ""
    data: str
    fingerprint: str
    text_bytes: int
    baselines: _Baselines
    components: list[_Group]
    sources: list[_Group]
    positions: _Positions


def read(path: Path) -> dict[str, Any]:
    """Return an eval.json. Raises FileNotFoundError, or ValueError if it is damaged."""
    remedy = f"run {script('eval.py')} {path.parent} again"
    report = stored_json.parse(path.read_bytes(), path, remedy)
    kind = _WithLoss if "loss" in report else _WithoutLoss
    stored_json.build(kind, report, path, ignore_unknown=True, remedy=remedy)
    return report


def number(value: float | None, spec: str = ".4f") -> str:
    """Format a number; JSON has null for one that is not finite."""
    return format(math.nan if value is None else value, spec)


def text(report: Mapping[str, Any]) -> str:
    """Format a report, but for its samples, for a terminal."""
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
    """Format a report with its samples as Markdown."""
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
    """The heading of a sample: its prompt and the settings it was drawn with."""
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
            f"{report['tokens']:,} targets, {counted(report['documents'], 'document')}, "
            f"{report['text_bytes']:,} bytes",
        )
    yield "context", f"{report['block_size']:,} tokens"
    yield "code", f"{report['version']}, {report['device']}, {report['precision']}"


def _model(identity: Mapping[str, Any]) -> str:
    if identity["step"] is None:
        return identity["checkpoint"]
    return f"{identity['checkpoint']}, step {identity['step']} of {identity['max_steps']}"


def tables(report: Mapping[str, Any]) -> Iterator[tuple[Rows, str]]:
    """Yield the tables of a report (an eval.json), losses first, each with the note below it."""
    if "loss" in report:
        note = BITS_NOTE
        if other := report.get("reference", {}).get("tokenizer"):
            note = f"{VOCABULARY_NOTE.format(other)} {note}"
        yield _with_note(_losses(report), "documents", note)
        for key in ("components", "sources"):
            # Sources of one document each, such as source files, say little one by one.
            if any(group["documents"] > 1 for group in report[key]):
                yield _groups(key.removesuffix("s"), report[key])
        yield _positions(report), POSITION_NOTE
    for name in report["choices"]:
        yield _with_note(_choices(report, name), "questions", CHOICE_NOTE)


def _with_note(rows: Rows, units: str, note: str) -> tuple[Rows, str]:
    """Return the table and the note below it, which explains "±" only if the table has one."""
    has_errors = any("±" in cell for row in rows for cell in row)
    return rows, (f"± one standard error, over {units}. " if has_errors else "") + note


def _losses(report: Mapping[str, Any]) -> Rows:
    rows: Rows = [("", "nats per token", "perplexity", "bits per byte")]
    models = {"this model": report}
    if reference := report.get("reference"):
        name = f"reference: {_model(reference)}"
        if reference["trained_on"] not in (None, report["fingerprint"]):
            name += f", trained on {reference['trained_on'][:12]}"
        models[name] = reference
    models["unigram baseline: token frequencies"] = report["baselines"]["unigram"]
    models["uniform baseline"] = report["baselines"]["uniform"]
    for name, metrics in models.items():
        nats, bits = with_error(metrics, "loss"), with_error(metrics, "bits_per_byte")
        rows.append((name, nats, number(metrics["perplexity"], ",.2f"), bits))
    if reference:
        nats, bits = (
            with_error(reference, key, "+") if key in reference else ""
            for key in ("difference", "difference_bits_per_byte")
        )
        rows.append(("this model minus the reference", nats, "", bits))
    return rows


def _groups(kind: str, groups: list[dict[str, Any]]) -> tuple[Rows, str]:
    rows: Rows = [(kind, "nats per token", "bits per byte", "targets", "documents")]
    for group in groups[:MAX_GROUPS]:
        losses = (with_error(group, "loss"), with_error(group, "bits_per_byte"))
        rows.append((group["name"], *losses, f"{group['tokens']:,}", f"{group['documents']:,}"))
    left = len(groups) - MAX_GROUPS
    return rows, f"and {left} smaller ones, in eval.json" if left > 0 else ""


def _positions(report: Mapping[str, Any]) -> Rows:
    rows: Rows = [("tokens of context", "nats per token", "targets")]
    for bin_ in report["positions"]["bins"]:
        low, high = bin_["from"], bin_["to"]
        if bin_["tokens"]:
            name = number(low, ",") + ("" if low == high else f" to {number(high, ',')}")
            rows.append((name, number(bin_["loss"]), number(bin_["tokens"], ",")))
    return rows


def _choices(report: Mapping[str, Any], name: str) -> Rows:
    rows: Rows = [(name, "accuracy", "normalised accuracy", "questions")]
    models = {"this model": report}
    if reference := report.get("reference"):
        models[f"reference: {_model(reference)}"] = reference
    for model, results in models.items():
        metrics = results["choices"][name]
        accuracies = (with_error(metrics, "accuracy"), with_error(metrics, "accuracy_norm"))
        rows.append((model, *accuracies, f"{metrics['questions']:,}"))
    rows.append(("random guessing", number(report["choices"][name]["chance"]), "", ""))
    return rows


def with_error(metrics: Mapping[str, Any], name: str, sign: str = "") -> str:
    """Format a metric with its standard error, if there is one."""
    error = metrics.get(f"{name}_se")
    return number(metrics[name], f"{sign}.4f") + ("" if error is None else f" ±{error:.4f}")


def _escaped(cell: str) -> str:
    """Escape what Markdown would interpret."""
    return cell.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")
