r"""The log of a run: `RUN/log.txt`, one line per event, appended by `RunLog` and parsed by `read`.

    step 120/400  loss 4.123456  lr 2.973e-03  norm 0.7312  ms 212.4  tok/s 4821  mfu n/a  \
        data 0.1%  eta 0:00:59                                        (all on one line)
    skip step 121/400  loss nan  norm nan  reason "loss is nan"  windows 7680..7743  look: ...
    val 120/400  loss 4.301234  tokens 16384
    baseline unigram 4.570838 uniform 10.824905
    resume 100/400                                                    (or start 0/400)

`METRICS` is the one table of what a step line holds. The file is only ever appended to: after a
crash some steps are trained and logged a second time, and `read` drops what was logged of steps
after the one that a `resume` line names. It ignores all other lines.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One metric of a training step: its name in code and trackers, and how it is shown.

    From this table come the line in log.txt, its parser, `History.series`, TensorBoard, W&B and
    the report: a new metric is a row here and a value where the step is logged.
    """

    name: str
    label: str  # in log.txt, before the value
    format: str
    chart: str = ""  # title of its chart in the report; "": none
    unit: str = ""
    log_scale: bool = False
    style: Literal["plain", "smoothed"] = "smoothed"  # of its curve
    is_timing: bool = False  # depends on the machine: differs between equal runs


METRICS = (
    Metric("loss", "loss", ".6f", unit="nats per token"),  # the report draws it beside validation
    Metric("lr", "lr", ".3e", "Learning rate", style="plain"),
    Metric("norm", "norm", ".4f", "Gradient norm", "before clipping", log_scale=True),
    Metric("ms", "ms", ".1f", is_timing=True),  # per step
    Metric("tokens_per_second", "tok/s", ".0f", "Throughput", "tokens per second", is_timing=True),
    Metric("mfu", "mfu", ".1%", is_timing=True),  # of the GPU's peak FLOPs, where that is known
    Metric("waiting", "data", ".1%", is_timing=True),  # share of the time spent on waiting for data
)

_STEP = re.compile(r"step (\d{1,18})/\d+  (loss .*)eta \S+")
_SKIP = re.compile(r'skip step (\d{1,18})/\d+  .*reason "([^"]*)"  windows .*')
_VAL = re.compile(r"val (\d{1,18})/\d+  loss (\S+)  tokens \d+")
_RESUME = re.compile(r"(?:start|resume) (\d{1,18})/\d+")
MAX_FLOAT32 = 3.4e38  # a greater number is damage, and its sums would overflow
_UNIGRAM = re.compile(r"baseline unigram (\S+) uniform .*")


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step, the same on all ranks."""

    loss: float  # nats per token, mean over the step's tokens, before the update
    norm: float  # of the whole gradient, before clipping
    lr: float
    windows: range  # positions in the stream that the step was trained on
    skip_reason: str = ""  # why the weights were left unchanged; empty if they were updated

    def metrics(self) -> dict[str, float]:
        """Return the step's metrics by their names in `METRICS`."""
        return {"loss": self.loss, "lr": self.lr, "norm": self.norm}


def step_line(step: int, max_steps: int, metrics: Mapping[str, float], eta: timedelta) -> str:
    """Return the log line of a training step; a metric without a value is shown as n/a."""
    words = [
        f"{m.label} {format(metrics[m.name], m.format) if m.name in metrics else 'n/a'}"
        for m in METRICS
    ]
    return "  ".join([f"step {step}/{max_steps}", *words, f"eta {str(eta).replace(' ', '')}"])


def skip_line(step: int, max_steps: int, result: StepResult, run_dir: Path) -> str:
    """Return the log line of a step that left the weights unchanged, and how to see its data."""
    windows = result.windows
    return (
        f"skip step {step}/{max_steps}  loss {result.loss:.6f}  norm {result.norm:.4f}  "
        f'reason "{result.skip_reason}"  windows {windows.start}..{windows.stop - 1}  '
        f"look: python -m shards explain --run {run_dir} --step {step}"
    )


def val_line(step: int, max_steps: int, loss: float, tokens: int) -> str:
    """Return the log line of a validation on the fixed subset of `tokens` targets."""
    return f"val {step}/{max_steps}  loss {loss:.6f}  tokens {tokens}"


def checkpoint_line(step: int, max_steps: int, is_best: bool = False) -> str:
    """Return the log line of a written checkpoint."""
    return f"checkpoint {step}/{max_steps}" + ("  best so far" if is_best else "")


def baseline_line(unigram: float, uniform: float) -> str:
    """Return the log line of the losses that need no model, in nats per token of validation."""
    return f"baseline unigram {unigram:.6f} uniform {uniform:.6f}"


class RunLog:
    """Append-only writer of `RUN/log.txt`, echoed on the terminal, and of `RUN/samples.jsonl`.

    Silent unless `enabled`.
    """

    def __init__(self, run_dir: Path, enabled: bool = True) -> None:
        self.path = run_dir / "log.txt"
        self.enabled = enabled
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            end_torn_line(self.path)

    def write(self, *lines: str, shown: bool = True) -> None:
        """Append lines, each whole and at once, and echo them if `shown`.

        Raises OSError if the disk is full or not writable.
        """
        if not self.enabled:
            return
        for line in lines:
            if shown:
                _print(line)
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                raise OSError(
                    f"cannot write {self.path} ({error}): make room and run the same command "
                    "again, it resumes from the last checkpoint"
                ) from error

    def write_samples(self, step: int, samples: Iterable[Mapping[str, str]]) -> None:
        """Append the samples drawn after `step` steps, "prompt" and "text", to samples.jsonl."""
        if self.enabled:
            path = self.path.with_name("samples.jsonl")
            end_torn_line(path)
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)

    def show(self, line: str) -> None:
        """Print a line on the terminal only."""
        if self.enabled:
            _print(line)


def _print(line: str) -> None:
    """Print a line. A run outlives the reader of its output (`| head`): log.txt has every line."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def end_torn_line(path: Path) -> None:
    """Terminate the last line of a file if a killed writer left it incomplete."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


class Meter:
    """Throughput of training: `with meter:` around each step, `metrics` since the last `reset`.

    `tokens`: per step. `ideal_seconds`: of a step at the peak of the hardware, None if unknown.
    `waited`: returns the seconds spent waiting for data so far.
    """

    def __init__(
        self, tokens: int, ideal_seconds: float | None, waited: Callable[[], float]
    ) -> None:
        self.tokens, self.ideal_seconds, self.waited = tokens, ideal_seconds, waited
        self.reset()

    def reset(self) -> None:
        """Start a new average."""
        self._started, self._seconds, self._steps = 0.0, 0.0, 0
        self._waited_before = self.waited()

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += time.perf_counter() - self._started
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Return the means over the timed steps, by their names in `METRICS`."""
        seconds = self._seconds / self._steps
        mfu = {} if self.ideal_seconds is None else {"mfu": self.ideal_seconds / seconds}
        return mfu | {
            "ms": seconds * 1e3,
            "tokens_per_second": self.tokens / seconds,
            "waiting": (self.waited() - self._waited_before) / self._seconds,
        }

    def eta(self, steps_left: int) -> timedelta:
        """Return the time that the remaining steps will take, without validations."""
        return timedelta(seconds=round(steps_left * self._seconds / self._steps))


@dataclass
class History:
    """Content of a log, each step once: losses in nats per token, by step.

    `series` and `timings` hold the metrics of `METRICS` by name, `skipped` the reason why a step
    left the weights unchanged. Equal runs have equal histories: timings are not compared.
    """

    series: dict[str, dict[int, float]] = field(default_factory=lambda: _by_name(False))
    timings: dict[str, dict[int, float]] = field(
        default_factory=lambda: _by_name(True), compare=False
    )
    val: dict[int, float] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)
    unigram: float | None = None

    @property
    def train(self) -> dict[int, float]:
        """Training loss by step."""
        return self.series["loss"]

    def forget_after(self, step: int) -> None:
        """Drop everything logged of later steps: they are trained again."""
        logged: list[dict[int, Any]] = [*self.series.values(), *self.timings.values()]
        for series in (*logged, self.val, self.skipped):
            for late in [at for at in series if at > step]:
                del series[late]

    def of(self, metric: Metric) -> dict[int, float]:
        """Return the values of one metric by step."""
        return (self.timings if metric.is_timing else self.series)[metric.name]


def _by_name(is_timing: bool) -> dict[str, dict[int, float]]:
    return {metric.name: {} for metric in METRICS if metric.is_timing == is_timing}


def read(run_dir: Path) -> History:
    """Parse `RUN/log.txt`; lines that are torn, damaged or of no known kind are passed over.

    Raises FileNotFoundError if there is no log.
    """
    path, history = run_dir / "log.txt", History()
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the folder of a run")
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if match := _STEP.fullmatch(line):
            _read_step(int(match[1]), match[2], history)
        elif match := _SKIP.fullmatch(line):
            history.skipped[int(match[1])] = match[2]
        elif (match := _VAL.fullmatch(line)) and (loss := _number(match[2])) is not None:
            history.val[int(match[1])] = loss
        elif match := _UNIGRAM.fullmatch(line):
            history.unigram = _number(match[1])
        elif match := _RESUME.fullmatch(line):
            history.forget_after(int(match[1]))
    return history


def _read_step(step: int, text: str, history: History) -> None:
    """Note the metrics in `label value  label value ...` of one step."""
    values = dict(word.split(" ", 1) for word in text.split("  ") if " " in word)
    for metric in METRICS:
        value = _number(values.get(metric.label, ""))
        if value is not None and math.isfinite(value):
            history.of(metric)[step] = value


def _number(word: str) -> float | None:
    """Return the number in a word of the log, a percentage as a share; None if it holds none."""
    try:
        number = float(word[:-1]) / 100 if word.endswith("%") else float(word)
    except ValueError:
        return None
    return None if abs(number) > MAX_FLOAT32 else number
