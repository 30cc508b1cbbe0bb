"""A siege: faults of every kind on every command, each judged by what an undisturbed run makes.

    python -m tests.siege --minutes 20
    python -m tests.siege --minutes 0 --seed 1234     one trial, that of the seed

A trial inflicts one kind of fault on one command, both chosen by its seed, in a folder of its own.
It survives if the command, run again where it was interrupted, ends with exactly the files of the
undisturbed run, or if it refuses what was damaged in one line with exit code 2. Anything else (a
traceback, a hang, another result) loses it: its seed is printed and its folder is kept.

A process of its own, so that it may fork: a child is ready in milliseconds, with all it imports.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from mygpt.stopping import EXIT_STOPPED
from prepare import plan
from shards import tokenizer
from shards.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from tests.besieged import PAGE, RANK_LOST, Command, Trial, commands, silly_command, size_of
from tests.prepare import kill
from tests.test_mutations import damaged, mutated
from tests.test_train_stops import can_mount
from tests.training import one_thread

IN_NAMESPACE = "SIEGE_MAY_MOUNT"


# --- the faults


def kills(trial: Trial) -> None:
    """SIGKILL all processes of the command, or one of them, up to three times."""
    command, rng = trial.command, trial.rng
    for _ in range(rng.randint(1, 3)):
        leaders = trial.begin()
        time.sleep(rng.uniform(0, 1.1 * command.seconds))
        living = [process for leader in leaders for process in kill.group(leader)]
        for victim in living if rng.random() < 0.5 else rng.sample(living, min(1, len(living))):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(victim, signal.SIGKILL)
        trial.check(trial.end(leaders), {0, -signal.SIGKILL, RANK_LOST, EXIT_BAD_INPUT})
    trial.check_end()


def signals(trial: Trial) -> None:
    """Ask the command to end, or one of its ranks, and run it again."""
    number = trial.rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    leaders = trial.begin()
    time.sleep(trial.rng.uniform(0, 1.1 * trial.command.seconds))
    with suppress(ProcessLookupError):
        os.kill(trial.rng.choice(leaders), number)
    # Killed where nothing handles the signal: before a training does, and in other commands.
    trial.check(trial.end(leaders), {0, EXIT_STOPPED, EXIT_INTERRUPTED, -number, RANK_LOST})
    trial.check_end()


def full_disk(trial: Trial) -> None:
    """Let the disk be full at a random size, then make room."""
    room = int(trial.rng.uniform(0, 1.2 * trial.command.growth))
    if IN_NAMESPACE in os.environ:
        with small_disk(trial, size_of(trial.work) + room) as make_room:
            trial.check(trial.end(trial.begin()), {0, EXIT_BAD_INPUT, RANK_LOST})
            make_room()
            trial.check_end()
    else:  # EFBIG instead of ENOSPC, and for each file by itself
        limit = (room + PAGE, room + PAGE)
        leaders = trial.begin(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        trial.check(trial.end(leaders), {0, EXIT_BAD_INPUT, RANK_LOST})
        trial.check_end()


def flipped_bits(trial: Trial) -> None:
    """Flip one bit of one file."""
    path = chosen_file(trial)
    content = bytearray(path.read_bytes())
    content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    path.write_bytes(content)
    check_damaged(trial)


def mutated_records(trial: Trial) -> None:
    """Cut off, recode or edit one record."""
    path = chosen_file(trial, ".json")
    content, rng = path.read_bytes(), trial.rng
    path.write_bytes(mutated(content, rng, is_sealed=False)[0])
    check_damaged(trial)


def torn_logs(trial: Trial) -> None:
    """Cut off, recode or damage a log, which no result depends on."""
    path = trial.work / "run/log.txt"
    path.write_bytes(damaged(path.read_bytes(), trial.rng))
    trial.check_end()


def silly_flags(trial: Trial) -> None:
    """Give a flag a silly value."""
    trial.check(trial.end(trial.begin()), {0, 1, EXIT_BAD_INPUT})


def chosen_file(trial: Trial, suffix: str = "") -> Path:
    """Return one of the files that may be damaged."""
    found = [path for glob in trial.command.damageable for path in trial.work.glob(glob)]
    return trial.rng.choice(sorted(path for path in found if path.name.endswith(suffix)))


def check_damaged(trial: Trial) -> None:
    """Nothing but the expected result and a refusal in one line."""
    codes = trial.end(trial.begin())
    refused = {EXIT_BAD_INPUT, RANK_LOST} if EXIT_BAD_INPUT in codes else {EXIT_BAD_INPUT}
    trial.check(codes, {0, *refused})
    if not any(codes):
        trial.check_result()


# --- the campaign

IN_TIME = (kills, signals, full_disk)
Fault = Callable[[Trial], None]


def main() -> int:
    """Run trials until the time is over; return 1 if one was lost."""
    parser = argparse.ArgumentParser(
        "python -m tests.siege", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the first")
    options = parser.parse_args()
    if IN_NAMESPACE not in os.environ and can_mount():
        os.environ[IN_NAMESPACE] = "1"
        os.execvp(
            "unshare", ["unshare", "-Urm", sys.executable, "-m", "tests.siege", *sys.argv[1:]]
        )
    prepare_to_fork()
    folder = Path(tempfile.mkdtemp(prefix="siege-"))
    with one_thread():
        tally = campaign(folder, options.seed, 60 * options.minutes)
    print(table(tally, options.seed))
    is_lost = any(kind == "lost" for *_, kind in tally)
    if not is_lost:
        shutil.rmtree(folder)
    return int(is_lost)


def prepare_to_fork() -> None:
    """Load what all children need, and make units small."""
    plan.MIN_UNIT_BYTES = kill.UNIT_BYTES // 4
    kill.DEADLINE = 240.0
    tqdm.monitor_interval = 0
    tokenizer.load().encode("")


def campaign(folder: Path, seed: int, seconds: float) -> Counter[tuple[str, str, str]]:
    """Run the trials of `seed`, `seed` + 1 ...; count (fault, command, survived or lost)."""
    scenarios = scenarios_of(commands(folder))
    tally: Counter[tuple[str, str, str]] = Counter()
    deadline = time.monotonic() + seconds
    while not tally or time.monotonic() < deadline:
        fault, command = scenarios[seed % len(scenarios)]
        rng = random.Random(seed)
        command = command or silly_command(folder, rng)
        start = command.start if fault in IN_TIME else command.halfway
        trial = Trial(command, folder / f"trial_{seed}", rng, start)
        kind = "survived" if survives(fault, trial, seed) else "lost"
        tally[fault.__name__, command.name, kind] += 1
        seed += 1
    return tally


def scenarios_of(made: Sequence[Command]) -> list[tuple[Fault, Command | None]]:
    """Return all pairs of a fault and a command; None for a command that flags choose."""
    pairs: list[tuple[Fault, Command | None]] = [(silly_flags, None)]
    for command in made:
        pairs += [(fault, command) for fault in (*IN_TIME, flipped_bits, mutated_records)]
        pairs += [(torn_logs, command)] if command.name.startswith("train") else []
    return pairs


def survives(fault: Fault, trial: Trial, seed: int) -> bool:
    """Run one trial; say what was wrong, and keep its folder, if it is lost."""
    try:
        fault(trial)
        trial.clean()
        return True
    except Exception as error:
        words = " ".join(trial.command.words)
        print(f"lost: seed {seed}, {fault.__name__} of {trial.command.name} ({words}): {error}")
        print(f"      kept in {trial.folder}", flush=True)
        return False


def table(tally: Counter[tuple[str, str, str]], seed: int) -> str:
    """Return the counts as a Markdown table."""
    lines = ["| fault | command | tried | survived | lost |", "|---|---|--:|--:|--:|"]
    for fault, command in sorted({pair[:2] for pair in tally}):
        counts = [tally[fault, command, kind] for kind in ("survived", "lost")]
        name = fault.replace("_", " ")
        lines.append(f"| {name} | {command} | {sum(counts)} | {counts[0]} | {counts[1]} |")
    counts = [sum(n for key, n in tally.items() if key[2] == kind) for kind in ("survived", "lost")]
    lines.append(f"| all, from seed {seed} | | {sum(counts)} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines)


# --- disks


@contextmanager
def small_disk(trial: Trial, size: int) -> Iterator[Callable[[], object]]:
    """Let the trial's folder lie on a disk of `size` bytes; yield a function that makes room.

    Its files are copied beside the folder at the end.
    """
    work = str(trial.work)
    files = trial.work.rename(trial.folder / "files")
    trial.work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", work], check=True)
    try:
        shutil.copytree(files, trial.work, dirs_exist_ok=True)
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", work], check=True)
    finally:
        shutil.copytree(trial.work, files, dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", work], check=True)


if __name__ == "__main__":
    sys.exit(main())
