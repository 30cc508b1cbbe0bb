"""Does a resumed run equal one that was never stopped, on this machine and with this data?

    python -m mygpt.doctor.verify_resume tiny --data data/web --steps 20 --device cpu

Trains 2N steps at once, then N steps, a stop, and N more, and compares bit by bit; then, without
dropout, 2N steps on one rank and on two, and compares to rounding. What is not --steps is given to
train.py. Exit code: 0 equal; 1 not, with the first difference; 2 a training failed.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mygpt import log, settings

TRAIN = Path(__file__).parents[2] / "train.py"
EXIT_DIFFERENT, EXIT_FAILED = 1, 2
# Relative difference of a loss that may come from adding up in another order.
ROUNDING = 1e-3


def main(args: Sequence[str] | None = None) -> int:
    """Run both comparisons and print what came of them. Returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m mygpt.doctor.verify_resume", description=__doc__, allow_abbrev=False
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=10, help="N: the run is twice as long")
    asked, flags = parser.parse_known_args(args)
    with tempfile.TemporaryDirectory(prefix="verify-resume-") as folder:
        try:
            found = list(differences(Path(folder), flags, asked.steps))
        except subprocess.CalledProcessError as error:
            parser.exit(EXIT_FAILED, f"error: train.py ended with {error.returncode}, see above\n")
        except ValueError as error:
            parser.exit(EXIT_FAILED, f"error: {error}\n")
    return EXIT_DIFFERENT if any(found) else 0


def differences(folder: Path, flags: Sequence[str], steps: int) -> Iterator[str]:
    """What differs, an empty text for each comparison in which nothing does; printed as found."""
    import torch  # for which --help should not wait

    from mygpt import distributed

    config = settings.parse(flags, "")
    device = distributed.find_device(config.device)
    length = ["--max-steps", str(2 * steps), "--log-interval", str(2 * steps)]
    if device == "cuda":
        length.append("--deterministic")
    straight, stopped, two = (folder / name for name in ("straight", "stopped", "two-ranks"))
    train([*flags, *length], straight)
    train([*flags, *length, "--stop-at", str(steps)], stopped)
    train([*flags, *length], stopped)
    yield told(
        f"{2 * steps} steps against {steps} + {steps}, bit by bit", first_bit(straight, stopped)
    )
    has_two = device == "cpu" or torch.cuda.device_count() > 1
    # Every rank draws its own dropout, so there can't be any.
    alike = [*flags, *length, "--dropout", "0", "--device", device if has_two else "cpu"]
    if config.model.dropout or not has_two:
        shutil.rmtree(straight)
        train(alike, straight)
    train([*alike, "--micro-batch", str(shared_rows(config))], two, ranks=2)
    yield told(f"{2 * steps} steps on one rank against two, to rounding", first_loss(straight, two))


def train(flags: Sequence[str], run: Path, ranks: int = 1) -> None:
    """One training into a folder; CalledProcessError if it fails."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    print(f"training into {run.name} ...", flush=True)
    command = [*launcher, str(TRAIN), *flags, "--log-dir", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def shared_rows(config: settings.TrainConfig) -> int:
    """The largest micro-batch with which two ranks can share the rows of a step."""
    rows, rest = divmod(config.total_batch_size, 2 * config.model.block_size)
    if rest or not rows:
        raise ValueError(
            f"two ranks can't share a step of {config.total_batch_size} tokens in rows of "
            f"{config.model.block_size}: give an even number of rows with --total-batch-size"
        )
    largest = min(config.micro_batch or rows, rows)
    return next(size for size in range(largest, 0, -1) if rows % size == 0)


def told(what: str, difference: str) -> str:
    """Print what a comparison found, and return it."""
    print(f"{what}: {difference or 'equal'}", flush=True)
    return difference


def first_bit(one: Path, other: Path) -> str:
    """Where two runs first differ: a step's log line, else a tensor of the last checkpoint."""
    from mygpt import checkpoint

    if difference := first_loss(one, other, rounding=0):
        return difference
    folders = [checkpoint.find(run) for run in (one, other)]
    places = [checkpoint.read_state(folder)["loader"] for folder in folders]
    if places[0] != places[1]:
        return f"the places in the data differ: {places[0]} and {places[1]}"
    for load in (checkpoint.load_weights, checkpoint.load_optimizer):
        tensors = [load(folder) for folder in folders]
        for name, tensor in tensors[0].items():
            if name not in tensors[1] or not tensor.equal(tensors[1][name]):
                return f"{name} differs in the last checkpoint, though no loss was seen to"
    return ""


def first_loss(one: Path, other: Path, rounding: float = ROUNDING) -> str:
    """The first step of which two runs logged losses that differ by more than rounding."""
    left, right = log.read(one).train, log.read(other).train
    for step in sorted(left.keys() | right.keys()):
        if step not in left or step not in right:
            return f"only one of them has step {step}"
        if not math.isclose(left[step], right[step], rel_tol=rounding, abs_tol=0):
            return f"step {step} is the first to differ, loss {left[step]} and {right[step]}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
