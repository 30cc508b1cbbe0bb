"""Signals and --max-time raise a flag, which all ranks see at the same call."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mygpt import stopping
from mygpt.distributed import DistributedContext
from mygpt.stopping import Interrupt, Stop, Stopped

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_stop_and_says_so(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with Stop(ALONE).watch() as stop:
        assert not stop.requested()
        stop.check()
        signal.raise_signal(number)
        # Before anybody has looked at the flag, which may take a micro-step.
        told = capfd.readouterr().err
        assert told == f"\n{number.name}: {stopping.ANSWER}\n"
        signal.raise_signal(number)
        assert not capfd.readouterr().err
        assert stop.requested()
        with pytest.raises(Stopped, match=number.name):
            stop.check()
        assert stop.exit_code == (130 if number == signal.SIGINT else 75)


def test_max_time_counts_from_the_start_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 103.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    stop, unlimited = Stop(ALONE, max_seconds=5, since=100.0), Stop(ALONE, since=100.0)
    assert not stop.requested()
    now = 105.0
    assert stop.requested()
    assert stop.reason == "--max-time"
    assert not unlimited.requested()


RANKS = """
import os, signal, sys
from mygpt.distributed import init_distributed
from mygpt.stopping import Stop
with init_distributed("cpu") as ranks, Stop(ranks).watch() as stop:
    for call in range(6):
        if call == 3 and ranks.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        if stop.requested():
            break
    open(f"{sys.argv[1]}/{ranks.rank}", "w").write(f"{call} {stop.reason}")
"""


def test_all_ranks_stop_at_the_same_call(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text() == "4 SIGTERM"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_and_obeyed_when_repeated(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, raise_signal = signal.getsignal(number), signal.raise_signal
    clock, obeyed = iter([10.0, 10.5, 11.5]), []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(signal, "raise_signal", obeyed.append)
    with Interrupt().watch() as flag:
        assert not flag.seen
        raise_signal(number)
        raise_signal(number)
        assert flag.seen == number
        assert not obeyed
        raise_signal(number)
        assert obeyed == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_a_second_signal_of_another_kind_is_no_impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's USR1 comes before its TERM: the checkpoint may be half written by then."""
    clock = iter([10.0, 130.0])
    monkeypatch.setattr(stopping.time, "monotonic", lambda: next(clock))
    with Interrupt().watch() as flag:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert flag.seen == signal.SIGUSR1
