"""TensorBoard's own reader finds the figures again; W&B gets them offline; neither is needed."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mygpt import log, trackers
from mygpt.settings import TrainConfig
from tests.training import refused, start

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_shows_what_the_log_says_of_a_run_that_was_stopped(
    data: Path, tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    start(data, tmp_path, "--tensorboard", "--stop-at", "7")
    start(data, tmp_path, "--tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()

    def series(name: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(name)}

    history = log.read(tmp_path)
    assert series("loss") == pytest.approx(history.train, rel=1e-6)
    assert series("norm") == pytest.approx(history.series["norm"], abs=1e-4)
    assert series("lr") == pytest.approx(history.series["lr"], rel=1e-3)
    assert series("val_loss") == pytest.approx(history.val, rel=1e-6)
    assert set(events.Tags()["scalars"]) > {"ms", "tokens_per_second", "waiting"}


class Session:
    """A stand-in for W&B's run."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked, self.logged, self.metrics = asked, [], []  # type: ignore[var-annotated]

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.asked["ended"] = True

    def define_metric(self, *names: str, **options: str) -> None:
        self.metrics.append((names, options))

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)


def test_wandb_is_given_one_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions: list[Session] = []

    class Module:
        @staticmethod
        def init(**asked: Any) -> Session:
            sessions.append(Session(asked))
            return sessions[-1]

    monkeypatch.setitem(sys.modules, "wandb", Module)
    config = TrainConfig(wandb="project", log_dir=tmp_path / "log" / "name")
    config.log_dir.mkdir(parents=True)
    for step in (3, 2):  # of which one is trained again
        with trackers.open_trackers(config, step, enabled=True) as track:
            track(step, {"loss": 4.0})
    with trackers.open_trackers(config, 0, enabled=False) as track:
        track(1, {"loss": 4.0})
    assert len(sessions) == 2
    for step, session in zip((3, 2), sessions, strict=True):
        assert session.logged == [{"step": step, "loss": 4.0}]
        assert session.metrics == [(("*",), {"step_metric": "step"})]
        assert (session.asked["project"], session.asked["name"]) == ("project", "name")
        assert session.asked["resume"] == "allow"
        assert session.asked["ended"]
        assert json.loads(json.dumps(session.asked["config"]))["wandb"] == "project"
    assert sessions[0].asked["id"] == sessions[1].asked["id"] != ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of W&B's own imports
def test_wandb_takes_what_it_is_given(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert start(data, tmp_path, "--wandb", "mine", "--stop-at", "2") == 0
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    os.environ.pop("WANDB_SERVICE", None)


def test_what_is_not_installed_is_asked_for_in_one_line(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    for flags, name in [(["--tensorboard"], "tensorboard"), (["--wandb", "x"], "wandb")]:
        refused(data, tmp_path / "run", *flags)
        expected = f"error: --{name} needs {name}: get it with pip install 'mygpt[{name}]'\n"
        assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()
    trackers.check(TrainConfig())
