"""Figures: measured in turn, compared round by round, printed as a table."""

import json
import os
from dataclasses import dataclass
from typing import Any

import pytest

from bench import table


@dataclass(frozen=True)
class Options:
    """Flags that all benchmarks have."""

    json: bool = False


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str) -> dict[str, float]:
        calls.append(name)
        return {"calls": len(calls)}

    records, failed = table.alternately(
        {name: lambda name=name: contender(name) for name in "ab"}, 3
    )
    assert calls == ["a", "b"] * 3 and not failed
    assert {name: table.column(own, "calls") for name, own in records.items()} == {
        "a": [1, 3, 5],
        "b": [2, 4, 6],
    }


def test_one_that_fails_loses_only_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    turns = iter([{"rate": 1}, ValueError("no memory")])

    def failing() -> Any:
        if isinstance(turn := next(turns), ValueError):
            raise turn
        return turn

    records, failed = table.alternately({("b", 2): failing, "a": lambda: {"rate": 3}}, 3)
    assert records == {"a": [{"rate": 3}] * 3}
    assert failed == {"b, 2": "no memory"}
    # What was measured is told at once, the first round of the one that failed too.
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {"round": 1, "contender": "b, 2", "rate": 1}
    assert [line["contender"] for line in lines] == ["b, 2", "a", "b, 2", "a", "a"]
    assert lines[2]["failed"] == "no memory"
    assert table.records_of(lines) == (
        {"a": [{"round": number, "contender": "a", "rate": 3} for number in (1, 2, 3)]},
        failed,
    )


def test_a_failure_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench.x", "--json"])
    results = {"rows": [1], "failed": {"a": "no memory"}}
    with pytest.raises(SystemExit) as leaving:
        table.command("x", Options, lambda options: results, str, "")
    assert leaving.value.code == 1
    assert json.loads(capsys.readouterr().out) == results


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was slow in the second round, for both.
    assert table.ratio([10, 1, 12], [5, 0.5, 6]) == 2
    assert table.ratio([1, 2, 30], [1, 1, 1]) == 2
    assert table.ratio([1], []) is None


def test_spread() -> None:
    found = table.spread([3.04, 1, 2])
    assert found == {"median": 2, "low": 1, "high": 3.0, "runs": [3.0, 1, 2]}


def test_a_table_is_markdown_and_aligned() -> None:
    assert table.as_text(("", "MB/s"), [("prepare", "8.5"), ("a", "123456")]) == (
        "|         |   MB/s |\n| :------ | -----: |\n| prepare |    8.5 |\n| a       | 123456 |"
    )


def test_the_machine() -> None:
    found = table.machine("x", ["numpy", "no-such-package"])
    assert list(found["packages"]) == ["numpy"]
    assert found["cores"] == os.cpu_count()
    assert found["processor"] and found["command"].startswith("python -m bench.x")


@pytest.mark.parametrize(("package", "there"), [("numpy", True), ("no-such-package", False)])
def test_installed(package: str, there: bool) -> None:
    assert table.installed(package) == there
