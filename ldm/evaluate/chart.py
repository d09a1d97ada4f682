"""Charts as SVG that inherits its text colour from the page: curves over steps, histograms, shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 536, 10, 190  # of the area that values are drawn in
NAMES, ROW = 276, 24  # of bars: where they begin, to the right of their names; their height
MOST_BINS = 30
COLOURS = ("#3b82f6", "#d97706", "#059669", "#c026d3")  # read on white and on black
COLOUR = COLOURS[0]


def chart(points: Sequence[Point], dots: bool, label: str) -> str:
    """Values over steps: a dot for each, or faint ones under their moving average.

    Args:
        points: finite, at least one.
        label: HTML, for those who cannot see the picture.
    """
    steps, values = [step for step, _ in points], [value for _, value in points]
    across, up = step_axis(steps), value_axis(values)

    def spots(values: Sequence[float]) -> list[Point]:
        return [(_x(across, step), _y(up, value)) for step, value in zip(steps, values, strict=True)]

    drawn = [*_grid(across, up, "step")]
    if dots:
        drawn.append(_line(spots(values), 'stroke-width="1" stroke-opacity="0.5"'))
        drawn += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3.5" fill="{COLOUR}"/>' for x, y in spots(values)]
    else:
        drawn.append(_line(spots(values), 'stroke-width="1" stroke-opacity="0.4"'))
        drawn.append(_line(spots(smooth(values)), 'stroke-width="2"'))
    return _svg(drawn, label)


def curves(series: Mapping[str, Sequence[Point]], along: str, label: str) -> str:
    """A line with dots for each name, up to four; either axis is logarithmic where its values are far apart.

    Args:
        series: finite, each with at least one; its names: HTML.
        along: HTML, what the first number of a point is.
        label: HTML, for those who cannot see the picture.
    """
    points = [point for line in series.values() for point in line]
    across, up = value_axis([x for x, _ in points]), value_axis([y for _, y in points])
    drawn = [*_grid(across, up, along)]
    for k, (name, line) in enumerate(series.items()):
        colour = COLOURS[k]
        spots = [(_x(across, x), _y(up, y)) for x, y in line]
        drawn.append(_line(spots, 'stroke-width="2"', colour))
        drawn += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3.5" fill="{colour}"/>' for x, y in spots]
        drawn.append(_text(LEFT + 8, TOP + 14 * (k + 1), "start", name, colour))
    return _svg(drawn, label)


def smooth(values: Sequence[float]) -> list[float]:
    """An exponential moving average over about a tenth of the values; up to 10 are left as they are.

    m_n = b m_(n-1) + (1 - b) v_n, shown as m_n / (1 - b^n), so that the weights add up to 1 from the first
    value on (Kingma & Ba 2015, section 3); b = 1 - 2 / (w + 1) for w values.
    """
    decay = 1 - 2 / (max(len(values) / 10, 1) + 1)
    total, averages = 0.0, []
    for n, value in enumerate(values, 1):
        total = decay * total + (1 - decay) * value
        averages.append(total / (1 - decay**n))
    return averages


def histogram(values: Sequence[float], along: str, label: str) -> str:
    """How many values lie in each of up to 30 bins between round numbers, and a line at their mean.

    Args:
        values: finite, at least one.
        along: HTML, what the values are.
        label: HTML, for those who cannot see the picture.
    """
    axis = value_axis(values, log=False)
    bins = min(MOST_BINS, max(5, round(len(values) ** 0.5)))
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int(axis.place(value) * bins))] += 1
    most = round_ticks(0, max(counts), least=1)
    up, wide = Axis(0, most[-1], most), (RIGHT - LEFT) / bins
    drawn = [*_grid(axis, up, along)]
    for k, count in enumerate(counts):
        y = _y(up, count)
        drawn.append(_box(LEFT + k * wide, y, wide - 1, BOTTOM - y))
    mean = _x(axis, sum(values) / len(values))
    drawn.append(f'<path d="M{mean:.2f},{TOP}V{BOTTOM}" stroke="currentColor" stroke-dasharray="4 3"/>')
    return _svg(drawn, label)


@dataclass(frozen=True)
class Bar:
    """A share with its interval, all in 0..1, or a ratio. name: HTML."""

    name: str
    value: float
    low: float
    high: float


def shares(bars: Sequence[Bar], label: str) -> str:
    """A horizontal bar from 0 to 1 for each, with a whisker for its interval. label: HTML."""
    return _bars(bars, Axis(0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)), label)


def ratios(bars: Sequence[Bar], label: str) -> str:
    """The same of numbers from 0 up, with a line where they are equal to 1."""
    axis = value_axis([0, 1, *(bar.high for bar in bars)], log=False)
    return _bars(bars, axis, label, marked=1)


def _bars(bars: Sequence[Bar], axis: Axis, label: str, marked: float | None = None) -> str:
    bottom = TOP + ROW * len(bars)
    drawn = []
    for tick in axis.ticks:
        x = _x(axis, tick, NAMES)
        drawn.append(f'<path d="M{x:.2f},{TOP}V{bottom}" stroke="currentColor" stroke-opacity="0.2"/>')
        drawn.append(_text(x, bottom + 18, "middle", f"{tick:.10g}"))
    for k, bar in enumerate(bars):
        y = TOP + ROW * (k + 0.5)
        low, value, high = (_x(axis, x, NAMES) for x in (bar.low, bar.value, bar.high))
        drawn.append(_text(NAMES - 8, y + 4, "end", bar.name))
        drawn.append(_box(NAMES, y - 7, value - NAMES, 14))
        drawn.append(f'<path d="M{low:.2f},{y}H{high:.2f}" stroke="currentColor" stroke-width="2"/>')
    if marked is not None:
        drawn.append(f'<path d="M{_x(axis, marked, NAMES):.2f},{TOP}V{bottom}" stroke="currentColor"/>')
    return _svg(drawn, label, bottom + 28)


# --- axes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A range of values, and the round numbers that are written beside it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        ends = self.low, self.high, value
        low, high, value = map(math.log, ends) if self.log else ends
        return (value - low) / (high - low)


def step_axis(steps: Sequence[float]) -> Axis:
    """From 0, so that the curves of a run lie one above the other."""
    last = max(*steps, 1)
    return Axis(0, last, tuple(tick for tick in round_ticks(0, last, least=1) if tick <= last))


def value_axis(values: Sequence[float], log: bool = True) -> Axis:
    """From tick to tick around the values; logarithmic where the highest is over 30 times the lowest."""
    low, high = min(values), max(values)
    if log and 0 < low < high / 30:
        return _log_axis(low, high)
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest:
        low, high = low - (largest or 1) / 2, high + (largest or 1) / 2
    ticks = round_ticks(low, high)
    return Axis(ticks[0], ticks[-1], ticks)


def round_ticks(low: float, high: float, least: float = 0.0) -> tuple[float, ...]:
    """From `low` or just below to `high` or just above, about five, 1, 2 or 5 times a power of ten apart."""
    apart = max((high - low) / 5, least)
    power = 10.0 ** math.floor(math.log10(apart))
    unit = next(m * power for m in (1, 2, 5, 10) if m * power > 0.999 * apart)
    return tuple(k * unit for k in range(math.floor(low / unit), math.ceil(high / unit) + 1))


def _log_axis(low: float, high: float) -> Axis:
    """Ticks at 1, 2 and 5 times powers of ten, or where those are many, at some of the powers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in exponents for m in (1, 2, 5)]
    below, above = max(tick for tick in ticks if tick <= low), min(tick for tick in ticks if tick >= high)
    if sum(below <= tick <= above for tick in ticks) > 7:
        ticks = [10.0**e for e in exponents[:: 1 + len(exponents) // 8]]
    return Axis(below, above, tuple(tick for tick in ticks if below <= tick <= above), log=True)


# --- drawing ---------------------------------------------------------------------------------------------


def _svg(drawn: Sequence[str], label: str, height: float = HEIGHT) -> str:
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"'
    font = 'font-family="sans-serif" font-size="12"'
    return f'<svg {box} {font} role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def _x(across: Axis, value: float, left: float = LEFT) -> float:
    return left + (RIGHT - left) * across.place(value)


def _y(up: Axis, value: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * up.place(value)


def _line(spots: Sequence[Point], style: str, colour: str = COLOUR) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in spots)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>'


def _box(x: float, y: float, width: float, height: float) -> str:
    size = f'width="{max(width, 0):.2f}" height="{max(height, 0):.2f}"'
    return f'<rect x="{x:.2f}" y="{y:.2f}" {size} fill="{COLOUR}" fill-opacity="0.7"/>'


def _grid(across: Axis, up: Axis, along: str) -> Iterator[str]:
    """Both axes with their numbers, and a line at each value's."""
    for tick in up.ticks:
        y = _y(up, tick)
        yield f'<path d="M{LEFT},{y:.2f}H{RIGHT}" stroke="currentColor" stroke-opacity="0.2"/>'
        yield _text(LEFT - 6, y + 4, "end", f"{tick:.10g}")
    for tick in across.ticks:
        x = _x(across, tick)
        yield f'<path d="M{x:.2f},{BOTTOM}v4" stroke="currentColor" stroke-opacity="0.5"/>'
        yield _text(x, BOTTOM + 18, "middle", f"{tick:.10g}")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 36, "middle", along)


def _text(x: float, y: float, anchor: str, text: str, colour: str = "currentColor") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
