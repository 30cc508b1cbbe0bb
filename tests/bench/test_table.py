"""Figures: measured in turn, compared round by round, printed as a table."""

import os

import pytest

from bench import table


def test_contenders_take_turns() -> None:
    calls: list[str] = []

    def contender(name: str) -> dict[str, float]:
        calls.append(name)
        return {name: len(calls), f"{name}, squared": len(calls) ** 2}

    found = table.alternately({name: lambda name=name: contender(name) for name in "ab"}, 3)
    assert calls == ["a", "b"] * 3
    assert found == {
        "a": [1, 3, 5],
        "a, squared": [1, 9, 25],
        "b": [2, 4, 6],
        "b, squared": [4, 16, 36],
    }


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine was slow in the second round, for both.
    assert table.ratio([10, 1, 12], [5, 0.5, 6]) == 2
    assert table.ratio([1, 2, 30], [1, 1, 1]) == 2


def test_spread() -> None:
    found = table.spread([3.04, 1, 2])
    assert found == {"median": 2, "low": 1, "high": 3.0, "runs": [3.0, 1, 2]}


def test_a_table_is_markdown_and_aligned() -> None:
    assert table.as_text(("", "MB/s"), [("prepare", "8.5"), ("a", "123456")]) == (
        "|         |   MB/s |\n| :------ | -----: |\n| prepare |    8.5 |\n| a       | 123456 |"
    )


def test_the_machine() -> None:
    found = table.machine(["numpy", "no-such-package"])
    assert list(found["packages"]) == ["numpy"]
    assert found["cores"] == os.cpu_count()
    assert found["processor"]


@pytest.mark.parametrize(("package", "there"), [("numpy", True), ("no-such-package", False)])
def test_installed(package: str, there: bool) -> None:
    assert table.installed(package) == there
