"""Kill `python -m prepare` again and again, run it again each time, and compare every byte.

    python tests/prepare/kill.py anywhere SEED MOMENTS FOLDER SOURCE...
    python tests/prepare/kill.py everywhere FIRST STRIDE FOLDER SOURCE...

A process of its own, so that it may fork: a child is ready in milliseconds, with all it imports.
Prints how many runs were killed and how many finished; ends with an assertion where a killed run
left something half-done, or the end differs from that of a run that was never killed.
"""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import count
from pathlib import Path
from threading import RLock

from tqdm import tqdm

from prepare import __main__ as command
from prepare import plan
from shards.cli import EXIT_BAD_INPUT

UNIT_BYTES = 32 << 10
DEADLINE = 30.0  # seconds after which a run counts as hanging
COMMITS = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir")


def main() -> None:
    """Run one of the two campaigns."""
    plan.MIN_UNIT_BYTES = UNIT_BYTES
    # A progress bar's lock is one for all processes: a child killed with it would stop the others.
    tqdm.set_lock(RLock())
    tqdm.monitor_interval = 0
    if sys.argv[1] == "anywhere":
        seed, moments, folder, *sources = sys.argv[2:]
        killed, finished = anywhere(int(seed), int(moments), Path(folder), sources)
    else:
        first, stride, folder, *sources = sys.argv[2:]
        killed, finished = everywhere(int(first), int(stride), Path(folder), sources)
    print(killed, finished)


def anywhere(seed: int, moments: int, folder: Path, sources: list[str]) -> tuple[int, int]:
    """Kill the group, the parent or one worker of runs with two workers, at random moments."""
    chance = random.Random(seed)
    reference = uninterrupted(folder / "reference", sources)
    began = time.monotonic()
    check_finished(folder / "out", sources, reference)
    duration = time.monotonic() - began
    killed = finished = 0
    out, orphans = folder / "out", set[int]()
    while killed < moments:
        run = start(arguments(out, sources, 2))
        time.sleep(chance.uniform(0, 0.7 * duration))
        victim = chance.choice((kill_group, kill_parent, kill_worker))
        alive = os.waitpid(run, os.WNOHANG)[0] == 0 and victim(run)
        killed += alive
        orphans.add(run)
        check_whole_files(out, reference)
        if (out / "manifest.json").exists():
            finished += 1
            check_finished(out, sources, reference)
    check_finished(out, sources, reference)
    wait_until(lambda: not any(map(group, orphans)), "orphaned workers to end by themselves")
    return killed, finished


def everywhere(first: int, stride: int, folder: Path, sources: list[str]) -> tuple[int, int]:
    """Kill a run with one worker right before every `stride`-th step in the file system."""
    reference = uninterrupted(folder / "reference", sources)
    for killed, step in enumerate(count(first, stride)):
        out = folder / f"out{step}"
        run = start(arguments(out, sources, 1), before=lambda step=step: die_at(step))
        if ended(run) != -signal.SIGKILL:
            return killed, 1
        check_whole_files(out, reference)
        check_finished(out, sources, reference, workers=1)
    raise AssertionError


def die_at(step: int) -> None:
    """Make this process kill itself instead of taking its `step`-th step in the file system."""
    steps = count()

    def wrap(function: Callable) -> Callable:
        def wrapped(*given: object, **named: object) -> object:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*given, **named)

        return wrapped

    for name in COMMITS:
        setattr(os, name, wrap(getattr(os, name)))


def uninterrupted(out: Path, sources: list[str]) -> dict[str, bytes]:
    """The files of a run that nobody kills, in this process: what it loads, the children have."""
    sys.argv = arguments(out, sources, 1)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        command.main()
    return files(out)


def check_finished(
    out: Path, sources: list[str], reference: dict[str, bytes], workers: int = 2
) -> None:
    """Run once more, to the end; then nothing may differ from the reference, nor be left over."""
    assert ended(start(arguments(out, sources, workers))) == 0, read_errors(out)
    assert files(out) == reference, sorted(files(out).items() ^ reference.items())[0][0]
    shutil.rmtree(out)


def check_whole_files(out: Path, reference: dict[str, bytes]) -> None:
    """Whatever has its final name is whole, and a manifest has all its files."""
    found = files(out)
    for name, content in found.items():
        assert name.endswith(".tmp") or content == reference[name], f"{name} is not whole"
    assert "manifest.json" not in found or reference.keys() <= found.keys()


def files(out: Path) -> dict[str, bytes]:
    """The files that a dataset is made of, and whatever else lies among them; not the log."""
    if not out.exists():
        return {}
    paths = [path for path in out.iterdir() if path.is_file() and path.name != "prepare.log"]
    return {path.name: content for path in paths if (content := read(path)) is not None}


def read(path: Path) -> bytes | None:
    """A file's bytes; None where an orphaned worker has just renamed or removed it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def arguments(out: Path, sources: list[str], workers: int) -> list[str]:
    return ["prepare", *sources, "--out", str(out), "--workers", str(workers)]


def start(
    argv: list[str],
    before: Callable[[], object] = lambda: None,
    main: Callable[[], object] = command.main,
    errors: Path | None = None,
) -> int:
    """Begin a run in a process group of its own; returns its process id."""
    if process := os.fork():
        os.setpgid(process, process)
        return process
    os.setpgid(0, 0)  # whoever of the two comes first
    with open(errors or errors_of(Path(argv[argv.index("--out") + 1])), "w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    sys.argv, code = argv, 1
    try:
        before()
        code = int(main() or 0)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def errors_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.stderr")


def read_errors(out: Path) -> str:
    return errors_of(out).read_text()


def ended(process: int) -> int:
    """Wait for a run; its exit code, or minus the signal that ended it."""
    deadline = time.monotonic() + DEADLINE
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline, f"{process} hangs"
        time.sleep(0.002)


def kill_group(run: int) -> bool:
    os.killpg(run, signal.SIGKILL)
    return ended(run) == -signal.SIGKILL


def kill_parent(run: int) -> bool:
    """The parent alone; the next run begins while its workers may still be at work."""
    os.kill(run, signal.SIGKILL)
    return ended(run) == -signal.SIGKILL


def kill_worker(run: int) -> bool:
    """One worker; the parent must notice and end, unless its work was done."""
    workers = [process for process in group(run) if process != run]
    if not workers:
        return kill_group(run)
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(workers[-1], signal.SIGKILL)
    code = ended(run)
    assert code in (0, EXIT_BAD_INPUT), f"the parent of a killed worker ended with {code}"
    return code == EXIT_BAD_INPUT


def group(leader: int) -> list[int]:
    """The living processes of a process group."""
    stats = ((int(path.parent.name), read(path)) for path in Path("/proc").glob("[0-9]*/stat"))
    fields = [(process, stat.rpartition(b")")[2].split()) for process, stat in stats if stat]
    return sorted(p for p, (state, _, pgid, *_) in fields if int(pgid) == leader and state != b"Z")


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


if __name__ == "__main__":
    main()
