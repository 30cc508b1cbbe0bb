"""Loss curve of a run, drawn from its `log.txt` after every validation: `RUN/loss.png`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mygpt.log import read
from shards.files import atomic_file

MISSING = "no picture: matplotlib is not installed, get it with pip install 'mygpt[plots]'"
_TRAIN, _VAL, _BASELINE = "#4C78A8", "#E45756", "#7F7F7F"


def draw(run_dir: Path) -> Path:
    """Draw `RUN/loss.png` and return its path.

    Raises ImportError if matplotlib is not installed, FileNotFoundError without a log and
    ValueError for a log without any loss.
    """
    # Figure and not pyplot, which looks for a display and keeps global state.
    from matplotlib.figure import Figure

    history = read(run_dir)
    if not history.train and not history.val:
        raise ValueError(f"{run_dir / 'log.txt'} holds no loss yet: nothing to draw")
    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.add_subplot(title=str(run_dir), xlabel="step", ylabel="loss (nats per token)")
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
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = run_dir / "loss.png"
    with atomic_file(path, durable=False) as file:
        figure.savefig(file, format="png")
    return path


def draw_or_explain(run_dir: Path) -> str:
    """Draw a run's picture and return its path, or a line that says why there is none.

    Training must not fail for want of a picture.
    """
    try:
        return str(draw(run_dir))
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
