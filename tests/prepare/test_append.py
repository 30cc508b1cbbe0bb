"""An append that is killed: the dataset stays what it was, and the next run makes it whole."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.manifest import Manifest
from tests.prepare.support import ROOT, contents, held, make, run, shrink, texts, write_jsonl

UNIT_BYTES = 1000
PROGRAM = f"""
from prepare import __main__ as command, plan
plan.MIN_UNIT_BYTES = {UNIT_BYTES}
command.main()
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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


def test_killed_twice(base: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    make(whole, tmp_path / "b.jsonl", "--append")
    before, fingerprint = contents(base), Manifest.load(base).fingerprint
    for units in (1, 30):
        append_until_killed(base, tmp_path / "b.jsonl", units)
        manifest = Manifest.load(base)
        assert (manifest.generation, manifest.fingerprint) == (0, fingerprint)
        now = contents(base)
        assert {name: now[name] for name in before} == before
    outcome = run(tmp_path / "b.jsonl", "--out", base, "--append")
    assert "Resuming" in outcome.out
    assert contents(base) == contents(whole)
    held(base)
    assert Manifest.load(base, generation=0).fingerprint == fingerprint
