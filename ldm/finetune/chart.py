"""A curve over the steps of a run, as an SVG that inherits its text colour from the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]  # step, value

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 536, 10, 190  # of the area that values are drawn in
COLOUR = "#3b82f6"  # reads on white and on black


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

    drawn = [*_grid(across, up)]
    if dots:
        drawn.append(_line(spots(values), 'stroke-width="1" stroke-opacity="0.5"'))
        drawn += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3.5" fill="{COLOUR}"/>' for x, y in spots(values)]
    else:
        drawn.append(_line(spots(values), 'stroke-width="1" stroke-opacity="0.4"'))
        drawn.append(_line(spots(smooth(values)), 'stroke-width="2"'))
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = 'font-family="sans-serif" font-size="12"'
    return f'<svg {box} {font} role="img" aria-label="{label}">{"".join(drawn)}</svg>'


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


def value_axis(values: Sequence[float]) -> Axis:
    """From tick to tick around the values; logarithmic where the highest is over 30 times the lowest."""
    low, high = min(values), max(values)
    if 0 < low < high / 30:
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


def _x(across: Axis, step: float) -> float:
    return LEFT + (RIGHT - LEFT) * across.place(step)


def _y(up: Axis, value: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * up.place(value)


def _line(spots: Sequence[Point], style: str) -> str:
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in spots)
    return f'<polyline points="{points}" fill="none" stroke="{COLOUR}" {style}/>'


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    """Both axes with their numbers, and a line at each value's."""
    for tick in up.ticks:
        y = _y(up, tick)
        yield f'<path d="M{LEFT},{y:.2f}H{RIGHT}" stroke="currentColor" stroke-opacity="0.2"/>'
        yield _text(LEFT - 6, y + 4, "end", f"{tick:.10g}")
    for tick in across.ticks:
        x = _x(across, tick)
        yield f'<path d="M{x:.2f},{BOTTOM}v4" stroke="currentColor" stroke-opacity="0.5"/>'
        yield _text(x, BOTTOM + 18, "middle", f"{tick:.10g}")
    yield _text((LEFT + RIGHT) / 2, BOTTOM + 36, "middle", "step")


def _text(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" fill="currentColor">{text}</text>'
