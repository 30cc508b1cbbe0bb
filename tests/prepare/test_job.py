"""Tasks that share a folder, and a forecast that leaves nothing behind."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from prepare import job
from prepare.options import Options
from prepare.workspace import Workspace
from tests.prepare.support import ROOT, contents, held, make, run, shrink, texts, write_jsonl

SMALL_UNITS = """
import sys
from prepare import plan
from prepare.__main__ import main
plan.MIN_UNIT_BYTES = 2000
main()
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of some ten units."""
    shrink(monkeypatch, MIN_UNIT_BYTES=2000)
    write_jsonl(tmp_path / "corpus.jsonl", texts(150))
    return tmp_path / "corpus.jsonl"


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 2, 1)])
def test_tasks_together_make_the_dataset(
    order: tuple[int, ...], corpus: Path, tmp_path: Path
) -> None:
    whole = make(tmp_path / "whole", corpus)
    out = tmp_path / "out"
    for number in order[:-1]:
        make(out, corpus, "--task", f"{number}/3")
    error = run(corpus, "--out", out, "--finish").error
    assert re.search(r"expected \d+ finished units in .*, found \d+ missing", error)
    make(out, corpus, "--task", f"{order[-1]}/3")
    make(out, corpus, "--finish")
    assert contents(out) == contents(whole)
    held(out)


def test_two_tasks_at_once(corpus: Path, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", corpus)
    out = tmp_path / "out"
    command = [sys.executable, "-c", SMALL_UNITS, str(corpus), "--out", str(out), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    tasks = [
        subprocess.Popen(
            [*command, "--task", f"{number}/2"], env=environment, stderr=subprocess.PIPE, text=True
        )
        for number in (1, 2)
    ]
    for task in tasks:
        _, errors = task.communicate()
        assert task.returncode == 0, errors
    make(out, corpus, "--finish")
    assert contents(out) == contents(whole)


def test_two_appending_tasks_at_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first removes what an earlier generation may have left."""
    write_jsonl(tmp_path / "more.jsonl", texts(150, 3))
    whole = make(make(tmp_path / "whole", corpus), tmp_path / "more.jsonl", "--append")
    out = make(tmp_path / "out", corpus)
    options = Options((str(tmp_path / "more.jsonl"),), str(out), workers=1, append=True)
    second = Thread(target=job.run, args=[replace(options, task="2/2")])
    remove = Workspace.remove_intermediates

    def remove_late(workspace: Workspace) -> None:
        if second.ident is None:
            second.start()
            second.join(timeout=0.5)
        remove(workspace)

    monkeypatch.setattr(Workspace, "remove_intermediates", remove_late)
    job.run(replace(options, task="1/2"))
    second.join()
    make(out, tmp_path / "more.jsonl", "--append", "--finish")
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("task", ["0/2", "3/2", "1/0", "1", "a/b", "-1/2", "1/2/3"])
def test_a_task_that_cannot_be(task: str, corpus: Path, tmp_path: Path) -> None:
    outcome = run(corpus, "--out", tmp_path / "out", f"--task={task}")
    assert "expected --task i/n with i from 1 to n" in outcome.error


def test_a_forecast_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    outcome = run(corpus, "--out", tmp_path / "out", "--plan")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "out").exists()
    out = make(tmp_path / "out", corpus)
    tokens = sum(len(document.tokens) for side in held(out).values() for document in side)
    forecast = {line.split()[0]: line for line in outcome.out.splitlines()}
    foretold = int(re.findall(r"[\d,]+", forecast["tokens"])[0].replace(",", ""))
    # Its measure is the file, which holds JSON as well as text.
    assert tokens < foretold < 2 * tokens
    assert f"units      {len(list(out.glob('train_*.npy'))):,}, " in forecast["units"]
    assert "hash, 0.1 for validation" in forecast["split"]


def test_a_disk_without_room_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    error = run(corpus, "--out", tmp_path / "out").error
    assert "GB free" in error
    assert "make room, or give an --out on another disk" in error
