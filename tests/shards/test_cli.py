"""Bad input is one line and exit code 2; our own faults keep their traceback."""

import subprocess
import sys

import pytest

from shards.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED, one_line_errors


@pytest.mark.parametrize(
    "error",
    [
        ValueError("expected a,\n  found b:\tdo c"),
        OSError("expected a, found b: do c"),
        FileNotFoundError("expected a, found b: do c"),
    ],
)
def test_bad_input_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise error
    assert exit_.value.code == EXIT_BAD_INPUT == 2
    assert exit_.value.__suppress_context__ or exit_.value.__cause__ is None
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: expected a, found b: do c\n")


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise KeyboardInterrupt
    assert exit_.value.code == EXIT_INTERRUPTED == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), RuntimeError("x"), SystemExit(3)])
def test_our_own_faults_stay_what_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, one_line_errors():
        raise error
    assert caught.value is error


def test_nothing_wrong_nothing_said(capsys: pytest.CaptureFixture[str]) -> None:
    with one_line_errors():
        print("fine")
    assert capsys.readouterr() == ("fine\n", "")


ENDLESS = """
from shards.cli import one_line_errors
with one_line_errors():
    while True:
        print("line")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes close otherwise there")
def test_a_reader_that_has_gone_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.wait(20) == 0
        assert process.stderr.read() == b""
