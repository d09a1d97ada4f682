"""What the postcard world is made of: things, colours, places, times, weathers; and the hold-out rule."""

from dataclasses import dataclass

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PLACES = ("sea", "beach", "meadow", "mountains", "forest", "desert", "city")
TIMES = ("dawn", "day", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow")
RELATIONS = ("left of", "above")


@dataclass(frozen=True)
class Shape:
    """Where a kind of thing lives and the room it takes.

    `half_width` is in units of the thing's height; `shortest` and `tallest` bound the height of a single
    thing, as a fraction of the picture.
    """

    realm: str  # "ground", "water" or "air"
    half_width: float
    shortest: float = 0.42
    tallest: float = 0.58


SHAPES = {
    "house": Shape("ground", 0.50),
    "castle": Shape("ground", 0.48, 0.46, 0.64),
    "car": Shape("ground", 0.66, 0.38, 0.50),
    "tree": Shape("ground", 0.38, 0.46, 0.62),
    "flower": Shape("ground", 0.35),
    "mushroom": Shape("ground", 0.50, 0.40, 0.54),
    "cat": Shape("ground", 0.45),
    "snowman": Shape("ground", 0.34, 0.46, 0.62),
    "lighthouse": Shape("ground", 0.25, 0.54, 0.66),
    "tent": Shape("ground", 0.55, 0.38, 0.52),
    "sailboat": Shape("water", 0.50),
    "duck": Shape("water", 0.53, 0.38, 0.52),
    "balloon": Shape("air", 0.39, 0.46, 0.64),
    "rocket": Shape("air", 0.30, 0.50, 0.66),
}
KINDS = tuple(SHAPES)

# Where the sky ends, from the top.
HORIZON = {
    "sea": 0.54,
    "beach": 0.42,
    "meadow": 0.62,
    "mountains": 0.64,
    "forest": 0.68,
    "desert": 0.64,
    "city": 0.72,
}
SHORE = 0.70  # where the sand of the beach begins

# Of 14 kinds each loses one of 8 colours; 3 and 8 share no divisor, so every colour is lost once or twice.
_HELD_OUT = {kind: COLOURS[(3 * i + 5) % len(COLOURS)] for i, kind in enumerate(KINDS)}


def held_out_colour(kind: str) -> str:
    """The one colour in which this kind is never shown in training."""
    return _HELD_OUT[kind]


def is_held_out(kind: str, colour: str) -> bool:
    """Whether the pair is kept out of training, to measure how kinds and colours compose."""
    return _HELD_OUT[kind] == colour


def thing_number(kind: str, colour: str) -> int:
    """A kind in a colour as a number from 1 on; 0 is nothing."""
    return 1 + KINDS.index(kind) * len(COLOURS) + COLOURS.index(colour)


def places_for(kind: str) -> tuple[str, ...]:
    """The places in which a kind can be: boats and ducks on water, a lighthouse also in the sea."""
    realm = SHAPES[kind].realm
    if realm == "water":
        return ("sea", "beach")
    if realm == "air" or kind == "lighthouse":
        return PLACES
    return PLACES[1:]
