"""Nothing about how units are run shows in the bytes: workers, start method, kills."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prepare import job
from prepare.plan import Unit
from prepare.worker_pool import run_local
from tests.prepare.support import (
    ROOT,
    contents,
    held,
    make,
    quarantine,
    shrink,
    texts,
    write_jsonl,
)

UNITS = [Unit(number, (), 1) for number in range(20)]

# Forking is what prepare does on Linux; from Python 3.12 on that is warned of where, as in pytest,
# other threads are running.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def make_corpus(folder: Path) -> Path:
    """Every kind of source, with some of everything that is left out."""
    write_jsonl(folder / "a.jsonl", texts(300, 1))
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b'{"text": null}\n{"text": "\xff"}\n{"text": ""}\n{broken\n')
    rows = [*texts(300, 2), None, ""]
    pq.write_table(pa.table({"text": rows}), folder / "b.parquet", row_group_size=50)
    for number, text in enumerate(texts(20, 3)):
        (folder / f"{number}.md").write_text(text)
    (folder / "long.txt").write_text("".join(texts(200, 4)))
    (folder / "broken.txt").write_bytes(b"\xff")
    return folder


def test_workers_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=2000, PIECE_BYTES=3000, BATCH_BYTES=1000, READ_BYTES=700)
    corpus = make_corpus(tmp_path / "corpus")
    outs = [make(tmp_path / f"{n}", corpus, "--workers", n) for n in (1, 2, 5)]
    assert len(contents(outs[0])) > 40
    assert len(quarantine(outs[0])) == 5
    held(outs[0])
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])


def test_spawned_workers_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, MIN_UNIT_BYTES=10_000)
    corpus = make_corpus(tmp_path / "corpus")
    alone = make(tmp_path / "alone", corpus)
    calls = []

    def spawned(work: Callable, units: Sequence[Unit], workers: int, *_: object) -> Iterator:
        calls.append(len(units))
        return run_local(work, units, workers, "spawn")

    monkeypatch.setattr(job, "run_local", spawned)
    assert contents(make(tmp_path / "spawned", corpus, "--workers", 2)) == contents(alone)
    assert calls[0] > 4


def number_of(unit: Unit) -> int:
    return unit.number


@pytest.mark.parametrize("workers", [1, 2, 5, 50])
def test_each_unit_is_done_once(workers: int) -> None:
    assert sorted(run_local(number_of, UNITS, workers)) == list(range(20))


def refuse_seven(unit: Unit) -> int:
    if unit.number == 7:
        raise FileNotFoundError("seven is gone")
    return unit.number


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_an_error_in_the_input_reaches_the_caller(workers: int) -> None:
    with pytest.raises(FileNotFoundError, match=r"^seven is gone$"):
        list(run_local(refuse_seven, UNITS, workers))


def die_at_seven(unit: Unit) -> int:
    if unit.number == 7:
        os._exit(9)
    return unit.number


@pytest.mark.parametrize("workers", [2, 5])
def test_a_dead_worker_is_noticed(workers: int) -> None:
    with pytest.raises(ChildProcessError, match="a worker process died"):
        list(run_local(die_at_seven, UNITS, workers))


def fail_at_seven(unit: Unit) -> int:
    if unit.number == 7:
        raise EOFError("a fault of ours")
    return unit.number


def test_a_fault_of_ours_is_shown_where_it_happened(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError):
        list(run_local(fail_at_seven, UNITS, 2))
    assert "EOFError: a fault of ours" in capfd.readouterr().err


def fill_the_pipe(unit: Unit) -> bytes:
    if unit.number == 3:
        raise ValueError("three")
    return bytes(1 << 20)


def test_results_that_nobody_takes_hold_nobody_up() -> None:
    with pytest.raises(ValueError, match="three"):
        list(run_local(fill_the_pipe, UNITS, 4))
    results = run_local(fill_the_pipe, UNITS[10:], 4)
    next(results)
    results.close()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")
class TestKilled:
    """Whenever prepare is killed, running it again gives the bytes of a run that never was."""

    def campaign(self, tmp_path: Path, documents: int, *campaign: object) -> tuple[int, int]:
        write_jsonl(tmp_path / "a.jsonl", texts(documents, 1, words=60))
        table = pa.table({"text": texts(documents, 2, words=60)})
        pq.write_table(table, tmp_path / "b.parquet", row_group_size=100)
        sources = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
        command = [sys.executable, "tests/prepare/kill.py", *campaign, tmp_path, *sources]
        done = subprocess.run(
            list(map(str, command)),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        killed, finished = map(int, done.stdout.split())
        return killed, finished

    def test_anywhere(self, tmp_path: Path) -> None:
        killed, _ = self.campaign(tmp_path, 1000, "anywhere", random.randrange(1000), 30)
        assert killed == 30

    def test_before_a_step_in_the_file_system(self, tmp_path: Path) -> None:
        stride = 4
        killed, _ = self.campaign(tmp_path, 150, "everywhere", random.randrange(stride), stride)
        assert killed > 10

    @pytest.mark.slow
    def test_anywhere_for_long(self, tmp_path: Path) -> None:
        killed, _ = self.campaign(tmp_path, 2000, "anywhere", random.randrange(1000), 200)
        assert killed == 200

    @pytest.mark.slow
    def test_before_each_single_step_in_the_file_system(self, tmp_path: Path) -> None:
        killed, _ = self.campaign(tmp_path, 150, "everywhere", 0, 1)
        assert killed > 40
