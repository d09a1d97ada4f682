"""A thin layer over skia: flat shapes in unit coordinates (y down), every colour passed through a tint."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import skia

RGB = tuple[float, float, float]
Tint = Callable[[RGB], RGB]
Point = tuple[float, float]

WHITE: RGB = (255, 255, 255)
_SMOOTH = skia.SamplingOptions(skia.FilterMode.kLinear, skia.MipmapMode.kLinear)


def rgb(text: str) -> RGB:
    """The colour of six hexadecimal digits."""
    return (int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16))


def mix(a: RGB, b: RGB, amount: float) -> RGB:
    """a + amount (b - a), per channel."""
    return (a[0] + amount * (b[0] - a[0]), a[1] + amount * (b[1] - a[1]), a[2] + amount * (b[2] - a[2]))


def darker(colour: RGB, by: float = 0.18) -> RGB:
    return mix(colour, (20, 16, 40), by)


def lighter(colour: RGB, by: float = 0.3) -> RGB:
    return mix(colour, WHITE, by)


def multiply(factor: RGB) -> Tint:
    """The tint that multiplies each channel."""
    return lambda c: (c[0] * factor[0], c[1] * factor[1], c[2] * factor[2])


def plain(colour: RGB) -> RGB:
    """The tint that changes nothing."""
    return colour


class Pen:
    """Draws on one skia canvas whose unit is the picture's size."""

    def __init__(self, canvas: Any, tint: Tint = plain) -> None:
        self._canvas = canvas
        self._tint = tint

    def with_tint(self, tint: Tint) -> "Pen":
        """Another pen on the same canvas."""
        return Pen(self._canvas, tint)

    @contextmanager
    def at(self, x: float, y: float, scale: float) -> Iterator[None]:
        """Within, (0, 0) is at (x, y) and the unit is `scale`."""
        self._canvas.save()
        self._canvas.translate(x, y)
        self._canvas.scale(scale, scale)
        yield
        self._canvas.restore()

    def rect(self, x: float, y: float, width: float, height: float, colour: RGB, radius: float = 0) -> None:
        """A rectangle from its upper left corner, its corners rounded."""
        box = skia.Rect.MakeXYWH(x, y, width, height)
        self._canvas.drawRoundRect(box, radius, radius, self._fill(colour))

    def circle(self, x: float, y: float, radius: float, colour: RGB, alpha: int = 255) -> None:
        self._canvas.drawCircle(x, y, radius, self._fill(colour, alpha))

    def oval(self, x: float, y: float, rx: float, ry: float, colour: RGB, alpha: int = 255) -> None:
        self._canvas.drawOval(_around(x, y, rx, ry), self._fill(colour, alpha))

    def soft_oval(
        self, x: float, y: float, rx: float, ry: float, colour: RGB, alpha: int, blur: float
    ) -> None:
        """An oval whose edge fades by a Gaussian of standard deviation `blur`."""
        paint = self._fill(colour, alpha)
        paint.setMaskFilter(skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, blur))
        self._canvas.drawOval(_around(x, y, rx, ry), paint)

    def dome(self, x: float, y: float, rx: float, ry: float, colour: RGB) -> None:
        """The upper half of an oval."""
        self._canvas.drawArc(_around(x, y, rx, ry), 180, 180, False, self._fill(colour))

    def polygon(self, points: Sequence[Point], colour: RGB) -> None:
        path = skia.Path.Polygon([skia.Point(*point) for point in points], True)
        self._canvas.drawPath(path, self._fill(colour))

    def line(self, start: Point, end: Point, width: float, colour: RGB, alpha: int = 255) -> None:
        """A line with round ends."""
        self._canvas.drawLine(*start, *end, self._stroke(colour, width, alpha))

    def arc(self, centre: Point, radius: float, angles: Point, width: float, colour: RGB) -> None:
        """A part of a circle, from a first angle through a second, in degrees clockwise from the right."""
        box = _around(*centre, radius, radius)
        self._canvas.drawArc(box, angles[0], angles[1], False, self._stroke(colour, width))

    def crescent(self, x: float, y: float, radius: float, colour: RGB) -> None:
        """A circle less a smaller one to its upper right."""
        bite = skia.Path.Circle(x + 0.5 * radius, y - 0.3 * radius, 0.85 * radius)
        moon = skia.Op(skia.Path.Circle(x, y, radius), bite, skia.PathOp.kDifference_PathOp)
        self._canvas.drawPath(moon, self._fill(colour))

    def gradient(self, top: float, bottom: float, colours: Sequence[RGB]) -> None:
        """A strip over the whole width that blends evenly from the first colour to the last."""
        shader = skia.GradientShader.MakeLinear(
            points=[(0, top), (0, bottom)], colors=[self._colour(colour) for colour in colours]
        )
        self._canvas.drawRect(skia.Rect.MakeLTRB(0, top, 1, bottom), skia.Paint(Shader=shader))

    def image(
        self, image: Any, start: Point, end: Point, *, mirrored: bool = False, light: RGB = (1, 1, 1)
    ) -> None:
        """A skia image between an upper left and a lower right corner, its channels multiplied by `light`."""
        paint = skia.Paint(AntiAlias=True)
        if light != (1, 1, 1):
            colour = skia.Color(*(round(255 * each) for each in light))
            paint.setColorFilter(skia.ColorFilters.Blend(colour, skia.BlendMode.kModulate))
        self._canvas.save()
        if mirrored:
            self._canvas.translate(start[0] + end[0], 0)
            self._canvas.scale(-1, 1)
        whole, room = skia.Rect.MakeWH(image.width(), image.height()), skia.Rect.MakeLTRB(*start, *end)
        self._canvas.drawImageRect(image, whole, room, _SMOOTH, paint)
        self._canvas.restore()

    def _colour(self, colour: RGB, alpha: int = 255) -> Any:
        return skia.Color(*(max(0, min(255, round(c))) for c in self._tint(colour)), alpha)

    def _fill(self, colour: RGB, alpha: int = 255) -> Any:
        return skia.Paint(AntiAlias=True, Color=self._colour(colour, alpha))

    def _stroke(self, colour: RGB, width: float, alpha: int = 255) -> Any:
        return skia.Paint(
            AntiAlias=True,
            Color=self._colour(colour, alpha),
            Style=skia.Paint.kStroke_Style,
            StrokeWidth=width,
            StrokeCap=skia.Paint.kRound_Cap,
        )


class Sheet:
    """A square of pixels, black at first, and the pen that draws on it."""

    def __init__(self, size: int) -> None:
        self._surface = skia.Surface(size, size)
        canvas = self._surface.getCanvas()
        canvas.clear(skia.ColorBLACK)
        canvas.scale(size, size)
        self.pen = Pen(canvas)

    def pixels(self) -> npt.NDArray[np.uint8]:
        """[size, size, 3], red green blue."""
        rgba: npt.NDArray[np.uint8] = self._surface.toarray(colorType=skia.kRGBA_8888_ColorType)
        return np.ascontiguousarray(rgba[..., :3])


def _around(x: float, y: float, rx: float, ry: float) -> Any:
    return skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry)
