"""The log of a run: `log.txt`, a line an event, written by `RunLog` and read back by `read`.

    step 120/400  loss 4.123456  lr 2.973e-03  norm 0.73  ms 212.4  tok/s 4821  mfu n/a  eta 0:00:59
    val 120/400  loss 4.301234  tokens 16384
    resume 100/400

The file is only appended to. After a crash some steps are trained and logged again: a `resume`
line (or `start 0/400`) says from where, and readers drop what was replayed. Lines of any other
kind are for people.
"""

import re
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

_NUMBER = r"[-+.0-9e]+|nan|inf"
_STEP = re.compile(rf"step (\d+)/\d+  loss ({_NUMBER})  lr ({_NUMBER})  norm .*  eta \S+")
_VAL = re.compile(rf"val (\d+)/\d+  loss ({_NUMBER})  tokens \d+")
_RESUME = re.compile(r"(?:start|resume) (\d+)/\d+")
_UNIGRAM = re.compile(rf"baseline unigram ({_NUMBER}) uniform .*")


class RunLog:
    """Lines for the terminal and for `RUN/log.txt`; silent where `enabled` is False."""

    def __init__(self, run: Path, enabled: bool = True) -> None:
        self.path = run / "log.txt"
        self.enabled = enabled
        if enabled:
            run.mkdir(parents=True, exist_ok=True)
            self._end_torn_line()

    def _end_torn_line(self) -> None:
        """A killed writer may have left half a line: what comes next must not be glued to it."""
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def write(self, *lines: str, shown: bool = True) -> None:
        """Append lines, each at once and whole, and show them on the terminal."""
        if not self.enabled:
            return
        for line in lines:
            if shown:
                print(line, flush=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")


class Meter:
    """The speed of training: `with meter:` around each step, `rates` over those since `reset`.

    `tokens` are those of one step; `ideal_seconds` is what a step would take at the hardware's
    peak, None where that is not known.
    """

    def __init__(self, tokens: int, ideal_seconds: float | None) -> None:
        self.tokens, self.ideal_seconds = tokens, ideal_seconds
        self.reset()

    def reset(self) -> None:
        """Begin a new average."""
        self._started, self._seconds, self._steps = 0.0, 0.0, 0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1

    def rates(self, steps_left: int) -> str:
        """The end of a step's line: means over the steps timed, and the time the others need."""
        seconds = self._seconds / self._steps
        mfu = "n/a" if self.ideal_seconds is None else f"{self.ideal_seconds / seconds:.1%}"
        eta = str(timedelta(seconds=round(steps_left * seconds))).replace(" ", "")
        return f"ms {seconds * 1e3:.1f}  tok/s {self.tokens / seconds:.0f}  mfu {mfu}  eta {eta}"


def step_line(step: int, of: int, loss: float, lr: float, norm: float, rates: str) -> str:
    """The line of a training step; `rates` are those of a `Meter`."""
    return f"step {step}/{of}  loss {loss:.6f}  lr {lr:.3e}  norm {norm:.4f}  {rates}"


def val_line(step: int, of: int, loss: float, tokens: int) -> str:
    """The line of a validation on the fixed subset of `tokens` targets."""
    return f"val {step}/{of}  loss {loss:.6f}  tokens {tokens}"


def baseline_line(unigram: float, uniform: float) -> str:
    """The line of what needs no training: nats a token on the validation split."""
    return f"baseline unigram {unigram:.6f} uniform {uniform:.6f}"


@dataclass
class History:
    """What a log tells, replayed steps once: step → its loss, nats a token."""

    train: dict[int, float] = field(default_factory=dict)
    val: dict[int, float] = field(default_factory=dict)
    unigram: float | None = None


def read(run: Path) -> History:
    """Read `RUN/log.txt`. Lines that are torn or of no known kind are passed over.

    Raises FileNotFoundError where there is none.
    """
    path, history = run / "log.txt", History()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder of a run")
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if match := _STEP.fullmatch(line):
            history.train[int(match[1])] = float(match[2])
        elif match := _VAL.fullmatch(line):
            history.val[int(match[1])] = float(match[2])
        elif match := _UNIGRAM.fullmatch(line):
            history.unigram = float(match[1])
        elif match := _RESUME.fullmatch(line):
            at = int(match[1])
            history.train = {step: loss for step, loss in history.train.items() if step <= at}
            history.val = {step: loss for step, loss in history.val.items() if step <= at}
    return history
