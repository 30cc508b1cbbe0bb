"""How many steps fit into --time-budget, measured before a run on a copy that is thrown away."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from mygpt import settings
from mygpt.training.job import Job, save
from mygpt.training.step import train_step, validate
from mygpt.training.stopping import Stop


def measured_steps(build: Callable[[], Job], stop: Stop) -> int:
    """The steps that fit, the same on all ranks. `build` makes the copy.

    It pays once for all that a run pays for at its start, then takes steps for a fiftieth of the
    budget, then validates and writes a checkpoint. What it learned, drew and read goes with it.
    """
    begun = time.perf_counter()
    job = build()
    config = job.config
    train_step(job, stop)
    start_seconds = time.perf_counter() - begun

    def seconds_of_step() -> float:
        started = time.perf_counter()
        train_step(job, stop)
        return time.perf_counter() - started

    # Every rank must take as many steps as the others, so the main one decides how many.
    count = job.ranks.of_main(int(config.time_budget / 50 / seconds_of_step()))
    step_seconds = median(seconds_of_step() for _ in range(max(3, min(count, 100))))
    started = time.perf_counter()
    validate(job, stop)
    with tempfile.TemporaryDirectory() as folder:
        save(job, Path(folder), None)
    round_seconds = time.perf_counter() - started
    left = config.time_budget - (time.perf_counter() - begun) - start_seconds
    return job.ranks.of_main(
        settings.steps_that_fit(left, step_seconds, round_seconds, config.val_interval)
    )
