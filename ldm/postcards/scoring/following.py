"""Prompt following: is what the prompt says in the picture?

Only what a prompt states is asked of its picture. The same questions are put to real renders of the prompts'
scenes, where a scorer without fault answers yes to all: the gap to 1 there is the instrument's own error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldm.evaluate.report import Rate, rate
from ldm.postcards.scoring.names import Names
from ldm.postcards.scoring.prompts import Prompt
from ldm.postcards.scoring.scorer import Reading

PLACE, TIME, WEATHER, STYLE = "place", "time of day", "weather", "style"
KIND, COLOUR = "one object: right kind", "one object: right kind and colour"
ITS_COLOUR = "one object: right colour, where the kind is"
BOTH, BOTH_COLOURS = "two objects: both there", "two objects: both there, each in its colour"
SIDE, ABOVE = "left or right of", "above or below"
COUNTS = {2: "two of a kind", 3: "three of a kind"}
_TWO = (BOTH, BOTH_COLOURS, SIDE, ABOVE)
ATTRIBUTES = (PLACE, TIME, WEATHER, STYLE, KIND, COLOUR, ITS_COLOUR, *_TWO, *COUNTS.values())


def judge(prompt: Prompt, read: Reading, i: int, names: Names) -> Iterator[tuple[str, bool]]:
    """(attribute, fulfilled) for all that the prompt states, from picture i's reading.

    One object counts as right when it is there and is what the scorer sees most surely; two must both be
    there, and their order is right only when they are. The style is that of what is there, right or not.
    """
    for attribute, said, found, all_names in (
        (PLACE, prompt.place, read.place[i], names.places),
        (TIME, prompt.time, read.time[i], names.times),
        (WEATHER, prompt.weather, read.weather[i], names.weathers),
    ):
        if said is not None:
            yield attribute, all_names[found] == said
    kinds = [names.kinds.index(named.kind) for named in prompt.objects]
    if not kinds:
        return
    if prompt.style is not None:
        shown = any(read.count[i])
        styles = [names.styles[read.style[i, k]] for k in kinds]
        yield STYLE, shown and all(style == prompt.style for style in styles)
    there = all(read.count[i, k] > 0 for k in kinds)
    coloured = all(
        named.colour in (None, names.colours[read.colour[i, k]])
        for k, named in zip(kinds, prompt.objects, strict=True)
    )
    colours_said = all(named.colour is not None for named in prompt.objects)
    if len(kinds) == 2:
        yield BOTH, there
        if colours_said:
            yield BOTH_COLOURS, there and coloured
        if prompt.relation is not None:
            first, second = kinds
            along = read.x[i] if prompt.relation == "left of" else read.y[i]
            ordered = bool(along[first] < along[second])
            yield (SIDE if prompt.relation == "left of" else ABOVE), there and ordered
    elif prompt.objects[0].count == 1:
        right = there and int(read.presence[i].argmax()) == kinds[0]
        yield KIND, right
        if colours_said:
            yield COLOUR, right and coloured
            if right:
                yield ITS_COLOUR, coloured
    else:
        count = prompt.objects[0].count
        yield COUNTS[count], bool(read.count[i, kinds[0]] == count)


def following(prompts: Sequence[Prompt], read: Reading, names: Names) -> dict[str, Rate]:
    """The share of prompts that each attribute is right for, with its interval.

    Raises ValueError unless there is one picture's reading for each prompt.
    """
    if len(prompts) != len(read.place):
        raise ValueError(f"{len(prompts)} prompts but {len(read.place)} pictures were read")
    outcomes: dict[str, list[bool]] = {}
    for i, prompt in enumerate(prompts):
        for attribute, right in judge(prompt, read, i, names):
            outcomes.setdefault(attribute, []).append(right)
    return {name: rate(outcomes[name]) for name in ATTRIBUTES if name in outcomes}
