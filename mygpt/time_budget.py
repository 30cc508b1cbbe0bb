"""`--time-budget` with the WSD schedule: the length of the run follows the clock.

Until its decay begins a "wsd" run does not depend on its length, and in the decay a new length only
changes the slope. So between steps the main rank compares the time left with the steps left. If
they differ by more than a tolerance, all ranks take another `Horizon` before the same step, and it
is recorded in config.json: a resumed run repeats it.

Everything from the start of the process counts: compilation, measuring, validations, samples and
checkpoints. RUN/clock.json holds what earlier processes of the run have used, and is replaced
whenever another hundredth of the budget is gone, so a kill loses no more of the count:

    {"format": "mygpt-clock", "version": 1, "seconds": 151.3, "pause_seconds": 1.2, "checksum": ...}
"""

import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low

from mygpt.distributed import LaggedMax
from mygpt.log import RunLog
from mygpt.settings import TrainConfig
from mygpt.train_state import TrainState
from shards import stored_json
from shards.files import write_json

FORMAT, VERSION = "mygpt-clock", 1
AIM = 0.98  # of the budget: the closing lines and the last step's rest take some more
# Deviations of the end that are left alone: a share of the budget, and one of the time left, in
# which there is another opportunity to correct them.
TOLERANCE, TOLERANCE_OF_REST = 0.01, 0.05
# Time over which the speed of steps is averaged, likewise.
WINDOW, WINDOW_OF_REST = 0.02, 0.1


@dataclass(frozen=True)
class _Stored:
    """Content of clock.json."""

    seconds: float = 0.0
    pause_seconds: float = 0.0  # of a validation with its checkpoint


class BudgetClock:
    """Time used of a budget of `budget` seconds by the run in a folder, over all its processes.

    `started`: a value of `time.monotonic()`. Raises ValueError if clock.json is damaged.
    """

    def __init__(self, run: Path, budget: float, started: float) -> None:
        self._path, self.budget = run / "clock.json", budget
        stored = _read(self._path)
        self._since, self._stored_seconds = started - stored.seconds, stored.seconds
        self._pauses = deque([stored.pause_seconds], maxlen=3)
        # Seconds of the last steps, without those that paused, and their sum.
        self._gaps, self._gap_seconds = deque[float](), 0.0
        self._last_times: deque[float] = deque(maxlen=2)  # of the last two calls of `revise`
        self._lagged, self._waiting = LaggedMax(), False

    def used(self) -> float:
        """Return the seconds used so far."""
        return time.monotonic() - self._since

    def left(self) -> float:
        """Return the seconds left of the budget."""
        return self.budget - self.used()

    def begin(self, pause_seconds: float) -> None:
        """Write clock.json for the first time, with the seconds of a validation and checkpoint."""
        self._pauses[0] = pause_seconds
        self._store()

    def store(self, state: TrainState) -> None:
        """Write clock.json if the run follows the clock, on the main rank."""
        if state.ranks.is_main and state.record.horizons:
            self._store()

    def _store(self) -> None:
        self._stored_seconds = self.used()
        record = asdict(_Stored(self._stored_seconds, median_low(self._pauses)))
        record |= {"format": FORMAT, "version": VERSION}
        write_json(self._path, stored_json.with_checksum(record))

    def fit_length(self, state: TrainState, log: RunLog) -> None:
        """Give the run, if it follows the clock, as many steps as there is time for.

        To be called before each step, on all ranks, on which the length stays the same: with
        several of them the main rank's decision takes effect one step later.
        """
        if not state.record.horizons:
            return
        proposal = 0
        if state.ranks.is_main:
            self._measure(state)
            if not self._waiting and state.step > state.record.horizons[-1].since:
                proposal = self._proposal(state.config, state.step)
        agreed = self._lagged.exchange(proposal, state.ranks)
        self._waiting = bool(proposal) and not agreed
        if agreed:
            self._gaps.clear()  # the next decision is made by what follows
            self._gap_seconds = 0.0
            state.record = state.record.with_horizon(state.step, max(agreed, state.step + 1))
            if state.ranks.is_main:
                write_json(state.config.log_dir / "config.json", state.record.to_dict())
            log.write(f"length {state.config.max_steps:,} steps, as the speed has changed")

    def _measure(self, state: TrainState) -> None:
        """Take the time of the last step, and of what came after it."""
        now, is_first = time.monotonic(), len(self._last_times) < 2  # the first one may compile
        self._last_times.append(now)
        gap = now - self._last_times[0]
        if is_first:
            return
        if not any(state.step % interval == 0 for interval in _pause_intervals(state.config)):
            self._gaps.append(gap)
            self._gap_seconds += gap
            while self._gap_seconds - self._gaps[0] > self._window():
                self._gap_seconds -= self._gaps.popleft()
        elif self._gaps:
            self._pauses.append(max(0.0, gap - self._gap_seconds / len(self._gaps)))
        if self.used() - self._stored_seconds > TOLERANCE * self.budget:
            self._store()

    def _window(self) -> float:
        return WINDOW * self.budget + WINDOW_OF_REST * max(0.0, self.left())

    def _proposal(self, config: TrainConfig, step: int) -> int:
        """Return the number of steps after which the time will be up, 0 if that is as planned."""
        if self._gap_seconds < self._window() / 2:
            return 0
        pause, interval = median_low(self._pauses), min(_pause_intervals(config), default=0)
        per_step = self._gap_seconds / len(self._gaps) + (pause / interval if interval else 0)
        left = AIM * self.budget - self.used() - pause
        fitting = max(1, int(left / per_step))
        deviation = abs(step + fitting - config.max_steps) * per_step
        is_fine = deviation <= TOLERANCE * self.budget + TOLERANCE_OF_REST * max(0.0, left)
        return 0 if is_fine else step + fitting


def _pause_intervals(config: TrainConfig) -> list[int]:
    """Return the intervals of what training pauses for; what follows every step is part of it."""
    intervals = (config.val_interval, config.checkpoint_interval, config.sample_interval)
    return [interval for interval in intervals if interval > 1]


def _read(path: Path) -> _Stored:
    if not path.is_file():
        return _Stored()
    remedy = "remove it: the budget then counts from here"
    raw = stored_json.read(path, FORMAT, {VERSION}, remedy)
    return stored_json.build(_Stored, raw, path, remedy=remedy)
