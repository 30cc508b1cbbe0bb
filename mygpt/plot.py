"""The picture of a run, or of several: losses over their steps, drawn from `log.txt`.

python -m mygpt.plot log/demo                writes log/demo/loss.png
python -m mygpt.plot log/one log/other       writes log/loss.png; elsewhere with --out FILE
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mygpt.log import History, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "no picture: matplotlib is not installed, get it with pip install 'mygpt[plots]'"
_TRAIN, _VAL, _BASELINE = "#4C78A8", "#E45756", "#7F7F7F"


def draw(*folders: Path, out: Path | None = None) -> Path:
    """Draw one run, or several beside each other, and return where the picture lies.

    That is RUN/loss.png, of several runs loss.png in the folder that holds them all, unless `out`
    says otherwise. ImportError if matplotlib is not installed; FileNotFoundError without a log
    and ValueError for one without any loss.
    """
    # The object interface: pyplot would look for a display and hold state between calls.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    histories = {folder: read(folder) for folder in folders}
    for folder, history in histories.items():
        if not history.train and not history.val:
            raise ValueError(f"{folder / 'log.txt'} holds no loss yet: nothing to draw")
    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats a token)")
    if len(folders) == 1:
        axes.set_title(str(folders[0]))
        _draw_one(axes, histories[folders[0]])
    else:
        _draw_several(axes, histories)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, out or Path(os.path.commonpath(folders)) / "loss.png")


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
    """A colour a run: training as a faint line, validation as one with dots."""
    for number, (folder, history) in enumerate(histories.items()):
        colour, losses = f"C{number}", list(history.train.values())
        axes.plot(list(history.train), smoothed(losses), color=colour, alpha=0.5, linewidth=1)
        val = list(history.val.values())
        label = f"{folder}, {val[-1]:.3f}" if val else str(folder)
        axes.plot(list(history.val), val, ".-", color=colour, label=label)
    axes.set_title("training, smoothed (faint), and validation subset (dots)", fontsize="medium")


def draw_or_explain(run: Path) -> str:
    """Draw the picture if it can be drawn; its path, or a line on why there is none.

    A training must not end for want of a picture.
    """
    try:
        return str(draw(run))
    except ImportError:
        return MISSING
    except OSError as error:
        return f"no picture: {error}"


def smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean of a twentieth of the values around each; near the start of as many as precede it.

    So it neither lags, as an average of what came before does, nor blurs the steep beginning.
    """
    count = len(values)
    at = np.arange(count)
    radius = np.minimum(max(1, count // 40), at)
    low, high = at - radius, np.minimum(at + radius + 1, count)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[high] - sums[low]) / (high - low)


def _save(figure: "Figure", path: Path) -> Path:
    # A viewer that watches the file never sees half a picture.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def main() -> int:
    """Draw the runs named on the command line."""
    parser = argparse.ArgumentParser(description="Draw the losses of runs into one picture.")
    parser.add_argument("run", type=Path, nargs="*", default=[Path("log")])
    parser.add_argument("--out", type=Path, help="the picture; else loss.png in the runs' folder")
    asked = parser.parse_args()
    try:
        print(draw(*asked.run, out=asked.out))
    except ImportError:
        parser.exit(2, f"error: {MISSING}\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
