"""A signal raises a flag; the same one again, a while later, is obeyed at once."""

import signal

import pytest

from mygpt import stopping
from mygpt.stopping import Interrupt

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


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
