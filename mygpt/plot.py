"""Loss curves of one run or several as a picture, drawn from `log.txt`.

python -m mygpt.plot log/demo                writes log/demo/loss.png
python -m mygpt.plot log/one log/other       writes log/loss.png; elsewhere with --out FILE
"""

import sys

from shards.cli import end_on_interrupt, one_line_errors, require_values

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mygpt.log import History, read
from shards.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = "no picture: matplotlib is not installed, get it with pip install 'mygpt[plots]'"
_TRAIN, _VAL, _BASELINE = "#4C78A8", "#E45756", "#7F7F7F"


def draw(*folders: Path, out: Path | None = None) -> Path:
    """Draw one run, or several for comparison, and return the picture's path.

    By default that is RUN/loss.png, for several runs loss.png in the folder that holds them all.
    Raises ImportError if matplotlib is not installed, FileNotFoundError without a log and
    ValueError for a log without any loss.
    """
    # Figure and not pyplot, which looks for a display and keeps global state.
    from matplotlib.figure import Figure

    histories = {folder: read(folder) for folder in folders}
    for folder, history in histories.items():
        if not history.train and not history.val:
            raise ValueError(f"{folder / 'log.txt'} holds no loss yet: nothing to draw")
    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    if len(folders) == 1:
        axes.set_title(str(folders[0]))
        _draw_one(axes, histories[folders[0]])
    else:
        _draw_several(axes, histories)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = out or Path(os.path.commonpath(folders)) / "loss.png"
    with atomic_file(path, durable=False) as file:
        figure.savefig(file, format="png")
    return path


def _draw_one(axes: "Axes", history: History) -> None:
    steps, losses = list(history.train), list(history.train.values())
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=0.8)
    axes.plot(steps, smoothed(losses), color=_TRAIN, label="training, smoothed")
    if history.val:
        steps, losses = list(history.val), list(history.val.values())
        label = f"validation subset, ends at {losses[-1]:.2f}"
        axes.plot(steps, losses, ".-", color=_VAL, label=label)
    if history.unigram is not None:
        label = f"unigram baseline, {history.unigram:.2f}"
        axes.axhline(history.unigram, color=_BASELINE, linestyle="--", linewidth=1, label=label)


def _draw_several(axes: "Axes", histories: Mapping[Path, History]) -> None:
    """One colour per run: training as a faint line, validation as a line with dots."""
    for number, (folder, history) in enumerate(histories.items()):
        colour, losses = f"C{number}", list(history.train.values())
        axes.plot(list(history.train), smoothed(losses), color=colour, alpha=0.5, linewidth=1)
        val = list(history.val.values())
        label = f"{folder}, {val[-1]:.3f}" if val else str(folder)
        axes.plot(list(history.val), val, ".-", color=colour, label=label)
    axes.set_title("training, smoothed (faint), and validation subset (dots)", fontsize="medium")


def draw_or_explain(run: Path) -> str:
    """Draw a run's picture and return its path, or a line that says why there is none.

    Training must not fail for want of a picture.
    """
    try:
        return str(draw(run))
    except ImportError:
        return MISSING
    except OSError as error:
        return f"no picture: {error}"


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over a twentieth of the values, with a smaller radius at the start.

    It neither lags, as an exponential average does, nor blurs the steep beginning.
    """
    count = len(values)
    index = np.arange(count)
    radius = np.minimum(max(1, count // 40), index)
    low, high = index - radius, np.minimum(index + radius + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


@one_line_errors()
def main() -> int:
    """Draw the runs named on the command line."""
    parser = argparse.ArgumentParser(
        "python -m mygpt.plot", description="Draw the losses of runs into one picture."
    )
    runs = "folders of runs; by default the newest under log/"
    parser.add_argument("run", type=Path, nargs="*", default=[Path("log")], help=runs)
    parser.add_argument("--out", type=Path, help="the picture; else loss.png in the runs' folder")
    options = require_values(parser.parse_args())
    try:
        print(draw(*options.run, out=options.out))
    except ImportError:
        raise ValueError(MISSING) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
