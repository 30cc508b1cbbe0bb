"""The code's name holds its commit, and says when files differ from it."""

import subprocess
from pathlib import Path

import pytest

from mygpt.eval import target as module
from mygpt.eval.target import version

NOBODY = ["-c", "user.name=nobody", "-c", "user.email=nobody@nowhere"]


def test_a_commit_and_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCE", tmp_path)
    plain = version()

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), *NOBODY, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "one")
    assert version() == f"{plain} {git('rev-parse', '--short=12', 'HEAD')}"
    (tmp_path / "file").write_text("b")
    assert version().endswith("-dirty")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert version() == plain
