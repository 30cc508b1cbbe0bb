"""Report of a run: one HTML file that needs nothing else, for a browser or a phone.

    python -m mygpt.report log/demo                writes log/demo/report.html
    python -m mygpt.report log/small log/wide      compares runs in log/report.html

It holds the data, the settings, the curves, skipped steps, texts written during training and the
results of eval.py, all read from the run's folder and the dataset's manifest.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.cli import end_on_interrupt, one_line_errors, require_values, script


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m mygpt.report",
        description="Write a run's report into RUN/report.html, or compare several runs.",
    )
    several = (
        "folder of the run; several are compared, in report.html of the folder that holds them"
    )
    parser.add_argument("run", type=Path, nargs="+", help=several)
    parser.add_argument("--data", action="append", help="where its dataset lies, if it has moved")
    return require_values(parser.parse_args(args))


if __name__ == "__main__":  # answer --help before the imports below, which take seconds
    end_on_interrupt()
    with one_line_errors():
        parse(sys.argv[1:])

from mygpt import run_config
from mygpt.eval import summary
from mygpt.log import METRICS
from mygpt.report import comparison, page, run_summary
from mygpt.report.chart import Line, chart, short
from mygpt.report.run_summary import RunSummary
from shards.files import atomic_file
from shards.mixture import Mixture

MAX_SAMPLES = 8  # the others are folded away


@one_line_errors()
def main(args: Sequence[str] | None = None) -> int:
    """Write the report of the run on the command line. Returns the exit code."""
    options = parse(args)
    print(write(options.run, options.data or ()))
    return 0


def write(runs: Sequence[Path], data: Sequence[str] = ()) -> Path:
    """Write RUN/report.html, or the comparison of several runs, all or nothing; return its path.

    `data` says where the dataset lies, if it has moved. Raises FileNotFoundError or ValueError, in
    one line, if there is no run.
    """
    found = [run_summary.of_run(run, data) for run in runs]
    folder = os.path.relpath(os.path.commonpath([run.absolute() for run in runs]))
    path = Path(folder if runs[1:] else runs[0]) / "report.html"
    title = ", ".join(run.name for run in runs)
    parts = comparison.parts(found) if runs[1:] else _parts(found[0])
    html = page.document(f"{title} · myGPT", parts)
    with atomic_file(path) as file:
        file.write(html.encode())
    return path


def _parts(about: RunSummary) -> Iterator[str]:
    yield f"<header>\n<h1>{page.escape(about.run.name)}</h1>\n{_lead(about)}\n</header>\n<main>"
    yield page.tiles(_tiles(about))
    yield page.section("Learning curve", _losses(about))
    yield page.section("Training", _curves(about), _skipped(about))
    yield page.section("Samples", *_samples(about))
    yield page.section("Evaluation", *_evaluation(about))
    yield page.section("Data", *_data(about))
    yield page.section("Configuration", *_configuration(about))
    command = page.escape(f"python -m mygpt.report {about.run}")
    yield f"</main>\n<footer>Written by <code>{command}</code></footer>"


def _lead(about: RunSummary) -> str:
    config, model = about.config, about.config.model
    state = "finished" if about.step >= config.max_steps else f"at step {about.step:,}"
    sources = ", ".join(c.name for c in about.dataset.components) if about.dataset else "data"
    return page.paragraph(
        f"A GPT-2 of {model.n_layers} layers, {model.n_heads} heads, width {model.n_embed} and "
        f"{model.block_size} tokens of context, trained on {sources}; {state}.",
        "lead",
    )


def _tiles(about: RunSummary) -> Iterator[tuple[str, str, str]]:
    """Yield the key numbers: exact ones if eval.py has run, else those of the log."""
    history, found = about.history, about.evaluation
    if found and "loss" in found:
        note = f"whole validation split, step {found.get('step')}"
        yield "Validation loss", summary.number(found["loss"]), note
        yield "Perplexity", summary.number(found["perplexity"], ",.2f"), "exp(loss)"
        yield "Bits per byte", summary.number(found["bits_per_byte"]), "<|endoftext|> included"
    elif history.val:
        step, loss = list(history.val.items())[-1]
        yield "Validation loss", f"{loss:.4f}", f"fixed subset, step {step:,}"
        yield "Perplexity", f"{math.exp(min(loss, 700)):,.2f}", "of that subset"
        yield "Best validation loss", f"{min(history.val.values()):.4f}", "fixed subset"
    tokens = short(about.step * about.config.total_batch_size)
    yield "Steps", f"{about.step:,}", f"of {about.config.max_steps:,}; {tokens} tokens"
    yield "Parameters", short(about.config.model.num_params), "embeddings included"
    if speeds := sorted(history.timings["tokens_per_second"].values()):
        yield "Tokens per second", short(speeds[len(speeds) // 2]), "median over steps"


def _losses(about: RunSummary) -> str:
    history = about.history
    lines = [
        Line("training, smoothed", "first", history.train, "smoothed"),
        Line("validation subset", "second", history.val, "dots"),
    ]
    if history.unigram is not None:
        name = f"unigram baseline, {history.unigram:.2f}"
        lines.append(Line(name, "quiet", {0: history.unigram}, "level"))
    drawn = chart("Loss", "nats per token", lines, is_log=True, marks=history.skipped)
    rows = [
        [f"{step:,}", f"{history.train[step]:.4f}" if step in history.train else "", f"{loss:.4f}"]
        for step, loss in history.val.items()
    ]
    head = ("step", "training loss", "validation loss")
    numbers = page.details("The same in numbers", page.table(rows, head, numbers=2))
    return f'<div class="large">{drawn}</div>' + (numbers if rows else "")


def _curves(about: RunSummary) -> str:
    history = about.history
    drawn = [
        chart(
            metric.chart,
            metric.unit,
            [Line(metric.label, "first", history.of(metric), metric.style)],
            is_log=metric.log_scale,
            marks=history.skipped,
        )
        for metric in METRICS
        if metric.chart
    ]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _skipped(about: RunSummary) -> str:
    rows = [[f"{step:,}", reason] for step, reason in about.history.skipped.items()]
    if not rows:
        return ""
    title = f"{len(rows)} skipped step{'s' * (len(rows) > 1)}"
    return page.table(rows, ("step", "reason"), title)


def _samples(about: RunSummary) -> Iterator[str]:
    """Yield the texts written during training, oldest first, then those of eval.py."""
    found = about.evaluation or {}
    texts = [(f"step {sample['step']:,}", sample) for sample in about.samples]
    texts += [(f"eval.py, step {found.get('step')}", sample) for sample in found.get("samples", ())]
    samples = [page.text_sample(title, text["prompt"], text["text"]) for title, text in texts]
    shown = run_summary.first_to_last(len(samples), MAX_SAMPLES)
    yield from (samples[i] for i in shown)
    if rest := [sample for i, sample in enumerate(samples) if i not in shown]:
        yield page.details(f"{len(rest)} more", *rest)


def _evaluation(about: RunSummary) -> Iterator[str]:
    found = about.evaluation
    if found is None:
        yield page.paragraph(
            f"Not evaluated on the whole validation split yet: {script('eval.py')} {about.run}",
            "note",
        )
        return
    tables = [
        page.table(rows, head, numbers=len(head) - 1) + page.paragraph(note, "note")
        for (head, *rows), note in summary.tables(found)
    ]
    yield from tables[:1]
    if losses := found.get("positions", {}).get("loss"):
        values = {read: loss for read, loss in enumerate(losses, start=1) if loss is not None}
        title = "Loss by length of the context"
        yield chart(title, "nats per token", [Line("loss", "first", values, "smoothed")])
    yield from tables[1:]


def _data(about: RunSummary) -> Iterator[str]:
    if about.dataset is None:
        yield page.paragraph(f"The dataset could not be opened: {about.missing}", "note")
        yield page.table([["fingerprint", about.record.fingerprint]])
        return
    rows = []
    for component, manifest in zip(about.dataset.components, about.dataset.manifests, strict=True):
        for name, split in manifest.splits.items():
            title = f"{component.name}, {'training' if name == 'train' else 'validation'}"
            counts = (f"{n:,}" for n in (split.tokens, split.documents, len(split.shards)))
            ratio = f"{split.text_bytes / split.tokens:.2f}" if split.tokens else ""
            rows.append([title, *counts, ratio])
    head = ("", "tokens", "documents", "shards", "bytes per token")
    yield page.table(rows, head, numbers=4)
    yield page.table(_identity(about, about.dataset))


def _identity(about: RunSummary, dataset: Mixture) -> Iterator[list[str]]:
    yield ["fingerprint", about.record.fingerprint]
    for former in about.record.earlier:
        yield [f"until step {former.until:,}", former.fingerprint]
    tokenizer = dataset.tokenizer
    yield ["tokenizer", f"{tokenizer.name}, {tokenizer.n_vocab:,} ids, {tokenizer.hash[:12]}"]
    for component, manifest in zip(dataset.components, dataset.manifests, strict=True):
        weight = f"weight {component.weight:g}; " if len(dataset.manifests) > 1 else ""
        rule = ", ".join(f"{key} {value}" for key, value in manifest.split_rule.items())
        yield [component.name, f"{weight}generation {manifest.generation}; {rule}"]
        if manifest.counts:
            counts = ", ".join(f"{count:,} {key}" for key, count in manifest.counts.items())
            yield [f"{component.name}, documents", counts]
        if names := [source.name for source in manifest.sources]:
            more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
            yield [f"{component.name}, files", ", ".join(names[:5]) + more]


def _configuration(about: RunSummary) -> Iterator[str]:
    values = run_config.to_dict(about.config)
    for title, settings in {"model": values.pop("model"), "training": values}.items():
        rows = [[name, json.dumps(value)] for name, value in settings.items()]
        yield page.details(f"{title}, {len(rows)} settings", page.table(rows))


if __name__ == "__main__":
    sys.exit(main())
