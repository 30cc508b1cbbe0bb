"""The picture is drawn from the log, by the command too, and its absence is explained."""

import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from mygpt import plot
from mygpt.log import RunLog, step_line, val_line

RATES = {"lr": 3e-3, "norm": 0.7, "ms": 250.0, "tokens_per_second": 2048.0}
ETA = timedelta(seconds=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = RunLog(tmp_path)
    log.write("baseline unigram 4.8 uniform 10.8")
    for step in range(1, 60):
        log.write(step_line(step, 60, {"loss": 11 - step / 10, **RATES}, ETA))
        if step % 20 == 0:
            log.write(val_line(step, 60, 11 - step / 11, 64))
    return tmp_path


def test_the_command_draws_a_png(run: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "mygpt.plot", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(run / "loss.png")
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in run.iterdir()) == ["log.txt", "loss.png"]


def test_what_is_drawn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[str, list[float]] = {}
    original = Axes.plot

    def spy(self: Axes, *args: list[float], **keywords: str) -> object:
        drawn[str(keywords.get("label", "raw"))] = args[1]
        return original(self, *args, **keywords)

    monkeypatch.setattr(Axes, "plot", spy)
    plot.draw(run)
    assert drawn["raw"] == pytest.approx([11 - step / 10 for step in range(1, 60)])
    assert drawn["validation subset, ends at 7.36"][0] == pytest.approx(11 - 20 / 11)


def test_several_runs_make_one_picture(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.axes import Axes

    runs = [tmp_path / "log" / name for name in ("one", "other", "begun")]
    for folder in runs:
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("log"))
    (runs[2] / "log.txt").write_text(step_line(1, 60, {"loss": 11, **RATES}, ETA) + "\n")
    labels: list[str] = []
    original = Axes.plot

    def spy(self: Axes, *args: list[float], **keywords: str) -> object:
        labels.append(str(keywords.get("label", "training")))
        return original(self, *args, **keywords)

    monkeypatch.setattr(Axes, "plot", spy)
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, runs)])
    assert plot.main() == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "log" / "loss.png")
    ends = [f"{runs[0]}, 7.364", f"{runs[1]}, 7.364", str(runs[2])]
    assert labels == [label for end in ends for label in ("training", end)]
    assert plot.draw(*runs, out=tmp_path / "other.png") == tmp_path / "other.png"
    assert not (runs[0] / "loss.png").exists()


def test_without_matplotlib_a_line_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["plot", str(run)])
    with pytest.raises(SystemExit) as exit_:
        plot.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"error: {plot.MISSING}\n"


def test_a_log_without_losses_is_refused_but_one_loss_is_enough(tmp_path: Path) -> None:
    RunLog(tmp_path).write("start 0/10")
    with pytest.raises(ValueError, match="no loss yet"):
        plot.draw(tmp_path)
    RunLog(tmp_path).write(val_line(1, 10, 9.5, 64))
    plot.draw(tmp_path)


def test_the_average_neither_lags_nor_blurs_the_start() -> None:
    line = [float(value) for value in range(100)]
    assert plot.smoothed(line)[:98] == pytest.approx(line[:98])
    assert plot.smoothed([5.0]) == pytest.approx([5.0])
    assert plot.smoothed([9.0, *[1.0, 3.0] * 100])[0] == 9.0
    assert plot.smoothed([1.0, 3.0] * 100)[20:180] == pytest.approx(2.0, abs=0.15)
