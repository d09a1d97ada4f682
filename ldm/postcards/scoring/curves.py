"""Curves over timesteps as a picture, both axes told; the values on a logarithmic one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 90, 880, 20, 360  # of the area that values are drawn in
COLOURS = ("#2563eb", "#d97706", "#059669")
SCALE = 2  # drawn larger, then made smaller: smooth lines


def draw_curves(
    timesteps: Sequence[float], curves: Mapping[str, Sequence[float]], path: Path, label: str = "bits/dim"
) -> None:
    """Write a WebP of curves of positive values, by name, over the same timesteps."""
    values = [value for curve in curves.values() for value in curve]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(timesteps)

    def at(t: float, value: float) -> tuple[float, float]:
        up = (math.log10(value) - low) / (high - low)
        return SCALE * (LEFT + (RIGHT - LEFT) * t / last), SCALE * (BOTTOM - (BOTTOM - TOP) * up)

    sheet = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), "white")
    pen = ImageDraw.Draw(sheet)

    def write(x: float, y: float, text: str, anchor: str, colour: str = "#333333") -> None:
        pen.text((SCALE * x, SCALE * y), text, fill=colour, anchor=anchor, font_size=SCALE * 15)

    for power in range(low, high + 1):
        (_, y), (end, _) = at(0, 10.0**power), at(last, 1)
        pen.line([(SCALE * LEFT, y), (end, y)], fill="#dddddd", width=SCALE)
        write(LEFT - 8, y / SCALE, f"1e{power}", "rm")
    for t in range(0, int(last) + 1, 100):
        x, _ = at(t, 1)
        write(x / SCALE, BOTTOM + 8, str(t), "mt")
    write((LEFT + RIGHT) / 2, BOTTOM + 32, "timestep", "mt")
    write(LEFT + 6, TOP, f"{label} of each timestep's step", "lt")
    for k, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[k % len(COLOURS)]
        pen.line([at(*point) for point in zip(timesteps, curve, strict=True)], fill=colour, width=2 * SCALE)
        write(RIGHT - 10, TOP + 4 + 22 * k, name, "rt", colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(path, quality=85, method=6)
