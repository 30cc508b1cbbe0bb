"""The output folder: whose it is, who is at work in it, and what lies there already."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from pathlib import Path
from types import SimpleNamespace

import pytest

from prepare.workspace import Folder, Workspace
from tests.prepare.support import (
    contents,
    held,
    make,
    run,
    shrink,
    text_of,
    texts,
    write_jsonl,
)

HOLDER = """
import sys
from prepare import workspace
from prepare.workspace import Folder
with workspace.Workspace(Folder(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "corpus.jsonl", texts(100))
    return tmp_path / "corpus.jsonl"


def test_a_folder_with_other_files_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    error = run(corpus, "--out", out).error
    assert f"expected a new or empty folder in {out}, found other files there" in error
    assert "give another --out" in error
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_taken(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", corpus)


def test_a_file_is_no_folder(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in run(corpus, "--out", tmp_path / "out").error
    assert (tmp_path / "out").read_text() == "mine"


def test_a_manifest_that_is_not_ours(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text('{"name": "a web page"}')
    assert "expected format mygpt-shards" in run(corpus, "--out", tmp_path / "out").error
    assert (tmp_path / "out/manifest.json").read_text() == '{"name": "a web page"}'


OTHERS = {
    "other sources": ["other.jsonl"],
    "one source more": ["corpus.jsonl", "other.jsonl"],
    "another fraction": ["corpus.jsonl", "--val-fraction", "0.2"],
    "another split": ["corpus.jsonl", "--val-source", "other.jsonl"],
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_another_dataset_is_left_alone(
    case: str, copied: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = make(tmp_path / "out", corpus)
    write_jsonl(tmp_path / "other.jsonl", texts(100, 5))
    if copied:  # it came here without its work area
        shutil.rmtree(out / ".prepare")
    before = contents(out)
    assert "give another --out" in run(*OTHERS[case], "--out", out).error
    assert contents(out) == before


def test_a_copied_dataset_is_complete(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus)
    shutil.rmtree(out / ".prepare")
    before = contents(out)
    assert "nothing to do" in run(corpus, "--out", out).out
    assert contents(out) == before


def test_the_same_file_is_named_among_files_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "b"):
        write_jsonl(tmp_path / folder / "part.jsonl", texts(50, ord(folder)))
    write_jsonl(tmp_path / "c.jsonl", texts(50))
    sources = [tmp_path / "a/part.jsonl", tmp_path / "b/part.jsonl", tmp_path / "c.jsonl"]
    out = make(tmp_path / "out", *sources)
    write_jsonl(tmp_path / "c.jsonl", texts(49))
    assert "the source c.jsonl as it was" in run(*sources, "--out", out).error


class TestTwoAtOnce:
    def test_the_second_is_refused_until_the_first_dies(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shrink(monkeypatch, LOCK_SECONDS=0)
        out = tmp_path / "out"
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            error = run(corpus, "--out", out).error
            assert f"expected to be alone in {out}, found another prepare at work there" in error
            holder.send_signal(signal.SIGKILL)
        held(make(out, corpus))

    def test_a_short_wait_outlasts_one_that_is_ending(self, corpus: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        with subprocess.Popen(
            [
                sys.executable,
                "-c",
                HOLDER.replace("sys.stdin.read()", "import time; time.sleep(1)"),
                str(out),
            ],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            held(make(out, corpus))

    @pytest.mark.parametrize(("task", "others"), [(None, ["1/2"]), ("1/2", [None])])
    def test_tasks_and_a_whole_run_exclude_each_other(
        self,
        task: str | None,
        others: list[str | None],
        corpus: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        shrink(monkeypatch, LOCK_SECONDS=0)
        workspace = Workspace(Folder(str(tmp_path / "out")))
        with workspace.locked(task):
            for other in others:
                with pytest.raises(ValueError, match="found another prepare at work"):
                    workspace.locked(other).__enter__()
            with workspace.locked("2/2") if task else nullcontext():
                pass
        with workspace.locked(others[0]):
            pass


def test_the_first_command_again_leaves_a_begun_append_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    out = make(tmp_path / "out", corpus)
    write_jsonl(tmp_path / "more.jsonl", texts(150, 3))
    with monkeypatch.context() as patch:
        patch.setattr("prepare.job.Job.write_manifest", lambda *_: None)  # as if killed there
        make(out, tmp_path / "more.jsonl", "--append")
    units = sorted(path.name for path in (out / ".prepare/units").iterdir())
    assert len(units) > 3
    assert "nothing to do" in run(corpus, "--out", out).out
    assert sorted(path.name for path in (out / ".prepare/units").iterdir()) == units
    outcome = run(tmp_path / "more.jsonl", "--append", "--out", out)
    assert f"{len(units)} of {len(units)} units finished" in outcome.out
    held(out)


@pytest.mark.parametrize("arguments", [["no-such.txt"], ["corpus.jsonl", "--text-column", "x"]])
def test_a_mistyped_command_leaves_no_folder(
    arguments: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--out", "out").code == 2
    assert run("corpus.jsonl", "--append", "--out", "out").code == 2
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("prepare.job._show_progress", interrupted)
        outcome = run(corpus, "--out", out)
    assert outcome.code == 130
    assert "interrupted: finished work is kept, the same command resumes" in outcome.err
    held(make(out, corpus))


def test_nothing_but_the_dataset_is_left(corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus)
    for name in (".manifest.json.123.tmp", ".train_00000.npy.99.tmp", ".prepare/.plan.json.5.tmp"):
        (out / name).write_text("what a killed run left half-written")
    run(corpus, "--out", out)
    assert not [path for path in out.rglob("*") if path.suffix == ".tmp"]
    assert (
        json.loads((out / ".prepare/plan.json").read_bytes())["files"][0]["name"] == "corpus.jsonl"
    )
    assert not (out / ".prepare/units").exists()


@pytest.mark.parametrize("out", ["/", ".", "..", "mine"])
def test_a_folder_that_is_not_ours_is_left_alone(
    out: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    Path("thesis.txt").write_text("mine")
    (Path("mine/.prepare")).mkdir(parents=True)  # a name that others may give, too
    Path("mine/thesis.txt").write_text("mine")
    before = {path: sorted(path.iterdir()) for path in (Path("/"), Path.cwd(), Path("mine"))}
    assert "expected a new or empty folder in" in run(corpus, "--out", out).error
    assert before == {path: sorted(path.iterdir()) for path in before}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--out", "out"], "expected a SOURCE, found none"),
        (["corpus.jsonl", "", "--out", "out"], "expected a SOURCE, found none"),
        (["corpus.jsonl", "--val-source", "", "--out", "out"], "expected a SOURCE, found none"),
        (["corpus.jsonl", "--out", ""], "expected a folder for --out, found an empty name"),
    ],
)
def test_an_empty_name_is_not_this_folder(
    arguments: list[str],
    message: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in run(*arguments).error
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


@pytest.mark.parametrize("linked", [False, True])
def test_out_may_lie_in_the_source(
    linked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    folder = tmp_path / "corpus"
    write_jsonl(folder / "a.jsonl", texts(150))
    whole = make(tmp_path / "whole", folder)
    source = folder
    if linked:
        source = tmp_path / "link/corpus"
        source.parent.mkdir()
        source.symlink_to(folder)
    out = folder / "data/out"
    with monkeypatch.context() as patch:
        patch.setattr("prepare.job.Job.write_manifest", lambda *_: None)  # as if killed there
        make(out, source)
    for _ in range(2):
        make(out, source)
        assert contents(out) == contents(whole)
    assert "expected sources outside --out" in run(f"{out}/*.jsonl", "--out", out).error


def test_one_file_under_another_path(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    shutil.move(corpus, tmp_path / "in/corpus.jsonl")
    (tmp_path / "link").symlink_to("in")
    monkeypatch.chdir(tmp_path)
    out = make(tmp_path / "out", "in/corpus.jsonl")
    before = contents(out)
    for path in ("../in/corpus.jsonl", "deep/../corpus.jsonl", "../link/corpus.jsonl"):
        monkeypatch.chdir(tmp_path / "in")
        for flags in ([], ["--append"]):
            assert "nothing to do" in run(path, "--out", out, *flags).out
            assert contents(out) == before
    with monkeypatch.context() as patch:  # so it is resumed
        patch.setattr("prepare.job.Job.write_manifest", lambda *_: None)
        make(tmp_path / "other", "corpus.jsonl")
    assert "1 of 1 unit finished" in run("deep/../corpus.jsonl", "--out", "../other").out


class TestACorrectedCommand:
    """What a refused command began does not block the right one."""

    def test_text_column(self, tmp_path: Path) -> None:
        source = tmp_path / "a.jsonl"
        source.write_text("".join(f'{{"body": "{text_of("train")} {i}"}}\n' for i in range(200)))
        with open(source, "a") as file:
            file.write('{"title": "one"}\n')
        out = tmp_path / "out"
        assert "bad documents" in run(source, "--out", out, "--text-column", "title").error
        outcome = run(source, "--out", out, "--text-column", "body")
        assert "Starting over" in outcome.out, outcome.err
        assert contents(out) == contents(make(tmp_path / "whole", source, "--text-column", "body"))

    def test_no_unit_was_finished(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
            assert "GB free" in run(corpus, "--out", out).error
        assert "1 missing" in run(corpus, "--out", out, "--finish").error
        make(out, corpus, "--val-fraction", 0.3)
        assert contents(out) == contents(make(tmp_path / "whole", corpus, "--val-fraction", 0.3))

    def test_finished_work_is_not_lost_by_a_slip(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr("prepare.job.Job.write_manifest", lambda *_: None)
            make(out, corpus)
        error = run(corpus, "--out", out, "--text-column", "id").error
        assert "found other" in error
        assert "text column (id instead of text)" in error
        assert "changed" not in error
        assert "Resuming" in run(corpus, "--out", out).out


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (ENOSPC, "make room"),
        (EDQUOT, "make room"),
        (EROFS, "another --out"),
        (EACCES, "permissions"),
    ],
)
def test_what_the_system_refuses_comes_with_a_remedy(
    number: int, remedy: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number), "/the/file")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("prepare.workspace.move_durably", refused)
        error = run(corpus, "--out", out).error
    assert f"expected to read the sources and write to {out}, found" in error
    assert os.strerror(number) in error
    assert "/the/file" in error
    assert remedy in error
    held(make(out, corpus))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b'{"generation": "x"}'])
def test_broken_json_comes_with_a_remedy(content: bytes, corpus: Path, tmp_path: Path) -> None:
    out = make(tmp_path / "out", corpus)
    write_jsonl(tmp_path / "more.jsonl", texts(50, 3))
    make(out, tmp_path / "more.jsonl", "--append")
    before = contents(out)
    for name, command in {
        "plan.json": [corpus],
        "plan_00001.json": [tmp_path / "more.jsonl", "--append"],
    }.items():
        kept = (out / ".prepare" / name).read_bytes()
        (out / ".prepare" / name).write_bytes(content)
        outcome = run(*command, "--out", out)
        assert outcome.code == 0 or "restore it" in outcome.error or "give another" in outcome.error
        assert contents(out) == before
        (out / ".prepare" / name).write_bytes(kept)
    write_jsonl(tmp_path / "third.jsonl", texts(50, 4))
    (out / "quarantine.jsonl").write_bytes(content + b"\n" if content else b"{\n")
    error = run(tmp_path / "third.jsonl", "--append", "--out", out).error
    assert "quarantine.jsonl" in error
    assert "restore it, or remove it" in error


def test_a_damaged_array_comes_with_a_remedy(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("prepare.job.find_duplicates", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(corpus, "--out", out, "--dedup")
    array = out / ".prepare/hashes/00000.npy"
    for content in (b"", b"\x93NUMPY", array.read_bytes()[:-1]):
        array.write_bytes(content)
        assert "remove that file and run again" in run(corpus, "--out", out, "--dedup").error
    array.unlink()
    held(make(out, corpus, "--dedup"))
