"""A contender in its own process: state between turns, its own memory, failures in one line."""

import os
from collections.abc import Callable

import pytest

from bench.worker import Worker, measure, peak_megabytes


def counter(start: int) -> Callable[[], dict[str, float]]:
    count = start

    def turn() -> dict[str, float]:
        nonlocal count
        count += 1
        print("what contenders print is not part of the answer")
        return {"count": count, "process": os.getpid(), "megabytes": peak_megabytes()}

    return turn


def failing() -> Callable[[], dict[str, float]]:
    raise MemoryError("no room")


def test_turns_are_taken_in_a_process_of_their_own() -> None:
    worker = Worker("counter", counter, 5)
    try:
        first, second = worker.turn(), worker.turn()
    finally:
        worker.end()
    assert (first["count"], second["count"]) == (6, 7)
    assert first["process"] == second["process"] != os.getpid()
    assert 5 < first["megabytes"] < 50_000


def test_the_others_go_on_when_one_fails(capfd: pytest.CaptureFixture[str]) -> None:
    records, failed = measure({"good": (counter, 5), "bad": (failing,)}, 2)
    assert [record["count"] for record in records["good"]] == [6, 7]
    assert records.keys() == {"good"} and "exit code 1" in failed["bad"]
    assert not capfd.readouterr().out


def test_what_fails_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker("the failing one", failing)
    with pytest.raises(ValueError, match="expected the failing one to run, found its process end"):
        worker.turn()
    assert "no room" in capfd.readouterr().err
