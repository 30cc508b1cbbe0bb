"""Line charts as HTML: an inline SVG stretched to the page's width, with labels as text beside it.

So lines are sharp and labels readable at any width, on a phone as on a desk, without a script.
Colours, sizes and positions of labels are set in `report.css`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

import numpy as np

from mygpt.plot import smoothed

Series = Mapping[int, float]  # step → value
WIDTH, HEIGHT = 1000, 300  # of the drawing, in its own units
COLOURS = ("first", "second", "third", "fourth", "fifth", "sixth")  # classes of report.css
MAX_POINTS = 400  # a longer series is drawn as that many means, with the range around each


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    "smoothed": the moving average over the raw values in the background; "dots": a dot per value;
    "level": a horizontal line at the last value.
    """

    name: str
    colour: str  # one of `COLOURS`, or "quiet"
    values: Series
    style: Literal["plain", "smoothed", "dots", "level"] = "plain"


@dataclass(frozen=True)
class Axis:
    """Linear or logarithmic scale from `low` to `high`."""

    low: float
    high: float
    is_log: bool = False

    def fraction(self, value: float) -> float:
        """Position of a value on the axis, from 0 at `low` to 1 at `high`."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    is_log: bool = False,
    marks: Mapping[int, str] | None = None,
    per: str = "step",
) -> str:
    """A `<figure>` of lines over the steps of a run; `marks` are steps with a text for each.

    `per` names what the lines are over, if that is not a step.

    Values that are not finite, or on a logarithmic axis not above 0, are left out. If there are
    none, a sentence says so.
    """
    lines = [replace(line, values=_drawable(line.values, is_log)) for line in lines]
    lines = [line for line in lines if line.values]
    if not lines:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>Not in the log.</p></figure>"
    y = _axis([value for line in lines for value in line.values.values()], is_log)
    last = max(max(line.values) for line in lines if line.style != "level" or len(lines) == 1)
    x = Axis(0, max(last, 1))
    words = escape(_in_words(title, lines, per))
    drawn = "".join(part for line in lines for part in _drawing(line, x, y, per))
    drawn += "".join(_mark(x, step, text) for step, text in (marks or {}).items())
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
        f'<div class="plot">{_grid(x, y)}<svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="{words}">'
        f"{drawn}</svg></div>{_legend(lines, marks)}</figure>"
    )


def _drawable(values: Series, is_log: bool) -> Series:
    lowest = 0 if is_log else -math.inf
    return {step: value for step, value in values.items() if lowest < value < math.inf}


def _axis(values: Sequence[float], is_log: bool) -> Axis:
    """An axis that holds the values with a small margin."""
    low, high = min(values), max(values)
    if is_log:
        margin = max((high / low) ** 0.05, 1.02)
        return Axis(low / margin, high * margin, is_log=True)
    margin = (high - low or abs(high) or 1) * 0.06
    # Values that begin near 0 get an axis from 0: a small wobble should not look like a fall.
    return Axis(0 if 0 <= low < 0.6 * high else low - margin, high + margin)


def ticks(axis: Axis, count: int) -> list[float]:
    """About `count` round numbers on the axis."""
    if axis.is_log:
        found = _log_ticks(axis)
        if len(found) >= 3:
            return found[:: max(1, round(len(found) / (count + 1)))]
    step = _round_step((axis.high - axis.low) / count)
    first = math.ceil(axis.low / step)
    return [n * step for n in range(first, math.floor(axis.high / step) + 1)]


def _log_ticks(axis: Axis) -> list[float]:
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    leading = (1, 2, 3, 4, 5, 6, 8) if axis.high < 20 * axis.low else (1, 3)
    numbers = [lead * 10.0**power for power in powers for lead in leading]
    return [number for number in numbers if axis.low <= number <= axis.high]


def _round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, whichever is closest."""
    power = 10.0 ** math.floor(math.log10(rough))
    return min((1, 2, 5, 10), key=lambda lead: abs(math.log(lead * power / rough))) * power


def short(value: float) -> str:
    """A number in at most four digits: 20k, 1.5M, 0.003, 6e-05."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.3g}"


def _grid(x: Axis, y: Axis) -> str:
    """Grid lines with their labels, hidden from screen readers."""
    heights = {tick: f'style="bottom:{100 * y.fraction(tick):.2f}%"' for tick in ticks(y, 4)}
    rows = "".join(
        f'<span class="rule" {height}></span><span class="y" {height}>{short(tick)}</span>'
        for tick, height in heights.items()
    )
    columns = "".join(
        f'<span class="x" style="left:{100 * x.fraction(tick):.2f}%">{short(tick)}</span>'
        for tick in ticks(x, 4)
    )
    return f'<div class="grid" aria-hidden="true">{rows}{columns}</div>'


def _drawing(line: Line, x: Axis, y: Axis, per: str) -> Iterator[str]:
    """Yield the SVG elements of one line."""
    steps, values = list(line.values), list(line.values.values())

    def path(xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
        points = " ".join(f"{_x(x, a)},{_y(y, b)}" for a, b in zip(xs, ys, strict=True))
        return f'<polyline class="{line.colour} {kind}" points="{points}"/>'

    if line.style == "level":
        yield path([x.low, x.high], [values[-1]] * 2, "level")
        return
    if line.style == "smoothed":
        yield path(*_raw(steps, values), "raw")
        values = smoothed(values).tolist()
    yield path(*_thinned(steps, values, np.mean), "line")
    if line.style == "dots":
        for step, value in line.values.items():
            # A line of length 0 with round ends: a circle would be stretched with the drawing.
            point = f"{_x(x, step)} {_y(y, value)}"
            title = escape(f"{per} {step:,}: {value:.4f}")
            yield f'<path class="{line.colour} dot" d="M{point} l0 0"><title>{title}</title></path>'


def _raw(steps: list[int], values: list[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The values themselves; of a long series the lowest and highest of each stretch."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    xs, lowest = _thinned(steps, values, np.min)
    _, highest = _thinned(steps, values, np.max)
    return np.repeat(xs, 2).tolist(), np.stack([lowest, highest], axis=1).ravel().tolist()


def _thinned(
    steps: Sequence[float], values: Sequence[float], of: Callable[[np.ndarray], float]
) -> tuple[Sequence[float], Sequence[float]]:
    """At most `MAX_POINTS` of a series: the mean step and `of` the values of each stretch."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    middles = [float(part.mean()) for part in np.array_split(np.array(steps), MAX_POINTS)]
    return middles, [float(of(part)) for part in np.array_split(values, MAX_POINTS)]


def _x(x: Axis, step: float) -> str:
    return f"{WIDTH * x.fraction(step):.1f}"


def _y(y: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - y.fraction(value)):.1f}"


def _mark(x: Axis, step: int, text: str) -> str:
    title = f"<title>{escape(text)}</title>"
    return f'<path class="mark" d="M{_x(x, step)} 0 V{HEIGHT}">{title}</path>'


def _in_words(title: str, lines: Sequence[Line], per: str) -> str:
    """A description of the chart, for screen readers."""
    told = []
    for line in lines:
        values = list(line.values.values())
        if line.style == "level":
            told.append(f"{line.name}: {values[-1]:.4g}")
        else:
            told.append(
                f"{line.name}: from {values[0]:.4g} to {values[-1]:.4g} at {per} "
                f"{max(line.values):,}, lowest {min(values):.4g}"
            )
    return f"{title}. {'; '.join(told)}."


def _legend(lines: Sequence[Line], marks: Mapping[int, str] | None) -> str:
    items = [
        f'<li class="{line.colour} {line.style}">{escape(line.name)}</li>'
        for line in lines
        if len(lines) > 1 or marks
    ]
    if marks:
        items.append('<li class="mark">skipped step</li>')
    return f'<ul class="legend">{"".join(items)}</ul>' if items else ""
