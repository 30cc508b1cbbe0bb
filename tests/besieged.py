"""What `tests.siege` attacks: commands, each with an oracle, and trials of them in processes."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import eval as evaluation
import train
from mygpt.hub import __main__ as hub
from prepare import __main__ as prepare
from shards.cli import EXIT_BAD_INPUT, end_on_interrupt
from shards.manifest import Source
from tests import test_flags
from tests.dataset import write_dataset
from tests.mygpt.support import gpt2_dataset, write_run
from tests.prepare import kill
from tests.prepare.support import texts, write_jsonl
from tests.ranks import free_port
from tests.training import arguments, final_bytes

STEPS = 24  # of a training
PAGE = 4096
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
        self.before = 0

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

        self.before = self.log_bytes()
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
        """Wait for processes; return their exit codes.

        Ranks that have not met wait ten minutes for one that has gone: as a launcher would, end
        them here, with the code of a rank that has lost others.
        """
        codes: dict[int, int] = {}
        strays: set[int] = set()
        deadline = time.monotonic() + kill.DEADLINE
        while len(codes) < len(leaders):
            for leader in set(leaders) - codes.keys():
                done, status = os.waitpid(leader, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    codes[leader] = RANK_LOST if leader in strays else code
                elif any(codes.values()) and self.log_bytes() == self.before:
                    strays.add(leader)
                    os.killpg(leader, signal.SIGKILL)
            assert time.monotonic() < deadline, f"hangs, others ended with {codes}"
            time.sleep(0.005)
        return [codes[leader] for leader in leaders]

    def log_bytes(self) -> int:
        """Return the size of the run's log, to which ranks that have met write a line."""
        log = self.work / "run/log.txt"
        return log.stat().st_size if log.is_file() else 0

    def check(self, codes: Sequence[int], allowed: set[int]) -> None:
        """Raise AssertionError for another exit code, a traceback, or a refusal of other lines."""
        for rank, code in enumerate(codes):
            told = self.errors(rank).read_text(errors="replace").replace("\r", "\n")
            assert code in allowed, f"exit code {code}, expected {sorted(allowed)}: {told[-800:]}"
            assert "Traceback" not in told, told[-2000:]
            lines = [line for line in told.splitlines() if line.startswith("error: ")]
            is_usage = "usage: " in told or "╭─" in told  # as argparse and tyro refuse flags
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


def size_of(folder: Path) -> int:
    """Return the bytes that the files of a folder take on a tmpfs."""
    sizes = (path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return sum(-(-size // PAGE) * PAGE for size in sizes)


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
