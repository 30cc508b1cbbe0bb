"""Tokenise text into a dataset of memory-mapped shards.

    python -m prepare SOURCE... --out data/NAME

Rerunning a killed run resumes it; rerunning a finished one says so and does nothing.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tqdm import tqdm

from shards.cli import one_line_errors

if TYPE_CHECKING:
    from prepare.plan import Plan
    from prepare.workspace import Workspace


@dataclass(frozen=True)
class Options:
    """Tokenise text files into training and validation shards."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders, globs, URIs (s3://, gs://, hf://), or the word stdlib."""
    out: Path
    """The dataset's folder, data/NAME say."""
    workers: int = os.cpu_count() or 1
    """Processes to work with."""
    split: str = "auto"
    """hash (by document), position (one text file, at a line end), or auto: position for one text
    file, else hash."""
    val_fraction: float = 0.1
    """Share of the text that becomes validation text."""
    val_source: Annotated[tuple[str, ...], tyro.conf.arg(name="val-source")] = ()
    """Sources of validation text of one's own; then no other text becomes validation text."""
    text_column: str | None = None
    """The column or field with the text; by default text, else content."""
    max_bad: int | None = None
    """Documents that may be unreadable; by default 10, or 0.1 % of them if that is more."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("expected a SOURCE, found none: give a file, a folder, or stdlib")
        if self.workers < 1:
            raise ValueError(f"expected --workers of at least 1, found {self.workers}")


def main() -> None:
    """Parse the flags and prepare."""
    with one_line_errors():
        prepare(tyro.cli(Options, prog="python -m prepare"))


def prepare(options: Options) -> None:
    """Make, or go on making, the dataset `options.out`. Raises ValueError or OSError."""
    # After the flags, so that --help answers at once.
    from prepare import finish
    from prepare.plan import Request, make_plan
    from prepare.workspace import Workspace
    from shards import tokenizer

    started = time.perf_counter()
    workspace = Workspace(options.out)
    workspace.refuse_strangers()
    plan = make_plan(
        Request(
            sources=options.sources,
            val_sources=options.val_source,
            split=options.split,
            val_fraction=options.val_fraction,
            text_column=options.text_column,
        )
    )
    with workspace.locked():
        workspace.begin(plan)
        if workspace.is_complete():
            print(f"{options.out} is complete: nothing to do.")
            return
        run_units(plan, workspace, options.workers)
        done = workspace.records()
        records = [done[unit.number] for unit in plan.units]
        manifest = finish.build_manifest(plan, records, tokenizer.load())
        finish.write_quarantine(plan, records, options.out)
        finish.check_bad(manifest, options.out, options.max_bad)
        finish.check_splits(manifest)
        manifest.save(options.out)
        workspace.close()
    text = finish.summary(manifest, time.perf_counter() - started)
    workspace.log(*(warning for record in records for warning in record.warnings), text)
    print(text)
    print(f"The dataset is in {options.out}: python -m shards info {options.out}")


def run_units(plan: "Plan", workspace: "Workspace", workers: int) -> None:
    """Run the units that are not finished yet, showing progress."""
    from prepare.engine import run_local

    done = workspace.records()
    waiting = [unit for unit in plan.units if unit.number not in done]
    if done:
        print(f"Resuming: {len(done)} of {len(plan.units)} units are finished.")
    tokens = 0
    total = sum(unit.weight for unit in plan.units)
    finished = total - sum(unit.weight for unit in waiting)
    weights = {unit.number: unit.weight for unit in waiting}
    with tqdm(total=total, initial=finished, unit="B", unit_scale=True, desc="prepare") as bar:
        for record in run_local(plan, waiting, workspace, workers):
            tokens += record.tokens
            seconds = bar.format_dict["elapsed"] or 1
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.1f}M tokens/s", refresh=False)
            bar.update(weights[record.unit])


if __name__ == "__main__":
    main()
