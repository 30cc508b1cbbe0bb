"""Stages as processes of their own under one deadline, none depending on another's success.

Each writes findings to one file: a line of JSON at once, so whatever ends a stage, they stay.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.table import Device, Preset
from mygpt.settings import PRESETS, TrainConfig

ROOT = Path(__file__).parents[2]
RESULTS, LOG = "results.jsonl", "log.txt"
MAX_LOG_BYTES = 8 << 20
FINISHED = "finished"
# The process of a stage: its module and function, called with its setting.
START = """\
from pathlib import *
from bench.gpu.runner import Setting
from {} import {} as run
run({!r})"""


@dataclass(frozen=True)
class Setting:
    """What a stage is given: its name, the model, the device, folders and its end."""

    stage: str
    preset: Preset
    device: Device
    out: Path  # of the results
    work: Path  # of datasets and runs, removed in the end
    ends: float = 0.0  # time.time() at which the stage is killed

    @property
    def config(self) -> TrainConfig:
        """The preset's settings."""
        return PRESETS[self.preset][1]

    @property
    def on_gpu(self) -> bool:
        """True on CUDA."""
        return self.device == "cuda"

    def note(self, finding: Mapping[str, Any]) -> None:
        """Append a finding of the stage, with the time, to the results."""
        line = json.dumps({"stage": self.stage, "time": round(time.time(), 3)} | dict(finding))
        with open(self.out / RESULTS, "ab", buffering=0) as file:
            # The line end comes first: it also ends a line that a killed stage left incomplete.
            file.write(b"\n" + line.encode())


def read(out: Path) -> Iterator[dict[str, Any]]:
    """Yield all findings in order; torn lines are passed over. FileNotFoundError without any."""
    path = out / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder that bench.gpu wrote to")
    for line in path.read_text("utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            finding = json.loads(line)
            if isinstance(finding, dict) and "stage" in finding:
                yield finding


@dataclass(frozen=True)
class Stage:
    """`target`, MODULE:FUNCTION, gets at most `seconds`; with less than `least` left it is skipped.

    With `beside` it runs in the background and is ended after the stage of that name, or, with
    "all", after the last one.
    """

    name: str
    target: str
    seconds: float = 0.0
    least: float = 0.0
    beside: str = ""


class Runner:
    """Runs stages one after the other until `deadline` seconds have passed."""

    def __init__(self, base: Setting, deadline: float) -> None:
        self.base = base
        self.ends = time.time() + deadline

    def run(self, stages: Sequence[Stage]) -> list[str]:
        """Run all stages and return the names of those that were skipped, killed or failed."""
        foreground = [stage for stage in stages if not stage.beside]
        background = [(stage, self.start(stage, self.ends)) for stage in stages if stage.beside]
        states = {}
        try:
            for number, stage in enumerate(foreground):
                started = time.time()
                states[stage.name] = self.take(stage, later=foreground[number + 1 :])
                self.note(stage, states[stage.name], round(time.time() - started, 1))
                end(process for other, process in background if other.beside == stage.name)
        finally:
            end(process for _, process in background)
            cut(self.base.out / LOG)
        return [name for name, state in states.items() if state != FINISHED]

    def take(self, stage: Stage, later: Iterable[Stage]) -> str:
        """Run one stage, in the time that later ones leave, or skip it; return how it ended."""
        started = time.time()
        left = self.ends - started
        if left < stage.least:
            return f"skipped: needs {stage.least:.0f} s, {max(0, left):.0f} s were left"
        limit = max(stage.least, min(stage.seconds, left - reserve(later, left - stage.least)))
        process = self.start(stage, started + limit)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"out of time after {limit:.0f} s"
        finally:
            end([process])
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"failed with exit code {code}: see {LOG}" if code else FINISHED

    def start(self, stage: Stage, ends: float) -> "subprocess.Popen[bytes]":
        """Start a stage's process, in a process group of its own."""
        setting = replace(self.base, stage=stage.name, ends=ends)
        program = START.format(*stage.target.split(":"), setting)
        with open(self.base.out / LOG, "ab", buffering=0) as log:
            log.write(f"--- {stage.name}\n".encode())
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        setting.note({"process": process.pid})
        return process

    def note(self, stage: Stage, state: str, seconds: float) -> None:
        """Write down how a stage ended, and print it."""
        replace(self.base, stage=stage.name).note({"state": state, "seconds": seconds})
        print(f"{stage.name:<10} {seconds:6.1f} s  {state}", flush=True)


def reserve(later: Iterable[Stage], left: float) -> float:
    """Seconds that later stages need at least, those left out that will not fit anyway."""
    total = 0.0
    for stage in later:
        if total + stage.least <= left:
            total += stage.least
    return total


def end(processes: "Iterable[subprocess.Popen[bytes]]") -> None:
    """Kill processes, where they are alive, with all that they have started."""
    for process in processes:
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cut(log: Path) -> None:
    """Keep only the end of a very long log."""
    if log.stat().st_size > MAX_LOG_BYTES:
        log.write_bytes(log.read_bytes()[-MAX_LOG_BYTES:])
