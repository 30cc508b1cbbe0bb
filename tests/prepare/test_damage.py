"""Finished work is looked at before it is believed; what is missing is prepared anew."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from prepare import job
from prepare.plan import Unit
from shards.manifest import Manifest
from tests.prepare.support import contents, held, make, run, shrink, texts, write_jsonl


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of some ten units."""
    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    write_jsonl(tmp_path / "corpus.jsonl", texts(150))
    return tmp_path / "corpus.jsonl"


@pytest.fixture
def whole(corpus: Path, tmp_path: Path) -> dict[str, bytes]:
    return contents(make(tmp_path / "whole", corpus))


def stopped(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run after all its units are finished."""
    original = job.run_local

    def interrupted(work: Callable, units: Sequence[Unit], *rest: object) -> Iterator:
        yield from original(work, units, *rest)
        raise OSError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_local", interrupted)
        assert "stopped here" in run(source, "--out", out).error


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def with_another_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"<u2", b">u2"))


SHARD_DAMAGES: dict[str, Callable[[Path], object]] = {
    "shard gone": lambda out: (out / "train_00003.npy").unlink(),
    "shard cut": lambda out: cut(out / "train_00003.npy"),
    "shard empty": lambda out: (out / "train_00003.npy").write_bytes(b""),
    "shard with another header": lambda out: with_another_header(out / "val_00003.npy"),
    "index gone": lambda out: (out / "val_00003.docs.parquet").unlink(),
    "index cut": lambda out: cut(out / "train_00003.docs.parquet"),
    "index empty": lambda out: (out / "train_00003.docs.parquet").write_bytes(b""),
}


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


RECORD_DAMAGES: dict[str, Callable[[Path], object]] = {
    "edited": lambda units: edit(units / "00003.json", read=5),
    "cut": lambda units: cut(units / "00003.json"),
    "no object": lambda units: (units / "00003.json").write_text("[]"),
    "empty object": lambda units: (units / "00003.json").write_text("{}"),
    "of another unit": lambda units: shutil.copy(units / "00002.json", units / "00003.json"),
}
DAMAGES = SHARD_DAMAGES | {
    f"record {name}": lambda out, damage=damage: damage(out / ".prepare/units")
    for name, damage in RECORD_DAMAGES.items()
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_before_a_rerun(
    damage: str,
    corpus: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    stopped(out, corpus, monkeypatch)
    units = len(list((out / ".prepare/units").iterdir()))
    DAMAGES[damage](out)
    outcome = run(corpus, "--out", out)
    assert f"Resuming: {units - 1} of {units}" in outcome.out, outcome.err
    assert contents(out) == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_before_finish(damage: str, corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for task in ("1/2", "2/2"):
        make(out, corpus, "--task", task)
    DAMAGES[damage](out)
    error = run(corpus, "--out", out, "--finish").error
    assert "found 1 missing or damaged (unit 3, ...): run the tasks" in error
    assert not (out / "manifest.json").exists()
    make(out, corpus, "--task", "2/2")
    make(out, corpus, "--finish")
    assert contents(out) == whole


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_a_complete_dataset(
    damage: str, corpus: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = make(tmp_path / "out", corpus)
    others = out / "train_00002.npy"
    before = others.stat().st_mtime_ns
    SHARD_DAMAGES[damage](out)
    outcome = run(corpus, "--out", out)
    assert "Preparing 1 of" in outcome.out, outcome.err
    assert "nothing to do" in outcome.out
    assert contents(out) == whole
    assert others.stat().st_mtime_ns == before
    left = {path.name for path in (out / ".prepare").iterdir()}
    assert left <= {"lock", "plan.lock", "plan.json"}
    assert "again" not in run(corpus, "--out", out).out


def test_a_complete_dataset_that_came_without_its_plan(
    corpus: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = make(tmp_path / "out", corpus)
    shutil.rmtree(out / ".prepare")
    cut(out / "train_00003.npy")
    assert run(corpus, "--out", out).code == 0
    assert contents(out) == whole


@pytest.mark.parametrize("flags", [["--dedup"], ["--val-source", "val.jsonl"]])
def test_the_same_documents_are_left_out(
    flags: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("val.jsonl"), texts(150)[::5])
    write_jsonl(Path("corpus.jsonl"), texts(150) + texts(150)[::2])
    out = make(tmp_path / "out", "corpus.jsonl", *flags)
    before = contents(out)
    for path in out.glob("train_*.npy"):
        path.unlink()
    assert run("corpus.jsonl", *flags, "--out", out).code == 0
    assert contents(out) == before


class TestGenerations:
    """Each command restores what it made."""

    @pytest.fixture
    def grown(self, corpus: Path, tmp_path: Path) -> Path:
        write_jsonl(tmp_path / "more.jsonl", texts(60, 2))
        out = make(tmp_path / "out", corpus)
        return make(out, tmp_path / "more.jsonl", "--append")

    def test_both_are_restored(self, grown: Path, corpus: Path, tmp_path: Path) -> None:
        before = contents(grown)
        last = Manifest.load(grown).splits["train"].shards[-1].file
        (grown / last).unlink()
        (grown / "train_00000.npy").unlink()
        assert run(corpus, "--out", grown).code == 0
        assert not (grown / last).exists()
        assert run(tmp_path / "more.jsonl", "--out", grown, "--append").code == 0
        assert contents(grown) == before

    def test_later_validation_text_is_not_held_out(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_jsonl(Path("val.jsonl"), texts(20, 9))
        commands = [["corpus.jsonl", "--val-source", "val.jsonl"]]
        for number in (2, 3):
            write_jsonl(Path(f"{number}.jsonl"), texts(60, number) + texts(20, 9))
            write_jsonl(Path(f"val{number}.jsonl"), texts(150)[::7] + texts(60, number - 1)[::7])
            commands.append([f"{number}.jsonl", "--val-source", f"val{number}.jsonl", "--append"])
        for command in commands:
            make(tmp_path / "out", *command)
        before = contents(tmp_path / "out")
        for path in (tmp_path / "out").glob("train_*.npy"):
            path.unlink()
        for command in commands:
            make(tmp_path / "out", *command)
        assert contents(tmp_path / "out") == before

    def test_nothing_is_appended_to_a_damaged_dataset(self, grown: Path, tmp_path: Path) -> None:
        (grown / "train_00001.npy").unlink()
        write_jsonl(tmp_path / "again.jsonl", texts(60, 3))
        manifest = (grown / "manifest.json").read_bytes()
        error = run(tmp_path / "again.jsonl", "--out", grown, "--append").error
        assert "found 1 missing or damaged (train_00001.npy, ...)" in error
        assert (grown / "manifest.json").read_bytes() == manifest
        assert not list((grown / ".prepare").glob("units/*"))

    def test_what_no_plan_makes_is_refused(self, grown: Path, tmp_path: Path) -> None:
        shutil.rmtree(grown / ".prepare")
        (grown / Manifest.load(grown).splits["train"].shards[-1].file).unlink()
        error = run(tmp_path / "more.jsonl", "--out", grown, "--append").error
        assert "expected all shards in" in error


class TestTouched:
    """Of a finished dataset the content of a source decides, where its time differs."""

    def test_the_same_content(self, corpus: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
        out = make(tmp_path / "out", corpus)
        os.utime(corpus, ns=(0, 0))
        outcome = run(corpus, "--out", out)
        assert "another time on 1 source" in outcome.out, outcome.err
        assert "nothing to do" in outcome.out
        assert contents(out) == whole
        assert "again" not in run(corpus, "--out", out).out

    @pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
    def test_other_content(self, kind: str, corpus: Path, tmp_path: Path) -> None:
        if kind == "parquet":
            pq = pytest.importorskip("pyarrow.parquet")
            import pyarrow as pa

            source = tmp_path / "corpus.parquet"
            pq.write_table(pa.table({"text": texts(150)}), source, row_group_size=20)
        else:
            source = corpus.with_suffix(f".{kind}")
            source.write_bytes(corpus.read_bytes())
        out = make(tmp_path / "out", source)
        before = contents(out)
        content = source.read_bytes()
        if kind == "parquet":
            pq.write_table(pa.table({"text": texts(150)}), source, row_group_size=50)
            content = source.read_bytes().ljust(len(content))[: len(content)]
        source.write_bytes(content.replace(b"quick", b"quack"))
        error = run(source, "--out", out).error
        assert source.name in error
        assert "changed" in error
        assert contents(out) == before
        assert run(source, "--out", out).code == 2  # as often as one tries

    def test_of_an_append(self, corpus: Path, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "more.jsonl", texts(60, 2))
        write_jsonl(tmp_path / "last.jsonl", texts(60, 3))
        out = make(tmp_path / "out", corpus)
        for name in ("more.jsonl", "last.jsonl"):
            make(out, tmp_path / name, "--append")
        before = contents(out)
        os.utime(tmp_path / "more.jsonl", ns=(0, 0))
        outcome = run(tmp_path / "more.jsonl", "--out", out, "--append")
        assert "nothing to do" in outcome.out, outcome.err
        assert contents(out) == before
        content = (tmp_path / "more.jsonl").read_text().replace("quick", "quack")
        (tmp_path / "more.jsonl").write_text(content)
        assert "more.jsonl" in run(tmp_path / "more.jsonl", "--out", out, "--append").error
        held(out)
