"""Stages as processes of their own under one deadline, none depending on another's success."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.gpu.setting import LOG, Setting

ROOT = Path(__file__).parents[2]
MAX_LOG_BYTES = 8 << 20
FINISHED = "finished"


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
        self.unfinished: list[str] = []

    def run(self, stages: Sequence[Stage]) -> list[str]:
        """Run all stages and return the names of those that were skipped, killed or failed."""
        foreground = [stage for stage in stages if not stage.beside]
        background = [(stage, self.start(stage, self.ends)) for stage in stages if stage.beside]
        try:
            for number, stage in enumerate(foreground):
                self.take(stage, later=foreground[number + 1 :])
                self.end(process for other, process in background if other.beside == stage.name)
        finally:
            self.end(process for _, process in background)
            cut(self.base.out / LOG)
        return self.unfinished

    def take(self, stage: Stage, later: Iterable[Stage]) -> None:
        """Run one stage, in the time that later ones leave; or skip it."""
        started = time.time()
        left = self.ends - started
        if left < stage.least:
            self.note(stage, f"skipped: needs {stage.least:.0f} s, {max(0, left):.0f} s were left")
            return
        reserved = reserve(later, left - stage.least)
        limit = max(stage.least, min(stage.seconds, left - reserved))
        process = self.start(stage, started + limit)
        try:
            process.wait(limit)
            state = ending(process.returncode)
        except subprocess.TimeoutExpired:
            state = f"out of time after {limit:.0f} s"
        finally:
            self.end([process])
        self.note(stage, state, round(time.time() - started, 1))

    def start(self, stage: Stage, ends: float) -> "subprocess.Popen[bytes]":
        """Start a stage's process, in a process group of its own."""
        setting = replace(self.base, stage=stage.name, ends=ends)
        with open(self.base.out / LOG, "ab") as log:
            log.write(f"--- {stage.name}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu.stage", stage.target, setting.to_json()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        setting.note({"process": process.pid})
        return process

    def note(self, stage: Stage, state: str, seconds: float = 0.0) -> None:
        """Write down how a stage ended, and print it."""
        if state != FINISHED:
            self.unfinished.append(stage.name)
        replace(self.base, stage=stage.name).note({"state": state, "seconds": seconds})
        print(f"{stage.name:<10} {seconds:6.1f} s  {state}", flush=True)

    def end(self, processes: "Iterable[subprocess.Popen[bytes]]") -> None:
        """Kill processes, where they are alive, with all that they have started."""
        for process in processes:
            with suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def reserve(later: Iterable[Stage], left: float) -> float:
    """Seconds that later stages need at least, those left out that will not fit anyway."""
    total = 0.0
    for stage in later:
        if total + stage.least <= left:
            total += stage.least
    return total


def ending(code: int) -> str:
    """How a process ended, from its exit code."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"failed with exit code {code}: see {LOG}" if code else FINISHED


def cut(log: Path) -> None:
    """Keep only the end of a very long log."""
    if log.stat().st_size > MAX_LOG_BYTES:
        log.write_bytes(log.read_bytes()[-MAX_LOG_BYTES:])
