"""Silly values of flags: each command takes them or refuses them at once, without a traceback."""

import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro

import eval as evaluation
from mygpt import command_line, schedule
from mygpt.config import GPTConfig
from mygpt.doctor import __main__ as doctor
from mygpt.doctor import verify_resume
from mygpt.report import __main__ as report
from mygpt.settings import TrainConfig
from prepare.options import Options
from shards import __main__ as shards
from shards.cli import one_line_errors
from shards.manifest import Source
from tests.mygpt.support import gpt2_dataset, write_run

SILLY = [
    *("", "x", "nan", "inf", "-inf", "-1", "0", "1", "1.5", "1e-40", "1e30", "1e308", "-1e30"),
    *(str(2**31), str(2**63 - 1), str(2**63), str(2**64), "9" * 400, "9" * 5000, "1_0", "0x10"),
    *("caf\udce9", "\x1b[31m", "é", "١", "a=b", "=", "x=nan:y", "/dev/null", "/", "a" * 5000),
    *("9" * 400 + "d", "1h", "auto", "none", "no\nline", "--"),
]
SECONDS = 5  # for one command; a loop over a silly number takes longer


def flags_of(*kinds: type) -> list[str]:
    names = {field.name for kind in kinds for field in fields(kind)} - {"model"}
    return [f"--{name.replace('_', '-')}" for name in sorted(names)]


def train(args: Sequence[str]) -> None:
    """All that a run computes of its flags before anything is opened."""
    with one_line_errors():
        config = command_line.parse(args, "")
        for world_size in (1, 7):
            if config.micro_batch:
                schedule.grad_accum_steps(replace(config, total_batch_size=2**20), world_size)
        config.resolved(schedule.steps_of(config, [1000]) or 1)


def evaluate(args: Sequence[str]) -> None:
    with one_line_errors():
        evaluation.parse(list(args))


def options(args: Sequence[str]) -> None:
    """The flags of prepare, without the work that they ask for."""
    with one_line_errors():
        tyro.cli(Options, args=args).check()


def steps(args: Sequence[str]) -> None:
    with one_line_errors():
        verify_resume.parse(args)


def examine(args: Sequence[str]) -> None:
    with one_line_errors():
        doctor.parse(args)


def refused_or_done(
    command: Callable[[Sequence[str]], object],
    args: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *args])
    started, code = time.process_time(), 0
    try:
        command(args)
    except SystemExit as exit_:
        code = exit_.code or 0
    except Exception as error:
        raise AssertionError(f"{args}: {error!r}") from error
    told = capsys.readouterr()
    assert code in (0, 1, 2), args
    if told.err.startswith("error: "):
        assert told.err.count("\n") == 1 and code == 2, args
    assert time.process_time() - started < SECONDS, args


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run and a text, in the folder where the commands run."""
    place = tmp_path_factory.mktemp("flags")
    data = replace(gpt2_dataset(place / "data"), sources=(Source("a.txt", 1),), counts={"read": 1})
    data.save(place / "data")
    write_run(place / "run", data)
    (place / "text.txt").write_text("text\n" * 9)
    return place


NEEDED = {
    "train": (train, ["tiny"], flags_of(TrainConfig, GPTConfig)),
    "eval": (evaluate, ["run"], flags_of(evaluation.EvalConfig)),
    "prepare": (options, ["text.txt", "--out", "new"], flags_of(Options)),
    "info": (shards.main, ["info", "data"], ["--plot", "--json"]),
    "show": (shards.main, ["show", "data"], ["--split", "--document"]),
    "explain": (shards.main, ["explain", "--run", "run", "--step", "1"], ["--step", "--row"]),
    "report": (report.main, ["run"], ["--data", ""]),
    "verify_resume": (steps, [], ["--steps"]),
    "doctor": (examine, [], ["--data", "--log-dir"]),
}


@pytest.mark.parametrize("name", ["report", "doctor", "verify_resume"])
def test_a_flag_whose_value_argparse_drops_is_refused(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, first, (flag, *_) = NEEDED[name]
    args = [*first, f"{flag}=--"]
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["command", *args])
    with pytest.raises(SystemExit) as exit_:
        command(args)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: expected a value for {flag}, found '--'\n"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NEEDED)
def test_silly_values_end_in_one_line_at_once(
    name: str,
    count: int,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command, first, flags = NEEDED[name]
    monkeypatch.chdir(place)
    pairs = [(flag, value) for flag in flags for value in SILLY]
    for flag, value in random.Random(0).sample(pairs, min(count, len(pairs))):
        words = [f"{flag}={value}"] if flag else [value]
        refused_or_done(command, [*first, *words], monkeypatch, capsys)
