"""Everything that is to be known of a GPU, in one command of some nine minutes.

    python -m bench.gpu OUT                 measure; OUT gets results.jsonl and log.txt
    python -m bench.gpu --report OUT        print the tables and marks, draw the race

Stages run as processes of their own under one deadline, and write each finding at once; one that
fails, is killed or finds too little time left loses only its own. docs/BENCHMARKS.md says what a
machine without a network needs.
"""

import shlex
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from bench.gpu import report
from bench.gpu.runner import RESULTS, Runner, Setting, Stage
from bench.table import Device, Preset
from mygpt.distributed import check_room
from shards.cli import one_line_errors

DEADLINE = 520.0
STAGES = (
    Stage("machine", "bench.gpu.stages:machine", beside="all"),
    Stage("text", "bench.gpu.stages:text", beside="all"),
    Stage("warm", "bench.gpu.stages:warm", beside="smoke"),
    Stage("smoke", "bench.gpu.smoke:run", seconds=65, least=30),
    Stage("micro", "bench.gpu.micro:run", seconds=55, least=15),
    Stage("train", "bench.gpu.stages:train", seconds=230, least=60),
    Stage("profile", "bench.gpu.stages:profile", seconds=30, least=20),
    Stage("generate", "bench.gpu.stages:generate", seconds=40, least=20),
    Stage("race", "bench.gpu.race:run", seconds=210, least=90),
    Stage("run", "bench.gpu.stages:run", seconds=75, least=40),
)


@dataclass(frozen=True)
class Options:
    """Measure a GPU, or report what was measured."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the results: a new one to measure, one with results to report."""
    report: bool = False
    """Print what was measured as Markdown, and draw the race."""
    pictures: Path = Path("docs")
    """Folder for the pictures of the report."""
    deadline: float = DEADLINE
    """Seconds for everything; with more of them, each stage gets more."""
    preset: Preset = "gpt2"
    """Shape of the model."""
    device: Device = "cuda"
    """Device to measure; a CPU only to rehearse."""


@one_line_errors()
def main() -> None:
    """Run the command."""
    options = tyro.cli(Options, prog="python -m bench.gpu", description=__doc__)
    if options.report:
        print(report.as_text(options.out, options.pictures))
    elif unfinished := measure(options):
        print(f"not finished: {', '.join(unfinished)}", file=sys.stderr)
        sys.exit(1)


def measure(options: Options) -> list[str]:
    """Run all stages and return the names of those that did not finish.

    Raises ValueError without the device, or if `out` holds results already.
    """
    check_room(1, options.device)
    if (options.out / RESULTS).exists():
        raise ValueError(f"{options.out} holds results already: give a new folder, or --report")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the stages too
    factor = max(1.0, options.deadline / DEADLINE)
    stages = [replace(stage, seconds=stage.seconds * factor) for stage in STAGES]
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as work:
        setting = Setting("all", options.preset, options.device, options.out.resolve(), Path(work))
        command = shlex.join(["python", "-m", "bench.gpu", *sys.argv[1:]])
        setting.note({"command": command, "deadline": options.deadline})
        return Runner(setting, options.deadline).run(stages)


if __name__ == "__main__":
    main()
