"""The one exception that is meant for the user's eyes."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

NEWLINE = "\n"


class UserError(ValueError):
    """Something the caller can put right: one or two lines that say what, where, and what to do next."""


class NoSuchName(UserError, AttributeError):
    """For an attribute that is not there, or cannot be set: says what to write."""


@contextmanager
def reported(training: bool = False) -> Iterator[None]:
    """Inside the block a UserError is one line and exit code 2; in `training` a missing package is, too."""
    try:
        yield
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if not training:
            raise
        message = f"training needs {error.name}: pip install 'ldm[train]'"
    else:
        return
    print(f"error: {printable(message, keep=NEWLINE)}", file=sys.stderr)
    sys.exit(2)


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def abbreviate(names: Sequence[str], most: int = 2) -> str:
    """The first of many names, for a message of one line: "a, b and 3 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def printable(text: object, keep: str = "") -> str:
    """`text` as a terminal may have it: controls, escapes and turns of direction written out, but for `keep`.

    For whatever others wrote: names of files, texts in pictures, and messages that quote them.
    """
    return "".join(c if c in keep or _shows(c) else c.encode("unicode_escape").decode() for c in str(text))


def _shows(c: str) -> bool:
    return c.isprintable() or unicodedata.category(c) == "Zs"
