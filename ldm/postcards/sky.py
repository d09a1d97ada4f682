"""The sky of a time of day and a weather: its gradient, sun, moon, stars, clouds, and what falls from it."""

import math
import random

from ldm.postcards.canvas import RGB, Pen, mix, rgb
from ldm.postcards.scene import Scene
from ldm.postcards.vocabulary import HORIZON

# From the top of the sky to the horizon.
_SKY = {
    "dawn": (rgb("b4b6ea"), rgb("f3cfe6"), rgb("d3f3e4")),
    "day": (rgb("3d9df0"), rgb("8accf7"), rgb("d8f1fc")),
    "sunset": (rgb("5b2f86"), rgb("ee5f5b"), rgb("ffb648")),
    "night": (rgb("141d56"), rgb("27367e"), rgb("4258a6")),
}
_GREY = {
    "dawn": rgb("b3afc6"),
    "day": rgb("9fafbe"),
    "sunset": rgb("8c6078"),
    "night": rgb("3a426c"),
}
# How much of the clear sky is lost, at the top; less at the horizon, where the time of day shows.
_OVERCAST = {"clear": 0.0, "cloudy": 0.65, "rain": 0.85, "snow": 0.75}
_CLOUD = {
    "dawn": rgb("fdf3f8"),
    "day": rgb("ffffff"),
    "sunset": rgb("ffb9a0"),
    "night": rgb("6f7db8"),
}
_RAIN_CLOUD = {
    "dawn": rgb("9c98b4"),
    "day": rgb("76859a"),
    "sunset": rgb("6a4566"),
    "night": rgb("4f5a8a"),
}
_RAIN_SKY = rgb("5d6b80")


def draw_sky(pen: Pen, scene: Scene, rng: random.Random) -> None:
    """The gradient, what shines in it, and the clouds."""
    horizon = HORIZON[scene.place]
    pen.gradient(0, horizon + 0.05, _sky_colours(scene))
    if scene.weather == "clear":
        _clear(pen, scene, rng)
        return
    colour = (_RAIN_CLOUD if scene.weather == "rain" else _CLOUD)[scene.time]
    if scene.weather == "snow":
        colour = mix(colour, _GREY[scene.time], 0.25)
    for k in range(5):
        x = (k + rng.uniform(0.2, 0.8)) / 5
        cloud(pen, x, rng.uniform(0.07, 0.13) + 0.1 * (k % 2), rng.uniform(0.15, 0.2), colour)


def _sky_colours(scene: Scene) -> list[RGB]:
    amount = _OVERCAST[scene.weather]
    grey = _GREY[scene.time]
    if scene.weather == "rain":
        grey = mix(grey, _RAIN_SKY, 0.5 if scene.time in ("dawn", "day") else 0.15)
    low = 0.9 if scene.weather == "snow" else 0.5  # the horizon must stand out from snow
    shares = (amount, 0.8 * amount, low * amount)
    return [mix(colour, grey, share) for colour, share in zip(_SKY[scene.time], shares, strict=True)]


def _clear(pen: Pen, scene: Scene, rng: random.Random) -> None:
    x, horizon = _free_x(scene, rng), HORIZON[scene.place]
    if scene.time == "night":
        _stars(pen, horizon, rng)
        pen.circle(x, 0.16, 0.13, rgb("fdf2c8"), 30)
        pen.crescent(x, 0.16, 0.085, rgb("fdf2c8"))
        return
    if scene.time == "day":
        pen.circle(x, 0.16, 0.13, rgb("fff3b0"), 90)
        pen.circle(x, 0.16, 0.085, rgb("ffdf4a"))
        if rng.random() < 0.5:
            cloud(pen, (x + 0.5) % 1, 0.16, 0.12, _CLOUD["day"])
        return
    halo, disc = ("fff8dc", "fffbe8") if scene.time == "dawn" else ("ffd36a", "ffcf3f")
    pen.circle(x, horizon - 0.06, 0.19, rgb(halo), 90)
    pen.circle(x, horizon - 0.06, 0.12, rgb(disc))


def _free_x(scene: Scene, rng: random.Random) -> float:
    """Where the sun or the moon is: of three tries the farthest from all things."""
    things = [box.x for group in scene.groups for box in group.boxes]
    tries = [rng.uniform(0.13, 0.87) for _ in range(3)]
    return max(tries, key=lambda x: min((abs(x - thing) for thing in things), default=0.0))


def _stars(pen: Pen, horizon: float, rng: random.Random) -> None:
    for k in range(12):
        x, y = (k + rng.uniform(0.15, 0.85)) / 12, rng.uniform(0.04, 0.85 * horizon)
        _star(pen, x, y, rng.uniform(0.018, 0.028))


def _star(pen: Pen, x: float, y: float, radius: float) -> None:
    """Four points."""
    points = []
    for k in range(8):
        reach = radius if k % 2 == 0 else 0.38 * radius
        points.append((x + reach * math.cos(k * math.pi / 4), y + reach * math.sin(k * math.pi / 4)))
    pen.polygon(points, rgb("fff6d5"))


def cloud(pen: Pen, x: float, y: float, size: float, colour: RGB) -> None:
    for dx, dy, radius in ((-0.5, 0.04, 0.28), (-0.1, -0.14, 0.42), (0.38, -0.04, 0.34), (0.68, 0.08, 0.22)):
        pen.circle(x + dx * size, y + dy * size, radius * size, colour)
    pen.rect(x - 0.78 * size, y + 0.02 * size, 1.68 * size, 0.3 * size, colour, 0.15 * size)


def draw_falling(pen: Pen, scene: Scene, rng: random.Random) -> None:
    """Streaks of rain or flakes of snow, spread evenly; nothing in other weathers."""
    if scene.weather == "rain":
        for x, y in _spread(6, 6, rng):
            pen.line((x, y), (x - 0.02, y + 0.075), 0.0085, rgb("e6f2fc"), 190)
    elif scene.weather == "snow":
        for x, y in _spread(5, 5, rng):
            pen.circle(x, y, rng.uniform(0.013, 0.019), rgb("ffffff"))


def _spread(columns: int, rows: int, rng: random.Random) -> list[tuple[float, float]]:
    """One random point in each cell of a grid."""
    cells = [(i, j) for i in range(columns) for j in range(rows)]
    return [((i + rng.random()) / columns, (j + rng.random()) / rows) for i, j in cells]
