"""A source that is no longer what was planned ends the run; what is finished is kept."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from prepare import job
from prepare.plan import Unit
from tests.prepare.support import contents, make, run, shrink, text_of, texts, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three sources of a unit each."""
    shrink(monkeypatch, MIN_UNIT_BYTES=1000, MAX_UNIT_BYTES=1000)
    for number in range(3):
        path = tmp_path / f"corpus/{number}.jsonl"
        write_jsonl(path, [text_of("train"), text_of("val"), *texts(5, number)])
        path.write_text(path.read_text().ljust(1000))
    return tmp_path / "corpus"


def during(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do something after the first unit of the next run."""
    original = job.run_local

    def interrupted(work: Callable, units: Sequence[Unit], *rest: object) -> Iterator:
        for number, result in enumerate(original(work, units, *rest)):
            yield result
            if number == 0:
                act()

    patch.setattr(job, "run_local", interrupted)


def stop() -> None:
    raise OSError("stopped here")


CHANGES = {
    "size": lambda path: path.write_text(path.read_text() + "\n"),
    "time": lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)),
    "content": lambda path: path.write_text(path.read_text().replace("0", "1")),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_during_the_run(
    change: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        during(patch, lambda: CHANGES[change](corpus / "2.jsonl"))
        error = run(corpus, "--out", tmp_path / "out").error
    assert "2.jsonl" in error
    assert not (tmp_path / "out/manifest.json").exists()
    assert (tmp_path / "out/train_00001.npy").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_between_two_runs(
    change: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        during(patch, stop)
        assert "stopped here" in run(corpus, "--out", tmp_path / "out").error
    CHANGES[change](corpus / "1.jsonl")
    error = run(corpus, "--out", tmp_path / "out").error
    assert "corpus/1.jsonl" in error
    assert ("gone" if change == "gone" else "changed") in error
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_source_that_comes_between_two_runs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        during(patch, stop)
        run(corpus, "--out", tmp_path / "out")
    write_jsonl(corpus / "3.jsonl", texts(14, 3))
    assert "expected the sources and options" in run(corpus, "--out", tmp_path / "out").error


def test_finished_units_are_not_done_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole", corpus)
    with monkeypatch.context() as patch:
        during(patch, stop)
        run(corpus, "--out", tmp_path / "out")
    first = (tmp_path / "out/train_00000.npy").stat().st_mtime_ns
    outcome = run(corpus, "--out", tmp_path / "out")
    assert "Resuming: 1 of 3 units finished." in outcome.out
    assert (tmp_path / "out/train_00000.npy").stat().st_mtime_ns == first
    assert contents(tmp_path / "out") == contents(whole)
    assert len(json.loads((whole / "manifest.json").read_bytes())["sources"]) == 3


def test_another_fraction_is_refused_with_both(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(60))
    out = make(tmp_path / "out", tmp_path / "a.jsonl")
    error = run(tmp_path / "a.jsonl", "--out", out, "--val-fraction", 0.2).error
    assert "found other val_fraction (0.2 instead of 0.1): repeat them" in error
    shutil.rmtree(out / ".prepare")
    error = run(tmp_path / "a.jsonl", "--out", out, "--val-fraction", 0.2).error
    assert "'val_fraction': 0.1" in error and "'val_fraction': 0.2" in error
