"""Loss of each sequence of a training step, largest first: which text made the loss jump.

    python -m mygpt.explain --run log/web --step 1200

The losses are those of a checkpoint, by default the newest before the step, without dropout. Where
the sequences came from is what `python -m shards explain` says.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shards.cli import end_on_interrupt, one_line_errors

if __name__ == "__main__":
    end_on_interrupt()

import tyro
from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg


@dataclass(frozen=True)
class Options:
    """Rank the sequences of a training step by their losses."""

    run_dir: Annotated[Path, arg(name="run")]  # the run's folder
    step: int  # the finished step, as log.txt counts them
    checkpoint: Path | None = None  # the weights; else the run's newest ones before the step
    data: UseAppendAction[tuple[str, ...]] = ()  # its datasets, if they were moved; as in train.py
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these available
    json: bool = False  # print one JSON object per sequence and line, with the whole text


def parse(args: Sequence[str] | None) -> Options:
    """Read the flags."""
    config = (FlagCreatePairsOff,)
    return tyro.cli(Options, args=args, prog="python -m mygpt.explain", config=config)


if __name__ == "__main__":  # answer --help before the imports below, which take seconds
    with one_line_errors():
        parse(sys.argv[1:])

import torch

from mygpt import checkpoint
from mygpt.distributed import DistributedContext, find_device
from mygpt.evaluate import token_losses
from mygpt.pretrained import from_pretrained
from shards.commands.explain import Row, rows_of


@one_line_errors()
def main(args: Sequence[str] | None = None) -> int:
    """Print the sequences with their losses. Returns the exit code."""
    options = parse(args)
    folder = options.checkpoint or newest_before(options.run_dir, options.step)
    rows = list(rows_of(options.run_dir, options.step, None, options.data))
    losses = losses_of(rows, folder, torch.device(find_device(options.device)))
    ranked = sorted(zip(losses, rows, strict=True), key=lambda pair: -pair[0])
    if options.json:
        for loss, row in ranked:
            print(json.dumps({"loss": loss, **row.to_dict()}))
        return 0
    print(f"mean {sum(losses) / len(losses):.4f} nats per token, by {folder}")
    for loss, row in ranked:
        print(f"loss {loss:.4f}  {row.as_text(whole=False)}")
    return 0


def newest_before(run_dir: Path, step: int) -> Path:
    """Return the newest checkpoint of a run before a step; FileNotFoundError if there is none."""
    steps = checkpoint.steps(run_dir)
    if earlier := [number for number in steps if number < step]:
        return checkpoint.folder_of(run_dir, earlier[-1])
    found = checkpoint.folder_of(run_dir, steps[0]) if steps else "none"
    raise FileNotFoundError(
        f"expected a checkpoint of {run_dir} before step {step}, found {found}: give one with "
        "--checkpoint, and train with --keep-every to have more of them"
    )


def losses_of(rows: Sequence[Row], folder: Path, device: torch.device) -> list[float]:
    """Return the mean loss of each row in nats per token, by the weights of a checkpoint."""
    model, alone = from_pretrained(folder).to(device), DistributedContext(0, 0, 1, device)
    windows = [row.ids for row in rows]
    batches = token_losses(model, windows, alone, progress=sys.stderr.isatty())
    return [
        loss for _, nats, counted in batches for loss in (nats.sum(1) / counted.sum(1)).tolist()
    ]


if __name__ == "__main__":
    sys.exit(main())
