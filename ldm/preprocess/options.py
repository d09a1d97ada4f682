"""Options of preprocessors, declared once in the functions' own signatures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from ldm.errors import UserError
from ldm.spelling import unknown

Value = float | bool
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Within:
    """`Annotated[float, Within(0, 255, "what it is")]`: bounds, both allowed. Of a bool, the text counts."""

    low: float
    high: float
    what: str


@dataclass(frozen=True)
class Option:
    """An option of one preprocessor."""

    default: Value
    within: Within

    def read(self, name: str, value: object) -> Value:
        """A number or its text as this option has it. Raises UserError that names the option and bounds."""
        if isinstance(self.default, bool):
            text = str(value).lower()
            if text not in TRUE + FALSE:
                raise UserError(f"{name} {value!r} is not allowed: it is on or off")
            return text in TRUE
        low, high = self.within.low, self.within.high
        try:
            number = float(str(value))
        except ValueError:
            number = math.nan
        whole = not isinstance(self.default, int) or number.is_integer()
        if isinstance(value, bool) or not low <= number <= high or not whole:
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            raise UserError(f"{name} {value} is not allowed: {kind} from {low:g} to {high:g}")
        return int(number) if isinstance(self.default, int) else number


def declared(function: Callable[..., Any]) -> Mapping[str, Option]:
    """The keyword-only parameters of a preprocessor, by name."""
    hints = get_type_hints(function, include_extras=True)
    return {
        name: Option(each.default, hints[name].__metadata__[0])
        for name, each in inspect.signature(function).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    }


def read(preprocessor: str, options: Mapping[str, Option], given: Mapping[str, object]) -> dict[str, Value]:
    """What is given, checked. Raises UserError for a name that is not there, and beyond bounds."""
    for name in given:
        if name not in options:
            if not options:
                raise UserError(f"{preprocessor} has no options: leave {name} out")
            raise unknown(f"option of {preprocessor}", name, options)
    return {name: options[name].read(f"{preprocessor}: {name}", value) for name, value in given.items()}
