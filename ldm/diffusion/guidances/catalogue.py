"""Guidances by their names, and how a chain of them is written: ``apg:eta=0,r=5+interval:0.2,0.8``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ldm.diffusion.guidances.geometry import (
    Magnitude,
    MixedProjected,
    PerpNeg,
    Projected,
    Tangential,
    ZeroStar,
)
from ldm.diffusion.guidances.limits import DynamicThresholding, FrequencyDecoupled
from ldm.diffusion.guidances.part import Option, Part, Rank
from ldm.diffusion.guidances.perturbed import PerturbedAttention, SelfAttention, SkipLayer, SmoothedEnergy
from ldm.diffusion.guidances.plain import Interval, PlainCFG, PlusPlus, Rescale
from ldm.diffusion.guidances.worse import THINNED, AutoGuidance
from ldm.errors import UserError
from ldm.spelling import squash, unknown

_PARTS: tuple[type[Part], ...] = (
    PlainCFG,
    Rescale,
    Interval,
    PlusPlus,
    ZeroStar,
    Projected,
    MixedProjected,
    Tangential,
    PerpNeg,
    Magnitude,
    DynamicThresholding,
    FrequencyDecoupled,
    AutoGuidance,
    PerturbedAttention,
    SmoothedEnergy,
    SkipLayer,
    SelfAttention,
)
GUIDANCES = {part.name: part for part in _PARTS}
_SPELLINGS = {
    squash(spelling): part for part in _PARTS for spelling in (part.name, part.label, *part.aliases)
}


def read_guidance(text: str) -> tuple[Part, ...]:
    """The parts of a chain, in the order of their ranks.

    Parts are joined by "+"; a part is a name in any spelling and, after a colon, options with commas between
    them: ``name=value``, or values alone for the options in their order. Quotes hold what has a comma or "+".

    Raises:
        UserError: for a name, an option or a value that is not allowed, and parts that do not go together.
    """
    parts = sorted((_read_part(each) for each in _split(text, "+")), key=lambda part: part.rank)
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"guidance {name} is given twice: give it once")
    combining = [part.name for part in parts if part.rank is Rank.COMBINES]
    if len(combining) > 1:
        raise UserError(f"guidances {' and '.join(combining)} both combine the branches: give one of them")
    return tuple(parts)


def models_in(text: str) -> tuple[str, ...]:
    """The models, folders or files, that a chain names. Raises UserError as `read_guidance`."""
    parts = [part for part in read_guidance(text) if isinstance(part, AutoGuidance)]
    return tuple(part.model for part in parts if part.model != THINNED)


def spell_guidance(parts: Sequence[Part]) -> str:
    """A chain in its one spelling, with all its options, so that it stays what it is when defaults change."""
    return "+".join(map(_spell_part, parts))


def canonical_guidance(text: str) -> str:
    """Any spelling of a chain as its one. Raises UserError as `read_guidance`."""
    return spell_guidance(read_guidance(text))


def options_of(part: type[Part]) -> dict[str, Option]:
    return {field.name: field.metadata["option"] for field in fields(part)}


def _split(text: str, mark: str) -> list[str]:
    """At marks that do not stand between quotes."""
    return re.split(rf'{re.escape(mark)}(?=(?:[^"]*"[^"]*")*[^"]*$)', text)


def _read_part(text: str) -> Part:
    name, colon, rest = text.partition(":")
    part = _SPELLINGS.get(squash(name))
    if part is None:
        raise unknown("guidance", name.strip(), GUIDANCES)
    known, values = options_of(part), dict[str, Any]()
    for place, given in enumerate(_split(rest, ",") if colon else ()):
        key, equals, value = given.partition("=")
        if not equals or given.lstrip().startswith('"'):
            key, value = ([*known, ""])[min(place, len(known))], given
        option, key = known.get(key.strip()), key.strip()
        if option is None or key in values:
            takes = ", ".join(f"{each} ({known[each].allowed})" for each in known)
            fault = "twice" if option else f"{key or value.strip()!r}, which it has not"
            raise UserError(f"guidance {part.name} is given {fault}: it takes {takes or 'no options'}")
        values[key] = _value(f"guidance {part.name}: {key}", option, value.strip().strip('"'))
    return part(**values)


def _value(what: str, option: Option, text: str) -> Any:
    if option.kind is str:
        if text and (not option.choices or text in option.choices):
            return text
    else:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        whole = option.kind is not int or number.is_integer()
        if option.low <= number <= option.high and whole:
            return option.kind(number)
    raise UserError(f"{what}={text} is not allowed: it must be {option.allowed}")


def _spell_part(part: Part) -> str:
    said = {field.name: getattr(part, field.name) for field in fields(part)}
    options = [f"{name}={_spell(value)}" for name, value in said.items() if value is not None]
    return f"{part.name}:{','.join(options)}" if options else part.name


def _spell(value: float | int | str) -> str:
    if isinstance(value, str):
        return f'"{value}"' if re.search("[,+=]", value) else value
    return repr(value).removesuffix(".0")
