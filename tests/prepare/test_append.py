"""--append: a dataset grows by generations; what was there stays as it was, killed or not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from prepare import job
from prepare.plan import Unit
from shards.manifest import Manifest
from tests.prepare.support import (
    ROOT,
    contents,
    expected,
    held,
    make,
    quarantine,
    run,
    shrink,
    text_of,
    texts,
    write_jsonl,
)

UNIT_BYTES = 1000
PROGRAM = f"""
from prepare import __main__ as command, plan
plan.MIN_UNIT_BYTES = {UNIT_BYTES}
command.main()
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A dataset of a.jsonl, and b.jsonl to append."""
    write_jsonl(tmp_path / "a.jsonl", texts(100, 1))
    write_jsonl(tmp_path / "b.jsonl", texts(100, 2))
    return make(tmp_path / "out", tmp_path / "a.jsonl")


def rows(path: Path, documents: list[str]) -> list[tuple[str, int, str]]:
    offsets = write_jsonl(path, documents)
    return [(path.name, *pair) for pair in zip(offsets, documents, strict=True)]


def test_what_was_there_stays(base: Path, tmp_path: Path) -> None:
    before, first = contents(base), Manifest.load(base)
    outcome = run(tmp_path / "b.jsonl", "--out", base, "--append")
    assert outcome.code == 0, outcome.err
    after, second = contents(base), Manifest.load(base)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"manifest.json"}
    assert (first.generation, second.generation) == (0, 1)
    assert Manifest.load(base, 0).fingerprint == first.fingerprint != second.fingerprint
    wanted = rows(tmp_path / "a.jsonl", texts(100, 1)) + rows(tmp_path / "b.jsonl", texts(100, 2))
    assert held(base) == expected(wanted)


def test_no_document_changes_sides(base: Path, tmp_path: Path) -> None:
    sides = held(base)
    again = texts(100, 1) + texts(50, 3)
    write_jsonl(tmp_path / "c.jsonl", again)
    make(base, tmp_path / "c.jsonl", "--append")
    after = held(base)
    for side, other in (("train", "val"), ("val", "train")):
        assert after[side][: len(sides[side])] == sides[side]
        assert not {d.tokens for d in after[side]} & {d.tokens for d in after[other]}


def test_again_and_again(base: Path, tmp_path: Path) -> None:
    make(base, tmp_path / "b.jsonl", "--append")
    once = contents(base)
    for arguments in (["b.jsonl", "--append"], ["a.jsonl"]):
        outcome = run(tmp_path / arguments[0], *arguments[1:], "--out", base)
        assert "nothing to do" in outcome.out, outcome.err
        assert contents(base) == once
    write_jsonl(tmp_path / "c.jsonl", texts(20, 3))
    make(base, tmp_path / "c.jsonl", "--append")
    assert Manifest.load(base).generation == 2
    assert [source.generation for source in Manifest.load(base).sources] == [0, 1, 2]
    held(base)


def test_a_small_addition_need_not_have_both_sides(base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c.jsonl", [text_of("train")])
    make(base, tmp_path / "c.jsonl", "--append")
    assert Manifest.load(base).generation == 1


def test_bad_documents_add_up(base: Path, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": null}\n{"text": "good"}\n')
    make(base, tmp_path / "c.jsonl", "--append")
    (tmp_path / "d.jsonl").write_text('{"text": 1}\n{"text": "good"}\n')
    make(base, tmp_path / "d.jsonl", "--append")
    assert [(e["source"], e["generation"]) for e in quarantine(base)] == [
        ("c.jsonl", 1),
        ("d.jsonl", 2),
    ]
    held(base)


def test_an_interrupted_append_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    make(tmp_path / "whole", tmp_path / "a.jsonl")
    make(base, tmp_path / "b.jsonl", "--append")
    other = make(tmp_path / "other", tmp_path / "a.jsonl")
    original = job.run_local

    def interrupted(work: Callable, units: Sequence[Unit], *rest: object) -> Iterator:
        yield from original(work, units[:2], *rest)
        raise OSError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_local", interrupted)
        assert "stopped" in run(tmp_path / "b.jsonl", "--out", other, "--append").error
    assert Manifest.load(other).generation == 0
    outcome = run(tmp_path / "b.jsonl", "--out", other, "--append")
    assert "Resuming: 2 of" in outcome.out
    assert Manifest.load(other).generation == 1
    held(other)


def test_an_append_that_was_begun_is_finished_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_append(base, tmp_path / "b.jsonl", monkeypatch)
    write_jsonl(tmp_path / "c.jsonl", texts(20, 3))
    assert "b.jsonl" in run(tmp_path / "c.jsonl", "--out", base, "--append").error
    make(base, tmp_path / "b.jsonl", "--append")


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_an_append_that_cannot_be_finished_gives_way(
    change: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "c.jsonl", texts(50, 3))
    reference = Path(shutil.copytree(base, tmp_path / "reference"))
    begin_append(base, tmp_path / "b.jsonl", monkeypatch)
    make(reference, tmp_path / "c.jsonl", "--append")
    if change == "gone":
        (tmp_path / "b.jsonl").unlink()
    else:
        write_jsonl(tmp_path / "b.jsonl", texts(90, 2))
        error = run(tmp_path / "b.jsonl", "--out", base, "--append").error
        assert "the source b.jsonl as it was" in error
        assert "rename it" in error
    outcome = run(tmp_path / "c.jsonl", "--out", base, "--append")
    assert "Starting over" in outcome.out, outcome.err
    held(base)
    assert Manifest.load(base).fingerprint == Manifest.load(reference).fingerprint


def test_each_generation_is_judged_by_itself(base: Path, tmp_path: Path) -> None:
    bad = '{"text": null}\n' * 20
    (tmp_path / "c.jsonl").write_text(bad + (tmp_path / "b.jsonl").read_text())
    assert "found 20" in run(tmp_path / "c.jsonl", "--out", base, "--append").error
    make(base, tmp_path / "c.jsonl", "--append", "--max-bad", 20)
    write_jsonl(tmp_path / "d.jsonl", texts(50, 4))
    make(base, tmp_path / "d.jsonl", "--append")  # the 20 were accepted
    (tmp_path / "e.jsonl").write_text(bad)
    assert (
        "bad documents of 20, found 20"
        in run(tmp_path / "e.jsonl", "--out", base, "--append").error
    )
    assert len(quarantine(base)) == 40
    make(base, tmp_path / "b.jsonl", "--append")
    assert len(quarantine(base)) == 20
    held(base)


def begin_append(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop an append after its first unit."""
    original = job.run_local

    def interrupted(work: Callable, units: Sequence[Unit], *rest: object) -> Iterator:
        yield from original(work, units[:1], *rest)
        raise OSError("stopped here")

    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    with monkeypatch.context() as patch:
        patch.setattr(job, "run_local", interrupted)
        assert "stopped here" in run(source, "--out", out, "--append").error


@pytest.fixture
def script(base: Path, tmp_path: Path) -> list[list[object]]:
    """A script of three commands that was run once."""
    write_jsonl(tmp_path / "c.jsonl", texts(50, 3))
    commands = [[tmp_path / "a.jsonl", "--out", base]]
    commands += [[tmp_path / name, "--out", base, "--append"] for name in ("b.jsonl", "c.jsonl")]
    for command in commands:
        assert run(*command).code == 0
    return commands


PLANS = {
    "stored": lambda work: None,
    "lost": lambda work: shutil.rmtree(work),  # the dataset was copied here
    "the last alone": lambda work: (work / "plan_00002.json").replace(work / "plan.json"),  # 0.2
}


@pytest.mark.parametrize("plans", PLANS)
def test_a_script_of_appends_run_twice(
    plans: str, script: list[list[object]], base: Path, tmp_path: Path
) -> None:
    PLANS[plans](base / ".prepare")
    once = contents(base)
    for command in [*script, *script[::-1], [tmp_path / "a.jsonl", "--out", base, "--append"]]:
        outcome = run(*command)
        assert "nothing to do" in outcome.out, outcome.err
        assert contents(base) == once
    held(base)


def test_a_changed_source_of_an_earlier_append_is_refused(
    script: list[list[object]], base: Path, tmp_path: Path
) -> None:
    once = contents(base)
    write_jsonl(tmp_path / "b.jsonl", texts(90, 2))
    assert "the source b.jsonl as it was" in run(*script[1]).error
    assert "nothing to do" in run(*script[2]).out
    assert contents(base) == once


@pytest.mark.parametrize("names", ["b c", "b d", "d b", "a d"])
def test_sources_of_which_some_are_there_are_refused(
    names: str, script: list[list[object]], base: Path, tmp_path: Path
) -> None:
    once = contents(base)
    write_jsonl(tmp_path / "d.jsonl", texts(20, 4))
    sources = [tmp_path / f"{name}.jsonl" for name in names.split()]
    error = run(*sources, "--out", base, "--append").error
    assert "expected sources that are not in" in error
    assert "leave it out" in error
    assert contents(base) == once


def test_the_rule_is_followed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(100, 1))
    write_jsonl(tmp_path / "b.jsonl", texts(100, 2))
    out = make(tmp_path / "out", tmp_path / "a.jsonl", "--val-fraction", 0.3)
    error = run(tmp_path / "b.jsonl", "--out", out, "--append", "--val-fraction", 0.2).error
    assert "expected the split rule of the dataset, hash and 0.3, found auto and 0.2" in error
    make(out, tmp_path / "b.jsonl", "--append")
    wanted = rows(tmp_path / "a.jsonl", texts(100, 1)) + rows(tmp_path / "b.jsonl", texts(100, 2))
    assert held(out) == expected(wanted, 0.3)
    assert json.loads((out / "manifest.json").read_bytes())["split_rule"]["val_fraction"] == 0.3


def test_by_position_each_file_is_cut(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} line\n" * 100)
    write_jsonl(tmp_path / "c.jsonl", texts(10))
    out = make(tmp_path / "out", tmp_path / "a.txt")
    make(out, tmp_path / "b.txt", "--append")
    for side, sizes in (("train", 637), ("val", 63)):
        assert [(d.source, d.text_bytes) for d in held(out)[side]] == [
            ("a.txt", sizes),
            ("b.txt", sizes),
        ]
    assert "plain text files to append" in run(tmp_path / "c.jsonl", "--out", out, "--append").error


@pytest.mark.parametrize("state", ["nothing", "unfinished"])
def test_there_must_be_a_complete_dataset(state: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [text_of("train")] * 3)
    if state == "unfinished":
        assert run(tmp_path / "a.jsonl", "--out", tmp_path / "out").code == 2
    error = run(tmp_path / "a.jsonl", "--out", tmp_path / "out", "--append").error
    assert "expected a complete dataset" in error


@pytest.fixture
def killable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of a.jsonl, with b.jsonl beside it, of some hundred units, to append."""
    shrink(monkeypatch, MIN_UNIT_BYTES=UNIT_BYTES)
    write_jsonl(tmp_path / "a.jsonl", texts(100, seed=1))
    write_jsonl(tmp_path / "b.jsonl", texts(700, seed=2))
    return make(tmp_path / "base", tmp_path / "a.jsonl")


def append_until_killed(out: Path, source: Path, units: int) -> None:
    """Append, and SIGKILL all of it once so many units are finished."""
    command = [sys.executable, "-c", PROGRAM, str(source), "--out", str(out), "--append"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    finished = out / ".prepare" / "units"
    while not finished.is_dir() or len(list(finished.glob("*.json"))) < units:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_killed_twice(killable: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(killable, tmp_path / "whole"))
    make(whole, tmp_path / "b.jsonl", "--append")
    before, fingerprint = contents(killable), Manifest.load(killable).fingerprint
    for units in (1, 30):
        append_until_killed(killable, tmp_path / "b.jsonl", units)
        manifest = Manifest.load(killable)
        assert (manifest.generation, manifest.fingerprint) == (0, fingerprint)
        now = contents(killable)
        assert {name: now[name] for name in before} == before
    outcome = run(tmp_path / "b.jsonl", "--out", killable, "--append")
    assert "Resuming" in outcome.out
    assert contents(killable) == contents(whole)
    held(killable)
    assert Manifest.load(killable, generation=0).fingerprint == fingerprint


class TestDatasetOf02:
    """A dataset that was started when folders gave only some types goes on like that."""

    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        """One of a folder that holds other text too, with a plan as it was stored then."""
        write_jsonl(tmp_path / "corpus/a.jsonl", texts(60))
        out = make(tmp_path / "out", tmp_path / "corpus")
        plan = json.loads((out / ".prepare/plan.json").read_bytes())
        del plan["all_text"], plan["left_out"]
        (out / ".prepare/plan.json").write_text(json.dumps(plan))
        (tmp_path / "corpus/model.py").write_text("print(1)\n")
        (tmp_path / "corpus/table.csv").write_text("text\nx\n")
        return out

    @pytest.mark.parametrize("plan", ["stored", "lost"])
    def test_the_same_command_finds_the_same_files(
        self, plan: str, old: Path, tmp_path: Path
    ) -> None:
        if plan == "lost":
            shutil.rmtree(old / ".prepare")
        before = contents(old)
        assert "nothing to do" in run(tmp_path / "corpus", "--out", old).out
        assert contents(old) == before
        new = make(tmp_path / "new", tmp_path / "corpus")
        assert len(Manifest.load(new).sources) == 3

    def test_appends_too(self, old: Path, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "more/b.jsonl", texts(60, 1))
        (tmp_path / "more/c.py").write_text("print(2)\n")
        for _ in range(2):
            assert run(tmp_path / "more", "--out", old, "--append").code == 0
        found = [source.name for source in Manifest.load(old).sources]
        assert found == ["corpus/a.jsonl", "more/b.jsonl"]
        make(old, tmp_path / "corpus/*.py", "--append")  # a glob names them
        assert Manifest.load(old).sources[-1].name == "corpus/model.py"
        (tmp_path / "code").mkdir()
        (tmp_path / "code/d.py").write_text("print(3)\n")
        error = run(tmp_path / "code", "--out", old, "--append").error
        assert "for a dataset that myGPT 0.2 started" in error and "code/**" in error
