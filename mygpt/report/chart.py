"""Line charts as HTML: an inline SVG stretched to the page's width, its labels as text beside it.

So a chart is as sharp and its labels are as readable on a phone as on a wide screen, and no script
is needed. Colours, sizes and places of labels are the style sheet's (`report.css`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from mygpt.plot import smoothed

Series = Mapping[int, float]  # step → value
WIDTH, HEIGHT = 1000, 300  # of the drawing, in units of its own
POINTS = 400  # a longer series is drawn as so many means, and the span around each


@dataclass(frozen=True)
class Line:
    """One series of a chart: `raw` in the background with its average before it, or with dots."""

    name: str
    colour: Literal["first", "second", "third", "quiet"]
    values: Series
    style: Literal["plain", "smoothed", "dots", "level"] = "plain"


@dataclass(frozen=True)
class Axis:
    """From values to heights: linear, or logarithmic where that suits what falls fast at first."""

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the lower end, 1 at the upper one."""
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
) -> str:
    """A `<figure>` of lines over the steps of a run; `marks` are steps with what happened there.

    Values that are not finite, and on a logarithmic axis those not above 0, are left out. Without
    any value a sentence says so.
    """
    lines = [_cleaned(line, is_log) for line in lines]
    lines = [line for line in lines if line.values]
    if not lines:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>Not in the log.</p></figure>"
    y = _axis([value for line in lines for value in line.values.values()], is_log)
    last = max(max(line.values) for line in lines if line.style != "level" or len(lines) == 1)
    x = Axis(0, max(last, 1))
    drawn = "".join(part for line in lines for part in _drawing(line, x, y))
    drawn += "".join(_mark(x.place(step), text) for step, text in (marks or {}).items())
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>"
        f'<div class="plot">{_grid(x, y)}<svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'preserveAspectRatio="none" role="img" aria-label="{escape(_summary(title, lines))}">'
        f"{drawn}</svg></div>{_legend(lines, marks)}</figure>"
    )


def _cleaned(line: Line, is_log: bool) -> Line:
    values = {
        step: value
        for step, value in line.values.items()
        if math.isfinite(value) and (value > 0 or not is_log)
    }
    return Line(line.name, line.colour, values, line.style)


def _axis(values: Sequence[float], is_log: bool) -> Axis:
    """An axis that holds the values with a little room."""
    low, high = min(values), max(values)
    if is_log:
        room = max((high / low) ** 0.05, 1.02)
        return Axis(low / room, high * room, is_log=True)
    room = (high - low or abs(high) or 1) * 0.06
    # What begins near 0 begins at 0: a small wobble then does not look like a fall.
    return Axis(0 if 0 <= low < 0.6 * high else low - room, high + room)


def ticks(axis: Axis, count: int) -> list[float]:
    """Round numbers inside the axis, about `count` of them."""
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
    """1, 2 or 5 times a power of ten, whichever comes closest."""
    power = 10.0 ** math.floor(math.log10(rough))
    return min((1, 2, 5, 10), key=lambda lead: abs(math.log(lead * power / rough))) * power


def short(value: float) -> str:
    """A number as an axis has it: 20k, 1.5M, 0.003, 6e-05."""
    size = abs(value)
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= factor:
            return f"{value / factor:.4g}{letter}"
    return f"{value:.3g}"


def _grid(x: Axis, y: Axis) -> str:
    """The lines behind the drawing, and the numbers beside it: all for the eye alone."""
    rows = "".join(
        f'<span class="y" style="bottom:{100 * y.place(tick):.2f}%">{short(tick)}</span>'
        for tick in ticks(y, 4)
    )
    columns = "".join(
        f'<span class="x" style="left:{100 * x.place(tick):.2f}%">{short(tick)}</span>'
        for tick in ticks(x, 4)
    )
    return f'<div class="grid" aria-hidden="true">{rows}{columns}</div>'


def _drawing(line: Line, x: Axis, y: Axis) -> Iterator[str]:
    """The elements of one line."""
    steps, values = list(line.values), list(line.values.values())

    def path(xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
        points = " ".join(f"{_x(x, a)},{_y(y, b)}" for a, b in zip(xs, ys, strict=True))
        return f'<polyline class="{line.colour} {kind}" points="{points}"/>'

    if line.style == "level":
        level = values[-1]
        yield path([x.low, x.high], [level, level], "level")
        return
    if line.style == "smoothed":
        yield from _background(steps, values, path)
        values = smoothed(values).tolist()
    yield path(*_thinned(steps, values, np.mean), "line")
    if line.style == "dots":
        for step, value in line.values.items():
            # A line of no length with round ends: a circle would be stretched with the drawing.
            at = f"{_x(x, step)} {_y(y, value)}"
            title = escape(f"step {step:,}: {value:.4f}")
            yield f'<path class="{line.colour} dot" d="M{at} l0 0"><title>{title}</title></path>'


def _background(
    steps: list[int],
    values: list[float],
    path: Callable[[Sequence[float], Sequence[float], str], str],
) -> Iterator[str]:
    """The values as they are; of a long series its lowest and highest ones, step by step."""
    if len(steps) <= POINTS:
        yield path(steps, values, "raw")
        return
    xs, lowest = _thinned(steps, values, np.min)
    _, highest = _thinned(steps, values, np.max)
    band = [value for pair in zip(lowest, highest, strict=True) for value in pair]
    yield path([at for at in xs for _ in range(2)], band, "raw")


def _thinned(
    steps: Sequence[float], values: Sequence[float], of: Callable[[np.ndarray], float]
) -> tuple[list[float], list[float]]:
    """At most `POINTS` of a series: the middle step and the value `of` each stretch of it."""
    if len(steps) <= POINTS:
        return list(steps), list(values)
    parts = zip(
        np.array_split(np.array(steps), POINTS), np.array_split(values, POINTS), strict=True
    )
    pairs = [(float(a.mean()), float(of(b))) for a, b in parts]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _x(x: Axis, step: float) -> str:
    return f"{WIDTH * x.place(step):.1f}"


def _y(y: Axis, value: float) -> str:
    return f"{HEIGHT * (1 - y.place(value)):.1f}"


def _mark(place: float, text: str) -> str:
    at = f"{WIDTH * place:.1f}"
    return f'<path class="mark" d="M{at} 0 V{HEIGHT}"><title>{escape(text)}</title></path>'


def _summary(title: str, lines: Sequence[Line]) -> str:
    """The chart in words, for those who do not see it."""
    told = []
    for line in lines:
        values = list(line.values.values())
        if line.style == "level":
            told.append(f"{line.name}: {values[-1]:.4g}")
        else:
            told.append(
                f"{line.name}: from {values[0]:.4g} to {values[-1]:.4g} at step "
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
