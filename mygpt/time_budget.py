"""`--time-budget`: as many steps as fit into a time, by measuring and, with WSD, by the clock.

Until its decay begins a "wsd" run does not depend on its length, and in the decay a new length only
changes the slope. So between steps the main rank compares the time left with the steps left. If
they differ by more than a tolerance, all ranks take another `Horizon` before the same step, and it
is recorded in config.json: a resumed run repeats it.

Everything from the start of the process counts: compilation, measuring, validations, samples and
checkpoints. RUN/clock.json holds what earlier processes of the run have used, and is replaced
whenever another hundredth of the budget is gone, so a kill loses no more of the count:

    {"format": "mygpt-clock", "version": 1, "seconds": 151.3, "pause_seconds": 1.2, "checksum": ...}
"""

import math
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, median_low
from typing import TypeVar

from mygpt.distributed import DistributedContext, LaggedMax
from mygpt.log import RunLog
from mygpt.run_config import RunRecord
from mygpt.settings import VALIDATIONS, TrainConfig
from mygpt.train_state import TrainState, save_checkpoint, trial_pass
from shards import stored_json
from shards.files import write_json

Result = TypeVar("Result")

FORMAT, VERSION = "mygpt-clock", 1
MIN_STEPS = 20  # for which a time budget must be enough: a step is then a twentieth of it at most
# Share of the budget, and least number of steps, to measure. "cosine" has this one calibration.
_MEASURED = {"cosine": (0.02, 3), "wsd": (0.002, 0)}
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


def measure_length(
    record: RunRecord,
    clock: BudgetClock,
    build: Callable[[RunRecord], TrainState],
    train_step: Callable[[TrainState], object],
    validate: Callable[[TrainState], object],
    log: RunLog,
) -> RunRecord:
    """Return the record with the number of steps that fit into --time-budget, as measured.

    Raises as `steps_in_budget`, and what the functions raise that it is given.
    """
    config = record.config
    log.write(f"measuring how many steps fit into {config.time_budget:g} seconds")
    trial = replace(record, config=config.resolved(max(1000, config.warmup_steps)))
    steps, validations = steps_in_budget(
        config, clock, lambda: build(trial), train_step, validate, log
    )
    record = replace(record, config=config.resolved(steps, validations))
    return record.with_horizon(0, steps) if config.schedule == "wsd" else record


def steps_in_budget(
    config: TrainConfig,
    clock: BudgetClock,
    build: Callable[[], TrainState],
    train_step: Callable[[TrainState], object],
    validate: Callable[[TrainState], object],
    log: RunLog,
) -> tuple[int, int]:
    """Return the steps and validations that fit into --time-budget, the same on all ranks.

    Measured on states that `build` makes and that are thrown away. What a process pays once, such
    as compilation, is paid first; then a start, some steps, a validation and a checkpoint are
    timed. A "wsd" run corrects the number later, so little is measured. Raises ValueError as soon
    as it shows that less than `MIN_STEPS` fit.
    """
    state, start_seconds = build(), 0.0
    ranks = state.ranks
    _check_budget(config, clock, ranks, _estimate_step(state))
    train_step(state)
    if ranks.device.type == "cuda":
        validate(state)
    if config.schedule == "cosine":
        del state  # there may be no room for two

        def start() -> TrainState:
            state = build()
            train_step(state)
            return state

        start_seconds, state = _timed(start)

    def validate_and_save() -> None:
        validate(state)
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, Path(folder), None)

    step_seconds, _ = _timed(lambda: train_step(state))
    _check_budget(config, clock, ranks, step_seconds)
    # All ranks must take equally many steps: rank 0 decides, here and below.
    share, least = _MEASURED[config.schedule]
    count = ranks.broadcast_object(int(share * config.time_budget / step_seconds))
    more = [_timed(lambda: train_step(state))[0] for _ in range(max(least, min(count, 100)))]
    step_seconds = median([step_seconds, *more])
    log.write(f"a step takes {step_seconds:.3g} s, now measuring a validation and a checkpoint")
    round_seconds, _ = _timed(validate_and_save)
    left = clock.left() - start_seconds
    validations = validations_that_fit(left, round_seconds)
    steps = steps_that_fit(left, step_seconds, round_seconds, config.val_interval, validations)
    log.write(f"these take {round_seconds:.3g} s: about {steps} steps fit")
    if config.schedule == "wsd":
        steps = max(steps, MIN_STEPS)
        if ranks.is_main:
            clock.begin(round_seconds)
    return ranks.broadcast_object((steps, validations))


def _estimate_step(state: TrainState) -> float:
    """Return the seconds of a step, extrapolated from a pass of one micro-batch."""
    size, device = state.config.micro_batch, state.ranks.device
    seconds, _ = _timed(lambda: trial_pass(state.model, size, device))
    if device.type == "cuda" or seconds < 10:  # a first pass compiles, or allocates memory
        seconds, _ = _timed(lambda: trial_pass(state.model, size, device))
    state.zero_grad()
    return seconds * state.grad_accum_steps


def _check_budget(
    config: TrainConfig, clock: BudgetClock, ranks: DistributedContext, step_seconds: float
) -> None:
    """Raise ValueError, on all ranks, if less than `MIN_STEPS` steps fit into the time left."""
    step_seconds, left = ranks.broadcast_object((step_seconds, clock.left()))
    if MIN_STEPS * step_seconds > left:
        least = math.ceil(1.25 * MIN_STEPS * step_seconds + config.time_budget - left)
        raise ValueError(
            f"one step takes about {step_seconds:.2g} s here: --time-budget "
            f"{config.time_budget:g} is too short for {MIN_STEPS} steps; give --time-budget "
            f"{least}, a --total-batch-size below {config.total_batch_size}, or a smaller model: "
            "the preset tiny is for CPUs"
        )


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def validations_that_fit(seconds: float, round_seconds: float) -> int:
    """Return the number of validations of a run of `seconds`, each taking `round_seconds`.

    At least 1; `VALIDATIONS` unless they would take more than a fifth of the time.
    """
    most = 0.2 * max(0.0, seconds)
    return max(1, min(VALIDATIONS, int(most / round_seconds) if round_seconds else VALIDATIONS))


def steps_that_fit(
    seconds: float,
    step_seconds: float,
    round_seconds: float,
    val_interval: int,
    validations: int = VALIDATIONS,
) -> int:
    """Return how many steps fit into `seconds`, at least 1, leaving a twentieth of it unused.

    `round_seconds`: a validation with its checkpoint, once per `val_interval` steps or, if that is
    0, `validations` times in the run.
    """
    if not val_interval:
        return max(1, int((0.95 * seconds - validations * round_seconds) / step_seconds))
    return max(1, int(0.95 * seconds / (step_seconds + round_seconds / val_interval)))
