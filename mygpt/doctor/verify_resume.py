"""Check on this machine, with this data, that a resumed run equals an uninterrupted one.

    python -m mygpt.doctor.verify_resume tiny --data data/web --steps 20 --device cpu

Trains 2N steps in one go and N steps, a stop and N more, and compares bit by bit; then, without
dropout, 2N steps on one rank and on two, and compares to rounding. Flags other than --steps go to
train.py. Exit code: 0 equal; 1 different, with the first difference; 2 a training failed.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shards.cli import end_on_interrupt, one_line_errors, require_values

MAX_STEPS = 10**6


def parse(args: Sequence[str] | None) -> tuple[int, list[str]]:
    """Read the command line: (--steps, the flags for train.py)."""
    parser = argparse.ArgumentParser(
        "python -m mygpt.doctor.verify_resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=10, help="N: the run is twice as long")
    options, flags = parser.parse_known_args(args)
    require_values(options)
    if not 1 <= options.steps <= MAX_STEPS:
        raise ValueError(f"--steps must be 1 to {MAX_STEPS}, got {options.steps}")
    return options.steps, flags


if __name__ == "__main__":  # answer --help before the imports below, which take seconds
    end_on_interrupt()
    with one_line_errors():
        parse(sys.argv[1:])

import torch

from mygpt import checkpoint, command_line, log
from mygpt.__main__ import script_path
from mygpt.distributed import find_device
from mygpt.schedule import micro_batch_sizes
from mygpt.settings import TrainConfig

ROUNDING = 1e-3  # relative difference of losses that a different order of summation may cause


@one_line_errors()
def main(args: Sequence[str] | None = None) -> int:
    """Run both comparisons and print their results. Returns the exit code."""
    steps, flags = parse(args)
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        results = []
        for comparison, difference in differences(Path(folder), flags, steps):
            print(f"{comparison}: {difference or 'equal'}", flush=True)
            results.append(difference)
    return 1 if any(results) else 0


def differences(folder: Path, flags: Sequence[str], steps: int) -> Iterator[tuple[str, str]]:
    """Train and compare: (comparison, its first difference or "")."""
    config = command_line.parse(flags, "")
    device = find_device(config.device)
    length = ["--max-steps", str(2 * steps), "--log-interval", str(2 * steps)]
    if device == "cuda":
        length.append("--deterministic")
    straight, stopped, two = (folder / name for name in ("straight", "stopped", "two-ranks"))
    train([*flags, *length], straight)
    train([*flags, *length, "--stop-at", str(steps)], stopped)
    train([*flags, *length], stopped)
    comparison = f"{2 * steps} steps against {steps} + {steps}, bit by bit"
    yield comparison, first_bit_difference(straight, stopped)
    has_two = device == "cpu" or torch.cuda.device_count() > 1
    # Each rank draws a dropout mask of its own, so dropout would make the two runs differ.
    flags = [*flags, *length, "--dropout", "0", "--device", device if has_two else "cpu"]
    if config.model.dropout or not has_two:
        shutil.rmtree(straight)
        train(flags, straight)
    train([*flags, "--micro-batch", str(micro_batch_of_two_ranks(config))], two, ranks=2)
    comparison = f"{2 * steps} steps on one rank against two, to rounding"
    yield comparison, first_loss_difference(straight, two)


def train(flags: Sequence[str], run: Path, ranks: int = 1) -> None:
    """Train into a folder; ValueError if train.py fails."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    print(f"training into {run.name} ...", flush=True)
    command = [*launcher, str(script_path("train.py")), *flags, "--log-dir", str(run)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ValueError(f"train.py ended with {done.returncode}, see above")


def micro_batch_of_two_ranks(config: TrainConfig) -> int:
    """The largest micro-batch with which two ranks can share the sequences of a step."""
    sizes = micro_batch_sizes(config.total_batch_size, config.model.block_size, world_size=2)
    return max(size for size in sizes if size <= (config.micro_batch or size))


def first_bit_difference(one: Path, other: Path) -> str:
    """The first difference of two runs: a step's loss, or a tensor of the last checkpoint."""
    if difference := first_loss_difference(one, other, rounding=0):
        return difference
    folders = [checkpoint.find(run) for run in (one, other)]
    loaders = [checkpoint.read_state(folder)["loader"] for folder in folders]
    if loaders[0] != loaders[1]:
        return f"the positions in the data differ: {loaders[0]} and {loaders[1]}"
    for load in (checkpoint.load_weights, checkpoint.load_optimizer):
        ours, theirs = (load(folder) for folder in folders)
        for name, tensor in ours.items():
            if name not in theirs or not tensor.equal(theirs[name]):
                return f"{name} differs in the last checkpoint, though all logged losses are equal"
    return ""


def first_loss_difference(one: Path, other: Path, rounding: float = ROUNDING) -> str:
    """The first step whose logged losses differ by more than rounding, or ""."""
    left, right = log.read(one).train, log.read(other).train
    for step in sorted(left.keys() | right.keys()):
        if step not in left or step not in right:
            return f"only one of them has step {step}"
        if not math.isclose(left[step], right[step], rel_tol=rounding, abs_tol=0):
            return f"step {step} is the first to differ, loss {left[step]} and {right[step]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
