"""Ctrl-C ends every command with one line and exit code 130."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import eval as evaluation
from mygpt.doctor import __main__ as doctor
from mygpt.doctor import verify_resume
from mygpt.hub import __main__ as hub
from mygpt.report import __main__ as report

ROOT = Path(__file__).parents[1]
COMMANDS = [
    (evaluation, "open_inputs", ["log/x"]),
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


WHILE_IMPORTING = [
    *(("train.py", module) for module in ("tyro", "torch", "filelock")),
    *(("eval.py log/x", module) for module in ("tyro", "torch", "mygpt.evaluate")),
    *(("-m prepare x --out y", module) for module in ("tyro", "pyarrow")),
    *(("-m shards info x", module) for module in ("numpy", "pyarrow")),
    ("-m mygpt.doctor", "torch"),
    ("-m mygpt.doctor.verify_resume tiny", "torch"),
    ("-m mygpt.report log/x", "numpy"),
    *(("-m mygpt.hub export log/x y", module) for module in ("tyro", "torch")),
]
# Python imports a module of this name before anything else.
SITE = """
import os, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(("command", "module"), WHILE_IMPORTING)
def test_it_is_one_line_while_modules_are_imported(
    command: str, module: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE)
    done = subprocess.run(
        [sys.executable, *command.split()],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "INTERRUPT_AT": module},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.startswith("\ninterrupted")
    assert done.stderr.count("\n") == 2
