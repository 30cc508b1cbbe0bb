"""Several runs on one page: their final figures, their curves, the settings that differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from mygpt import run_config
from mygpt.eval import summary
from mygpt.plot import smoothed
from mygpt.report import page
from mygpt.report.chart import COLOURS, Line, chart, short
from mygpt.report.run_summary import RunSummary

TABLE = ("run", "parameters", "steps", "tokens", "loss of the subset", "loss", "bits per byte")
SCORES = ("loss", "bits_per_byte")  # of eval.json, the last two columns
NOTE = (
    "Loss of the subset: the last one of training, over a fixed part of the validation split. Loss "
    "and bits per byte: over the whole split, by eval.py."
)
VOCABULARIES = (
    "The runs have different vocabularies, so their tokens differ in length: bits per byte can be "
    "compared, losses can't."
)


def parts(runs: Sequence[RunSummary]) -> Iterator[str]:
    """Yield the parts of the page. Raises ValueError for more runs than there are colours."""
    if len(runs) > len(COLOURS):
        raise ValueError(f"expected at most {len(COLOURS)} runs on a page, found {len(runs)}")
    named = names(runs)
    yield f"<header>\n<h1>{len(runs)} runs</h1>"
    yield (
        page.paragraph(", ".join(map(str, (run.run for run in runs))), "lead") + "</header>\n<main>"
    )
    vocabularies = {run.dataset.tokenizer.hash for run in runs if run.dataset}
    yield page.table(_figures(named), TABLE, numbers=len(TABLE) - 1)
    yield page.paragraph(NOTE, "note")
    yield page.paragraph(VOCABULARIES if len(vocabularies) > 1 else "", "note")
    yield page.section("Validation loss", _losses(named, "val"))
    yield page.section("Training loss, smoothed", _losses(named, "train"))
    yield page.section("Settings that differ", _settings(named))
    yield "</main>\n<footer>Written by <code>python -m mygpt.report RUN RUN...</code></footer>"


def names(runs: Sequence[RunSummary]) -> dict[str, RunSummary]:
    """Return the runs by the names of their folders, or by their paths if two are the same."""
    short_names = {run.run.name: run for run in runs}
    return short_names if len(short_names) == len(runs) else {str(run.run): run for run in runs}


def _figures(named: Mapping[str, RunSummary]) -> Iterator[list[str]]:
    for name, run in named.items():
        found, val = run.evaluation or {}, list(run.history.val.values())
        scores = [summary.with_error(found, key) if key in found else "" for key in SCORES]
        yield [
            name,
            short(run.config.model.num_params),
            f"{run.step:,} of {run.config.max_steps:,}",
            short(run.step * run.config.total_batch_size),
            f"{val[-1]:.4f}" if val else "",
            *scores,
        ]


def _losses(named: Mapping[str, RunSummary], split: str) -> str:
    """A chart over the tokens that each run was trained on: steps may differ in size."""
    lines = []
    for colour, (name, run) in zip(COLOURS, named.items(), strict=False):
        series = getattr(run.history, split)
        values = smoothed(list(series.values())).tolist() if split == "train" else series.values()
        tokens = (step * run.config.total_batch_size for step in series)
        style: Literal["plain", "dots"] = "plain" if split == "train" else "dots"
        lines.append(Line(name, colour, dict(zip(tokens, values, strict=True)), style))
    drawn = chart("Loss", "nats per token, over training tokens", lines, is_log=True, per="token")
    return f'<div class="large">{drawn}</div>'


def _settings(named: Mapping[str, RunSummary]) -> str:
    settings = []
    for run in named.values():
        values = run_config.to_dict(run.config)
        settings.append({**values.pop("model"), **values})
    rows = [
        [key, *(json.dumps(values.get(key)) for values in settings)]
        for key in settings[0]
        if key != "log_dir" and any(values.get(key) != settings[0][key] for values in settings)
    ]
    return page.table(rows, ("setting", *named)) if rows else ""
