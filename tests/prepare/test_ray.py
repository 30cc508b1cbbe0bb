"""The Ray engine on a real cluster of two nodes, one of which is killed while it works."""

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.prepare.support import ROOT, contents, make, run, shrink, texts, write_jsonl

UNIT_BYTES = 1 << 14
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed: the extra ray"
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    write_jsonl(path, texts(4000))
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """A place for Ray's files whose path is short: there are sockets in it."""
    path = Path(tempfile.mkdtemp(prefix="ray"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def in_a_process(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, whose Ray knows of no other and lets none in."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


@needs_ray
@pytest.mark.slow
def test_a_node_that_dies_changes_nothing(
    corpus: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = ROOT / "tests" / "prepare" / "lose_a_node.py"
    done = in_a_process(folder, program, UNIT_BYTES, corpus, "--out", tmp_path / "far")
    assert done.returncode == 0, done.stderr
    shrink(monkeypatch, MIN_UNIT_BYTES=UNIT_BYTES)
    near = make(tmp_path / "near", corpus)
    assert contents(tmp_path / "far") == contents(near)
    finished = int(done.stdout.split("killed with ")[1].split()[0])
    assert 4 <= finished < len(list(near.glob("train_*.npy"))) - 4, "killed while it worked"


REFUSING = """
from prepare.worker_pool import run_ray

def refuse(unit):
    raise ValueError("expected another unit, found this one: take that")

try:
    list(run_ray(refuse, [1, 2, 3], None))
except ValueError as error:
    assert type(error) is ValueError
    print(error)
"""


@needs_ray
@pytest.mark.slow
def test_what_a_unit_refuses_is_raised_as_it_was(folder: Path) -> None:
    done = in_a_process(folder, "-c", REFUSING)
    assert done.stdout == "expected another unit, found this one: take that\n", done.stderr


def test_ray_that_is_not_installed(corpus: Path, tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"ray": None}):
        outcome = run(corpus, "--out", tmp_path / "out", "--engine", "ray")
    assert "pip install 'mygpt[ray]'" in outcome.error
