"""Names as people spell them: "DPM++ 2M", "dpm++2m" and "dpmpp_2m" are one name."""

import difflib
import re
from collections.abc import Iterable

from ldm.errors import UserError


def squash(name: str) -> str:
    """`name` in lower case, "+" as "p", and nothing but letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


def counted(number: int, one: str, several: str = "") -> str:
    """`number` with its word: "1 row", "3 rows"; `several` for words that do not only take an s."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def unknown(what: str, name: str, names: Iterable[str]) -> UserError:
    """The error for a name that is not known, with the nearest that are."""
    known = {squash(each): each for each in names}
    near = difflib.get_close_matches(squash(name), known, n=3, cutoff=0.5)
    offer = f"did you mean {', '.join(known[each] for each in near)}?" if near else ""
    return UserError(f"unknown {what} {name!r}: {offer or 'choose from ' + ', '.join(known.values())}")
