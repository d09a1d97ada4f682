"""The one exception that is meant for the user's eyes."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """Something the caller can put right: one or two lines that say what, where, and what to do next."""


def few(names: Sequence[str], most: int = 2) -> str:
    """The first of many names, for a message of one line: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
