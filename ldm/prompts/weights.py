"""What other programs read as weights: `(a boat:1.3)`, `((sea))`, `BREAK`. Here it is plain text."""

from __future__ import annotations

import re

_NUMBER = r"[+-]?(?:\d{1,8}\.?\d{0,8}|\.\d{1,8})"
# A number before a closing bracket; two brackets in a row, without a backslash; the word in capitals.
_WEIGHT = re.compile(rf":[ ]{{0,8}}{_NUMBER}[ ]{{0,8}}[)\]]|(?<!\\)(?:\(\(|\[\[)|\bBREAK\b")
_SHOWN = 24  # characters before it and after it


def find_weight(prompt: str) -> str | None:
    """The first piece of a prompt that asks for weights, quoted with some words around it, or None."""
    found = _WEIGHT.search(prompt)
    if found is None:
        return None
    return repr(prompt[max(0, found.start() - _SHOWN) : found.end() + _SHOWN])
