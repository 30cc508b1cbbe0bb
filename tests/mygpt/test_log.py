"""What is written can be read back, and a replayed step counts once."""

import math
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mygpt import log, plot
from mygpt.log import Meter, RunLog, StepResult, read, skip_line, step_line, val_line

ROOT = Path(__file__).parents[2]
RATES = {"ms": 250.0, "tokens_per_second": 2048.0, "waiting": 0.004}
ETA = timedelta(seconds=2)


def line(step: int, loss: float) -> str:
    return step_line(step, 400, {"loss": loss, "lr": 3e-3, "norm": 0.7, **RATES}, ETA)


def write(run: Path, lines: list[str]) -> None:
    run_log = RunLog(run)
    for text in lines:
        run_log.write(text)


def test_a_step_line_says_all() -> None:
    assert line(120, 4.125) == (
        "step 120/400  loss 4.125000  lr 3.000e-03  norm 0.7000  ms 250.0  tok/s 2048  mfu n/a  "
        "data 0.4%  eta 0:00:02"
    )


def test_rates_are_means_since_the_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.5, 100.0, 101.5, 200.0, 200.25, 300.0, 300.25])
    monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
    waits = [3.0, 3.0]  # seconds before this run's first step
    known = Meter(512, 0.25, waited=lambda: waits[0])
    unknown = Meter(512, None, waited=lambda: waits[1])
    for waits[0] in (3.5, 4.0):
        with known:
            pass
    for _ in range(2):
        rates = {"ms": 1000.0, "tokens_per_second": 512.0, "mfu": 0.25, "waiting": 0.5}
        assert (known.metrics(), known.eta(10)) == (rates, timedelta(seconds=10))
    known.reset()
    with known:
        pass
    rates = {"ms": 250.0, "tokens_per_second": 2048.0, "mfu": 1.0, "waiting": 0.0}
    assert known.metrics() == rates
    text = step_line(1, 9, rates, known.eta(10**6))
    assert text.endswith("ms 250.0  tok/s 2048  mfu 100.0%  data 0.0%  eta 2days,21:26:40")
    waits[1] = 3.001
    with unknown:
        pass
    assert (unknown.metrics(), unknown.eta(10)) == (pytest.approx(RATES), ETA)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 1e3)), unique_by=lambda x: x[0]))
def test_steps_and_validations_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, losses: list[tuple[int, float]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    write(run, [line(*item) for item in losses] + [val_line(step, 9, x, 64) for step, x in losses])
    history = read(run)
    assert list(history.train) == list(history.val) == [step for step, _ in losses]
    assert history.train == history.val == pytest.approx(dict(losses), abs=1e-6)


def test_all_of_a_step_is_read_back(tmp_path: Path) -> None:
    result = StepResult(math.nan, math.inf, 1e-3, range(8, 16), "loss is nan")
    skipped = skip_line(2, 400, result, Path("log/a"))
    older = "step 3/400  loss 2.5  lr 1.000e-03  norm 0.5  ms 1.0  tok/s 9  mfu n/a  eta 0:00:02"
    write(tmp_path, [line(1, 4.125), skipped, older])
    history = read(tmp_path)
    assert history.train == {1: 4.125, 3: 2.5}
    assert history.series["lr"] == {1: 3e-3, 3: 1e-3}
    assert history.series["norm"] == {1: 0.7, 3: 0.5}
    assert history.timings["tokens_per_second"] == {1: 2048, 3: 9}
    assert history.skipped == {2: "loss is nan"}
    assert (
        "windows 8..15  look: python -m shards explain --run log/a --step 2"
        in (tmp_path / "log.txt").read_text()
    )
    write(tmp_path, ["resume 1/400"])
    assert read(tmp_path).skipped == {}
    assert read(tmp_path).series["lr"] == {1: 3e-3}


def test_replayed_steps_are_dropped(tmp_path: Path) -> None:
    first = [line(step, 1.0) for step in range(1, 9)] + [val_line(5, 400, 1.0, 64)]
    first.append(val_line(8, 400, 1.0, 64))
    again = ["resume 4/400", *[line(step, 2.0) for step in range(5, 8)], val_line(5, 400, 2.0, 64)]
    write(tmp_path, first + again)
    history = read(tmp_path)
    assert history.train == {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 2.0, 6: 2.0, 7: 2.0}
    assert history.val == {5: 2.0}


def test_the_log_is_appended_to_and_a_torn_line_is_not_glued(tmp_path: Path) -> None:
    write(tmp_path, ["baseline unigram 4.8 uniform 10.8", line(1, 3.0), "für Menschen: 世界"])
    with open(tmp_path / "log.txt", "a", encoding="utf-8") as file:
        file.write(line(2, 2.5)[:30])  # killed in the middle of a line
    write(tmp_path, [line(3, 2.0)])
    history = read(tmp_path)
    assert history.train == {1: 3.0, 3: 2.0}
    assert history.unigram == 4.8
    assert "für Menschen: 世界" in (tmp_path / "log.txt").read_text("utf-8").splitlines()


def test_a_line_may_be_for_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunLog(tmp_path).write(line(1, 3.0), shown=False)
    assert read(tmp_path).train == {1: 3.0}
    assert capsys.readouterr().out == ""


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path / "run", enabled=False).write("hello")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_no_log_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"log\.txt is not there"):
        read(tmp_path)


WRITER = """
import sys
from pathlib import Path
from mygpt.log import RunLog
log = RunLog(Path(sys.argv[1]))
for number in range(20_000):
    log.write(f"line {number}")
sys.exit(7)
"""


@pytest.mark.skipif(os.name == "nt", reason="pipes close otherwise there")
def test_a_run_outlives_the_reader_of_its_lines(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"line 0\n"
        process.stdout.close()
        assert process.wait() == 7
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 20_000


def test_damaged_numbers_are_passed_over(tmp_path: Path) -> None:
    """They stop neither the picture nor the report, which sum up and scale what is read."""
    steps = {n: line(n, 4.0 - n / 10) for n in range(1, 7)}
    for step, number in {2: "e.-", 3: "nan", 4: "1e400", 5: "-1e308"}.items():
        steps[step] = re.sub(r"loss \S+", f"loss {number}", steps[step])
    huge = steps[6].replace("step 6/", f"step {'9' * 5000}/")
    write(tmp_path, [*steps.values(), huge, "val 6/400  loss nan  tokens 64"])
    history = log.read(tmp_path)
    assert history.train == {1: 3.9, 6: 3.4}
    assert math.isnan(history.val[6])
    assert plot.draw(tmp_path).is_file()
