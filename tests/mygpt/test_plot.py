"""The picture is drawn from the log, and its absence is explained."""

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


def test_a_png_is_drawn(run: Path) -> None:
    assert plot.draw_or_explain(run) == str(run / "loss.png")
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


def test_without_matplotlib_a_line_says_how_to_get_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.draw_or_explain(run) == plot.MISSING


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
