"""Ctrl-C ends every command with one line and exit code 130."""

import sys
from types import ModuleType

import pytest

import eval as evaluation
from mygpt import plot
from mygpt.doctor import __main__ as doctor
from mygpt.doctor import verify_resume
from mygpt.hub import __main__ as hub
from mygpt.report import __main__ as report

COMMANDS = [
    (evaluation, "open_inputs", ["log/x"]),
    (plot, "draw", ["log/x"]),
    (doctor, "examine", []),
    (verify_resume, "differences", ["tiny"]),
    (hub.export, "export", ["export", "log/x", "out"]),
    (report, "write", ["log/x"]),
]


@pytest.mark.parametrize(
    ("module", "work", "args"), COMMANDS, ids=[module.__name__ for module, _, _ in COMMANDS]
)
def test_it_is_one_line(
    module: ModuleType,
    work: str,
    args: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, work, interrupted)
    monkeypatch.setattr(sys, "argv", ["command", *args])
    command = hub if module is hub.export else module
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"
