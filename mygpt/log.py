r"""The log of a run: `log.txt`, a line an event, written by `RunLog` and read back by `read`.

    step 120/400  loss 4.123456  lr 2.973e-03  norm 0.7312  ms 212.4  tok/s 4821  mfu n/a  \
        data 0.1%  eta 0:00:59                                        (all on one line)
    skip step 121/400  loss nan  norm nan  reason "loss is nan"  windows 7680..7743  look: ...
    val 120/400  loss 4.301234  tokens 16384
    resume 100/400

The file is only appended to. After a crash some steps are trained and logged again: a `resume`
line (or `start 0/400`) says from where, and readers drop what was replayed. Lines of any other
kind are for people.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

_NUMBER = r"[-+.0-9e]+|nan|inf"
_STEP = re.compile(
    rf"step (\d+)/\d+  loss ({_NUMBER})  lr ({_NUMBER})  norm ({_NUMBER})  ms \S+  tok/s (\d+)  "
    r".*eta \S+"
)
_SKIP = re.compile(r'skip step (\d+)/\d+  .*reason "([^"]*)"  windows .*')
_VAL = re.compile(rf"val (\d+)/\d+  loss ({_NUMBER})  tokens \d+")
_RESUME = re.compile(r"(?:start|resume) (\d+)/\d+")
_UNIGRAM = re.compile(rf"baseline unigram ({_NUMBER}) uniform .*")


def end_torn_line(path: Path) -> None:
    """A killed writer may have left half a line: what comes next must not be glued to it."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


class RunLog:
    """Lines for the terminal and for `RUN/log.txt`; silent where `enabled` is False."""

    def __init__(self, run: Path, enabled: bool = True) -> None:
        self.path = run / "log.txt"
        self.enabled = enabled
        if enabled:
            run.mkdir(parents=True, exist_ok=True)
            end_torn_line(self.path)

    def write(self, *lines: str, shown: bool = True) -> None:
        """Append lines, each at once and whole, and show them on the terminal.

        Raises OSError where the disk is full or not writable.
        """
        if not self.enabled:
            return
        for line in lines:
            if shown:
                _show(line)
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise OSError(
                    f"cannot write {self.path} ({error}): make room, and the same command goes on "
                    "from the last checkpoint"
                ) from error


def _show(line: str) -> None:
    """Print a line. Where nobody reads along any more, a run goes on: log.txt has every line."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@dataclass(frozen=True)
class Rates:
    """How fast training goes, on the mean of some steps; its text is the end of a step's line."""

    seconds: float  # of a step
    tokens_per_second: float
    mfu: float | None  # of the hardware's peak, None where that is not known
    waiting: float  # share of the time spent waiting for data
    eta: timedelta  # what the steps that are left will take, without validations

    def figures(self) -> dict[str, float]:
        """By name, what a chart can show."""
        known = {} if self.mfu is None else {"mfu": self.mfu}
        return known | {
            "ms": self.seconds * 1e3,
            "tokens_per_second": self.tokens_per_second,
            "waiting": self.waiting,
        }

    def __str__(self) -> str:
        mfu = "n/a" if self.mfu is None else f"{self.mfu:.1%}"
        return (
            f"ms {self.seconds * 1e3:.1f}  tok/s {self.tokens_per_second:.0f}  mfu {mfu}  "
            f"data {self.waiting:.1%}  eta {str(self.eta).replace(' ', '')}"
        )


class Meter:
    """The speed of training: `with meter:` around each step, `rates` over those since `reset`.

    `tokens` are those of one step; `ideal_seconds` is what a step would take at the hardware's
    peak, None where that is not known; `waited` tells the seconds spent waiting for data so far.
    """

    def __init__(
        self, tokens: int, ideal_seconds: float | None, waited: Callable[[], float]
    ) -> None:
        self.tokens, self.ideal_seconds, self.waited = tokens, ideal_seconds, waited
        self.reset()

    def reset(self) -> None:
        """Begin a new average."""
        self._started, self._seconds, self._steps = 0.0, 0.0, 0
        self._waited_before = self.waited()

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1

    def rates(self, steps_left: int) -> Rates:
        """The means over the steps timed."""
        seconds = self._seconds / self._steps
        return Rates(
            seconds=seconds,
            tokens_per_second=self.tokens / seconds,
            mfu=self.ideal_seconds and self.ideal_seconds / seconds,
            waiting=(self.waited() - self._waited_before) / self._seconds,
            eta=timedelta(seconds=round(steps_left * seconds)),
        )


def step_line(step: int, of: int, loss: float, lr: float, norm: float, rates: str | Rates) -> str:
    """The line of a training step."""
    return f"step {step}/{of}  loss {loss:.6f}  lr {lr:.3e}  norm {norm:.4f}  {rates}"


def skip_line(step: int, of: int, loss: float, norm: float, reason: str, windows: range) -> str:
    """The line of a step whose weights were left alone, with its place in the stream."""
    return (
        f'skip step {step}/{of}  loss {loss:.6f}  norm {norm:.4f}  reason "{reason}"  '
        f"windows {windows.start}..{windows.stop - 1}"
    )


def val_line(step: int, of: int, loss: float, tokens: int) -> str:
    """The line of a validation on the fixed subset of `tokens` targets."""
    return f"val {step}/{of}  loss {loss:.6f}  tokens {tokens}"


def baseline_line(unigram: float, uniform: float) -> str:
    """The line of what needs no training: nats a token on the validation split."""
    return f"baseline unigram {unigram:.6f} uniform {uniform:.6f}"


@dataclass
class History:
    """What a log tells, replayed steps once: step → what was logged of it.

    Losses are in nats a token; `skipped` tells why a step did not move the weights.
    """

    train: dict[int, float] = field(default_factory=dict)
    val: dict[int, float] = field(default_factory=dict)
    lr: dict[int, float] = field(default_factory=dict)
    norm: dict[int, float] = field(default_factory=dict)
    tokens_per_second: dict[int, float] = field(default_factory=dict, compare=False)
    skipped: dict[int, str] = field(default_factory=dict)
    unigram: float | None = None

    def forget_after(self, step: int) -> None:
        """Drop what was logged of later steps: they are trained again."""
        series: list[dict[int, Any]] = [self.train, self.val, self.lr, self.norm, self.skipped]
        for one in (*series, self.tokens_per_second):
            for late in [at for at in one if at > step]:
                del one[late]


def read(run: Path) -> History:
    """Read `RUN/log.txt`. Lines that are torn or of no known kind are passed over.

    Raises FileNotFoundError where there is none.
    """
    path, history = run / "log.txt", History()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder of a run")
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if match := _STEP.fullmatch(line):
            series = (history.train, history.lr, history.norm, history.tokens_per_second)
            for values, value in zip(series, match.groups()[1:], strict=True):
                values[int(match[1])] = float(value)
        elif match := _SKIP.fullmatch(line):
            history.skipped[int(match[1])] = match[2]
        elif match := _VAL.fullmatch(line):
            history.val[int(match[1])] = float(match[2])
        elif match := _UNIGRAM.fullmatch(line):
            history.unigram = float(match[1])
        elif match := _RESUME.fullmatch(line):
            history.forget_after(int(match[1]))
    return history
