"""The siege itself: it notices what it must, and every command withstands it for some minutes."""

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training import ROOT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="it forks, and kills as POSIX does")


def write_pid() -> int:
    """A command whose result is never the same."""
    Path("result").write_text(str(os.getpid()))
    return 0


def write_nothing() -> int:
    return 0


def crash() -> int:
    raise KeyError("a bug")


def refuse() -> int:
    os.write(2, b"error: the record is damaged\n")
    return 2


@pytest.mark.parametrize(
    ("main", "expected", "is_lost"),
    [
        (write_nothing, b"", False),
        (refuse, b"", False),
        (crash, b"", True),
        (write_pid, b"1", True),
    ],
)
def test_what_is_wrong_is_noticed(
    main: Callable[[], int],
    expected: bytes,
    is_lost: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests import besieged, siege  # they fork: on POSIX alone

    (tmp_path / "start").mkdir()
    (tmp_path / "start/result").write_bytes(b"")
    command = besieged.Command(
        "command", main, (), lambda work: (work / "result").read_bytes(),
        tmp_path / "start", tmp_path / "start", ("result",), expected=expected,
    )  # fmt: skip
    trial = besieged.Trial(command, tmp_path / "trial", random.Random(0), command.start)
    assert siege.survives(siege.check_damaged, trial, seed=7) is not is_lost
    assert trial.folder.exists() is is_lost
    assert ("lost: seed 7, check_damaged of command" in capsys.readouterr().out) is is_lost


def test_the_table_counts_what_was_tried() -> None:
    from tests import siege

    tally = Counter({("kills", "eval", "survived"): 3, ("kills", "eval", "lost"): 1})
    lines = siege.table(tally, 5).splitlines()
    assert lines[2:] == ["| kills | eval | 4 | 3 | 1 |", "| all, from seed 5 | | 4 | 3 | 1 |"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_minutes_of_it() -> None:
    command = [sys.executable, "-m", "tests.siege", "--minutes", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
