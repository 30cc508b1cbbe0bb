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
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

import eval as evaluation
import train
from mygpt.hub import __main__ as hub
from mygpt.stopping import EXIT_STOPPED
from prepare import __main__ as prepare
from prepare import plan
from shards import tokenizer
from shards.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED, end_on_interrupt
from shards.manifest import Source
from tests import test_flags
from tests.dataset import write_dataset
from tests.mygpt.support import gpt2_dataset, write_run
from tests.prepare import kill
from tests.prepare.support import texts, write_jsonl
from tests.ranks import free_port
from tests.test_mutations import damaged, mutated
from tests.test_train_stops import can_mount
from tests.training import arguments, final_bytes, one_thread

STEPS = 24  # of a training
PAGE = 4096
IN_NAMESPACE = "SIEGE_MAY_MOUNT"
RANK_LOST = 1


@dataclass(frozen=True)
class Command:
    """A command under siege, run in a folder that begins as a copy of another."""

    name: str
    main: Callable[[], object]
    words: Sequence[str]
    result: Callable[[Path], object]  # that must not depend on any fault
    start: Path  # copied for faults in time: the command has not begun
    halfway: Path  # copied for damage to files
    damageable: Sequence[str] = ()  # globs of files
    ranks: int = 1
    expected: object = None  # result of the undisturbed run
    seconds: float = 0.0  # that it took
    growth: int = 0  # bytes that it wrote

    def undisturbed(self, folder: Path) -> "Command":
        """Return the command with its expected result, by running it in a new folder."""
        trial = Trial(self, folder, random.Random(0), self.start)
        started = time.monotonic()
        trial.check(trial.end(trial.begin()), {0})
        seconds = time.monotonic() - started
        growth = size_of(trial.work) - size_of(self.start)
        return replace(self, expected=self.result(trial.work), seconds=seconds, growth=growth)


class Trial:
    """One command in a folder of its own: `work`, and what its processes say beside it."""

    def __init__(self, command: Command, folder: Path, rng: random.Random, start: Path) -> None:
        self.command, self.folder, self.rng = command, folder, rng
        self.work = folder / "work"
        shutil.copytree(start, self.work)
        self.started: list[int] = []

    def begin(self, before: Callable[[], object] = lambda: None) -> list[int]:
        """Start the command's processes; return the leaders of their groups."""
        port = str(free_port())

        def enter(rank: int) -> None:
            os.chdir(self.work)
            end_on_interrupt()
            if self.command.ranks > 1:
                sizes = {"WORLD_SIZE": str(self.command.ranks), "RANK": str(rank)}
                os.environ |= {f"LOCAL_{name}": value for name, value in sizes.items()} | sizes
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            before()

        argv = [self.command.name, *self.command.words]
        leaders = [
            kill.start(argv, lambda rank=rank: enter(rank), self.command.main, self.errors(rank))
            for rank in range(self.command.ranks)
        ]
        self.started += leaders
        return leaders

    def errors(self, rank: int) -> Path:
        """Return the file of what a process says."""
        return self.folder / f"output_{rank}.txt"

    def end(self, leaders: Sequence[int]) -> list[int]:
        """Wait for processes; return their exit codes."""
        return [kill.ended(leader) for leader in leaders]

    def check(self, codes: Sequence[int], allowed: set[int]) -> None:
        """Raise AssertionError for another exit code, a traceback, or a refusal of other lines."""
        for rank, code in enumerate(codes):
            told = self.errors(rank).read_text(errors="replace").replace("\r", "\n")
            assert code in allowed, f"exit code {code}, expected {sorted(allowed)}: {told[-800:]}"
            assert "Traceback" not in told, told[-2000:]
            lines = [line for line in told.splitlines() if line.startswith("error: ")]
            is_usage = "usage: " in told or "Parsing error" in told  # argparse's words, and tyro's
            assert code != EXIT_BAD_INPUT or len(lines) == 1 or is_usage, told[-800:]

    def check_end(self) -> None:
        """Run the command to its end; raise AssertionError unless the result is as expected."""
        self.check(self.end(self.begin()), {0})
        self.check_result()

    def check_result(self) -> None:
        """Raise AssertionError unless the result is that of the undisturbed run."""
        assert self.command.result(self.work) == self.command.expected, "another result"

    def clean(self) -> None:
        """Remove the folder, once orphaned workers have ended."""
        kill.wait_until(lambda: not any(map(kill.group, self.started)), "orphans to end")
        shutil.rmtree(self.folder)


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


# --- the commands


def commands(folder: Path) -> list[Command]:
    """Return the commands, with what they need in folders, and their expected results."""
    made = [prepare_command(folder), *train_commands(folder), *run_commands(folder)]
    return [one.undisturbed(folder / "undisturbed" / one.name) for one in made]


def prepare_command(folder: Path) -> Command:
    """`python -m prepare` of some twenty units on two workers; half of them, halfway."""
    start, halfway = folder / "prepare/start", folder / "prepare/halfway"
    write_jsonl(start / "corpus/a.jsonl", texts(1500))
    (start / "corpus/b.txt").write_text("some plain text\n" * 2000)
    words = ("corpus", "--out", "data", "--workers", "2")
    command = Command(
        "prepare", prepare.main, words, lambda work: kill.files(work / "data"), start, halfway,
        ("data/.prepare/plan.json", "data/.prepare/units/*"),
    )  # fmt: skip
    first = replace(command, words=(*words, "--task", "1/2"))
    shutil.copytree(ended(first, folder / "prepare/first"), halfway)
    return command


def train_commands(folder: Path) -> list[Command]:
    """train.py on one rank and on two, halfway with checkpoints of three steps."""
    made = []
    for ranks in (1, 2):
        base = folder / f"train{ranks}"
        write_dataset(base / "start/data")
        flags = ("--micro-batch", "2", "--max-steps", str(STEPS), "--checkpoint-interval", "4")
        words = arguments(Path("data"), Path("run"), *flags, "--val-interval", "6", "--verify")
        command = Command(
            f"train on {ranks} rank{'s' * (ranks > 1)}", train.main, words,
            lambda work: final_bytes(work / "run"), base / "start", base / "halfway",
            ("run/config.json", "run/checkpoints/*/*", "data/*"), ranks,
        )  # fmt: skip
        first = replace(command, words=(*words, "--stop-at", str(STEPS // 2)))
        shutil.copytree(ended(first, base / "first"), base / "halfway")
        made.append(command)
    return made


def run_commands(folder: Path) -> list[Command]:
    """eval.py and the export of a finished run."""
    start = folder / "finished"
    data = replace(gpt2_dataset(start / "data"), sources=(Source("a.txt", 1),), counts={"read": 1})
    data.save(start / "data")
    write_run(start / "run", replace(data, folder=Path("data")), n_embed=8)
    (start / "text.txt").write_text("text\n" * 9)
    files = ("run/config.json", "run/checkpoints/step_00000040/*")
    flags = ("run", "--device", "cpu", "--max-new-tokens", "4")
    return [
        Command(
            "eval", evaluation.main, flags, lambda work: (work / "run/eval.json").read_bytes(),
            start, start, (*files, "data/manifest.json"),
        ),
        # Without its dataset a model is exported all the same, with a card that says so.
        Command(
            "export", export_again, ("export", "run", "out"), lambda work: kill.files(work / "out"),
            start, start, files,
        ),
    ]  # fmt: skip


def export_again() -> int:
    """Export, unless a run that was killed at its very end has done so: nothing is overwritten."""
    return 0 if Path("out").is_dir() else hub.main()


def ended(command: Command, folder: Path) -> Path:
    """Return the folder of a command that was run to its end."""
    trial = Trial(command, folder, random.Random(0), command.start)
    trial.check(trial.end(trial.begin()), {0})
    return trial.work


def silly_command(folder: Path, rng: random.Random) -> Command:
    """Return a command whose flags are parsed, and checked as far as that takes no work."""
    name = rng.choice(sorted(test_flags.NEEDED))
    run, first, flags = test_flags.NEEDED[name]
    flag, value = rng.choice(flags), rng.choice(test_flags.SILLY)
    words = [*first, f"{flag}={value}" if flag else value]
    start = folder / "finished"
    return Command(name, lambda: run(words), words, lambda work: None, start, start)


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
    kill.DEADLINE = 120.0
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


def size_of(folder: Path) -> int:
    """Return the bytes that the files of a folder take on a tmpfs."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // PAGE) * PAGE for size in sizes)


if __name__ == "__main__":
    sys.exit(main())
