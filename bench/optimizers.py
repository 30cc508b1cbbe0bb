"""Which optimizer and schedule learn most in the same time: whole runs of `train.py tiny`.

    python -m prepare stdlib --out data/stdlib
    python -m bench.optimizers --data data/stdlib --seconds 300

Each contender is a run with --time-budget, as a user would start it, one after the other, in turns
if there are several rounds: compare on a machine that does nothing else. The loss is the one on a
fixed part of the validation split, after the last step.
"""

import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tyro

from bench import table
from mygpt import log
from shards.cli import one_line_errors

TRAIN = Path(__file__).parents[1] / "train.py"
FIRST_SEED = 1337


class Contender(NamedTuple):
    """A way to train, with the learning rate that suits it: it ends at a twentieth of that."""

    optimizer: str
    schedule: str
    max_lr: float


CONTENDERS = (
    Contender("adamw", "cosine", 3e-3),
    Contender("adamw", "wsd", 3e-3),
    Contender("muon", "cosine", 8e-3),
    Contender("muon", "wsd", 8e-3),
)


@dataclass(frozen=True)
class Options:
    """Compare optimizers and schedules at equal time."""

    data: Path = Path("data/stdlib")
    """Folder of the dataset."""
    preset: str = "tiny"
    """What is trained."""
    seconds: float = 300
    """Time of each run's training, the last validation left out."""
    val_tokens: int = 2**16
    """Size of the part of the validation split that the losses are on."""
    device: str = "auto"
    """Where, as for train.py."""
    rounds: int = 1
    """How often each contender is trained, each time with another seed."""
    json: bool = False
    """Answer with one JSON object on one line."""


def main() -> None:
    """Train them all, and print the table."""
    options = tyro.cli(Options, prog="python -m bench.optimizers", description=__doc__)
    with one_line_errors():
        found = run(options)
    print(json.dumps(found) if options.json else as_text(found))


def run(options: Options) -> dict[str, Any]:
    """What came of every contender, as JSON. Raises ValueError if a run fails."""
    if not (options.data / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{options.data} holds no dataset: python -m prepare stdlib --out {options.data}"
        )
    runs = table.alternately(
        {
            " ".join(map(str, c)): partial(trained, c, options, itertools.count(FIRST_SEED))
            for c in CONTENDERS
        },
        options.rounds,
    )
    return {
        "command": shlex.join(["python", "-m", "bench.optimizers", *sys.argv[1:]]),
        "machine": table.machine(("torch",)),
        "preset": options.preset,
        "seconds": options.seconds,
        "val_tokens": options.val_tokens,
        "rounds": options.rounds,
        "rows": [
            {
                **contender._asdict(),
                "loss": table.spread([one["loss"] for one in runs[contender]], 4),
                "steps": [one["steps"] for one in runs[contender]],
                "tokens_s": table.spread([one["tokens_s"] for one in runs[contender]]),
                "seconds": table.spread([one["seconds"] for one in runs[contender]]),
            }
            for contender in CONTENDERS
        ],
    }


def trained(
    contender: Contender, options: Options, seeds: Iterator[int]
) -> dict[Contender, dict[str, float]]:
    """One run, in a folder that is thrown away: its last validation loss, and how far it came."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, str(TRAIN), *flags(contender, options, Path(folder))]
        done = subprocess.run(
            [*command, "--seed", str(next(seeds))], capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            last = (done.stderr.strip() or "no word").splitlines()[-1]
            raise ValueError(f"expected train.py to finish, found: {last}")
        history = log.read(Path(folder))
    steps = max(history.val)
    rate = statistics.median(history.tokens_per_second.values())
    return {
        contender: {
            "loss": history.val[steps],
            "steps": steps,
            "tokens_s": rate,
            "seconds": seconds,
        }
    }


def flags(contender: Contender, options: Options, run: Path) -> list[str]:
    """The arguments of `train.py`."""
    never = str(2**31)  # the last step is always validated
    asked = {
        "--data": options.data,
        "--log-dir": run,
        "--time-budget": options.seconds,
        "--optimizer": contender.optimizer,
        "--schedule": contender.schedule,
        "--max-lr": contender.max_lr,
        "--min-lr": contender.max_lr / 20,
        "--val-tokens": options.val_tokens,
        "--val-interval": never,
        "--checkpoint-interval": never,
        "--device": options.device,
    }
    return [options.preset, *(str(word) for flag in asked.items() for word in flag)]


def as_text(found: Mapping[str, Any]) -> str:
    """What `run` found, for people."""
    machine = found["machine"]
    rows = [
        (
            f"{row['optimizer']}, {row['schedule']}",
            f"{row['max_lr']:g}",
            f"{row['loss']['median']:.3f}",
            f"{row['loss']['low']:.3f} to {row['loss']['high']:.3f}",
            " ".join(map(str, row["steps"])),
            f"{row['tokens_s']['median']:,.0f}",
            f"{row['seconds']['median']:.0f}",
        )
        for row in found["rows"]
    ]
    headers = ("", "max lr", "val loss", "low to high", "steps", "tokens/s", "whole run, s")
    return "\n".join(
        [
            f"$ {found['command']}",
            f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, Python "
            f"{machine['python']}, torch {machine['packages']['torch']}",
            f"{found['preset']}, {found['seconds']:g} seconds each; loss on {found['val_tokens']:,}"
            f" tokens of the validation split; rounds: {found['rounds']}",
            "",
            table.as_text(headers, rows),
        ]
    )


if __name__ == "__main__":
    main()
