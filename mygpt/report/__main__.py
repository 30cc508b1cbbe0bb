"""A run's report: one HTML file that needs nothing else, for a browser or a phone.

    python -m mygpt.report log/demo     writes log/demo/report.html

What it was trained on and how, its curves, the steps it skipped, what it wrote while it learned,
and what eval.py found: all read from the run's folder, some of it from the dataset's manifest.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from mygpt.doctor.memory import parameters
from mygpt.eval import summary
from mygpt.report import page, run_summary
from mygpt.report.chart import Line, chart
from mygpt.report.run_summary import Facts
from shards.files import atomic_file

MOST_SAMPLES = 8  # shown; the others are folded away


def write(run: Path, data: Sequence[str] = ()) -> Path:
    """Write RUN/report.html, all or nothing, and return its path.

    `data` says where the dataset lies, if it has moved. Raises FileNotFoundError or ValueError, in
    one line, where there is no run.
    """
    path = run / "report.html"
    html = page.document(f"{run.name} · myGPT", _parts(run_summary.of_run(run, data)))
    with atomic_file(path) as file:
        file.write(html.encode())
    return path


def _parts(about: Facts) -> Iterator[str]:
    yield f"<header>\n<h1>{page.escape(about.run.name)}</h1>\n{_lead(about)}\n</header>\n<main>"
    yield page.tiles(_tiles(about))
    yield page.section("Learning", _losses(about))
    yield page.section("Along the way", _curves(about), _skipped(about))
    yield page.section("What it writes", *_samples(about))
    yield page.section("Evaluation", *_evaluation(about))
    yield page.section("Data", *_data(about))
    yield page.section("Configuration", *_configuration(about))
    command = page.escape(f"python -m mygpt.report {about.run}")
    yield f"</main>\n<footer>Made by <code>{command}</code>.</footer>"


def _lead(about: Facts) -> str:
    config, model = about.config, about.config.model
    done = max(about.history.train, default=0)
    state = "finished" if done >= config.max_steps else f"at step {done:,}"
    sources = ", ".join(c.name for c in about.dataset.components) if about.dataset else "data"
    return page.paragraph(
        f"A GPT-2 of {model.n_layers} layers, {model.n_heads} heads, {model.n_embed} wide, "
        f"{model.block_size} tokens of context, trained on {sources}; {state}.",
        "lead",
    )


def _tiles(about: Facts) -> Iterator[tuple[str, str, str]]:
    """The figures at the top: exact ones where eval.py has run, else those of the log."""
    history, found = about.history, about.evaluation
    if found and "loss" in found:
        note = f"whole validation split, step {found.get('step')}"
        yield "Validation loss", f"{found['loss']:.4f}", note
        yield "Perplexity", f"{found['perplexity']:,.2f}", "equally likely tokens"
        yield "Bits per byte", f"{found['bits_per_byte']:.4f}", "<|endoftext|> included"
    elif history.val:
        step, loss = list(history.val.items())[-1]
        yield "Validation loss", f"{loss:.4f}", f"fixed subset, step {step:,}"
        yield "Perplexity", f"{math.exp(min(loss, 700)):,.2f}", "of that subset"
        best = min(history.val.values())
        yield "Best validation loss", f"{best:.4f}", "fixed subset"
    done = max(history.train, default=0)
    tokens = _compact(done * about.config.total_batch_size)
    yield "Steps", f"{done:,}", f"of {about.config.max_steps:,}; {tokens} tokens"
    yield "Parameters", _compact(parameters(about.config.model)), "embeddings included"
    if speeds := sorted(history.tokens_per_second.values()):
        yield "Tokens a second", _compact(speeds[len(speeds) // 2]), "median of the steps"


def _compact(number: float) -> str:
    """A count in three digits: 7.24M."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def _losses(about: Facts) -> str:
    history = about.history
    lines = [
        Line("training, smoothed", "first", history.train, "smoothed"),
        Line("validation subset", "second", history.val, "dots"),
    ]
    if history.unigram is not None:
        name = f"token frequencies alone, {history.unigram:.2f}"
        lines.append(Line(name, "quiet", {0: history.unigram}, "level"))
    drawn = chart("Loss", "nats a token", lines, is_log=True, marks=history.skipped)
    rows = [
        [f"{step:,}", _number(history.train.get(step)), f"{loss:.4f}"]
        for step, loss in history.val.items()
    ]
    head = ("step", "training loss", "validation loss")
    numbers = page.details("The same in numbers", page.table(rows, head, numbers=2))
    return f'<div class="large">{drawn}</div>' + (numbers if rows else "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _curves(about: Facts) -> str:
    history = about.history
    drawn = (
        chart("Learning rate", "", [Line("learning rate", "third", history.lr)]),
        chart(
            "Gradient norm",
            "unclipped",
            [Line("norm", "first", history.norm, "smoothed")],
            is_log=True,
            marks=history.skipped,
        ),
        chart(
            "Throughput",
            "tokens a second",
            [Line("tokens a second", "first", history.tokens_per_second, "smoothed")],
        ),
    )
    return f'<div class="charts">{"".join(drawn)}</div>'


def _skipped(about: Facts) -> str:
    rows = [[f"{step:,}", reason] for step, reason in about.history.skipped.items()]
    if not rows:
        return ""
    title = f"{len(rows)} skipped step{'s' * (len(rows) > 1)}"
    return page.table(rows, ("step", "why"), title)


def _samples(about: Facts) -> Iterator[str]:
    """What was written during training, oldest first, then what eval.py drew at the end."""
    samples = [
        page.text_sample(f"step {sample['step']:,}", sample["prompt"], sample["text"])
        for sample in about.samples
    ]
    found = about.evaluation or {}
    samples += [
        page.text_sample(f"eval.py, step {found.get('step')}", sample["prompt"], sample["text"])
        for sample in found.get("samples", ())
    ]
    shown = run_summary.spread(len(samples), MOST_SAMPLES)
    yield from (samples[i] for i in shown)
    if rest := [sample for i, sample in enumerate(samples) if i not in shown]:
        yield page.details(f"{len(rest)} more", *rest)


def _evaluation(about: Facts) -> Iterator[str]:
    found = about.evaluation
    if found is None:
        yield page.paragraph(
            f"Not evaluated over the whole validation split yet: python eval.py {about.run}", "note"
        )
        return
    tables = [
        page.table(rows, head, numbers=len(head) - 1) + page.paragraph(note, "note")
        for (head, *rows), note in summary.tables(found)
    ]
    yield from tables[:1]
    if losses := found.get("positions", {}).get("loss"):
        values = {read: loss for read, loss in enumerate(losses, start=1) if loss is not None}
        title = "Loss by the number of tokens read before"
        yield chart(title, "nats a token", [Line("loss", "first", values, "smoothed")])
    yield from tables[1:]


def _data(about: Facts) -> Iterator[str]:
    if about.dataset is None:
        yield page.paragraph(f"The dataset is out of reach: {about.missing}", "note")
        yield page.table([["fingerprint", about.fingerprint]])
        return
    rows = []
    for component, manifest in zip(about.dataset.components, about.dataset.manifests, strict=True):
        for name, split in manifest.splits.items():
            a_token = f"{split.text_bytes / split.tokens:.2f}" if split.tokens else ""
            rows.append(
                [
                    f"{component.name}, {'training' if name == 'train' else 'validation'}",
                    *(f"{n:,}" for n in (split.tokens, split.documents, len(split.shards))),
                    a_token,
                ]
            )
    head = ("", "tokens", "documents", "shards", "bytes a token")
    yield page.table(rows, head, numbers=4)
    yield page.table(_identity(about))


def _identity(about: Facts) -> Iterator[list[str]]:
    assert about.dataset is not None
    yield ["fingerprint", about.fingerprint]
    for before in about.earlier:
        yield [f"until step {before['until']:,}", before["fingerprint"]]
    tokenizer = about.dataset.tokenizer
    yield ["tokenizer", f"{tokenizer.name}, {tokenizer.n_vocab:,} ids, {tokenizer.hash[:12]}"]
    for component, manifest in zip(about.dataset.components, about.dataset.manifests, strict=True):
        several = len(about.dataset.manifests) > 1
        weight = f"weight {component.weight:g}; " if several else ""
        rule = ", ".join(f"{key} {value}" for key, value in manifest.split_rule.items())
        counts = ", ".join(f"{count:,} {key}" for key, count in manifest.counts.items())
        yield [component.name, f"{weight}generation {manifest.generation}; {rule}"]
        if counts:
            yield [f"{component.name}, documents", counts]
        names = [source.name for source in manifest.sources]
        told = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
        if names:
            yield [f"{component.name}, files", told]


def _configuration(about: Facts) -> Iterator[str]:
    values = asdict(about.config)
    model = values.pop("model")
    told = {"model": model, "training": values}
    for title, settings in told.items():
        rows = [[name, _setting(value)] for name, value in settings.items()]
        yield page.details(f"{title}, {len(rows)} settings", page.table(rows))


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(args: Sequence[str] | None = None) -> int:
    """Write the report of the run named on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m mygpt.report", description="Write a run's report into RUN/report.html."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--data", action="append", default=[], help="where its dataset lies, if it has moved"
    )
    asked = parser.parse_args(args)
    try:
        print(write(asked.run, asked.data))
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
