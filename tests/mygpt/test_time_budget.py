"""`--time-budget` with the WSD schedule ends on time, whatever the machine does meanwhile."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from mygpt import checkpoint, log, run_config, time_budget
from mygpt.log import RunLog
from mygpt.run_config import RunRecord
from mygpt.schedule import Horizon, learning_rate
from mygpt.settings import TrainConfig
from mygpt.stopping import EXIT_STOPPED, Stop
from mygpt.time_budget import BudgetClock
from mygpt.train_state import TrainState
from shards.files import write_json
from tests.training import ALONE, BATCH, MODEL, environment, final_bytes, on_ranks

pytestmark = pytest.mark.usefixtures("quick")

BUDGET, FIRST_GUESS = 300.0, 500


class Run:
    """A run on a fake clock: `step_seconds(time)` each, and pauses at validations."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time_budget.time, "monotonic", lambda: self.now)
        config = TrainConfig(log_dir=folder, max_steps=0, time_budget=BUDGET, schedule="wsd")
        record = RunRecord(config.resolved(FIRST_GUESS), "", {}).with_horizon(0, FIRST_GUESS)
        self.state = SimpleNamespace(record=record, step=0, ranks=ALONE, config=record.config)
        self.log = RunLog(folder)
        self.begin()

    def begin(self) -> None:
        """Another process takes the run up."""
        self.clock = BudgetClock(self.state.config.log_dir, BUDGET, started=self.now)

    def to(self, step: float, step_seconds: Callable[[float], float], pause: float = 2.0) -> None:
        state = self.state
        while state.step < min(step, state.config.max_steps):
            self.clock.fit_length(state, self.log)  # type: ignore[arg-type]
            state.config = state.record.config
            self.now += step_seconds(self.now)
            state.step += 1
            if state.step % state.config.val_interval == 0 or state.step == state.config.max_steps:
                self.now += pause


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


SPEEDS: dict[str, Callable[[float], float]] = {
    "as measured": lambda now: 0.55,
    "three times slower from the middle on": lambda now: 0.5 if now < 150 else 1.5,
    "five times slower in the decay": lambda now: 0.5 if now < 240 else 2.5,
    "slow at first": lambda now: 2.0 if now < 100 else 0.5,
    "faster in the decay": lambda now: 1.0 if now < 200 else 0.25,
    "now and then": lambda now: 0.5 if now % 40 < 25 else 1.5,
    "every other step": lambda now: 0.3 + 0.6 * (int(now * 1000) % 2),
    "large steps": lambda now: 6.0 if now < 150 else 9.0,
}


@pytest.mark.parametrize("name", SPEEDS)
def test_it_ends_within_a_twentieth(run: Run, name: str) -> None:
    run.to(float("inf"), SPEEDS[name])
    assert 0.95 * BUDGET <= run.now <= 1.05 * BUDGET
    assert len(run.state.record.horizons) < 25
    assert run_config.read_run(run.state.config.log_dir) == (
        run.state.record if len(run.state.record.horizons) > 1 else None
    )


def test_time_of_a_killed_process_counts(run: Run) -> None:
    run.to(205, lambda now: 0.5)
    before = run.now
    run.now += 1000  # nobody trains
    run.begin()
    assert run.clock.used() == pytest.approx(before, abs=0.01 * BUDGET + 0.5)
    run.state.step = 150  # the last checkpoint
    run.to(float("inf"), lambda now: 0.5)
    assert 0.95 * BUDGET <= run.now - 1000 <= 1.05 * BUDGET


def test_what_was_decided_is_repeated(run: Run) -> None:
    """A resumed run reaches the last decision before it makes another."""
    run.to(200, lambda now: 0.5 if now < 50 else 1.0)
    decided = run.state.record.horizons
    assert len(decided) > 1
    run.begin()
    run.state.step = 10
    run.to(decided[-1].since, lambda now: 0.1)
    assert run.state.record.horizons == decided


class Ranks:
    """One of two ranks in this process, which are called in turn."""

    world_size = 2

    def __init__(self, rank: int, calls: tuple[list[int], list[int]]) -> None:
        self.is_main, self.calls, self.own = rank == 0, calls, calls[rank]

    def all_reduce_max_async(self, value: int) -> Callable[[], int]:
        self.own.append(value)
        call = len(self.own) - 1
        return lambda: max(calls[call] for calls in self.calls)


def test_ranks_take_another_length_at_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: tuple[list[int], list[int]] = ([], [])
    runs = [Run(tmp_path / str(rank), monkeypatch) for rank in range(2)]
    for rank, run in enumerate(runs):
        run.state.ranks = Ranks(rank, calls)
    main, other = runs
    monkeypatch.setattr(time_budget.time, "monotonic", lambda: main.now)
    while main.state.step < main.state.config.max_steps:
        main.to(main.state.step + 1, lambda now: 0.5 if now < 100 else 1.0)
        other.to(other.state.step + 1, lambda now: 0.1)
        assert main.state.record.horizons == other.state.record.horizons
    assert len(main.state.record.horizons) > 1
    assert 0.95 * BUDGET <= main.now <= 1.05 * BUDGET
    assert sum(map(bool, calls[0])) == len(main.state.record.horizons) - 1
    assert not any(calls[1])


def test_a_damaged_clock_is_refused(run: Run) -> None:
    run.clock.begin(1.0)
    path = run.state.config.log_dir / "clock.json"
    record = json.loads(path.read_text())
    for damaged in ({**record, "seconds": 5.0}, {**record, "seconds": "5"}, []):
        write_json(path, damaged)
        with pytest.raises(ValueError, match="remove it: the budget then counts from here"):
            run.begin()


# --- the schedule


def wsd(max_steps: int) -> TrainConfig:
    return TrainConfig(max_lr=1.0, min_lr=0.0, max_steps=max_steps, schedule="wsd")


def rates(steps: range, *horizons: Horizon) -> list[float]:
    return [learning_rate(step, wsd(horizons[-1].max_steps), horizons) for step in steps]


def test_one_horizon_is_the_plain_schedule() -> None:
    plain = [learning_rate(step, wsd(101)) for step in range(102)]
    assert rates(range(102), Horizon(0, 101)) == plain


def test_a_new_horizon_before_the_decay_moves_its_beginning() -> None:
    assert (
        rates(range(201), Horizon(0, 100), Horizon(20, 200))[20:]
        == (rates(range(201), Horizon(0, 200))[20:])
    )


@pytest.mark.parametrize("max_steps", [70, 90, 140])
def test_a_new_horizon_within_the_decay_changes_its_slope(max_steps: int) -> None:
    before = rates(range(60), Horizon(0, 100))
    found = rates(range(max_steps + 1), Horizon(0, 100), Horizon(60, max_steps))
    assert found[:60] == before
    line = [0.8 * (max_steps - step) / (max_steps - 60) for step in range(60, max_steps + 1)]
    assert found[60:] == pytest.approx(line)


def test_a_horizon_that_is_suddenly_near_begins_the_decay() -> None:
    found = rates(range(41), Horizon(0, 100), Horizon(30, 40))
    assert found[30:] == pytest.approx([1 - step / 10 for step in range(11)])


# --- whole runs


def command(data: Path, run: Path, *flags: str) -> list[str]:
    base = f"{MODEL} {BATCH} --dropout 0.2 --optimizer adamw --log-interval 100".split()
    return ["tiny", "--data", str(data), "--log-dir", str(run), *base, *flags]


def test_a_run_ends_on_time_and_is_repeated_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine becomes slower twice; the run is stopped once, and a copy of its record rerun."""
    one, other = tmp_path / "one", tmp_path / "other"
    take_step, clock = train.train_step, SimpleNamespace(now=0.0, stop_at=36)

    def slow_step(state: TrainState, stop: Stop) -> log.StepResult:
        clock.now += 0.3 if clock.now < 10 else 0.6 if clock.now < 18 else 0.9
        if state.step == clock.stop_at:
            stop._interrupt.seen = 15
        return take_step(state, stop)

    monkeypatch.setattr(time_budget.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(train, "train_step", slow_step)
    flags = ("--time-budget", "30")
    assert train.main(command(data, one, *flags), started=0.0) == EXIT_STOPPED
    started, clock.stop_at = clock.now, -1
    assert train.main(command(data, one, *flags), started=started) == 0
    assert 28.5 <= clock.now <= 31.5
    record = run_config.read_run(one)
    assert record is not None
    assert len(record.horizons) > 1
    assert checkpoint.steps(one)[-1] == record.config.max_steps
    assert checkpoint.read_state(checkpoint.find(one))["config"]["max_steps"] == (
        record.config.max_steps
    )

    other.mkdir()
    config = replace(record.config, log_dir=other)
    write_json(other / "config.json", replace(record, config=config).to_dict())
    shutil.copy(one / "clock.json", other)
    monkeypatch.setattr(BudgetClock, "_proposal", lambda *_: 0)
    assert train.main(command(data, other, *flags), started=clock.now) == 0
    assert final_bytes(other) == final_bytes(one)
    assert log.read(other).train == log.read(one).train


RANKS = """
import sys, time, train
from mygpt import time_budget
from shards.cli import end_with

clock, take_step = [0.0], train.train_step
class Time:
    monotonic, perf_counter = staticmethod(lambda: clock[0]), time.perf_counter
time_budget.time = Time

def slow_step(state, stop):
    clock[0] += 0.2 if clock[0] < 4 else 0.5 if state.ranks.is_main else 0.3
    return take_step(state, stop)

train.train_step = slow_step
end_with(lambda: train.main(sys.argv[1:], started=0.0))
"""


@pytest.mark.slow
def test_processes_take_another_length_at_the_same_step(data: Path, tmp_path: Path) -> None:
    """Their clocks differ; that ranks agree shows in a repetition without any clock."""
    script, run = tmp_path / "ranks.py", tmp_path / "run"
    script.write_text(RANKS)
    flags = ("--micro-batch", "2", "--time-budget", "10")
    subprocess.run(
        [*on_ranks(2), str(script), *command(data, run, *flags)], env=environment(), check=True
    )
    record = run_config.read_run(run)
    assert record is not None
    assert len(record.horizons) > 1
    assert sorted(log.read(run).train) == list(range(1, record.config.max_steps + 1))
    text = (run / "log.txt").read_text("utf-8")
    for horizon in record.horizons[1:]:
        assert f"length {horizon.max_steps:,} steps, as the speed has changed" in text
