"""The launcher shows a fault once, and ends as the ranks do."""

import logging
import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mygpt import launch
from tests.training import ROOT, environment

COMMAND = ["launch", "--standalone", "--nproc_per_node=3", "train.py"]


@pytest.fixture(autouse=True)
def global_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the launcher changes in its process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    logging.disable(logging.NOTSET)


def launched(
    monkeypatch: pytest.MonkeyPatch, codes: dict[int, int], texts: dict[int, str]
) -> tuple[int, Namespace]:
    """The exit code if ranks write `texts` and end with `codes`; and torchrun's arguments."""
    asked: list[Namespace] = []

    def run(args: Namespace) -> None:
        asked.append(args)
        assert args.redirects == "1:2,2:2"
        for rank, text in texts.items():
            if rank == 0:
                os.write(2, text.encode())
            else:
                file = Path(args.log_dir) / "attempt_0" / str(rank) / "stderr.log"
                file.parent.mkdir(parents=True)
                file.write_text(text)
        failures = {
            rank: ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="")
            for rank, code in codes.items()
            if code
        }
        if failures:
            raise ChildFailedError("train.py", failures)

    monkeypatch.setattr(launch.run, "run", run)
    monkeypatch.setattr(sys, "argv", COMMAND)
    return launch.main(), asked[0]


FAULT, LOST = "error: no such dataset\n", "error: rank {} of 3 lost the others (closed)\n"


@pytest.mark.parametrize(
    ("codes", "texts", "code", "shown"),
    [
        ({}, {0: "a warning\n"}, 0, "a warning\n"),
        ({0: 2, 1: 2, 2: 2}, dict.fromkeys(range(3), FAULT), 2, FAULT),
        ({0: -15, 1: 2, 2: -15}, {1: FAULT}, 2, FAULT),
        ({1: 2, 2: 2}, {1: FAULT, 2: FAULT}, 2, FAULT),
        (
            {0: 1, 1: 2, 2: 1},
            {0: LOST.format(0), 1: FAULT, 2: LOST.format(2)},
            2,
            LOST.format(0) + FAULT,
        ),
        (
            {0: 1, 1: -9, 2: 1},
            {0: LOST.format(0), 2: LOST.format(2)},
            1,
            LOST.format(0) + "error: rank 1 was ended by SIGKILL\n",
        ),
        ({0: 75, 1: 75}, {}, 75, ""),
    ],
)
def test_a_fault_is_shown_once(
    codes: dict[int, int],
    texts: dict[int, str],
    code: int,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found, _ = launched(monkeypatch, codes, texts)
    assert found == code
    assert capfd.readouterr().err == shown


def test_ranks_have_time_to_reach_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    _, args = launched(monkeypatch, {}, {})
    assert getattr(args, "shutdown_timeout", launch.PATIENCE) == launch.PATIENCE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_is_no_fault(
    number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(args: Namespace) -> None:
        raise SignalException("asked to stop", number)

    monkeypatch.setattr(launch.run, "run", run)
    monkeypatch.setattr(sys, "argv", COMMAND)
    assert launch.main() == code


def test_no_rank_at_all_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch", "--nproc_per_node=0", "train.py"])
    with pytest.raises(SystemExit, match="2"):
        launch.main()
    assert "expected at least 1 rank, found --nproc_per_node=0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_line_of_all_ranks_is_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mygpt.launch", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), "tiny", "--data", str(tmp_path / "none")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a dataset with manifest.json")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
